//! Attention and the delta rule: from projected rows to the cache and back.
//!
//! Owns where queries, keys and values lie in rows, and what of them is stored. Never: the arithmetic, which is the
//! kernels'.

use mirai_model::backend::{
    AttentionSpec, DeltaRule, HeadNorms, HeadView, LatentShape, Norm, Pairing, Result, Rows, Stored,
    Visibility,
};

use super::{CpuBackend, expect_width, no_cache, norm_params};
use crate::buffer::{CpuBuffer, CpuRope, CpuVector};
use crate::linear::device;
use crate::rows::for_each_row;
use crate::simd::delta::{DeltaDims, DeltaParams, DeltaRow, delta_rule};
use crate::simd::ops::{self, Heads, Pairs, RopeTables};
use crate::simd::{
    AttnParams, AttnRow, KvData, KvDataMut, KvLayout, KvView, KvViewMut, PAGE_TOKENS, Place, kv_append,
    paged_attention,
};
use crate::stack::{CpuStack, Pick};

/// Buffers of this part of a step.
#[derive(Default)]
pub(super) struct Scratch {
    /// What is stored of each token, where it is not a part of the projected rows.
    stored: Vec<f32>,
    /// Normed and rotated copies.
    turned: Vec<f32>,
    /// Keys and values of sequences that lie whole in the step, as pages.
    pages: Vec<f32>,
    places: Vec<Place>,
}

/// `len` elements of a buffer whose old values mean nothing.
fn room(data: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if data.len() < len {
        data.resize(len, 0.0);
    }
    &mut data[..len]
}

/// Where the heads of q, k and v lie in rows `[q | k | v | ...]` of `stride`; layers that append nothing have q alone.
fn heads(spec: &AttentionSpec, stride: usize, operation: &'static str) -> Result<[Heads; 3]> {
    let (q, k) = (spec.q_heads * spec.key_dim, spec.kv_heads * spec.key_dim);
    let width = if spec.appends { q + k + spec.kv_heads * spec.value_dim } else { q };
    if width > stride {
        return Err(device(operation, format!("rows of {stride}, {width} are needed for {spec:?}")));
    }
    let at = |first: usize, heads: usize, head_dim: usize| Heads { stride, first, heads, head_dim };
    Ok([
        at(0, spec.q_heads, spec.key_dim),
        at(q, spec.kv_heads, spec.key_dim),
        at(q + k, spec.kv_heads, spec.value_dim),
    ])
}

fn tables(rope: &CpuRope) -> RopeTables<'_> {
    let CpuRope(table) = rope;
    let pairs = match table.pairing {
        Pairing::Halves => Pairs::Apart(table.rotary_dim / 2),
        Pairing::Adjacent => Pairs::Adjacent,
        Pairing::Apart(n) => Pairs::Apart(n),
    };
    RopeTables { rotary_dim: table.rotary_dim, pairs, cos: &table.cos, sin: &table.sin }
}

/// Checks that a head has room for what is rotated in it.
fn check_span(operation: &'static str, rope: &CpuRope, head_dim: usize) -> Result<()> {
    let [low, high] = tables(rope).rotated();
    if low.end <= high.start && high.end <= head_dim {
        return Ok(());
    }
    Err(device(operation, format!("elements {low:?} and {high:?} of heads of {head_dim} rotate")))
}

impl CpuBackend {
    fn check_positions(&self, operation: &'static str, rope: &CpuRope, head_dim: usize) -> Result<()> {
        check_span(operation, rope, head_dim)?;
        let positions = rope.0.cos.len() / (rope.0.rotary_dim / 2);
        match self.batch.positions.iter().find(|p| **p as usize >= positions) {
            Some(position) => {
                Err(device(operation, format!("position {position} of a table of {positions}")))
            }
            None => Ok(()),
        }
    }

