//! The CPU backend against HF transformers, the f64 oracle, and llama.cpp.
//!
//! Checkpoints and log-probabilities are made by `crates/model/golden/make.py`; `reference.json` of the shared data
//! by llama.cpp.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};

use mirai_cpu::simd::Isa;
use mirai_cpu::{CpuBackend, CpuOptions};
use mirai_model::backend::{Backend, CacheDtype, Storage};
use mirai_model::reference::Reference;
use mirai_model::testing::{
    Driver, GoldenPrompt, Mutant, Mutation, Played, Script, largest_difference, read_golden,
};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, Quantization, load};

/// The gate of f32: largest difference of a log-probability.
const F32_GATE: f32 = 1e-3;

const CASES: [&str; 12] = [
    "llama-mha-tied",
    "llama-gqa-bias",
    "llama-mqa-bf16",
    "llama-llama3",
    "llama-linear",
    "llama-yarn",
    "llama-sharded",
    "llama-only-head",
    "mistral-window",
    "qwen2",
    "qwen2-mixed-window",
    "qwen3",
];

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

fn cpu(isa: Option<Isa>) -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(2), isa, poison_cache: true })
}

fn driver<B: Backend>(source: &ModelSource, options: &LoadOptions, backend: B) -> Driver<ModelExecutor<B>> {
    Driver::new(load(source, options, backend, &mut |_, _| {}).unwrap().executor)
}

fn teacher_forced(golden: &[GoldenPrompt], chunks: [usize; 3]) -> Vec<Script> {
    golden.iter().zip(chunks).map(|(p, chunk)| Script::teacher_forced(&p.ids, chunk)).collect()
}

fn worst(golden: &[GoldenPrompt], played: &[Played]) -> f32 {
    let each = golden.iter().zip(played).map(|(g, p)| largest_difference(&g.logprobs, &p.prompt_logprobs()));
    each.fold(0.0, f32::max)
}

/// Log-probabilities of each prompt, bit for bit.
fn bits(played: &[Played]) -> Vec<Vec<u32>> {
    played.iter().map(|p| p.prompt_logprobs().iter().map(|v| v.to_bits()).collect()).collect()
}

/// Batch 1 and mixed batch, whole prompts and chunks of 1, 7 and 16, on the best and on the portable kernels.
#[test]
fn every_case_is_within_the_gate() {
    for case in CASES {
        let golden = read_golden(&case_dir(case));
        let source = ModelSource::directory(&case_dir(case)).unwrap();
        for isa in [None, Some(Isa::Portable)] {
            let mut driver = driver(&source, &exact(), cpu(isa));
            let mut alone = Vec::new();
            for prompt in &golden {
                alone.extend(driver.play(&[Script::teacher_forced(&prompt.ids, usize::MAX)]));
            }
            let w = worst(&golden, &alone);
            assert!(w < F32_GATE, "{case} alone, {isa:?}: {w:e}");
            for chunks in [[usize::MAX; 3], [1, 7, 16], [16, 1, 7], [7, 16, 1]] {
                let mixed = driver.play(&teacher_forced(&golden, chunks));
                let w = worst(&golden, &mixed);
                assert!(w < F32_GATE, "{case} mixed, chunks {chunks:?}, {isa:?}: {w:e}");
                assert_eq!(bits(&mixed), bits(&alone), "{case}: the batch changes a row, chunks {chunks:?}");
            }
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
    let table = [
        ("llama-mha-tied", Mutation::NoRope),
        ("qwen3", Mutation::NoRope),
        ("mistral-window", Mutation::WiderWindow),
        ("mistral-window", Mutation::NarrowerWindow),
        ("qwen2-mixed-window", Mutation::NarrowerWindow),
        ("llama-linear", Mutation::RotatedKvHeads(8)),
        ("qwen3", Mutation::NoQkNorm),
        ("qwen2", Mutation::NoBias),
    ];
    for (case, mutation) in table {
        let golden = read_golden(&case_dir(case));
        let source = ModelSource::directory(&case_dir(case)).unwrap();
        let mutant = Mutant { inner: cpu(None), mutation };
        let played = driver(&source, &exact(), mutant).play(&teacher_forced(&golden, [usize::MAX; 3]));
        let w = worst(&golden, &played);
        assert!(w > 50.0 * F32_GATE, "{case} with {mutation:?} passes the gate: {w:e}");
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
