//! Log-probabilities of raw logits: a token's own, its rank, and the most likely tokens.
//!
//! Owns the log-softmax of one row; it sees logits before any edit, temperature or truncation.

use mirai_engine::{TokenId, TokenLogprobs};

use super::scan::{Candidate, first_k, rank};
use super::weights;

/// Buffers of one worker.
#[derive(Default)]
pub(crate) struct Scratch {
    weights: Vec<f32>,
    groups: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// Log-probability of `token` under the softmax of `row`, whose largest value is `peak`, and the `top` most likely
/// tokens.
///
/// # Panics
/// `token` is beyond the row.
pub(crate) fn logprobs(
    row: &[f32],
    peak: f32,
    token: TokenId,
    top: u32,
    scratch: &mut Scratch,
) -> TokenLogprobs {
    weights::fill(row, peak, 1.0, &mut scratch.weights);
    let log_sum = f64::from(peak) + weights::sum(&scratch.weights).ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    first_k(row, top as usize, &mut scratch.groups, &mut scratch.candidates);
    scratch.candidates.sort_unstable_by(Candidate::order);
    TokenLogprobs {
        token,
        logprob: logprob(row[token as usize]),
        rank: rank(row, token),
        top: scratch.candidates.iter().map(|c| (c.id, logprob(c.logit))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::scan::largest;
    use crate::test_support::Lcg;

    #[test]
    fn agrees_with_double_precision() {
        for seed in 0..100u64 {
            let mut rng = Lcg::new(seed);
            let len = 1 + rng.below(2000);
            let row: Vec<f32> = (0..len).map(|_| (rng.normal() * 8.0).round() / 2.0 + 50.0).collect();
            let token = rng.below(len) as u32;
            let top = rng.below(25) as u32;
            let got = logprobs(&row, largest(&row), token, top, &mut Scratch::default());
            let log_sum = row.iter().map(|x| (f64::from(*x) - 50.0).exp()).sum::<f64>().ln() + 50.0;
            let want = |id: u32| f64::from(row[id as usize]) - log_sum;
            assert!((f64::from(got.logprob) - want(token)).abs() < 2e-6, "seed {seed}");
            assert_eq!(got.top.len(), len.min(top as usize), "seed {seed}");
            for (place, (id, logprob)) in got.top.iter().enumerate() {
                assert_eq!(rank(&row, *id) as usize, place + 1, "seed {seed}");
                assert!((f64::from(*logprob) - want(*id)).abs() < 2e-6, "seed {seed}");
            }
            assert_eq!(got.rank, rank(&row, token));
            if let Some((_, of_token)) = got.top.iter().find(|(id, _)| *id == token) {
                assert_eq!(of_token.to_bits(), got.logprob.to_bits());
            }
        }
    }
}
