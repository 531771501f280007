//! Row operations against f64 references.

use super::super::ops::*;
use super::{Rng, assert_close, bits, isas};
use crate::pool::Pool;

/// What a norm should give for one row.
fn norm_reference(x: &[f32], p: NormParams<'_>) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = if p.center { x.iter().map(|&v| f64::from(v)).sum::<f64>() / n } else { 0.0 };
    let square: f64 = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
    let inverse = 1.0 / (square + f64::from(p.eps)).sqrt();
    let at = |part: Option<&[f32]>, i: usize| part.map(|part| f64::from(part[i]));
    (x.iter().enumerate())
        .map(|(i, &x)| {
            let weight = at(p.weight, i).map_or(1.0, |w| w + f64::from(p.offset));
            (f64::from(x) - mean) * inverse * weight + at(p.bias, i).unwrap_or(0.0)
        })
        .collect()
}

#[test]
fn norms() {
    let mut rng = Rng(51);
    let pool = Pool::new(2);
    for isa in isas() {
        for (width, rows) in [(1, 3), (5, 2), (64, 4), (83, 3), (2880, 6)] {
            let x: Vec<f32> = rng.normals(rows * width).iter().map(|v| v + 0.7).collect();
            let (weight, bias) = (rng.normals(width), rng.normals(width));
            let plain = NormParams { center: false, weight: None, bias: None, offset: 0.5, eps: 1e-5 };
            let weighted = NormParams { weight: Some(&weight), ..plain };
            let full = NormParams { center: true, bias: Some(&bias), ..weighted };
            for p in [plain, weighted, full] {
                let mut out = vec![f32::NAN; x.len()];
                norm(&pool, isa, &x, width, p, &mut out);
                for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                    assert_close(out, &norm_reference(x, p), |_| 2e-5, "norm");
                }
                let more = rng.normals(x.len());
                let (mut residual, mut summed) = (x.clone(), vec![f32::NAN; x.len()]);
                add_norm(&pool, isa, &mut residual, (&more, 0.25), width, p, &mut summed);
                let sum: Vec<f32> = x.iter().zip(&more).map(|(a, b)| a + 0.25 * b).collect();
                let wide: Vec<f64> = sum.iter().map(|v| f64::from(*v)).collect();
                assert_close(&residual, &wide, |_| 1e-6, "sum");
                norm(&pool, isa, &residual, width, p, &mut out);
                assert_eq!(bits(&summed), bits(&out), "adding first changes nothing");
            }
        }
    }
}

#[test]
fn sums_scales_and_gates() {
    let mut rng = Rng(55);
    let pool = Pool::new(2);
    for isa in isas() {
        for (width, rows) in [(3, 2), (37, 4), (50, 400)] {
            let (x, y, bias) = (rng.normals(width * rows), rng.normals(width * rows), rng.normals(width));
            let mut got = x.clone();
            add(&pool, isa, &mut got, &y, -0.5);
            add(&pool, isa, &mut got, &bias, 1.0);
            scale(&mut got, 3.0);
            let value =
                |i: usize| 3.0 * (f64::from(x[i]) - 0.5 * f64::from(y[i]) + f64::from(bias[i % width]));
            let want: Vec<f64> = (0..x.len()).map(value).collect();
            assert_close(&got, &want, |_| 3e-6, "sums");

            for gate_width in [1, width] {
                let stride = width + 5;
                let gates: Vec<f32> = rng.normals(stride * rows).iter().map(|v| v * 4.0).collect();
                let place = Heads { stride, first: 4, heads: 1, head_dim: gate_width };
                let mut got = x.clone();
                gate(&pool, isa, &mut got, width, &gates, place);
                let value = |i: usize| {
                    let at = i / width * stride + 4 + if gate_width == 1 { 0 } else { i % width };
                    f64::from(x[i]) / (1.0 + (-f64::from(gates[at])).exp())
                };
                let want: Vec<f64> = (0..x.len()).map(value).collect();
                assert_close(&got, &want, |_| 3e-6, "gates");
            }
        }
    }
}

#[test]
fn head_norms_and_rotation_touch_only_their_heads() {
    let mut rng = Rng(52);
    let pool = Pool::new(2);
    // Large enough to be split over threads.
    let rows = 100;
    let heads = Heads { stride: 250, first: 10, heads: 3, head_dim: 72 };
    let x = rng.normals(rows * heads.stride);
    let weight = rng.normals(72);
    let p = NormParams { center: false, weight: Some(&weight), bias: None, offset: 0.0, eps: 1e-6 };
    let half = 17;
    let (cos, sin): (Vec<f32>, Vec<f32>) =
        (0..400 * half).map(|i| (i as f32 * 0.1).sin_cos()).map(|(s, c)| (c, s)).unzip();
    let positions: Vec<u32> = (0..rows).map(|_| rng.below(400) as u32).collect();
    let factors: Vec<f32> = rng.normals(400);
    for isa in isas() {
        let mut normed = x.clone();
        head_norm(&pool, isa, &mut normed, heads, rows, p);
        let mut scaled = x.clone();
        scale_heads(&pool, &mut scaled, heads, &positions, &factors);
        for row in 0..rows {
            for outside in (0..10).chain(226..250) {
                assert_eq!(normed[row * 250 + outside], x[row * 250 + outside]);
                assert_eq!(scaled[row * 250 + outside], x[row * 250 + outside]);
            }
            let factor = factors[positions[row] as usize];
            assert_eq!(scaled[row * 250 + 225], x[row * 250 + 225] * factor);
            for head in 0..3 {
                let want = norm_reference(heads.of(&x, row, head), p);
                assert_close(heads.of(&normed, row, head), &want, |_| 2e-5, "head");
            }
        }
        for pairs in [Pairs::Apart(17), Pairs::Apart(36), Pairs::Adjacent] {
            let tables = RopeTables { rotary_dim: 34, pairs, cos: &cos, sin: &sin };
            let mut rotated = x.clone();
            rope(&pool, isa, &mut rotated, heads, &positions, tables);
            let mut want: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            for (row, position) in positions.iter().enumerate() {
                for head in 0..3 {
                    for i in 0..half {
                        let (a, b) = match pairs {
                            Pairs::Apart(n) => (i, i + n),
                            Pairs::Adjacent => (2 * i, 2 * i + 1),
                        };
                        let start = row * 250 + 10 + head * 72;
                        let (low, high) = (want[start + a], want[start + b]);
                        let at = *position as usize * half + i;
                        let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                        (want[start + a], want[start + b]) = (low * c - high * s, low * s + high * c);
                    }
                }
            }
            assert_close(&rotated, &want, |_| 1e-6, "rope");
        }
    }
}

