//! Every golden case on the f64 oracle: holds the specification, the loading and the order of operations to HF
//! transformers, apart from any kernel.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};

use mirai_engine::{BlockId, SnapshotId};
use mirai_model::backend::{Backend, CacheDtype};
use mirai_model::pooling::Task;
use mirai_model::reference::Reference;
use mirai_model::testing::{
    Driver, GoldenCase, GoldenTask, Mutant, Mutation, Prefix, Script, largest_difference,
};
use mirai_model::{CacheBudget, LoadOptions, LoadedModel, ModelExecutor, ModelSource, load};

/// All of them; a test holds the list against the folder.
const CASES: &[&str] = &[
    "apertus",
    "apertus-tied",
    "cohere2",
    "cohere2-block",
    "deepseek",
    "deepseek-plain-query",
    "gemma2",
    "gemma2-block",
    "gemma2-embed",
    "gemma3",
    "gemma3-wrapper",
    "gemma4",
    "gemma4-own-values",
    "gemma4-shared-kv",
    "gemma4-wrapper",
    "glm4",
    "glm4-partial",
    "gptoss",
    "gptoss-mqa",
    "granite",
    "granite-bias",
    "llama-gqa-bias",
    "llama-linear",
    "llama-llama3",
    "llama-mha-tied",
    "llama-mqa-bf16",
    "llama-only-head",
    "llama-sharded",
    "llama-yarn",
    "ministral3",
    "ministral3-wrapper",
    "mistral-window",
    "mistral3",
    "mixtral",
    "mixtral-window",
    "olmo2",
    "olmo2-gqa",
    "phi3",
    "phi3-longrope-long",
    "phi3-longrope-short",
    "qwen2",
    "qwen2-mixed-window",
    "qwen3",
    "qwen3-embed",
    "qwen3-rerank",
    "qwen3-rerank-untied",
    "qwen3_5",
    "qwen3_5-wrapper",
    "qwen3_5moe",
    "qwen3_5moe-wrapper",
    "qwen3moe",
    "qwen3moe-fused",
    "qwen3next",
    "qwen3next-dense-layer",
    "smollm3",
    "smollm3-interval",
    "xlmr-embed",
    "xlmr-labels",
    "xlmr-rerank",
    "xlmr-types",
];

/// Goldens are computed in f64 throughout; parameters of operations and rotary tables are f32 here.
const TOLERANCE: f32 = 2e-5;

fn case_dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn options(task: Task) -> LoadOptions {
    LoadOptions {
        task,
        cache: CacheBudget::Tokens(512),
        cache_dtype: CacheDtype::F32,
        max_slots: 8,
        max_step_tokens: 128,
        ..LoadOptions::default()
    }
}

fn open<B: Backend>(source: &ModelSource, task: Task, backend: B) -> LoadedModel<B> {
    load(source, &options(task), backend, &mut |_, _| {}).unwrap()
}

fn driver<B: Backend>(source: &ModelSource, task: Task, backend: B) -> Driver<ModelExecutor<B>> {
    Driver::new(open(source, task, backend).executor)
}

fn case_driver<B: Backend>(case: &GoldenCase, backend: B) -> Driver<ModelExecutor<B>> {
    driver(&ModelSource::directory(&case.dir).unwrap(), case.load_task(), backend)
}

