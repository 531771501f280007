//! A scheduler on a simulated device, moved by hand, one step at a time.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;
use std::time::Duration;

use mirai_engine::sim::{Check, SimConfig, SimExecutor};
use mirai_engine::{
    Counters, EngineConfig, EngineRequest, Event, Executor, FinishReason, Geometry, GroupKind, HashKey,
    RequestId, SamplingParams, Scheduler, SeqUsage, StepOutcome, StepPlan, Task, TenantId, TokenId,
};

pub struct Bed {
    pub scheduler: Scheduler,
    pub executor: SimExecutor,
    pub plan: StepPlan,
    pub outcome: StepOutcome,
    pub now: Duration,
    pub look_ahead: bool,
    pub ends: Vec<(RequestId, u32, FinishReason, SeqUsage)>,
    pub tokens: Vec<(RequestId, u32, TokenId)>,
    pub pooled: Vec<(RequestId, Box<[f32]>)>,
}

pub fn room(groups: &[GroupKind]) -> Geometry {
    Geometry {
        groups: groups.to_vec(),
        blocks: 200,
        slots: 16,
        snapshots: 8,
        max_step_tokens: 64,
        max_context: 4096,
        vocab: 1000,
        generates: true,
        pools: true,
        whole_prompts: false,
    }
}

impl Bed {
    pub fn new(geometry: Geometry, config: &EngineConfig) -> Self {
        let scheduler = Scheduler::new(config, &geometry, HashKey::default()).unwrap();
        let executor = SimExecutor::new(SimConfig { check: Check::All, ..SimConfig::new(geometry) });
        Self {
            scheduler,
            executor,
            plan: StepPlan::default(),
            outcome: StepOutcome::default(),
            now: Duration::ZERO,
            look_ahead: false,
            ends: Vec::new(),
            tokens: Vec::new(),
            pooled: Vec::new(),
        }
    }

    pub fn with(groups: &[GroupKind]) -> Self {
        Self::new(room(groups), &EngineConfig::default())
    }

    pub fn add(&mut self, request: EngineRequest) {
        self.scheduler.add(request, self.now).unwrap();
    }

    /// One turn of the loop.
    pub fn step(&mut self) {
        self.now += Duration::from_millis(1);
        self.scheduler.plan(self.now, &mut self.plan);
        let planned = !self.plan.rows.is_empty();
        if planned {
            self.executor.submit(&self.plan).unwrap();
        }
        let flying = self.scheduler.steps_in_flight();
        if flying == 2 || (flying == 1 && !(planned && self.look_ahead)) {
            self.collect();
        }
        self.listen();
        self.scheduler.audit().unwrap();
    }

    /// Takes in the oldest step under way.
    pub fn collect(&mut self) {
        self.executor.collect(&mut self.outcome).unwrap();
        self.scheduler.commit(&mut self.outcome).unwrap();
    }

    pub fn listen(&mut self) {
        for event in self.scheduler.take_events() {
            match event {
                Event::Finished { request, choice, reason, usage } => {
                    self.ends.push((request, choice, reason, usage));
                }
                Event::Token { request, choice, token, .. } => self.tokens.push((request, choice, token)),
                Event::Pooled { request, values } => self.pooled.push((request, values)),
                Event::Prefilled { .. } => {}
            }
        }
    }

    /// Until nothing is left; returns the steps.
    pub fn finish(&mut self) -> usize {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.step();
            steps += 1;
            assert!(steps < 100_000, "no end in sight");
        }
        self.listen();
        self.scheduler.audit_idle().unwrap();
        steps
    }

    pub fn tokens_of(&self, id: u64, choice: u32) -> Vec<TokenId> {
        let own =
            self.tokens.iter().filter(|(request, number, _)| *request == RequestId(id) && *number == choice);
        own.map(|(_, _, token)| *token).collect()
    }

    pub fn usage(&self, id: u64) -> SeqUsage {
        self.ends.iter().find(|end| end.0 == RequestId(id)).unwrap().3
    }

    pub fn counters(&self) -> Counters {
        self.scheduler.counters()
    }
}

pub fn request(id: u64, prompt: usize, max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: Task::Generate,
        tenant: TenantId(0),
        weight: 1,
        cache_salt: 0,
        priority: 0,
        deadline: None,
        prompt: (0..prompt as u32).map(|i| i * 7 % 1000).collect(),
        max_tokens,
        choices: 1,
        sampling: Arc::new(SamplingParams::default()),
    }
}

/// What a pooling request for a prompt of this length looks like; the prompt is that of [`request`].
pub fn pooling(id: u64, prompt: usize) -> EngineRequest {
    EngineRequest { task: Task::Pool, ..request(id, prompt, 0) }
}

/// A model that sees prompts whole and keeps `groups` of them.
pub fn encoder(groups: &[GroupKind]) -> Geometry {
    let blocks = if groups.is_empty() { 0 } else { 40 };
    Geometry { generates: false, pools: true, whole_prompts: true, blocks, ..room(groups) }
}
