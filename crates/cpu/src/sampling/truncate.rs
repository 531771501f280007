//! Which tokens may be drawn: min-p, then top-k, then top-p, over weights at the request's temperature.
//!
//! Owns the cut through a row. Tokens are ordered by (logit descending, id ascending), so exactly `k` tokens are
//! kept where several have the `k`-th logit, and `top_k = 1` is the greedy token. Selection is partial: expected
//! O(vocabulary), whatever the parameters.

use mirai_engine::SamplingParams;

use super::scan::{Candidate, first_k};

/// Ranges of this size are sorted rather than halved.
const SMALL: usize = 64;
/// Buckets of weights from 0 to 1.
const BUCKETS: usize = (0x3f80_0000 >> 18) + 1;

/// Buffers of one worker, reused from row to row.
#[derive(Default)]
pub(crate) struct Scratch {
    groups: Vec<f32>,
    candidates: Vec<Candidate>,
    buckets: Vec<f64>,
}

/// Zeroes the weights of the tokens that may not be drawn. `weights` are those of `logits`, the largest being 1.
pub(crate) fn truncate(p: &SamplingParams, logits: &[f32], weights: &mut [f32], scratch: &mut Scratch) {
    if p.min_p > 0.0 {
        for w in weights.iter_mut() {
            *w = if *w < p.min_p { 0.0 } else { *w };
        }
    }
    let top_k = (p.top_k > 0 && (p.top_k as usize) < logits.len()).then_some(p.top_k as usize);
    let top_p = (p.top_p < 1.0).then_some(f64::from(p.top_p));
    // Tokens in which the cut lies, and the weight that top-p still needs of them.
    let needed = match (top_k, top_p) {
        (None, None) => return,
        (None, Some(p)) => Some(border(logits, weights, p, scratch)),
        (Some(k), top_p) => {
            first_k(logits, k, &mut scratch.groups, &mut scratch.candidates);
            // What min-p or a mask took away does not come back.
            scratch.candidates.retain(|c| weights[c.id as usize] > 0.0);
            top_p.map(|p| p * mass(&scratch.candidates, weights))
        }
    };
    let mut kept = scratch.candidates.as_mut_slice();
    if let Some(needed) = needed {
        let len = nucleus(kept, weights, needed);
        kept = &mut kept[..len];
    }
    if let Some(last) = kept.iter().copied().max_by(Candidate::order) {
        cut_after(&last, logits, weights);
    }
}

/// Zeroes the weights of all tokens after `last`.
fn cut_after(last: &Candidate, logits: &[f32], weights: &mut [f32]) {
    let (upto, beyond) = weights.split_at_mut(last.id as usize + 1);
    for (w, x) in upto.iter_mut().zip(logits) {
        *w = if *x >= last.logit { *w } else { 0.0 };
    }
    for (w, x) in beyond.iter_mut().zip(&logits[last.id as usize + 1..]) {
        *w = if *x > last.logit { *w } else { 0.0 };
    }
}

/// A weight's place among [`BUCKETS`]: heavier tokens are in higher buckets, 32 to a power of two.
fn bucket(w: f32) -> usize {
    ((w.to_bits() >> 18) as usize).min(BUCKETS - 1)
}

/// Finds the bucket in which the running weight, heaviest bucket first, reaches `p` of the total, and collects its
/// tokens. Returns what is missing when that bucket begins.
fn border(logits: &[f32], weights: &[f32], p: f64, scratch: &mut Scratch) -> f64 {
    let Scratch { buckets, candidates, .. } = scratch;
    buckets.clear();
    buckets.resize(BUCKETS, 0.0);
    for &w in weights {
        buckets[bucket(w)] += f64::from(w);
    }
    let target = p * buckets.iter().sum::<f64>();
    let (mut before, mut at) = (0.0, 0);
    for (index, mass) in buckets.iter().enumerate().rev() {
        if *mass > 0.0 {
            at = index;
            if before + mass >= target {
                break;
            }
            before += mass;
        }
    }
    candidates.clear();
    for (id, (&w, &logit)) in weights.iter().zip(logits).enumerate() {
        if w > 0.0 && bucket(w) == at {
            candidates.push(Candidate { logit, id: id as u32 });
        }
    }
    target - before
}

/// Weight of some tokens.
fn mass(tokens: &[Candidate], weights: &[f32]) -> f64 {
    tokens.iter().map(|c| f64::from(weights[c.id as usize])).sum()
}

