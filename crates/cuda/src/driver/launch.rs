//! What kernels take, and their launch.
//!
//! Owns the marshalling: each parameter's place in a mirror of the kernel's signature, held to the kernel's own sizes
//! at every launch. The mirrors are in `args.rs`.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::error::{CudaError, DriverCode, Result};
use super::memory::DevicePtr;
use super::module::Kernels;
use super::stream::Gpu;
use crate::kernels::Kernel;

/// Most parameters of a kernel.
const MAX_PARAMETERS: usize = 16;

/// A value with the same bytes on the host and on the device.
///
/// # Safety
/// Of fixed layout: a number, an address, an array of those, or a `repr(C)` struct of those.
pub unsafe trait DeviceValue: Copy + 'static {}

macro_rules! device_values {
    ($($type:ty),*) => { $(
        // SAFETY: a number or an address.
        unsafe impl DeviceValue for $type {}
    )* };
}
device_values!(u8, i8, u16, i16, u32, i32, u64, i64, f32, DevicePtr);

// SAFETY: an array has no bytes of its own.
unsafe impl<T: DeviceValue, const N: usize> DeviceValue for [T; N] {}

/// Where a parameter is inside its mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Bytes from the mirror's start.
    pub offset: usize,
    /// Its bytes.
    pub bytes: usize,
}

/// The arguments of a kernel, as it takes them.
///
/// # Safety
/// [`Self::PARAMETERS`] lie inside the value and are of type [`DeviceValue`]. `kernel_args!` and `device_struct!` see to
/// it.
pub unsafe trait KernelArgs: Copy + 'static {
    /// One entry a parameter, in order.
    const PARAMETERS: &'static [Parameter];
}

/// Defines a struct that a kernel takes by value, alone or with others: the mirror of a C struct, field by field.
///
/// Padding is as in C, from types of equal size and alignment. Alone it is also [`KernelArgs`] of one parameter.
#[macro_export]
#[doc(hidden)]
macro_rules! device_struct {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$field_meta:meta])* $field_vis:vis $field:ident : $type:ty),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        $vis struct $name { $($(#[$field_meta])* $field_vis $field: $type),+ }

        const _: () = {
            const fn is_device_value<T: $crate::DeviceValue>() {}
            $(is_device_value::<$type>();)+
        };

        // SAFETY: `repr(C)`, and each field was held to the trait.
        #[allow(unsafe_code)]
        unsafe impl $crate::DeviceValue for $name {}

        // SAFETY: the whole value is the one parameter.
        #[allow(unsafe_code)]
        unsafe impl $crate::KernelArgs for $name {
            const PARAMETERS: &'static [$crate::Parameter] =
                &[$crate::Parameter { offset: 0, bytes: ::std::mem::size_of::<$name>() }];
        }
    };
}

/// Defines the mirror of a kernel's signature: a field is a parameter.
#[macro_export]
#[doc(hidden)]
macro_rules! kernel_args {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$field_meta:meta])* $field_vis:vis $field:ident : $type:ty),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        $vis struct $name { $($(#[$field_meta])* $field_vis $field: $type),+ }

        const _: () = {
            const fn is_device_value<T: $crate::DeviceValue>() {}
            $(is_device_value::<$type>();)+
        };

        // SAFETY: each parameter is a field, and each field was held to the trait.
        #[allow(unsafe_code)]
        unsafe impl $crate::KernelArgs for $name {
            const PARAMETERS: &'static [$crate::Parameter] = &[$($crate::Parameter {
                offset: ::std::mem::offset_of!($name, $field),
                bytes: ::std::mem::size_of::<$type>(),
            }),+];
        }
    };
}

/// Whether arguments are a kernel's, as far as the bytes of each can say.
fn fits(kernel: Kernel, parameters: &[Parameter]) -> Result<()> {
    let takes = kernel.parameters();
    let same = takes.len() == parameters.len() && takes.iter().zip(parameters).all(|(&t, p)| t == p.bytes);
    if same && takes.len() <= MAX_PARAMETERS {
        return Ok(());
    }
    let given = parameters.iter().map(|p| p.bytes).collect();
    Err(CudaError::Arguments { kernel: kernel.name(), takes, given })
}

impl Kernels {
    /// Launches a kernel behind all that was issued. Where its code can wait for the kernel ahead of it (every kernel
    /// calls `dependency_wait`), it may start before that one has ended: programmatic dependent launch.
    ///
    /// # Errors
    /// [`CudaError::Arguments`] for those of another kernel, [`CudaError::Launch`] if the driver refuses.
    pub fn launch<A: KernelArgs>(
        &self,
        gpu: &Gpu,
        kernel: Kernel,
        grid: (u32, u32, u32),
        block: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        fits(kernel, A::PARAMETERS)?;
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let mut parameters = [std::ptr::null_mut::<c_void>(); MAX_PARAMETERS];
        let start = std::ptr::from_ref(args).cast::<u8>();
        for (place, parameter) in parameters.iter_mut().zip(A::PARAMETERS) {
            // The driver only reads through these.
            *place = start.wrapping_add(parameter.offset).cast_mut().cast();
        }
        let function = self.function(kernel);
        // SAFETY: all fields are numbers or may be zero.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: grid.2,
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: gpu.stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(function.waits),
        };
        // SAFETY: function and stream live; each parameter points to as many bytes as the kernel takes, which the
        // driver copies before it returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.handle,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match DriverCode::of(result) {
            None => Ok(()),
            Some(driver) => Err(CudaError::Launch {
                kernel: kernel.name(),
                grid,
                block,
                shared,
                stream: gpu.stream() as u64,
                driver,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::device_struct! {
        struct Inner { a: u64, b: f32, c: u8 }
    }

    crate::kernel_args! {
        struct Mixed { inner: Inner, at: DevicePtr, small: u32, list: [f32; 3] }
    }

    #[test]
    fn parameters_lie_where_c_puts_them() {
        let sizes: Vec<_> = Mixed::PARAMETERS.iter().map(|p| (p.offset, p.bytes)).collect();
        assert_eq!(sizes, [(0, 16), (16, 8), (24, 4), (28, 12)]);
        assert_eq!(Inner::PARAMETERS, [Parameter { offset: 0, bytes: 16 }]);
    }

    #[test]
    fn arguments_of_another_kernel_are_refused() {
        crate::kernel_args! {
            struct Add { x: DevicePtr, bias: DevicePtr, width: i32 }
        }
        assert_eq!(fits(Kernel::AddBiasBf16, Add::PARAMETERS), Ok(()));
        let Err(error) = fits(Kernel::AddBiasBf16, Mixed::PARAMETERS) else { panic!("accepted") };
        assert_eq!(
            error.to_string(),
            "add_bias_bf16 takes parameters of [8, 8, 4] bytes, not of [16, 8, 4, 12]"
        );
        let fewer = fits(Kernel::AddBiasBf16, &Add::PARAMETERS[..2]);
        assert!(matches!(fewer, Err(CudaError::Arguments { .. })), "{fewer:?}");
    }
}
