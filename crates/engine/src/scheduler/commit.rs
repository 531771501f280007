//! Taking in what a step gave.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{FlightRow, Scheduler};
use crate::ids::{BLOCK_TOKENS, TokenId};
use crate::params::Task;
use crate::request::{Event, FinishReason};
use crate::sequence::{Sequence, Stage};
use crate::step::{RowFault, RowLogprobs, RowOutcome, RowOutput, StepOutcome, TokenLogprobs};

/// The executor broke the contract: nothing it says can be trusted any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// An outcome without a submitted step.
    #[error("the outcome of step {0} was never asked for")]
    Unexpected(u64),
    /// Another step's outcome.
    #[error("the outcome is of step {found}, submitted was {expected}")]
    WrongStep {
        /// Step at the head of the queue.
        expected: u64,
        /// Step of the outcome.
        found: u64,
    },
    /// A row is missing or extra.
    #[error("step {step} has {expected} rows, its outcome {found}")]
    WrongRows {
        /// The step.
        step: u64,
        /// Rows of the plan.
        expected: usize,
        /// Rows of the outcome.
        found: usize,
    },
}

/// What a row means for its sequence.
#[derive(Default)]
struct Verdict {
    token: Option<TokenId>,
    logprobs: Option<Box<TokenLogprobs>>,
    pooled: Option<Box<[f32]>>,
    prompt_logprobs: Vec<TokenLogprobs>,
    ends: Option<FinishReason>,
}

/// Whether the sequence ends with this token, its next.
fn end_after(seq: &Sequence, token: TokenId) -> Option<FinishReason> {
    let index = seq.output.len() as u32;
    if index >= seq.sampling.min_tokens && seq.sampling.stop_token_ids.binary_search(&token).is_ok() {
        return Some(FinishReason::StopToken(token));
    }
    (index + 1 >= seq.max_tokens).then_some(FinishReason::Length)
}

impl Scheduler {
    /// Takes in the outcome of the oldest submitted step. Log-probabilities and pooled numbers
    /// are moved out of it.
    ///
    /// # Errors
    /// The outcome does not belong to that step; the engine cannot go on.
    pub fn commit(&mut self, outcome: &mut StepOutcome) -> Result<(), CommitError> {
        let flight = self.inflight.pop_front().ok_or(CommitError::Unexpected(outcome.step))?;
        if flight.step != outcome.step {
            return Err(CommitError::WrongStep { expected: flight.step, found: outcome.step });
        }
        if flight.rows.len() != outcome.rows.len() {
            let (step, expected, found) = (flight.step, flight.rows.len(), outcome.rows.len());
            return Err(CommitError::WrongRows { step, expected, found });
        }
        for &save in &flight.saves {
            self.settle_snapshot(save);
        }
        // Before the rows: one that ends its sequence is part of what that cost.
        let work = flight.rows.iter().map(|row| (row.seq, row.len));
        self.meter.step(self.now, outcome.device_time, work);
        let mut step_tokens = 0;
        let StepOutcome { rows, tokens, .. } = outcome;
        for (&row, result) in flight.rows.iter().zip(rows) {
            step_tokens += self.commit_row(row, result, tokens);
        }
        self.tidy();
        self.counters.count_step(step_tokens, flight.rows.len());
        self.counters.device_nanos += u64::try_from(outcome.device_time.as_nanos()).unwrap_or(u64::MAX);
        self.spare.push(flight);
        Ok(())
    }

    /// Returns the tokens that the row computed.
    fn commit_row(&mut self, row: FlightRow, outcome: &mut RowOutcome, tokens: &[TokenId]) -> u32 {
        let s = row.seq;
        let seq = &mut self.seqs[s];
        seq.inflight -= 1;
        seq.drawing -= u8::from(row.output == RowOutput::Sample);
        let computed = row.len;
        seq.committed = row.end;
        if seq.stage == Stage::Draining {
            if seq.inflight == 0 {
                self.remove(s, true);
            }
            return computed;
        }
        let verdict = match outcome.fault.take() {
            Some(fault) => Err(fault),
            // What looks at the request's own parameters is kept apart and changes nothing, so that a panic in
            // it leaves the scheduler whole.
            None => catch_unwind(AssertUnwindSafe(|| self.judge(s, row, outcome, tokens)))
                .unwrap_or_else(|panic| Err(RowFault::Panic(crate::thread::panic_text(panic.as_ref())))),
        };
        match verdict {
            Ok(verdict) => self.apply(s, verdict),
            Err(fault) => self.end(s, FinishReason::Fault(fault)),
        }
        computed
    }

