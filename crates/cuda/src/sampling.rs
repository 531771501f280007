//! From a batch to the rows that the sampling kernels read, and from their results to an outcome.
//!
//! Owns what is wanted of each output row, and where its edits and masks lie among the others'. The arithmetic and
//! the order of steps are the kernels' (`kernels/sample.cuh`), and agree with the CPU's sampler. Never: device memory.

use mirai_engine::{RowFault, RowLogprobs, RowOutcome, TokenId, TokenLogprobs};
use mirai_model::backend::{Batch, BatchRow, Result};

use crate::error::device;
use crate::history::History;
use crate::records::{Edit, GREEDY, NO_SLOT, SCORE, SampleResult, SampleRow, WANT_LOGPROBS, read_top};
use crate::slots::Slots;

/// Temperatures below it are greedy, as on the CPU.
const GREEDY_BELOW: f32 = 1e-5;
/// Most likely tokens that a row can report: more than the server lets a request ask for.
pub(crate) const MAX_TOP: usize = 32;

/// What is done with the result of one output row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    /// Nothing: a prompt position whose log-probability nobody wants.
    Nothing,
    /// The log-probability of the prompt's next token.
    Score { top: u32 },
    /// The drawn token, and its log-probabilities if asked for.
    Draw { logprobs: Option<u32> },
}

/// Limits of one step's sampling.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SampleLimits {
    /// Logits of a row.
    pub(crate) vocab: usize,
    /// Rows of logits that exist at once.
    pub(crate) chunk: usize,
    /// Edits of a row.
    pub(crate) edits: usize,
    /// Rows of masks.
    pub(crate) masks: usize,
}

impl SampleLimits {
    /// Words of a mask.
    pub(crate) const fn mask_words(&self) -> usize {
        self.vocab.div_ceil(32)
    }
}

/// What a step draws: what the kernels read, and what the host does with the results.
#[derive(Clone, Debug, Default)]
pub(crate) struct Draws {
    /// One for each output of the batch.
    pub(crate) rows: Vec<SampleRow>,
    /// Of all rows.
    pub(crate) edits: Vec<Edit>,
    /// `[mask rows][words]`.
    pub(crate) masks: Vec<u32>,
    /// Whether edits need tokens of the step before.
    pub(crate) follows_output: bool,
    /// Whether any row reports most likely tokens.
    pub(crate) tops: bool,
    wants: Vec<Want>,
    /// Rows of the batch whose edits had no room: (row, why).
    faults: Vec<(usize, String)>,
}

impl Draws {
    /// Says what is wanted of each output, of `vocab` logits.
    ///
    /// # Errors
    /// The batch contradicts itself.
    pub(crate) fn plan(&mut self, batch: &Batch, slots: &Slots, vocab: usize) -> Result<()> {
        self.wants.clear();
        self.rows.clear();
        (self.follows_output, self.tops) = (false, false);
        for row in &batch.rows {
            let history = slots.history(row.slot)?;
            let (from, to) = row.outputs;
            let Some(tokens) = batch.outputs.get(from..to) else {
                return Err(device("sample", format!("outputs {from}..{to} of {}", batch.outputs.len())));
            };
            if from != self.wants.len() || (row.sample && from == to) {
                return Err(device("sample", format!("outputs {from}..{to} after {}", self.wants.len())));
            }
            for (index, &token) in tokens.iter().enumerate() {
                let position = position_of(row, token)?;
                let drawn = row.sample && from + index + 1 == to;
                let (want, sample_row) = one(row, history, position, drawn, vocab);
                self.follows_output |= drawn && history.follows_output();
                self.tops |= sample_row.top > 0;
                self.wants.push(want);
                self.rows.push(sample_row);
            }
        }
        Ok(())
    }

