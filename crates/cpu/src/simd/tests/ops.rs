//! Row operations against f64 references.

use super::super::ops::*;
use super::{Rng, assert_close, bits, isas};
use crate::pool::Pool;

fn norm_reference(x: &[f32], weight: &[f32], offset: f32, eps: f32) -> Vec<f64> {
    let square: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (square + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * inverse * (f64::from(w) + f64::from(offset))).collect()
}

#[test]
fn norms() {
    let mut rng = Rng(51);
    let pool = Pool::new(2);
    for isa in isas() {
        for (width, rows) in [(1, 3), (5, 2), (64, 4), (80, 3), (2880, 9)] {
            let x = rng.normals(rows * width);
            let weight = rng.normals(width);
            let norm = NormWeight { weight: &weight, offset: 0.5, eps: 1e-5 };
            let mut out = vec![f32::NAN; x.len()];
            rms_norm(&pool, isa, &x, norm, &mut out);
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                assert_close(out, &norm_reference(x, &weight, 0.5, 1e-5), |_| 2e-5, "rms_norm");
            }

            let more = rng.normals(x.len());
            let (mut residual, mut summed) = (x.clone(), vec![f32::NAN; x.len()]);
            add_rms_norm(&pool, isa, &mut residual, &more, norm, &mut summed);
            let sum: Vec<f32> = x.iter().zip(&more).map(|(a, b)| a + b).collect();
            assert_eq!(bits(&residual), bits(&sum));
            rms_norm(&pool, isa, &sum, norm, &mut out);
            assert_eq!(bits(&summed), bits(&out), "adding first changes nothing");

            add(&pool, isa, &mut residual, &weight);
            assert_eq!(residual[width - 1], sum[width - 1] + weight[width - 1]);
            assert_eq!(residual[(rows - 1) * width], sum[(rows - 1) * width] + weight[0]);
        }
    }
}

#[test]
fn head_norms_and_rotation_touch_only_their_heads() {
    let mut rng = Rng(52);
    let pool = Pool::new(2);
    // Large enough to be split over threads.
    let rows = 300;
    let heads = Heads { stride: 250, first: 10, heads: 3, head_dim: 72 };
    let x = rng.normals(rows * heads.stride);
    let weight = rng.normals(72);
    let norm = NormWeight { weight: &weight, offset: 0.0, eps: 1e-6 };
    let half = 25;
    let (cos, sin): (Vec<f32>, Vec<f32>) =
        (0..400 * half).map(|i| (i as f32 * 0.1).sin_cos()).map(|(s, c)| (c, s)).unzip();
    let tables = RopeTables { rotary_dim: 50, cos: &cos, sin: &sin };
    let positions: Vec<u32> = (0..rows).map(|_| rng.below(400) as u32).collect();
    for isa in isas() {
        let (mut normed, mut rotated) = (x.clone(), x.clone());
        head_rms_norm(&pool, isa, &mut normed, heads, rows, norm);
        rope(&pool, isa, &mut rotated, heads, &positions, tables);
        for row in 0..rows {
            let at = |i: usize| row * 250 + i;
            for outside in (0..10).chain(226..250) {
                assert_eq!(normed[at(outside)], x[at(outside)]);
                assert_eq!(rotated[at(outside)], x[at(outside)]);
            }
            for head in 0..3 {
                let range = at(10 + head * 72)..at(10 + (head + 1) * 72);
                let from = &x[range.clone()];
                assert_close(
                    &normed[range.clone()],
                    &norm_reference(from, &weight, 0.0, 1e-6),
                    |_| 2e-5,
                    "head",
                );
                let table = positions[row] as usize * half;
                let want: Vec<f64> = (0..72)
                    .map(|i| {
                        let v = |i: usize| f64::from(from[i]);
                        let (c, s) = (f64::from(cos[table + i % half]), f64::from(sin[table + i % half]));
                        match i {
                            0..25 => v(i) * c - v(i + half) * s,
                            25..50 => v(i) * c + v(i - half) * s,
                            _ => v(i),
                        }
                    })
                    .collect();
                assert_close(&rotated[range], &want, |_| 1e-6, "rope");
            }
        }
    }
}

#[test]
fn gates() {
    let mut rng = Rng(53);
    let pool = Pool::new(2);
    for isa in isas() {
        for (width, rows) in [(3, 2), (16, 1), (50, 400)] {
            let x: Vec<f32> = rng.normals(2 * width * rows).iter().map(|v| v * 4.0).collect();
            let (mut silu, mut gelu) = (vec![f32::NAN; width * rows], vec![f32::NAN; width * rows]);
            silu_mul(&pool, isa, &x, width, &mut silu);
            gelu_tanh_mul(&pool, isa, &x, width, &mut gelu);
            for row in 0..rows {
                for i in 0..width {
                    let (g, u) = (f64::from(x[2 * row * width + i]), f64::from(x[(2 * row + 1) * width + i]));
                    let want = g / (1.0 + (-g).exp()) * u;
                    assert!((f64::from(silu[row * width + i]) - want).abs() <= 1e-6 * (1.0 + want.abs()));
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3));
                    let want = 0.5 * g * (1.0 + inner.tanh()) * u;
                    let error = (f64::from(gelu[row * width + i]) - want).abs();
                    assert!(error <= 2e-6 * (1.0 + want.abs()), "gelu({g}) * {u} is off by {error}");
                }
            }
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
    let norm = NormWeight { weight: &[1.0, 1.0], offset: 0.0, eps: 0.0 };
    rms_norm(&Pool::new(1), super::Isa::Portable, &[0.0; 7], norm, &mut [0.0; 7]);
}
