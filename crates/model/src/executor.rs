//! Runs the engine's plans on a backend.
//!
//! Owns the translation from a [`StepPlan`] to a [`Batch`], and the check that a plan keeps within the geometry.
//! It decides nothing: what runs, when, and in which pages, is the scheduler's.

use std::cell::RefCell;
use std::collections::VecDeque;

use mirai_engine::{DeviceFault, Executor, Geometry, RowFault, RowInput, RowOutput, StepOutcome, StepPlan};

use crate::backend::{Backend, BackendError, Batch, BatchRow, Pooling, StepShape};
use crate::forward::Model;

/// A model on a backend, behind the engine's trait.
pub struct ModelExecutor<B: Backend> {
    backend: B,
    model: Model<B>,
    geometry: Geometry,
    batch: Batch,
    /// For each slot, whether log-probabilities of its prompt are wanted.
    prompt_logprobs: Vec<bool>,
    /// Rows that failed before they reached the device, by step: (row, fault).
    faults: VecDeque<(u64, Vec<(usize, RowFault)>)>,
}

impl<B: Backend> ModelExecutor<B> {
    /// Joins a loaded model, its backend with an allocated cache, and what there is room for.
    #[must_use]
    pub fn new(backend: B, model: Model<B>, geometry: Geometry) -> Self {
        let prompt_logprobs = vec![false; geometry.slots as usize];
        Self { backend, model, geometry, batch: Batch::default(), prompt_logprobs, faults: VecDeque::new() }
    }

    /// The device, for its own settings and figures.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The device, for its own settings and figures.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Has the device record the steps that it wants to record before the first one. `progress` is told the share that
    /// is done.
    ///
    /// # Errors
    /// The device failed.
    pub fn warm_up(&mut self, progress: &mut dyn FnMut(f32)) -> Result<(), BackendError> {
        let Self { backend, model, geometry, .. } = self;
        if !geometry.generates {
            return Ok(());
        }
        let buckets = backend.buckets();
        for (done, &shape) in buckets.iter().enumerate() {
            progress(done as f32 / buckets.len() as f32);
            // Both closures need the model, one after the other.
            let model = RefCell::new(&mut *model);
            backend.record(shape, &mut |backend| model.borrow_mut().forward(backend), &mut |backend| {
                model.borrow_mut().finish(backend)
            })?;
        }
        progress(1.0);
        Ok(())
    }

    /// Flattens a plan. Rows with an id beyond the vocabulary run with id 0 and are reported as failed: one bad
    /// row must not take the step.
    fn flatten(&mut self, plan: &StepPlan) -> Result<Vec<(usize, RowFault)>, String> {
        for open in &plan.opens {
            let slot = open.slot.0 as usize;
            let wanted =
                self.prompt_logprobs.get_mut(slot).ok_or_else(|| no_slot(&self.geometry, open.slot.0))?;
            *wanted = open.sampling.prompt_logprobs.is_some();
        }
        let batch = &mut self.batch;
        batch.ids.clear();
        batch.positions.clear();
        batch.rows.clear();
        batch.outputs.clear();
        let mut faults = Vec::new();
        for (index, row) in plan.rows.iter().enumerate() {
            let (first, len, start) = (batch.ids.len(), row.len as usize, row.start as usize);
            check_row(&self.geometry, row.slot.0, first, start, len)?;
            match row.input {
                RowInput::LastDrawn if len == 1 => batch.ids.push(0),
                RowInput::LastDrawn => return Err(format!("row {index}: {len} tokens, but one was drawn")),
                RowInput::Tokens(from) => {
                    let from = from as usize;
                    let ids = plan.tokens.get(from..from.saturating_add(len));
                    let ids = ids.ok_or_else(|| {
                        format!("row {index}: tokens {from} + {len} of {}", plan.tokens.len())
                    })?;
                    if let Some(bad) = ids.iter().find(|&&id| id >= self.geometry.vocab) {
                        let vocab = self.geometry.vocab;
                        let why = format!("token id {bad} is not below the vocabulary's {vocab}");
                        faults.push((index, RowFault::Panic(why)));
                        batch.ids.extend(std::iter::repeat_n(0, len));
                    } else {
                        batch.ids.extend_from_slice(ids);
                    }
                }
            }
            batch.positions.extend(row.start..row.start + row.len);
            let (sample, pool) = (row.output == RowOutput::Sample, row.output == RowOutput::Pool);
            let outputs_from = batch.outputs.len();
            let (first_token, last_token) = (first as u32, (first + len - 1) as u32);
            match self.model.pooling() {
                None if pool => return Err(format!("row {index} pools, and this model has no pooling head")),
                Some(_) if sample => {
                    return Err(format!("row {index} draws, and this model does not generate"));
                }
                None if self.prompt_logprobs[row.slot.0 as usize] => {
                    batch.outputs.extend(first_token..=last_token);
                }
                None if sample => batch.outputs.push(last_token),
                Some(Pooling::First) if pool => batch.outputs.push(first_token),
                Some(_) if pool => batch.outputs.push(last_token),
                _ => {}
            }
            batch.rows.push(BatchRow {
                slot: row.slot,
                first,
                len,
                start,
                last_drawn: row.input == RowInput::LastDrawn,
                sample,
                pool,
                outputs: (outputs_from, batch.outputs.len()),
            });
        }
        Ok(faults)
    }

