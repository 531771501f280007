//! The delta rule against an f64 reference, and its independence of chunks, batch and threads.

use super::super::delta::*;
use super::super::ops::NormParams;
use super::{Rng, assert_close, bits, isas};
use crate::pool::Pool;

/// A layer's parameters.
struct Layer {
    dims: DeltaDims,
    conv: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    weight: Vec<f32>,
}

impl Layer {
    fn new(rng: &mut Rng, dims: DeltaDims) -> Self {
        let some = |rng: &mut Rng, n: usize, gain: f32| rng.normals(n).iter().map(|v| v * gain).collect();
        Self {
            dims,
            conv: some(rng, dims.taps * dims.channels(), 0.5),
            a_log: some(rng, dims.v_heads, 0.5),
            dt_bias: some(rng, dims.v_heads, 1.0),
            weight: some(rng, dims.v_dim, 1.0),
        }
    }

    fn params(&self) -> DeltaParams<'_> {
        let weight = Some(self.weight.as_slice());
        let norm = NormParams { center: false, weight, bias: None, offset: 0.25, eps: 1e-6 };
        DeltaParams { conv: &self.conv, a_log: &self.a_log, dt_bias: &self.dt_bias, norm }
    }

    /// One sequence from an empty state, by the definition.
    fn reference(&self, x: &[f32]) -> Vec<f64> {
        let d = self.dims;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let rows: Vec<&[f32]> = x.chunks(d.in_width()).collect();
        let mut state = vec![0.0; d.v_heads * d.k_dim * d.v_dim];
        let mut out = Vec::new();
        for t in 0..rows.len() {
            let mixed: Vec<f64> = (0..d.channels())
                .map(|c| {
                    let taps = (0..d.taps).filter(|i| t + i + 1 >= d.taps);
                    let tap = |i: usize| {
                        f64::from(self.conv[i * d.channels() + c]) * f64::from(rows[t + i + 1 - d.taps][c])
                    };
                    let sum: f64 = taps.map(tap).sum();
                    sum * sigmoid(sum)
                })
                .collect();
            let unit = |x: &[f64], factor: f64| -> Vec<f64> {
                let length = (x.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
                x.iter().map(|v| v / length * factor).collect()
            };
            let keys = d.k_heads * d.k_dim;
            for head in 0..d.v_heads {
                let at = head * d.k_heads / d.v_heads * d.k_dim;
                let q = unit(&mixed[at..at + d.k_dim], 1.0 / (d.k_dim as f64).sqrt());
                let k = unit(&mixed[keys + at..keys + at + d.k_dim], 1.0);
                let v = &mixed[2 * keys + head * d.v_dim..][..d.v_dim];
                let z = d.channels() + head * d.v_dim;
                let b = d.channels() + d.v_heads * d.v_dim + head;
                let number = |at: usize| f64::from(rows[t][at]);
                let step = number(b + d.v_heads) + f64::from(self.dt_bias[head]);
                let decay = (-f64::from(self.a_log[head]).exp() * step.exp().ln_1p()).exp();
                let strength = sigmoid(number(b));
                let state = &mut state[head * d.k_dim * d.v_dim..][..d.k_dim * d.v_dim];
                state.iter_mut().for_each(|s| *s *= decay);
                let column = |state: &[f64], x: &[f64], j: usize| -> f64 {
                    (0..d.k_dim).map(|i| state[i * d.v_dim + j] * x[i]).sum()
                };
                let delta: Vec<f64> =
                    (0..d.v_dim).map(|j| (v[j] - column(state, &k, j)) * strength).collect();
                for (i, line) in state.chunks_mut(d.v_dim).enumerate() {
                    line.iter_mut().zip(&delta).for_each(|(s, delta)| *s += k[i] * delta);
                }
                let o: Vec<f64> = (0..d.v_dim).map(|j| column(state, &q, j)).collect();
                let size = (o.iter().map(|v| v * v).sum::<f64>() / d.v_dim as f64 + 1e-6).sqrt();
                out.extend((0..d.v_dim).map(|j| {
                    let z = number(z + j);
                    o[j] / size * (f64::from(self.weight[j]) + 0.25) * z * sigmoid(z)
                }));
            }
        }
        out
    }
}

