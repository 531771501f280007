//! What cublasLt reaches on the products of a decode step and of a large one: the rates that floors are computed from, and
//! how far from them the shapes of layers are.
//!
//! Weights rotate over more memory than the second-level cache holds, and hold random numbers: zeros cost less power.

use mirai_cuda::{
    Arena, DevicePtr, Event, Gpu, Lt, LtOperands, LtOptions, LtOutput, LtShape, LtStorage, Part,
};
use serde_json::{Value, json};

use super::{Emit, Failure, IMPOSSIBLE, Options, spread};

/// Name, outputs and inner width of each product.
const LAYERS: [(&str, u32, u32); 9] = [
    ("llama-3.1-8b qkv", 6144, 4096),
    ("llama-3.1-8b o", 4096, 4096),
    ("llama-3.1-8b gate+up", 28_672, 4096),
    ("llama-3.1-8b down", 4096, 14_336),
    ("llama-3.1-8b head", 128_256, 4096),
    ("qwen3-30b-a3b qkv", 5120, 2048),
    ("qwen3-30b-a3b o", 2048, 4096),
    ("qwen3-30b-a3b head", 151_936, 2048),
    ("square", 8192, 8192),
];
const ROWS: [u32; 9] = [1, 8, 16, 32, 64, 128, 256, 4096, 8192];
/// Rows from which on a product says what the arithmetic units reach.
const MANY: u32 = 4096;
/// Bytes that weights rotate over, many times the cache.
const ROTATED: u64 = 1 << 30;
/// Bytes of cublasLt's scratch.
const WORKSPACE: u64 = 64 << 20;
/// Scales of e4m3 operands, all 1.
const SCALE_BYTES: u64 = 256;
/// Rounds, of which the median counts, and about how long each is.
const ROUNDS: usize = 5;
const ROUND_MS: f64 = 4.0;
/// Most runs of a round.
const MAX_RUNS: usize = 200;
/// A piece of random numbers, which is copied over and over.
const PIECE: usize = 32 << 20;

/// Sizes of a run.
struct Sizes {
    layers: Vec<(&'static str, u32, u32)>,
    rows: Vec<u32>,
    rotated: u64,
    workspace: u64,
    piece: usize,
    rounds: usize,
}

impl Sizes {
    fn new(tiny: bool) -> Self {
        if tiny {
            let layers = vec![("tiny", 64, 32)];
            let (rows, piece, workspace) = (vec![1, 8], 64 << 10, 1 << 20);
            return Self { layers, rows, rotated: 256 << 10, workspace, piece, rounds: 2 };
        }
        let (layers, rows) = (LAYERS.to_vec(), ROWS.to_vec());
        Self { layers, rows, rotated: ROTATED, workspace: WORKSPACE, piece: PIECE, rounds: ROUNDS }
    }

    /// Most elements of a weight.
    fn largest_weight(&self) -> u64 {
        let largest = self.layers.iter().map(|(_, outputs, inner)| u64::from(*outputs) * u64::from(*inner));
        largest.max().unwrap_or(0)
    }

    fn bytes_for_weights(&self) -> u64 {
        self.rotated.max(2 * self.largest_weight())
    }

