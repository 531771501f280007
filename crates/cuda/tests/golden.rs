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
use mirai_model::testing::{Driver, GoldenCase, GoldenTask, Mutant, Mutation, Played, Script};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, load};
use support::on_emulated_driver;

/// Device memory of these tests.
const MEMORY: (&str, &str) = ("MIRAI_EMU_MEMORY", "268435456");

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
    let options = CudaOptions {
        memory: MemoryOptions { utilization: 0.95, cache: None },
        graphs,
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

#[derive(Default)]
struct Difference {
    all: Vec<f32>,
}

impl Difference {
    fn add(&mut self, expected: &[f32], got: &[f32]) {
        assert_eq!(expected.len(), got.len());
        self.all.extend(expected.iter().zip(got).map(|(a, b)| {
            let d = (a - b).abs();
            if d.is_nan() { f32::INFINITY } else { d }
        }));
        self.all.sort_by(f32::total_cmp);
    }
    fn mean(&self) -> f32 {
        self.all.iter().sum::<f32>() / self.all.len().max(1) as f32
    }
    fn at(&self, share: f32) -> f32 {
        let last = self.all.len().saturating_sub(1);
        self.all.get((last as f32 * share) as usize).copied().unwrap_or(0.0)
    }
}

fn play<E: Executor>(case: &GoldenCase, driver: &mut Driver<E>, chunks: [usize; 3], alone: bool) -> Vec<Played> {
    let whole = driver.executor.geometry().whole_prompts;
    let script = |p: usize| case.script(p, if whole { usize::MAX } else { chunks[p % 3] });
    let scripts: Vec<Script> = (0..case.prompts.len()).map(script).collect();
    if alone {
        scripts.iter().map(|s| driver.play(std::slice::from_ref(s)).remove(0)).collect()
    } else {
        driver.play(&scripts)
    }
}

#[test]
fn survey() {
    on_emulated_driver("survey", &[MEMORY], || {
        let wanted = std::env::var("CASES").unwrap_or_default();
        for name in names().iter().filter(|n| wanted.is_empty() || wanted.split(',').any(|w| w == *n)) {
            let started = std::time::Instant::now();
            let case = case(name);
            let result = std::panic::catch_unwind(|| {
                let expected = play(&case, &mut oracle(&case), [usize::MAX; 3], false);
                let mut d = driver(&case, cuda(false));
                let mut text = String::new();
                for (chunks, alone) in [([usize::MAX; 3], true), ([usize::MAX; 3], false), ([1, 7, 16], false)] {
                    let mut difference = Difference::default();
                    for (e, g) in expected.iter().zip(play(&case, &mut d, chunks, alone)) {
                        difference.add(&numbers(e), &numbers(&g));
                    }
                    text += &format!("  {:.4} {:.4} {:.4}", difference.mean(), difference.at(0.99), difference.at(1.0));
                }
                text
            });
            let text = result.unwrap_or_else(|e| {
                e.downcast_ref::<String>().cloned().or(e.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
            });
            println!("{name:24} {:6.2} s {text}", started.elapsed().as_secs_f32());
        }
    });
}
