//! Heads: norms, rotation, pages, softmax.
//!
//! Owns where an element of a stored key or value lies.

use mirai_engine::BLOCK_TOKENS;

use super::{Reference, Rows64, fault, norm_row};
use crate::backend::{
    AttentionSpec, BatchRow, HeadNorms, LatentShape, Norm, Pairing, Result, RopeTable, Stored, Visibility,
};

/// The two elements of each rotated pair.
fn pairs(table: &RopeTable) -> impl Iterator<Item = (usize, usize)> {
    let (half, pairing) = (table.rotary_dim / 2, table.pairing);
    (0..half).map(move |i| match pairing {
        Pairing::Halves => (i, i + half),
        Pairing::Adjacent => (2 * i, 2 * i + 1),
        Pairing::Apart(distance) => (i, i + distance),
    })
}

fn rotate(head: &mut [f64], table: &RopeTable, position: usize) {
    let half = table.rotary_dim / 2;
    for (i, (first, second)) in pairs(table).enumerate() {
        let (cos, sin) = (table.cos[position * half + i], table.sin[position * half + i]);
        let (cos, sin) = (f64::from(cos), f64::from(sin));
        let (a, b) = (head[first], head[second]);
        head[first] = a * cos - b * sin;
        head[second] = b * cos + a * sin;
    }
}

fn query_scale(table: &RopeTable, position: usize) -> f64 {
    table.q_scale.get(position).map_or(1.0, |s| f64::from(*s))
}

/// Norms each head, or all heads as one vector.
fn norm_heads(heads: &mut [f64], dim: usize, across: bool, norm: Option<&Norm<Vec<f32>>>) {
    let Some(norm) = norm else { return };
    let part = if across { heads.len() } else { dim };
    for head in heads.chunks_mut(part) {
        let x = head.to_vec();
        norm_row(&x, norm, head);
    }
}

/// The step's tokens: row, its index in the step, its position.
fn tokens(rows: &[BatchRow]) -> impl Iterator<Item = (&BatchRow, usize, usize)> {
    rows.iter().flat_map(|row| (0..row.len).map(move |t| (row, row.first + t, row.start + t)))
}

impl Reference {
    /// Where the elements of one head at one position lie.
    fn at(&self, spec: &AttentionSpec, slot: u32, position: usize, value: bool, head: usize) -> usize {
        let block = self.slots[slot as usize].tables[spec.group][position / BLOCK_TOKENS] as usize;
        let in_block = position % BLOCK_TOKENS;
        let keys = spec.kv_heads * BLOCK_TOKENS * spec.key_dim;
        let (layer, at) = match (spec.stored, value) {
            (Stored::KeysAndValues, false) => {
                (keys + keys / spec.key_dim * spec.value_dim, (head * BLOCK_TOKENS + in_block) * spec.key_dim)
            }
            (Stored::KeysAndValues, true) => (
                keys + keys / spec.key_dim * spec.value_dim,
                keys + (head * BLOCK_TOKENS + in_block) * spec.value_dim,
            ),
            (Stored::ValueInKey, _) => (keys, (head * BLOCK_TOKENS + in_block) * spec.key_dim),
        };
        block * self.page_elements + spec.layer_in_group * layer + at
    }

    fn store(
        &mut self,
        spec: &AttentionSpec,
        slot: u32,
        position: usize,
        value: bool,
        head: usize,
        x: &[f64],
    ) -> Result<()> {
        let at = self.at(spec, slot, position, value, head);
        if at < self.page_elements {
            return Err(fault("append", format!("slot {slot}, position {position}: no page")));
        }
        self.pages[at..at + x.len()].copy_from_slice(x);
        Ok(())
    }

