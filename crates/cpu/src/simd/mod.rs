//! Kernels of the CPU backend: matrix products for decode and prefill, paged attention, the delta rule, and the small
//! row operations.
//!
//! Owns: the choice of the instruction set, the packed weights, every inner loop, and the crate's `unsafe` code.
//! Never: a model's structure, the KV pool's bookkeeping, or sampling.
//!
//! Every kernel is written once against [`lanes::Simd`] and compiled for each instruction set. For one row the order
//! of every sum is fixed by the row alone, so results do not depend on what else is in the batch or on the number of
//! threads.
#![allow(unsafe_code)]
// Register tiles are arrays whose rows are walked by index, several arrays at once.
#![allow(clippy::needless_range_loop)]

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod delta;
pub mod kv;
mod lanes;
mod matmul;
mod matrix;
mod memory;
pub mod ops;
mod quant;
pub(crate) mod shared;
#[cfg(test)]
mod tests;

pub use attention::{AttnParams, AttnRow, paged_attention};
pub use kv::{KvData, KvDataMut, KvLayout, KvView, KvViewMut, PAGE_TOKENS, kv_append};
pub use matmul::{Job, Place, Scratch, matmul_group};
pub use matrix::{MatrixError, PackedMatrix, Storage};

use lanes::{Kernel, Portable};

/// Instruction set that kernels are compiled for. Results of two sets may differ in the last bits; within one they
/// are reproducible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// No assumption beyond the target.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ with BF16 and VNNI.
    Avx512Bf16Vnni,
}

impl Isa {
    /// All sets, from the least to the best.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512Bf16Vnni];

    /// The best set of this machine.
    #[must_use]
    pub fn detect() -> Self {
        Self::Avx512Bf16Vnni.available()
    }

    /// This set, or the best below it that the machine has.
    #[must_use]
    pub fn available(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if self >= Self::Avx512Bf16Vnni && avx512::Avx512::get().is_some() {
                return Self::Avx512Bf16Vnni;
            }
            if self >= Self::Avx2 && avx2::Avx2::get().is_some() {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Runs a kernel on this set, or on the best below it that the machine has.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        {
            if self >= Self::Avx512Bf16Vnni
                && let Some(s) = avx512::Avx512::get()
            {
                return s.run(kernel);
            }
            if self >= Self::Avx2
                && let Some(s) = avx2::Avx2::get()
            {
                return s.run(kernel);
            }
        }
        kernel.run(Portable)
    }
}
