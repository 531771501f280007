//! What the user decides about this backend.

use crate::simd::Isa;

/// Options of [`CpuBackend`](crate::CpuBackend).
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Threads that compute, the engine's own included; by default as many as [`default_threads`] says.
    pub threads: Option<usize>,
    /// Instruction set of the kernels; by default the best that the processor has. A better one than it has is
    /// brought down.
    pub isa: Option<Isa>,
    /// Fills the cache with NaN before its first use. Tests prove by it that nothing is read beyond the tokens of a
    /// sequence; it costs a pass over the whole cache at start.
    pub poison_cache: bool,
}

/// Processors that this process may use: affinity and the control group's quota are respected.
#[must_use]
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
