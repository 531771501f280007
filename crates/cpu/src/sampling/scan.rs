//! Passes over a row of logits: largest value, finiteness, the first of the largest, the `k` first in order.
//!
//! Owns the order of tokens, (logit descending, id ascending), on which greedy draws, truncation and ranks agree.
//! Everything here is O(vocabulary) with a small constant; nothing sorts a vocabulary.

use std::cmp::Ordering;

/// Lanes of the loops that the compiler is to turn into vector code.
const LANES: usize = 16;
/// Tokens whose largest logit is looked at as one, when the first few of a row are searched.
const GROUP: usize = 64;

/// A token in a partial selection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    /// Its edited logit.
    pub(crate) logit: f32,
    /// Its id.
    pub(crate) id: u32,
}

impl Candidate {
    /// Most likely first; the lower id first among equals.
    pub(crate) fn order(a: &Self, b: &Self) -> Ordering {
        b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
    }
}

/// Whether no value is NaN or infinite.
pub(crate) fn all_finite(row: &[f32]) -> bool {
    // 0 * x is 0 for finite x and NaN otherwise, and NaN survives addition.
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * 0.0;
        }
    }
    lanes.iter().all(|lane| *lane == 0.0) && rest.iter().all(|x| x.is_finite())
}

/// Whether a value is NaN.
pub(crate) fn has_nan(row: &[f32]) -> bool {
    row.chunks(1024).any(|chunk| chunk.iter().fold(false, |any, x| any | x.is_nan()))
}

/// Largest value; NaN is passed over, and an empty row gives negative infinity.
pub(crate) fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Lowest id among those with the value `peak`, which occurs in the row.
pub(crate) fn first_of(row: &[f32], peak: f32) -> u32 {
    for (index, chunk) in row.chunks(GROUP).enumerate() {
        if chunk.iter().fold(false, |any, x| any | (*x == peak)) {
            let inside = chunk.iter().position(|x| *x == peak).unwrap_or(0);
            return (index * GROUP + inside) as u32;
        }
    }
    0
}

/// Place of a token in the order of its row, from 1.
pub(crate) fn rank(row: &[f32], token: u32) -> u32 {
    let logit = row[token as usize];
    let above = row.iter().fold(0u32, |n, x| n + u32::from(*x > logit));
    let ties = row[..token as usize].iter().fold(0u32, |n, x| n + u32::from(*x == logit));
    above + ties + 1
}

/// Replaces `out` by the first `k` tokens of the row in unspecified order (all, if it has fewer).
///
/// The `k`-th largest of the groups' maxima is at most the `k`-th largest logit, so that only tokens that reach it
/// need to be looked at.
pub(crate) fn first_k(row: &[f32], k: usize, groups: &mut Vec<f32>, out: &mut Vec<Candidate>) {
    out.clear();
    if k == 0 {
        return;
    }
    groups.clear();
    groups.extend(row.chunks(GROUP).map(largest));
    let bound = if k <= groups.len() {
        *groups.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    for (id, &logit) in row.iter().enumerate() {
        if logit >= bound {
            out.push(Candidate { logit, id: id as u32 });
        }
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, Candidate::order);
        out.truncate(k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Lcg;

    fn row(rng: &mut Lcg, len: usize) -> Vec<f32> {
        // Few distinct values, so that ties are common.
        (0..len).map(|_| (rng.below(40) as f32) - 20.0).collect()
    }

    #[test]
    fn scans_agree_with_plain_loops() {
        for seed in 0..200u64 {
            let mut rng = Lcg::new(seed);
            let len = 1 + rng.below(700);
            let row = row(&mut rng, len);
            let mut sorted: Vec<Candidate> =
                row.iter().enumerate().map(|(id, &logit)| Candidate { logit, id: id as u32 }).collect();
            sorted.sort_by(Candidate::order);
            let peak = largest(&row);
            assert_eq!(peak, sorted[0].logit, "seed {seed}");
            assert_eq!(first_of(&row, peak), sorted[0].id, "seed {seed}");
            for (place, c) in sorted.iter().enumerate() {
                assert_eq!(rank(&row, c.id) as usize, place + 1, "seed {seed}");
            }
            let k = rng.below(len + 5);
            let (mut groups, mut out) = (Vec::new(), Vec::new());
            first_k(&row, k, &mut groups, &mut out);
            out.sort_by(Candidate::order);
            assert_eq!(out, sorted[..k.min(len)], "seed {seed}, k {k}, len {len}");
        }
    }

    #[test]
    fn one_bad_value_anywhere_is_seen() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 15, 16, 31, 40] {
                let mut row = vec![1.0f32; 41];
                assert!(all_finite(&row) && !has_nan(&row));
                row[at] = bad;
                assert!(!all_finite(&row), "{bad} at {at}");
                assert_eq!(has_nan(&row), bad.is_nan());
            }
        }
        assert_eq!(largest(&[f32::NAN, 2.0, f32::NAN]), 2.0);
    }
}
