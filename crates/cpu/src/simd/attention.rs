//! Attention over the paged KV cache for a ragged batch.
//!
//! Owns: the running softmax and how queries are cut into tiles. Never: the pages' layout (that is `kv`), nor which page
//! belongs to whom.
//!
//! A work item is a tile of query rows of one sequence and kv head (a row is a token and one of the query heads that
//! share the kv head, tokens outermost). It runs over the context in chunks that start at fixed positions, with a running maximum; a key that a query may not see adds
//! exactly nothing. So the result of a query depends only on its own position and keys, not on its tile.

use super::Isa;
use super::kv::{Element, KvData, KvLayout, KvView, PAGE_TOKENS};
use super::lanes::{Kernel, LANES, Simd};
use super::ops::Heads;
use super::shared::SharedMut;
use crate::pool::Pool;
use half::slice::HalfFloatSliceExt;
use std::cell::RefCell;

/// Pages between two updates of the running maximum.
const CHUNK_PAGES: usize = 8;
/// Keys of a chunk.
const CHUNK: usize = CHUNK_PAGES * PAGE_TOKENS;
/// Most query rows of a tile.
const TILE_ROWS: usize = 24;

/// The queries of one sequence in a ragged batch.
#[derive(Debug, Clone, Copy)]
pub struct AttnRow<'a> {
    /// Index of its first query token in the batch.
    pub q_start: usize,
    /// Its query tokens.
    pub q_len: usize,
    /// Keys that its last query token sees: start + `q_len`.
    pub kv_len: usize,
    /// Block ids; position p lies in block `table[p / 16]`.
    pub table: &'a [u32],
}

/// What all rows of a layer share.
#[derive(Debug, Clone, Copy)]
pub struct AttnParams<'a> {
    /// Query heads, a multiple of the layout's kv heads.
    pub q_heads: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Whether a query sees only keys at or before its own position; otherwise all `kv_len`.
    pub causal: bool,
    /// A query at p sees p - n + 1 ..= p.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// One logit a query head that takes part in the softmax and has no value.
    pub sinks: Option<&'a [f32]>,
}

/// Buffers of one thread; they grow to the largest tile and stay.
#[derive(Default)]
struct Buffers {
    /// Queries times scale, in blocks of some rows: `[dim][rows of the block]`.
    q: Vec<f32>,
    /// Keys of a page, `[dim][16]`.
    keys: Vec<[f32; LANES]>,
    /// `[rows][CHUNK]`: scores, then weights.
    scores: Vec<[f32; LANES]>,
    /// `[rows][values padded to whole strips]`.
    out: Vec<[f32; LANES]>,
    rows: Vec<RowState>,
}

/// Softmax of one query row so far.
#[derive(Clone, Copy)]
struct RowState {
    /// First key it sees.
    from: usize,
    /// One past the last key it sees.
    to: usize,
    max: f32,
    sum: f32,
    /// What the sums so far are multiplied by before the chunk is added.
    factor: f32,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// One call of [`paged_attention`].
struct Call<'a, E> {
    data: &'a [E],
    layout: KvLayout,
    q: &'a [f32],
    q_heads: Heads,
    rows: &'a [AttnRow<'a>],
    params: &'a AttnParams<'a>,
    out: SharedMut<'a, f32>,
}

/// A tile of a call: some query rows of a sequence and kv head.
struct Item<'a, E> {
    call: &'a Call<'a, E>,
    row: &'a AttnRow<'a>,
    kv_head: usize,
    /// First query row of the tile.
    first: usize,
    /// Query rows.
    height: usize,
    buffers: &'a mut Buffers,
}

/// Query rows of a tile where `group` query heads share a kv head: whole tokens if they fit, else equal parts of one.
fn tile_rows(group: usize) -> usize {
    if group <= TILE_ROWS { TILE_ROWS / group * group } else { group.div_ceil(group.div_ceil(TILE_ROWS)) }
}

