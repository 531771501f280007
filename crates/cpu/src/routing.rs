//! The choice of experts for one token.
//!
//! Owns scores, ties and weights. Never: what an expert computes.

use mirai_model::backend::{RouteGroups, RouteSpec, Scoring};

use crate::buffer::Choice;

/// Keeps a sum of weights that are all 0 from dividing by 0.
const SUM_EPS: f32 = 1e-20;

/// Fills `out` with the `top_k` experts of a row of logits, in order of descending score, the lowest expert first among
/// equals. A logit that is NaN is chosen, so that it is seen in the row and not hidden.
pub(crate) fn choose(
    spec: &RouteSpec,
    correction: Option<&[f32]>,
    expert_scale: Option<&[f32]>,
    logits: &[f32],
    out: &mut [Choice],
) {
    let scores: Vec<f32> = match spec.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::SoftmaxOfChosen => logits.to_vec(),
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    let mut ranks: Vec<f32> = match correction {
        Some(correction) => scores.iter().zip(correction).map(|(s, c)| s + c).collect(),
        None => scores.clone(),
    };
    if let Some(groups) = spec.groups {
        keep_groups(groups, &mut ranks);
    }
    let mut taken = vec![false; ranks.len()];
    for choice in &mut *out {
        let best = (0..ranks.len()).filter(|&e| !taken[e]).reduce(|a, b| {
            let first = ranks[a].is_nan() || ranks[a] >= ranks[b];
            if first { a } else { b }
        });
        let best = best.unwrap_or(0);
        taken[best] = true;
        *choice = Choice { expert: best as u32, weight: scores[best] };
    }
    if spec.scoring == Scoring::SoftmaxOfChosen {
        let chosen: Vec<f32> = out.iter().map(|c| c.weight).collect();
        out.iter_mut().zip(softmax(&chosen)).for_each(|(c, weight)| c.weight = weight);
    }
    if spec.normalize {
        let sum = out.iter().map(|c| c.weight).sum::<f32>() + SUM_EPS;
        out.iter_mut().for_each(|c| c.weight /= sum);
    }
    for choice in out {
        choice.weight *= spec.scale;
        if let Some(scale) = expert_scale {
            choice.weight *= scale[choice.expert as usize];
        }
    }
}

/// Takes the experts of all but the best groups out of the choice.
fn keep_groups(groups: RouteGroups, ranks: &mut [f32]) {
    let size = ranks.len() / groups.count;
    let best_two = |group: &[f32]| {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &rank in group {
            if rank > first || rank.is_nan() {
                (first, second) = (rank, first);
            } else if rank > second {
                second = rank;
            }
        }
        // Groups of one expert have no second.
        if second == f32::NEG_INFINITY { first } else { first + second }
    };
    let scores: Vec<f32> = ranks.chunks_exact(size).map(best_two).collect();
    for (group, ranks) in ranks.chunks_exact_mut(size).enumerate() {
        let better =
            |other: usize| scores[other] > scores[group] || (scores[other] == scores[group] && other < group);
        if (0..groups.count).filter(|&other| better(other)).count() >= groups.chosen {
            ranks.fill(f32::NEG_INFINITY);
        }
    }
}

fn softmax(x: &[f32]) -> Vec<f32> {
    let peak = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = x.iter().map(|x| (x - peak).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn spec(experts: usize, top_k: usize, scoring: Scoring) -> RouteSpec {
        RouteSpec { experts, top_k, scoring, normalize: false, scale: 1.0, groups: None }
    }

    fn chosen(spec: &RouteSpec, correction: Option<&[f32]>, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let mut out = vec![Choice::default(); spec.top_k];
        choose(spec, correction, None, logits, &mut out);
        out.iter().map(|c| (c.expert, c.weight)).unzip()
    }

    fn close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((f64::from(*g) - w).abs() < 1e-6, "{got:?}, should be {want:?}");
        }
    }

    #[test]
    fn scores_become_weights() {
        let logits = [0.5, 2.0, -1.0, 1.0];
        let e: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
        let all: f64 = e.iter().sum();
        let s = spec(4, 2, Scoring::Softmax);
        let (experts, weights) = chosen(&s, None, &logits);
        assert_eq!(experts, [1, 3]);
        close(&weights, &[e[1] / all, e[3] / all]);
        let (_, weights) = chosen(&RouteSpec { normalize: true, scale: 2.5, ..s }, None, &logits);
        close(&weights, &[2.5 * e[1] / (e[1] + e[3]), 2.5 * e[3] / (e[1] + e[3])]);
        let (_, weights) = chosen(&spec(4, 2, Scoring::SoftmaxOfChosen), None, &logits);
        close(&weights, &[e[1] / (e[1] + e[3]), e[3] / (e[1] + e[3])]);
        let mut out = [Choice::default(); 2];
        choose(&spec(4, 2, Scoring::Sigmoid), None, Some(&[1.0, 2.0, 3.0, 4.0]), &logits, &mut out);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        close(&out.map(|c| c.weight), &[2.0 * sigmoid(2.0), 4.0 * sigmoid(1.0)]);
    }

    #[test]
    fn the_lowest_of_equals_is_first() {
        let (experts, _) = chosen(&spec(5, 3, Scoring::SoftmaxOfChosen), None, &[1.0, 2.0, 1.0, 2.0, 1.0]);
        assert_eq!(experts, [1, 3, 0]);
    }

    #[test]
    fn a_correction_moves_the_choice_and_not_the_weight() {
        let correction = [0.0, -1.0, 0.9, 0.0];
        let (experts, weights) =
            chosen(&spec(4, 2, Scoring::Sigmoid), Some(&correction), &[0.0, 3.0, -1.0, 0.5]);
        assert_eq!(experts, [2, 3]);
        close(&weights, &[1.0 / (1.0 + 1f64.exp()), 1.0 / (1.0 + (-0.5f64).exp())]);
    }

    #[test]
    fn groups_count_by_their_two_best() {
        let groups = Some(RouteGroups { count: 3, chosen: 1 });
        // The best single expert is in group 0, the best pair in group 2.
        let logits = [3.0, -9.0, 0.0, 0.1, 2.0, 2.0];
        let s = RouteSpec { groups, ..spec(6, 2, Scoring::SoftmaxOfChosen) };
        assert_eq!(chosen(&s, None, &logits).0, [4, 5]);
        let two = RouteSpec { groups: Some(RouteGroups { count: 3, chosen: 2 }), ..s };
        assert_eq!(chosen(&two, None, &logits).0, [4, 5]);
        let equal = RouteSpec { groups: Some(RouteGroups { count: 6, chosen: 2 }), ..two };
        assert_eq!(chosen(&equal, None, &[1.0, 2.0, 2.0, 2.0, 0.0, 0.0]).0, [1, 2]);
    }

    #[test]
    fn what_is_not_a_number_is_chosen() {
        let (experts, weights) = chosen(&spec(4, 2, Scoring::Sigmoid), None, &[1.0, 5.0, f32::NAN, 2.0]);
        assert_eq!(experts, [2, 1]);
        assert!(weights[0].is_nan());
        let (_, weights) = chosen(&spec(3, 1, Scoring::Softmax), None, &[1.0, f32::NAN, 2.0]);
        assert!(weights[0].is_nan());
    }
}