    /// Norms heads in place, each its own or all of a token as one.
    fn norm_heads(
        &self,
        x: &mut [f32],
        place: Heads,
        norm: &Norm<CpuVector>,
        joined: bool,
        rows: usize,
    ) -> Result<()> {
        let place = if joined { place.joined() } else { place };
        let norm = norm_params(norm, place.head_dim, "append")?;
        ops::head_norm(&self.pool, self.isa, x, place, rows, norm);
        Ok(())
    }

    /// Multiplies queries with the factors of their positions, where there are such.
    fn scale_queries(&self, rope: &CpuRope, x: &mut [f32], q: Heads) {
        if !rope.0.q_scale.is_empty() {
            ops::scale_heads(&self.pool, x, q, &self.batch.positions, &rope.0.q_scale);
        }
    }

    pub(super) fn append_rows(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, CpuVector>>,
        rope: Option<&CpuRope>,
        qkv: &mut CpuBuffer,
    ) -> Result<()> {
        let rows = self.live(qkv.kind());
        let [q, k, v] = heads(spec, qkv.width(), "append")?;
        let qkv = qkv.update("append", rows)?;
        if let Some(norms) = norms {
            self.norm_heads(qkv, q, norms.q, norms.across_heads, rows)?;
            if let (true, Some(norm)) = (spec.appends, norms.k) {
                self.norm_heads(qkv, k, norm, norms.across_heads, rows)?;
            }
            if let (true, Some(norm)) = (spec.appends, norms.v) {
                self.norm_heads(qkv, v, norm, false, rows)?;
            }
        }
        if let Some(rope) = rope {
            self.check_positions("append", rope, spec.key_dim)?;
            let all = if spec.appends { q.heads + k.heads } else { q.heads };
            let both = Heads { heads: all, ..q };
            ops::rope(&self.pool, self.isa, qkv, both, &self.batch.positions, tables(rope));
            self.scale_queries(rope, qkv, q);
        }
        if spec.appends && spec.visibility == Visibility::Causal {
            if spec.stored == Stored::ValueInKey {
                let message = "keys and values of their own go where values are in the keys".to_owned();
                return Err(device("append", message));
            }
            self.store(spec, (qkv, k), Some((qkv, v)))?;
        }
        Ok(())
    }

    /// Writes keys and values of all rows into the pages.
    fn store(&mut self, spec: &AttentionSpec, k: (&[f32], Heads), v: Option<(&[f32], Heads)>) -> Result<()> {
        let mut pages = self.cache.as_mut().ok_or_else(no_cache)?.view_mut(spec)?;
        for row in &self.batch.rows {
            let table = &self.slots.get(row.slot)?.tables[spec.group];
            kv_append(&mut pages, k, v, row.first..row.first + row.len, row.start, table);
        }
        Ok(())
    }

