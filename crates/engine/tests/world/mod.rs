//! One simulated world: a scheduler, a simulated device, clients, and everything that must hold.

mod rng;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use mirai_engine::hooks::{Injection, TestHooks, Victim};
use mirai_engine::sim::{Check, SimConfig, SimExecutor, default_draw, default_pool, reference};
use mirai_engine::{
    EngineConfig, EngineRequest, Event, Executor, FinishReason, Geometry, GroupKind, HashKey,
    MAX_PREEMPTIONS, RequestId, RowFault, RowInput, RowOutput, SamplingParams, Scheduler, StepOutcome,
    StepPlan, Task, TenantId, TokenId,
};
use rng::Rng;

/// Steps with arrivals in one world.
const BUSY_STEPS: u64 = 400;

/// What a test decides instead of the seed.
#[derive(Clone, Copy, Default)]
pub struct Options {
    pub look_ahead: Option<bool>,
    /// No cancels, stops, deadlines and faults: every sequence goes to its natural end.
    pub calm: bool,
}

/// What happened at least once, so that a check of nothing cannot pass for a check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub finished: u64,
    pub preemptions: u64,
    pub most_preemptions: u32,
    pub hits: u64,
    pub evictions: u64,
    pub choices: u64,
    pub cancelled: u64,
    pub stopped: u64,
    pub deadlines: u64,
    pub faults: u64,
    pub panics: u64,
    pub restores: u64,
    pub refused: u64,
    pub wasted: u64,
    pub pooled: u64,
    /// Pooled prompts that were computed whole, and those that took blocks from the index or were preempted.
    pub pooled_whole: u64,
    pub pooled_cached: u64,
    pub pooled_preempted: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        self.finished += other.finished;
        self.preemptions += other.preemptions;
        self.most_preemptions = self.most_preemptions.max(other.most_preemptions);
        self.hits += other.hits;
        self.evictions += other.evictions;
        self.choices += other.choices;
        self.cancelled += other.cancelled;
        self.stopped += other.stopped;
        self.deadlines += other.deadlines;
        self.faults += other.faults;
        self.panics += other.panics;
        self.restores += other.restores;
        self.refused += other.refused;
        self.wasted += other.wasted;
        self.pooled += other.pooled;
        self.pooled_whole += other.pooled_whole;
        self.pooled_cached += other.pooled_cached;
        self.pooled_preempted += other.pooled_preempted;
    }

    pub fn assert_everything_happened(&self) {
        let all = [
            self.finished,
            self.preemptions,
            self.hits,
            self.evictions,
            self.choices,
            self.cancelled,
            self.stopped,
            self.deadlines,
            self.faults,
            self.panics,
            self.restores,
            self.refused,
            self.wasted,
            self.pooled,
            self.pooled_whole,
            self.pooled_cached,
            self.pooled_preempted,
        ];
        assert!(all.iter().all(|&count| count > 0), "something never happened: {self:?}");
    }
}

/// One choice, as its client sees it.
struct Tape {
    expected: Vec<TokenId>,
    ends: FinishReason,
    got: Vec<TokenId>,
    prefilled: bool,
    finished: Option<FinishReason>,
    stop_at: Option<u32>,
    pooled: bool,
}

struct Client {
    request: EngineRequest,
    tapes: Vec<Tape>,
    preemptions: u32,
    may_fault: bool,
}

pub struct World {
    rng: Rng,
    options: Options,
    look_ahead: bool,
    geometry: Geometry,
    budget: u32,
    scheduler: Scheduler,
    executor: SimExecutor,
    hooks: Arc<TestHooks>,
    plan: StepPlan,
    outcome: StepOutcome,
    now: Duration,
    clients: BTreeMap<RequestId, Client>,
    done: BTreeMap<(RequestId, u32), Vec<TokenId>>,
    prompts: Vec<Vec<TokenId>>,
    next_id: u64,
    arrival_odds: u64,
    history: DefaultHasher,
    steps: u64,
    last_finish: u64,
    pub seen: Seen,
}

