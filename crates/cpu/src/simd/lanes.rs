//! Sixteen-lane vectors: the one interface that every kernel is written against.
//!
//! Owns: the trait [`Simd`] and its portable implementation, which is also the meaning of the other two.
//! Never: memory layout, threads or the choice of an instruction set.
//!
//! A value of a type that implements [`Simd`] is a witness: it exists only where its instructions do, so kernels
//! that take one need no `unsafe` of their own.

/// Lanes of a vector, and the width in columns of half a weight panel.
pub(crate) const LANES: usize = 16;

/// A computation that can be compiled for any instruction set. `run` must be `#[inline(always)]`, so that the whole
/// body ends up inside the function that enables the instructions.
pub(crate) trait Kernel {
    /// What the computation returns.
    type Output;
    /// Does the work with the vectors of `S`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Vector operations over 16 lanes of `f32` and `i32`.
///
/// NaN in a lane stays NaN through `max`, `min` and `exp`: a poisoned request must be seen, not hidden.
pub(crate) trait Simd: Copy {
    /// Sixteen `f32`.
    type F: Copy;
    /// Sixteen `i32`, also seen as 64 bytes or 32 half-words.
    type I: Copy;
    /// Most rows of a matmul tile whose accumulators still fit the register file.
    const MAX_ROWS: usize;
    /// The same for integer kernels, which hold an integer and a float accumulator a row.
    const MAX_ROWS_INT: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Reads 16 floats.
    fn load(self, x: &[f32; LANES]) -> Self::F;
    /// Writes 16 floats.
    fn store(self, v: Self::F, out: &mut [f32; LANES]);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// Larger of both; where either is NaN, NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Smaller of both; where `b` is NaN, NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the instruction set can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sixteen IEEE half floats.
    fn load_f16(self, x: &[u16; LANES]) -> Self::F;
    /// Sixteen bfloat16.
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F;
    /// Sixteen unsigned bytes.
    fn load_u8(self, x: &[u8; LANES]) -> Self::F;
    /// Rounds to bfloat16, nearest even.
    fn store_bf16(self, v: Self::F, out: &mut [u16; LANES]);
    /// The two bfloat16 of each lane: `(low half, high half)`.
    fn split_bf16(self, v: Self::I) -> (Self::F, Self::F);

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// Reads 16 words.
    fn load_i(self, x: &[u32; LANES]) -> Self::I;
    /// Reads 16 words, given as the floats that have their bits.
    fn load_words(self, x: &[f32; LANES]) -> Self::I;
    /// `acc + sum over 4 bytes of w (unsigned) * a (signed)`, with `a` the same four bytes for all lanes.
    fn dot_u8(self, acc: Self::I, w: Self::I, a: u32) -> Self::I;
    /// Low nibbles of every byte.
    fn low_nibbles(self, v: Self::I) -> Self::I;
    /// High nibbles of every byte.
    fn high_nibbles(self, v: Self::I) -> Self::I;
    /// Exact for |v| < 2^24.
    fn to_f32(self, v: Self::I) -> Self::F;
    /// `2^n` for a lane holding a whole number `n` in -127..=127; `n = -127` gives 0.
    fn pow2(self, n: Self::F) -> Self::F;
    /// Nearest whole number.
    fn round(self, v: Self::F) -> Self::F;
    /// Keeps lanes `from..to`, the others become `fill`.
    fn keep(self, v: Self::F, from: usize, to: usize, fill: f32) -> Self::F;
    /// `a` where `x > 0`, else `b`.
    fn positive(self, x: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// The same bits, seen as floats.
    fn as_floats(self, v: Self::I) -> Self::F;
    /// Thirty-two half-words as 16 pairs, the earlier one in the low half.
    fn load_pairs(self, x: &[u16; 2 * LANES]) -> Self::I;
    /// Lane `c` of row `r` goes to lane `r` of row `c`.
    fn transpose(self, rows: &mut [Self::I; LANES]);
    /// Hint that the cache line `offset` bytes after `x` will be read soon; the address need not exist.
    fn prefetch<T>(self, x: &T, offset: usize);

    /// Sum of the lanes in a fixed order.
    #[inline(always)]
    fn sum(self, v: Self::F) -> f32 {
        let mut t = [0.0; LANES];
        self.store(v, &mut t);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                t[i] += t[i + half];
            }
        }
        t[0]
    }