    pub(super) fn append_rows(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, Vec<f32>>>,
        rope: Option<&RopeTable>,
        qkv: &mut Rows64,
    ) -> Result<()> {
        let width = qkv.width;
        let own = spec.appends || spec.visibility == Visibility::Whole;
        let q_width = spec.q_heads * spec.key_dim;
        let (k_width, v_width) =
            if own { (spec.kv_heads * spec.key_dim, spec.kv_heads * spec.value_dim) } else { (0, 0) };
        let across = norms.is_some_and(|n| n.across_heads);
        for (row, token, position) in tokens(&self.batch.rows.clone()) {
            let values = &mut qkv.data[token * width..][..width];
            let (q, rest) = values.split_at_mut(q_width);
            let (k, rest) = rest.split_at_mut(k_width);
            let v = &mut rest[..v_width];
            if let Some(norms) = norms {
                norm_heads(q, spec.key_dim, across, Some(norms.q));
                norm_heads(k, spec.key_dim, across, norms.k);
                norm_heads(v, spec.value_dim, false, norms.v);
            }
            if let Some(table) = rope {
                q.chunks_mut(spec.key_dim).for_each(|head| rotate(head, table, position));
                k.chunks_mut(spec.key_dim).for_each(|head| rotate(head, table, position));
                q.iter_mut().for_each(|q| *q *= query_scale(table, position));
            }
            if spec.appends {
                for (head, (k, v)) in k.chunks(spec.key_dim).zip(v.chunks(spec.value_dim)).enumerate() {
                    self.store(spec, row.slot.0, position, false, head, k)?;
                    self.store(spec, row.slot.0, position, true, head, v)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn append_shared_rows(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, Vec<f32>>,
        rope: &RopeTable,
        qk: &Rows64,
        q_out: &mut Rows64,
    ) -> Result<()> {
        let mut turned: Vec<usize> = pairs(rope).flat_map(|(a, b)| [a, b]).collect();
        turned.sort_unstable();
        if spec.key_dim != dim + turned.len() || spec.value_dim != dim {
            return Err(fault("append_shared", format!("{} is not {dim} + {}", spec.key_dim, turned.len())));
        }
        let key_norm = norms.k.ok_or_else(|| fault("append_shared", "keys have a norm"))?;
        let weight = |i: usize| {
            let w = key_norm.weight.as_ref().map(|w| f64::from(w[i]) + f64::from(key_norm.offset));
            w.unwrap_or(1.0)
        };
        self.fit(q_out, spec.q_heads * spec.key_dim)?;
        let width = q_out.width;
        for (row, token, position) in tokens(&self.batch.rows.clone()) {
            let input = &qk.data[token * qk.width..][..qk.width];
            let (queries, keys) = input.split_at(spec.q_heads * dim);
            let out = &mut q_out.data[token * width..][..width];
            for (q, out) in queries.chunks(dim).zip(out.chunks_mut(spec.key_dim)) {
                let mut q = q.to_vec();
                norm_heads(&mut q, dim, false, Some(norms.q));
                rotate(&mut q, rope, position);
                q.iter_mut().for_each(|q| *q *= query_scale(rope, position));
                for i in 0..dim {
                    out[i] = if turned.contains(&i) { 0.0 } else { q[i] * weight(i) };
                }
                for (o, &i) in out[dim..].iter_mut().zip(&turned) {
                    *o = q[i];
                }
            }
            for (head, k) in keys.chunks(dim).take(spec.kv_heads).enumerate() {
                let (mut key, mut stored) = (k.to_vec(), k.to_vec());
                norm_heads(&mut key, dim, false, Some(key_norm));
                rotate(&mut key, rope, position);
                norm_heads(&mut stored, dim, false, norms.v);
                stored.extend(turned.iter().map(|&i| key[i]));
                self.store(spec, row.slot.0, position, false, head, &stored)?;
            }
        }
        Ok(())
    }

    pub(super) fn append_latent_rows(
        &mut self,
        spec: &AttentionSpec,
        s: LatentShape,
        norm: &Norm<Vec<f32>>,
        rope: &RopeTable,
        (q, kv, q_out): (&Rows64, &Rows64, &mut Rows64),
    ) -> Result<()> {
        let width = q_out.width;
        for (row, token, position) in tokens(&self.batch.rows.clone()) {
            let input = &kv.data[token * kv.width..][..s.latent + s.rope];
            let mut stored = input.to_vec();
            norm_row(&input[..s.latent], norm, &mut stored[..s.latent]);
            rotate(&mut stored[s.latent..], rope, position);
            self.store(spec, row.slot.0, position, false, 0, &stored)?;
            let queries = q.data[token * q.width..][..q.width].chunks(s.nope + s.rope);
            let out = q_out.data[token * width..][..width].chunks_mut(s.latent + s.rope);
            for (q, out) in queries.zip(out) {
                out[s.latent..].copy_from_slice(&q[s.nope..]);
                rotate(&mut out[s.latent..], rope, position);
                out.iter_mut().for_each(|q| *q *= query_scale(rope, position));
            }
        }
        Ok(())
    }

    pub(super) fn attend(
        &self,
        spec: &AttentionSpec,
        sinks: Option<&Vec<f32>>,
        q: &Rows64,
        out: &mut Rows64,
    ) -> Result<()> {
        self.fit(out, spec.q_heads * spec.value_dim)?;
        let (q_width, k_width) = (spec.q_heads * spec.key_dim, spec.kv_heads * spec.key_dim);
        for (row, token, position) in tokens(&self.batch.rows) {
            let beside = |p: usize, at: usize, dim: usize| &q.data[(row.first + p) * q.width + at..][..dim];
            let key = |p: usize, head: usize| match spec.visibility {
                Visibility::Whole => beside(p, q_width + head * spec.key_dim, spec.key_dim),
                Visibility::Causal => {
                    &self.pages[self.at(spec, row.slot.0, p, false, head)..][..spec.key_dim]
                }
            };
            let value = |p: usize, head: usize| match spec.visibility {
                Visibility::Whole => beside(p, q_width + k_width + head * spec.value_dim, spec.value_dim),
                Visibility::Causal => {
                    &self.pages[self.at(spec, row.slot.0, p, true, head)..][..spec.value_dim]
                }
            };
            let last = match spec.visibility {
                Visibility::Causal => position,
                Visibility::Whole => row.len - 1,
            };
            let first = spec.window.map_or(0, |w| (position + 1).saturating_sub(w as usize));
            for head in 0..spec.q_heads {
                let kv = head / (spec.q_heads / spec.kv_heads);
                let q = &q.data[token * q.width + head * spec.key_dim..][..spec.key_dim];
                let score = |p: usize| {
                    let s = q.iter().zip(key(p, kv)).map(|(a, b)| a * b).sum::<f64>() * f64::from(spec.scale);
                    spec.soft_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
                };
                let scores: Vec<f64> = (first..=last).map(score).collect();
                let sink = sinks.map(|s| f64::from(s[head]));
                let largest = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                let weights = scores.iter().copied().chain(sink);
                let sum: f64 = weights.map(|s| (s - largest).exp()).sum();
                let o = &mut out.data[token * out.width + head * spec.value_dim..][..spec.value_dim];
                for (p, s) in (first..=last).zip(&scores) {
                    let share = (s - largest).exp() / sum;
                    o.iter_mut().zip(value(p, kv)).for_each(|(o, v)| *o += share * v);
                }
            }
        }
        Ok(())
    }
}