/// `out[t] = softmax(q[t] * K^T * scale) * V` for every query token and head of the batch. `q` holds the queries as
/// `q_heads` says; `out` is `[tokens, q_heads, v_head_dim]`. Tokens that no row names are left alone.
///
/// # Panics
/// When shapes, tables or slices do not fit together.
#[allow(clippy::too_many_arguments)] // one more than the lint allows, and none of them optional
pub fn paged_attention(
    pool: &Pool,
    isa: Isa,
    q: &[f32],
    q_heads: Heads,
    cache: KvView<'_>,
    rows: &[AttnRow<'_>],
    params: &AttnParams<'_>,
    out: &mut [f32],
) {
    let layout = cache.layout;
    check_call(q, q_heads, &layout, rows, params, out);
    match cache.data {
        KvData::Bf16(data) => {
            let data = data.reinterpret_cast();
            Call { data, layout, q, q_heads, rows, params, out: SharedMut::new(out) }.run(pool, isa);
        }
        KvData::F32(data) => {
            Call { data, layout, q, q_heads, rows, params, out: SharedMut::new(out) }.run(pool, isa);
        }
    }
}

fn check_call(
    q: &[f32],
    heads: Heads,
    layout: &KvLayout,
    rows: &[AttnRow<'_>],
    params: &AttnParams<'_>,
    out: &[f32],
) {
    let (hq, hkv) = (params.q_heads, layout.kv_heads);
    assert!(hkv > 0 && hq.is_multiple_of(hkv), "{hq} query heads for {hkv} kv heads");
    assert!(heads.heads == hq, "{} heads in q, {hq} asked for", heads.heads);
    assert!(heads.head_dim == layout.head_dim, "q has {} a head, K {}", heads.head_dim, layout.head_dim);
    assert!(params.window != Some(0), "a window of 0 keys");
    let (key, value) = (layout.head_dim, layout.v_head_dim);
    assert!(!layout.value_in_key || value <= key, "values of {value} in keys of {key}");
    if let Some(sinks) = params.sinks {
        assert!(sinks.len() == hq, "{} sinks for {hq} query heads", sinks.len());
    }
    let mut end = 0;
    for row in rows {
        assert!(row.q_start >= end, "rows overlap at token {}", row.q_start);
        assert!(row.kv_len >= row.q_len, "{} queries over {} keys", row.q_len, row.kv_len);
        assert!(
            row.table.len() * PAGE_TOKENS >= row.kv_len,
            "a table of {} blocks for {} keys",
            row.table.len(),
            row.kv_len
        );
        end = row.q_start + row.q_len;
    }
    heads.check(q.len(), end);
    assert!(
        out.len() >= end * hq * layout.v_head_dim,
        "output of {} values for {end} tokens of {hq} x {}",
        out.len(),
        layout.v_head_dim
    );
}

impl<E: Element> Call<'_, E> {
    fn run(&self, pool: &Pool, isa: Isa) {
        let heads = self.layout.kv_heads;
        let group = self.params.q_heads / heads;
        let tile = tile_rows(group);
        let items = |row: &AttnRow<'_>| (row.q_len * group).div_ceil(tile) * heads;
        let total = self.rows.iter().map(items).sum::<usize>();
        let chunk = total.div_ceil(pool.threads() * 32);
        pool.chunks(total, chunk, &|_, range| {
            BUFFERS.with_borrow_mut(|buffers| {
                let mut first = 0;
                for row in self.rows {
                    let count = items(row);
                    for item in range.start.max(first)..range.end.min(first + count) {
                        let (start, kv_head) = ((item - first) / heads * tile, (item - first) % heads);
                        let height = tile.min(row.q_len * group - start);
                        isa.run(Item { call: self, row, kv_head, first: start, height, buffers });
                    }
                    first += count;
                }
            });
        });
    }
}

impl<E: Element> Kernel for Item<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.prepare::<S>();
        let (from, to) = self
            .buffers
            .rows
            .iter()
            .fold((usize::MAX, 0), |(from, to), row| (from.min(row.from), to.max(row.to)));
        let mut start = from / CHUNK * CHUNK;
        while start < to {
            let first_page = start.max(from) / PAGE_TOKENS;
            let end = to.min(start + CHUNK);
            self.scores(s, first_page, end);
            self.weights(s, first_page % CHUNK_PAGES, (end - start).div_ceil(PAGE_TOKENS));
            self.values(s, first_page * PAGE_TOKENS, end);
            start += CHUNK;
        }
        self.finish();
    }
}

/// Calls `$f::<S, N>($args)` for the block height `$rows`.
macro_rules! for_height {
    ($rows:expr, $self:ident.$f:ident($($arg:expr),*)) => {
        match $rows {
            1 => $self.$f::<S, 1>($($arg),*),
            2 => $self.$f::<S, 2>($($arg),*),
            3 => $self.$f::<S, 3>($($arg),*),
            4 => $self.$f::<S, 4>($($arg),*),
            5 => $self.$f::<S, 5>($($arg),*),
            6 => $self.$f::<S, 6>($($arg),*),
            7 => $self.$f::<S, 7>($($arg),*),
            _ => $self.$f::<S, 8>($($arg),*),
        }
    };
}

