//! Activations in the form that the kernels read: tiles of rows, k outermost, floats or 8-bit integers with scales.
//!
//! Owns: that form and the conversion into it. Never: the products.

use crate::simd::lanes::{Kernel, LANES, Simd};
use crate::simd::quant::Q8_BLOCK;

/// Buffers for the converted activations; grows to the largest product and stays.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Tiles of activations: for each tile, k in order, and inside each k the tile's rows.
    pub(super) words: Vec<u32>,
    /// One scale per row and 32 k, in the same order.
    pub(super) scales: Vec<f32>,
    /// What corrects a block's integer sum, in the same order: see [`Convert`].
    pub(super) sums: Vec<u32>,
}

/// Rows of activations.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// All activations.
    pub(super) x: &'a [f32],
    /// Which rows are meant.
    pub(super) rows: Rows<'a>,
}

/// Places of rows among activations.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    /// This many from this row on, back to back.
    Dense {
        /// The first one.
        first: usize,
        /// How many.
        count: usize,
    },
    /// First values of each.
    At(&'a [super::Place]),
}

impl Rows<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Dense { count, .. } => *count,
            Self::At(places) => places.len(),
        }
    }
}

impl<'a> Source<'a> {
    /// The rows, each of `k` values.
    fn iter(self, k: usize) -> impl Iterator<Item = &'a [f32]> {
        (0..self.rows.len()).map(move |row| {
            let at = match self.rows {
                Rows::Dense { first, .. } => (first + row) * k,
                Rows::At(places) => places[row].x,
            };
            &self.x[at..at + k]
        })
    }
}

/// How activations are converted for a storage.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Convert {
    /// A word is an f32; a row has an even number of them, the last one zero if need be.
    F32,
    /// A word is four int8; the sum is the i32 `-128 * sum(a)` that takes back the weights' offset.
    Int8,
    /// A word is four int8; the sum is the f32 `scale * sum(a)` that the block's minimum multiplies.
    Int8Min,
}

impl Convert {
    /// Words that a row of `k` takes.
    pub(super) fn words(self, k: usize) -> usize {
        match self {
            Self::F32 => k.next_multiple_of(2),
            Self::Int8 | Self::Int8Min => k / 4,
        }
    }

    /// Scales (and sums) that a row of `k` takes.
    pub(super) fn blocks(self, k: usize) -> usize {
        match self {
            Self::F32 => 0,
            Self::Int8 | Self::Int8Min => k / Q8_BLOCK,
        }
    }
}

/// Activations of one tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) words: &'a [u32],
    pub(super) scales: &'a [f32],
    pub(super) sums: &'a [u32],
}

/// Conversion of the activations of one tile.
pub(super) struct Pack<'a> {
    pub(super) convert: Convert,
    /// Where the tile's rows are.
    pub(super) x: Source<'a>,
    pub(super) k: usize,
    /// Height of the tile; rows that `x` lacks are zero.
    pub(super) height: usize,
    pub(super) words: &'a mut [u32],
    pub(super) scales: &'a mut [f32],
    pub(super) sums: &'a mut [u32],
}

impl Kernel for Pack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { convert, x, k, height, words, scales, sums } = self;
        if x.rows.len() < height {
            words.fill(0);
            scales.fill(0.0);
            sums.fill(0);
        }
        for (r, x) in x.iter(k).enumerate() {
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
