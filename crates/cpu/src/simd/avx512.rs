//! [`Simd`] on AVX-512 with BF16 and VNNI (Sapphire Rapids, Zen 4 and later).
//!
//! Owns: the intrinsics. Never: anything that is not one vector operation.

use super::lanes::{Kernel, LANES, Simd};
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Witness that the processor has AVX-512 F, BW, VL, DQ, BF16 and VNNI. Only [`Avx512::get`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The witness, where the processor and the operating system support all of it.
    pub(crate) fn get() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found = *FOUND.get_or_init(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bf16")
                && is_x86_feature_detected!("avx512vnni")
        });
        found.then_some(Self(()))
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")]
        fn enter<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so the processor has every feature that `enter` enables.
        unsafe { enter(self, kernel) }
    }
}

/// One register operation. Sound because every method takes the witness `self`; the pointers below come from
/// references to arrays of exactly one register, and the loads and stores used are the unaligned ones.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: see the macro's own comment: features by the witness, memory by the array references.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const MAX_ROWS: usize = 12;
    const MAX_ROWS_INT: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        op!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        op!(_mm512_storeu_ps(out.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // The instruction returns `b` where either is NaN.
        op!(_mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), a))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F {
        op!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
            x.as_ptr().cast()
        )))))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        op!(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::F, out: &mut [u16; LANES]) {
        op!({
            let half = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), half);
        });
    }
    #[inline(always)]
    fn split_bf16(self, v: Self::I) -> (Self::F, Self::F) {
        op!((
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)),
            _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32.cast_signed())))
        ))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        op!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn load_i(self, x: &[u32; LANES]) -> Self::I {
        op!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_words(self, x: &[f32; LANES]) -> Self::I {
        op!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn dot_u8(self, acc: Self::I, w: Self::I, a: u32) -> Self::I {
        op!(_mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a.cast_signed())))
    }
    #[inline(always)]
    fn low_nibbles(self, v: Self::I) -> Self::I {
        op!(_mm512_and_si512(v, _mm512_set1_epi8(0x0f)))
    }
    #[inline(always)]
    fn high_nibbles(self, v: Self::I) -> Self::I {
        op!(_mm512_and_si512(_mm512_srli_epi32::<4>(v), _mm512_set1_epi8(0x0f)))
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        op!(_mm512_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        op!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn round(self, v: Self::F) -> Self::F {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }
    #[inline(always)]
    fn keep(self, v: Self::F, from: usize, to: usize, fill: f32) -> Self::F {
        let below = |n: usize| if n >= LANES { 0xffff_u16 } else { (1_u16 << n) - 1 };
        op!(_mm512_mask_blend_ps(below(to) & !below(from), _mm512_set1_ps(fill), v))
    }
    #[inline(always)]
    fn positive(self, x: Self::F, a: Self::F, b: Self::F) -> Self::F {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps()), b, a))
    }
    #[inline(always)]
    fn as_floats(self, v: Self::I) -> Self::F {
        op!(_mm512_castsi512_ps(v))
    }
    #[inline(always)]
    fn load_pairs(self, x: &[u16; 2 * LANES]) -> Self::I {
        op!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [Self::I; LANES]) {
        let mut t = *rows;
        op!({
            // 32-bit, then 64-bit pairs inside each 128-bit quarter, then the quarters themselves.
            for i in (0..LANES).step_by(2) {
                t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
            }
            let mut u = t;
            for i in (0..LANES).step_by(4) {
                u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
                u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
                u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
                u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
            for i in 0..4 {
                let a = _mm512_shuffle_i32x4::<0x88>(u[i], u[i + 4]);
                let b = _mm512_shuffle_i32x4::<0xdd>(u[i], u[i + 4]);
                let c = _mm512_shuffle_i32x4::<0x88>(u[i + 8], u[i + 12]);
                let d = _mm512_shuffle_i32x4::<0xdd>(u[i + 8], u[i + 12]);
                rows[i] = _mm512_shuffle_i32x4::<0x88>(a, c);
                rows[i + 4] = _mm512_shuffle_i32x4::<0x88>(b, d);
                rows[i + 8] = _mm512_shuffle_i32x4::<0xdd>(a, c);
                rows[i + 12] = _mm512_shuffle_i32x4::<0xdd>(b, d);
            }
        });
    }
    #[inline(always)]
    fn prefetch<T>(self, x: &T, offset: usize) {
        let address = std::ptr::from_ref(x).cast::<i8>().wrapping_add(offset);
        op!(_mm_prefetch::<_MM_HINT_T0>(address));
    }
}