    /// Most bytes of x and of y.
    fn bytes_for_rows(&self) -> u64 {
        let rows = self.rows.iter().copied().max().map_or(0, u64::from);
        let width = self.layers.iter().map(|(_, outputs, inner)| u64::from((*outputs).max(*inner))).max();
        rows * width.unwrap_or(0) * 2
    }
}

/// Device memory of the products.
struct Place {
    x: DevicePtr,
    y: DevicePtr,
    scales: DevicePtr,
    weights: DevicePtr,
    weight_bytes: u64,
    /// Where candidates are timed, and its bytes.
    scratch: (DevicePtr, u64),
}

/// Times all products, in bf16 and in e4m3.
pub(super) fn run(options: &Options, emit: &mut Emit<'_>) -> Result<(), Failure> {
    let sizes = Sizes::new(options.tiny);
    let (rates, _) = options.rates()?;
    let gpu = Gpu::open(0)?;
    let rows = sizes.bytes_for_rows();
    // Candidates are timed where no numbers are lost.
    let scratch_bytes = 2 * rows + 4 * sizes.largest_weight() + (1 << 20);
    let bytes = sizes.bytes_for_weights() + 2 * rows + scratch_bytes + sizes.workspace + (1 << 20);
    let mut arena = Arena::new(&gpu, bytes)?;
    let place = Place {
        x: arena.take(Part::Activations, rows)?,
        y: arena.take(Part::Activations, rows)?,
        scales: arena.take(Part::Workspace, SCALE_BYTES)?,
        weights: arena.take(Part::Weights, sizes.bytes_for_weights())?,
        weight_bytes: sizes.bytes_for_weights(),
        scratch: (arena.take(Part::Workspace, scratch_bytes)?, scratch_bytes),
    };
    let workspace = arena.take(Part::Workspace, sizes.workspace)?;
    let lt_options =
        LtOptions { workspace, workspace_bytes: sizes.workspace, candidates: 8, plan_folder: None };
    gpu.upload_now(place.scales, &1f32.to_le_bytes().repeat(SCALE_BYTES as usize / 4))?;
    let mut best = [0.0f64; 2];
    for (storage, best) in [LtStorage::Bf16, LtStorage::E4m3Tensor].into_iter().zip(&mut best) {
        fill(&gpu, &place, &sizes, rows, storage)?;
        for &(name, outputs, inner) in &sizes.layers {
            for &count in &sizes.rows {
                let output = LtOutput::Bf16;
                let shape = LtShape { rows: count, outputs, inner, storage, output, bias: false };
                let mut lt = Lt::new(&gpu, lt_options.clone())?;
                match time(&gpu, &mut lt, shape, &place, sizes.rounds) {
                    Ok(milliseconds) => {
                        if count >= MANY || options.tiny {
                            *best = best.max(operations(&shape) / (milliseconds / 1e3));
                        }
                        emit(product_row(name, &shape, milliseconds, rates.bytes));
                    }
                    // The library has no algorithm for some e4m3 shapes; the backend has kernels of its own for those.
                    Err(error) => emit(json!({
                        "row": "matmul", "layer": name, "shape": shape.to_string(),
                        "unsupported": error.to_string(),
                    })),
                }
            }
        }
    }
    emit(json!({"row": "matmul rates", "bf16": best[0], "e4m3": best[1]}));
    Ok(())
}

fn operations(shape: &LtShape) -> f64 {
    2.0 * f64::from(shape.rows) * f64::from(shape.outputs) * f64::from(shape.inner)
}

fn weight_bytes(shape: &LtShape) -> u64 {
    let element = if shape.storage == LtStorage::Bf16 { 2 } else { 1 };
    u64::from(shape.outputs) * u64::from(shape.inner) * element
}

fn product_row(name: &str, shape: &LtShape, milliseconds: f64, bytes_a_second: f64) -> Value {
    let rate = weight_bytes(shape) as f64 / (milliseconds / 1e3);
    let (storage, fraction) = (format!("{:?}", shape.storage), rate / bytes_a_second);
    json!({
        "row": "matmul", "layer": name, "storage": storage, "rows": shape.rows, "outputs": shape.outputs,
        "inner": shape.inner, "us": milliseconds * 1e3, "weight_bytes_per_s": rate,
        "flops": operations(shape) / (milliseconds / 1e3), "fraction_of_bandwidth": fraction,
        "impossible": fraction > IMPOSSIBLE,
    })
}

/// Milliseconds of one product.
fn time(gpu: &Gpu, lt: &mut Lt, shape: LtShape, place: &Place, rounds: usize) -> Result<f64, Failure> {
    lt.tune(&[shape], place.scratch)?;
    let plan = lt.plan(&shape).ok_or("no plan was made")?;
    let bytes = weight_bytes(&shape).next_multiple_of(256);
    let copies = (place.weight_bytes / bytes).max(1);
    let (start, end) = (Event::timed(gpu)?, Event::timed(gpu)?);
    let mut copy = 0;
    let mut timed = |runs: usize| -> Result<f64, Failure> {
        start.record()?;
        for _ in 0..runs {
            copy = (copy + 1) % copies;
            let operands = LtOperands {
                x: place.x,
                x_scales: place.scales,
                weight: place.weights.add(copy * bytes),
                weight_scales: place.scales,
                bias: DevicePtr::NULL,
                y: place.y,
            };
            lt.run(plan, &operands)?;
        }
        end.record()?;
        end.wait()?;
        Ok(f64::from(end.since(&start)?) / runs as f64)
    };
    timed(2)?;
    let once = timed(2)?.max(1e-4);
    let runs = ((ROUND_MS / once) as usize).clamp(2, MAX_RUNS);
    let all = (0..rounds).map(|_| timed(runs)).collect::<Result<Vec<f64>, _>>()?;
    Ok(spread(&all).0)
}

/// Random numbers of about 1 in size, in weights and x.
fn fill(gpu: &Gpu, place: &Place, sizes: &Sizes, rows: u64, storage: LtStorage) -> Result<(), Failure> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u16
    };
    let piece: Vec<u8> = match storage {
        // Sign, exponents of 1/8 to 2, any mantissa.
        LtStorage::Bf16 => (0..sizes.piece / 2)
            .flat_map(|_| {
                let bits = random();
                ((bits & 0x807f) | ((124 + (bits >> 7 & 3)) << 7)).to_le_bytes()
            })
            .collect(),
        _ => (0..sizes.piece)
            .map(|_| {
                let bits = random() as u8;
                (bits & 0x87) | ((4 + (bits >> 3 & 3)) << 3)
            })
            .collect(),
    };
    gpu.upload_now(place.weights, &piece)?;
    for (at, bytes) in [(place.weights, place.weight_bytes), (place.x, rows)] {
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(sizes.piece as u64);
            if at.add(done) != place.weights {
                gpu.copy(at.add(done), place.weights, part)?;
            }
            done += part;
        }
    }
    Ok(gpu.synchronize()?)
}
