//! Errors of the device: which call, on what, and the driver's own name for it.
//!
//! Owns the mapping from codes to names. Never decides what an error means for a request or the process.

use std::ffi::CStr;

use cudarc::driver::sys;

/// Result of anything that the device does.
pub type Result<T, E = CudaError> = std::result::Result<T, E>;

/// The driver's code and its name for it, e.g. 700, `CUDA_ERROR_ILLEGAL_ADDRESS`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} ({code})")]
pub struct DriverCode {
    /// `CUresult`.
    pub code: u32,
    /// As `cuGetErrorName` has it.
    pub name: String,
}

impl DriverCode {
    /// None for success.
    pub(super) fn of(result: sys::CUresult) -> Option<Self> {
        if result == sys::CUresult::CUDA_SUCCESS {
            return None;
        }
        let mut name: *const std::ffi::c_char = std::ptr::null();
        // SAFETY: `name` is a place for one pointer; the string that it then names is static in the driver.
        let known = unsafe { sys::cuGetErrorName(result, &raw mut name) };
        let name = if known == sys::CUresult::CUDA_SUCCESS && !name.is_null() {
            // SAFETY: the driver returned a string that ends in zero.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        } else {
            "unknown".to_owned()
        };
        Some(Self { code: result as u32, name })
    }

    /// Whether the context is lost: nothing of it can be used any more, and only a new process helps.
    pub fn is_fatal(&self) -> bool {
        // Sticky errors: what a kernel did to the context, and what the hardware reported.
        matches!(self.code, 214 | 220 | 226 | 700 | 702 | 708 | 709 | 710 | 714..=719 | 999)
    }
}

/// A call to the device failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// A call of the driver.
    #[error("{operation} on stream {stream:#x}: {driver}")]
    Driver {
        /// Which, with its sizes.
        operation: String,
        /// The stream it was issued to; 0 for a call without one.
        stream: u64,
        /// What the driver said.
        driver: DriverCode,
    },
    /// A kernel's launch. What a kernel does wrong while it runs shows in a later call.
    #[error(
        "launch of {kernel}, grid {}x{}x{}, {block} threads, {shared} bytes shared, on stream {stream:#x}: {driver}",
        grid.0, grid.1, grid.2
    )]
    Launch {
        /// Its name in the fatbin.
        kernel: &'static str,
        /// Blocks.
        grid: (u32, u32, u32),
        /// Threads of a block.
        block: u32,
        /// Dynamic shared memory, bytes.
        shared: u32,
        /// The stream it was issued to.
        stream: u64,
        /// What the driver said.
        driver: DriverCode,
    },
    /// Arguments of another kernel.
    #[error("{kernel} takes parameters of {takes:?} bytes, not of {given:?}")]
    Arguments {
        /// Its name in the fatbin.
        kernel: &'static str,
        /// Bytes of each parameter.
        takes: &'static [usize],
        /// What was given.
        given: Vec<usize>,
    },
    /// The fatbin and the code do not belong together.
    #[error("the device code has no kernel {kernel}: {driver}")]
    NoKernel {
        /// Its name.
        kernel: &'static str,
        /// What the driver said.
        driver: DriverCode,
    },
    /// A copy that is longer than what it reads or writes on the host.
    #[error("{what}: {bytes} bytes, room for {room}")]
    Room {
        /// Which buffer.
        what: &'static str,
        /// Bytes wanted.
        bytes: usize,
        /// Bytes there.
        room: usize,
    },
    /// The arena has no more room.
    #[error("device memory: {wanted} bytes for {part}, {left} left of the arena's {arena}")]
    Arena {
        /// What for.
        part: &'static str,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes left.
        left: u64,
        /// Bytes of the arena.
        arena: u64,
    },
    /// A library is not there.
    #[error("{library} could not be loaded")]
    NoLibrary {
        /// Its file's name.
        library: &'static str,
    },
    /// A library that lacks a function.
    #[error("{library} lacks {symbol}")]
    NoSymbol {
        /// Its file's name.
        library: &'static str,
        /// The function.
        symbol: &'static str,
    },
    /// A call of cublasLt.
    #[error("{operation} for {shape}: cublasLt status {name} ({status})")]
    Lt {
        /// Which.
        operation: &'static str,
        /// Rows, outputs, inner size and storage; or what else it is about.
        shape: String,
        /// `cublasStatus_t`.
        status: u32,
        /// cublasLt's name for it.
        name: String,
    },
    /// cublasLt has no algorithm for a product.
    #[error("cublasLt has no algorithm for {shape} in {workspace} bytes of workspace")]
    NoAlgorithm {
        /// Rows, outputs, inner size and storage.
        shape: String,
        /// Bytes.
        workspace: usize,
    },
}

