//! Rotation of heads by position, and scaling of heads by position.
//!
//! Owns: their vector loops. Never: how the tables come about.

use super::{Heads, for_rows};
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::lanes::{Kernel, LANES, Simd};
use crate::simd::shared::SharedMut;

/// Which values of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// Value `i` with `i + n`, for the first `rotary_dim / 2` of them; usually `n` is `rotary_dim / 2` itself.
    Apart(usize),
    /// Value `2 i` with `2 i + 1`.
    Adjacent,
}

/// Cosines and sines of a rotation, `[positions, rotary_dim / 2]` each.
#[derive(Debug, Clone, Copy)]
pub struct RopeTables<'a> {
    /// Values of a head that are rotated.
    pub rotary_dim: usize,
    /// How they pair.
    pub pairs: Pairs,
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

impl RopeTables<'_> {
    /// Values of a head from the first to the last that is rotated.
    fn span(&self) -> usize {
        match self.pairs {
            Pairs::Apart(n) => n + self.rotary_dim / 2,
            Pairs::Adjacent => self.rotary_dim,
        }
    }

    /// Values of a head that are rotated, in their order, as two runs.
    #[must_use]
    pub fn rotated(&self) -> [std::ops::Range<usize>; 2] {
        let half = self.rotary_dim / 2;
        match self.pairs {
            Pairs::Apart(n) => [0..half, n..n + half],
            Pairs::Adjacent => [0..half, half..self.rotary_dim],
        }
    }
}

/// Rotation of one head whose pairs lie apart.
struct RotateApart<'a> {
    low: &'a mut [f32],
    high: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for RotateApart<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (lows, low_rest) = self.low.as_chunks_mut::<LANES>();
        let (highs, high_rest) = self.high.as_chunks_mut::<LANES>();
        let (cosines, cos_rest) = self.cos.as_chunks::<LANES>();
        let (sines, sin_rest) = self.sin.as_chunks::<LANES>();
        for (((low, high), cos), sin) in lows.iter_mut().zip(highs).zip(cosines).zip(sines) {
            let (a, b, cos, sin) = (s.load(low), s.load(high), s.load(cos), s.load(sin));
            s.store(s.sub(s.mul(a, cos), s.mul(b, sin)), low);
            s.store(s.fma(a, sin, s.mul(b, cos)), high);
        }
        for (((low, high), cos), sin) in low_rest.iter_mut().zip(high_rest).zip(cos_rest).zip(sin_rest) {
            (*low, *high) = (*low * cos - *high * sin, *low * sin + *high * cos);
        }
    }
}

/// Rotation of one head whose pairs are neighbours.
fn rotate_adjacent(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for (([a, b], cos), sin) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}

/// Rotates the heads of each row by its position.
///
/// # Panics
/// When a position lies beyond the tables or the lengths do not fit together.
pub fn rope(pool: &Pool, isa: Isa, x: &mut [f32], heads: Heads, positions: &[u32], tables: RopeTables<'_>) {
    heads.check(x.len(), positions.len());
    let (rotary, half) = (tables.rotary_dim, tables.rotary_dim / 2);
    let span = tables.span();
    assert!(
        rotary.is_multiple_of(2) && rotary <= span && span <= heads.head_dim,
        "{rotary} of {} rotate, up to {span}",
        heads.head_dim
    );
    let x = SharedMut::new(x);
    for_rows(pool, positions.len(), heads.heads * heads.head_dim, &|range| {
        for (row, head) in range.flat_map(|row| (0..heads.heads).map(move |head| (row, head))) {
            let table = positions[row] as usize * half..(positions[row] as usize + 1) * half;
            let (cos, sin) = (&tables.cos[table.clone()], &tables.sin[table]);
            let at = heads.at(row, head);
            // SAFETY: each row is computed by one thread, and heads do not overlap.
            let x = unsafe { x.range(at..at + span) };
            match tables.pairs {
                Pairs::Apart(n) => {
                    let (low, high) = x.split_at_mut(n);
                    isa.run(RotateApart { low: &mut low[..half], high, cos, sin });
                }
                Pairs::Adjacent => rotate_adjacent(x, cos, sin),
            }
        }
    });
}

/// Multiplies the heads of each row with the factor of its position.
///
/// # Panics
/// When a position has no factor or the lengths do not fit together.
pub fn scale_heads(pool: &Pool, x: &mut [f32], heads: Heads, positions: &[u32], factors: &[f32]) {
    heads.check(x.len(), positions.len());
    let width = heads.heads * heads.head_dim;
    let x = SharedMut::new(x);
    for_rows(pool, positions.len(), width, &|range| {
        for row in range {
            let at = heads.at(row, 0);
            // SAFETY: each row is computed by one thread.
            super::scale(unsafe { x.range(at..at + width) }, factors[positions[row] as usize]);
        }
    });
}