fn window(rng: &mut Rng) -> GroupKind {
    GroupKind::Window(1 + rng.below(40) as u32)
}

/// What a model that sees prompts whole keeps of them: mostly nothing.
fn groups_of_encoder(rng: &mut Rng) -> Vec<GroupKind> {
    match rng.below(6) {
        0 => vec![GroupKind::Full],
        1 => vec![window(rng), GroupKind::Recurrent],
        _ => Vec::new(),
    }
}

fn groups(rng: &mut Rng) -> Vec<GroupKind> {
    match rng.below(8) {
        0 | 1 => vec![GroupKind::Full],
        2 => vec![window(rng)],
        3 => vec![GroupKind::Full, window(rng)],
        4 => vec![GroupKind::Full, GroupKind::Recurrent],
        5 => vec![GroupKind::Recurrent],
        6 => vec![window(rng), window(rng), GroupKind::Full],
        _ => vec![GroupKind::Recurrent, window(rng), GroupKind::Full],
    }
}

impl World {
    pub fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let whole_prompts = rng.one_in(6);
        let groups = if whole_prompts { groups_of_encoder(&mut rng) } else { groups(&mut rng) };
        let most_blocks = if rng.one_in(3) { 12 } else { 60 };
        // Steps of an encoder take whole prompts; where they do not, the door says so.
        let most_step = if whole_prompts { 400 } else { 80 };
        let generates = !whole_prompts && !rng.one_in(8);
        let geometry = Geometry {
            blocks: match groups.len() as u32 {
                0 => rng.below(2) as u32,
                groups => groups + 1 + rng.below(most_blocks) as u32,
            },
            slots: 1 + rng.below(8) as u32,
            snapshots: rng.below(5) as u32,
            max_step_tokens: 1 + rng.below(most_step) as u32,
            max_context: 20 + rng.below(200) as u32,
            vocab: 3 + rng.below(40) as u32,
            generates,
            pools: !generates || rng.one_in(2),
            whole_prompts,
            groups,
        };
        let config = EngineConfig {
            max_step_tokens: 1 + rng.below(most_step) as u32,
            max_running: 1 + rng.below(8) as u32,
            prefix_caching: !rng.one_in(4),
            snapshot_interval: 16 * (1 + rng.below(4) as u32),
            ..EngineConfig::default()
        };
        let look_ahead = rng.one_in(2);
        // Few bits, or none at all: what keeps prefixes and salts apart is the comparison, not the hash.
        let mask = [0, 0xff, u64::MAX][rng.below(3) as usize];
        let hash = HashKey { key: (rng.next(), rng.next()), mask };
        let mut scheduler = Scheduler::new(&config, &geometry, hash).unwrap();
        let hooks = Arc::new(TestHooks::default());
        scheduler.set_hooks(Arc::clone(&hooks));
        let sim = SimConfig { check: Check::All, ..SimConfig::new(geometry.clone()) };
        let tokens = |rng: &mut Rng, length: u64| (0..length).map(|_| rng.below(3) as TokenId).collect();
        let prompts = (0..3).map(|_| tokens(&mut rng, 200)).collect();
        Self {
            budget: config.max_step_tokens.min(geometry.max_step_tokens),
            arrival_odds: 1 + rng.below(12),
            look_ahead: options.look_ahead.unwrap_or(look_ahead),
            options,
            executor: SimExecutor::new(sim),
            geometry,
            scheduler,
            hooks,
            plan: StepPlan::default(),
            outcome: StepOutcome::default(),
            now: Duration::ZERO,
            clients: BTreeMap::new(),
            done: BTreeMap::new(),
            prompts,
            next_id: 0,
            history: DefaultHasher::new(),
            steps: 0,
            last_finish: 0,
            seen: Seen::default(),
            rng,
        }
    }

    /// Lets clients come for a while, then waits until everything has ended. Returns the steps.
    pub fn run(&mut self) -> u64 {
        let mut idle = 0;
        while self.steps < BUSY_STEPS && idle < 20_000 {
            idle += 1;
            self.turn(true);
        }
        let mut turns = 0;
        while !self.scheduler.is_idle() {
            self.turn(false);
            turns += 1;
            assert!(turns < 100_000, "no end in sight");
        }
        assert!(self.clients.is_empty(), "a request has not ended");
        self.scheduler.audit_idle().unwrap();
        let counters = self.scheduler.counters();
        self.seen.hits += counters.prefix_hit_tokens;
        self.seen.evictions += counters.evictions;
        self.seen.preemptions += counters.preemptions;
        self.seen.wasted += counters.wasted_tokens;
        assert_eq!((counters.running, counters.waiting, counters.queued_requests), (0, 0, 0));
        self.steps
    }

    pub fn history(&self) -> u64 {
        self.history.finish()
    }

    pub fn tapes(&self) -> &BTreeMap<(RequestId, u32), Vec<TokenId>> {
        &self.done
    }

    /// One turn of the engine's loop.
    fn turn(&mut self, arrivals: bool) {
        self.now += Duration::from_micros(500 + self.rng.below(1000));
        // In a calm world arrivals must not depend on how many turns a step takes.
        if arrivals && (self.options.calm || self.rng.one_in(self.arrival_odds)) {
            if !self.options.calm || self.next_id < 40 {
                self.arrive();
            } else {
                self.steps = self.steps.max(BUSY_STEPS);
            }
        }
        if !self.options.calm {
            self.disturb();
        }
        self.scheduler.plan(self.now, &mut self.plan);
        let planned = !self.plan.rows.is_empty();
        self.check_plan();
        if planned {
            self.steps += 1;
            self.executor.submit(&self.plan).unwrap();
        }
        let flying = self.scheduler.steps_in_flight();
        assert!(flying > 0 || self.scheduler.is_idle(), "work waits and nothing is planned");
        if flying == 2 || (flying == 1 && !(planned && self.look_ahead)) {
            self.executor.collect(&mut self.outcome).unwrap();
            self.scheduler.commit(&mut self.outcome).unwrap();
        }
        self.listen();
        self.scheduler.audit().unwrap();
    }

    fn arrive(&mut self) {
        let rng = &mut self.rng;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let limit = u64::from(self.geometry.max_context);
        // Lengths around the edges of blocks, chunks and the context, and prompts that share beginnings.
        let length = match rng.below(4) {
            0 => 16 * (1 + rng.below(limit / 16)) + rng.below(11),
            1 => 1 + rng.below(12),
            _ => 1 + rng.below(limit),
        };
        let length = length.saturating_sub(2).clamp(1, 199) as usize;
        let mut prompt = self.prompts[rng.below(3) as usize][..length].to_vec();
        if rng.one_in(3) {
            let at = rng.below(length as u64) as usize;
            prompt[at] = 2 - prompt[at];
        }
        let vocab = u64::from(self.geometry.vocab);
        let stop_token_ids: Vec<TokenId> = (0..rng.below(3)).map(|_| rng.below(vocab) as TokenId).collect();
        let mut sampling = SamplingParams {
            seed: rng.below(4),
            stop_token_ids,
            min_tokens: rng.below(6) as u32,
            logprobs: rng.one_in(5).then_some(2),
            prompt_logprobs: rng.one_in(9).then_some(1),
            ..SamplingParams::default()
        };
        sampling.stop_token_ids.sort_unstable();
        sampling.stop_token_ids.dedup();
        let calm = self.options.calm;
        let geometry = &self.geometry;
        // A few ask for what the model cannot do.
        let pools = if geometry.generates && geometry.pools { rng.one_in(3) } else { geometry.pools };
        let task = if pools != rng.one_in(40) { Task::Pool } else { Task::Generate };
        let request = EngineRequest {
            id,
            task,
            tenant: TenantId(rng.below(3)),
            weight: 1 + rng.below(4) as u32,
            cache_salt: rng.below(2),
            priority: rng.below(3) as i32,
            deadline: (rng.one_in(12) && !calm).then(|| self.now + Duration::from_millis(rng.below(80))),
            prompt: prompt.into(),
            max_tokens: if task == Task::Generate { rng.below(40) as u32 } else { 0 },
            choices: if task == Task::Generate && rng.one_in(4) { 1 + rng.below(12) as u32 } else { 1 },
            sampling: Arc::new(sampling),
        };
        let may_fault = rng.one_in(15) && !calm;
        if may_fault {
            let injection =
                if rng.one_in(2) { Injection::Panic } else { Injection::Fault(RowFault::NonFinite) };
            let index = if task == Task::Generate { rng.below(20) as u32 } else { 0 };
            self.hooks.inject(Victim::Request(id), index, injection);
        }
        if self.scheduler.add(request.clone(), self.now).is_err() {
            self.seen.refused += 1;
            return;
        }
        self.seen.choices += u64::from(request.choices - 1);
        let tapes = (0..request.choices)
            .map(|choice| {
                let (expected, ends) = match task {
                    Task::Generate => reference(&request, choice, self.geometry.vocab, default_draw),
                    Task::Pool => (Vec::new(), FinishReason::Pooled),
                };
                let got = Vec::new();
                Tape { expected, ends, got, prefilled: false, finished: None, stop_at: None, pooled: false }
            })
            .collect();
        self.clients.insert(id, Client { request, tapes, preemptions: 0, may_fault });
    }

    /// Clients that go away and stop strings that are found.
    fn disturb(&mut self) {
        if self.clients.is_empty() {
            return;
        }
        let pick = self.rng.below(self.clients.len() as u64) as usize;
        let Some((&id, client)) = self.clients.iter_mut().nth(pick) else { return };
        if self.rng.one_in(40) {
            self.scheduler.cancel(id);
        } else if self.rng.one_in(20) {
            let choice = self.rng.below(client.tapes.len() as u64) as usize;
            let tape = &mut client.tapes[choice];
            if !tape.got.is_empty() && tape.finished.is_none() && tape.stop_at.is_none() {
                let kept = 1 + self.rng.below(tape.got.len() as u64) as u32;
                tape.stop_at = Some(kept);
                self.scheduler.stop(id, choice as u32, kept);
            }
        }
    }

    fn check_plan(&mut self) {
        let tokens: u32 = self.plan.rows.iter().map(|row| row.len).sum();
        assert!(tokens <= self.budget, "{tokens} tokens in a step of at most {}", self.budget);
        for row in &self.plan.rows {
            let whole = self.geometry.whole_prompts;
            assert!(!whole || (row.start, row.output) == (0, RowOutput::Pool), "a part of a prompt: {row:?}");
            let from = if let RowInput::Tokens(offset) = row.input { offset } else { u32::MAX };
            (row.seq, row.slot, row.start, row.len, from).hash(&mut self.history);
        }
        for append in &self.plan.appends {
            (append.slot, append.block, append.group).hash(&mut self.history);
        }
        for open in &self.plan.opens {
            (open.slot, open.seq, open.computed, &open.blocks, open.restore).hash(&mut self.history);
            self.seen.restores += u64::from(open.restore.is_some());
        }
        self.plan.tokens.hash(&mut self.history);
    }

    /// What the demultiplexer would do, and every promise about events.
    fn listen(&mut self) {
        for event in self.scheduler.take_events() {
            match event {
                Event::Prefilled { request, choice, prompt_logprobs, .. } => {
                    let client = self.clients.get_mut(&request).unwrap();
                    let tape = &mut client.tapes[choice as usize];
                    assert!(!tape.prefilled && tape.got.is_empty() && tape.finished.is_none());
                    tape.prefilled = true;
                    let wanted = client
                        .request
                        .sampling
                        .prompt_logprobs
                        .filter(|_| client.request.task == Task::Generate)
                        .map_or(0, |_| client.request.prompt.len() - 1);
                    let tokens: Vec<TokenId> = prompt_logprobs.iter().map(|entry| entry.token).collect();
                    assert_eq!(tokens, client.request.prompt[1..=wanted]);
                }
                Event::Token { request, choice, index, token, logprobs } => {
                    (request, choice, index, token).hash(&mut self.history);
                    let client = self.clients.get_mut(&request).unwrap();
                    let tape = &mut client.tapes[choice as usize];
                    assert!(tape.prefilled && tape.finished.is_none());
                    assert_eq!(index as usize, tape.got.len());
                    assert_eq!(Some(&token), tape.expected.get(index as usize), "{request} choice {choice}");
                    assert_eq!(
                        logprobs.map(|entry| entry.token),
                        client.request.sampling.logprobs.map(|_| token)
                    );
                    tape.got.push(token);
                }
                Event::Pooled { request, values } => {
                    let client = self.clients.get_mut(&request).unwrap();
                    let tape = &mut client.tapes[0];
                    assert!(tape.prefilled && !tape.pooled && tape.finished.is_none());
                    assert_eq!(client.request.task, Task::Pool);
                    assert_eq!(values, default_pool(&client.request.prompt, 8), "{request}");
                    tape.pooled = true;
                }
                Event::Finished { request, choice, reason, usage } => {
                    self.finish(request, choice, reason, usage);
                }
            }
        }
        let waited = self.steps - self.last_finish;
        assert!(self.clients.is_empty() || waited < 5_000, "nothing has ended for {waited} steps");
        if self.clients.is_empty() {
            self.last_finish = self.steps;
        }
    }

    fn finish(&mut self, id: RequestId, choice: u32, reason: FinishReason, usage: mirai_engine::SeqUsage) {
        self.last_finish = self.steps;
        self.seen.finished += 1;
        format!("{id} {choice} {reason:?} {usage:?}").hash(&mut self.history);
        let client = self.clients.get_mut(&id).unwrap();
        let tape = &mut client.tapes[choice as usize];
        assert_eq!(tape.finished, None, "{id} choice {choice} ends twice");
        let got = tape.got.len() as u32;
        assert_eq!(usage.prompt_tokens as usize, client.request.prompt.len());
        assert!(usage.cached_tokens < usage.prompt_tokens, "one prompt token is always computed");
        match &reason {
            FinishReason::Stopped => {
                self.seen.stopped += 1;
                assert_eq!(Some(usage.completion_tokens), tape.stop_at);
                assert!(usage.wasted_tokens >= got - usage.completion_tokens);
            }
            FinishReason::Pooled => {
                assert!(tape.pooled && tape.ends == FinishReason::Pooled && tape.prefilled);
                self.seen.pooled += 1;
                self.seen.pooled_whole += u64::from(self.geometry.whole_prompts);
                self.seen.pooled_cached += u64::from(usage.cached_tokens > 0);
                self.seen.pooled_preempted += u64::from(usage.preemptions > 0);
                assert!(!self.geometry.whole_prompts || (usage.cached_tokens, usage.preemptions) == (0, 0));
            }
            FinishReason::StopToken(_) | FinishReason::Length => {
                assert_eq!((&reason, &tape.got), (&tape.ends, &tape.expected), "{id} choice {choice}");
                assert!(tape.prefilled);
            }
            FinishReason::Cancelled => self.seen.cancelled += 1,
            FinishReason::Deadline => {
                self.seen.deadlines += 1;
                assert!(client.request.deadline.is_some_and(|deadline| deadline <= self.now));
            }
            FinishReason::Fault(fault) => {
                assert!(client.may_fault, "{id} fails and was not told to");
                self.seen.faults += 1;
                self.seen.panics += u64::from(matches!(fault, RowFault::Panic(_)));
            }
            FinishReason::EngineStopped => panic!("nothing stops this engine"),
        }
        if reason != FinishReason::Stopped {
            assert_eq!(usage.completion_tokens, got);
        }
        tape.finished = Some(reason);
        client.preemptions += usage.preemptions;
        self.seen.most_preemptions = self.seen.most_preemptions.max(client.preemptions);
        assert!(client.preemptions <= MAX_PREEMPTIONS, "{id} was preempted {} times", client.preemptions);
        if client.tapes.iter().all(|tape| tape.finished.is_some()) {
            let client = self.clients.remove(&id).unwrap();
            for (choice, tape) in (0..).zip(client.tapes) {
                self.done.insert((id, choice), tape.got);
            }
        }
    }
}
