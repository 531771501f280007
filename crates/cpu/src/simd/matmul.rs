//! Products of activations with a [`PackedMatrix`]: `out[m, n] = x[m, k] * w[n, k]^T`.
//!
//! Owns: the kernels, the form in which they read activations, and how a product is split over threads.
//! Never: the weights' layout (that is `matrix`).
//!
//! A kernel computes a tile of some rows and one panel of 32 columns, keeping all sums in registers. Each sum belongs
//! to one lane and runs over k in order, with the same operations for every tile height: that is why a row's result
//! depends neither on the other rows nor on how the work is split.

use super::lanes::{Kernel, LANES, Simd};
use super::matrix::{Bf16Unit, F16Unit, F32Unit, PANEL, PackedMatrix, Panels, Q4kUnit, Q8Unit};
use super::quant::Q8_BLOCK;
use super::shared::SharedMut;
use crate::pool::Pool;
use std::ops::Range;

/// Heights of a tile that kernels are compiled for.
const HEIGHTS: [usize; 7] = [1, 2, 3, 4, 6, 8, 12];
/// Activations below this many are converted by the calling thread alone.
const PARALLEL_PACK: usize = 16 * 1024;
/// Least bytes of weights in a piece of work.
const PIECE_BYTES: usize = 24 * 1024;
/// Converted activations that stay in a core's second-level cache while a piece's panels pass over them.
const BLOCK_BYTES: usize = 512 * 1024;

/// Buffers for the converted activations; grows to the largest product and stays.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Tiles of activations: for each tile, k in order, and inside each k the tile's rows.
    words: Vec<u32>,
    /// One scale per row and 32 k, in the same order.
    scales: Vec<f32>,
    /// What corrects a block's integer sum, in the same order: see [`Convert`].
    sums: Vec<u32>,
}

/// How activations are converted for a storage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Convert {
    /// A word is an f32; a row has an even number of them, the last one zero if need be.
    F32,
    /// A word is four int8; the sum is the i32 `-128 * sum(a)` that takes back the weights' offset.
    Int8,
    /// A word is four int8; the sum is the f32 `scale * sum(a)` that the block's minimum multiplies.
    Int8Min,
}

impl Convert {
    /// Words that a row of `k` takes.
    fn words(self, k: usize) -> usize {
        match self {
            Self::F32 => k.next_multiple_of(2),
            Self::Int8 | Self::Int8Min => k / 4,
        }
    }

    /// Scales (and sums) that a row of `k` takes.
    fn blocks(self, k: usize) -> usize {
        match self {
            Self::F32 => 0,
            Self::Int8 | Self::Int8Min => k / Q8_BLOCK,
        }
    }
}

/// Activations of one tile.
#[derive(Clone, Copy)]
struct Tile<'a> {
    words: &'a [u32],
    scales: &'a [f32],
    sums: &'a [u32],
}

