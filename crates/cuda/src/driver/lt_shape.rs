//! What a product of cublasLt is: its shape, its operands, and how an algorithm for it is chosen.
//!
//! Owns the words that the other files about cublasLt share. Never calls the library.

use std::fmt;
use std::path::PathBuf;

use super::memory::DevicePtr;

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

/// How plans are made and kept.
#[derive(Clone, Debug)]
pub struct LtOptions {
    /// Scratch of the products, from the arena.
    pub workspace: DevicePtr,
    /// Its bytes.
    pub workspace_bytes: u64,
    /// Algorithms that are timed for each shape; 1 takes the library's own first.
    pub candidates: usize,
    /// Folder in which plans are kept, a file for each list of shapes; without it they are made at each start.
    pub plan_folder: Option<PathBuf>,
}

impl LtShape {
    /// Products of numbers.
    pub(super) fn work(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.outputs) * u64::from(self.inner)
    }
}

impl fmt::Display for LtShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, outputs, inner, storage, output, bias } = self;
        let bias = if *bias { " with bias" } else { "" };
        write!(f, "{rows} x {outputs} x {inner} {storage:?} to {output:?}{bias}")
    }
}