    /// Adds edits and masks of the drawing rows. After the tokens of the step before were seen, if
    /// [`Self::follows_output`].
    pub(crate) fn edit(&mut self, batch: &Batch, slots: &Slots, limits: SampleLimits) -> Result<()> {
        self.edits.clear();
        self.masks.clear();
        self.faults.clear();
        for (index, row) in batch.rows.iter().enumerate().filter(|(_, row)| row.sample) {
            let history = slots.history(row.slot)?;
            let output = row.outputs.1 - 1;
            let sample_row = &mut self.rows[output];
            let first = self.edits.len();
            history.edits(sample_row.position, &mut self.edits);
            if self.edits.len() - first > limits.edits {
                let why = format!("edits of logits: more than the {} that a row has room for", limits.edits);
                self.faults.push((index, why));
                self.edits.truncate(first);
            }
            (sample_row.edits_first, sample_row.edits_count) =
                (first as u32, (self.edits.len() - first) as u32);
            if let Some(allowed) = &history.params.allowed_token_ids {
                let row_of_mask = self.masks.len() / limits.mask_words();
                if row_of_mask == limits.masks {
                    let why = format!("masks: more than the {} that a step has room for", limits.masks);
                    self.faults.push((index, why));
                    continue;
                }
                sample_row.mask_row = row_of_mask as i32;
                push_mask(allowed, limits, &mut self.masks);
            }
        }
        let behind_masks = (self.mask_bytes() / Edit::BYTES) as u32;
        for row in self.rows.iter_mut().filter(|row| row.edits_count > 0) {
            row.edits_first += behind_masks;
        }
        self.keep_raw(limits.chunk);
        Ok(())
    }

    /// Bytes of the masks, with which edits begin.
    pub(crate) const fn mask_bytes(&self) -> usize {
        (self.masks.len() * 4).next_multiple_of(Edit::BYTES)
    }

    /// Bytes of masks and edits.
    pub(crate) const fn list_bytes(&self) -> usize {
        self.mask_bytes() + self.edits.len() * Edit::BYTES
    }

    /// Rows that need their logits both edited and not get a copy, of which each chunk of rows has its own.
    fn keep_raw(&mut self, chunk: usize) {
        for rows in self.rows.chunks_mut(chunk.max(1)) {
            let edited = rows.iter_mut().filter(|row| {
                let edits = row.edits_count > 0 || row.mask_row >= 0 || row.counts_row >= 0;
                edits && row.flags & WANT_LOGPROBS != 0
            });
            for (place, row) in edited.enumerate() {
                row.raw_row = place as i32;
            }
        }
    }

    /// The outcome of every row, tokens into `tokens`. `results` and `tops` are what the device wrote, one and
    /// [`MAX_TOP`] for each output.
    pub(crate) fn read(
        &self,
        batch_rows: &[BatchRow],
        results: &[u8],
        tops: &[u8],
        tokens: &mut Vec<TokenId>,
        outcomes: &mut Vec<RowOutcome>,
    ) {
        outcomes.clear();
        for (index, row) in batch_rows.iter().enumerate() {
            let mut out = self.row_outcome(row, results, tops, tokens);
            if let Some((_, why)) = self.faults.iter().find(|(faulty, _)| *faulty == index) {
                tokens.truncate(out.tokens.start as usize);
                let none = out.tokens.start..out.tokens.start;
                out = RowOutcome {
                    tokens: none,
                    fault: Some(RowFault::Panic(why.clone())),
                    ..RowOutcome::default()
                };
            }
            outcomes.push(out);
        }
    }