/// A unit of a panel along k, and its arithmetic.
trait Unit: Copy + Sync {
    const CONVERT: Convert;
    /// Tallest tile for `S`.
    fn max_rows<S: Simd>() -> usize;
    /// Computes `M` rows of one panel.
    fn tile<S: Simd, const M: usize>(s: S, panel: &[Self], a: Tile<'_>) -> [[S::F; 2]; M];
}

/// Bytes ahead of the read position that are asked from memory; a page boundary stops the hardware's own prefetch.
const AHEAD: usize = 4096;

/// Asks for the cache lines of the unit [`AHEAD`] bytes further on. Tall tiles are not bound by memory.
#[inline(always)]
fn prefetch<S: Simd, U, const M: usize>(s: S, unit: &U) {
    if M <= 4 {
        for line in (0..size_of::<U>()).step_by(64) {
            s.prefetch(unit, AHEAD + line);
        }
    }
}

/// The common loop of the float storages: `weights` turns a unit into two vectors.
#[inline(always)]
fn float_tile<S: Simd, U, const M: usize>(
    s: S,
    panel: &[U],
    a: Tile<'_>,
    weights: impl Fn(&U) -> [S::F; 2],
) -> [[S::F; 2]; M] {
    let mut acc = [[s.splat(0.0); 2]; M];
    for (unit, x) in panel.iter().zip(a.words.as_chunks::<M>().0) {
        prefetch::<S, U, M>(s, unit);
        let w = weights(unit);
        for r in 0..M {
            let x = s.splat(f32::from_bits(x[r]));
            acc[r][0] = s.fma(w[0], x, acc[r][0]);
            acc[r][1] = s.fma(w[1], x, acc[r][1]);
        }
    }
    acc
}

impl Unit for F32Unit {
    const CONVERT: Convert = Convert::F32;
    #[inline(always)]
    fn max_rows<S: Simd>() -> usize {
        S::MAX_ROWS
    }
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(s: S, panel: &[Self], a: Tile<'_>) -> [[S::F; 2]; M] {
        float_tile(s, panel, a, |unit| [s.load(&unit.0[0]), s.load(&unit.0[1])])
    }
}

impl Unit for F16Unit {
    const CONVERT: Convert = Convert::F32;
    #[inline(always)]
    fn max_rows<S: Simd>() -> usize {
        S::MAX_ROWS
    }
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(s: S, panel: &[Self], a: Tile<'_>) -> [[S::F; 2]; M] {
        float_tile(s, panel, a, |unit| [s.load_f16(&unit.0[0]), s.load_f16(&unit.0[1])])
    }
}

impl Unit for Bf16Unit {
    const CONVERT: Convert = Convert::F32;
    #[inline(always)]
    fn max_rows<S: Simd>() -> usize {
        S::MAX_ROWS
    }
    // Widened to f32 on the fly (a shift or a mask for 16 weights) rather than by `vdpbf16ps`: on Emerald Rapids that
    // instruction was measured at 42 G products/s a core against 96 G for f32 multiply-add, and activations keep
    // their precision.
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(s: S, panel: &[Self], a: Tile<'_>) -> [[S::F; 2]; M] {
        let mut acc = [[s.splat(0.0); 2]; M];
        for (unit, x) in panel.iter().zip(a.words.as_chunks::<M>().0.as_chunks::<2>().0) {
            prefetch::<S, Self, M>(s, unit);
            let (low0, high0) = s.split_bf16(s.load_i(&unit.0[0]));
            let (low1, high1) = s.split_bf16(s.load_i(&unit.0[1]));
            for r in 0..M {
                let even = s.splat(f32::from_bits(x[0][r]));
                acc[r][0] = s.fma(low0, even, acc[r][0]);
                acc[r][1] = s.fma(low1, even, acc[r][1]);
            }
            for r in 0..M {
                let odd = s.splat(f32::from_bits(x[1][r]));
                acc[r][0] = s.fma(high0, odd, acc[r][0]);
                acc[r][1] = s.fma(high1, odd, acc[r][1]);
            }
        }
        acc
    }
}

impl Unit for Q8Unit {
    const CONVERT: Convert = Convert::Int8;
    #[inline(always)]
    fn max_rows<S: Simd>() -> usize {
        S::MAX_ROWS_INT
    }
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(s: S, panel: &[Self], a: Tile<'_>) -> [[S::F; 2]; M] {
        let mut acc = [[s.splat(0.0); 2]; M];
        let words = a.words.as_chunks::<M>().0.as_chunks::<8>().0;
        let (scales, sums) = (a.scales.as_chunks::<M>().0, a.sums.as_chunks::<M>().0);
        for (((unit, x), scale), sum) in panel.iter().zip(words).zip(scales).zip(sums) {
            prefetch::<S, Self, M>(s, unit);
            let mut dot = [[s.splat_i(0); 2]; M];
            for r in 0..M {
                dot[r] = [s.splat_i(sum[r].cast_signed()); 2];
            }
            for (line, x) in unit.quants.iter().zip(x) {
                let w = [s.load_i(&line[0]), s.load_i(&line[1])];
                for r in 0..M {
                    dot[r][0] = s.dot_u8(dot[r][0], w[0], x[r]);
                    dot[r][1] = s.dot_u8(dot[r][1], w[1], x[r]);
                }
            }
            for h in 0..2 {
                let w_scale = s.load_f16(&unit.scales[h]);
                for r in 0..M {
                    let both = s.mul(w_scale, s.splat(scale[r]));
                    acc[r][h] = s.fma(s.to_f32(dot[r][h]), both, acc[r][h]);
                }
            }
        }
        acc
    }
}

impl Unit for Q4kUnit {
    const CONVERT: Convert = Convert::Int8Min;
    #[inline(always)]
    fn max_rows<S: Simd>() -> usize {
        S::MAX_ROWS_INT
    }
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(s: S, panel: &[Self], a: Tile<'_>) -> [[S::F; 2]; M] {
        let mut acc = [[s.splat(0.0); 2]; M];
        let words = a.words.as_chunks::<M>().0.as_chunks::<8>().0.as_chunks::<8>().0;
        let scales = a.scales.as_chunks::<M>().0.as_chunks::<8>().0;
        let sums = a.sums.as_chunks::<M>().0.as_chunks::<8>().0;
        for (((unit, x), scale), sum) in panel.iter().zip(words).zip(scales).zip(sums) {
            prefetch::<S, Self, M>(s, unit);
            for j in 0..8 {
                let mut dot = [[s.splat_i(0); 2]; M];
                for g in 0..4 {
                    let w = [s.load_i(&unit.quants[j][g][0]), s.load_i(&unit.quants[j][g][1])];
                    for h in 0..2 {
                        let (low, high) = (s.low_nibbles(w[h]), s.high_nibbles(w[h]));
                        for r in 0..M {
                            dot[r][h] = s.dot_u8(dot[r][h], low, x[j][g][r]);
                            dot[r][h] = s.dot_u8(dot[r][h], high, x[j][g + 4][r]);
                        }
                    }
                }
                for h in 0..2 {
                    let step = s.mul(s.load_f16(&unit.d[h]), s.load_u8(&unit.scales[j][h]));
                    let min = s.mul(s.load_f16(&unit.dmin[h]), s.load_u8(&unit.mins[j][h]));
                    let minus_min = s.sub(s.splat(0.0), min);
                    for r in 0..M {
                        let both = s.mul(step, s.splat(scale[j][r]));
                        acc[r][h] = s.fma(s.to_f32(dot[r][h]), both, acc[r][h]);
                        acc[r][h] = s.fma(minus_min, s.splat(f32::from_bits(sum[j][r])), acc[r][h]);
                    }
                }
            }
        }
        acc
    }
}

/// Height of the tile with `left` rows to go: all tiles are `limit` high but the last, which is as low as the compiled
/// heights allow.
fn height(limit: usize, left: usize) -> usize {
    let fitting = HEIGHTS.iter().copied().filter(|&h| h <= limit);
    fitting.clone().find(|&h| h >= left).or(fitting.max()).unwrap_or(1)
}

/// Shape of a product and where its operands are.
struct Product<'a, U> {
    panels: &'a [U],
    /// Units of a panel.
    units: usize,
    words: &'a [u32],
    scales: &'a [f32],
    sums: &'a [u32],
    m: usize,
    n: usize,
    k: usize,
    out: &'a SharedMut<'a, f32>,
}

