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
mod tests {
    use std::sync::Arc;

    use mirai_engine::{BlockId, Row, RowOutcome, SamplingParams, SeqId, SlotId, SlotOpen};

    use super::*;
    use crate::cache::CacheBudget;
    use crate::loader::{LoadOptions, ModelSource, load};
    use crate::reference::Reference;

    const CONFIG: &[u8] =
        br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 64}"#;

    fn executor() -> ModelExecutor<Reference> {
        let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
        let options = LoadOptions {
            dummy: Some(1),
            cache: CacheBudget::Tokens(256),
            max_slots: 3,
            max_step_tokens: 20,
            ..LoadOptions::default()
        };
        load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap().executor
    }

    #[test]
    fn a_device_without_a_budget_of_its_own_needs_one() {
        let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
        let options = LoadOptions { dummy: Some(1), cache: CacheBudget::Device, ..LoadOptions::default() };
        let mut phases = Vec::new();
        let loaded = load(&source, &options, Reference::default(), &mut |phase, _| phases.push(phase));
        let error = loaded.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("what the device has left"), "{error}");
        assert!(phases.contains(&crate::loader::Phase::Cache), "weights come first: {phases:?}");
        let longer = LoadOptions { max_model_len: Some(65), ..options };
        let loaded = load(&source, &longer, Reference::default(), &mut |_, _| {});
        let error = loaded.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("the model's context is 64"), "{error}");
    }

    #[test]
    fn a_device_that_records_nothing_is_warm_at_once() {
        let mut told = Vec::new();
        executor().warm_up(&mut |share| told.push(share)).unwrap();
        assert_eq!(told, [1.0]);
    }

    fn open(slot: u32) -> SlotOpen {
        SlotOpen {
            slot: SlotId(slot),
            seq: SeqId(slot.into()),
            choice: 0,
            sampling: Arc::new(SamplingParams::default()),
            prompt: Arc::from([1, 2, 3]),
            output: vec![],
            computed: 0,
            blocks: vec![(0..4).map(|b| BlockId(1 + slot * 4 + b)).collect()],
            restore: None,
        }
    }

    fn row(slot: u32, start: u32, len: u32, input: RowInput) -> Row {
        let seq = SeqId(slot.into());
        Row { seq, slot: SlotId(slot), start, len, input, output: RowOutput::Sample }
    }

    #[test]
    fn a_bad_row_fails_alone() {
        let mut e = executor();
        let plan = |opens, tokens: Vec<u32>| StepPlan {
            step: 5,
            opens,
            rows: (0..3).map(|s| row(s, 0, 3, RowInput::Tokens(3 * s))).collect(),
            tokens,
            ..StepPlan::default()
        };
        let mut good = StepOutcome::default();
        e.submit(&plan((0..3).map(open).collect(), vec![1, 2, 3, 4, 5, 6, 7, 8, 9])).unwrap();
        e.collect(&mut good).unwrap();
        let mut out = StepOutcome::default();
        e.submit(&plan((0..3).map(open).collect(), vec![1, 2, 3, 4, 20, 6, 7, 8, 9])).unwrap();
        e.collect(&mut out).unwrap();
        assert_eq!(out.tokens, [good.tokens[0], good.tokens[2]]);
        let ranges: Vec<_> = out.rows.iter().map(|r| r.tokens.clone()).collect();
        assert_eq!(ranges, [0..1, 1..1, 1..2]);
        assert!(matches!(&out.rows[1].fault, Some(RowFault::Panic(why)) if why.contains("20")));
        assert!(out.rows[0].fault.is_none() && out.rows[2].fault.is_none());
    }

    #[test]
    fn plans_beyond_the_geometry_are_device_faults() {
        let table = [
            (row(3, 0, 1, RowInput::Tokens(0)), "slot 3 of 3"),
            (row(0, 64, 1, RowInput::Tokens(0)), "the context is 64"),
            (row(0, 0, 0, RowInput::Tokens(0)), "positions 0 + 0"),
            (row(0, 0, 21, RowInput::Tokens(0)), "at most 20"),
            (row(0, 0, 2, RowInput::Tokens(20)), "tokens 20 + 2 of 21"),
            (row(0, 0, 2, RowInput::LastDrawn), "one was drawn"),
        ];
        for (row, words) in table {
            let plan = StepPlan {
                step: 9,
                opens: vec![open(0)],
                rows: vec![row],
                tokens: vec![1; 21],
                ..StepPlan::default()
            };
            let fault = executor().submit(&plan).unwrap_err();
            assert_eq!(fault.step, 9);
            assert!(fault.message.contains(words), "{fault}");
        }
        let plan = StepPlan { opens: vec![open(7)], ..StepPlan::default() };
        assert!(executor().submit(&plan).unwrap_err().message.contains("slot 7 of 3"));
    }

    #[test]
    fn outputs_follow_what_slots_want() {
        let mut e = executor();
        let mut wants = open(1);
        let sampling = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::default() };
        wants.sampling = Arc::new(sampling);
        let mut quiet = row(0, 0, 3, RowInput::Tokens(0));
        quiet.output = RowOutput::Nothing;
        let plan = StepPlan {
            opens: vec![open(0), wants, open(2)],
            rows: vec![quiet, row(1, 0, 2, RowInput::Tokens(3)), row(2, 0, 2, RowInput::Tokens(5))],
            tokens: vec![1; 7],
            ..StepPlan::default()
        };
        assert!(e.flatten(&plan).unwrap().is_empty());
        assert_eq!(e.batch.outputs, [3, 4, 6]);
        let outputs: Vec<_> = e.batch.rows.iter().map(|r| r.outputs).collect();
        assert_eq!(outputs, [(0, 0), (0, 2), (2, 3)]);
        assert_eq!(e.batch.positions, [0, 1, 2, 0, 1, 0, 1]);
    }

    fn pooling_executor(pooling: Pooling) -> ModelExecutor<Reference> {
        let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
        let options = LoadOptions {
            dummy: Some(1),
            cache: CacheBudget::Tokens(256),
            task: crate::pooling::Task::Embed(pooling),
            max_slots: 3,
            max_step_tokens: 20,
            ..LoadOptions::default()
        };
        load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap().executor
    }

    #[test]
    fn pooling_rows_have_one_output() {
        let mut e = pooling_executor(Pooling::Mean);
        assert!(e.geometry.pools && !e.geometry.generates && e.geometry.whole_prompts);
        let mut pools = row(0, 0, 3, RowInput::Tokens(0));
        pools.output = RowOutput::Pool;
        let mut quiet = row(1, 0, 2, RowInput::Tokens(3));
        quiet.output = RowOutput::Nothing;
        let plan = StepPlan {
            opens: vec![open(0), open(1)],
            rows: vec![pools, quiet],
            tokens: vec![1, 2, 3, 4, 5],
            ..StepPlan::default()
        };
        e.submit(&plan).unwrap();
        assert_eq!(
            (e.batch.outputs.clone(), e.batch.rows[0].pool, e.batch.rows[1].pool),
            (vec![2], true, false)
        );
        let mut out = StepOutcome::default();
        e.collect(&mut out).unwrap();
        let pooled = out.rows[0].pooled.clone().unwrap();
        assert_eq!((pooled.len(), out.rows[1].pooled.clone()), (16, None));
        // A row that fails before it reaches the device has no numbers either.
        let plan = StepPlan { step: 1, tokens: vec![1, 2, 20, 4, 5], ..plan };
        e.submit(&plan).unwrap();
        e.collect(&mut out).unwrap();
        assert!(out.rows[0].fault.is_some() && out.rows[0].pooled.is_none());
        // The last token's row is another vector.
        let mut last = pooling_executor(Pooling::Last);
        assert!(!last.geometry.whole_prompts);
        last.submit(&StepPlan { step: 0, tokens: vec![1, 2, 3, 4, 5], ..plan }).unwrap();
        last.collect(&mut out).unwrap();
        assert_ne!(out.rows[0].pooled.clone().unwrap(), pooled);
    }

    #[test]
    fn a_row_that_the_head_cannot_answer_is_refused() {
        let mut pools = row(0, 0, 1, RowInput::Tokens(0));
        let plan =
            |row| StepPlan { opens: vec![open(0)], rows: vec![row], tokens: vec![1], ..StepPlan::default() };
        let fault = pooling_executor(Pooling::Last).submit(&plan(pools)).unwrap_err();
        assert!(fault.message.contains("does not generate"), "{fault}");
        pools.output = RowOutput::Pool;
        let fault = executor().submit(&plan(pools)).unwrap_err();
        assert!(fault.message.contains("no pooling head"), "{fault}");
    }

    #[test]
    fn an_empty_step_has_an_empty_outcome() {
        let mut e = executor();
        e.submit(&StepPlan { step: 2, ..StepPlan::default() }).unwrap();
        let mut out = StepOutcome { rows: vec![RowOutcome::default()], ..StepOutcome::default() };
        e.collect(&mut out).unwrap();
        assert_eq!((out.step, out.rows.len()), (2, 0));
        assert!(e.collect(&mut out).is_err(), "nothing was submitted");
        assert!(!e.is_asynchronous());
        assert!(format!("{:?}", e.backend()).contains("Reference"));
        assert!(e.backend_mut().collect(&mut out).is_err());
    }
}
