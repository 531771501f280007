//! Operations of the backend one by one on the emulated driver, against the f64 oracle.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::borrow::Cow;
use std::sync::Arc;

use half::bf16;
use mirai_cuda::{CudaBackend, CudaOptions, Gpu, MemoryOptions};
use mirai_engine::{
    Row, RowInput, RowOutput, SamplingParams, SeqId, SlotId, SlotOpen, StepOutcome, StepPlan,
};
use mirai_model::backend::{
    Backend, Batch, BatchRow, CacheLayout, HostTensor, LinearUse, Outline, Pairing, RopeTable, Rows,
    ScaleValues, Scales, StepLimits, Storage,
};
use mirai_model::reference::Reference;
use support::on_emulated_driver;

const MEMORY: (&str, &str) = ("MIRAI_EMU_MEMORY", "134217728");
/// Rows and columns of the weights.
const WIDTH: usize = 64;
/// More than the kernels for few rows take.
const TOKENS: usize = 90;

fn bf16_tensor(seed: usize) -> HostTensor<'static> {
    let value = |i: usize| ((i * 37 + seed * 11) % 23) as f32 / 23.0 - 0.5;
    let bytes = (0..TOKENS.max(WIDTH) * WIDTH).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes());
    HostTensor {
        name: format!("bf16 {seed}"),
        shape: vec![TOKENS.max(WIDTH), WIDTH],
        storage: Storage::Bf16,
        bytes: Cow::Owned(bytes.collect()),
        scales: None,
    }
}

