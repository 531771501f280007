//! The same transformer in double precision, one sequence at a time.

use mirai_model::backend::Activation;

use super::{EPS, Layer, Matrix, Rig};

impl Rig {
    /// Logits of every position of a sequence, in double precision, one query at a time.
    pub fn oracle(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let s = &self.shape;
        let mut x: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&t| row(&self.embed.values, t as usize, s.hidden).iter().map(|v| v * 1.5).collect())
            .collect();
        for layer in &self.layers {
            let normed: Vec<_> = x.iter().map(|x| norm(x, &layer.norms[0])).collect();
            let mixed = self.oracle_attention(layer, &normed);
            for (x, y) in x.iter_mut().zip(mixed) {
                add(x, &product(&layer.output, &y));
            }
            for x in &mut x {
                let gate_up = product(&layer.gate_up, &norm(x, &layer.norms[1]));
                let (gate, up) = gate_up.split_at(s.ffn);
                let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| self.gate(*g) * u).collect();
                add(x, &product(&layer.down, &inner));
            }
        }
        x.iter()
            .map(|x| {
                let mut logits = product(&self.embed, x);
                logits.truncate(s.vocab - 1);
                if let Some(cap) = s.logit_cap {
                    logits.iter_mut().for_each(|l| *l = f64::from(cap) * (*l / f64::from(cap)).tanh());
                }
                logits
            })
            .collect()
    }

    fn gate(&self, x: f64) -> f64 {
        match self.shape.activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            }
            other => unreachable!("{other:?} is tested with the kernels"),
        }
    }

    fn oracle_attention(&self, layer: &Layer, normed: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let (s, dim) = (&self.shape, self.shape.head_dim);
        let (q_width, kv_width) = (s.q_heads * dim, s.kv_heads * dim);
        let mut qkv: Vec<Vec<f64>> = normed.iter().map(|x| product(&layer.qkv, x)).collect();
        for (position, row) in qkv.iter_mut().enumerate() {
            if let Some((_, bias)) = &layer.qkv_bias {
                row.iter_mut().zip(bias).for_each(|(x, b)| *x += f64::from(*b));
            }
            for (head, x) in row[..q_width + kv_width].chunks_mut(dim).enumerate() {
                if s.qk_norm {
                    let weight = &layer.norms[if head < s.q_heads { 2 } else { 3 }];
                    x.copy_from_slice(&norm(x, weight));
                }
                let half = s.rotary_dim / 2;
                for i in 0..half {
                    let (cos, sin) = (
                        f64::from(self.table.cos[position * half + i]),
                        f64::from(self.table.sin[position * half + i]),
                    );
                    let (a, b) = (x[i], x[i + half]);
                    (x[i], x[i + half]) = (a * cos - b * sin, a * sin + b * cos);
                }
            }
        }
        let attend = |p: usize, head: usize| -> Vec<f64> {
            let kv_head = head * s.kv_heads / s.q_heads;
            let from = layer.spec.window.map_or(0, |w| (p + 1).saturating_sub(w as usize));
            let q = &qkv[p][head * dim..(head + 1) * dim];
            let scores: Vec<f64> = (from..=p)
                .map(|j| {
                    let k = &qkv[j][q_width + kv_head * dim..][..dim];
                    let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                    let score = dot * f64::from(layer.spec.scale);
                    layer.spec.soft_cap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh())
                })
                .collect();
            let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|x| (x - peak).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut out = vec![0.0; dim];
            for (j, w) in (from..=p).zip(&weights) {
                let v = &qkv[j][q_width + kv_width + kv_head * dim..][..dim];
                out.iter_mut().zip(v).for_each(|(o, v)| *o += w / total * v);
            }
            out
        };
        (0..normed.len()).map(|p| (0..s.q_heads).flat_map(|head| attend(p, head)).collect()).collect()
    }
}

fn row(values: &[f32], index: usize, width: usize) -> Vec<f64> {
    values[index * width..(index + 1) * width].iter().map(|x| f64::from(*x)).collect()
}

fn norm(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * (f64::from(*w) + 1.0)).collect()
}

fn product(m: &Matrix, x: &[f64]) -> Vec<f64> {
    (0..m.rows).map(|r| row(&m.values, r, x.len()).iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Log-softmax.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let peak = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - peak).exp()).sum();
    logits.iter().map(|x| x - peak - sum.ln()).collect()
}