    fn judge(
        &self,
        s: u32,
        row: FlightRow,
        outcome: &mut RowOutcome,
        tokens: &[TokenId],
    ) -> Result<Verdict, RowFault> {
        let seq = &self.seqs[s];
        let RowLogprobs { drawn, prompt } = outcome.logprobs.take().map_or_else(Default::default, |all| *all);
        let mut verdict = Verdict { prompt_logprobs: prompt, ..Verdict::default() };
        match row.output {
            RowOutput::Nothing => {
                let over = row.end >= seq.prompt_len() && seq.task == Task::Generate && seq.max_tokens == 0;
                verdict.ends = over.then_some(FinishReason::Length);
            }
            RowOutput::Sample => {
                self.inject(seq)?;
                let token = self.drawn_token(outcome, tokens)?;
                verdict.token = Some(token);
                verdict.logprobs = drawn.into_iter().next().map(Box::new);
                verdict.ends = end_after(seq, token);
            }
            RowOutput::Pool => {
                self.inject(seq)?;
                let values = outcome.pooled.take().filter(|values| !values.is_empty());
                let nothing = || RowFault::Panic(String::from("no numbers for a row that pools"));
                let values = values.ok_or_else(nothing)?;
                if values.iter().any(|value| !value.is_finite()) {
                    return Err(RowFault::NonFinite);
                }
                verdict.pooled = Some(values);
                verdict.ends = Some(FinishReason::Pooled);
            }
        }
        Ok(verdict)
    }

    /// The one token of a row that draws one.
    fn drawn_token(&self, outcome: &RowOutcome, tokens: &[TokenId]) -> Result<TokenId, RowFault> {
        let range = outcome.tokens.start as usize..outcome.tokens.end as usize;
        let &[token] = tokens.get(range).unwrap_or_default() else {
            return Err(RowFault::Panic(format!("{} tokens for a row that draws one", outcome.tokens.len())));
        };
        let vocab = self.geometry.vocab;
        if token >= vocab {
            return Err(RowFault::Panic(format!("token {token} is outside the vocabulary of {vocab}")));
        }
        Ok(token)
    }

    #[cfg(feature = "test-hooks")]
    fn inject(&self, seq: &Sequence) -> Result<(), RowFault> {
        use crate::hooks::Injection;
        let Some(hooks) = &self.hooks else { return Ok(()) };
        let index = seq.output.len() as u32;
        match hooks.injection(seq.request_id, seq.choice, seq.sampling.seed, index) {
            None => Ok(()),
            Some(Injection::Fault(fault)) => Err(fault),
            Some(Injection::Panic) => panic!("injected"),
        }
    }

    #[cfg(not(feature = "test-hooks"))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "the hooks' signature")]
    fn inject(&self, _: &Sequence) -> Result<(), RowFault> {
        Ok(())
    }

    fn apply(&mut self, s: u32, verdict: Verdict) {
        let seq = &mut self.seqs[s];
        if !seq.prefilled && !verdict.prompt_logprobs.is_empty() {
            seq.prompt_logprobs.extend(verdict.prompt_logprobs);
        }
        if seq.committed / BLOCK_TOKENS as u32 > seq.cursor_blocks {
            self.index_blocks(s);
        }
        if !self.windows.is_empty() {
            self.pass_windows(s);
        }
        let seq = &mut self.seqs[s];
        if !seq.prefilled && seq.committed >= seq.prompt_len() {
            seq.prefilled = true;
            let request = seq.request;
            self.events.push(Event::Prefilled {
                request: seq.request_id,
                choice: seq.choice,
                cached_tokens: seq.usage.cached_tokens,
                scheduled: seq.scheduled.unwrap_or_default(),
                prompt_logprobs: std::mem::take(&mut seq.prompt_logprobs),
            });
            if self.requests[request].leader == Some(s) {
                self.release_choices(request);
            }
        }
        let seq = &mut self.seqs[s];
        if let Some(token) = verdict.token {
            self.events.push(Event::Token {
                request: seq.request_id,
                choice: seq.choice,
                index: seq.output.len() as u32,
                token,
                logprobs: verdict.logprobs,
            });
            seq.output.push(token);
            self.counters.generated_tokens += 1;
        }
        if let Some(values) = verdict.pooled {
            self.events.push(Event::Pooled { request: seq.request_id, values });
        }
        if let Some(reason) = verdict.ends {
            self.end(s, reason);
        }
    }
}
