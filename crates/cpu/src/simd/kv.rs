//! The paged KV cache of one layer: where keys and values lie, and writing new ones.
//!
//! Owns: the pages' inner layout `[K|V][kv_head][16][head_dim]` (or `[K][...]` alone, where a value is the beginning of
//! its key) and the element types. Never: which page belongs to whom.

use super::Isa;
use super::lanes::{Kernel, LANES, Simd};
use super::ops::Heads;
use half::bf16;
use half::slice::HalfFloatSliceExt;

/// Tokens of a page.
pub const PAGE_TOKENS: usize = LANES;
/// One layer's pages, to read.
#[derive(Debug, Clone, Copy)]
pub enum KvData<'a> {
    /// bfloat16 elements.
    Bf16(&'a [bf16]),
    /// f32 elements.
    F32(&'a [f32]),
}

/// One layer's pages, to write.
#[derive(Debug)]
pub enum KvDataMut<'a> {
    /// bfloat16 elements.
    Bf16(&'a mut [bf16]),
    /// f32 elements.
    F32(&'a mut [f32]),
}

/// Where a layer's keys and values lie: block `b` starts at element `first + b * page_stride`; there are first
/// `kv_heads` tiles `[16][head_dim]` of keys, then as many `[16][v_head_dim]` of values unless those are in the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Key (and value) heads.
    pub kv_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub v_head_dim: usize,
    /// Whether a value is not stored, because it is the first `v_head_dim` elements of its key.
    pub value_in_key: bool,
    /// Element of the slice where the layer's part of block 0 starts.
    pub first: usize,
    /// Elements from a block to the next.
    pub page_stride: usize,
}

/// One layer's pages with their layout.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    /// Elements.
    pub data: KvData<'a>,
    /// Where they lie.
    pub layout: KvLayout,
}

/// One layer's pages with their layout, to write.
#[derive(Debug)]
pub struct KvViewMut<'a> {
    /// Elements.
    pub data: KvDataMut<'a>,
    /// Where they lie.
    pub layout: KvLayout,
}

impl KvLayout {
    /// Elements of a layer's part of a page.
    #[must_use]
    pub fn page_elements(&self) -> usize {
        let value = if self.value_in_key { 0 } else { self.v_head_dim };
        self.kv_heads * PAGE_TOKENS * (self.head_dim + value)
    }

    /// Elements from a token's value to the next token's.
    pub(crate) fn value_stride(&self) -> usize {
        if self.value_in_key { self.head_dim } else { self.v_head_dim }
    }

    /// First element of a head's keys in a block.
    pub(crate) fn keys(&self, block: u32, head: usize) -> usize {
        self.first + block as usize * self.page_stride + head * PAGE_TOKENS * self.head_dim
    }

    /// First element of a head's values in a block.
    pub(crate) fn values(&self, block: u32, head: usize) -> usize {
        if self.value_in_key {
            return self.keys(block, head);
        }
        let all_keys = self.kv_heads * PAGE_TOKENS * self.head_dim;
        self.first + block as usize * self.page_stride + all_keys + head * PAGE_TOKENS * self.v_head_dim
    }
}

/// An element type of the cache.
pub(crate) trait Element: Copy + Sync + Default {
    /// Sixteen elements as floats.
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F;
    /// One element as a float.
    fn to_f32(self) -> f32;
    /// Rounds sixteen floats to elements.
    fn store<S: Simd>(s: S, v: S::F, out: &mut [Self; LANES]);
    /// Turns a tile `[16][dim]` into `out[dim][16]`.
    fn transpose<S: Simd>(s: S, tile: &[Self], dim: usize, out: &mut [[f32; LANES]]);
}

/// The part of a transposition that does not fill a register.
#[inline(always)]
fn transpose_rest<E: Element>(tile: &[E], dim: usize, from: usize, out: &mut [[f32; LANES]]) {
    for (d, line) in out.iter_mut().enumerate().take(dim).skip(from) {
        for (key, to) in line.iter_mut().enumerate() {
            *to = tile[key * dim + d].to_f32();
        }
    }
}

