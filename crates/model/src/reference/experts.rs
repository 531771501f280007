//! Activations, the choice of experts, and their sum.

use super::{Weight, fault, sigmoid};
use crate::backend::{Activation, Experts, Result, RouteGroups, RouteSpec, Scoring};

/// Error function: `2 / sqrt(pi) exp(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!`, whose terms all have one sign.
pub(super) fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..400 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
        if term.abs() < sum.abs() * 1e-17 {
            break;
        }
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

pub(super) fn activate(activation: Activation, x: f64) -> Result<f64> {
    Ok(match activation {
        Activation::Silu => x * sigmoid(x),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        Activation::Tanh => x.tanh(),
        Activation::Xielu { alpha_p, alpha_n, beta, eps } => {
            let linear = f64::from(beta) * x;
            if x > 0.0 {
                f64::from(alpha_p) * x * x + linear
            } else {
                (x.min(f64::from(eps)).exp_m1() - x) * f64::from(alpha_n) + linear
            }
        }
        Activation::ClampedSwiglu { .. } => return Err(fault("activate", "has a gate")),
    })
}

/// `[gate | up]` to half of it.
pub(super) fn glu(activation: Activation, gate_up: &[f64]) -> Result<Vec<f64>> {
    let (gates, ups) = gate_up.split_at(gate_up.len() / 2);
    let each = gates.iter().zip(ups).map(|(&gate, &up)| match activation {
        Activation::ClampedSwiglu { alpha, limit } => {
            let limit = f64::from(limit);
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            Ok((up + 1.0) * gate * sigmoid(f64::from(alpha) * gate))
        }
        other => Ok(activate(other, gate)? * up),
    });
    each.collect()
}

/// Indices of the largest values, largest first; equal ones by index.
fn largest(values: &[f64], count: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..values.len()).collect();
    ids.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    ids.truncate(count);
    ids
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
    logits.iter().map(|l| (l - top).exp() / sum).collect()
}

/// Forbids all experts but those of the best groups.
fn keep_groups(scores: &mut [f64], groups: RouteGroups) {
    let size = scores.len() / groups.count;
    let worth = |group: &[f64]| largest(group, 2).into_iter().map(|i| group[i]).sum::<f64>();
    let worths: Vec<f64> = scores.chunks(size).map(worth).collect();
    let chosen = largest(&worths, groups.chosen);
    for (index, group) in scores.chunks_mut(size).enumerate() {
        if !chosen.contains(&index) {
            group.fill(f64::NEG_INFINITY);
        }
    }
}

/// One token's experts and their weights.
pub(super) fn choose(
    spec: &RouteSpec,
    correction: Option<&Vec<f32>>,
    expert_scale: Option<&Vec<f32>>,
    logits: &[f64],
) -> Vec<(usize, f64)> {
    let logits = &logits[..spec.experts];
    let scores = match spec.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::SoftmaxOfChosen => logits.to_vec(),
        Scoring::Sigmoid => logits.iter().copied().map(sigmoid).collect(),
    };
    let mut ranked = scores.clone();
    if let Some(correction) = correction {
        ranked.iter_mut().zip(correction).for_each(|(s, c)| *s += f64::from(*c));
    }
    if let Some(groups) = spec.groups {
        keep_groups(&mut ranked, groups);
    }
    let chosen = largest(&ranked, spec.top_k);
    let mut weights: Vec<f64> = chosen.iter().map(|&e| scores[e]).collect();
    if spec.scoring == Scoring::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    if spec.normalize {
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    let scale = |e: usize| expert_scale.map_or(1.0, |s| f64::from(s[e])) * f64::from(spec.scale);
    chosen.into_iter().zip(weights).map(|(e, w)| (e, w * scale(e))).collect()
}

/// Adds what one token's experts make of it.
pub(super) fn mix(
    weights: &Experts<'_, Vec<Weight>, Vec<f32>>,
    chosen: &[(usize, f64)],
    x: &[f64],
    out: &mut [f64],
) -> Result<()> {
    for &(expert, share) in chosen {
        let mut wide = weights.gate_up[expert].times(x);
        if let Some(bias) = weights.gate_up_bias {
            add_bias(&mut wide, bias, expert);
        }
        let inner = if wide.len() == 2 * weights.intermediate {
            glu(weights.activation, &wide)?
        } else {
            wide.iter().map(|&x| activate(weights.activation, x)).collect::<Result<_>>()?
        };
        let mut down = weights.down[expert].times(&inner);
        if let Some(bias) = weights.down_bias {
            add_bias(&mut down, bias, expert);
        }
        out.iter_mut().zip(&down).for_each(|(o, d)| *o += share * d);
    }
    Ok(())
}

fn add_bias(rows: &mut [f64], bias: &[f32], expert: usize) {
    let bias = &bias[expert * rows.len()..][..rows.len()];
    rows.iter_mut().zip(bias).for_each(|(r, b)| *r += f64::from(*b));
}
