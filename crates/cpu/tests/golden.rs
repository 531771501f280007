//! The CPU backend against HF transformers, the f64 oracle, and llama.cpp.
//!
//! Checkpoints and log-probabilities are made by `crates/model/golden/make.py`; `reference.json` of the shared data
//! by llama.cpp.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};

use mirai_cpu::simd::Isa;
use mirai_cpu::{CpuBackend, CpuOptions};
use mirai_engine::Executor;
use mirai_model::backend::{Backend, CacheDtype, Storage};
use mirai_model::reference::Reference;
use mirai_model::testing::{
    Driver, GoldenCase, GoldenPrompt, GoldenTask, Mutant, Mutation, Played, Script, largest_difference,
    read_golden,
};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, Quantization, load};

/// The gate of f32: largest difference of a log-probability.
const F32_GATE: f32 = 1e-3;

fn case_dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(case)
}

fn shared_models() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/models");
    if !path.join("reference.json").is_file() {
        println!("skipped: no shared data");
        return None;
    }
    Some(path)
}

/// f32 throughout: weights of every case are exact in f32.
fn exact() -> LoadOptions {
    LoadOptions {
        dtype: Some(Storage::F32),
        cache: CacheBudget::Tokens(512),
        cache_dtype: CacheDtype::F32,
        max_slots: 8,
        max_step_tokens: 128,
        ..LoadOptions::default()
    }
}

/// One thread where the instruction set is not the best one: what threads change is seen between the two.
fn cpu(isa: Option<Isa>) -> CpuBackend {
    let threads = Some(if isa.is_none() { 2 } else { 1 });
    CpuBackend::new(&CpuOptions { threads, isa, poison_cache: true })
}

fn driver<B: Backend>(source: &ModelSource, options: &LoadOptions, backend: B) -> Driver<ModelExecutor<B>> {
    Driver::new(load(source, options, backend, &mut |_, _| {}).unwrap().executor)
}

fn case_driver<B: Backend>(case: &GoldenCase, backend: B) -> Driver<ModelExecutor<B>> {
    let options = LoadOptions { task: case.load_task(), ..exact() };
    driver(&ModelSource::directory(&case.dir).unwrap(), &options, backend)
}

/// Every folder of golden files.
fn cases() -> Vec<(String, GoldenCase)> {
    let folders = std::fs::read_dir(case_dir("")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = folders.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 50, "{} cases", folders.len());
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    folders.iter().map(|path| (name(path), GoldenCase::read(path))).collect()
}

fn teacher_forced(golden: &[GoldenPrompt], chunks: [usize; 3]) -> Vec<Script> {
    golden.iter().zip(chunks).map(|(p, chunk)| Script::teacher_forced(&p.ids, chunk)).collect()
}

fn worst(golden: &[GoldenPrompt], played: &[Played]) -> f32 {
    let each = golden.iter().zip(played).map(|(g, p)| largest_difference(&g.logprobs, &p.prompt_logprobs()));
    each.fold(0.0, f32::max)
}

/// All numbers that a prompt gave, bit for bit.
fn bits(played: &Played) -> Vec<u32> {
    let pooled = played.pooled.iter().flatten().copied();
    played.prompt_logprobs().into_iter().chain(pooled).map(f32::to_bits).collect()
}