/// Error function by its series; exact enough up to 5.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn reference(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf((x / std::f64::consts::SQRT_2).clamp(-5.0, 5.0))),
        Activation::Tanh => x.tanh(),
        Activation::Xielu { alpha_p, alpha_n, beta, eps } => {
            let [p, n, beta, eps] = [alpha_p, alpha_n, beta, eps].map(f64::from);
            if x > 0.0 { p * x * x + beta * x } else { (x.min(eps).exp_m1() - x) * n + beta * x }
        }
    }
}

#[test]
fn activations_with_and_without_a_gate() {
    let mut rng = Rng(53);
    let pool = Pool::new(2);
    let xielu = Activation::Xielu { alpha_p: 0.8, alpha_n: 1.3, beta: 0.5, eps: -1e-6 };
    for isa in isas() {
        for (width, rows) in [(3, 2), (16, 1), (50, 400)] {
            let x: Vec<f32> = rng.normals(2 * width * rows).iter().map(|v| v * 3.0).collect();
            for activation in
                [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Tanh, xielu]
            {
                let mut got = vec![f32::NAN; x.len()];
                activate(&pool, isa, activation, &x, 2 * width, &mut got);
                let want: Vec<f64> = x.iter().map(|&x| reference(activation, f64::from(x))).collect();
                let name = format!("{activation:?} {isa:?}");
                assert_close(&got, &want, |i| 2e-6 * (1.0 + want[i].abs()), &name);
                let mut got = vec![f32::NAN; width * rows];
                glu(&pool, isa, Glu::Gated(activation), &x, width, &mut got);
                let line = |i: usize| i / width * 2 * width + i % width;
                let want: Vec<f64> =
                    (0..got.len()).map(|i| want[line(i)] * f64::from(x[line(i) + width])).collect();
                assert_close(&got, &want, |i| 2e-5 * (1.0 + want[i].abs()), &name);
            }
            let mut got = vec![f32::NAN; width * rows];
            glu(&pool, isa, Glu::ClampedSwiglu { alpha: 1.7, limit: 4.0 }, &x, width, &mut got);
            let value = |i: usize| {
                let at = i / width * 2 * width + i % width;
                let (gate, up) = (f64::from(x[at]).min(4.0), f64::from(x[at + width]).clamp(-4.0, 4.0));
                (up + 1.0) * gate / (1.0 + (-f64::from(1.7_f32) * gate).exp())
            };
            let want: Vec<f64> = (0..got.len()).map(value).collect();
            assert_close(&got, &want, |i| 3e-6 * (1.0 + want[i].abs()), "clamped");
        }
        let clamped = Glu::ClampedSwiglu { alpha: 1.7, limit: 4.0 };
        for (clean, poisoned) in [(0, 1), (1, 0)] {
            let mut x = [1.0, 2.0];
            x[poisoned] = f32::NAN;
            let mut out = [0.0];
            glu(&pool, isa, clamped, &x, 1, &mut out);
            assert!(out[0].is_nan() && !x[clean].is_nan(), "what is not a number is seen");
        }
    }
}

#[test]
fn softmax_and_argmax() {
    let mut rng = Rng(54);
    for isa in isas() {
        for n in [1, 15, 16, 17, 1000] {
            let logits: Vec<f32> = rng.normals(n).iter().map(|v| v * 5.0).collect();
            let sum: f64 = logits.iter().map(|&v| f64::from(v).exp()).sum();
            let want: Vec<f64> = logits.iter().map(|&v| f64::from(v).exp() / sum).collect();
            let mut p = logits.clone();
            let log_sum = softmax(isa, &mut p);
            assert_close(&p, &want, |i| 2e-6 * want[i], "softmax");
            assert!((f64::from(log_sum) - sum.ln()).abs() < 1e-5);
            let best = (0..n).fold(0, |b, i| if logits[i] > logits[b] { i } else { b });
            assert_eq!(argmax(isa, &logits), Some(best));
        }
        assert_eq!(argmax(isa, &[]), None);
        assert_eq!(argmax(isa, &[1.0, f32::NAN, 2.0]), None);
        assert_eq!(argmax(isa, &[1.0, 3.0, 3.0]), Some(1));
        let mut p = [f32::NEG_INFINITY; 20];
        assert_eq!(softmax(isa, &mut p), f32::NEG_INFINITY);
        p[7] = 1.0;
        assert_eq!(softmax(isa, &mut p), 1.0);
        assert_eq!((p[7], p[0]), (1.0, 0.0));
    }
}

#[test]
#[should_panic(expected = "7 values are no whole rows of 2")]
fn ragged_rows_are_named() {
    let p = NormParams { center: false, weight: None, bias: None, offset: 0.0, eps: 0.0 };
    norm(&Pool::new(1), super::Isa::Portable, &[0.0; 7], 2, p, &mut [0.0; 7]);
}
