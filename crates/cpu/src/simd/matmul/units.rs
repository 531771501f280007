//! The arithmetic of a product's tile, one implementation a storage.
//!
//! Owns: the inner loops over k. Never: threads, and where activations or results lie.

use super::convert::{Convert, Tile};
use crate::simd::lanes::Simd;
use crate::simd::matrix::{Bf16Unit, F16Unit, F32Unit, Q4kUnit, Q8Unit};

/// A unit of a panel along k, and its arithmetic.
pub(super) trait Unit: Copy + Sync {
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
