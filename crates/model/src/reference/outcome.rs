//! From logits or pooled rows to the step's outcome.

use std::sync::Arc;

use mirai_engine::{RowFault, RowLogprobs, RowOutcome, StepOutcome, TokenLogprobs};

use super::{Reference, Rows64, Weight, dot, fault};
use crate::backend::{LogitsHead, Result};

/// None where a logit is not finite.
pub(super) fn log_softmax(logits: &[f64]) -> Option<Vec<f64>> {
    if logits.iter().any(|l| !l.is_finite()) {
        return None;
    }
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - largest).exp()).sum();
    Some(logits.iter().map(|l| l - largest - sum.ln()).collect())
}

/// Ids from the most likely; equal ones by id.
fn order(values: &[f64]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    ids.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
    ids
}

fn entry(values: &[f64], token: u32, top: u32) -> TokenLogprobs {
    let ids = order(values);
    let rank = ids.iter().position(|&id| id == token).map_or(0, |r| r as u32 + 1);
    let value = |id: u32| values[id as usize] as f32;
    let top = ids.iter().take(top as usize).map(|&id| (id, value(id))).collect();
    TokenLogprobs { token, logprob: value(token), rank, top }
}

impl Reference {
    pub(super) fn sample_rows(&mut self, head: &LogitsHead<'_, Weight>, hidden: &Rows64) -> Result<()> {
        let logit = |x: &[f64], w: &[f32]| {
            let dot = dot(x, w) * f64::from(head.scale);
            head.soft_cap.map_or(dot, |cap| f64::from(cap) * (dot / f64::from(cap)).tanh())
        };
        let rows = head.weight.data.chunks(head.weight.width).take(head.vocab);
        let logits: Vec<Vec<f64>> =
            hidden.rows().map(|x| rows.clone().map(|w| logit(x, w)).collect()).collect();
        let outcome = self.outcome(&logits)?;
        self.done.push_back(outcome);
        Ok(())
    }

    pub(super) fn emit_rows(&mut self, pooled: &Rows64) {
        let outcome = |row: &crate::backend::BatchRow| {
            if !row.pool {
                return RowOutcome::default();
            }
            let values = &pooled.data[row.outputs.0 * pooled.width..][..pooled.width];
            if values.iter().any(|v| !v.is_finite()) {
                return RowOutcome { fault: Some(RowFault::NonFinite), ..RowOutcome::default() };
            }
            let pooled = values.iter().map(|v| *v as f32).collect();
            RowOutcome { pooled: Some(pooled), ..RowOutcome::default() }
        };
        let rows = self.batch.rows.iter().map(outcome).collect();
        self.done.push_back(StepOutcome { step: self.step, rows, ..StepOutcome::default() });
    }

    fn outcome(&mut self, logits: &[Vec<f64>]) -> Result<StepOutcome> {
        let mut out = StepOutcome { step: self.step, ..StepOutcome::default() };
        for row in self.batch.rows.clone() {
            let from = out.tokens.len() as u32;
            let slot = &self.slots[row.slot.0 as usize];
            let params = slot.sampling.clone().ok_or_else(|| fault("sample", "the slot is closed"))?;
            if params.temperature != 0.0 {
                return Err(fault("sample", "the oracle draws greedily"));
            }
            let mut logprobs = RowLogprobs::default();
            let prompt = slot.prompt.clone().unwrap_or_else(|| Arc::from([]));
            let mut failed = None;
            let outputs = row.outputs.0..row.outputs.1;
            for (&token, logits) in self.batch.outputs[outputs.clone()].iter().zip(&logits[outputs]) {
                let token = token as usize;
                let next = self.batch.positions[token] as usize + 1;
                let values = log_softmax(logits);
                let Some(values) = values else {
                    failed = Some(RowFault::NonFinite);
                    break;
                };
                if let Some(top) = params.prompt_logprobs
                    && let Some(&id) = prompt.get(next)
                {
                    logprobs.prompt.push(entry(&values, id, top));
                }
                if row.sample && token + 1 == row.first + row.len {
                    let best = order(&values)[0];
                    if let Some(top) = params.logprobs {
                        logprobs.drawn.push(entry(&values, best, top));
                    }
                    out.tokens.push(best);
                    self.slots[row.slot.0 as usize].last = best;
                }
            }
            let wanted = params.logprobs.is_some() || params.prompt_logprobs.is_some();
            out.rows.push(RowOutcome {
                tokens: from..out.tokens.len() as u32,
                pooled: None,
                fault: failed,
                logprobs: wanted.then(|| Box::new(logprobs)),
            });
        }
        Ok(out)
    }
}
