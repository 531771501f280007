//! From one row of logits to one token.
//!
//! Owns the order of operations, which is vLLM's:
//! 1. log-probabilities, if asked for, are the log-softmax of the raw logits;
//! 2. allowed ids, then bad words (their beginnings are looked for in the output alone), then `min_tokens` (stop
//!    tokens are impossible before), then the bias;
//! 3. repetition penalty over prompt and output, then frequency and presence penalty over the output;
//! 4. a temperature below [`GREEDY_BELOW`] takes the largest logit, the lowest id among equals;
//! 5. otherwise temperature, min-p, top-k, top-p, and a draw with one number of a counter-based generator keyed by
//!    (seed, choice, position).
//!
//! One deliberate difference: where several tokens have the `k`-th largest logit, exactly `k` are kept, lower ids
//! first, so that `top_k = 1` is greedy.
//!
//! A row is a function of its own logits, parameters and history. Nothing here knows of other rows; what is wrong
//! with a row, a panic included, is that row's [`RowFault`].

mod draw;
mod edits;
mod logprobs;
mod philox;
mod scan;
mod truncate;
mod weights;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use mirai_engine::{RowFault, TokenId, TokenLogprobs};

pub(crate) use edits::History;

/// Temperatures below it are greedy, as in vLLM: dividing by them would only lose digits.
pub(crate) const GREEDY_BELOW: f32 = 1e-5;

/// Buffers of one worker, reused from row to row.
#[derive(Default)]
pub(crate) struct Scratch {
    raw: Vec<f32>,
    weights: Vec<f32>,
    sums: Vec<f64>,
    truncate: truncate::Scratch,
    logprobs: logprobs::Scratch,
}

/// What a row yields.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Drawn {
    /// The token.
    pub(crate) token: TokenId,
    /// If the request wants them.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Draws the token at `position` of a sequence; overwrites `logits`.
pub(crate) fn sample(
    history: &History,
    position: u32,
    logits: &mut [f32],
    scratch: &mut Scratch,
) -> Result<Drawn, RowFault> {
    guarded(|| sample_unguarded(history, position, logits, scratch))
}

/// Log-probabilities of a prompt token under the logits of the position before it.
pub(crate) fn score(
    logits: &[f32],
    token: TokenId,
    top: u32,
    scratch: &mut Scratch,
) -> Result<TokenLogprobs, RowFault> {
    guarded(|| {
        if !scan::all_finite(logits) {
            return Err(RowFault::NonFinite);
        }
        Ok(logprobs::logprobs(logits, scan::largest(logits), token, top, &mut scratch.logprobs))
    })
}

fn sample_unguarded(
    history: &History,
    position: u32,
    logits: &mut [f32],
    scratch: &mut Scratch,
) -> Result<Drawn, RowFault> {
    if !scan::all_finite(logits) {
        return Err(RowFault::NonFinite);
    }
    let raw_peak = scan::largest(logits);
    let edits = history.edits(position);
    let keep_raw = edits && history.params.logprobs.is_some();
    if keep_raw {
        scratch.raw.clear();
        scratch.raw.extend_from_slice(logits);
    }
    let mut peak = raw_peak;
    if edits {
        history.edit(position, logits);
        if scan::has_nan(logits) {
            return Err(RowFault::NonFinite);
        }
        peak = scan::largest(logits);
        if peak == f32::NEG_INFINITY {
            return Err(RowFault::NothingAllowed);
        }
    }
    let token = choose(history, position, logits, peak, scratch)?;
    let logprobs = history.params.logprobs.map(|top| {
        let raw = if keep_raw { &scratch.raw } else { &*logits };
        logprobs::logprobs(raw, raw_peak, token, top, &mut scratch.logprobs)
    });
    Ok(Drawn { token, logprobs })
}

/// Greedy or random choice among edited logits.
fn choose(
    history: &History,
    position: u32,
    logits: &[f32],
    peak: f32,
    scratch: &mut Scratch,
) -> Result<TokenId, RowFault> {
    let p = &*history.params;
    if p.temperature < GREEDY_BELOW || p.top_k == 1 {
        return Ok(scan::first_of(logits, peak));
    }
    weights::fill(logits, peak, 1.0 / p.temperature, &mut scratch.weights);
    truncate::truncate(p, logits, &mut scratch.weights, &mut scratch.truncate);
    let u = philox::uniform(p.seed, history.choice, position);
    draw::draw(&scratch.weights, u, &mut scratch.sums).ok_or(RowFault::NothingAllowed)
}

/// Turns a panic into a fault of the row. Buffers are overwritten before they are read, so none is left half-written.
pub(crate) fn guarded<T>(f: impl FnOnce() -> Result<T, RowFault>) -> Result<T, RowFault> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| Err(RowFault::Panic(words(&*payload))))
}

/// Text of a panic.
fn words(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a value that is not text".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