/// Each prompt alone and whole is within the gate; beside others, in chunks of 1, 7 and 16 tokens, behind each of its
/// prefixes, and after a preemption, it has the very same bits.
fn check(name: &str, case: &GoldenCase, isa: Option<Isa>, failures: &mut Vec<String>) {
    let mut driver = case_driver(case, cpu(isa));
    let whole = driver.executor.geometry().whole_prompts;
    let prompts = 0..case.prompts.len();
    let alone: Vec<Played> =
        prompts.clone().map(|p| driver.play(&[case.script(p, usize::MAX)]).remove(0)).collect();
    for (p, played) in alone.iter().enumerate() {
        let difference = case.difference(p, 0, played);
        if difference.is_nan() || difference > F32_GATE {
            failures.push(format!("{name}, {isa:?}, prompt {p}: {difference:e}"));
        }
    }
    let mut same = |what: String, p: usize, skipped: usize, played: &Played| {
        if bits(played) != bits(&alone[p])[skipped..] {
            failures.push(format!("{name}, {isa:?}, prompt {p}, {what}: other bits"));
        }
    };
    let chunk = |chunk| if whole { usize::MAX } else { chunk };
    for chunks in [[usize::MAX; 3], [1, 7, 16], [7, 16, 1], [16, 1, 7]] {
        let scripts: Vec<_> = prompts.clone().map(|p| case.script(p, chunk(chunks[p % 3]))).collect();
        for (p, played) in driver.play(&scripts).iter().enumerate() {
            same(format!("chunks {chunks:?}"), p, 0, played);
        }
    }
    for at in [[7, 14, 1], [33, 16, 4]] {
        let scripts = prompts.clone().map(|p| case.script(p, chunk(7)).preempted_at(at[p % 3]));
        for (p, played) in driver.play(&scripts.collect::<Vec<_>>()).iter().enumerate() {
            same(format!("preempted at {at:?}"), p, 0, played);
        }
    }
    if whole {
        return;
    }
    for size in [1, 7, usize::MAX] {
        let mut driver = case_driver(case, cpu(isa));
        for p in prompts.clone() {
            let prefixes = driver.prefixes(&case.prompts[p].ids);
            assert_eq!(prefixes.len(), (case.prompts[p].ids.len() - 1) / 16);
            let scripts = prefixes.iter().map(|prefix| case.script(p, size).after(prefix.clone()));
            let played = driver.play(&scripts.collect::<Vec<_>>());
            for (prefix, played) in prefixes.iter().zip(&played) {
                let skipped = if played.pooled.is_some() { 0 } else { prefix.computed };
                same(format!("{} tokens there, chunks of {size}", prefix.computed), p, skipped, played);
            }
        }
    }
}

