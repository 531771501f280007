//! NVIDIA GPUs as a [`Backend`](mirai_model::backend::Backend): own kernels on one stream, one arena, captured graphs.
//!
//! Knows weights, activations, pages and slots; never an architecture, never the engine's reasons. The driver is found
//! at run time ([`Gpu::probe`]), so that the same binary starts on a machine without one.
//!
//! `unsafe` is confined to [`driver`].

mod args;
mod backend;
mod budget;
mod buffer;
mod device;
pub mod driver;
mod error;
mod history;
mod kernels;
mod kernels_table;
mod memory;
mod options;
mod products;
mod records;
mod sampling;
mod slots;
mod steps;
mod upload;
mod weights;
mod work;

pub use backend::CudaBackend;
pub use budget::{Budget, BudgetError, CacheNeed, MemoryOptions};
pub use buffer::{CudaBuffer, CudaLinear, CudaRope, CudaRouting, CudaStack, CudaVector};
pub use driver::{
    ALIGNMENT, Arena, CudaError, DeviceMemory, DevicePtr, DeviceValue, DriverCode, Event, Facts, Gpu, Graph,
    KernelArgs, Kernels, Loader, Lt, LtOperands, LtOptions, LtOutput, LtPlan, LtShape, LtStorage, OpenError,
    Parameter, Part, ReadBack, Result, Telemetry, TelemetryReading, Ticket, UploadRing,
};
pub use kernels::Kernel;
pub use options::CudaOptions;
pub use upload::EDITS_A_ROW;
