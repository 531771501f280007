//! The CPU as a [`Backend`](mirai_model::backend::Backend): own SIMD kernels, candle for the formats without one, and
//! sampling.
//!
//! Knows weights, activations, pages and slots; never an architecture, never the engine's reasons.
//!
//! # Batch invariance
//! What a row yields depends on its own history, the weights, the options and the instruction set: not on the rows
//! that run beside it, not on how a prompt was cut into chunks, not on the number of threads. Every sum has one order,
//! fixed by the row alone. So `--batch-invariant` costs nothing here and is always on.

mod backend;
mod buffer;
mod cache;
mod draws;
mod linear;
mod memory;
mod options;
pub mod pool;
mod routing;
mod rows;
mod sampling;
pub mod simd;
mod slots;
mod stack;
mod states;
#[cfg(test)]
mod test_support;

pub use backend::CpuBackend;
pub use buffer::{Choice, CpuBuffer, CpuRope, CpuRouting, CpuVector};
pub use linear::CpuLinear;
pub use options::{CpuOptions, default_threads};
pub use stack::CpuStack;
