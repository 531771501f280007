//! [`Simd`] on AVX2 with FMA and F16C: two 8-lane registers to a vector.
//!
//! Owns: the intrinsics. Never: anything that is not one vector operation.

use super::lanes::{Kernel, LANES, Portable, Simd, bf16_bits};
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Witness that the processor has AVX2, FMA and F16C. Only [`Avx2::get`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The witness, where the processor and the operating system support all of it.
    pub(crate) fn get() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found = *FOUND.get_or_init(|| {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        });
        found.then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enter<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so the processor has every feature that `enter` enables.
        unsafe { enter(self, kernel) }
    }
}

/// One register operation. Sound because every method takes the witness `self`; the pointers below come from
/// references to arrays of exactly two registers, and the loads and stores used are the unaligned ones.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: see the macro's own comment: features by the witness, memory by the array references.
        unsafe { $e }
    };
}

/// Lower and upper eight lanes.
type F2 = (__m256, __m256);
/// Lower and upper eight lanes.
type I2 = (__m256i, __m256i);

impl Simd for Avx2 {
    type F = F2;
    type I = I2;
    const MAX_ROWS: usize = 3;
    const MAX_ROWS_INT: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> F2 {
        let v = op!(_mm256_set1_ps(x));
        (v, v)
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F2 {
        op!((_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))))
    }
    #[inline(always)]
    fn store(self, v: F2, out: &mut [f32; LANES]) {
        op!({
            _mm256_storeu_ps(out.as_mut_ptr(), v.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v.1);
        });
    }
    #[inline(always)]
    fn add(self, a: F2, b: F2) -> F2 {
        op!((_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: F2, b: F2) -> F2 {
        op!((_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: F2, b: F2) -> F2 {
        op!((_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: F2, b: F2) -> F2 {
        op!((_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn max(self, a: F2, b: F2) -> F2 {
        // The instruction returns `b` where either is NaN.
        op!({
            let larger = |a, b| _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
            (larger(a.0, b.0), larger(a.1, b.1))
        })
    }
    #[inline(always)]
    fn min(self, a: F2, b: F2) -> F2 {
        op!((_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn fma(self, a: F2, b: F2, c: F2) -> F2 {
        op!((_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> F2 {
        op!((
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(8).cast()))
        ))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> F2 {
        op!({
            let widen = |p: *const u16| {
                let half = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half))
            };
            (widen(x.as_ptr()), widen(x.as_ptr().add(8)))
        })
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> F2 {
        op!({
            let v = _mm_loadu_si128(x.as_ptr().cast());
            (
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(v))),
            )
        })
    }
    #[inline(always)]
    fn store_bf16(self, v: F2, out: &mut [u16; LANES]) {
        let mut t = [0.0; LANES];
        self.store(v, &mut t);
        *out = t.map(bf16_bits);
    }
    #[inline(always)]
    fn split_bf16(self, v: I2) -> (F2, F2) {
        op!({
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let lo = |w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
            let hi = |w| _mm256_castsi256_ps(_mm256_and_si256(w, high));
            ((lo(v.0), lo(v.1)), (hi(v.0), hi(v.1)))
        })
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I2 {
        let v = op!(_mm256_set1_epi32(x));
        (v, v)
    }
    #[inline(always)]
    fn load_i(self, x: &[u32; LANES]) -> I2 {
        op!((_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())))
    }
    #[inline(always)]
    fn load_words(self, x: &[f32; LANES]) -> I2 {
        op!((_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())))
    }
    // `maddubs` saturates on 255 * 127 * 2, so even and odd bytes are widened and multiplied as half-words.
    #[inline(always)]
    fn dot_u8(self, acc: I2, w: I2, a: u32) -> I2 {
        op!({
            let a = _mm256_set1_epi32(a.cast_signed());
            let a_odd = _mm256_srai_epi16::<8>(a);
            let a_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(a));
            let bytes = _mm256_set1_epi16(0xff);
            let dot = |acc, w| {
                let even = _mm256_madd_epi16(_mm256_and_si256(w, bytes), a_even);
                let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(w), a_odd);
                _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
            };
            (dot(acc.0, w.0), dot(acc.1, w.1))
        })
    }
    #[inline(always)]
    fn low_nibbles(self, v: I2) -> I2 {
        op!({
            let mask = _mm256_set1_epi8(0x0f);
            (_mm256_and_si256(v.0, mask), _mm256_and_si256(v.1, mask))
        })
    }
    #[inline(always)]
    fn high_nibbles(self, v: I2) -> I2 {
        let shifted = op!((_mm256_srli_epi32::<4>(v.0), _mm256_srli_epi32::<4>(v.1)));
        self.low_nibbles(shifted)
    }
    #[inline(always)]
    fn to_f32(self, v: I2) -> F2 {
        op!((_mm256_cvtepi32_ps(v.0), _mm256_cvtepi32_ps(v.1)))
    }
    #[inline(always)]
    fn pow2(self, n: F2) -> F2 {
        op!({
            let power = |x| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            (power(n.0), power(n.1))
        })
    }
    #[inline(always)]
    fn round(self, v: F2) -> F2 {
        op!((
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v.0),
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v.1)
        ))
    }
    #[inline(always)]
    fn keep(self, v: F2, from: usize, to: usize, fill: f32) -> F2 {
        let mut t = [0.0; LANES];
        self.store(v, &mut t);
        self.load(&Portable.keep(t, from, to, fill))
    }
    #[inline(always)]
    fn positive(self, x: F2, a: F2, b: F2) -> F2 {
        op!({
            let zero = _mm256_setzero_ps();
            let pick = |x, a, b| _mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_GT_OQ>(x, zero));
            (pick(x.0, a.0, b.0), pick(x.1, a.1, b.1))
        })
    }
    #[inline(always)]
    fn as_floats(self, v: I2) -> F2 {
        op!((_mm256_castsi256_ps(v.0), _mm256_castsi256_ps(v.1)))
    }
    #[inline(always)]
    fn load_pairs(self, x: &[u16; 2 * LANES]) -> I2 {
        op!((_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(LANES).cast())))
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [I2; LANES]) {
        let mut words = [[0u32; LANES]; LANES];
        for (to, row) in words.iter_mut().zip(rows.iter()) {
            op!({
                _mm256_storeu_si256(to.as_mut_ptr().cast(), row.0);
                _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), row.1);
            });
        }
        Portable.transpose(&mut words);
        for (row, from) in rows.iter_mut().zip(&words) {
            *row = self.load_i(from);
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, x: &T, offset: usize) {
        let address = std::ptr::from_ref(x).cast::<i8>().wrapping_add(offset);
        op!(_mm_prefetch::<_MM_HINT_T0>(address));
    }
}
