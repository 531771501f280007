//! Steps with random weights at true shapes, against their floors.
//!
//! Owns the cases: decode of few and many sequences behind a context, one long prompt, and a step that mixes both. Experts
//! are chosen as random weights choose them, which the floor takes to be uniform.

use std::time::Instant;

use mirai_cuda::CudaOptions;
use mirai_engine::{RowOutput, StepPlan};
use mirai_model::backend::CacheDtype;
use mirai_model::floor::{Ceilings, CostModel, Floor, Precision, WorkRow};
use mirai_model::{CacheBudget, LoadOptions, LoadedModel, ModelSource, Quantization, load};
use serde_json::{Value, json};

use super::play::{Player, Room, Timing, work_rows};
use super::shapes::{Shape, Sizes, TINY_SIZES, TRUE_SIZES, shapes};
use super::{Emit, Failure, IMPOSSIBLE, Options, backend, spread};

/// Seed of the weights.
const SEED: u64 = 11;

/// Runs the cases of one shape.
pub(super) fn run(options: &Options, emit: &mut Emit<'_>) -> Result<(), Failure> {
    if options.list {
        shapes(options.tiny).iter().for_each(|shape| emit(json!({"row": "shape", "shape": shape.name})));
        return Ok(());
    }
    let shape = find(options)?;
    let sizes = if options.tiny { TINY_SIZES } else { TRUE_SIZES };
    let (ceilings, measured) = options.rates()?;
    let bench = Bench::load(shape, sizes, ceilings, emit)?;
    emit(json!({
        "row": "rates", "measured": measured,
        "bytes": ceilings.bytes, "bf16": ceilings.bf16, "e4m3": ceilings.e4m3,
    }));
    bench.run(emit)
}

fn find(options: &Options) -> Result<Shape, Failure> {
    let found = shapes(options.tiny).into_iter().find(|shape| shape.name == options.shape);
    found.ok_or_else(|| format!("no shape `{}`", options.shape).into())
}

fn source(shape: &Shape) -> ModelSource {
    ModelSource::memory(shape.name, &[("config.json", shape.config.as_bytes())])
}

/// The most output tokens a second of a server that never idles: each request costs its prompt's floor and its share of the
/// decode steps' floors, one after the other.
pub(super) fn bound(options: &Options, emit: &mut Emit<'_>) -> Result<(), Failure> {
    let shape = find(options)?;
    let (ceilings, measured) = options.rates()?;
    let [batch, prompt, answer] = options.load;
    let cache = if shape.e4m3 { CacheDtype::F8E4M3 } else { CacheDtype::Bf16 };
    let spec = mirai_model::loader::read_spec(&source(&shape))?;
    let cost = CostModel::new(&spec, Precision { e4m3_weights: shape.e4m3, cache });
    let seconds = |rows: &[WorkRow]| cost.step(rows).floor(&ceilings).seconds();
    // Prompts share a step with others, so that their weights are read once for many: arithmetic alone counts.
    let prefill = cost.step(&[WorkRow { start: 0, len: prompt, outputs: 1 }]).floor(&ceilings).compute;
    let decode = seconds(&vec![WorkRow { start: prompt + answer / 2, len: 1, outputs: 1 }; batch]);
    let tokens_per_s = answer as f64 / (prefill + answer as f64 * decode / batch as f64);
    emit(json!({
        "row": "bound", "shape": shape.name, "measured": measured, "tokens_per_s": tokens_per_s,
        "prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3,
    }));
    Ok(())
}

struct Bench {
    shape: Shape,
    sizes: Sizes,
    ceilings: Ceilings,
    cost: CostModel,
    player: Player,
}

/// What was timed.
struct Case {
    name: String,
    /// A step in the middle of the run.
    rows: Vec<WorkRow>,
    timing: Timing,
    /// Most times the floor.
    bar: f64,
    /// Tokens that count: those drawn, or those of the prompt.
    tokens: usize,
}

impl Bench {
    fn load(shape: Shape, sizes: Sizes, ceilings: Ceilings, emit: &mut Emit<'_>) -> Result<Self, Failure> {
        let cache = if shape.e4m3 { CacheDtype::F8E4M3 } else { CacheDtype::Bf16 };
        let most = *sizes.batches.last().ok_or("no batches")?;
        let reach = sizes.context + sizes.decode_steps + sizes.warm + 1;
        let room = Room { slots: most, long: sizes.prefill.max(reach), short: reach };
        let load_options = LoadOptions {
            dummy: Some(SEED),
            quantization: shape.e4m3.then_some(Quantization::F8E4M3),
            cache: CacheBudget::Tokens(room.tokens() as u64),
            cache_dtype: cache,
            max_model_len: Some(room.long),
            max_slots: room.slots,
            max_step_tokens: sizes.prefill.max(sizes.mixed.0 + sizes.mixed.1),
            ..LoadOptions::default()
        };
        let start = Instant::now();
        let backend = backend(sizes.memory, CudaOptions::default())?;
        let loaded = load(&source(&shape), &load_options, backend, &mut |_, _| {})?;
        emit(loaded_row(&shape, &loaded, start.elapsed().as_secs_f64()));
        let cost = CostModel::new(&loaded.spec, Precision { e4m3_weights: shape.e4m3, cache });
        let player = Player::new(loaded.executor, room)?;
        Ok(Self { shape, sizes, ceilings, cost, player })
    }

