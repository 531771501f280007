//! Every golden case of the model crate on the emulated driver, against the f64 oracle on the same weights.
//!
//! Weights, activations and the cache are bf16, so numbers differ from the oracle's, which rounds nothing but the weights.
//! A case is played alone, beside others, in chunks, and drawn from; what differs is held to the gate below.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::path::{Path, PathBuf};

use mirai_cuda::{CudaBackend, CudaOptions, Gpu, MemoryOptions};
use mirai_engine::Executor;
use mirai_model::backend::{Backend, CacheDtype, Storage};
use mirai_model::reference::Reference;
use mirai_model::testing::{Difference, Driver, GoldenCase, Mutant, Mutation, Played, Script, cosine};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, load};
use support::on_emulated_driver;

/// Device memory of these tests.
const MEMORY: (&str, &str) = ("MIRAI_EMU_MEMORY", "268435456");

/// The gate, on differences of log-probabilities (or of pooled numbers). bf16 has 8 bits, so each rounding is off by up to
/// 1/512 of a number; some ten of them a layer, in two to four layers, add up like noise to about 1/100 of logits that are
/// 3 to 10 large: a mean of a few hundredths, as found (0.005 to 0.07). A router that was nearly undecided may choose
/// another expert, which shows at the far end alone (0.7 in the worst case). Faults in the order of operations are ten times
/// beyond the mean, which a test below holds them to.
const MEAN: f32 = 0.1;
const HIGH: f32 = 0.8;
/// By how much a drawn token may be less likely than the best: a difference at the far end.
const REGRET: f32 = HIGH;
/// Least cosine between embeddings.
const COSINE: f64 = 0.999;
/// Tokens drawn after each prompt.
const DRAWN: usize = 4;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden")
}

fn case(name: &str) -> GoldenCase {
    GoldenCase::read(&golden().join(name))
}

fn names() -> Vec<String> {
    let folders = std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap());
    let folders = folders.filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 50, "{} cases", names.len());
    names
}

fn options(case: &GoldenCase) -> LoadOptions {
    LoadOptions {
        dtype: Some(Storage::Bf16),
        cache: CacheBudget::Tokens(512),
        cache_dtype: CacheDtype::Bf16,
        max_slots: 8,
        max_step_tokens: 128,
        task: case.load_task(),
        ..LoadOptions::default()
    }
}

fn cuda(graphs: bool) -> CudaBackend {
    backend(graphs, false)
}

fn backend(graphs: bool, batch_invariant: bool) -> CudaBackend {
    let options = CudaOptions {
        memory: MemoryOptions { utilization: 0.95, cache: None },
        graphs,
        batch_invariant,
        matmul_candidates: 1,
        ..CudaOptions::default()
    };
    CudaBackend::new(Gpu::open(0).unwrap(), options).unwrap()
}

fn driver<B: Backend>(case: &GoldenCase, backend: B) -> Driver<ModelExecutor<B>> {
    let source = ModelSource::directory(&case.dir).unwrap();
    Driver::new(load(&source, &options(case), backend, &mut |_, _| {}).unwrap().executor)
}

fn oracle(case: &GoldenCase) -> Driver<ModelExecutor<Reference>> {
    let source = ModelSource::directory(&case.dir).unwrap();
    let options = LoadOptions { cache_dtype: CacheDtype::F32, ..options(case) };
    Driver::new(load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap().executor)
}

/// What a prompt gave: log-probabilities, or what the pooling head says.
fn numbers(played: &Played) -> Vec<f32> {
    match &played.pooled {
        Some(pooled) => pooled.clone(),
        None => played.prompt_logprobs(),
    }
}

/// All prompts side by side, each in chunks of its own.
fn play<E: Executor>(case: &GoldenCase, driver: &mut Driver<E>, chunks: [usize; 3]) -> Vec<Played> {
    let whole = driver.executor.geometry().whole_prompts;
    let script = |p: usize| case.script(p, if whole { usize::MAX } else { chunks[p % 3] });
    driver.play(&(0..case.prompts.len()).map(script).collect::<Vec<_>>())
}