impl CudaError {
    /// Whether the context is lost.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Driver { driver, .. } | Self::Launch { driver, .. } | Self::NoKernel { driver, .. } => {
                driver.is_fatal()
            }
            _ => false,
        }
    }
}

/// Why no device could be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No driver on this machine.
    #[error("no CUDA driver: {library} could not be loaded")]
    NoLibrary {
        /// The file that was looked for.
        library: &'static str,
    },
    /// A driver that lacks a function.
    #[error("the CUDA driver {library} lacks {symbol}")]
    NoSymbol {
        /// The file.
        library: &'static str,
        /// The function.
        symbol: &'static str,
    },
    /// The driver is older than the device code.
    #[error(
        "the CUDA driver supports CUDA {}.{}, but {}.{} is needed", found / 1000, found % 1000 / 10,
        needed / 1000, needed % 1000 / 10
    )]
    TooOld {
        /// As `cuDriverGetVersion` has it: 1000 times major plus 10 times minor.
        found: i32,
        /// The least.
        needed: i32,
    },
    /// A driver, but nothing to drive.
    #[error("no CUDA device")]
    NoDevice,
    /// Fewer devices than asked for.
    #[error("no CUDA device {ordinal}: there are {devices}")]
    NoSuchDevice {
        /// Asked for, from 0.
        ordinal: usize,
        /// How many there are.
        devices: usize,
    },
    /// The device is too old for the kernels.
    #[error("{device} has compute capability {}.{}, but 8.0 is the least", capability.0, capability.1)]
    Capability {
        /// Its name.
        device: String,
        /// Major and minor.
        capability: (u32, u32),
    },
    /// A call of the driver.
    #[error("{0}")]
    Driver(#[from] CudaError),
}

/// Names the operation if `result` is a failure; `stream` is 0 for a call without one.
pub(super) fn check(
    result: sys::CUresult,
    stream: sys::CUstream,
    operation: impl FnOnce() -> String,
) -> Result<()> {
    match DriverCode::of(result) {
        None => Ok(()),
        Some(driver) => Err(CudaError::Driver { operation: operation(), stream: stream as u64, driver }),
    }
}

/// As [`check`], for a call without a stream and without sizes.
pub(super) fn called(result: sys::CUresult, operation: &str) -> Result<()> {
    check(result, std::ptr::null_mut(), || operation.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loses_the_context_is_told_from_what_does_not() {
        let code = |code| DriverCode { code, name: "X".to_owned() };
        for lost in [214, 220, 700, 715, 719, 999] {
            assert!(code(lost).is_fatal(), "{lost}");
        }
        for kept in [1, 2, 100, 209, 600, 701, 900] {
            assert!(!code(kept).is_fatal(), "{kept}");
        }
        let error = CudaError::NoKernel { kernel: "k", driver: code(719) };
        assert!(error.is_fatal());
        assert!(!CudaError::NoLibrary { library: "l" }.is_fatal());
    }

    #[test]
    fn messages_carry_the_numbers() {
        let driver = DriverCode { code: 701, name: "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES".to_owned() };
        let launch = CudaError::Launch {
            kernel: "add_bf16",
            grid: (3, 2, 1),
            block: 256,
            shared: 1024,
            stream: 0x10,
            driver,
        };
        let wanted = "launch of add_bf16, grid 3x2x1, 256 threads, 1024 bytes shared, on stream 0x10: \
                      CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)";
        assert_eq!(launch.to_string(), wanted);
        let old = OpenError::Capability { device: "Tesla V100".to_owned(), capability: (7, 0) };
        assert_eq!(old.to_string(), "Tesla V100 has compute capability 7.0, but 8.0 is the least");
        let lacks = OpenError::NoSymbol { library: "libcuda.so.1", symbol: "cuLaunchKernelEx" };
        assert_eq!(lacks.to_string(), "the CUDA driver libcuda.so.1 lacks cuLaunchKernelEx");
        let lt = CudaError::Lt {
            operation: "compute",
            shape: "64 x 8 x 8 Bf16".to_owned(),
            status: 13,
            name: "CUBLAS_STATUS_EXECUTION_FAILED".to_owned(),
        };
        let wanted = "compute for 64 x 8 x 8 Bf16: cublasLt status CUBLAS_STATUS_EXECUTION_FAILED (13)";
        assert_eq!(lt.to_string(), wanted);
    }
}