    fn run(mut self, emit: &mut Emit<'_>) -> Result<(), Failure> {
        let sizes = self.sizes;
        let most = self.player_slots();
        let context = sizes.context - sizes.decode_steps / 2;
        self.player.fill(0..most, context)?;
        for batch in sizes.batches {
            let case = self.decode(batch, context)?;
            emit(self.row(&case));
        }
        let case = self.mixed(context)?;
        emit(self.row(&case));
        let case = self.prefill()?;
        emit(self.row(&case));
        Ok(())
    }

    fn player_slots(&self) -> usize {
        self.sizes.batches.iter().copied().max().unwrap_or(1)
    }

    fn decode(&mut self, batch: usize, context: usize) -> Result<Case, Failure> {
        let Sizes { warm, decode_steps, .. } = self.sizes;
        let mut rows = Vec::new();
        let timing = self.player.time(warm, decode_steps, |player, index| {
            let plan = player.decode_plan(0..batch, (index == 0).then_some(context));
            if index == warm + decode_steps / 2 {
                rows = work_rows(&plan);
            }
            plan
        })?;
        let (one, many) = self.shape.bars.decode;
        let bar = if batch == 1 { one } else { many };
        Ok(Case { name: format!("decode {batch}"), rows, timing, bar, tokens: batch })
    }

    /// Rows that decode beside a piece of a prompt, which starts again in every step.
    fn mixed(&mut self, context: usize) -> Result<Case, Failure> {
        let Sizes { warm, prefill_steps, mixed: (decoding, piece), .. } = self.sizes;
        let mut rows = Vec::new();
        let timing = self.player.time(warm, prefill_steps, |player, index| {
            let mut plan = player.decode_plan(1..1 + decoding, (index == 0).then_some(context));
            player.add_prefill(&mut plan, piece, RowOutput::Nothing);
            rows = work_rows(&plan);
            plan
        })?;
        let (name, bar) = (format!("mixed {decoding} + {piece}"), self.shape.bars.mixed);
        Ok(Case { name, rows, timing, bar, tokens: decoding + piece })
    }

    fn prefill(&mut self) -> Result<Case, Failure> {
        let Sizes { warm, prefill_steps, prefill, .. } = self.sizes;
        let mut rows = Vec::new();
        let timing = self.player.time(warm.min(2), prefill_steps, |player, _| {
            let mut plan: StepPlan = player.plan();
            player.add_prefill(&mut plan, prefill, RowOutput::Sample);
            rows = work_rows(&plan);
            plan
        })?;
        let bar = self.shape.bars.prefill;
        Ok(Case { name: format!("prefill {prefill}"), rows, timing, bar, tokens: prefill })
    }

    fn row(&self, case: &Case) -> Value {
        let work = self.cost.step(&case.rows);
        step_row(self.shape.name, case, work.floor(&self.ceilings), work.weight_bytes + work.cache_bytes)
    }
}

fn loaded_row(shape: &Shape, loaded: &LoadedModel<mirai_cuda::CudaBackend>, seconds: f64) -> Value {
    let recorded = loaded.executor.backend().recorded();
    json!({
        "row": "loaded", "shape": shape.name, "load_s": seconds, "weight_bytes": loaded.weight_bytes,
        "cache_bytes": loaded.cache.bytes, "graphs": recorded.len(), "layers": loaded.spec.layers.len(),
        "kernels": recorded.iter().map(|(rows, kernels)| json!([rows, kernels])).collect::<Vec<_>>(),
    })
}

fn step_row(shape: &str, case: &Case, floor: Floor, bytes: f64) -> Value {
    let (median, low, high) = spread(&case.timing.wall);
    let (device, ..) = spread(&case.timing.device);
    let floor_ms = floor.seconds() * 1e3;
    let steps = case.timing.wall.len();
    let counted = (case.tokens * steps) as f64;
    json!({
        "row": "step", "shape": shape, "case": case.name, "rows": case.rows.len(), "steps": steps,
        "median_ms": median, "p10_ms": low, "p90_ms": high, "device_ms": device,
        "floor_ms": floor_ms, "bound": floor.bound(), "bytes": bytes,
        "fraction": floor_ms / median, "times_floor": median / floor_ms, "bar": case.bar,
        "pass": median <= case.bar * floor_ms, "impossible": floor_ms / median > IMPOSSIBLE,
        "tokens_per_s": case.tokens as f64 / median * 1e3,
        "joules_per_token": case.timing.joules.map(|joules| joules / counted),
        "watts": case.timing.reading.power_watts, "sm_mhz": case.timing.reading.sm_clock_mhz,
        "memory_mhz": case.timing.reading.memory_clock_mhz, "xid": case.timing.reading.xid,
    })
}
