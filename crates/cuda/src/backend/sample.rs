//! The end of a step: logits, draws, the read-back, and the outcome for the engine.
//!
//! Owns the order of the sampling launches and what is read back. Logits exist for some rows at a time, so that their memory
//! does not grow with a prompt whose log-probabilities are wanted.

use std::time::Duration;

use mirai_engine::{RowFault, RowOutcome, StepOutcome};
use mirai_model::backend::{BatchRow, LogitsHead, Result, Rows};

use super::linear::Product;
use super::{CudaBackend, expect_width};
use crate::args::{DrawArgs, EmitArgs, SampleArgs};
use crate::buffer::{CudaBuffer, CudaLinear};
use crate::device::CHUNK_IDS;
use crate::driver::Ticket;
use crate::error::{device, driver};
use crate::kernels::Kernel;
use crate::records::{SampleResult, TOP_BYTES, word};
use crate::sampling::{Draws, MAX_TOP};
use crate::slots::Tenancy;

/// Bytes of `SampleRow`.
const SAMPLE_ROW: usize = 80;

/// What a read-back holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Results of so many outputs, then their most likely tokens.
    Tokens(usize),
    /// Rows of `width` singles of so many outputs, then whether each is all numbers.
    Pooled(usize, usize),
}

/// A step that was submitted and not collected.
pub(super) struct Pending {
    pub(super) step: u64,
    pub(super) rows: Vec<BatchRow>,
    pub(super) tenants: Vec<Tenancy>,
    pub(super) draws: Draws,
    /// None until its last part was issued.
    pub(super) answer: Option<(Answer, Ticket)>,
    /// Whether histories have its tokens.
    pub(super) seen: bool,
    /// Its pair of events.
    pub(super) events: usize,
}

impl CudaBackend {
    /// Logits and draws of all outputs, in chunks.
    pub(super) fn launch_sampling(
        &mut self,
        head: &LogitsHead<'_, CudaLinear>,
        hidden: &CudaBuffer,
    ) -> Result<()> {
        let sizes = self.device()?.sizes;
        expect_width("sample", hidden.width(), head.weight.shape.columns)?;
        if head.vocab > head.weight.shape.rows || head.vocab != sizes.vocab {
            let (vocab, rows) = (head.vocab, head.weight.shape.rows);
            let message = format!("{vocab} logits of a head with {rows} rows, room for {}", sizes.vocab);
            return Err(device("sample", message));
        }
        // Rows of the weight beyond the vocabulary are padding.
        let mut w = *head.weight;
        w.shape.rows = head.vocab;
        let outputs = self.rows(Rows::Outputs);
        let pieces = head.vocab.div_ceil(CHUNK_IDS);
        let mut first = 0;
        while first < outputs {
            let rows = (outputs - first).min(sizes.logit_rows());
            let logits = self.device()?.logits;
            self.product(&Product {
                w,
                bias: None,
                x: (hidden.at.add((first * hidden.stride() * 2) as u64), hidden.stride()),
                y: (logits, sizes.logit_stride()),
                rows,
                single: true,
                gate: None,
            })?;
            let sample = self.sample_args(head, first, outputs)?;
            let grid = (pieces as u32, rows as u32, 1);
            self.launch(Kernel::SamplePrepare, grid, 256, 0, &sample)?;
            let args = DrawArgs { sample, chunks: pieces as u32 };
            self.launch(Kernel::SampleDraw, (rows as u32, 1, 1), 1024, 0, &args)?;
            first += rows;
        }
        Ok(())
    }

    fn sample_args(
        &self,
        head: &LogitsHead<'_, CudaLinear>,
        first: usize,
        outputs: usize,
    ) -> Result<SampleArgs> {
        let d = self.device()?;
        let tops = d.results.add((outputs * SampleResult::BYTES) as u64);
        Ok(SampleArgs {
            logits: d.logits,
            raw: d.raw,
            rows: self.step.samples().add((first * SAMPLE_ROW) as u64),
            edits: self.step.lists(),
            masks: self.step.lists(),
            counts: d.counts,
            chunks: d.chunks,
            results: d.results.add((first * SampleResult::BYTES) as u64),
            tops: tops.add((first * MAX_TOP * TOP_BYTES) as u64),
            last_drawn: d.last_drawn,
            vocab: head.vocab as u32,
            stride: d.sizes.logit_stride() as u32,
            max_top: MAX_TOP as u32,
            scale: head.scale,
            cap: head.soft_cap.unwrap_or(0.0),
        })
    }

    /// Starts the read-back of the step's results and closes the step.
    pub(super) fn answer_tokens(&mut self) -> Result<()> {
        let outputs = self.step.outputs;
        let tops = self.pending.back().is_some_and(|p| p.draws.tops);
        let mut bytes = outputs * SampleResult::BYTES;
        if tops {
            bytes += outputs * MAX_TOP * TOP_BYTES;
        }
        self.answer(Answer::Tokens(outputs), bytes)
    }

