//! Products of activations with a [`PackedMatrix`]: `out[m, n] = x[m, k] * w[n, k]^T`, and many such in one go.
//!
//! Owns: how a product, or a group of products, is split into tiles and over threads.
//! Never: the weights' layout (that is `matrix`).
//!
//! A kernel computes a tile of some rows and one panel of 32 columns, keeping all sums in registers. Each sum belongs
//! to one lane and runs over k in order, with the same operations for every tile height: that is why a row's result
//! depends neither on the other rows nor on how the work is split.

mod convert;
mod group;
mod units;

pub use convert::Scratch;
pub use group::{Job, Place, matmul_group};

use super::Isa;
use super::lanes::{Kernel, LANES, Simd};
use super::matrix::{PANEL, PackedMatrix, Panels};
use super::shared::SharedMut;
use crate::pool::Pool;
use convert::{Convert, Pack, Rows, Source, Tile};
use std::ops::Range;
use units::Unit;

/// Heights of a tile that kernels are compiled for.
const HEIGHTS: [usize; 7] = [1, 2, 3, 4, 6, 8, 12];
/// Activations below this many are converted by the calling thread alone.
const PARALLEL_PACK: usize = 16 * 1024;
/// Least bytes of weights in a piece of work.
const PIECE_BYTES: usize = 24 * 1024;
/// Converted activations that stay in a core's second-level cache while a piece's panels pass over them.
const BLOCK_BYTES: usize = 512 * 1024;

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
    /// Where results go; row after row without.
    places: Option<&'a [Place]>,
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
            let at = first + self.places.map_or((row + r) * self.n, |places| places[row + r].out);
            // SAFETY: each panel is computed by one thread, panels have disjoint columns, and rows disjoint places
            // (checked where places are taken).
            let to = unsafe { self.out.range(at..at + columns) };
            to.copy_from_slice(&line.as_flattened()[..columns]);
        }
    }
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

/// Tallest tile of `U` on an instruction set.
fn limit<U: Unit>(isa: Isa) -> usize {
    isa.run(Limit::<U>(std::marker::PhantomData))
}

/// Rows that `m` rows take in the scratch: the last tile may be higher than what is left.
fn padded_rows(limit: usize, m: usize) -> usize {
    let last = m.saturating_sub(1) / limit * limit;
    last + height(limit, m - last)
}

impl Scratch {
    /// Makes room for `rows` rows of `k` values.
    fn grow(&mut self, convert: Convert, k: usize, rows: usize) {
        let (words, blocks) = (convert.words(k), convert.blocks(k));
        self.words.resize(self.words.len().max(rows * words), 0);
        self.scales.resize(self.scales.len().max(rows * blocks), 0.0);
        self.sums.resize(self.sums.len().max(rows * blocks), 0);
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
        let limit = limit::<U>(self.isa);
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
            places: None,
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
        scratch.grow(convert, k, padded_rows(limit, m));
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
                let x = Source { x, rows: Rows::Dense { first: from, count: to.min(m) - from } };
                self.isa.run(Pack { convert, x, k, height, words, scales, sums });
            }
        });
    }
}