/// Codes of numbers up to 1, with a scale for each row.
fn e4m3_tensor(like: &HostTensor<'_>) -> HostTensor<'static> {
    let rows = like.shape[0];
    let codes = (0..rows * WIDTH).map(|i| ((i * 29) % 0x38) as u8 | (((i * 13) % 2) as u8) << 7);
    let values = ScaleValues::F32((0..rows).map(|row| 0.5 + row as f32 / 64.0).collect());
    HostTensor {
        name: "e4m3".to_owned(),
        shape: like.shape.clone(),
        storage: Storage::F8E4M3,
        bytes: Cow::Owned(codes.collect()),
        scales: Some(Scales { block: (1, WIDTH), values, zeros: None }),
    }
}

/// A step of one prompt, of which the pooling head is asked.
fn step() -> (StepPlan, Batch) {
    let ids: Vec<u32> = (0..TOKENS as u32).collect();
    let row = Row {
        seq: SeqId(0),
        slot: SlotId(0),
        start: 0,
        len: TOKENS as u32,
        input: RowInput::Tokens(0),
        output: RowOutput::Pool,
    };
    let open = SlotOpen {
        slot: SlotId(0),
        seq: SeqId(0),
        choice: 0,
        sampling: Arc::new(SamplingParams::default()),
        prompt: ids.clone().into(),
        output: vec![],
        computed: 0,
        blocks: vec![],
        restore: None,
    };
    let plan = StepPlan { opens: vec![open], tokens: ids.clone(), rows: vec![row], ..StepPlan::default() };
    let only = BatchRow {
        slot: SlotId(0),
        first: 0,
        len: TOKENS,
        start: 0,
        last_drawn: false,
        sample: false,
        pool: true,
        outputs: (0, 1),
    };
    let positions = ids.clone();
    (plan, Batch { ids, positions, rows: vec![only], outputs: vec![TOKENS as u32 - 1] })
}

fn outline<B: Backend>(backend: &mut B) {
    backend.limits(StepLimits { tokens: TOKENS, rows: 1 }).unwrap();
    backend.outline(&Outline { hidden: WIDTH, ..Outline::default() }).unwrap();
}

fn no_cache() -> CacheLayout {
    CacheLayout { groups: vec![], blocks: 0, slots: 1, snapshots: 0, table_len: 8 }
}

fn gpu() -> CudaBackend {
    let memory = MemoryOptions { utilization: 0.95, cache: None };
    let options = CudaOptions { memory, matmul_candidates: 1, ..CudaOptions::default() };
    CudaBackend::new(Gpu::open(0).unwrap(), options).unwrap()
}

/// One prompt through an embedding and a weight, and the mean of its rows.
fn mean_product<B: Backend>(mut backend: B, weight: impl Fn(&mut B) -> B::Linear) -> Vec<f32> {
    outline(&mut backend);
    let table = backend.load_linear_for(vec![bf16_tensor(1)], LinearUse::Table).unwrap();
    let weight = weight(&mut backend);
    let mut x = backend.buffer(Rows::Tokens, WIDTH).unwrap();
    let mut y = backend.buffer(Rows::Tokens, TOKENS).unwrap();
    let mut out = backend.buffer(Rows::Outputs, TOKENS).unwrap();
    backend.allocate_cache(&no_cache()).unwrap();
    let (plan, batch) = step();
    backend.begin(&plan, &batch).unwrap();
    backend.embed(&table, 1.0, &mut x).unwrap();
    backend.linear(&weight, None, &x, &mut y).unwrap();
    backend.mean_outputs(&y, &mut out).unwrap();
    backend.emit(&out).unwrap();
    let mut outcome = StepOutcome::default();
    backend.collect(&mut outcome).unwrap();
    outcome.rows.swap_remove(0).pooled.unwrap().to_vec()
}

/// A checkpoint in 8 bits that leaves one of two layers of equal shape in bf16.
#[test]
fn a_weight_of_8_bits_does_not_take_the_plan_of_its_neighbour_in_bf16() {
    const NAME: &str = "a_weight_of_8_bits_does_not_take_the_plan_of_its_neighbour_in_bf16";
    fn both<B: Backend>(backend: &mut B, wanted: Storage) -> B::Linear {
        let (bf16, e4m3) = (bf16_tensor(2), e4m3_tensor(&bf16_tensor(2)));
        let bf16 = backend.load_linear(vec![bf16]).unwrap();
        let e4m3 = backend.load_linear(vec![e4m3]).unwrap();
        if wanted == Storage::Bf16 { bf16 } else { e4m3 }
    }
    on_emulated_driver(NAME, &[MEMORY], || {
        for storage in [Storage::Bf16, Storage::F8E4M3] {
            let got = mean_product(gpu(), |gpu| both(gpu, storage));
            let exact = mean_product(Reference::default(), |reference| both(reference, storage));
            let largest = exact.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
            let worst = exact.iter().zip(&got).map(|(e, g)| (e - g).abs()).fold(0.0, f32::max);
            println!("{storage:?}: {worst} of {largest}");
            assert!(got.len() == TOKENS && worst < 0.02 * largest, "{storage:?}: {worst} of {largest}");
        }
    });
}

/// A recorded step runs no operation that could look at its positions, so that whoever begins it does.
#[test]
fn a_step_beyond_the_rotary_tables_is_refused_where_it_begins() {
    on_emulated_driver("a_step_beyond_the_rotary_tables_is_refused_where_it_begins", &[MEMORY], || {
        for (positions, refused) in [(TOKENS, false), (TOKENS - 1, true)] {
            let mut backend = gpu();
            outline(&mut backend);
            for positions in [positions, 2 * TOKENS] {
                let (cos, sin) = (vec![1.0; 4 * positions], vec![0.0; 4 * positions]);
                let (rotary_dim, pairing) = (8, Pairing::Halves);
                backend.load_rope(&RopeTable { rotary_dim, pairing, cos, sin, q_scale: vec![] }).unwrap();
            }
            backend.allocate_cache(&no_cache()).unwrap();
            let (plan, batch) = step();
            let error = backend.begin(&plan, &batch).err().map(|error| error.to_string());
            let words = "position 89 of a rotary table of 89";
            assert_eq!(error.as_ref().is_some_and(|error| error.contains(words)), refused, "{error:?}");
        }
    });
}
