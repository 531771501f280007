//! The meter against a simulated truth: power that wanders, steps of 2 to 300 ms, and a counter that moves every
//! 100 ms, begins anew and stands still.
//!
//! Each world has its own seed, which is printed. `MIRAI_ENERGY_SEED` runs one world alone, `MIRAI_ENERGY_WORLDS`
//! sets how many are run.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs)]

#[path = "world/rng.rs"]
mod rng;

use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::time::Duration;

use mirai_engine::energy::{Bill, EnergyMethod, Meter, Pending, READ_INTERVAL};
use rng::Rng;

const MS: u64 = 1_000_000;
const DEVICES: u32 = 2;
/// Period of the counter.
const PERIOD: u64 = 100 * MS;
/// Requests of one world.
const REQUESTS: u64 = 3000;

fn unit(rng: &mut Rng) -> f64 {
    rng.below(1 << 30) as f64 / f64::from(1 << 30)
}

/// The true power, watts, as time goes by: two waves (up to 2 % a second) and noise of 3 % from step to step.
struct Truth {
    slow: f64,
    fast: f64,
    phase: f64,
}

impl Truth {
    fn new(rng: &mut Rng) -> Self {
        Self { slow: 120.0 + 180.0 * unit(rng), fast: 25.0 + 30.0 * unit(rng), phase: unit(rng) * TAU }
    }

    fn busy(&self, seconds: f64, rng: &mut Rng) -> f64 {
        let slow = (seconds / self.slow * TAU + self.phase).sin();
        let fast = (seconds / self.fast * TAU).sin();
        (420.0 + 150.0 * slow + 10.0 * fast) * (0.97 + 0.06 * unit(rng))
    }

    fn idle(&self, seconds: f64) -> f64 {
        90.0 + 8.0 * (seconds / self.slow * TAU).sin()
    }
}

/// What NVML would show.
struct Counter {
    phase: u64,
    /// True energy since the beginning, microjoules, and when: grows evenly in between.
    before: (u64, f64),
    now: (u64, f64),
    /// True energy at the last reset.
    zero: f64,
    shown: u64,
    updated: u64,
    stalled_until: u64,
    resets: u32,
    stalls: u32,
}

impl Counter {
    /// Time goes by at a power.
    fn pass(&mut self, until: u64, watts: f64, rng: &mut Rng) {
        self.before = self.now;
        self.now = (until, self.now.1 + watts * (until - self.now.0) as f64 / 1e3);
        // About one stall in 15 s and one reset in 40 s.
        let passed = until - self.before.0;
        if rng.below(15_000 * MS) < passed {
            self.stalled_until = until + rng.below(2_000 * MS);
            self.stalls += 1;
        }
        let update = until.saturating_sub((until + self.phase) % PERIOD);
        if update > self.updated && until >= self.stalled_until {
            self.updated = update;
            let part = update.saturating_sub(self.before.0) as f64 / passed.max(1) as f64;
            let energy = self.before.1 + (self.now.1 - self.before.1) * part;
            // Whole millijoules, as the library gives.
            self.shown = ((energy - self.zero).max(0.0) / 1e3) as u64 * 1000;
        }
        if rng.below(40_000 * MS) < passed {
            self.zero = self.now.1;
            self.shown = 0;
            self.resets += 1;
        }
    }
}

struct Request {
    /// Rows to come, the last first.
    work: Vec<u32>,
    /// First step that it can have a row in: the one under way when it came is planned already.
    from: u64,
    true_micros: f64,
    truth: f64,
    billed: Option<Bill>,
}