fn dims(k_heads: usize, v_heads: usize, k_dim: usize, v_dim: usize, taps: usize) -> DeltaDims {
    DeltaDims { k_heads, v_heads, k_dim, v_dim, taps }
}

#[test]
fn the_rule_keeps_its_error_bound() {
    let seed = 61;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let pool = Pool::new(2);
    for shape in [dims(2, 4, 16, 32, 4), dims(1, 3, 7, 21, 3), dims(2, 2, 40, 150, 2), dims(1, 1, 3, 5, 1)] {
        let layer = Layer::new(&mut rng, shape);
        let x = rng.normals(70 * shape.in_width());
        let want = layer.reference(&x);
        for isa in isas() {
            let mut states = vec![0.0; shape.state()];
            let mut out = vec![f32::NAN; want.len()];
            let row = DeltaRow { first: 0, len: 70, state: 0 };
            delta_rule(&pool, isa, shape, layer.params(), &x, &[row], &mut states, &mut out);
            // The norm divides by what may be small; errors are relative to values of about 1 before it.
            assert_close(&out, &want, |i| 2e-4 * (1.0 + want[i].abs()), &format!("{shape:?} {isa:?}"));
        }
    }
}

#[test]
fn chunks_neighbours_and_threads_change_no_bit() {
    let seed = 62;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let shape = dims(2, 4, 12, 37, 4);
    let layer = Layer::new(&mut rng, shape);
    let (width, out_width, len) = (shape.in_width(), 4 * 37, 75);
    let x = rng.normals(len * width);
    let other = rng.normals(9 * width);
    for isa in isas() {
        let mut whole = vec![0.0; shape.state()];
        let mut want = vec![f32::NAN; len * out_width];
        let row = DeltaRow { first: 0, len, state: 0 };
        delta_rule(&Pool::new(1), isa, shape, layer.params(), &x, &[row], &mut whole, &mut want);
        for (threads, chunk) in [(1, 1), (3, 7), (2, 16), (2, 32), (3, 75)] {
            let pool = Pool::new(threads);
            // Ours is the second state of three, with a gap; the neighbour's comes after it.
            let at = shape.state() + 3;
            let mut states = vec![0.0; 2 * at + shape.state()];
            for start in (0..len).step_by(chunk) {
                let n = chunk.min(len - start);
                let mixed = [&other[..2 * width], &x[start * width..(start + n) * width]].concat();
                let rows =
                    [DeltaRow { first: 0, len: 2, state: 2 * at }, DeltaRow { first: 2, len: n, state: at }];
                let mut out = vec![f32::NAN; (2 + n) * out_width];
                delta_rule(&pool, isa, shape, layer.params(), &mixed, &rows, &mut states, &mut out);
                let want = &want[start * out_width..(start + n) * out_width];
                assert_eq!(bits(&out[2 * out_width..]), bits(want), "{isa:?}, chunks of {chunk} at {start}");
            }
            assert_eq!(bits(&states[at..at + shape.state()]), bits(&whole), "{isa:?}, chunks of {chunk}");
            assert!(states[..at].iter().all(|v| *v == 0.0), "a state that no row names is left alone");
        }
    }
}

#[test]
#[should_panic(expected = "states overlap")]
fn overlapping_states_are_named() {
    let shape = dims(1, 1, 2, 2, 2);
    let layer = Layer::new(&mut Rng(63), shape);
    let rows = [DeltaRow { first: 0, len: 1, state: 0 }, DeltaRow { first: 1, len: 1, state: 1 }];
    let (x, mut states, mut out) = (vec![0.0; 2 * shape.in_width()], vec![0.0; 99], vec![0.0; 4]);
    let pool = Pool::new(1);
    delta_rule(&pool, isas()[0], shape, layer.params(), &x, &rows, &mut states, &mut out);
}
