//! The beginning of a step: slots, states, counts, and the upload.
//!
//! Owns the order of copies: snapshots before slots change hands, tables before anything reads them, what sampling reads
//! with the rest unless it has to wait.

use mirai_engine::{SlotOpen, StepPlan};
use mirai_model::backend::{Batch, Result};

use super::sample::Pending;
use super::{CudaBackend, MAX_PENDING};
use crate::args::{CopyPagesArgs, CountsArgs};
use crate::driver::{DevicePtr, Event, ReadBack, UploadRing};
use crate::error::{device, driver};
use crate::kernels::Kernel;
use crate::records::write_records;
use crate::sampling::SampleLimits;
use crate::slots::GRANULE;
use crate::steps::{write_draws, write_granules};
use crate::upload::EDITS_A_ROW;

const NAME: &str = "begin";
/// Bytes of a granule of a table.
const GRANULE_BYTES: usize = GRANULE * 4;

/// Pinned memory of steps, and their events.
pub(super) struct Rings {
    /// What goes up before the forward pass.
    pub(super) step: UploadRing,
    /// What goes up before sampling where that has to wait.
    pub(super) late: UploadRing,
    /// Tokens to count, for penalties of new sequences.
    pub(super) counts: UploadRing,
    /// What comes down.
    pub(super) results: ReadBack,
    /// Begin and end of the steps in flight.
    pub(super) events: Vec<(Event, Event)>,
}

impl CudaBackend {
    pub(super) fn begin_step(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        self.check(plan, batch)?;
        self.open_slots(plan)?;
        let mut tenants = Vec::with_capacity(batch.rows.len());
        for row in &batch.rows {
            tenants.push(self.slots.tenancy(row.slot)?);
        }
        let mut draws = self.spare.take().unwrap_or_default();
        draws.plan(batch, &self.slots, self.device()?.sizes.vocab)?;
        let events = (plan.step % MAX_PENDING as u64) as usize;
        let rings = self.rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        rings.events[events].0.record().map_err(driver(NAME))?;
        self.step = self.builder.shape(self.device()?.upload, batch);
        let limits = self.sample_limits(batch)?;
        if !draws.follows_output {
            draws.edit(batch, &self.slots, limits)?;
        }
        self.late = draws.follows_output || !draws.masks.is_empty();
        let (step, rows) = (plan.step, batch.rows.clone());
        self.pending.push_back(Pending { step, rows, tenants, draws, answer: None, seen: false, events });
        self.upload_step(batch)?;
        for row in batch.rows.iter().filter(|row| row.sample) {
            self.slots.draws(row.slot)?;
        }
        self.batch.clone_from(batch);
        Ok(())
    }

    fn sample_limits(&self, batch: &Batch) -> Result<SampleLimits> {
        let sizes = self.device()?.sizes;
        let rows = batch.rows.len();
        let (vocab, chunk) = (sizes.vocab, sizes.logit_rows());
        Ok(SampleLimits { vocab, chunk, edits: EDITS_A_ROW, masks: rows })
    }

    /// Holds a batch against the plan and the device.
    fn check(&self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        let tokens = batch.positions.len();
        let (most, slots) = (self.limits.tokens, self.limits.rows);
        if batch.ids.len() != tokens
            || plan.rows.len() != batch.rows.len()
            || tokens > most
            || batch.rows.len() > slots
        {
            let (ids, rows, planned) = (batch.ids.len(), batch.rows.len(), plan.rows.len());
            let message = format!(
                "{ids} ids for {tokens} positions of at most {most}, {rows} rows of at most {slots} for {planned} of the plan"
            );
            return Err(device(NAME, message));
        }
        if let Some(output) = batch.outputs.iter().find(|o| **o as usize >= tokens) {
            return Err(device(NAME, format!("output of token {output} of {tokens}")));
        }
        let most = self.rope_positions;
        if let Some(position) = batch.positions.iter().find(|position| **position as usize >= most) {
            return Err(device(NAME, format!("position {position} of a rotary table of {most}")));
        }
        if self.pending.len() >= MAX_PENDING {
            return Err(device(NAME, format!("{} steps are not yet collected", self.pending.len())));
        }
        let room = self.device()?.room();
        let mut next = 0;
        for row in &batch.rows {
            if row.first != next || row.len == 0 || row.start + row.len > room {
                let (slot, first, len, start) = (row.slot, row.first, row.len, row.start);
                let message = format!(
                    "row of slot {slot}: tokens {first}..+{len} of {tokens} after {next}, from position {start} of {room}"
                );
                return Err(device(NAME, message));
            }
            next += row.len;
        }
        if next == tokens { Ok(()) } else { Err(device(NAME, format!("rows of {next} tokens of {tokens}"))) }
    }

    fn open_slots(&mut self, plan: &StepPlan) -> Result<()> {
        for save in &plan.saves {
            self.device()?.save(save.slot, save.snapshot)?;
        }
        let mut opened = Vec::new();
        self.slots.apply(plan, &mut opened)?;
        for stale in std::mem::take(&mut self.slots.stale) {
            self.device()?.clear_entries(stale)?;
        }
        for open in &opened {
            self.device()?.open(open.slot, open.restore)?;
        }
        let counting = plan.opens.iter().zip(&opened).filter(|(_, opened)| opened.counts);
        let counting: Vec<&SlotOpen> = counting.map(|(open, _)| open).collect();
        let mut rest = &counting[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(fitting(rest, self.device()?.sizes.count_tokens()));
            self.open_counts(now)?;
            rest = later;
        }
        Ok(())
    }