    pub(super) fn append_shared_rows(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, CpuVector>,
        rope: &CpuRope,
        qk: &CpuBuffer,
        q_out: &mut CpuBuffer,
    ) -> Result<()> {
        const NAME: &str = "append_shared";
        let rows = self.live(qk.kind());
        let (stride, rotary) = (qk.width(), rope.0.rotary_dim);
        let shape = (spec.key_dim, spec.value_dim, spec.stored);
        if shape != (dim + rotary, dim, Stored::ValueInKey) || (spec.q_heads + spec.kv_heads) * dim > stride {
            let message = format!("heads of {dim} in rows of {stride}, {rotary} rotated, for {spec:?}");
            return Err(device(NAME, message));
        }
        self.check_positions(NAME, rope, dim)?;
        let (Some(k_norm), false) = (norms.k, norms.across_heads) else {
            return Err(device(NAME, "a norm of each key head is needed".to_owned()));
        };
        let q = Heads { stride, first: 0, heads: spec.q_heads, head_dim: dim };
        let k = Heads { first: spec.q_heads * dim, heads: spec.kv_heads, ..q };
        let projected = qk.read(NAME, rows)?;
        let mut scratch = std::mem::take(&mut self.attend);

        // Normed and rotated queries and keys, as any other layer has them.
        let turned = room(&mut scratch.turned, projected.len());
        turned.copy_from_slice(projected);
        self.norm_heads(turned, q, norms.q, false, rows)?;
        self.norm_heads(turned, k, k_norm, false, rows)?;
        let both = Heads { heads: q.heads + k.heads, ..q };
        let tables = tables(rope);
        ops::rope(&self.pool, self.isa, turned, both, &self.batch.positions, tables);
        self.scale_queries(rope, turned, q);

        // What is stored: the value, then what is rotated of the key.
        let key_width = spec.kv_heads * spec.key_dim;
        let stored = room(&mut scratch.stored, rows * key_width);
        let parts = tables.rotated();
        let place = Heads::contiguous(spec.kv_heads, spec.key_dim);
        for_each_row(&self.pool, stored, key_width, &|row, out| {
            for (head, out) in out.chunks_exact_mut(spec.key_dim).enumerate() {
                out[..dim].copy_from_slice(k.of(projected, row, head));
                copy_parts(&parts, k.of(turned, row, head), &mut out[dim..]);
            }
        });
        let values = Heads { stride: key_width, first: 0, heads: 1, head_dim: dim };
        if let Some(norm) = norms.v {
            for head in 0..spec.kv_heads {
                let values = Heads { first: head * spec.key_dim, ..values };
                self.norm_heads(stored, values, norm, false, rows)?;
            }
        }

        // Queries with the weights of the keys' norm on what is not rotated.
        let weights = norm_params(k_norm, dim, NAME)?;
        let q_width = spec.q_heads * spec.key_dim;
        let out = q_out.write(NAME, rows, q_width)?;
        for_each_row(&self.pool, out, q_width, &|row, out| {
            for (head, out) in out.chunks_exact_mut(spec.key_dim).enumerate() {
                let from = q.of(turned, row, head);
                out[..dim].copy_from_slice(from);
                if let Some(weight) = weights.weight {
                    let scaled = out[..dim].iter_mut().zip(weight);
                    scaled.for_each(|(x, w)| *x *= w + weights.offset);
                }
                parts.iter().for_each(|part| out[part.clone()].fill(0.0));
                copy_parts(&parts, from, &mut out[dim..]);
            }
        });
        let done = self.store(spec, (stored, place), None);
        self.attend = scratch;
        done
    }

    pub(super) fn append_latent_rows(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<CpuVector>,
        rope: &CpuRope,
        (q, kv, q_out): (&CpuBuffer, &CpuBuffer, &mut CpuBuffer),
    ) -> Result<()> {
        const NAME: &str = "append_latent";
        let rows = self.live(q.kind());
        let (width, head) = (shape.latent + shape.rope, shape.nope + shape.rope);
        expect_width(NAME, kv.width(), width)?;
        expect_width(NAME, q.width(), spec.q_heads * head)?;
        expect_width(NAME, q_out.width(), spec.q_heads * width)?;
        expect_width(NAME, rope.0.rotary_dim, shape.rope)?;
        let found = (spec.kv_heads, spec.key_dim, spec.value_dim, spec.stored);
        if found != (1, width, shape.latent, Stored::ValueInKey) {
            return Err(device(NAME, format!("{shape:?} for {spec:?}")));
        }
        self.check_positions(NAME, rope, shape.rope)?;
        let mut scratch = std::mem::take(&mut self.attend);
        let stored = room(&mut scratch.stored, rows * width);
        stored.copy_from_slice(kv.read(NAME, rows)?);
        let latent = Heads { stride: width, first: 0, heads: 1, head_dim: shape.latent };
        self.norm_heads(stored, latent, norm, false, rows)?;
        let turned = Heads { first: shape.latent, head_dim: shape.rope, ..latent };
        ops::rope(&self.pool, self.isa, stored, turned, &self.batch.positions, tables(rope));

        let q = q.read(NAME, rows)?;
        let out = q_out.update(NAME, rows)?;
        let from = Heads::contiguous(spec.q_heads, head);
        for_each_row(&self.pool, out, spec.q_heads * width, &|row, out| {
            for (head, out) in out.chunks_exact_mut(width).enumerate() {
                out[shape.latent..].copy_from_slice(&from.of(q, row, head)[shape.nope..]);
            }
        });
        // As rows of one head each, because rotated parts are not back to back.
        let positions: Vec<u32> =
            self.batch.positions.iter().flat_map(|p| std::iter::repeat_n(*p, spec.q_heads)).collect();
        ops::rope(&self.pool, self.isa, out, turned, &positions, tables(rope));
        self.scale_queries(rope, out, Heads::contiguous(spec.q_heads, width));
        let done = self.store(spec, (stored, Heads::contiguous(1, width)), None);
        self.attend = scratch;
        done
    }