/// Calls a check for each case, and fails once with all that it found.
fn every_case(mut check: impl FnMut(&GoldenCase) -> Vec<(String, f32)>) {
    let mut failures = Vec::new();
    for name in CASES {
        for (what, worst) in check(&GoldenCase::read(&case_dir(name))) {
            if worst.is_nan() || worst > TOLERANCE {
                failures.push(format!("{name}, {what}: {worst:e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_folder_is_a_case() {
    let folders = std::fs::read_dir(case_dir("")).unwrap().map(|e| e.unwrap());
    let mut names: Vec<String> =
        folders.filter(|e| e.path().is_dir()).map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, CASES);
}

#[test]
fn whole_and_chunked_prompts_match_transformers() {
    every_case(|case| {
        let mut driver = case_driver(case, Reference::default());
        let chunks = [[usize::MAX; 3], [1, 7, 16], [7, 16, 1], [16, 1, 7]];
        chunks.iter().map(|c| (format!("chunks {c:?}"), case.mixed(&mut driver, c))).collect()
    });
}

#[test]
fn prompts_behind_every_prefix_match_transformers() {
    every_case(|case| {
        let check = |chunk| {
            let mut driver = case_driver(case, Reference::default());
            (format!("prefixes, chunks of {chunk}"), case.after_prefixes(&mut driver, chunk))
        };
        [1, 7, usize::MAX].map(check).to_vec()
    });
}

#[test]
fn preempted_prompts_match_transformers() {
    every_case(|case| {
        let mut driver = case_driver(case, Reference::default());
        let mut found: Vec<_> = [[7, 14, 1], [33, 16, 4]]
            .iter()
            .map(|at| (format!("preempted at {at:?}"), case.preempted(&mut driver, 7, at)))
            .collect();
        if case.task == GoldenTask::Generate {
            found.push(("drawn after preemption".into(), case.drawn_after_preemption(&mut driver, 6)));
        }
        found
    });
}

#[test]
fn embeddings_point_where_transformers_says() {
    for name in CASES {
        let case = GoldenCase::read(&case_dir(name));
        if case.task == GoldenTask::Embed {
            let least = case.least_cosine(&mut case_driver(&case, Reference::default()));
            assert!(least >= 0.999_999, "{name}: {least}");
        }
    }
}

#[test]
fn gguf_cases_match_transformers() {
    for name in ["llama-llama3", "llama-yarn", "qwen2", "qwen3"] {
        let case = GoldenCase::read(&case_dir(name));
        let source = ModelSource::gguf(&case.dir.join("model.gguf"));
        let worst = case.mixed(&mut driver(&source, Task::Native, Reference::default()), &[usize::MAX; 3]);
        assert!(worst < TOLERANCE, "{name}: {worst:e}");
    }
}

#[test]
fn the_gate_fails_for_faults() {
    use Mutation as M;
    let table: &[(&str, &[Mutation])] = &[
        ("llama-gqa-bias", &[M::NoRope, M::NoBias, M::RotatedKvHeads(10), M::LostNorm(0), M::LostNorm(1)]),
        ("mistral-window", &[M::WiderWindow, M::NarrowerWindow]),
        ("qwen2-mixed-window", &[M::WiderWindow, M::NarrowerWindow]),
        ("qwen3", &[M::NoQkNorm, M::RotatedKvHeads(16), M::WrongPairing]),
        ("ministral3", &[M::NoQueryScale]),
        ("granite", &[M::NoResidualScale, M::NoEmbedScale, M::NoLogitsScale]),
        ("olmo2", &[M::NoQkNorm, M::LostNorm(0), M::LostNorm(1)]),
        ("glm4", &[M::LostNorm(0), M::LostNorm(1), M::LostNorm(2), M::LostNorm(3), M::WrongPairing]),
        ("cohere2", &[M::LostNorm(0), M::WiderWindow, M::WrongPairing, M::NoLogitsScale]),
        ("apertus", &[M::NoQkNorm, M::LostNorm(1)]),
        ("qwen3moe", &[M::SwappedExperts, M::WrongRouterNorm]),
        ("mixtral-window", &[M::SwappedExperts, M::NarrowerWindow]),
        ("gptoss", &[M::NoSinks, M::SwappedExperts, M::WiderWindow, M::WrongRouterNorm, M::NoBias]),
        ("deepseek", &[M::SwappedExperts, M::NoCorrection, M::NoRouteGroups, M::WrongRouterNorm, M::NoRope]),
        ("gemma2", &[M::NoSoftCap, M::WiderWindow, M::NoEmbedScale, M::LostNorm(1), M::LostNorm(3)]),
        ("gemma3", &[M::NarrowerWindow, M::NoQkNorm, M::LostNorm(2)]),
        (
            "gemma4",
            &[
                M::NoValueNorm,
                M::WeighedValues,
                M::NoOutputScale,
                M::NoExpertScale,
                M::WrongPairing,
                M::SwappedExperts,
                M::LostNorm(3),
                M::LostNorm(4),
                M::LostNorm(5),
                M::LostNorm(6),
                M::LostNorm(7),
            ],
        ),
        ("qwen3next", &[M::WrongDecay, M::ReversedTaps, M::NoGate, M::SwappedExperts]),
        ("qwen3_5", &[M::WrongDecay, M::NoGate]),
        ("xlmr-embed", &[M::NoPositions, M::NoBias, M::LostNorm(0), M::LostNorm(1), M::LostNorm(2)]),
        ("xlmr-rerank", &[M::WrongActivation, M::NoPositions]),
        ("qwen3-embed", &[M::NoRope, M::LostNorm(1)]),
    ];
    let mut passed = Vec::new();
    for (name, mutations) in table {
        let case = GoldenCase::read(&case_dir(name));
        for &mutation in *mutations {
            let mutant = Mutant::new(Reference::default(), mutation);
            let worst = case.mixed(&mut case_driver(&case, mutant), &[usize::MAX; 3]);
            if worst <= 0.05 {
                passed.push(format!("{name} with {mutation:?}: {worst:e}"));
            }
        }
    }
    assert!(passed.is_empty(), "faults that pass the gate:\n{}", passed.join("\n"));
}

/// What the driver's prefixes are worth: without the snapshot, or with pages of another length, a hit gives other numbers
/// or none.
#[test]
fn a_wrong_prefix_is_found_out() {
    let fails = |name: &str, spoil: fn(&mut Prefix)| {
        let case = GoldenCase::read(&case_dir(name));
        let mut driver = case_driver(&case, Reference::default());
        let mut prefix = driver.prefixes(&case.prompts[0].ids).remove(1);
        spoil(&mut prefix);
        let script = case.script(0, 7).after(prefix.clone());
        let play = std::panic::AssertUnwindSafe(|| driver.play(&[script]));
        std::panic::catch_unwind(play)
            .map_or(f32::INFINITY, |played| case.difference(0, prefix.computed, &played[0]))
    };
    for name in ["qwen3next", "gemma4", "mistral-window", "deepseek"] {
        assert!(fails(name, |_| {}) < TOLERANCE, "{name}: an honest prefix");
    }
    let no_snapshot = fails("qwen3next", |p| p.restore = None);
    let older_snapshot = fails("qwen3next", |p| p.restore = p.restore.map(|s| SnapshotId(s.0 - 1)));
    let other_page = fails("deepseek", |p| p.blocks[0][0] = p.blocks[0][1]);
    let lost_window = fails("mistral-window", |p| p.blocks[0].fill(BlockId::NULL));
    for worst in [no_snapshot, older_snapshot, other_page, lost_window] {
        assert!(worst > 0.05, "{no_snapshot} {older_snapshot} {other_page} {lost_window}");
    }
}

#[test]
fn dummy_weights_run_in_every_architecture() {
    for name in CASES {
        let case = GoldenCase::read(&case_dir(name));
        let source = ModelSource::directory(&case.dir).unwrap();
        let options = LoadOptions { dummy: Some(7), ..options(case.load_task()) };
        let model = load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap();
        let worst = case.mixed(&mut Driver::new(model.executor), &[usize::MAX; 3]);
        assert!(worst.is_finite() && worst > 0.05, "{name}: {worst:e}");
    }
}

/// A pool with room for a window alone is enough for a context that is many windows long.
#[test]
fn passed_windows_give_their_pages_back() {
    let case = GoldenCase::read(&case_dir("mistral-window"));
    let source = ModelSource::directory(&case.dir).unwrap();
    let options =
        LoadOptions { cache: CacheBudget::Tokens(48), max_step_tokens: 16, ..options(Task::Native) };
    let model = load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap();
    assert_eq!((model.cache.blocks, model.cache.max_context), (4, 96));
    let mut small = Driver::new(model.executor);
    for chunk in [1, 7, 16] {
        let played = small.play(&[case.script(0, chunk)]);
        let worst = case.difference(0, 0, &played[0]);
        assert!(worst < TOLERANCE, "chunks of {chunk}: {worst:e}");
    }
    let script = Script::greedy(&case.prompts[0].ids, 50, 0);
    let drawn = small.play(&[Script { chunk: 5, ..script.clone() }]);
    assert_eq!(drawn[0].tokens, case_driver(&case, Reference::default()).play(&[script])[0].tokens);
}

#[test]
fn mixed_windows_make_two_kinds_of_groups() {
    use mirai_engine::{Executor, GroupKind};
    let source = ModelSource::directory(&case_dir("qwen2-mixed-window")).unwrap();
    let model = open(&source, Task::Native, Reference::default());
    let geometry = model.executor.geometry();
    assert_eq!(geometry.groups, [GroupKind::Full, GroupKind::Window(5), GroupKind::Window(5)]);
    assert_eq!((geometry.vocab, geometry.max_context, geometry.slots), (61, 96, 8));
    assert_eq!(model.cache.tokens, 512);
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
        let mut driver = driver(&source, Task::Native, Reference::default());
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
