//! Tests of the kernels: every operation on every instruction set against an f64 reference with a stated bound, and
//! the promise that a row's result depends on nothing but the row.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::needless_range_loop)]

mod attention;
mod delta;
mod lanes;
mod matmul;
mod matrix;
mod ops;

use super::Isa;

/// Instruction sets of this machine.
pub(super) fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available() == *isa).collect()
}

/// A small generator (SplitMix64); tests print their seed.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Roughly normal, mean 0, standard deviation 1.
    pub(super) fn normal(&mut self) -> f32 {
        let uniform = |r: &mut Self| (r.next() >> 40) as f32 / (1u64 << 24) as f32;
        (0..12).map(|_| uniform(self)).sum::<f32>() - 6.0
    }

    pub(super) fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// Asserts `|got - want| <= bound` everywhere, and that nothing is NaN.
#[track_caller]
pub(super) fn assert_close(got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        assert!(error <= bound(i), "{what}: value {i} is {g}, should be {w}: error {error} > {}", bound(i));
    }
}

/// Bits, so that equality is exact and NaN equals itself.
pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}
