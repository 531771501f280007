//! Steps of chosen shape on an executor, and the time that they take.
//!
//! Owns which pages a slot has, and the positions of its sequence. Slot 0 has room for a whole prompt, the others for a
//! context. The next step is submitted before the last one is collected, as the engine does it.

use std::sync::Arc;
use std::time::Instant;

use mirai_cuda::{CudaBackend, Telemetry, TelemetryReading};
use mirai_engine::{
    BLOCK_TOKENS, BlockId, Executor, Row, RowInput, RowOutput, SamplingParams, SeqId, SlotId, SlotOpen,
    StepOutcome, StepPlan,
};
use mirai_model::ModelExecutor;
use mirai_model::floor::WorkRow;

use super::Failure;

/// What some steps took.
#[derive(Clone, Debug, Default)]
pub(super) struct Timing {
    /// From one result to the next, milliseconds.
    pub(super) wall: Vec<f64>,
    /// On the device alone, milliseconds.
    pub(super) device: Vec<f64>,
    /// Joules of all of them.
    pub(super) joules: Option<f64>,
    /// As the last of them ran.
    pub(super) reading: TelemetryReading,
}

/// Room of each slot, in tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) slots: usize,
    /// Of slot 0.
    pub(super) long: usize,
    /// Of each other.
    pub(super) short: usize,
}

impl Room {
    /// Tokens of all slots, in whole pages.
    pub(super) const fn tokens(&self) -> usize {
        self.long.next_multiple_of(BLOCK_TOKENS)
            + (self.slots - 1) * self.short.next_multiple_of(BLOCK_TOKENS)
    }

    /// First page and number of pages of a slot in each group, without the reserved page.
    const fn pages(&self, slot: usize) -> (usize, usize) {
        let (long, short) = (self.long.div_ceil(BLOCK_TOKENS), self.short.div_ceil(BLOCK_TOKENS));
        if slot == 0 { (0, long) } else { (long + (slot - 1) * short, short) }
    }
}

/// An executor with the bookkeeping of its slots.
pub(super) struct Player {
    executor: ModelExecutor<CudaBackend>,
    telemetry: Option<Telemetry>,
    room: Room,
    step: u64,
    /// Tokens that each slot's sequence has so far.
    positions: Vec<usize>,
    outcome: StepOutcome,
}

impl Player {
    pub(super) fn new(executor: ModelExecutor<CudaBackend>, room: Room) -> Result<Self, Failure> {
        let geometry = executor.geometry();
        let pages = room.tokens() / BLOCK_TOKENS * geometry.groups.len();
        if (geometry.blocks as usize) <= pages {
            return Err(format!("{pages} pages are needed, there are {}", geometry.blocks).into());
        }
        let telemetry = Telemetry::open(&executor.backend().gpu().facts().bus);
        let positions = vec![0; room.slots];
        Ok(Self { executor, telemetry, room, step: 0, positions, outcome: StepOutcome::default() })
    }