/// Largest regret of drawn tokens: by how much the oracle, after the same tokens, prefers its own choice.
fn regret(case: &GoldenCase, driver: &mut Driver<impl Executor>, oracle: &mut Driver<impl Executor>) -> f32 {
    let scripts: Vec<_> = case.prompts.iter().map(|p| Script::greedy(&p.ids, DRAWN, 0)).collect();
    let played = driver.play(&scripts);
    let forced = scripts.iter().zip(&played).map(|(script, played)| {
        let mut forced = Script::teacher_forced(&[&script.prompt[..], &played.tokens].concat(), usize::MAX);
        forced.sampling.prompt_logprobs = Some(1);
        forced
    });
    let mut worst = 0f32;
    for (played, script) in oracle.play(&forced.collect::<Vec<_>>()).iter().zip(&scripts) {
        for token in &played.prompt[script.prompt.len() - 1..] {
            worst = worst.max(token.top[0].1 - token.logprob);
        }
    }
    worst
}

/// What a case shows against the gate; empty if it passes.
fn judge(name: &str, expected: &[Played], played: &[Played], what: &str) -> Vec<String> {
    let mut difference = Difference::default();
    for (e, g) in expected.iter().zip(played) {
        difference.add(&numbers(e), &numbers(g));
    }
    let (mean, high) = (difference.mean(), difference.at(0.99));
    println!("{name}, {what}: mean {mean:.4}, p99 {high:.4}, largest {:.4}", difference.at(1.0));
    let cosines = expected.iter().zip(played).filter_map(|(e, g)| {
        let (e, g) = (e.pooled.as_deref()?, g.pooled.as_deref()?);
        (e.len() > 2).then(|| cosine(e, g))
    });
    let least = cosines.fold(1.0, f64::min);
    if mean <= MEAN && high <= HIGH && least >= COSINE {
        return Vec::new();
    }
    vec![format!("{name}, {what}: mean {mean}, p99 {high}, cosine {least}")]
}

/// Whole prompts beside each other, then in chunks of 1, 7 and 16 tokens, whose decode steps are replayed from graphs with
/// padding; then tokens drawn after them.
fn check(name: &str) -> Vec<String> {
    let case = case(name);
    let mut exact = oracle(&case);
    let expected = play(&case, &mut exact, [usize::MAX; 3]);
    let mut driver = driver(&case, cuda(true));
    let mut wrong = judge(name, &expected, &play(&case, &mut driver, [1, 7, 16]), "in chunks");
    if driver.executor.geometry().generates {
        let regret = regret(&case, &mut driver, &mut exact);
        println!("{name}: regret {regret:.4}");
        if regret.is_nan() || regret > REGRET {
            wrong.push(format!("{name}: regret {regret}"));
        }
    } else {
        wrong.extend(judge(name, &expected, &play(&case, &mut driver, [usize::MAX; 3]), "whole"));
    }
    wrong
}

