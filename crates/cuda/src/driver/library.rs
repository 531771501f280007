//! Whether there is a driver, and whether it has what is called.
//!
//! The bindings load the driver at their first call and panic where it, or a function, is missing; so this module
//! looks first, and nothing else of the crate calls the driver before [`probe`] has said yes.

use cudarc::driver::sys;

use super::error::{DriverCode, OpenError, called};

/// The driver's library, as people look for it.
pub(super) const DRIVER: &str = "libcuda.so.1";
/// The least driver: the device code is built by the toolkit of CUDA 13.0.
const NEEDED: i32 = 13_000;

/// Every function of the driver that this crate calls.
const SYMBOLS: [&str; 47] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetAttribute",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuFuncGetParamInfo",
    "cuFuncLoad",
    "cuLaunchKernelEx",
    "cuGraphInstantiateWithFlags",
    "cuGraphUpload",
    "cuGraphLaunch",
    "cuGraphGetNodes",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGetErrorName",
    "cuGetErrorString",
];

/// Number of devices. The driver is initialised afterwards.
///
/// # Errors
/// What is missing.
pub(super) fn probe() -> Result<usize, OpenError> {
    // SAFETY: runs the library's initialisers, which is what loading a driver means; nothing else is called.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpenError::NoLibrary { library: DRIVER });
    }
    // SAFETY: the library is there, so it does not panic.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the symbol is looked up, not called.
        if unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
            return Err(OpenError::NoSymbol { library: DRIVER, symbol });
        }
    }
    let mut found = 0;
    // SAFETY: a place for one number; may be called before `cuInit`.
    called(unsafe { sys::cuDriverGetVersion(&raw mut found) }, "cuDriverGetVersion")?;
    if found < NEEDED {
        return Err(OpenError::TooOld { found, needed: NEEDED });
    }
    // SAFETY: no arguments that could be wrong; may be called again.
    let started = unsafe { sys::cuInit(0) };
    match DriverCode::of(started) {
        None => {}
        Some(_) if started == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(OpenError::NoDevice),
        Some(_) => called(started, "cuInit")?,
    }
    let mut devices = 0;
    // SAFETY: a place for one number, after `cuInit`.
    called(unsafe { sys::cuDeviceGetCount(&raw mut devices) }, "cuDeviceGetCount")?;
    match usize::try_from(devices) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(OpenError::NoDevice),
    }
}