    /// Has the device count the tokens of some sequences, which go up together: a copy for each would have the second wait
    /// for the first, behind the step that is running.
    fn open_counts(&mut self, opens: &[&SlotOpen]) -> Result<()> {
        let d = self.device()?;
        let (longest, vocab) = (d.sizes.longest(), d.sizes.vocab);
        let (counts, mut tokens) = (d.counts, d.count_tokens);
        let most = opens.iter().map(|open| tokens_of(open)).max().unwrap_or(0);
        if most > longest || vocab == 0 {
            return Err(device(NAME, format!("{most} tokens of a sequence to count, room for {longest}")));
        }
        let rings = self.rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        let piece = rings.counts.fill().map_err(driver(NAME))?;
        let all = || opens.iter().flat_map(|open| open.prompt.iter().chain(&open.output).copied());
        write_records(piece, all());
        rings.counts.send(tokens, all().count() * 4).map_err(driver(NAME))?;
        for open in opens {
            let args = CountsArgs {
                counts: counts.add((open.slot.0 as usize * vocab * 4) as u64),
                tokens,
                prompt: open.prompt.len() as u32,
                output: open.output.len() as u32,
                vocab: vocab as u32,
            };
            self.launch(Kernel::CountsOpen, (1, 1, 1), 1024, 0, &args)?;
            tokens = tokens.add(tokens_of(open) as u64 * 4);
        }
        Ok(())
    }

    /// One copy of everything, and the tables' changes to their places. Changes that have no room go up before, in copies of
    /// their own.
    fn upload_step(&mut self, batch: &Batch) -> Result<()> {
        let mut changes = Vec::new();
        self.slots.take_changes(&mut changes);
        let room = self.step.layout().granule_room();
        while changes.len() > room {
            let rest = changes.split_off(room);
            self.send(&changes, None)?;
            changes = rest;
        }
        self.send(&changes, Some(batch))
    }

    fn send(&mut self, changes: &[(u32, [u32; GRANULE])], batch: Option<&Batch>) -> Result<()> {
        let Self { rings, builder, step, slots, pending, late, device: memory, .. } = self;
        let rings = rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        let d = memory.as_ref().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        let piece = rings.step.fill().map_err(driver(NAME))?;
        let behind = ((d.upload.address() - d.tables.address()) as usize) / GRANULE_BYTES;
        write_granules(step.layout().granules, behind, changes, piece);
        let mut bytes = step.layout().forward_bytes();
        if let Some(batch) = batch {
            builder.write(step, batch, slots, piece)?;
            if let (false, Some(pending)) = (*late, pending.back()) {
                write_draws(step.layout(), step.outputs, &pending.draws, 0, piece);
                bytes = step.layout().lists.offset + pending.draws.list_bytes();
            }
        }
        rings.step.send(d.upload, bytes).map_err(driver(NAME))?;
        let args = CopyPagesArgs {
            pool: d.tables,
            from: step.granules(0),
            to: step.granules(1),
            bytes: GRANULE_BYTES as u64,
        };
        self.launch(Kernel::CopyPages, (changes.len() as u32, 1, 1), 32, 0, &args)
    }

    /// Sends what sampling reads where it does not go up with the rest: masks, behind the forward pass so that it need not wait
    /// for them, and edits that depend on the tokens of the step before, for which the host waits here.
    pub(super) fn send_late(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.late) {
            return Ok(());
        }
        if self.pending.back().is_some_and(|pending| pending.draws.follows_output) {
            self.see_tokens()?;
        }
        let limits = self.sample_limits(&self.batch)?;
        let Self { rings, step, slots, pending, batch, .. } = self;
        let rings = rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        let pending = pending.back_mut().ok_or_else(|| device(NAME, "no step was begun"))?;
        if pending.draws.follows_output {
            pending.draws.edit(batch, slots, limits)?;
        }
        let layout = step.layout();
        let base = layout.samples.offset;
        let piece = rings.late.fill().map_err(driver(NAME))?;
        write_draws(layout, step.outputs, &pending.draws, base, piece);
        let end = layout.lists.offset + pending.draws.list_bytes();
        let to: DevicePtr = step.samples();
        rings.late.send(to, end - base).map_err(driver(NAME))
    }
}

/// Tokens of a sequence's history.
fn tokens_of(open: &SlotOpen) -> usize {
    open.prompt.len() + open.output.len()
}

/// How many of the first of some sequences have together at most `room` tokens; at least one.
fn fitting(opens: &[&SlotOpen], room: usize) -> usize {
    let mut tokens = 0;
    let fit = opens.iter().take_while(|open| {
        tokens += tokens_of(open);
        tokens <= room
    });
    fit.count().max(1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mirai_engine::{SamplingParams, SeqId, SlotId};

    use super::*;

    #[test]
    fn sequences_are_counted_together_as_far_as_there_is_room() {
        let open = |prompt: usize, output: usize| SlotOpen {
            slot: SlotId(0),
            seq: SeqId(0),
            choice: 0,
            sampling: Arc::new(SamplingParams::default()),
            prompt: vec![0; prompt].into(),
            output: vec![0; output],
            computed: 0,
            blocks: vec![],
            restore: None,
        };
        let all = [open(3, 1), open(4, 2), open(1, 0), open(9, 9)];
        let all: Vec<&SlotOpen> = all.iter().collect();
        assert_eq!([4, 9, 10, 11, 28, 29].map(|room| fitting(&all, room)), [1, 1, 2, 3, 3, 4]);
        assert_eq!(fitting(&all[3..], 17), 1, "it is refused by itself");
    }
}