    fn answer(&mut self, answer: Answer, bytes: usize) -> Result<()> {
        const NAME: &str = "read-back";
        let results = self.device()?.results;
        let rings = self.rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        // At least something, so that there is an end to wait for.
        let ticket = rings.results.start(results, bytes.max(16)).map_err(driver(NAME))?;
        let pending = self.pending.back_mut().ok_or_else(|| device(NAME, "no step was begun"))?;
        rings.events[pending.events].1.record().map_err(driver(NAME))?;
        pending.answer = Some((answer, ticket));
        Ok(())
    }

    pub(super) fn emit_rows(&mut self, pooled: &CudaBuffer) -> Result<()> {
        let (outputs, width) = (self.rows(Rows::Outputs), pooled.width());
        let d = self.device()?;
        let values = outputs * width * 4;
        if values + outputs * 4 > d.sizes.results {
            let room = d.sizes.results;
            return Err(device("emit", format!("{outputs} outputs of {width}: {room} bytes are there")));
        }
        let args = EmitArgs {
            x: pooled.at,
            out: d.results,
            finite: d.results.add(values as u64),
            width: width as i32,
        };
        self.launch_rows(Kernel::EmitRows, outputs, &args)?;
        self.answer(Answer::Pooled(outputs, width), values + outputs * 4)
    }

    /// Waits for the tokens of the oldest steps whose histories lack them, all but the step in progress.
    pub(super) fn see_tokens(&mut self) -> Result<()> {
        let count = self.pending.len().saturating_sub(1);
        (0..count).try_for_each(|index| self.see(index))
    }

    fn see(&mut self, index: usize) -> Result<()> {
        let Self { pending, rings, slots, .. } = self;
        let (Some(pending), Some(rings)) = (pending.get_mut(index), rings.as_mut()) else { return Ok(()) };
        let Some((Answer::Tokens(_), ticket)) = pending.answer else { return Ok(()) };
        if std::mem::replace(&mut pending.seen, true) {
            return Ok(());
        }
        let results = rings.results.wait(ticket).map_err(driver("collect"))?;
        for (row, tenant) in pending.rows.iter().zip(&pending.tenants).filter(|(row, _)| row.sample) {
            let result = SampleResult::read(results, row.outputs.1 - 1);
            if result.fault == 0 {
                slots.drawn(*tenant, result.token);
            }
        }
        Ok(())
    }

    /// Waits for the oldest step and writes its outcome.
    pub(super) fn collect_step(&mut self, outcome: &mut StepOutcome) -> Result<()> {
        const NAME: &str = "collect";
        self.see(0)?;
        let pending = self.pending.pop_front().ok_or_else(|| device(NAME, "no step was submitted"))?;
        let rings = self.rings.as_mut().ok_or_else(|| device(NAME, "no cache was allocated"))?;
        let (answer, ticket) = pending.answer.ok_or_else(|| device(NAME, "the step was not finished"))?;
        outcome.step = pending.step;
        outcome.tokens.clear();
        let bytes = rings.results.wait(ticket).map_err(driver(NAME))?;
        match answer {
            Answer::Tokens(outputs) => {
                let (results, tops) = bytes.split_at(outputs * SampleResult::BYTES);
                pending.draws.read(&pending.rows, results, tops, &mut outcome.tokens, &mut outcome.rows);
            }
            Answer::Pooled(outputs, width) => pooled(&pending.rows, bytes, (outputs, width), outcome)?,
        }
        let (begun, ended) = &rings.events[pending.events];
        ended.wait().map_err(driver(NAME))?;
        let milliseconds = ended.since(begun).map_err(driver(NAME))?;
        outcome.device_time = Duration::from_secs_f32((milliseconds / 1e3).max(0.0));
        self.spare = Some(pending.draws);
        Ok(())
    }
}

/// Rows of what the pooling head gave.
fn pooled(
    rows: &[BatchRow],
    bytes: &[u8],
    (outputs, width): (usize, usize),
    outcome: &mut StepOutcome,
) -> Result<()> {
    outcome.rows.clear();
    for row in rows {
        let mut out = RowOutcome::default();
        if row.pool {
            let (from, end) = row.outputs;
            if end != from + 1 || end > outputs {
                return Err(device("emit", format!("outputs {from}..{end} of {outputs} for one row")));
            }
            if word(bytes, outputs * width + from) == 1 {
                let values = (from * width..end * width).map(|at| f32::from_bits(word(bytes, at)));
                out.pooled = Some(values.collect());
            } else {
                out.fault = Some(RowFault::NonFinite);
            }
        }
        outcome.rows.push(out);
    }
    Ok(())
}
