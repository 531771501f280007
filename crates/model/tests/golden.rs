//! Every golden case on the f64 oracle: holds the specification, the loading and the order of operations to HF
//! transformers, apart from any kernel.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};

use mirai_model::backend::{Backend, CacheDtype};
use mirai_model::reference::Reference;
use mirai_model::testing::{Driver, Mutant, Mutation, Script, largest_difference, read_golden};
use mirai_model::{CacheBudget, LoadOptions, LoadedModel, ModelExecutor, ModelSource, load};

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

/// Goldens are computed in f64 but for the rotary tables and the norms, which transformers computes in f32.
const TOLERANCE: f32 = 2e-5;

fn case_dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn options() -> LoadOptions {
    LoadOptions {
        cache: CacheBudget::Tokens(256),
        cache_dtype: CacheDtype::F32,
        max_slots: 8,
        max_step_tokens: 128,
        ..LoadOptions::default()
    }
}

fn open<B: Backend>(source: &ModelSource, backend: B) -> LoadedModel<B> {
    load(source, &options(), backend, &mut |_, _| {}).unwrap()
}

fn driver<B: Backend>(source: &ModelSource, backend: B) -> Driver<ModelExecutor<B>> {
    Driver::new(open(source, backend).executor)
}

/// Largest difference over all prompts of a case, played together with these chunk sizes.
fn difference<B: Backend>(source: &ModelSource, case: &str, backend: B, chunks: [usize; 3]) -> f32 {
    let golden = read_golden(&case_dir(case));
    let scripts: Vec<_> =
        golden.iter().zip(chunks).map(|(p, chunk)| Script::teacher_forced(&p.ids, chunk)).collect();
    let played = driver(source, backend).play(&scripts);
    let each = golden.iter().zip(&played).map(|(g, p)| largest_difference(&g.logprobs, &p.prompt_logprobs()));
    each.fold(0.0, f32::max)
}

#[test]
fn safetensors_cases_match_transformers() {
    for case in CASES {
        let source = ModelSource::directory(&case_dir(case)).unwrap();
        for chunks in [[usize::MAX; 3], [1, 7, 16], [16, 1, 7]] {
            let worst = difference(&source, case, Reference::default(), chunks);
            assert!(worst < TOLERANCE, "{case}, chunks {chunks:?}: {worst:e}");
        }
    }
}

#[test]
fn gguf_cases_match_transformers() {
    for case in ["llama-llama3", "llama-yarn", "qwen2", "qwen3"] {
        let source = ModelSource::gguf(&case_dir(case).join("model.gguf"));
        let worst = difference(&source, case, Reference::default(), [usize::MAX; 3]);
        assert!(worst < TOLERANCE, "{case}: {worst:e}");
    }
}

#[test]
fn the_gate_fails_for_faults() {
    let table = [
        ("llama-gqa-bias", Mutation::NoRope),
        ("llama-gqa-bias", Mutation::NoBias),
        ("llama-gqa-bias", Mutation::RotatedKvHeads(10)),
        ("mistral-window", Mutation::WiderWindow),
        ("mistral-window", Mutation::NarrowerWindow),
        ("qwen2-mixed-window", Mutation::WiderWindow),
        ("qwen3", Mutation::NoQkNorm),
        ("qwen3", Mutation::RotatedKvHeads(16)),
    ];
    for (case, mutation) in table {
        let source = ModelSource::directory(&case_dir(case)).unwrap();
        let mutant = Mutant { inner: Reference::default(), mutation };
        let worst = difference(&source, case, mutant, [usize::MAX; 3]);
        assert!(worst > 0.05, "{case} with {mutation:?} passes the gate: {worst:e}");
    }
}

#[test]
fn mixed_windows_make_two_kinds_of_groups() {
    use mirai_engine::{Executor, GroupKind};
    let source = ModelSource::directory(&case_dir("qwen2-mixed-window")).unwrap();
    let model = open(&source, Reference::default());
    let geometry = model.executor.geometry();
    assert_eq!(geometry.groups, [GroupKind::Full, GroupKind::Window(5), GroupKind::Window(5)]);
    assert_eq!((geometry.vocab, geometry.max_context, geometry.slots), (61, 96, 8));
    assert_eq!(model.cache.tokens, 256);
    assert_eq!(model.eos_ids, [2]);
}

#[test]
fn trained_model_speaks_as_llama_cpp_says() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/models");
    let Ok(text) = std::fs::read_to_string(models.join("reference.json")) else {
        println!("skipped: no shared data");
        return;
    };
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let file = "stories260K/stories260K-F32.gguf";
    let sources = [
        ModelSource::gguf(&models.join("stories260K/gguf/stories260K-F32.gguf")),
        ModelSource::directory(&models.join("stories260K/hf")).unwrap(),
    ];
    for source in sources {
        let mut driver = driver(&source, Reference::default());
        for entry in json["results"][file].as_array().unwrap() {
            let ids = |key: &str| -> Vec<u32> {
                entry[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
            };
            let expected: Vec<f32> =
                entry["logprob"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
            let played = &driver.play(&[Script::greedy(&ids("prompt_tokens"), expected.len(), 5)])[0];
            assert_eq!(played.tokens, ids("tokens"), "{}", entry["prompt"]);
            let got: Vec<f32> = played.drawn.iter().map(|t| t.logprob).collect();
            let worst = largest_difference(&expected, &got);
            // llama.cpp keeps keys and values in f16.
            assert!(worst < 5e-3, "{}: {worst:e}", entry["prompt"]);
        }
    }
}