    fn run(&mut self, plan: &StepPlan) -> Result<(), String> {
        let faults = self.flatten(plan)?;
        let Self { backend, model, batch, .. } = self;
        let shape = StepShape {
            tokens: batch.ids.len(),
            outputs: batch.outputs.len(),
            decode_only: batch.rows.iter().all(|r| r.len == 1),
        };
        backend.begin(plan, batch).map_err(|e| e.to_string())?;
        if shape.tokens > 0 {
            backend.run(shape, &mut |backend| model.forward(backend)).map_err(|e| e.to_string())?;
        }
        model.finish(backend).map_err(|e| e.to_string())?;
        if !faults.is_empty() {
            self.faults.push_back((plan.step, faults));
        }
        Ok(())
    }
}

fn no_slot(geometry: &Geometry, slot: u32) -> String {
    format!("slot {slot} of {}", geometry.slots)
}

/// Holds one row against what there is room for. `first` is the number of tokens before it in the step.
fn check_row(geometry: &Geometry, slot: u32, first: usize, start: usize, len: usize) -> Result<(), String> {
    if slot >= geometry.slots {
        return Err(no_slot(geometry, slot));
    }
    if len == 0 || start + len > geometry.max_context as usize {
        return Err(format!(
            "slot {slot}: positions {start} + {len}, the context is {}",
            geometry.max_context
        ));
    }
    if first + len > geometry.max_step_tokens as usize {
        let most = geometry.max_step_tokens;
        return Err(format!("a step of {} tokens or more, at most {most}", first + len));
    }
    Ok(())
}

/// Takes the tokens of failed rows out of an outcome.
fn apply_faults(outcome: &mut StepOutcome, faults: Vec<(usize, RowFault)>) {
    let mut failed: Vec<Option<RowFault>> = vec![None; outcome.rows.len()];
    for (row, fault) in faults {
        failed[row] = Some(fault);
    }
    let drawn = std::mem::take(&mut outcome.tokens);
    for (row, fault) in outcome.rows.iter_mut().zip(failed) {
        let from = outcome.tokens.len() as u32;
        if fault.is_some() {
            row.fault = fault;
            row.logprobs = None;
            row.pooled = None;
        } else {
            outcome.tokens.extend_from_slice(&drawn[row.tokens.start as usize..row.tokens.end as usize]);
        }
        row.tokens = from..outcome.tokens.len() as u32;
    }
}

impl<B: Backend> Executor for ModelExecutor<B> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn is_asynchronous(&self) -> bool {
        self.backend.is_asynchronous()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), DeviceFault> {
        self.run(plan).map_err(|message| DeviceFault { step: plan.step, message })
    }

    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<(), DeviceFault> {
        let collected = self.backend.collect(outcome);
        collected.map_err(|e| DeviceFault { step: outcome.step, message: e.to_string() })?;
        if self.faults.front().is_some_and(|(step, _)| *step == outcome.step)
            && let Some((_, faults)) = self.faults.pop_front()
        {
            apply_faults(outcome, faults);
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "test-support"))]
#[allow(clippy::unwrap_used)]
#[path = "executor_tests.rs"]
mod tests;
