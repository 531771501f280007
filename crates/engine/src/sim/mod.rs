//! A simulated executor (cargo feature `test-hooks`): tokens from a formula instead of a model.
//!
//! Owns a model of device memory in which every cell remembers the prefix it was computed from. A row that reads
//! a cell of another prefix, a freed block or a state that is not its own panics with what it found: that is how
//! a mistake in sharing, eviction or release shows. It never looks at the scheduler.

mod draw;
mod memory;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use draw::{Draw, DrawFn, PoolFn, default_draw, default_pool, reference};

use crate::executor::{DeviceFault, Executor};
use crate::sim::draw::logprobs_of;
use crate::sim::memory::{Memory, Slot};
use crate::step::{Geometry, RowInput, RowLogprobs, RowOutcome, RowOutput, SlotOpen, StepOutcome, StepPlan};

/// How much of what a row reads is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Every cell; the cost of a step grows with the length of its sequences.
    All,
    /// The first and the last cell that each row reads, and one between.
    Some,
}

/// A simulated device.
#[derive(Clone)]
pub struct SimConfig {
    /// What there is room for.
    pub geometry: Geometry,
    /// Whether submitting returns before the step has run.
    pub asynchronous: bool,
    /// Device time of a step; without it and `token_time` steps take no time.
    pub step_time: Duration,
    /// Device time added for each token.
    pub token_time: Duration,
    /// How much is checked.
    pub check: Check,
    /// Draws tokens; [`default_draw`] unless a test wants certain ones.
    pub draw: DrawFn,
    /// Pools prompts; [`default_pool`] with 8 numbers unless a test wants others.
    pub pool: PoolFn,
}

impl SimConfig {
    /// An instant device that checks a little.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            asynchronous: true,
            step_time: Duration::ZERO,
            token_time: Duration::ZERO,
            check: Check::Some,
            draw: Arc::new(default_draw),
            pool: Arc::new(|prompt| default_pool(prompt, 8)),
        }
    }
}

/// See the module's documentation.
pub struct SimExecutor {
    config: SimConfig,
    slots: Vec<Option<Slot>>,
    memory: Memory,
    next_step: u64,
    pending: VecDeque<(StepOutcome, Instant)>,
    spare: Vec<StepOutcome>,
    /// When the device has done everything submitted so far.
    free_at: Instant,
}

impl SimExecutor {
    /// A device with nothing on it.
    #[must_use]
    pub fn new(config: SimConfig) -> Self {
        Self {
            slots: (0..config.geometry.slots).map(|_| None).collect(),
            memory: Memory::new(&config.geometry),
            next_step: 0,
            pending: VecDeque::new(),
            spare: Vec::new(),
            free_at: Instant::now(),
            config,
        }
    }

    fn open(&mut self, open: &SlotOpen) {
        let state = self.memory.restore(&self.config.geometry, open);
        self.slots[open.slot.0 as usize] = Some(Slot::new(open, state));
    }

    /// Checks that the plan keeps the contract and writes what its rows compute.
    fn write(&mut self, plan: &StepPlan) {
        let geometry = &self.config.geometry;
        let total: u64 = plan.rows.iter().map(|row| u64::from(row.len)).sum();
        assert!(total <= u64::from(geometry.max_step_tokens), "{total} tokens in step {}", plan.step);
        let mut named = vec![false; self.slots.len()];
        let mut decoding = true;
        for row in &plan.rows {
            let at = row.slot.0 as usize;
            assert!(!std::mem::replace(&mut named[at], true), "slot {at} occurs twice in step {}", plan.step);
            let slot = self.slots[at].as_mut().expect("a row names an open slot");
            assert_eq!(slot.seq, row.seq, "slot {at} belongs to another sequence");
            assert_eq!(slot.computed, row.start, "{} goes on at the wrong position", row.seq);
            let end = (row.start + row.len) as usize;
            match row.input {
                RowInput::Tokens(offset) => {
                    decoding = false;
                    let ids = &plan.tokens[offset as usize..(offset + row.len) as usize];
                    assert_eq!(ids, &slot.tokens[row.start as usize..end], "ids of {}", row.seq);
                }
                RowInput::LastDrawn => {
                    assert!(decoding, "decoding rows come first");
                    assert!(
                        slot.drew && row.len == 1 && end == slot.tokens.len(),
                        "{} drew nothing",
                        row.seq
                    );
                }
            }
            if geometry.whole_prompts {
                assert_eq!((row.start, end), (0, slot.prompt_len), "{} is not computed whole", row.seq);
            }
            self.memory.write(geometry, slot, row.start, row.start + row.len);
        }
    }