    /// Largest lane; NaN where a lane is NaN.
    #[inline(always)]
    fn largest(self, v: Self::F) -> f32 {
        let mut t = [0.0; LANES];
        self.store(v, &mut t);
        let larger = |a: f32, b: f32| if a.is_nan() || a >= b { a } else { b };
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                t[i] = larger(t[i], t[i + half]);
            }
        }
        t[0]
    }

    /// `e^x`, relative error below 4e-7 on -87..=88; 0 below, saturated above.
    /// Cody-Waite reduction and a degree-6 polynomial on |r| <= ln(2) / 2.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let x = self.min(self.splat(88.0), self.max(self.splat(-88.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        self.mul(p, self.pow2(n))
    }

    /// `e^x - 1`, without loss near 0; as [`Simd::exp`] elsewhere.
    #[inline(always)]
    fn expm1(self, x: Self::F) -> Self::F {
        let x = self.min(self.splat(88.0), self.max(self.splat(-88.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        let power = self.pow2(n);
        self.fma(self.mul(p, r), power, self.sub(power, self.splat(1.0)))
    }

    /// `1 / (1 + e^-x)`.
    #[inline(always)]
    fn sigmoid(self, x: Self::F) -> Self::F {
        let one = self.splat(1.0);
        self.div(one, self.add(one, self.exp(self.sub(self.splat(0.0), x))))
    }

    /// Error function, absolute error below 3e-7 (Abramowitz and Stegun 7.1.26).
    #[inline(always)]
    fn erf(self, x: Self::F) -> Self::F {
        let (zero, one) = (self.splat(0.0), self.splat(1.0));
        let size = self.abs(x);
        let t = self.div(one, self.fma(size, self.splat(0.327_591_1), one));
        let mut p = self.splat(1.061_405_4);
        for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
            p = self.fma(p, t, self.splat(c));
        }
        let rest = self.mul(self.mul(p, t), self.exp(self.sub(zero, self.mul(size, size))));
        let of_size = self.sub(one, rest);
        self.positive(x, of_size, self.sub(zero, of_size))
    }

    /// `|x|`.
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        self.max(x, self.sub(self.splat(0.0), x))
    }

    /// `tanh(x)` as `1 - 2 / (e^2x + 1)`; absolute error below 5e-7.
    #[inline(always)]
    fn tanh(self, x: Self::F) -> Self::F {
        let e = self.exp(self.add(x, x));
        let one = self.splat(1.0);
        self.sub(one, self.div(self.splat(2.0), self.add(e, one)))
    }
}

/// Plain arrays: compiles for every target.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Bits of the nearest bfloat16 (even on ties); NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let b = x.to_bits();
    let rounded = b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16;
    (if x.is_nan() { (b >> 16) | 0x40 } else { rounded }) as u16
}

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [u32; LANES];
    const MAX_ROWS: usize = 4;
    const MAX_ROWS_INT: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| if x.is_nan() || x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    // A target without a fused instruction would call a slow library function.
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F {
        x.map(|v| half::f16::from_bits(v).to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        x.map(|v| f32::from_bits(u32::from(v) << 16))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        x.map(f32::from)
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::F, out: &mut [u16; LANES]) {
        *out = v.map(bf16_bits);
    }
    #[inline(always)]
    fn split_bf16(self, v: Self::I) -> (Self::F, Self::F) {
        (v.map(|w| f32::from_bits(w << 16)), v.map(|w| f32::from_bits(w & 0xffff_0000)))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x.cast_unsigned(); LANES]
    }
    #[inline(always)]
    fn load_i(self, x: &[u32; LANES]) -> Self::I {
        *x
    }
    #[inline(always)]
    fn load_words(self, x: &[f32; LANES]) -> Self::I {
        x.map(f32::to_bits)
    }
    #[inline(always)]
    fn dot_u8(self, acc: Self::I, w: Self::I, a: u32) -> Self::I {
        let a = a.to_le_bytes().map(|b| i32::from(b.cast_signed()));
        std::array::from_fn(|i| {
            let w = w[i].to_le_bytes().map(i32::from);
            let dot = w[0] * a[0] + w[1] * a[1] + w[2] * a[2] + w[3] * a[3];
            acc[i].wrapping_add(dot.cast_unsigned())
        })
    }
    #[inline(always)]
    fn low_nibbles(self, v: Self::I) -> Self::I {
        v.map(|w| w & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn high_nibbles(self, v: Self::I) -> Self::I {
        v.map(|w| (w >> 4) & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        v.map(|w| w.cast_signed() as f32)
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        n.map(|x| f32::from_bits(((x as i32 + 127) << 23).cast_unsigned()))
    }
    #[inline(always)]
    fn round(self, v: Self::F) -> Self::F {
        v.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn keep(self, v: Self::F, from: usize, to: usize, fill: f32) -> Self::F {
        std::array::from_fn(|i| if i >= from && i < to { v[i] } else { fill })
    }
    #[inline(always)]
    fn positive(self, x: Self::F, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| if x[i] > 0.0 { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn as_floats(self, v: Self::I) -> Self::F {
        v.map(f32::from_bits)
    }
    #[inline(always)]
    fn load_pairs(self, x: &[u16; 2 * LANES]) -> Self::I {
        std::array::from_fn(|i| u32::from(x[2 * i]) | (u32::from(x[2 * i + 1]) << 16))
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::I; LANES]) {
        let from = *rows;
        for (c, row) in rows.iter_mut().enumerate() {
            *row = std::array::from_fn(|r| from[r][c]);
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, _: &T, _: usize) {}
}
