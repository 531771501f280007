//! Golden cases on the device.
//!
//! Each case is played alone, beside others in chunks (whose single-token steps are replayed from graphs with padding rows),
//! drawn from, and all of that once more on a fresh device state, which must give the same bits. Owns the gate, which is
//! that of the tests on the emulated driver.

use std::panic::{AssertUnwindSafe, catch_unwind};

use mirai_cuda::{CudaBackend, CudaOptions};
use mirai_engine::Executor;
use mirai_model::backend::{Backend, CacheDtype, Storage};
use mirai_model::reference::Reference;
use mirai_model::testing::{Difference, Driver, GoldenCase, Played, Script, cosine};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, load};
use serde_json::{Value, json};

use super::{Emit, Failure, Options, backend};

/// On differences of log-probabilities, or of pooled numbers. bf16 rounds by up to 1/512, some ten times a layer; a router
/// that was nearly undecided may choose otherwise, which shows at the far end alone.
const MEAN: f32 = 0.1;
const HIGH: f32 = 0.8;
/// Where transformers computed a case in bf16 too, by how much more than it the device may be off.
const BEYOND_BF16: f32 = 1.5;
/// Least cosine between embeddings.
const COSINE: f64 = 0.999;
/// Tokens drawn after each prompt.
const DRAWN: usize = 4;
/// Prompt tokens of a step, by prompt.
const CHUNKS: [usize; 3] = [1, 7, 16];
/// Most bytes of the device that a case takes.
const MEMORY: u64 = 24 << 30;

/// Runs the cases of a folder.
pub(super) fn run(options: &Options, emit: &mut Emit<'_>) -> Result<(), Failure> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&options.golden)? {
        let entry = entry?;
        if entry.path().join("golden.json").is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    if names.is_empty() {
        return Err(format!("no golden cases in {}", options.golden.display()).into());
    }
    for name in names {
        if !options.cases.is_empty() && !options.cases.contains(&name) {
            continue;
        }
        emit(json!({"row": "case", "case": &name}));
        if options.list {
            continue;
        }
        // What the driver of scripts finds wrong, it panics with.
        let result = catch_unwind(AssertUnwindSafe(|| check(&name, options)));
        let failed = |why: String| json!({"row": "golden", "case": &name, "pass": false, "error": why});
        emit(match result {
            Ok(Ok(row)) => row,
            Ok(Err(error)) => failed(error.to_string()),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                failed(text.unwrap_or_else(|| "panic".to_owned()))
            }
        });
    }
    Ok(())
}

type On<B> = Driver<ModelExecutor<B>>;

fn driver<B: Backend>(case: &GoldenCase, cache_dtype: CacheDtype, backend: B) -> Result<On<B>, Failure> {
    let options = LoadOptions {
        dtype: Some(Storage::Bf16),
        cache: CacheBudget::Tokens(512),
        cache_dtype,
        max_slots: 8,
        max_step_tokens: 128,
        task: case.load_task(),
        ..LoadOptions::default()
    };
    let source = ModelSource::directory(&case.dir)?;
    Ok(Driver::new(load(&source, &options, backend, &mut |_, _| {})?.executor))
}

fn on_device(case: &GoldenCase) -> Result<On<CudaBackend>, Failure> {
    let options = CudaOptions { matmul_candidates: 1, ..CudaOptions::default() };
    driver(case, CacheDtype::Bf16, backend(MEMORY, options)?)
}

/// What a prompt gave: log-probabilities, or what the pooling head says.
fn numbers(played: &Played) -> Vec<f32> {
    played.pooled.clone().unwrap_or_else(|| played.prompt_logprobs())
}

/// All prompts side by side.
fn mixed<E: Executor>(case: &GoldenCase, driver: &mut Driver<E>, chunks: [usize; 3]) -> Vec<Played> {
    let whole = driver.executor.geometry().whole_prompts;
    let script = |p: usize| case.script(p, if whole { usize::MAX } else { chunks[p % 3] });
    driver.play(&(0..case.prompts.len()).map(script).collect::<Vec<_>>())
}

/// Everything that is played on the device.
struct Plays {
    alone: Vec<Played>,
    mixed: Vec<Played>,
    drawn: Vec<Played>,
}

impl Plays {
    fn new(case: &GoldenCase) -> Result<Self, Failure> {
        let mut driver = on_device(case)?;
        let prompts = 0..case.prompts.len();
        let alone = prompts.flat_map(|p| driver.play(&[case.script(p, usize::MAX)])).collect();
        let mixed = mixed(case, &mut driver, CHUNKS);
        let drawn =
            if driver.executor.geometry().generates { driver.play(&greedy(case)) } else { Vec::new() };
        Ok(Self { alone, mixed, drawn })
    }