/// All rows of some panels.
struct PanelRange<'a, U> {
    product: &'a Product<'a, U>,
    range: Range<usize>,
}

impl<U: Unit> Kernel for PanelRange<'_, U> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let p = self.product;
        let limit = U::max_rows::<S>();
        let count = p.m.div_ceil(limit);
        let block = (BLOCK_BYTES / (4 * U::CONVERT.words(p.k) * limit)).max(1);
        for first in (0..count).step_by(block) {
            for panel in self.range.clone() {
                for row in (first..count.min(first + block)).map(|tile| tile * limit) {
                    match height(limit, p.m - row) {
                        1 => p.tile::<S, 1>(s, panel, row),
                        2 => p.tile::<S, 2>(s, panel, row),
                        3 => p.tile::<S, 3>(s, panel, row),
                        4 => p.tile::<S, 4>(s, panel, row),
                        6 => p.tile::<S, 6>(s, panel, row),
                        8 => p.tile::<S, 8>(s, panel, row),
                        _ => p.tile::<S, 12>(s, panel, row),
                    }
                }
            }
        }
    }
}

impl<U: Unit> Product<'_, U> {
    /// Computes and stores the tile of `M` rows at `row`.
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(&self, s: S, panel: usize, row: usize) {
        if M > U::max_rows::<S>() {
            return;
        }
        let (words, blocks) = (U::CONVERT.words(self.k), U::CONVERT.blocks(self.k));
        let a = Tile {
            words: &self.words[row * words..(row + M) * words],
            scales: &self.scales[row * blocks..(row + M) * blocks],
            sums: &self.sums[row * blocks..(row + M) * blocks],
        };
        let acc = U::tile::<S, M>(s, &self.panels[panel * self.units..(panel + 1) * self.units], a);
        let first = panel * PANEL;
        let columns = PANEL.min(self.n - first);
        for (r, acc) in acc.iter().enumerate().take(self.m - row) {
            let mut line = [[0.0; LANES]; 2];
            s.store(acc[0], &mut line[0]);
            s.store(acc[1], &mut line[1]);
            let at = (row + r) * self.n + first;
            // SAFETY: each panel is computed by one thread, and panels have disjoint columns.
            let to = unsafe { self.out.range(at..at + columns) };
            to.copy_from_slice(&line.as_flattened()[..columns]);
        }
    }
}

