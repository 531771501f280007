//! The device code, loaded and resolved.
//!
//! Owns the table from [`Kernel`] to the driver's function. All are resolved at start, so that a kernel that is missing
//! shows there and not in a step.

use std::ffi::c_int;

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};

use super::error::{CudaError, DriverCode, Result, called};
use super::stream::Gpu;
use crate::kernels::{FATBIN, Kernel};

/// Every kernel, ready to be launched with as much dynamic shared memory as the device has.
pub struct Kernels {
    /// The functions belong to the module, and the module to the context.
    gpu: Gpu,
    module: sys::CUmodule,
    functions: Vec<sys::CUfunction>,
    dynamic: Vec<u32>,
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
        let count = Kernel::ALL.len();
        let mut kernels = Self {
            gpu: gpu.clone(),
            module,
            functions: Vec::with_capacity(count),
            dynamic: Vec::with_capacity(count),
        };
        for &kernel in Kernel::ALL {
            let (function, dynamic) = kernels.resolve(kernel)?;
            kernels.functions.push(function);
            kernels.dynamic.push(dynamic);
        }
        Ok(kernels)
    }

    fn resolve(&self, kernel: Kernel) -> Result<(sys::CUfunction, u32)> {
        let mut function = std::ptr::null_mut();
        // SAFETY: a place for one function, a module that lives, a name that ends in zero.
        let result =
            unsafe { sys::cuModuleGetFunction(&raw mut function, self.module, kernel.c_name().as_ptr()) };
        if let Some(driver) = DriverCode::of(result) {
            return Err(CudaError::NoKernel { kernel: kernel.name(), driver });
        }
        Self::compare(kernel, function)?;
        let mut fixed = 0;
        let what = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: a place for one number, a function that lives.
        called(unsafe { sys::cuFuncGetAttribute(&raw mut fixed, what, function) }, "cuFuncGetAttribute")?;
        let dynamic = self.gpu.facts().shared_memory.saturating_sub(fixed.unsigned_abs());
        let what = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function that lives.
        called(unsafe { sys::cuFuncSetAttribute(function, what, dynamic as c_int) }, "cuFuncSetAttribute")?;
        Ok((function, dynamic))
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

    /// The driver's function.
    pub(super) fn function(&self, kernel: Kernel) -> sys::CUfunction {
        self.functions[kernel as usize]
    }

    /// Most bytes of dynamic shared memory that a launch of a kernel may ask for.
    pub fn dynamic_shared_memory(&self, kernel: Kernel) -> u32 {
        self.dynamic[kernel as usize]
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // What fails here fails because the context is lost.
        let _ = self.gpu.synchronize();
        // SAFETY: loaded in `load`, unloaded once, and nothing runs.
        unsafe { sys::cuModuleUnload(self.module) };
    }
}