    /// Bits of all numbers, and tokens.
    fn bits(&self) -> Vec<Vec<u32>> {
        let all = self.alone.iter().chain(&self.mixed).chain(&self.drawn);
        let of = |p: &Played| {
            let drawn = p.drawn.iter().map(|t| t.logprob.to_bits());
            let numbers = numbers(p).into_iter().map(f32::to_bits);
            numbers.chain(drawn).chain(p.tokens.iter().copied()).collect()
        };
        all.map(of).collect()
    }
}

fn greedy(case: &GoldenCase) -> Vec<Script> {
    case.prompts.iter().map(|p| Script::greedy(&p.ids, DRAWN, 0)).collect()
}

/// By how much the oracle, after the same tokens, prefers its own choice to a drawn one, at most.
fn regret(case: &GoldenCase, oracle: &mut On<Reference>, drawn: &[Played]) -> f32 {
    let forced = case.prompts.iter().zip(drawn).map(|(prompt, played)| {
        let ids = [&prompt.ids[..], &played.tokens].concat();
        let mut forced = Script::teacher_forced(&ids, usize::MAX);
        forced.sampling.prompt_logprobs = Some(1);
        forced
    });
    let answers = oracle.play(&forced.collect::<Vec<_>>());
    let tokens =
        answers.iter().zip(&case.prompts).flat_map(|(played, prompt)| &played.prompt[prompt.ids.len() - 1..]);
    tokens.map(|token| token.top[0].1 - token.logprob).fold(0.0, f32::max)
}

/// Most that the mean difference and the 99th percentile may be.
type Gate = (f32, f32);

/// The gate of a case: wider where its file says that bf16 alone is further off.
fn gate(case: &GoldenCase) -> Result<Gate, Failure> {
    let json: Value = serde_json::from_slice(&std::fs::read(case.dir.join("golden.json"))?)?;
    let wide = |name: &str| json["bf16"][name].as_f64().unwrap_or(0.0) as f32 * BEYOND_BF16;
    Ok((MEAN.max(wide("mean")), HIGH.max(wide("p99"))))
}

/// Differences from what was expected, and whether they pass.
fn judge(expected: &[Vec<f32>], played: &[Played], gate: Gate) -> (Value, bool) {
    let mut difference = Difference::default();
    let mut least = 1.0f64;
    for (expected, played) in expected.iter().zip(played) {
        let got = numbers(played);
        difference.add(expected, &got);
        if played.pooled.is_some() && got.len() > 2 {
            least = least.min(cosine(expected, &got));
        }
    }
    let (mean, high, most) = (difference.mean(), difference.at(0.99), difference.at(1.0));
    let pass = mean <= gate.0 && high <= gate.1 && least >= COSINE && expected.len() == played.len();
    (json!({"mean": mean, "p99": high, "largest": most, "cosine": least}), pass)
}

fn check(name: &str, options: &Options) -> Result<Value, Failure> {
    let case = GoldenCase::read(&options.golden.join(name));
    let (expected, mut oracle) = if options.expect_file {
        let of_file = case.prompts.iter().map(|p| if p.vector.is_empty() { &p.logprobs } else { &p.vector });
        (of_file.cloned().collect::<Vec<_>>(), None)
    } else {
        let mut oracle = driver(&case, CacheDtype::F32, Reference::default())?;
        (mixed(&case, &mut oracle, [usize::MAX; 3]).iter().map(numbers).collect(), Some(oracle))
    };
    let plays = Plays::new(&case)?;
    let gate = gate(&case)?;
    let (alone, alone_passes) = judge(&expected, &plays.alone, gate);
    let (beside, beside_passes) = judge(&expected, &plays.mixed, gate);
    let regret = oracle.as_mut().map(|oracle| regret(&case, oracle, &plays.drawn));
    let same_bits = plays.bits() == Plays::new(&case)?.bits();
    let pass = alone_passes && beside_passes && same_bits && regret.is_none_or(|r| r <= HIGH);
    Ok(json!({
        "row": "golden", "case": name, "pass": pass, "alone": alone, "mixed": beside,
        "gate": [gate.0, gate.1], "regret": regret, "rerun_same_bits": same_bits, "expected": if options.expect_file { "file" } else { "oracle" },
    }))
}