fn check_all<'a>(names: impl IntoIterator<Item = &'a str>) {
    let wrong: Vec<String> = names.into_iter().flat_map(check).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One case for each kind of layer.
const KINDS: [&[&str]; 2] = [
    &["llama-gqa-bias", "mistral-window", "gptoss-mqa", "gemma4-own-values", "qwen3-rerank", "cohere2"],
    &["qwen3next", "deepseek-plain-query", "xlmr-embed", "olmo2", "granite-bias", "gemma2", "apertus"],
];

#[test]
fn a_case_of_each_kind_is_near_the_oracle() {
    on_emulated_driver("a_case_of_each_kind_is_near_the_oracle", &[MEMORY], || {
        check_all(KINDS[0].iter().copied());
    });
}

#[test]
fn a_case_of_every_other_kind_is_near_the_oracle() {
    on_emulated_driver("a_case_of_every_other_kind_is_near_the_oracle", &[MEMORY], || {
        check_all(KINDS[1].iter().copied());
    });
}

/// Every other folder, in parts, so that they run side by side.
fn check_part(part: usize) {
    let names = names();
    let known = |name: &&str| !KINDS.iter().any(|kinds| kinds.contains(name));
    let rest: Vec<&str> = names.iter().map(String::as_str).filter(known).collect();
    check_all(rest.iter().enumerate().filter(|(index, _)| index % 3 == part).map(|(_, name)| *name));
}

#[test]
#[ignore = "a minute; `cargo xtask cuda-emu` runs it"]
fn all_other_cases_first_part() {
    on_emulated_driver("all_other_cases_first_part", &[MEMORY], || check_part(0));
}

#[test]
#[ignore = "a minute; `cargo xtask cuda-emu` runs it"]
fn all_other_cases_second_part() {
    on_emulated_driver("all_other_cases_second_part", &[MEMORY], || check_part(1));
}

#[test]
#[ignore = "a minute; `cargo xtask cuda-emu` runs it"]
fn all_other_cases_third_part() {
    on_emulated_driver("all_other_cases_third_part", &[MEMORY], || check_part(2));
}

/// The same bits alone, beside others, and in chunks of any size, where that was asked for.
#[test]
fn a_sequence_does_not_depend_on_others() {
    on_emulated_driver("a_sequence_does_not_depend_on_others", &[MEMORY], || {
        for name in ["mistral-window", "qwen3moe"] {
            let case = case(name);
            let mut driver = driver(&case, backend(true, true));
            let bits = |played: &[Played]| -> Vec<Vec<u32>> {
                played.iter().map(|p| numbers(p).iter().map(|n| n.to_bits()).collect()).collect()
            };
            let alone = driver.play(&[case.script(1, usize::MAX)]);
            let whole = bits(&play(&case, &mut driver, [usize::MAX; 3]));
            assert_eq!(bits(&alone)[0], whole[1], "{name}");
            assert_eq!(bits(&play(&case, &mut driver, [1, 7, 16])), whole, "{name}");
        }
    });
}

/// A gate that cannot fail proves nothing: each fault must be far beyond it.
fn faults_fail(table: &[(&str, &[Mutation])]) {
    let mut wrong = Vec::new();
    for (name, mutations) in table {
        let case = case(name);
        let expected = play(&case, &mut oracle(&case), [usize::MAX; 3]);
        for mutation in *mutations {
            let mut mutant = driver(&case, Mutant::new(cuda(false), *mutation));
            let mut difference = Difference::default();
            for (e, g) in expected.iter().zip(play(&case, &mut mutant, [usize::MAX; 3])) {
                difference.add(&numbers(e), &numbers(&g));
            }
            println!("{name} with {mutation:?}: mean {:.4}", difference.mean());
            if difference.mean() < 2.0 * MEAN {
                wrong.push(format!("{name} with {mutation:?}: mean {}", difference.mean()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_gate_fails_for_faults() {
    use Mutation as M;
    on_emulated_driver("the_gate_fails_for_faults", &[MEMORY], || {
        faults_fail(&[
            ("llama-linear", &[M::NoRope, M::RotatedKvHeads(8)]),
            ("mistral-window", &[M::WiderWindow, M::NarrowerWindow]),
            ("gptoss-mqa", &[M::NoSinks]),
        ]);
    });
}

#[test]
#[ignore = "a minute; `cargo xtask cuda-emu` runs it"]
fn the_gate_fails_for_rarer_faults() {
    use Mutation as M;
    on_emulated_driver("the_gate_fails_for_rarer_faults", &[MEMORY], || {
        faults_fail(&[
            ("qwen3", &[M::NoQkNorm, M::WrongPairing]),
            ("qwen2", &[M::NoBias]),
            ("gptoss", &[M::SwappedExperts, M::WiderWindow]),
            ("deepseek", &[M::SwappedExperts]),
            ("gemma4", &[M::WeighedValues, M::NoValueNorm]),
            ("qwen3next", &[M::WrongDecay, M::ReversedTaps, M::NoGate]),
            ("xlmr-embed", &[M::NoPositions]),
        ]);
    });
}
