//! The engine's own scheduler over the f64 oracle, in a pool that is too small: prefix hits, snapshots, windows whose
//! pages change hands, preemption and recomputation must leave every number as it is without them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mirai_engine::{
    Counters, EngineConfig, EngineRequest, Event, Executor, FinishReason, HashKey, RequestId, SamplingParams,
    Scheduler, StepOutcome, StepPlan, Task, TenantId,
};
use mirai_model::backend::CacheDtype;
use mirai_model::reference::Reference;
use mirai_model::testing::{Driver, GoldenCase, GoldenTask, Script, largest_difference};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, load};

const DRAW: u32 = 9;

/// What an answer consists of: tokens with their log-probabilities, or pooled numbers.
#[derive(Clone, Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    numbers: Vec<f32>,
}

fn case(name: &str) -> GoldenCase {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    GoldenCase::read(&dir)
}

fn executor(case: &GoldenCase, tokens: u64) -> ModelExecutor<Reference> {
    let options = LoadOptions {
        task: case.load_task(),
        cache: CacheBudget::Tokens(tokens),
        cache_dtype: CacheDtype::F32,
        max_slots: 6,
        max_step_tokens: 48,
        ..LoadOptions::default()
    };
    let source = ModelSource::directory(&case.dir).unwrap();
    load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap().executor
}

/// Prompts that begin alike: every length of the longest one around its blocks, and the others.
fn prompts(case: &GoldenCase) -> Vec<Vec<u32>> {
    let longest = &case.prompts[0].ids;
    let around = (16..longest.len()).filter(|n| matches!(n % 16, 15 | 0 | 1)).map(|n| longest[..n].to_vec());
    case.prompts.iter().map(|p| p.ids.clone()).chain(around).collect()
}

/// Each prompt alone, without an engine.
fn undisturbed(case: &GoldenCase, prompts: &[Vec<u32>]) -> Vec<Answer> {
    let mut driver = Driver::new(executor(case, 512));
    let answer = |ids: &Vec<u32>| {
        let generates = case.task == GoldenTask::Generate;
        let script =
            if generates { Script::greedy(ids, DRAW as usize, 0) } else { Script::pooled(ids, usize::MAX) };
        let played = driver.play(&[script]).remove(0);
        let numbers = played.pooled.unwrap_or_else(|| played.drawn.iter().map(|t| t.logprob).collect());
        Answer { tokens: played.tokens, numbers }
    };
    prompts.iter().map(answer).collect()
}

fn request(case: &GoldenCase, id: u64, prompt: &[u32]) -> EngineRequest {
    let generates = case.task == GoldenTask::Generate;
    EngineRequest {
        id: RequestId(id),
        task: if generates { Task::Generate } else { Task::Pool },
        tenant: TenantId(0),
        weight: 1,
        cache_salt: 0,
        priority: 0,
        deadline: None,
        prompt: prompt.into(),
        max_tokens: if generates { DRAW } else { 0 },
        choices: 1,
        sampling: Arc::new(SamplingParams { logprobs: Some(0), ..SamplingParams::default() }),
    }
}

fn take(answers: &mut BTreeMap<u64, Answer>, event: Event) {
    match event {
        Event::Token { request, token, logprobs, .. } => {
            let answer = answers.entry(request.0).or_default();
            answer.tokens.push(token);
            answer.numbers.push(logprobs.unwrap().logprob);
        }
        Event::Pooled { request, values } => {
            answers.entry(request.0).or_default().numbers.extend_from_slice(&values);
        }
        Event::Finished { reason, .. } => {
            assert!(matches!(reason, FinishReason::Length | FinishReason::Pooled), "{reason:?}");
        }
        Event::Prefilled { .. } => {}
    }
}

/// All prompts at once, round after round, through the scheduler.
fn served(case: &GoldenCase, prompts: &[Vec<u32>], pool: u64, rounds: u64) -> (Vec<Answer>, Counters) {
    let mut executor = executor(case, pool);
    let config = EngineConfig { snapshot_interval: 16, max_running: 6, ..EngineConfig::default() };
    let mut scheduler = Scheduler::new(&config, executor.geometry(), HashKey::default()).unwrap();
    let mut answers = BTreeMap::new();
    let (mut plan, mut outcome, mut steps) = (StepPlan::default(), StepOutcome::default(), 0);
    for round in 0..rounds {
        for (id, prompt) in prompts.iter().enumerate() {
            let id = round * prompts.len() as u64 + id as u64;
            scheduler.add(request(case, id, prompt), Duration::from_secs(round)).unwrap();
        }
        while !scheduler.is_idle() {
            steps += 1;
            assert!(steps < 5_000, "no end");
            scheduler.plan(Duration::from_secs(round), &mut plan);
            scheduler.audit().unwrap();
            if !plan.rows.is_empty() {
                executor.submit(&plan).unwrap();
                executor.collect(&mut outcome).unwrap();
                scheduler.commit(&mut outcome).unwrap();
            }
            scheduler.take_events().into_iter().for_each(|event| take(&mut answers, event));
        }
        scheduler.audit_idle().unwrap();
    }
    (answers.into_values().collect(), scheduler.counters())
}

/// Serves a case in a pool of so many tokens, and holds every answer against the undisturbed one.
fn holds(name: &str, pool: u64) -> Counters {
    let (case, rounds) = (case(name), 3);
    let prompts = prompts(&case);
    let expected = undisturbed(&case, &prompts);
    let (answers, counters) = served(&case, &prompts, pool, rounds);
    assert_eq!(answers.len() as u64, rounds * prompts.len() as u64, "{name}");
    for (index, (got, want)) in answers.iter().zip(expected.iter().cycle()).enumerate() {
        assert_eq!(got.tokens, want.tokens, "{name}, answer {index}");
        let worst = largest_difference(&want.numbers, &got.numbers);
        assert!(worst < 1e-5, "{name}, answer {index}: {worst:e}");
    }
    counters
}

#[test]
fn generated_answers_do_not_depend_on_how_they_were_served() {
    for name in [
        "llama-gqa-bias",
        "mistral-window",
        "qwen2-mixed-window",
        "gptoss",
        "gemma2-block",
        "gemma3",
        "gemma4",
        "gemma4-shared-kv",
        "deepseek",
        "qwen3next",
        "qwen3_5moe-wrapper",
    ] {
        let counters = holds(name, 112);
        assert!(counters.cached_tokens > 0, "{name}: no prefix was hit");
        assert!(counters.preemptions > 0, "{name}: nobody was preempted");
    }
}

#[test]
fn pooled_answers_do_not_depend_on_how_they_were_served() {
    for (name, hits) in
        [("gemma2-embed", true), ("qwen3-rerank", true), ("xlmr-embed", false), ("xlmr-types", false)]
    {
        let counters = holds(name, 112);
        assert_eq!(counters.cached_tokens > 0, hits, "{name}");
    }
}