struct World {
    rng: Rng,
    truth: Truth,
    counter: Counter,
    meter: Meter,
    now: u64,
    read: u64,
    device_nanos: u64,
    steps: u64,
    requests: BTreeMap<u32, Request>,
    free: Vec<u32>,
    arrived: u64,
    done: Vec<Request>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let truth = Truth::new(&mut rng);
        let phase = rng.below(PERIOD);
        let counter = Counter {
            phase,
            before: (0, 0.0),
            now: (0, 0.0),
            zero: -1e9 * unit(&mut rng),
            shown: 0,
            updated: 0,
            stalled_until: 0,
            resets: 0,
            stalls: 0,
        };
        Self {
            rng,
            truth,
            counter,
            meter: Meter::new(DEVICES),
            now: 0,
            read: 0,
            device_nanos: 0,
            steps: 0,
            requests: BTreeMap::new(),
            free: Vec::new(),
            arrived: 0,
            done: Vec::new(),
        }
    }

    /// A prompt, in chunks, and tokens that are drawn one a step.
    fn arrive(&mut self) {
        let rng = &mut self.rng;
        let longest = if rng.one_in(8) { 6000 } else { 600 };
        let mut prompt = 1 + rng.below(longest) as u32;
        let mut work = Vec::new();
        while prompt > 0 {
            let chunk = prompt.min(1 + rng.below(2048) as u32);
            work.push(chunk);
            prompt -= chunk;
        }
        let most = if rng.one_in(4) { 400 } else { 40 };
        work.extend((0..rng.below(most)).map(|_| 1));
        work.reverse();
        let index = self.free.pop().unwrap_or(self.requests.len() as u32);
        self.meter.open(index);
        let from = self.steps + 1;
        self.requests.insert(index, Request { work, from, true_micros: 0.0, truth: 0.0, billed: None });
        self.arrived += 1;
    }

    fn read(&mut self) {
        if self.now - self.read >= READ_INTERVAL.as_nanos() as u64 {
            self.read = self.now;
            self.meter.reading(Duration::from_nanos(self.now), self.counter.shown);
        }
    }

    fn rest(&mut self, nanos: u64) {
        let until = self.now + nanos;
        while self.now < until {
            // The engine beats once a second.
            let beat = (self.now + 1_000 * MS).min(until);
            while self.now < beat {
                let next = (self.now + 50 * MS).min(beat);
                self.counter.pass(next, self.truth.idle(self.now as f64 / 1e9), &mut self.rng);
                self.now = next;
            }
            self.meter.rested(Duration::from_nanos(self.now));
            self.read();
        }
    }

    fn step(&mut self) {
        let steps = self.steps;
        self.steps += 1;
        let ready = self.requests.iter_mut().filter(|(_, request)| request.from <= steps);
        let rows: Vec<(u32, u32)> = ready.filter_map(|(&i, r)| Some((i, r.work.pop()?))).collect();
        if rows.is_empty() {
            return;
        }
        let tokens: u64 = rows.iter().map(|row| u64::from(row.1)).sum();
        let nanos = (2 * MS + tokens * 40_000 + self.rng.below(MS / 3)).min(300 * MS);
        // The host's gap, then the reading while the device works.
        let gap = self.rng.below(200_000);
        self.counter.pass(self.now + gap, self.truth.idle(self.now as f64 / 1e9), &mut self.rng);
        self.now += gap;
        self.read();
        let watts = self.truth.busy(self.now as f64 / 1e9, &mut self.rng);
        for (index, tokens_of_row) in &rows {
            let share = f64::from(*tokens_of_row) / tokens as f64;
            let request = self.requests.get_mut(index).unwrap();
            request.true_micros += share * nanos as f64 / 1e3 * f64::from(DEVICES);
            request.truth += share * nanos as f64 / 1e3 * watts;
        }
        self.counter.pass(self.now + nanos, watts, &mut self.rng);
        self.now += nanos;
        self.device_nanos += nanos * u64::from(DEVICES);
        self.meter.step(Duration::from_nanos(self.now), Duration::from_nanos(nanos), rows.iter().copied());
        self.end();
    }

    /// Those without work end; half of what ends with one row to go is billed before that row is collected.
    fn end(&mut self) {
        let planned = self.requests.values().filter(|request| request.from <= self.steps);
        let ahead: u64 = planned.filter_map(|r| r.work.last()).map(|&tokens| u64::from(tokens)).sum();
        let mut over = Vec::new();
        for (&index, request) in &mut self.requests {
            let last = request.work.len() == 1 && request.billed.is_none() && self.rng.one_in(2);
            if last && request.truth > 0.0 {
                let row = Pending { tokens: request.work[0], step_tokens: ahead };
                request.billed = Some(self.meter.bill(index, std::iter::once(row)));
            } else if request.work.is_empty() {
                let meter = &mut self.meter;
                request.billed.get_or_insert_with(|| meter.bill(index, std::iter::empty()));
                over.push(index);
            }
        }
        for index in over {
            self.meter.close(index);
            self.free.push(index);
            self.done.push(self.requests.remove(&index).unwrap());
        }
    }

    fn run(&mut self) {
        self.rest(4_000 * MS);
        while self.arrived < REQUESTS || !self.requests.is_empty() {
            let wave = (self.arrived / 300).is_multiple_of(2);
            let odds = if wave { 3 } else { 12 };
            if self.arrived < REQUESTS && self.requests.len() < 64 && self.rng.one_in(odds) {
                self.arrive();
            }
            if self.requests.is_empty() {
                let longest = if self.rng.one_in(5) { 3_000 } else { 20 };
                let nanos = self.rng.below(longest * MS);
                self.rest(nanos);
            } else {
                self.step();
            }
        }
        self.rest(2_500 * MS);
    }
}

