//! The end of a step: logits, prompt log-probabilities, draws, and the outcome for the engine.
//!
//! Owns the order in which output rows become outcomes. Logits exist for [`LOGIT_ROWS`] rows at a time, so their
//! memory does not grow with a prompt whose log-probabilities are wanted. Rows of logits are worked on in parallel
//! and know nothing of each other.

use std::sync::{Mutex, PoisonError};

use mirai_engine::{RowFault, RowLogprobs, RowOutcome, StepOutcome, TokenId, TokenLogprobs};
use mirai_model::backend::{Batch, BatchRow, LogitsHead, Result};

use crate::linear::{CpuLinear, LinearScratch, device};
use crate::memory;
use crate::pool::Pool;
use crate::sampling::{self, Drawn, History, Scratch};
use crate::slots::Slots;

/// Rows of logits that exist at once.
const LOGIT_ROWS: usize = 64;

/// Buffers of this part of a step.
#[derive(Default)]
pub(crate) struct Sampler {
    logits: Vec<f32>,
    /// One for each thread of the pool.
    scratch: Vec<Mutex<Scratch>>,
}

/// What is to be done with one row of logits.
#[derive(Clone, Copy)]
enum Want<'a> {
    /// Nothing: a prompt position whose log-probability nobody wants.
    Nothing,
    /// The log-probability of the prompt's next token.
    Score { token: TokenId, top: u32 },
    /// The token at a position.
    Draw { history: &'a History, position: u32 },
}

/// What came of it.
enum Got {
    Nothing,
    Scored(TokenLogprobs),
    Drawn(Drawn),
}

struct Job<'a> {
    want: Want<'a>,
    logits: &'a mut [f32],
    got: std::result::Result<Got, RowFault>,
}

impl Sampler {
    pub(crate) fn new(threads: usize) -> Self {
        Self { logits: Vec::new(), scratch: (0..threads).map(|_| Mutex::default()).collect() }
    }

    /// Computes the logits of `hidden`, `[outputs, width]`, and fills the outcome.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn run(
        &mut self,
        pool: &Pool,
        head: &LogitsHead<'_, CpuLinear>,
        hidden: &[f32],
        batch: &Batch,
        slots: &mut Slots,
        linear: &mut LinearScratch,
        outcome: &mut StepOutcome,
    ) -> Result<()> {
        let (padded, columns) = (head.weight.rows(), head.weight.columns());
        if head.vocab > padded {
            return Err(device("sample", format!("{} logits of a head with {padded} rows", head.vocab)));
        }
        let mut results = Vec::with_capacity(batch.outputs.len());
        {
            let wants = wants(batch, slots)?;
            for (wants, hidden) in wants.chunks(LOGIT_ROWS).zip(hidden.chunks(LOGIT_ROWS * columns)) {
                let len = wants.len() * padded;
                if self.logits.len() < len {
                    memory::reserve("logits", &mut self.logits, len)?;
                    self.logits.resize(len, 0.0);
                }
                head.weight.matmul(pool, hidden, wants.len(), &mut self.logits[..len], linear)?;
                results.extend(self.finish(pool, head, wants));
            }
        }
        report(batch, results, slots, outcome)
    }

    /// Works on one chunk of rows, in parallel.
    fn finish(
        &mut self,
        pool: &Pool,
        head: &LogitsHead<'_, CpuLinear>,
        wants: &[Want<'_>],
    ) -> Vec<std::result::Result<Got, RowFault>> {
        let rows = self.logits.chunks_exact_mut(head.weight.rows());
        let jobs: Vec<_> = wants
            .iter()
            .zip(rows)
            .map(|(want, row)| {
                Mutex::new(Job { want: *want, logits: &mut row[..head.vocab], got: Ok(Got::Nothing) })
            })
            .collect();
        let scratch = &self.scratch;
        pool.chunks(jobs.len(), 1, &|worker, range| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            for job in &jobs[range] {
                let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
                let job = &mut *job;
                job.got = one(job.want, head.scale, head.soft_cap, job.logits, &mut scratch);
            }
        });
        jobs.into_iter().map(|job| job.into_inner().unwrap_or_else(PoisonError::into_inner).got).collect()
    }
}