fn check_all(isa: Option<Isa>) {
    let mut failures = Vec::new();
    for (name, case) in cases() {
        check(&name, &case, isa, &mut failures);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_case_on_the_best_instructions() {
    check_all(None);
}

#[test]
fn every_case_on_portable_instructions() {
    check_all(Some(Isa::Portable));
}

#[test]
fn embeddings_point_where_transformers_says() {
    for (name, case) in cases() {
        if case.task == GoldenTask::Embed {
            let least = case.least_cosine(&mut case_driver(&case, cpu(None)));
            assert!(least >= 0.999_99, "{name}: {least}");
        }
    }
}

/// Tokens drawn after each prompt are those of an undisturbed run, bit for bit.
#[test]
fn drawn_tokens_survive_a_preemption() {
    for (name, case) in cases() {
        if case.task == GoldenTask::Generate {
            let difference = case.drawn_after_preemption(&mut case_driver(&case, cpu(None)), 6);
            assert!(difference == 0.0, "{name}: {difference:e}");
        }
    }
}

#[test]
fn gguf_cases_are_within_the_gate() {
    for case in ["llama-llama3", "llama-yarn", "qwen2", "qwen3"] {
        let golden = read_golden(&case_dir(case));
        let source = ModelSource::gguf(&case_dir(case).join("model.gguf"));
        let played = driver(&source, &exact(), cpu(None)).play(&teacher_forced(&golden, [usize::MAX; 3]));
        let w = worst(&golden, &played);
        assert!(w < F32_GATE, "{case}: {w:e}");
    }
}

/// Weights and cache in bf16 lose digits, and nothing else.
#[test]
fn bf16_stays_near() {
    for (case, weights) in
        [("llama-mqa-bf16", None), ("qwen3", None), ("llama-mha-tied", Some(Storage::Bf16))]
    {
        let golden = read_golden(&case_dir(case));
        let source = ModelSource::directory(&case_dir(case)).unwrap();
        let options = LoadOptions { dtype: weights, cache_dtype: CacheDtype::Bf16, ..exact() };
        let played = driver(&source, &options, cpu(None)).play(&teacher_forced(&golden, [usize::MAX; 3]));
        let w = worst(&golden, &played);
        assert!(w < 0.25, "{case}: {w:e}");
        let mean = mean_difference(&golden, &played);
        assert!(mean < 0.03, "{case}: mean {mean:e}");
    }
}

fn mean_difference(golden: &[GoldenPrompt], played: &[Played]) -> f32 {
    let pairs =
        golden.iter().zip(played).flat_map(|(g, p)| g.logprobs.iter().copied().zip(p.prompt_logprobs()));
    let differences: Vec<f32> = pairs.map(|(a, b)| (a - b).abs()).collect();
    differences.iter().sum::<f32>() / differences.len() as f32
}

/// A gate that cannot fail proves nothing.
#[test]
fn the_gate_fails_for_faults() {
    use Mutation as M;
    let table: &[(&str, &[Mutation])] = &[
        ("llama-mha-tied", &[M::NoRope]),
        ("qwen3", &[M::NoRope, M::NoQkNorm]),
        ("mistral-window", &[M::WiderWindow, M::NarrowerWindow]),
        ("qwen2-mixed-window", &[M::NarrowerWindow]),
        ("llama-linear", &[M::RotatedKvHeads(8)]),
        ("qwen2", &[M::NoBias]),
        ("gptoss", &[M::NoSinks, M::SwappedExperts, M::WiderWindow]),
        ("deepseek", &[M::SwappedExperts, M::NoCorrection]),
        ("gemma4", &[M::WeighedValues, M::NoValueNorm, M::LostNorm(4)]),
        ("qwen3next", &[M::WrongDecay, M::ReversedTaps, M::NoGate]),
        ("xlmr-embed", &[M::NoPositions, M::LostNorm(1)]),
    ];
    for (name, mutations) in table {
        let case = GoldenCase::read(&case_dir(name));
        for &mutation in *mutations {
            let mut driver = case_driver(&case, Mutant::new(cpu(None), mutation));
            let worst = case.mixed(&mut driver, &[usize::MAX; 3]);
            assert!(worst > 50.0 * F32_GATE, "{name} with {mutation:?} passes the gate: {worst:e}");
        }
    }
}

/// Decoding (the slot's own token, one row a step) gives what a prefill over the same tokens gives.
#[test]
fn decoding_equals_prefill() {
    for case in ["llama-gqa-bias", "mistral-window", "qwen3"] {
        let golden = read_golden(&case_dir(case));
        let source = ModelSource::directory(&case_dir(case)).unwrap();
        let mut driver = driver(&source, &exact(), cpu(None));
        let scripts: Vec<_> = golden.iter().map(|p| Script::greedy(&p.ids, 20, 3)).collect();
        for (script, played) in scripts.iter().zip(driver.play(&scripts)) {
            let whole = [&script.prompt[..], &played.tokens].concat();
            let forced = &driver.play(&[Script::teacher_forced(&whole, usize::MAX)])[0].prompt;
            let forced: Vec<f32> = forced[script.prompt.len() - 1..].iter().map(|t| t.logprob).collect();
            let drawn: Vec<f32> = played.drawn.iter().map(|t| t.logprob).collect();
            assert!(largest_difference(&drawn, &forced) < 1e-5, "{case}");
            assert!(played.drawn.iter().all(|t| t.rank == 1 && t.top[0].0 == t.token), "{case}");
        }
    }
}

/// Weights made into blocks at load: the kernels against the oracle on the very same blocks.
#[test]
fn quantized_weights_agree_with_the_oracle() {
    let config = br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 128, "tie_word_embeddings": true, "dtype": "bfloat16"}"#;
    let source = ModelSource::memory("dummy", &[("config.json", config)]);
    let prompt: Vec<u32> = (0..60).map(|i| (i * 37 + 11) % 320).collect();
    for quantization in [None, Some(Quantization::Q8_0), Some(Quantization::Q4K)] {
        let options = LoadOptions { dummy: Some(7), quantization, dtype: None, ..exact() };
        let script = [Script::teacher_forced(&prompt, usize::MAX)];
        let oracle = driver(&source, &options, Reference::default()).play(&script)[0].prompt_logprobs();
        for isa in [None, Some(Isa::Portable)] {
            let got = driver(&source, &options, cpu(isa)).play(&script)[0].prompt_logprobs();
            let w = largest_difference(&oracle, &got);
            // Activations are rounded to bf16 or to 8 bits on their way into these kernels.
            assert!(w < 0.02, "{quantization:?}, {isa:?}: {w:e}");
        }
    }
}

struct Expected {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    top: Vec<(u32, f32)>,
}

fn expected(models: &Path, file: &str) -> Vec<Expected> {
    let text = std::fs::read_to_string(models.join("reference.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let entries = json["results"][file].as_array().unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    };
    entries
        .iter()
        .map(|e| Expected {
            prompt: ids(&e["prompt_tokens"]),
            tokens: ids(&e["tokens"]),
            logprobs: e["logprob"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect(),
            top: e["top5_first"]
                .as_array()
                .unwrap()
                .iter()
                .map(|p| (p[0].as_u64().unwrap() as u32, p[1].as_f64().unwrap() as f32))
                .collect(),
        })
        .collect()
}

/// Every GGUF file of the shared data against llama.cpp and the f64 oracle. llama.cpp rounds activations to 8 bits
/// before it multiplies them with blocks, and keeps keys and values in f16, so the tokens that it drew are forced:
/// their log-probabilities must be near, and none may be far below our best. Of the unquantized files the drawn
/// tokens must be equal. The oracle multiplies the very same blocks exactly, and our distance from it may be at most
/// three times that of llama.cpp (the largest of 32 differences scatters, and instruction sets round differently).
#[test]
fn gguf_files_match_llama_cpp() {
    let Some(models) = shared_models() else { return };
    let table = [
        ("stories260K/stories260K-F32.gguf", 0.005, true),
        ("stories260K/stories260K-F16.gguf", 0.02, true),
        ("stories260K/stories260K-Q8_0.gguf", 0.15, false),
        ("stories260K/stories260K-Q4_0.gguf", 0.25, false),
        ("rand256/rand256-F16.gguf", 0.02, true),
        ("rand256/rand256-Q8_0.gguf", 0.08, false),
        ("rand256/rand256-Q6_K.gguf", 0.15, false),
        ("rand256/rand256-Q4_K_M.gguf", 0.15, false),
    ];
    let mut wrong = Vec::new();
    for (file, tolerance, exact_tokens) in table {
        let path = file.replace("stories260K/", "stories260K/gguf/");
        let source = ModelSource::gguf(&models.join(path));
        let options = LoadOptions { dtype: None, ..exact() };
        let mut ours = driver(&source, &options, cpu(None));
        let mut oracle = driver(&source, &options, Reference::default());
        for e in expected(&models, file) {
            let greedy = &ours.play(&[Script::greedy(&e.prompt, e.tokens.len(), 8)])[0];
            if exact_tokens && greedy.tokens != e.tokens {
                wrong.push(format!("{file}: drew {:?}, expected {:?}", greedy.tokens, e.tokens));
            }
            for (id, logprob) in &e.top {
                let found = greedy.drawn[0].top.iter().find(|(other, _)| other == id).map(|t| t.1);
                if found.is_none_or(|found| (found - logprob).abs() >= tolerance) {
                    wrong.push(format!("{file}: first step, token {id} at {logprob}, ours {found:?}"));
                }
            }
            let whole = [&e.prompt[..], &e.tokens].concat();
            let mut script = Script::teacher_forced(&whole, usize::MAX);
            script.sampling.prompt_logprobs = Some(1);
            let exact = oracle.play(std::slice::from_ref(&script)).remove(0).prompt_logprobs();
            let forced = ours.play(&[script]).remove(0).prompt;
            let forced = &forced[e.prompt.len() - 1..];
            let got: Vec<f32> = forced.iter().map(|t| t.logprob).collect();
            let exact = &exact[e.prompt.len() - 1..];
            let (theirs, true_error) =
                (largest_difference(&e.logprobs, &got), largest_difference(exact, &got));
            let their_error = largest_difference(exact, &e.logprobs);
            let regret = forced.iter().map(|t| t.top[0].1 - t.logprob).fold(0.0, f32::max);
            let figures = format!(
                "{file}: from llama.cpp {theirs:.2e}, from the oracle {true_error:.2e} (llama.cpp {their_error:.2e}), \
                 regret {regret:.2e}"
            );
            println!("{figures}");
            if theirs.max(true_error).max(regret) >= tolerance || true_error >= 3.0 * their_error {
                wrong.push(figures);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