/// What one world showed.
#[derive(Default)]
struct Seen {
    /// Bills from the counter, and those of them that are off by more than a tenth.
    counted: u64,
    beyond: u64,
    estimated: u64,
    unknown: u64,
    resets: u32,
    stalls: u32,
}

fn check(seed: u64, seen: &mut Seen) {
    let mut world = World::new(seed);
    world.run();
    let truth = world.counter.now.1;
    let books = world.meter.attributed_microjoules() + world.meter.idle_microjoules();
    let off = books as f64 / truth - 1.0;
    let mut errors: Vec<f64> = Vec::new();
    let (mut micros, mut billed, mut estimated, mut worst) = (0, 0, 0, 0.0_f64);
    for request in &world.done {
        let bill = request.billed.unwrap();
        micros += bill.device_micros;
        billed += bill.energy_microjoules;
        let error = (bill.energy_microjoules as f64 / request.truth - 1.0).abs();
        match bill.method {
            EnergyMethod::Counter => errors.push(error),
            EnergyMethod::Estimated => {
                estimated += 1;
                worst = worst.max(error);
            }
            EnergyMethod::None => {
                assert_eq!(bill.energy_microjoules, 0);
                seen.unknown += 1;
            }
        }
    }
    errors.sort_by(f64::total_cmp);
    let at = |share: f64| errors[((errors.len() - 1) as f64 * share) as usize] * 100.0;
    println!(
        "seed {seed}: {:.0} s, {} resets, {} stalls, sum off by {:+.3} %; {} from the counter: p50 {:.2} %, p99 \
         {:.2} %, most {:.2} %; {estimated} estimated, most {:.2} %",
        world.now as f64 / 1e9,
        world.counter.resets,
        world.counter.stalls,
        off * 100.0,
        errors.len(),
        at(0.5),
        at(0.99),
        at(1.0),
        worst * 100.0
    );
    seen.counted += errors.len() as u64;
    seen.beyond += errors.iter().filter(|&&error| error > 0.1).count() as u64;
    seen.estimated += estimated;
    seen.resets += world.counter.resets;
    seen.stalls += world.counter.stalls;
    assert!(off.abs() < 0.02, "seed {seed}: the sum is off by {off}");
    let attributed = world.meter.attributed_microjoules();
    assert!(attributed.abs_diff(billed) <= REQUESTS, "{attributed} attributed, {billed} billed");
    // Exact, but for what the last bill was off by and what is below a microsecond.
    let all = world.device_nanos / 1000;
    assert!(micros.abs_diff(all) < 20_000, "{micros} microseconds billed, {all} spent");
}

#[test]
fn attributed_and_idle_energy_follow_the_truth() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, worlds) = match number("MIRAI_ENERGY_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("MIRAI_ENERGY_WORLDS").unwrap_or(10)),
    };
    let mut seen = Seen::default();
    (first..first + worlds).for_each(|seed| check(seed, &mut seen));
    let Seen { counted, beyond, estimated, unknown, resets, stalls } = seen;
    println!("{counted} bills from the counter, {beyond} off by more than a tenth; {estimated} estimated");
    // In many more worlds, some coincidence of a stall with a reset and a new power deceives the meter.
    assert!(beyond <= counted / 5000 * u64::from(worlds > 10), "{beyond} of {counted} bills are off");
    assert!(estimated * 10 < counted && unknown * 100 < counted, "{estimated} estimated, {unknown} unknown");
    assert!(worlds < 10 || (resets > 20 && stalls > 60), "{resets} resets, {stalls} stalls");
}
