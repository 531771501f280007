//! Both ends of a step: the batch and its embedded rows, and what leaves a model that pools.
//!
//! Owns the check of a batch against the layout, and the rows of an outcome that are not drawn tokens. Never: sampling.

use mirai_engine::{RowFault, RowOutcome, StepPlan};
use mirai_model::backend::{Batch, Result, Rows};

use super::{CpuBackend, MAX_PENDING, expect_width, no_cache};
use crate::buffer::CpuBuffer;
use crate::linear::{CpuLinear, device};
use crate::rows::for_each_row;
use crate::simd::ops;

impl CpuBackend {
    /// Checks a step against the layout and takes it over.
    pub(super) fn take_batch(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        let tokens = batch.positions.len();
        if batch.ids.len() != tokens || plan.rows.len() != batch.rows.len() {
            let message = format!(
                "{} ids for {tokens} positions, {} rows for {} of the plan",
                batch.ids.len(),
                batch.rows.len(),
                plan.rows.len()
            );
            return Err(device("begin", message));
        }
        if let Some(output) = batch.outputs.iter().find(|o| **o as usize >= tokens) {
            return Err(device("begin", format!("output of token {output} of {tokens}")));
        }
        self.batch.clone_from(batch);
        let room = self.cache.as_ref().ok_or_else(no_cache)?.room();
        let mut next = 0;
        for row in &batch.rows {
            let slot = self.slots.get(row.slot)?;
            if row.first != next || row.len == 0 || row.start + row.len > room || row.first + row.len > tokens
            {
                let message = format!(
                    "row of slot {}: tokens {}..+{} of {tokens} after {next}, from position {} of {room}",
                    row.slot, row.first, row.len, row.start
                );
                return Err(device("begin", message));
            }
            next += row.len;
            if row.last_drawn {
                self.batch.ids[row.first] = slot.last_drawn;
            }
        }
        Ok(())
    }

    /// Adds an empty outcome for the plan.
    pub(super) fn expect_outcome(&mut self, plan: &StepPlan) -> Result<()> {
        if self.pending.len() >= MAX_PENDING {
            return Err(device("begin", format!("{} steps are not yet collected", self.pending.len())));
        }
        let mut outcome = self.spare.pop().unwrap_or_default();
        outcome.step = plan.step;
        outcome.tokens.clear();
        outcome.rows.clear();
        outcome.rows.resize_with(plan.rows.len(), RowOutcome::default);
        outcome.device_time = std::time::Duration::ZERO;
        self.pending.push_back(outcome);
        Ok(())
    }

    /// Rows of the table for the step's ids. An id beyond the table gives a row of NaN, so that only the sequence it
    /// belongs to fails.
    pub(super) fn embed_tokens(&mut self, table: &CpuLinear, scale: f32, out: &mut CpuBuffer) -> Result<()> {
        let ids = &self.batch.ids;
        let width = table.columns();
        let out = out.write("embed", ids.len(), width)?;
        for_each_row(&self.pool, out, width, &|index, row| {
            if table.row(ids[index] as usize, row).is_err() {
                row.fill(f32::NAN);
            }
            if scale != 1.0 {
                ops::scale(row, scale);
            }
        });
        Ok(())
    }

    /// Adds rows of the table for the step's positions; one beyond the table gives NaN, as in
    /// [`Self::embed_tokens`].
    pub(super) fn embed_positions(
        &mut self,
        table: &CpuLinear,
        offset: usize,
        x: &mut CpuBuffer,
    ) -> Result<()> {
        let (positions, width) = (&self.batch.positions, table.columns());
        expect_width("add_positions", x.width(), width)?;
        let x = x.update("add_positions", positions.len())?;
        for_each_row(&self.pool, x, width, &|index, row| {
            let mut found = vec![0.0; width];
            if table.row(positions[index] as usize + offset, &mut found).is_err() {
                found.fill(f32::NAN);
            }
            row.iter_mut().zip(&found).for_each(|(x, add)| *x += add);
        });
        Ok(())
    }

    /// The rows that go on after the last layer.
    pub(super) fn gather(&mut self, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        let width = x.width();
        let x = x.read("gather_outputs", self.live(Rows::Tokens))?;
        let out = out.write("gather_outputs", self.batch.outputs.len(), width)?;
        for (to, &token) in out.chunks_exact_mut(width).zip(&self.batch.outputs) {
            let at = token as usize * width;
            to.copy_from_slice(&x[at..at + width]);
        }
        Ok(())
    }

    /// As [`Self::gather`], but pooling rows give the mean of all their tokens, in order of position.
    pub(super) fn mean_of_rows(&mut self, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        self.gather(x, out)?;
        let width = x.width();
        let x = x.read("mean_outputs", self.live(Rows::Tokens))?;
        let out = out.write("mean_outputs", self.batch.outputs.len(), width)?;
        for row in self.batch.rows.iter().filter(|row| row.pool) {
            if row.start != 0 || row.outputs.1 != row.outputs.0 + 1 || row.outputs.1 > out.len() / width {
                let message = format!("a row from position {} with outputs {:?}", row.start, row.outputs);
                return Err(device("mean_outputs", message));
            }
            let to = &mut out[row.outputs.0 * width..row.outputs.1 * width];
            to.fill(0.0);
            for token in x[row.first * width..(row.first + row.len) * width].chunks_exact(width) {
                to.iter_mut().zip(token).for_each(|(to, x)| *to += x);
            }
            ops::scale(to, 1.0 / row.len as f32);
        }
        Ok(())
    }

    /// Hands pooled rows to the outcome.
    pub(super) fn emit_rows(&mut self, pooled: &CpuBuffer) -> Result<()> {
        let outputs = self.live(Rows::Outputs);
        let (values, width) = (pooled.read("emit", outputs)?, pooled.width());
        let outcome =
            self.pending.back_mut().ok_or_else(|| device("emit", "no step was begun".to_owned()))?;
        for (row, to) in self.batch.rows.iter().zip(&mut outcome.rows).filter(|(row, _)| row.pool) {
            let (from, end) = row.outputs;
            let Some(values) = values.get(from * width..end * width).filter(|_| end == from + 1) else {
                return Err(device("emit", format!("outputs {from}..{end} of {outputs} for one row")));
            };
            if values.iter().all(|v| v.is_finite()) {
                to.pooled = Some(values.into());
            } else {
                to.fault = Some(RowFault::NonFinite);
            }
        }
        Ok(())
    }
}