    pub(super) fn multiply_heads(
        &mut self,
        w: &CpuStack,
        (x, from): (&CpuBuffer, HeadView),
        (out, to): (&mut CpuBuffer, HeadView),
        width: usize,
    ) -> Result<()> {
        const NAME: &str = "head_linear";
        let (rows, count) = (self.live(x.kind()), w.len());
        let end = |view: HeadView| view.first + (count - 1) * view.stride + view.width;
        let fits = end(from) <= x.width() && end(to) <= width && to.width <= to.stride.max(width);
        if !fits || (from.width, to.width) != (w.columns(), w.rows()) || (count > 1 && to.stride < to.width) {
            let message = format!(
                "{count} heads of {} x {} from {from:?} of {} to {to:?} of {width}",
                w.rows(),
                w.columns(),
                x.width()
            );
            return Err(device(NAME, message));
        }
        let (x_width, x) = (x.width(), x.read(NAME, rows)?);
        let out = out.write(NAME, rows, width)?;
        let places = &mut self.attend.places;
        places.clear();
        for head in 0..count {
            places.extend((0..rows).map(|row| Place {
                x: row * x_width + from.first + head * from.stride,
                out: row * width + to.first + head * to.stride,
            }));
        }
        if rows == 0 {
            return Ok(());
        }
        let picks: Vec<_> =
            places.chunks_exact(rows).enumerate().map(|(index, rows)| Pick { index, rows }).collect();
        w.multiply(&self.pool, &picks, x, out, &mut self.linear)
    }

    pub(super) fn attend(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&CpuVector>,
        q: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        const NAME: &str = "attention";
        let (rows, stride) = (self.live(q.kind()), q.width());
        if spec.q_heads * spec.key_dim > stride {
            return Err(device(NAME, format!("rows of {stride} for {spec:?}")));
        }
        let queries = Heads { stride, first: 0, heads: spec.q_heads, head_dim: spec.key_dim };
        let params = AttnParams {
            q_heads: spec.q_heads,
            scale: spec.scale,
            causal: spec.visibility == Visibility::Causal,
            window: spec.window.map(|n| n as usize),
            soft_cap: spec.soft_cap,
            sinks: sinks.map(CpuVector::values),
        };
        let out = out.write(NAME, rows, spec.q_heads * spec.value_dim)?;
        let data = q.read(NAME, rows)?;
        if spec.visibility == Visibility::Whole {
            let [_, k, v] = heads(spec, stride, NAME)?;
            return self.attend_whole(&params, data, [queries, k, v], out);
        }
        let pages = self.cache.as_ref().ok_or_else(no_cache)?.view(spec)?;
        let batch = &self.batch;
        let sequences = batch.rows.iter().map(|row| {
            let table = self.slots.get(row.slot)?.tables[spec.group].as_slice();
            Ok(AttnRow { q_start: row.first, q_len: row.len, kv_len: row.start + row.len, table })
        });
        let sequences = sequences.collect::<Result<Vec<_>>>()?;
        paged_attention(&self.pool, self.isa, data, queries, pages, &sequences, &params, out);
        Ok(())
    }