/// Conversion of the activations of one tile.
struct Pack<'a> {
    convert: Convert,
    /// The tile's rows, `[rows, k]`.
    x: &'a [f32],
    k: usize,
    /// Height of the tile; rows that `x` lacks are zero.
    height: usize,
    words: &'a mut [u32],
    scales: &'a mut [f32],
    sums: &'a mut [u32],
}

impl Kernel for Pack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { convert, x, k, height, words, scales, sums } = self;
        if x.len() < height * k {
            words.fill(0);
            scales.fill(0.0);
            sums.fill(0);
        }
        for (r, x) in x.chunks_exact(k).enumerate() {
            match convert {
                Convert::F32 => {
                    for (word, x) in words[r..].iter_mut().step_by(height).zip(x) {
                        *word = x.to_bits();
                    }
                    if k % 2 == 1 {
                        words[k * height + r] = 0;
                    }
                }
                Convert::Int8 | Convert::Int8Min => {
                    for (b, block) in x.as_chunks::<Q8_BLOCK>().0.iter().enumerate() {
                        let (bytes, scale, sum) = quantize(s, block);
                        for (g, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                            words[(8 * b + g) * height + r] = u32::from_le_bytes(*four);
                        }
                        scales[b * height + r] = scale;
                        sums[b * height + r] = if convert == Convert::Int8 {
                            (-128 * sum).cast_unsigned()
                        } else {
                            (scale * sum as f32).to_bits()
                        };
                    }
                }
            }
        }
    }
}

/// Symmetric int8: bytes, scale (largest magnitude / 127) and sum of the bytes. A block with a value that is not
/// finite has a scale that is not finite, so that its products are not either.
#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32; Q8_BLOCK]) -> ([u8; Q8_BLOCK], f32, i32) {
    let (halves, _) = x.as_chunks::<LANES>();
    let largest = s.largest(s.max(s.abs(s.load(&halves[0])), s.abs(s.load(&halves[1]))));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let mut bytes = [0; Q8_BLOCK];
    let mut sum = 0;
    for (to, half) in bytes.as_chunks_mut::<LANES>().0.iter_mut().zip(halves) {
        let mut whole = [0.0; LANES];
        s.store(s.round(s.mul(s.load(half), s.splat(inverse))), &mut whole);
        for (to, whole) in to.iter_mut().zip(whole) {
            let q = whole as i32;
            sum += q;
            *to = (q as i8).cast_unsigned();
        }
    }
    (bytes, largest / 127.0, sum)
}

/// Tallest tile of a storage on an instruction set.
struct Limit<U>(std::marker::PhantomData<U>);

