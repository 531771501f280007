//! Fair share under a flood: what one application gets while another multiplies its load.
//!
//! Two applications of closed-loop clients on one scheduler, with a virtual clock: a step takes a fixed time and a
//! time for each token. Prompts and answers have random lengths; each world's seed is printed.
//! `MIRAI_FAIR_SEEDS` sets how many seeds are run.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs)]

#[path = "world/rng.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod rng;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mirai_engine::{
    EngineConfig, EngineRequest, Event, Geometry, GroupKind, HashKey, RequestId, RowOutcome, RowOutput,
    SamplingParams, Scheduler, StepOutcome, StepPlan, Task, TenantId,
};
use rng::Rng;

/// One application.
#[derive(Clone, Copy)]
struct Load {
    clients: u64,
    weight: u32,
    /// Mean tokens of prompts and answers; each is from a half to one and a half of it.
    prompt: u64,
    output: u64,
}

const APPLICATION: Load = Load { clients: 60, weight: 1, prompt: 200, output: 60 };

/// The machine.
#[derive(Clone, Copy)]
struct Room {
    blocks: u32,
    slots: u32,
    budget: u32,
}

const ROOM: Room = Room { blocks: 4000, slots: 48, budget: 512 };

/// Simulated seconds that are measured.
const SECONDS: u64 = 120;

/// What an application got.
#[derive(Clone, Copy, Debug)]
struct Got {
    /// Of all tokens, prompts and answers.
    share: f64,
    p95_ttft: f64,
    answers: usize,
}

struct Client {
    tenant: usize,
    since: Duration,
    prompt: u64,
    measured: bool,
}

struct World {
    rng: Rng,
    loads: [Load; 2],
    scheduler: Scheduler,
    now: Duration,
    next: u64,
    clients: HashMap<RequestId, Client>,
    ttft: [Vec<f64>; 2],
    tokens: [u64; 2],
    answers: [usize; 2],
    from: Duration,
}

fn around(rng: &mut Rng, mean: u64) -> u64 {
    mean / 2 + rng.below(mean + 1)
}

impl World {
    fn new(seed: u64, room: Room, loads: [Load; 2]) -> Self {
        let geometry = Geometry {
            groups: vec![GroupKind::Full],
            blocks: room.blocks,
            slots: room.slots,
            snapshots: 0,
            max_step_tokens: room.budget,
            max_context: 8192,
            vocab: 1 << 16,
            generates: true,
            pools: false,
            whole_prompts: false,
        };
        let config = EngineConfig { max_step_tokens: room.budget, ..EngineConfig::default() };
        Self {
            rng: Rng::new(seed),
            loads,
            scheduler: Scheduler::new(&config, &geometry, HashKey::default()).unwrap(),
            now: Duration::ZERO,
            next: 0,
            clients: HashMap::new(),
            ttft: Default::default(),
            tokens: [0; 2],
            answers: [0; 2],
            from: Duration::ZERO,
        }
    }

    fn ask(&mut self, tenant: usize) {
        let load = self.loads[tenant];
        let (prompt, output) =
            (around(&mut self.rng, load.prompt), around(&mut self.rng, load.output).max(1));
        let id = RequestId(self.next);
        self.next += 1;
        // The first token keeps prompts from sharing blocks.
        let first = (id.0 % 65_000) as u32;
        let body = EngineRequest {
            id,
            task: Task::Generate,
            tenant: TenantId(tenant as u64),
            weight: load.weight,
            cache_salt: 0,
            priority: 0,
            deadline: None,
            prompt: (0..prompt as u32).map(|at| if at % 16 == 0 { first } else { at }).collect(),
            max_tokens: output as u32,
            choices: 1,
            sampling: Arc::new(SamplingParams::default()),
        };
        self.scheduler.add(body, self.now).unwrap();
        let measured = self.now >= self.from && self.from > Duration::ZERO;
        self.clients.insert(id, Client { tenant, since: self.now, prompt, measured });
    }

    fn step(&mut self, plan: &mut StepPlan) {
        self.scheduler.plan(self.now, plan);
        let tokens: u32 = plan.rows.iter().map(|row| row.len).sum();
        self.now += Duration::from_micros(8_000 + 40 * u64::from(tokens));
        let mut outcome = StepOutcome { step: plan.step, ..StepOutcome::default() };
        for row in &plan.rows {
            let from = outcome.tokens.len() as u32;
            if row.output == RowOutput::Sample {
                outcome.tokens.push(7);
            }
            let tokens = from..outcome.tokens.len() as u32;
            outcome.rows.push(RowOutcome { tokens, ..RowOutcome::default() });
        }
        self.scheduler.commit(&mut outcome).unwrap();
        for event in self.scheduler.take_events() {
            match event {
                Event::Token { request, index, .. } => {
                    let client = &self.clients[&request];
                    let first = index == 0;
                    self.tokens[client.tenant] += 1 + if first { client.prompt } else { 0 };
                    if first && client.measured {
                        self.ttft[client.tenant].push((self.now - client.since).as_secs_f64());
                    }
                }
                Event::Finished { request, .. } => {
                    let client = self.clients.remove(&request).unwrap();
                    self.answers[client.tenant] += 1;
                    self.ask(client.tenant);
                }
                Event::Prefilled { .. } | Event::Pooled { .. } => {}
            }
        }
    }

