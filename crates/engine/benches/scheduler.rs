//! What the engine itself costs a step: `plan` + `commit`, without a device.
//!
//! `steady`: every running sequence decodes one token. `arrivals`: prompts of 512 tokens (a quarter of them the
//! same) and answers of 256, so that at each step one sequence in 256 ends and another takes its place.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mirai_engine::{
    EngineConfig, EngineRequest, Event, Geometry, GroupKind, HashKey, RequestId, RowOutcome, RowOutput,
    SamplingParams, Scheduler, StepOutcome, StepPlan, Task, TenantId,
};

struct Loop {
    scheduler: Scheduler,
    plan: StepPlan,
    outcomes: VecDeque<StepOutcome>,
    spare: Vec<StepOutcome>,
    now: Duration,
    next_id: u64,
    sampling: Arc<SamplingParams>,
}

impl Loop {
    fn new(running: u32, groups: Vec<GroupKind>) -> Self {
        let geometry = Geometry {
            blocks: running * 160 * groups.len() as u32,
            slots: running,
            snapshots: 0,
            max_step_tokens: 8192,
            max_context: 1 << 20,
            vocab: 32_000,
            generates: true,
            pools: false,
            whole_prompts: false,
            groups,
        };
        let config = EngineConfig { max_step_tokens: 8192, max_running: running, ..EngineConfig::default() };
        Self {
            scheduler: Scheduler::new(&config, &geometry, HashKey::default()).expect("there is room"),
            plan: StepPlan::default(),
            outcomes: VecDeque::new(),
            spare: Vec::new(),
            now: Duration::ZERO,
            next_id: 0,
            sampling: Arc::new(SamplingParams { stop_token_ids: vec![2], ..SamplingParams::default() }),
        }
    }

    fn arrive(&mut self, prompt_tokens: u32, max_tokens: u32) {
        let id = self.next_id;
        self.next_id += 1;
        let salted = if id.is_multiple_of(4) { 0 } else { id as u32 };
        let prompt = (0..prompt_tokens).map(|i| 3 + (i * 7 + salted) % 31_000).collect();
        let request = EngineRequest {
            id: RequestId(id),
            task: Task::Generate,
            tenant: TenantId(id % 8),
            weight: 1,
            cache_salt: 0,
            priority: 0,
            deadline: None,
            prompt,
            max_tokens,
            choices: 1,
            sampling: Arc::clone(&self.sampling),
        };
        self.scheduler.add(request, self.now).expect("it fits");
    }

    /// What is measured: one plan and one commit, one step of look-ahead, events taken as the thread does.
    fn step(&mut self) -> Vec<Event> {
        self.now += Duration::from_millis(10);
        self.scheduler.plan(self.now, &mut self.plan);
        let mut outcome = self.spare.pop().unwrap_or_default();
        outcome.step = self.plan.step;
        outcome.tokens.clear();
        outcome.rows.clear();
        for row in &self.plan.rows {
            let from = outcome.tokens.len() as u32;
            if row.output == RowOutput::Sample {
                outcome.tokens.push(1000 + row.start % 100);
            }
            outcome
                .rows
                .push(RowOutcome { tokens: from..outcome.tokens.len() as u32, ..RowOutcome::default() });
        }
        self.outcomes.push_back(outcome);
        if self.outcomes.len() == 2
            && let Some(mut outcome) = self.outcomes.pop_front()
        {
            self.scheduler.commit(&mut outcome).expect("it is the oldest step");
            self.spare.push(outcome);
        }
        self.scheduler.take_events()
    }
}

/// Steps that sequences which are all decoding can make before they end.
const STEADY_STEPS: u32 = 1900;

/// An engine in which `running` sequences decode.
fn filled(running: u32, groups: &[GroupKind]) -> Loop {
    let mut engine = Loop::new(running, groups.to_vec());
    (0..running).for_each(|_| engine.arrive(100, STEADY_STEPS + 200));
    while engine.scheduler.counters().running < u64::from(running) {
        engine.step();
    }
    (0..32).for_each(|_| drop(engine.step()));
    engine
}

fn steady(c: &mut Criterion) {
    let mut group = c.benchmark_group("steady");
    let shapes =
        [("full", vec![GroupKind::Full]), ("full+window", vec![GroupKind::Full, GroupKind::Window(512)])];
    for running in [256u32, 1024] {
        for (name, groups) in &shapes {
            let mut engine = filled(running, groups);
            let mut steps = 0;
            group.bench_function(BenchmarkId::new(*name, running), |b| {
                b.iter_custom(|rounds| {
                    (0..rounds).fold(Duration::ZERO, |sum, _| {
                        // Started anew before the sequences reach their end.
                        steps += 1;
                        if steps == STEADY_STEPS {
                            (engine, steps) = (filled(running, groups), 0);
                        }
                        let start = Instant::now();
                        black_box(engine.step());
                        sum + start.elapsed()
                    })
                });
            });
        }
    }
    group.finish();
}

fn arrivals(c: &mut Criterion) {
    let mut group = c.benchmark_group("arrivals");
    for running in [256u32, 1024] {
        let mut engine = Loop::new(running, vec![GroupKind::Full]);
        // Until the pool is full of cached prefixes, and ends no longer come in waves.
        for _ in 0..2000 {
            top_up(&mut engine, running);
            engine.step();
        }
        group.bench_function(BenchmarkId::new("full", running), |b| {
            // Only the step is timed: making prompts is the clients' work.
            b.iter_custom(|rounds| {
                (0..rounds).fold(Duration::ZERO, |sum, _| {
                    top_up(&mut engine, running);
                    let start = Instant::now();
                    black_box(engine.step());
                    sum + start.elapsed()
                })
            });
        });
    }
    group.finish();
}

/// Mean tokens of an answer.
const ANSWER: u32 = 256;

/// Lets as many requests arrive as have ended.
fn top_up(engine: &mut Loop, running: u32) {
    let counters = engine.scheduler.counters();
    for _ in counters.running + counters.waiting..u64::from(running) {
        let length = ANSWER / 2 + (engine.next_id * 37 % u64::from(ANSWER)) as u32;
        engine.arrive(512, length);
    }
}

criterion_group!(benches, steady, arrivals);
criterion_main!(benches);