/// bfloat16 bits.
impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load_bf16(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, out: &mut [Self; LANES]) {
        s.store_bf16(v, out);
    }
    #[inline(always)]
    fn transpose<S: Simd>(s: S, tile: &[Self], dim: usize, out: &mut [[f32; LANES]]) {
        const STEP: usize = 2 * LANES;
        let whole = dim / STEP * STEP;
        for d in (0..whole).step_by(STEP) {
            let mut rows = [s.splat_i(0); LANES];
            for (key, row) in rows.iter_mut().enumerate() {
                let at = key * dim + d;
                *row = s.load_pairs(tile[at..at + STEP].first_chunk().expect("a slice of STEP elements"));
            }
            s.transpose(&mut rows);
            for (pair, row) in out[d..d + STEP].as_chunks_mut::<2>().0.iter_mut().zip(rows) {
                let (low, high) = s.split_bf16(row);
                s.store(low, &mut pair[0]);
                s.store(high, &mut pair[1]);
            }
        }
        transpose_rest(tile, dim, whole, out);
    }
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, out: &mut [Self; LANES]) {
        s.store(v, out);
    }
    #[inline(always)]
    fn transpose<S: Simd>(s: S, tile: &[Self], dim: usize, out: &mut [[f32; LANES]]) {
        let whole = dim / LANES * LANES;
        for d in (0..whole).step_by(LANES) {
            let mut rows = [s.splat_i(0); LANES];
            for (key, row) in rows.iter_mut().enumerate() {
                let at = key * dim + d;
                *row = s.load_words(tile[at..at + LANES].first_chunk().expect("a slice of LANES elements"));
            }
            s.transpose(&mut rows);
            for (to, row) in out[d..d + LANES].iter_mut().zip(rows) {
                s.store(s.as_floats(row), to);
            }
        }
        transpose_rest(tile, dim, whole, out);
    }
}

/// Writes the keys and values of some tokens of one sequence into its pages: token `i` of `tokens` lies in row
/// `tokens.start + i` of `k` and `v` and goes to position `start + i`. There is no `v` where values are in the keys.
///
/// # Panics
/// When shapes, the table or slices do not fit together.
pub fn kv_append(
    cache: &mut KvViewMut<'_>,
    k: (&[f32], Heads),
    v: Option<(&[f32], Heads)>,
    tokens: std::ops::Range<usize>,
    start: usize,
    table: &[u32],
) {
    let layout = cache.layout;
    assert!(v.is_none() == layout.value_in_key, "values of their own: {}, {layout:?}", v.is_some());
    for (what, (x, heads), dim) in
        [("keys", k, layout.head_dim)].into_iter().chain(v.map(|v| ("values", v, layout.v_head_dim)))
    {
        heads.check(x.len(), tokens.end);
        assert!(
            (heads.heads, heads.head_dim) == (layout.kv_heads, dim),
            "{what} of {} x {} for pages of {} x {dim}",
            heads.heads,
            heads.head_dim,
            layout.kv_heads
        );
    }
    // All instruction sets round alike, so the best one serves everybody.
    let isa = Isa::detect();
    for (i, token) in tokens.enumerate() {
        let position = start + i;
        let (block, slot) = (table[position / PAGE_TOKENS], position % PAGE_TOKENS);
        for head in 0..layout.kv_heads {
            let at = layout.keys(block, head) + slot * layout.head_dim;
            cache.data.write(isa, at, k.1.of(k.0, token, head));
            if let Some((v, heads)) = v {
                let at = layout.values(block, head) + slot * layout.v_head_dim;
                cache.data.write(isa, at, heads.of(v, token, head));
            }
        }
    }
}

impl KvDataMut<'_> {
    /// Writes numbers from element `at`, in the cache's own type.
    fn write(&mut self, isa: Isa, at: usize, from: &[f32]) {
        match self {
            Self::Bf16(data) => {
                isa.run(CopyIn { to: data[at..at + from.len()].reinterpret_cast_mut(), from });
            }
            Self::F32(data) => data[at..at + from.len()].copy_from_slice(from),
        }
    }
}

/// Conversion of a key or value into the cache's elements.
struct CopyIn<'a, E> {
    to: &'a mut [E],
    from: &'a [f32],
}

impl<E: Element> Kernel for CopyIn<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (to, to_rest) = self.to.as_chunks_mut::<LANES>();
        let (from, from_rest) = self.from.as_chunks::<LANES>();
        for (to, from) in to.iter_mut().zip(from) {
            E::store(s, s.load(from), to);
        }
        let (mut line, mut padded) = ([E::default(); LANES], [0.0; LANES]);
        padded[..from_rest.len()].copy_from_slice(from_rest);
        E::store(s, s.load(&padded), &mut line);
        to_rest.copy_from_slice(&line[..to_rest.len()]);
    }
}
