//! The device code, loaded and resolved.
//!
//! Owns the table from [`Kernel`] to the driver's function. All are resolved at start, so that a kernel that is missing
//! shows there and not in a step.

use std::ffi::c_int;

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};

use super::error::{CudaError, DriverCode, Result, called};
use super::stream::Gpu;
use crate::kernels::{FATBIN, Kernel};

/// The least virtual architecture of which `dependency_wait` is an instruction; below it is nothing at all.
const WAITING: i32 = 90;

/// A kernel as the driver knows it.
#[derive(Clone, Copy)]
pub(super) struct Function {
    pub(super) handle: sys::CUfunction,
    /// Most bytes of dynamic shared memory.
    dynamic: u32,
    /// Whether it waits by itself for the kernel ahead of it. Code for older devices does not, nor does code that the
    /// driver has compiled from PTX because it has none for this device: those must not start early.
    pub(super) waits: bool,
}

/// Every kernel, ready to be launched with as much dynamic shared memory as the device has.
pub struct Kernels {
    /// The functions belong to the module, and the module to the context.
    gpu: Gpu,
    module: sys::CUmodule,
    functions: Vec<Function>,
}

impl Kernels {
    /// Loads the embedded device code.
    ///
    /// # Errors
    /// The driver's, and [`CudaError::NoKernel`].
    pub fn load(gpu: &Gpu) -> Result<Self> {
        let mut module = std::ptr::null_mut();
        // SAFETY: a place for one module, and a whole fatbin, whose header says where it ends.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, FATBIN.as_ptr().cast()) };
        called(result, "load the device code")?;
        let mut kernels = Self { gpu: gpu.clone(), module, functions: Vec::with_capacity(Kernel::ALL.len()) };
        for &kernel in Kernel::ALL {
            let function = kernels.resolve(kernel)?;
            kernels.functions.push(function);
        }
        if !kernels.functions.iter().all(|function| function.waits) {
            tracing::info!(
                "kernels do not overlap: the device is older than 9.0, or its code comes from PTX"
            );
        }
        Ok(kernels)
    }

    fn resolve(&self, kernel: Kernel) -> Result<Function> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for one function, a module that lives, a name that ends in zero.
        let result =
            unsafe { sys::cuModuleGetFunction(&raw mut handle, self.module, kernel.c_name().as_ptr()) };
        if let Some(driver) = DriverCode::of(result) {
            return Err(CudaError::NoKernel { kernel: kernel.name(), driver });
        }
        // SAFETY: a function that lives. Otherwise its first launch would load it, perhaps while that is recorded.
        called(unsafe { sys::cuFuncLoad(handle) }, "cuFuncLoad")?;
        Self::compare(kernel, handle)?;
        let fixed = attribute(handle, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let waits = attribute(handle, Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= WAITING;
        let dynamic = self.gpu.facts().shared_memory.saturating_sub(fixed.unsigned_abs());
        let what = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function that lives.
        let result = unsafe { sys::cuFuncSetAttribute(handle, what, dynamic as c_int) };
        called(result, "cuFuncSetAttribute")?;
        Ok(Function { handle, dynamic, waits })
    }

    /// Holds the list's parameters to the device code's.
    fn compare(kernel: Kernel, function: sys::CUfunction) -> Result<()> {
        let takes = kernel.parameters();
        let mut given = Vec::new();
        // One more than there should be: the driver refuses the first that is not there.
        for index in 0..=takes.len() {
            let (mut offset, mut bytes) = (0, 0);
            // SAFETY: a function that lives, places for two numbers.
            let result = unsafe { sys::cuFuncGetParamInfo(function, index, &raw mut offset, &raw mut bytes) };
            if DriverCode::of(result).is_some() {
                break;
            }
            given.push(bytes);
        }
        if given == takes {
            Ok(())
        } else {
            Err(CudaError::Arguments { kernel: kernel.name(), takes, given })
        }
    }

    pub(super) fn function(&self, kernel: Kernel) -> Function {
        self.functions[kernel as usize]
    }

    /// Whether a kernel may start before the one ahead of it has ended.
    pub fn overlaps(&self, kernel: Kernel) -> bool {
        self.function(kernel).waits
    }

    /// Most bytes of dynamic shared memory that a launch of a kernel may ask for.
    pub fn dynamic_shared_memory(&self, kernel: Kernel) -> u32 {
        self.function(kernel).dynamic
    }
}

fn attribute(function: sys::CUfunction, which: Attribute) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: a place for one number, a function that lives.
    called(unsafe { sys::cuFuncGetAttribute(&raw mut value, which, function) }, "cuFuncGetAttribute")?;
    Ok(value)
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // What fails here fails because the context is lost.
        let _ = self.gpu.synchronize();
        // SAFETY: loaded in `load`, unloaded once, and nothing runs.
        unsafe { sys::cuModuleUnload(self.module) };
    }
}
