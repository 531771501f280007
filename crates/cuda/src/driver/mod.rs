//! The driver, wrapped: the one place of the crate that calls it, and the one with `unsafe`.
//!
//! Owns context, stream, memory, kernels, graphs, cublasLt and NVML. What it gives out can be used without `unsafe`.
//! Addresses on the device are outside of what the compiler can check: a kernel given a wrong one fails on the device,
//! and the next call says so.

#![allow(unsafe_code)]

mod error;
mod graph;
mod launch;
mod library;
mod lt;
mod lt_file;
mod lt_product;
mod lt_shape;
mod lt_tune;
mod memory;
mod module;
mod nvml;
#[cfg(feature = "test-hooks")]
mod redzone;
mod stream;

pub use error::{CudaError, DriverCode, OpenError, Result};
pub use graph::Graph;
pub use launch::{DeviceValue, KernelArgs, Parameter};
pub use lt::{Lt, LtPlan};
pub use lt_shape::{LtOperands, LtOptions, LtOutput, LtShape, LtStorage};
pub use memory::{ALIGNMENT, Arena, DevicePtr, Loader, Part, ReadBack, Ticket, UploadRing};
pub use module::Kernels;
pub use nvml::{Telemetry, TelemetryReading};
pub use stream::{DeviceMemory, Event, Facts, Gpu};