    /// Attention over sequences that lie whole in the step. Their keys and values are laid out as pages first, a copy
    /// that costs little beside the products.
    fn attend_whole(
        &mut self,
        params: &AttnParams<'_>,
        x: &[f32],
        [q, k, v]: [Heads; 3],
        out: &mut [f32],
    ) -> Result<()> {
        if let Some(row) = self.batch.rows.iter().find(|row| row.start != 0) {
            let message = format!("a sequence that must be whole begins at position {}", row.start);
            return Err(device("attention", message));
        }
        let mut layout = KvLayout {
            kv_heads: k.heads,
            head_dim: k.head_dim,
            v_head_dim: v.head_dim,
            value_in_key: false,
            first: 0,
            page_stride: 0,
        };
        layout.page_stride = layout.page_elements();
        let blocks = |row: &mirai_model::backend::BatchRow| row.len.div_ceil(PAGE_TOKENS);
        let count: usize = self.batch.rows.iter().map(blocks).sum();
        let table: Vec<u32> = (0..count as u32).collect();
        let data = room(&mut self.attend.pages, count * layout.page_stride);
        let mut pages = KvViewMut { data: KvDataMut::F32(data), layout };
        let mut sequences = Vec::with_capacity(self.batch.rows.len());
        let mut rest = table.as_slice();
        for row in &self.batch.rows {
            let (table, others) = rest.split_at(blocks(row));
            rest = others;
            kv_append(&mut pages, (x, k), Some((x, v)), row.first..row.first + row.len, 0, table);
            sequences.push(AttnRow { q_start: row.first, q_len: row.len, kv_len: row.len, table });
        }
        let pages = KvView { data: KvData::F32(&self.attend.pages), layout };
        paged_attention(&self.pool, self.isa, x, q, pages, &sequences, params, out);
        Ok(())
    }

    pub(super) fn run_delta_rule(
        &mut self,
        rule: &DeltaRule<'_, CpuVector>,
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        const NAME: &str = "delta_rule";
        let s = rule.shape;
        let dims = DeltaDims {
            k_heads: s.k_heads,
            v_heads: s.v_heads,
            k_dim: s.k_dim,
            v_dim: s.v_dim,
            taps: s.taps,
        };
        expect_width(NAME, x.width(), s.in_width())?;
        expect_width(NAME, rule.conv.values().len(), s.conv_width() * s.taps)?;
        expect_width(NAME, rule.a_log.values().len(), s.v_heads)?;
        expect_width(NAME, rule.dt_bias.values().len(), s.v_heads)?;
        let rows = self.live(Rows::Tokens);
        let params = DeltaParams {
            conv: rule.conv.transposed(s.taps),
            a_log: rule.a_log.values(),
            dt_bias: rule.dt_bias.values(),
            norm: norm_params(rule.norm, s.v_dim, NAME)?,
        };
        let states = self.cache.as_mut().ok_or_else(no_cache)?.group_states(rule.group)?;
        let (states, starts) = states.layer(rule, self.batch.rows.iter().map(|row| row.slot))?;
        let sequences: Vec<_> = (self.batch.rows.iter().zip(starts))
            .map(|(row, state)| DeltaRow { first: row.first, len: row.len, state })
            .collect();
        let out = out.write(NAME, rows, s.v_heads * s.v_dim)?;
        let x = x.read(NAME, rows)?;
        delta_rule(&self.pool, self.isa, dims, params, x, &sequences, states, out);
        Ok(())
    }
}

/// Copies some parts of a head, back to back.
fn copy_parts(parts: &[std::ops::Range<usize>; 2], from: &[f32], to: &mut [f32]) {
    let (low, high) = to.split_at_mut(parts[0].len());
    low.copy_from_slice(&from[parts[0].clone()]);
    high.copy_from_slice(&from[parts[1].clone()]);
}