impl<E: Element> Item<'_, E> {
    /// Query heads to a kv head.
    #[inline(always)]
    fn group(&self) -> usize {
        self.call.params.q_heads / self.call.layout.kv_heads
    }

    /// Token of the sequence's row, and query head, of a row of the tile.
    #[inline(always)]
    fn place(&self, row: usize) -> (usize, usize) {
        let (group, row) = (self.group(), self.first + row);
        (row / group, self.kv_head * group + row % group)
    }

    /// Vectors of a row of `out`.
    #[inline(always)]
    fn out_vectors(&self) -> usize {
        self.call.layout.v_head_dim.div_ceil(2 * LANES) * 2
    }

    /// Rows of the register block that starts at `row`.
    #[inline(always)]
    fn block<S: Simd>(&self, row: usize) -> usize {
        S::MAX_ROWS.min(8).min(self.height - row)
    }

    /// Gathers the queries and resets the state of each row.
    #[inline(always)]
    fn prepare<S: Simd>(&mut self) {
        let (call, height) = (self.call, self.height);
        let (dim, params) = (call.layout.head_dim, call.params);
        let out_vectors = self.out_vectors();
        let b = &mut *self.buffers;
        b.q.resize(height * dim, 0.0);
        b.keys.resize(dim, [0.0; LANES]);
        b.scores.resize(height * CHUNK_PAGES, [0.0; LANES]);
        b.out.clear();
        b.out.resize(height * out_vectors, [0.0; LANES]);
        b.rows.clear();
        for r in 0..height {
            let (token, head) = self.place(r);
            let position = self.row.kv_len - self.row.q_len + token;
            let to = if params.causal { position + 1 } else { self.row.kv_len };
            let from = params.window.map_or(0, |n| (position + 1).saturating_sub(n));
            let sink = params.sinks.map(|sinks| sinks[head]);
            let (max, sum) = sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
            self.buffers.rows.push(RowState { from, to, max, sum, factor: 1.0 });
        }
        let mut start = 0;
        while start < height {
            let rows = S::MAX_ROWS.min(8).min(height - start);
            for r in 0..rows {
                let (token, head) = self.place(start + r);
                let q = call.q_heads.of(call.q, self.row.q_start + token, head);
                for (to, q) in self.buffers.q[start * dim + r..].iter_mut().step_by(rows).zip(q) {
                    *to = q * params.scale;
                }
            }
            start += rows;
        }
    }

    /// Scores of all rows against the keys from page `page` to key `end`, all of one chunk.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, s: S, page: usize, end: usize) {
        let layout = self.call.layout;
        for page in page..end.div_ceil(PAGE_TOKENS) {
            let at = layout.keys(self.row.table[page], self.kv_head);
            let tile = &self.call.data[at..at + PAGE_TOKENS * layout.head_dim];
            // The values of this page and the keys of the next come from memory: ask while the products run.
            if !layout.value_in_key {
                let at = layout.values(self.row.table[page], self.kv_head);
                prefetch(s, &self.call.data[at..at + PAGE_TOKENS * layout.v_head_dim]);
            }
            if let Some(&next) = self.row.table.get(page + 1) {
                let at = layout.keys(next, self.kv_head);
                prefetch(s, &self.call.data[at..at + PAGE_TOKENS * layout.head_dim]);
            }
            E::transpose(s, tile, layout.head_dim, &mut self.buffers.keys);
            let mut row = 0;
            while row < self.height {
                let rows = self.block::<S>(row);
                for_height!(rows, self.score_block(s, row, page));
                row += rows;
            }
        }
    }

    /// Scores of `N` rows against one page.
    #[inline(always)]
    fn score_block<S: Simd, const N: usize>(&mut self, s: S, row: usize, page: usize) {
        let dim = self.call.layout.head_dim;
        let b = &mut *self.buffers;
        let mut acc = [s.splat(0.0); N];
        let q = b.q[row * dim..(row + N) * dim].as_chunks::<N>().0;
        for (key, q) in b.keys.iter().zip(q) {
            let key = s.load(key);
            for r in 0..N {
                acc[r] = s.fma(key, s.splat(q[r]), acc[r]);
            }
        }
        let start = page * PAGE_TOKENS;
        for (r, &score) in acc.iter().enumerate() {
            let state = b.rows[row + r];
            let score = match self.call.params.soft_cap {
                Some(cap) => s.mul(s.splat(cap), s.tanh(s.mul(score, s.splat(1.0 / cap)))),
                None => score,
            };
            let from = state.from.saturating_sub(start).min(LANES);
            let to = state.to.saturating_sub(start).min(LANES);
            let score = s.keep(score, from, to, f32::NEG_INFINITY);
            s.store(score, &mut b.scores[(row + r) * CHUNK_PAGES + page % CHUNK_PAGES]);
        }
    }

    /// Turns the scores of pages `from..to` of the chunk into weights, and updates maximum and sum.
    #[inline(always)]
    fn weights<S: Simd>(&mut self, s: S, from: usize, to: usize) {
        let b = &mut *self.buffers;
        for (row, scores) in b.rows.iter_mut().zip(b.scores.as_chunks_mut::<CHUNK_PAGES>().0) {
            let scores = &mut scores[from..to];
            let mut largest = s.splat(f32::NEG_INFINITY);
            for score in &*scores {
                largest = s.max(largest, s.load(score));
            }
            let chunk_max = s.largest(largest);
            let max = if row.max >= chunk_max { row.max } else { chunk_max };
            // A row that has seen no key yet: any finite number keeps the differences defined.
            let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let mut sum = s.splat(0.0);
            for score in scores {
                let weight = s.exp(s.sub(s.load(score), s.splat(base)));
                sum = s.add(sum, weight);
                s.store(weight, score);
            }
            let mut factor = [0.0; LANES];
            s.store(s.exp(s.splat(row.max - base)), &mut factor);
            row.factor = factor[0];
            row.max = max;
            row.sum = row.sum * row.factor + s.sum(sum);
        }
    }

    /// Adds the weighted values of keys `from..to`, all of one chunk.
    #[inline(always)]
    fn values<S: Simd>(&mut self, s: S, from: usize, to: usize) {
        let mut row = 0;
        while row < self.height {
            let rows = self.block::<S>(row);
            for_height!(rows, self.value_block(s, row, from, to));
            row += rows;
        }
    }

    /// The same for `N` rows, in strips of two vectors.
    #[inline(always)]
    fn value_block<S: Simd, const N: usize>(&mut self, s: S, row: usize, from: usize, to: usize) {
        let (layout, vectors) = (self.call.layout, self.out_vectors());
        let (dim, stride) = (layout.v_head_dim, layout.value_stride());
        let b = &mut *self.buffers;
        let weights: [&[f32]; N] = std::array::from_fn(|r| {
            b.scores[(row + r) * CHUNK_PAGES..(row + r + 1) * CHUNK_PAGES].as_flattened()
        });
        for strip in (0..vectors).step_by(2) {
            let mut acc = [[s.splat(0.0); 2]; N];
            for r in 0..N {
                let factor = s.splat(b.rows[row + r].factor);
                let at = (row + r) * vectors + strip;
                acc[r] = [s.mul(s.load(&b.out[at]), factor), s.mul(s.load(&b.out[at + 1]), factor)];
            }
            let mut start = from;
            while start < to {
                let page = layout.values(self.row.table[start / PAGE_TOKENS], self.kv_head);
                let tile = &self.call.data[page..page + PAGE_TOKENS * stride];
                let keys = PAGE_TOKENS.min(to - start);
                let at = start % CHUNK;
                let weights: [&[f32]; N] = std::array::from_fn(|r| &weights[r][at..at + keys]);
                for (key, values) in tile.chunks_exact(stride).take(keys).enumerate() {
                    let v = load_strip(s, &values[..dim], strip * LANES);
                    for r in 0..N {
                        let weight = s.splat(weights[r][key]);
                        acc[r][0] = s.fma(v[0], weight, acc[r][0]);
                        acc[r][1] = s.fma(v[1], weight, acc[r][1]);
                    }
                }
                start += keys;
            }
            for r in 0..N {
                let at = (row + r) * vectors + strip;
                s.store(acc[r][0], &mut b.out[at]);
                s.store(acc[r][1], &mut b.out[at + 1]);
            }
        }
    }

    /// Divides by the sums and writes the result.
    #[inline(always)]
    fn finish(&mut self) {
        let dim = self.call.layout.v_head_dim;
        let vectors = self.out_vectors();
        for (r, state) in self.buffers.rows.iter().enumerate() {
            let (token, head) = self.place(r);
            let at = ((self.row.q_start + token) * self.call.params.q_heads + head) * dim;
            // SAFETY: a token's head belongs to one tile, and rows of the batch do not overlap (checked).
            let to = unsafe { self.call.out.range(at..at + dim) };
            let from = self.buffers.out[r * vectors..(r + 1) * vectors].as_flattened();
            for (to, from) in to.iter_mut().zip(from) {
                *to = from / state.sum;
            }
        }
    }
}

/// Asks for all cache lines of a tile.
#[inline(always)]
fn prefetch<S: Simd, E>(s: S, tile: &[E]) {
    for line in tile.chunks(64 / size_of::<E>()) {
        s.prefetch(&line[0], 0);
    }
}

/// Elements `at..at + 32` of a value; zero beyond its end.
#[inline(always)]
fn load_strip<S: Simd, E: Element>(s: S, values: &[E], at: usize) -> [S::F; 2] {
    if let Some(both) = values[at..].first_chunk::<{ 2 * LANES }>() {
        let (halves, _) = both.as_chunks::<LANES>();
        return [E::load(s, &halves[0]), E::load(s, &halves[1])];
    }
    let mut padded = [[E::default(); LANES]; 2];
    padded.as_flattened_mut()[..values.len() - at].copy_from_slice(&values[at..]);
    [E::load(s, &padded[0]), E::load(s, &padded[1])]
}