    /// Any id but the same one: a fixed stream of numbers.
    fn token(&self, slot: usize, position: usize) -> u32 {
        let mixed = (slot as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (position as u64);
        let mixed = mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed >> 32) % u64::from(self.executor.geometry().vocab)) as u32
    }

    /// Gives a slot a sequence with a prompt of some length, of which so many tokens are in its pages.
    fn open(&mut self, slot: usize, prompt: usize, computed: usize) -> SlotOpen {
        self.positions[slot] = computed;
        let (first, pages) = self.room.pages(slot);
        let total = self.room.tokens() / BLOCK_TOKENS;
        let table =
            |group: usize| (0..pages).map(|i| BlockId((1 + group * total + first + i) as u32)).collect();
        let groups = 0..self.executor.geometry().groups.len();
        SlotOpen {
            slot: SlotId(slot as u32),
            seq: SeqId(slot as u64),
            choice: 0,
            sampling: Arc::new(SamplingParams::default()),
            prompt: (0..prompt).map(|p| self.token(slot, p)).collect(),
            output: Vec::new(),
            computed: computed as u32,
            blocks: groups.map(table).collect(),
            restore: None,
        }
    }

    /// Adds a row of given tokens.
    fn add_prompt(&mut self, plan: &mut StepPlan, slot: usize, len: usize, output: RowOutput) {
        let start = self.positions[slot];
        let from = plan.tokens.len() as u32;
        plan.tokens.extend((start..start + len).map(|p| self.token(slot, p)));
        plan.rows.push(row(slot, start, len, RowInput::Tokens(from), output));
        self.positions[slot] += len;
    }

    /// Computes the contexts of these slots.
    pub(super) fn fill(&mut self, slots: std::ops::Range<usize>, tokens: usize) -> Result<(), Failure> {
        let most = self.executor.geometry().max_step_tokens as usize;
        let mut opened = vec![false; self.room.slots];
        for slot in slots {
            let mut left = tokens;
            while left > 0 {
                let mut plan = StepPlan { step: self.step, ..StepPlan::default() };
                if !std::mem::replace(&mut opened[slot], true) {
                    plan.opens.push(self.open(slot, tokens, 0));
                }
                let len = left.min(most);
                left -= len;
                self.add_prompt(&mut plan, slot, len, RowOutput::Nothing);
                self.submit(&plan)?;
                self.collect()?;
            }
        }
        Ok(())
    }

    /// The next token of these slots. The first such step of a run sets each to a context that was filled before.
    pub(super) fn decode_plan(&mut self, slots: std::ops::Range<usize>, set_to: Option<usize>) -> StepPlan {
        let mut plan = StepPlan { step: self.step, ..StepPlan::default() };
        for slot in slots {
            if let Some(context) = set_to {
                plan.opens.push(self.open(slot, context + 1, context));
                self.add_prompt(&mut plan, slot, 1, RowOutput::Sample);
            } else {
                let start = self.positions[slot];
                plan.rows.push(row(slot, start, 1, RowInput::LastDrawn, RowOutput::Sample));
                self.positions[slot] += 1;
            }
        }
        plan
    }

    /// A prompt from its start in slot 0, beside what the plan already has.
    pub(super) fn add_prefill(&mut self, plan: &mut StepPlan, tokens: usize, output: RowOutput) {
        plan.opens.push(self.open(0, tokens, 0));
        self.add_prompt(plan, 0, tokens, output);
    }

    /// An empty plan with the next number.
    pub(super) fn plan(&self) -> StepPlan {
        StepPlan { step: self.step, ..StepPlan::default() }
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), Failure> {
        self.step += 1;
        Ok(self.executor.submit(plan)?)
    }

    fn collect(&mut self) -> Result<(), Failure> {
        self.executor.collect(&mut self.outcome)?;
        match self.outcome.rows.iter().find_map(|row| row.fault.as_ref()) {
            Some(fault) => Err(format!("a row failed: {fault}").into()),
            None => Ok(()),
        }
    }

    fn read(&self) -> TelemetryReading {
        self.telemetry.as_ref().map(Telemetry::read).unwrap_or_default()
    }

    /// Plays `warm` steps and then `steps` that are timed. `plan` is given the number of the step.
    pub(super) fn time(
        &mut self,
        warm: usize,
        steps: usize,
        mut plan: impl FnMut(&mut Self, usize) -> StepPlan,
    ) -> Result<Timing, Failure> {
        let mut timing = Timing::default();
        let (mut since, mut before) = (Instant::now(), TelemetryReading::default());
        let first = plan(self, 0);
        self.submit(&first)?;
        for index in 1..=warm + steps {
            if index < warm + steps {
                let next = plan(self, index);
                self.submit(&next)?;
            } else {
                timing.reading = self.read();
            }
            self.collect()?;
            let now = Instant::now();
            if index > warm {
                timing.wall.push((now - since).as_secs_f64() * 1e3);
                timing.device.push(self.outcome.device_time.as_secs_f64() * 1e3);
            } else if index == warm {
                before = self.read();
            }
            since = if index == warm { Instant::now() } else { now };
        }
        let after = self.read();
        timing.joules = after.energy_joules.zip(before.energy_joules).map(|(a, b)| a - b);
        Ok(timing)
    }
}

fn row(slot: usize, start: usize, len: usize, input: RowInput, output: RowOutput) -> Row {
    let (seq, slot) = (SeqId(slot as u64), SlotId(slot as u32));
    Row { seq, slot, start: start as u32, len: len as u32, input, output }
}

/// What a plan computes, for its floor.
pub(super) fn work_rows(plan: &StepPlan) -> Vec<WorkRow> {
    let of = |row: &Row| WorkRow {
        start: row.start as usize,
        len: row.len as usize,
        outputs: usize::from(row.output == RowOutput::Sample),
    };
    plan.rows.iter().map(of).collect()
}