/// Moves the shortest prefix (in the order of tokens) that weighs at least `target` to the front; returns its
/// length. All tokens, if they weigh less; at least one.
fn nucleus(tokens: &mut [Candidate], weights: &[f32], target: f64) -> usize {
    let (mut from, mut to) = (0, tokens.len());
    let mut before = 0.0;
    while to - from > SMALL {
        let half = (to - from) / 2;
        tokens[from..to].select_nth_unstable_by(half, Candidate::order);
        let upper = mass(&tokens[from..=from + half], weights);
        if before + upper >= target {
            to = from + half + 1;
        } else {
            before += upper;
            from += half + 1;
        }
    }
    tokens[from..to].sort_unstable_by(Candidate::order);
    for (index, c) in tokens[from..to].iter().enumerate() {
        before += f64::from(weights[c.id as usize]);
        if before >= target {
            return from + index + 1;
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::scan::largest;
    use crate::sampling::weights;
    use crate::test_support::Lcg;

    /// Sort-based and in double precision: which ids are kept, and how close the nearest decision was.
    fn oracle(p: &SamplingParams, logits: &[f32]) -> (Vec<usize>, f64) {
        let peak = f64::from(largest(logits));
        let weight = |id: usize| ((f64::from(logits[id]) - peak) / f64::from(p.temperature)).exp();
        // Beyond that, weights are zero; see `weights`.
        let mut ids: Vec<usize> = (0..logits.len()).filter(|&id| weight(id) > (-87f64).exp()).collect();
        let near = |w: f64| (w.ln() + 87.0).abs();
        ids.sort_by(|&a, &b| {
            logits[b].partial_cmp(&logits[a]).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
        });
        let mut margin = (0..logits.len()).map(|id| near(weight(id))).fold(f64::INFINITY, f64::min);
        if p.min_p > 0.0 {
            for &id in &ids {
                margin = margin.min((weight(id) / f64::from(p.min_p) - 1.0).abs());
            }
            ids.retain(|&id| weight(id) >= f64::from(p.min_p));
        }
        if p.top_k > 0 {
            ids.truncate(p.top_k as usize);
        }
        if p.top_p < 1.0 {
            let total: f64 = ids.iter().map(|&id| weight(id)).sum();
            let mut before = 0.0;
            let mut kept = 0;
            for &id in &ids {
                margin = margin.min((before / total / f64::from(p.top_p) - 1.0).abs());
                if before >= f64::from(p.top_p) * total {
                    break;
                }
                before += weight(id);
                kept += 1;
            }
            ids.truncate(kept);
        }
        ids.sort_unstable();
        (ids, margin)
    }

    fn kept(p: &SamplingParams, logits: &[f32]) -> Vec<usize> {
        let mut w = Vec::new();
        weights::fill(logits, largest(logits), 1.0 / p.temperature, &mut w);
        truncate(p, logits, &mut w, &mut Scratch::default());
        (0..w.len()).filter(|&id| w[id] > 0.0).collect()
    }

    #[test]
    fn agrees_with_a_sort() {
        let mut compared = 0;
        for seed in 0..3000u64 {
            let mut rng = Lcg::new(seed);
            let len = 1 + rng.below(3000);
            let spread = [0.01, 1.0, 4.0][rng.below(3)];
            let coarse = rng.below(2) == 0;
            let logits: Vec<f32> = (0..len)
                .map(|_| {
                    let x = rng.normal() * spread;
                    if rng.below(20) == 0 {
                        f32::NEG_INFINITY
                    } else if coarse {
                        (x * 4.0).round() / 4.0
                    } else {
                        x
                    }
                })
                .collect();
            if largest(&logits) == f32::NEG_INFINITY {
                continue;
            }
            let pick = |rng: &mut Lcg, values: &[f32]| values[rng.below(values.len())];
            let p = SamplingParams {
                temperature: pick(&mut rng, &[0.3, 1.0, 2.0]),
                top_p: pick(&mut rng, &[1.0, 0.01, 0.3, 0.9, 0.999]),
                top_k: [0, 1, 5, 50, 700, 5000][rng.below(6)],
                min_p: pick(&mut rng, &[0.0, 0.0, 0.05, 0.6]),
                ..Default::default()
            };
            let (want, margin) = oracle(&p, &logits);
            if margin < 1e-5 {
                continue;
            }
            compared += 1;
            assert_eq!(kept(&p, &logits), want, "seed {seed}: {p:?}");
        }
        assert!(compared > 2000, "only {compared} cases had clear decisions");
    }

    #[test]
    fn one_token_always_stays() {
        let p = SamplingParams { temperature: 1.0, top_p: 1e-9, min_p: 1.0, top_k: 1, ..Default::default() };
        assert_eq!(kept(&p, &[1.0, 3.0, 3.0, 2.0]), [1]);
        let p = SamplingParams { temperature: 1.0, top_p: 1e-9, ..Default::default() };
        assert_eq!(kept(&p, &[3.0; 500]), [0]);
    }

    #[test]
    fn ties_at_the_cut_go_by_id() {
        let p = SamplingParams { temperature: 1.0, top_k: 3, ..Default::default() };
        assert_eq!(kept(&p, &[1.0, 2.0, 1.0, 2.0, 1.0]), [0, 1, 3]);
    }
}
