//! Times whole steps of a model on this backend: forward pass, logits and sampling, as the engine runs them.
//!
//! Weights are random, of the SmolLM2-135M shape (hidden 576, 30 layers, 9 query and 3 kv heads, feed-forward 1,536,
//! vocabulary 49,152, tied head):
//! `cargo run --release -p mirai-cpu --example decode -- [bf16|q8_0|q4_k] [threads] [context] [temperature]`.
//! Prints the best of several runs: on a shared machine the least disturbed run says most about the code.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirai_cpu::{CpuBackend, CpuOptions, default_threads};
use mirai_engine::{
    BlockId, Executor, Row, RowInput, RowOutput, SamplingParams, SeqId, SlotId, SlotOpen, StepOutcome,
    StepPlan,
};
use mirai_model::backend::Storage;
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, Quantization, load};

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "bfloat16"}"#;
const PREFILL: u32 = 512;
const STEPS: u32 = 16;
const ROUNDS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let storage = args.next().unwrap_or_else(|| "bf16".to_owned());
    let threads = args.next().map_or(Ok(default_threads()), |a| a.parse())?;
    let context: u32 = args.next().map_or(Ok(0), |a| a.parse())?;
    let temperature: f32 = args.next().map_or(Ok(0.0), |a| a.parse())?;
    let quantization = match storage.as_str() {
        "bf16" => None,
        "q8_0" => Some(Quantization::Q8_0),
        "q4_k" => Some(Quantization::Q4K),
        other => return Err(format!("`{other}` is not bf16, q8_0 or q4_k").into()),
    };
    let options = LoadOptions {
        dummy: Some(1),
        dtype: Some(Storage::Bf16),
        quantization,
        cache: CacheBudget::Tokens(32 * 1024),
        max_model_len: Some(1024),
        max_slots: 32,
        max_step_tokens: 4096,
        ..LoadOptions::default()
    };
    let source = ModelSource::memory("dummy", &[("config.json", CONFIG.as_bytes())]);
    let backend = CpuBackend::new(&CpuOptions { threads: Some(threads), ..CpuOptions::default() });
    let mut executor = load(&source, &options, backend, &mut |_, _| {})?.executor;
    println!("{storage}, {threads} threads, {:?}, context {context}", executor.backend().isa());
    let mut step = Stepper { executor: &mut executor, number: 0, temperature };
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        best = best.min(step.prefill(0, PREFILL)?);
    }
    println!("prefill {PREFILL}: {:.0} tokens/s ({best:?})", f64::from(PREFILL) / best.as_secs_f64());
    for rows in [1, 4, 8, 32] {
        for slot in 0..rows {
            step.prefill(slot, context.max(1))?;
        }
        let mut best = Duration::MAX;
        for round in 0..ROUNDS as u32 {
            let start = Instant::now();
            for n in 0..STEPS {
                step.decode(rows, context.max(1) + round * STEPS + n)?;
            }
            best = best.min(start.elapsed() / STEPS);
        }
        println!(
            "decode {rows:>2} rows: {:.0} tokens/s ({best:?} a step)",
            f64::from(rows) / best.as_secs_f64()
        );
    }
    Ok(())
}

/// Feeds steps to the executor.
struct Stepper<'a> {
    executor: &'a mut ModelExecutor<CpuBackend>,
    number: u64,
    temperature: f32,
}

impl Stepper<'_> {
    /// Opens a slot with a prompt of `len` tokens and computes it in one step.
    fn prefill(&mut self, slot: u32, len: u32) -> Result<Duration, Box<dyn Error>> {
        let prompt: Arc<[u32]> = (0..len).map(|i| i * 7919 % 49_152).collect();
        // Each slot has its own 64 blocks, the reserved one left out.
        let blocks = (0..64).map(|b| BlockId(1 + slot * 63 + b % 63)).collect();
        let sampling = SamplingParams {
            temperature: self.temperature,
            top_p: 0.95,
            top_k: 50,
            ..SamplingParams::default()
        };
        let open = SlotOpen {
            slot: SlotId(slot),
            seq: SeqId(u64::from(slot)),
            choice: slot,
            sampling: Arc::new(sampling),
            prompt: prompt.clone(),
            output: Vec::new(),
            computed: 0,
            blocks: vec![blocks],
            restore: None,
        };
        let row = self.row(slot, 0, len, RowInput::Tokens(0));
        let plan =
            StepPlan { opens: vec![open], tokens: prompt.to_vec(), rows: vec![row], ..StepPlan::default() };
        let start = Instant::now();
        self.run(plan)?;
        Ok(start.elapsed())
    }

    /// One token for each of `rows` slots.
    fn decode(&mut self, rows: u32, position: u32) -> Result<(), Box<dyn Error>> {
        let rows = (0..rows).map(|slot| self.row(slot, position, 1, RowInput::LastDrawn)).collect();
        self.run(StepPlan { rows, ..StepPlan::default() })
    }

    fn row(&self, slot: u32, start: u32, len: u32, input: RowInput) -> Row {
        Row { seq: SeqId(u64::from(slot)), slot: SlotId(slot), start, len, input, output: RowOutput::Sample }
    }

    fn run(&mut self, mut plan: StepPlan) -> Result<(), Box<dyn Error>> {
        self.number += 1;
        plan.step = self.number;
        let mut outcome = StepOutcome::default();
        self.executor.submit(&plan)?;
        self.executor.collect(&mut outcome)?;
        if let Some(fault) = outcome.rows.iter().find_map(|row| row.fault.clone()) {
            return Err(fault.into());
        }
        Ok(())
    }
}