    /// What both get in `seconds`, after a third of that to come to rest.
    fn run(mut self, seconds: u64) -> [Got; 2] {
        for tenant in 0..2 {
            (0..self.loads[tenant].clients).for_each(|_| self.ask(tenant));
        }
        let mut plan = StepPlan::default();
        let from = Duration::from_secs(seconds / 3);
        while self.now < from {
            self.step(&mut plan);
        }
        (self.from, self.tokens, self.answers) = (self.now, [0; 2], [0; 2]);
        while self.now < from + Duration::from_secs(seconds) {
            self.step(&mut plan);
        }
        self.scheduler.audit().unwrap();
        let all = self.tokens.iter().sum::<u64>() as f64;
        std::array::from_fn(|tenant| {
            let times = &mut self.ttft[tenant];
            times.sort_by(f64::total_cmp);
            let p95_ttft = times.get(times.len() * 95 / 100).copied().unwrap_or(f64::NAN);
            Got { share: self.tokens[tenant] as f64 / all, p95_ttft, answers: self.answers[tenant] }
        })
    }
}

/// The second application's load times 100: what that does to the first.
/// Its share is to be `share`, give or take `within` of it.
fn flood(name: &str, room: Room, [first, second]: [Load; 2], (share, within): (f64, f64)) {
    let seeds = std::env::var("MIRAI_FAIR_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for seed in 0..seeds {
        let [before, _] = World::new(seed, room, [first, second]).run(SECONDS);
        let many = Load { clients: second.clients * 100, ..second };
        let [after, _] = World::new(seed, room, [first, many]).run(SECONDS);
        let moved = after.share / before.share - 1.0;
        let later = after.p95_ttft / before.p95_ttft - 1.0;
        println!(
            "{name}, seed {seed}: share {:.3} -> {:.3} ({:+.2} %), p95 TTFT {:.3} s -> {:.3} s ({:+.2} %), {} answers",
            before.share,
            after.share,
            moved * 100.0,
            before.p95_ttft,
            after.p95_ttft,
            later * 100.0,
            after.answers
        );
        assert!(moved.abs() < 0.05, "{name}, seed {seed}: the share moved by {moved}");
        assert!(later < 0.10, "{name}, seed {seed}: the first token comes later by {later}");
        let off = (after.share / share - 1.0).abs();
        assert!(off < within, "{name}, seed {seed}: {after:?}, not {share}");
    }
}

#[test]
fn a_flood_of_equals_moves_nobody() {
    flood("equal", ROOM, [APPLICATION; 2], (0.5, 0.02));
}

#[test]
fn weights_hold_under_a_flood() {
    let heavy = Load { weight: 3, clients: 120, ..APPLICATION };
    flood("weight 1 of 4", ROOM, [APPLICATION, heavy], (0.25, 0.02));
    flood("weight 3 of 4", ROOM, [heavy, APPLICATION], (0.75, 0.02));
}

#[test]
fn other_lengths_change_nothing() {
    let long = Load { prompt: 1500, output: 40, ..APPLICATION };
    flood("short against long", ROOM, [APPLICATION, long], (0.5, 0.02));
    flood("long against short", ROOM, [long, APPLICATION], (0.5, 0.02));
    let talker = Load { prompt: 30, output: 400, ..APPLICATION };
    flood("prompts against answers", ROOM, [APPLICATION, talker], (0.5, 0.02));
    flood("answers against prompts", ROOM, [talker, APPLICATION], (0.5, 0.02));
}

/// Memory for six long sequences. What is preempted and computed again is charged again, so that the share of
/// what arrives is less even than the share of what is computed.
#[test]
fn scarce_memory_is_shared_too() {
    let tight = Room { blocks: 300, ..ROOM };
    flood("tight", tight, [APPLICATION; 2], (0.5, 0.02));
    let long = Load { prompt: 600, output: 200, ..APPLICATION };
    flood("tight, short against long", tight, [APPLICATION, long], (0.5, 0.2));
    flood("tight, long against short", tight, [long, APPLICATION], (0.5, 0.2));
}