    /// Reads what the rows attend to, draws their tokens and pools.
    fn read(&mut self, plan: &StepPlan, outcome: &mut StepOutcome) {
        for row in &plan.rows {
            let slot = self.slots[row.slot.0 as usize].as_mut().expect("checked when written");
            let all = self.config.check == Check::All;
            self.memory.read(&self.config.geometry, slot, row.start, all);
            let end = row.start + row.len;
            slot.computed = end;
            let mut logprobs = RowLogprobs::default();
            if let Some(count) = slot.sampling.prompt_logprobs {
                let last = (end as usize).min(slot.prompt_len - 1);
                for position in row.start as usize + 1..=last {
                    logprobs.prompt.push(logprobs_of(slot.tokens[position], count));
                }
            }
            let from = outcome.tokens.len() as u32;
            if row.output != RowOutput::Nothing {
                let all = slot.tokens.len();
                assert_eq!(end as usize, all, "{} answers before all its tokens are computed", row.seq);
            }
            let mut pooled = None;
            if row.output == RowOutput::Pool {
                assert!(self.config.geometry.pools && all_prompt(slot), "{} cannot pool", row.seq);
                pooled = Some((self.config.pool)(&slot.tokens));
            }
            if row.output == RowOutput::Sample {
                assert!(self.config.geometry.generates, "{} cannot draw", row.seq);
                let draw = Draw {
                    prompt: &slot.tokens[..slot.prompt_len],
                    output: &slot.tokens[slot.prompt_len..],
                    context: slot.context.value(),
                    choice: slot.choice,
                    position: end,
                    sampling: &slot.sampling,
                    vocab: self.config.geometry.vocab,
                };
                let token = (self.config.draw)(&draw);
                slot.tokens.push(token);
                slot.context.add(token);
                slot.drew = true;
                outcome.tokens.push(token);
                if let Some(count) = slot.sampling.logprobs {
                    logprobs.drawn.push(logprobs_of(token, count));
                }
            }
            let wanted = !logprobs.drawn.is_empty() || !logprobs.prompt.is_empty();
            outcome.rows.push(RowOutcome {
                tokens: Range { start: from, end: outcome.tokens.len() as u32 },
                pooled,
                fault: None,
                logprobs: wanted.then(|| Box::new(logprobs)),
            });
        }
    }
}

fn all_prompt(slot: &Slot) -> bool {
    slot.tokens.len() == slot.prompt_len
}

impl Executor for SimExecutor {
    fn geometry(&self) -> &Geometry {
        &self.config.geometry
    }

    fn is_asynchronous(&self) -> bool {
        self.config.asynchronous
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), DeviceFault> {
        assert!(self.pending.len() < 2, "three steps in flight");
        assert_eq!(plan.step, self.next_step, "steps are numbered without gaps");
        self.next_step += 1;
        for save in &plan.saves {
            let slot = self.slots[save.slot.0 as usize].as_ref().expect("a save names an open slot");
            self.memory.save(save.snapshot, slot);
        }
        plan.opens.iter().for_each(|open| self.open(open));
        for append in &plan.appends {
            let slot = self.slots[append.slot.0 as usize].as_mut().expect("an append names an open slot");
            slot.append(append);
        }
        let mut outcome = self.spare.pop().unwrap_or_default();
        outcome.tokens.clear();
        outcome.rows.clear();
        outcome.step = plan.step;
        self.write(plan);
        self.read(plan, &mut outcome);
        let tokens: u32 = plan.rows.iter().map(|row| row.len).sum();
        outcome.device_time = self.config.step_time + self.config.token_time * tokens;
        let now = Instant::now();
        self.free_at = self.free_at.max(now) + outcome.device_time;
        if !self.config.asynchronous {
            std::thread::sleep(self.free_at - now);
        }
        self.pending.push_back((outcome, self.free_at));
        Ok(())
    }

    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<(), DeviceFault> {
        let missing = || DeviceFault { step: self.next_step, message: String::from("nothing was submitted") };
        let (done, at) = self.pending.pop_front().ok_or_else(missing)?;
        let wait = at.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
        self.spare.push(std::mem::replace(outcome, done));
        Ok(())
    }
}