    fn row_outcome(
        &self,
        row: &BatchRow,
        results: &[u8],
        tops: &[u8],
        tokens: &mut Vec<TokenId>,
    ) -> RowOutcome {
        let first = tokens.len() as u32;
        let mut out = RowOutcome { tokens: first..first, ..RowOutcome::default() };
        let mut logprobs = RowLogprobs::default();
        let mut drawn = None;
        for output in row.outputs.0..row.outputs.1 {
            let result = SampleResult::read(results, output);
            let of = |top: u32| token_logprobs(result, tops, output, top);
            match (self.wants[output], result.fault) {
                (Want::Nothing, _) => {}
                (_, 1) => out.fault = out.fault.or(Some(RowFault::NonFinite)),
                (_, 2..) => out.fault = out.fault.or(Some(RowFault::NothingAllowed)),
                (Want::Score { top }, 0) => logprobs.prompt.push(of(top)),
                (Want::Draw { logprobs: wanted }, 0) => {
                    drawn = Some(result.token);
                    logprobs.drawn.extend(wanted.map(of));
                }
            }
        }
        if out.fault.is_some() {
            return out;
        }
        if let Some(token) = drawn {
            tokens.push(token);
            out.tokens.end += 1;
        }
        if !(logprobs.drawn.is_empty() && logprobs.prompt.is_empty()) {
            out.logprobs = Some(Box::new(logprobs));
        }
        out
    }
}

/// What is wanted of one output row, but for its edits.
fn one(row: &BatchRow, history: &History, position: u32, drawn: bool, vocab: usize) -> (Want, SampleRow) {
    let p = &*history.params;
    if !drawn {
        // A row with an id beyond the vocabulary fails by itself.
        let next = history.prompt.get(position as usize + 1).filter(|token| (**token as usize) < vocab);
        return match (p.prompt_logprobs, next) {
            (Some(top), Some(&token)) => {
                let top = top.min(MAX_TOP as u32);
                let flags = SCORE | WANT_LOGPROBS;
                (Want::Score { top }, SampleRow { flags, token, top, ..SampleRow::IDLE })
            }
            _ => (Want::Nothing, SampleRow::IDLE),
        };
    }
    let greedy = p.temperature < GREEDY_BELOW || p.top_k == 1;
    let mut flags = if greedy { GREEDY } else { 0 };
    let logprobs = p.logprobs.map(|top| top.min(MAX_TOP as u32));
    if logprobs.is_some() {
        flags |= WANT_LOGPROBS;
    }
    let sample_row = SampleRow {
        inverse_temperature: if greedy { 1.0 } else { 1.0 / p.temperature },
        top_p: p.top_p,
        min_p: p.min_p,
        top_k: p.top_k,
        seed: p.seed,
        choice: history.choice,
        position: position + 1,
        flags,
        token: 0,
        top: logprobs.unwrap_or(0),
        slot: row.slot.0,
        repetition: p.repetition_penalty,
        frequency: p.frequency_penalty,
        presence: p.presence_penalty,
        counts_row: if history.counts() { row.slot.0 as i32 } else { -1 },
        ..SampleRow::IDLE
    };
    debug_assert!(sample_row.slot != NO_SLOT);
    (Want::Draw { logprobs }, sample_row)
}

/// Position in its sequence of a token of the step that belongs to `row`.
fn position_of(row: &BatchRow, token: u32) -> Result<u32> {
    let offset = (token as usize).checked_sub(row.first).filter(|offset| *offset < row.len);
    offset.map(|offset| (row.start + offset) as u32).ok_or_else(|| {
        let end = row.first + row.len;
        device("sample", format!("output token {token} outside its row {}..{end}", row.first))
    })
}

/// Adds a row of masks that has the bits of the allowed tokens.
fn push_mask(allowed: &[TokenId], limits: SampleLimits, masks: &mut Vec<u32>) {
    let first = masks.len();
    masks.resize(first + limits.mask_words(), 0);
    for &token in allowed.iter().filter(|token| (**token as usize) < limits.vocab) {
        masks[first + token as usize / 32] |= 1 << (token % 32);
    }
}

fn token_logprobs(result: SampleResult, tops: &[u8], output: usize, top: u32) -> TokenLogprobs {
    let top = (0..top as usize).map(|place| read_top(tops, output * MAX_TOP + place)).collect();
    TokenLogprobs { token: result.token, logprob: result.logprob, rank: result.rank, top }
}

#[cfg(test)]
mod tests;
