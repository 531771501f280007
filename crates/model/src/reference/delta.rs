//! The gated delta net, token by token.

use super::{Reference, Rows64, norm_row, sigmoid};
use crate::backend::{DeltaRule, Result};

/// `x / |x|`.
fn unit(x: &[f64]) -> Vec<f64> {
    let size = (x.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
    x.iter().map(|v| v / size).collect()
}

/// The convolution's next output; its state takes in the new row.
fn convolve(state: &mut [f64], x: &[f64], weight: &[f32], taps: usize) -> Vec<f64> {
    let width = x.len();
    let each = (0..width).map(|c| {
        let older = (0..taps - 1).map(|t| state[t * width + c]);
        let weights = &weight[c * taps..][..taps];
        let sum: f64 = older.chain([x[c]]).zip(weights).map(|(x, w)| x * f64::from(*w)).sum();
        sum * sigmoid(sum)
    });
    let out = each.collect();
    state.rotate_left(width.min(state.len()));
    let newest = state.len().saturating_sub(width);
    state[newest..].copy_from_slice(&x[..x.len().min(taps.saturating_sub(1) * width)]);
    out
}

impl Reference {
    pub(super) fn delta_rows(
        &mut self,
        rule: &DeltaRule<'_, Vec<f32>>,
        x: &Rows64,
        out: &mut Rows64,
    ) -> Result<()> {
        let s = rule.shape;
        let values = s.v_heads * s.v_dim;
        self.fit(out, values)?;
        self.state_layout(rule.group)?;
        let per_layer = s.conv_elements() + s.state_elements();
        for row in self.batch.rows.clone() {
            let states = &mut self.slots[row.slot.0 as usize].states[rule.group];
            let state = &mut states[rule.layer_in_group * per_layer..][..per_layer];
            let (conv, state) = state.split_at_mut(s.conv_elements());
            for token in row.first..row.first + row.len {
                let x = &x.data[token * x.width..][..s.in_width()];
                let (qkv, rest) = x.split_at(s.conv_width());
                let (z, ba) = rest.split_at(values);
                let mixed = convolve(conv, qkv, rule.conv, s.taps);
                let (q, kv) = mixed.split_at(s.k_heads * s.k_dim);
                let (k, v) = kv.split_at(s.k_heads * s.k_dim);
                let out = &mut out.data[token * values..][..values];
                for head in 0..s.v_heads {
                    let of = |x: &[f64], head: usize, dim: usize| x[head * dim..][..dim].to_vec();
                    let k_head = head / (s.v_heads / s.k_heads);
                    let (q, k) = (unit(&of(q, k_head, s.k_dim)), unit(&of(k, k_head, s.k_dim)));
                    let strength = sigmoid(ba[head]);
                    let rate = ba[s.v_heads + head] + f64::from(rule.dt_bias[head]);
                    let softplus = rate.max(0.0) + (-rate.abs()).exp().ln_1p();
                    let decay = (-f64::from(rule.a_log[head]).exp() * softplus).exp();
                    let state = &mut state[head * s.k_dim * s.v_dim..][..s.k_dim * s.v_dim];
                    let o = step(state, &q, &k, &of(v, head, s.v_dim), decay, strength);
                    let o: Vec<f64> = o.iter().map(|o| o / (s.k_dim as f64).sqrt()).collect();
                    let out = &mut out[head * s.v_dim..][..s.v_dim];
                    norm_row(&o, rule.norm, out);
                    for (o, z) in out.iter_mut().zip(&z[head * s.v_dim..]) {
                        *o *= z * sigmoid(*z);
                    }
                }
            }
        }
        Ok(())
    }
}

/// `S <- decay S + k (strength (v - k (decay S)))`, and `q S`.
fn step(state: &mut [f64], q: &[f64], k: &[f64], v: &[f64], decay: f64, strength: f64) -> Vec<f64> {
    let dim = v.len();
    state.iter_mut().for_each(|s| *s *= decay);
    let read = |state: &[f64], by: &[f64], j: usize| -> f64 {
        by.iter().enumerate().map(|(i, b)| b * state[i * dim + j]).sum()
    };
    let change: Vec<f64> = (0..dim).map(|j| strength * (v[j] - read(state, k, j))).collect();
    for (i, k) in k.iter().enumerate() {
        for (s, c) in state[i * dim..][..dim].iter_mut().zip(&change) {
            *s += k * c;
        }
    }
    (0..dim).map(|j| read(state, q, j)).collect()
}
