//! What a caller may choose.

use std::path::PathBuf;

use crate::budget::MemoryOptions;

/// Choices of [`CudaBackend`](crate::CudaBackend).
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// How much of the device's memory may be taken.
    pub memory: MemoryOptions,
    /// Whether steps of decoding rows alone are recorded before the first one and replayed. Without it every step is
    /// issued kernel by kernel.
    pub graphs: bool,
    /// Whether matmuls of more than 64 rows go to cublasLt, where it is found; else to the crate's own kernel.
    pub cublaslt: bool,
    /// Whether what a sequence yields may not depend on the others in its steps, nor on how its prompt was cut: one kernel
    /// for all products and one for all attention, without splits. Slower.
    pub batch_invariant: bool,
    /// Algorithms of cublasLt that are timed for each shape at start.
    pub matmul_candidates: usize,
    /// Folder in which the chosen ones are kept, so that a restart computes the same bits.
    pub plan_folder: Option<PathBuf>,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            memory: MemoryOptions::default(),
            graphs: true,
            cublaslt: true,
            batch_invariant: false,
            matmul_candidates: 8,
            plan_folder: None,
        }
    }
}