impl<U: Unit> Kernel for Limit<U> {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        U::max_rows::<S>()
    }
}

impl PackedMatrix {
    /// `out[m, n] = x[m, k] * w[n, k]^T`, rows of `x` and `out` contiguous. The result of a row is the same bit for bit
    /// whatever `m`, the row's place and the number of threads.
    ///
    /// # Panics
    /// When `x` does not have `m * k` values or `out` not `m * n`.
    pub fn matmul(&self, pool: &Pool, x: &[f32], m: usize, out: &mut [f32], scratch: &mut Scratch) {
        let (n, k) = (self.n, self.k);
        assert!(x.len() == m * k, "activations of {m} x {k} in a slice of {}", x.len());
        assert!(out.len() == m * n, "a product of {m} x {n} in a slice of {}", out.len());
        if m == 0 {
            return;
        }
        match &self.panels {
            Panels::F32(panels) => self.multiply(pool, panels, x, m, out, scratch),
            Panels::F16(panels) => self.multiply(pool, panels, x, m, out, scratch),
            Panels::Bf16(panels) => self.multiply(pool, panels, x, m, out, scratch),
            Panels::Q8_0(panels) => self.multiply(pool, panels, x, m, out, scratch),
            Panels::Q4K(panels) => self.multiply(pool, panels, x, m, out, scratch),
        }
    }

    fn multiply<U: Unit>(
        &self,
        pool: &Pool,
        panels: &[U],
        x: &[f32],
        m: usize,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let limit = self.isa.run(Limit::<U>(std::marker::PhantomData));
        self.convert(pool, U::CONVERT, limit, x, m, scratch);
        let count = self.n.div_ceil(PANEL);
        let product = Product {
            panels,
            units: panels.len() / count,
            words: &scratch.words,
            scales: &scratch.scales,
            sums: &scratch.sums,
            m,
            n: self.n,
            k: self.k,
            out: &SharedMut::new(out),
        };
        // Pieces small enough that the last ones even out the threads, large enough to stream from memory.
        let bytes = product.units * size_of::<U>();
        let least = PIECE_BYTES.div_ceil(bytes);
        let pieces = pool.threads() * if m < 64 { 8 } else { 4 };
        let chunk = count.div_ceil(pieces).max(least).min(count.div_ceil(pool.threads()));
        pool.chunks(count, chunk, &|_, range| self.isa.run(PanelRange { product: &product, range }));
    }

    /// Fills the scratch with the activations as tiles.
    fn convert(
        &self,
        pool: &Pool,
        convert: Convert,
        limit: usize,
        x: &[f32],
        m: usize,
        scratch: &mut Scratch,
    ) {
        let k = self.k;
        let (words, blocks) = (convert.words(k), convert.blocks(k));
        let count = m.div_ceil(limit);
        let last = (count - 1) * limit;
        let rows = last + height(limit, m - last);
        scratch.words.resize(scratch.words.len().max(rows * words), 0);
        scratch.scales.resize(scratch.scales.len().max(rows * blocks), 0.0);
        scratch.sums.resize(scratch.sums.len().max(rows * blocks), 0);
        let all_words = SharedMut::new(&mut scratch.words);
        let all_scales = SharedMut::new(&mut scratch.scales);
        let all_sums = SharedMut::new(&mut scratch.sums);
        let chunk = if m * k < PARALLEL_PACK { count } else { count.div_ceil(pool.threads() * 2) };
        pool.chunks(count, chunk, &|_, range| {
            for start in range.map(|tile| tile * limit) {
                let height = height(limit, m - start);
                let (from, to) = (start, start + height);
                // SAFETY: tiles cover disjoint rows, and each tile is converted by one thread.
                let (words, scales, sums) = unsafe {
                    (
                        all_words.range(from * words..to * words),
                        all_scales.range(from * blocks..to * blocks),
                        all_sums.range(from * blocks..to * blocks),
                    )
                };
                let x = &x[from * k..to.min(m) * k];
                self.isa.run(Pack { convert, x, k, height, words, scales, sums });
            }
        });
    }
}