/// Work on one row of logits.
fn one(
    want: Want<'_>,
    scale: f32,
    soft_cap: Option<f32>,
    logits: &mut [f32],
    scratch: &mut Scratch,
) -> std::result::Result<Got, RowFault> {
    if matches!(want, Want::Nothing) {
        return Ok(Got::Nothing);
    }
    if scale != 1.0 {
        for x in &mut *logits {
            *x *= scale;
        }
    }
    if let Some(cap) = soft_cap {
        for x in &mut *logits {
            *x = cap * (*x / cap).tanh();
        }
    }
    match want {
        Want::Nothing => Ok(Got::Nothing),
        Want::Score { token, top } => sampling::score(logits, token, top, scratch).map(Got::Scored),
        Want::Draw { history, position } => {
            sampling::sample(history, position, logits, scratch).map(Got::Drawn)
        }
    }
}

/// What is wanted of each output.
fn wants<'a>(batch: &Batch, slots: &'a Slots) -> Result<Vec<Want<'a>>> {
    let mut wants = Vec::with_capacity(batch.outputs.len());
    for row in &batch.rows {
        let Some(history) = &slots.get(row.slot)?.history else {
            return Err(device("sample", format!("slot {} was never opened", row.slot)));
        };
        let (from, to) = row.outputs;
        let Some(tokens) = batch.outputs.get(from..to) else {
            return Err(device("sample", format!("outputs {from}..{to} of {}", batch.outputs.len())));
        };
        if from != wants.len() || (row.sample && from == to) {
            return Err(device("sample", format!("outputs {from}..{to} after {}", wants.len())));
        }
        for (index, &token) in tokens.iter().enumerate() {
            let position = position_of(row, token)?;
            let last = from + index + 1 == to;
            wants.push(match (row.sample && last, history.params.prompt_logprobs) {
                (true, _) => Want::Draw { history, position: position + 1 },
                (false, Some(top)) => match history.prompt.get(position as usize + 1) {
                    Some(&token) => Want::Score { token, top },
                    None => Want::Nothing,
                },
                (false, None) => Want::Nothing,
            });
        }
    }
    Ok(wants)
}

/// Position in its sequence of a token of the step that belongs to `row`.
fn position_of(row: &BatchRow, token: u32) -> Result<u32> {
    let offset = (token as usize).checked_sub(row.first).filter(|offset| *offset < row.len);
    offset.map(|offset| (row.start + offset) as u32).ok_or_else(|| {
        device(
            "sample",
            format!("output token {token} outside its row {}..{}", row.first, row.first + row.len),
        )
    })
}

/// Writes the outcome, and drawn tokens into their slots.
fn report(
    batch: &Batch,
    results: Vec<std::result::Result<Got, RowFault>>,
    slots: &mut Slots,
    outcome: &mut StepOutcome,
) -> Result<()> {
    let mut results = results.into_iter();
    for (row, to) in batch.rows.iter().zip(&mut outcome.rows) {
        let count = row.outputs.1 - row.outputs.0;
        *to = row_outcome(row, results.by_ref().take(count), slots, &mut outcome.tokens)?;
    }
    Ok(())
}

fn row_outcome(
    row: &BatchRow,
    results: impl Iterator<Item = std::result::Result<Got, RowFault>>,
    slots: &mut Slots,
    tokens: &mut Vec<TokenId>,
) -> Result<RowOutcome> {
    let first = tokens.len() as u32;
    let mut out = RowOutcome { tokens: first..first, ..RowOutcome::default() };
    let mut logprobs = RowLogprobs::default();
    let mut drawn_token = None;
    for result in results {
        match result {
            Ok(Got::Nothing) => {}
            Ok(Got::Scored(scored)) => logprobs.prompt.push(scored),
            Ok(Got::Drawn(drawn)) => {
                drawn_token = Some(drawn.token);
                logprobs.drawn.extend(drawn.logprobs);
            }
            Err(fault) => out.fault = out.fault.or(Some(fault)),
        }
    }
    if out.fault.is_some() {
        return Ok(out);
    }
    if let Some(token) = drawn_token {
        tokens.push(token);
        out.tokens.end += 1;
        let slot = slots.get_mut(row.slot)?;
        slot.last_drawn = token;
        if let Some(history) = &mut slot.history {
            history.push(token);
        }
    }
    if !(logprobs.drawn.is_empty() && logprobs.prompt.is_empty()) {
        out.logprobs = Some(Box::new(logprobs));
    }
    Ok(out)
}
