//! A device: its context, its one stream, and events on it.
//!
//! Owns their lives. Everything else of the device holds a [`Gpu`], so that the context outlives it. Not `Send`: a
//! context is current on one thread, the engine's.

use std::ffi::{CStr, c_char, c_int};
use std::rc::Rc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::error::{OpenError, Result, called, check};
use super::library;

/// The least that the kernels are built for.
const LEAST_CAPABILITY: (u32, u32) = (8, 0);

/// What is known of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Which of those that the process sees, from 0.
    pub ordinal: usize,
    /// E.g. `NVIDIA H200`.
    pub name: String,
    /// Domain, bus and device; NVML knows it by the same name.
    pub bus: String,
    /// Major and minor compute capability, e.g. (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Most bytes of shared memory that a block may ask for.
    pub shared_memory: u32,
    /// Bytes of shared memory that a multiprocessor has for all its blocks.
    pub multiprocessor_shared_memory: u32,
    /// Bytes of the second-level cache.
    pub l2: u64,
    /// Version of the driver: 1000 times major plus 10 times minor.
    pub driver: u32,
}

/// Memory of a device at a moment, in bytes; other processes count too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Not allocated.
    pub free: u64,
    /// All.
    pub total: u64,
}

/// A device with its context and stream. Clones name the same.
#[derive(Clone)]
pub struct Gpu {
    inner: Rc<Inner>,
}

struct Inner {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    facts: Facts,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: made in `Gpu::open`, destroyed once. What fails here fails because the context is lost.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            if !self.stream.is_null() {
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("facts", &self.inner.facts).finish_non_exhaustive()
    }
}

impl Gpu {
    /// Number of devices.
    ///
    /// # Errors
    /// Why there are none.
    pub fn probe() -> Result<usize, OpenError> {
        library::probe()
    }

    /// What is known of a device, without opening it.
    ///
    /// # Errors
    /// No driver, no such device, or one that the kernels are not built for.
    pub fn look(ordinal: usize) -> Result<Facts, OpenError> {
        let devices = library::probe()?;
        if ordinal >= devices {
            return Err(OpenError::NoSuchDevice { ordinal, devices });
        }
        let facts = facts(device(ordinal)?, ordinal)?;
        if facts.capability < LEAST_CAPABILITY {
            return Err(OpenError::Capability { device: facts.name, capability: facts.capability });
        }
        Ok(facts)
    }

    /// Opens a device and makes its context current on this thread.
    ///
    /// # Errors
    /// As [`Self::look`]; the driver's.
    pub fn open(ordinal: usize) -> Result<Self, OpenError> {
        let facts = Self::look(ordinal)?;
        let device = device(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for one context of a device that exists; released when the last `Gpu` goes.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
        called(result, "cuDevicePrimaryCtxRetain")?;
        // From here on the context is given back, whatever fails.
        let mut inner = Inner { device, context, stream: std::ptr::null_mut(), facts };
        Self::current(inner.context, &mut inner.stream)?;
        Ok(Self { inner: Rc::new(inner) })
    }

    /// Makes a context current on this thread, and a stream in it that does not wait for the legacy stream.
    fn current(context: sys::CUcontext, stream: &mut sys::CUstream) -> Result<()> {
        // SAFETY: a context that lives.
        called(unsafe { sys::cuCtxSetCurrent(context) }, "cuCtxSetCurrent")?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place for one stream, in the current context.
        called(unsafe { sys::cuStreamCreate(stream, flags) }, "cuStreamCreate")
    }

    /// What is known of the device.
    pub fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    /// Memory as it is now.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<DeviceMemory> {
        device_memory()
    }

    /// Waits until all that was issued is done. Not while capturing.
    ///
    /// # Errors
    /// Also those of kernels issued before.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        let result = unsafe { sys::cuStreamSynchronize(self.stream()) };
        check(result, self.stream(), || "synchronize".to_owned())
    }

    /// The one stream.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.inner.stream
    }
}

/// Memory of the current context's device.
fn device_memory() -> Result<DeviceMemory> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: places for two numbers.
    called(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "cuMemGetInfo")?;
    Ok(DeviceMemory { free: free as u64, total: total as u64 })
}

/// The handle of a device that exists.
fn device(ordinal: usize) -> Result<sys::CUdevice> {
    let mut device = 0;
    // SAFETY: a place for one device; the driver refuses an ordinal that is none.
    called(unsafe { sys::cuDeviceGet(&raw mut device, ordinal as c_int) }, "cuDeviceGet")?;
    Ok(device)
}

fn facts(device: sys::CUdevice, ordinal: usize) -> Result<Facts> {
    let attribute = |which: Attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: a place for one number, a device that exists.
        called(unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) }, "cuDeviceGetAttribute")?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let mut driver = 0;
    // SAFETY: a place for one number.
    called(unsafe { sys::cuDriverGetVersion(&raw mut driver) }, "cuDriverGetVersion")?;
    let name = text("cuDeviceGetName", |place, bytes| {
        // SAFETY: the length is that of the place; the driver writes a string that ends in zero.
        unsafe { sys::cuDeviceGetName(place, bytes, device) }
    })?;
    let bus = text("cuDeviceGetPCIBusId", |place, bytes| {
        // SAFETY: as above.
        unsafe { sys::cuDeviceGetPCIBusId(place, bytes, device) }
    })?;
    let mut memory = 0;
    // SAFETY: a place for one number, a device that exists.
    called(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) }, "cuDeviceTotalMem")?;
    Ok(Facts {
        ordinal,
        name,
        bus,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory as u64,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        multiprocessor_shared_memory: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        l2: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        driver: driver.unsigned_abs(),
    })
}

/// A string that the driver writes into a place of a given length.
fn text(operation: &str, write: impl FnOnce(*mut c_char, c_int) -> sys::CUresult) -> Result<String> {
    let mut place = [0u8; 128];
    called(write(place.as_mut_ptr().cast(), place.len() as c_int - 1), operation)?;
    let text = CStr::from_bytes_until_nul(&place).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

/// A point in the stream's work.
pub struct Event {
    gpu: Gpu,
    event: sys::CUevent,
}

impl Event {
    /// One that can be waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Self::with(gpu, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// One that also knows when.
    ///
    /// # Errors
    /// The driver's.
    pub fn timed(gpu: &Gpu) -> Result<Self> {
        Self::with(gpu, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with(gpu: &Gpu, flags: sys::CUevent_flags) -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for one event in the current context.
        called(unsafe { sys::cuEventCreate(&raw mut event, flags as u32) }, "cuEventCreate")?;
        Ok(Self { gpu: gpu.clone(), event })
    }

    /// Puts it behind all that was issued.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self) -> Result<()> {
        // SAFETY: event and stream live as long as `self`.
        let result = unsafe { sys::cuEventRecord(self.event, self.gpu.stream()) };
        check(result, self.gpu.stream(), || "record an event".to_owned())
    }

    /// Waits until the work before it is done; at once if it was never recorded.
    ///
    /// # Errors
    /// Also those of kernels issued before it.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event lives as long as `self`.
        let result = unsafe { sys::cuEventSynchronize(self.event) };
        check(result, self.gpu.stream(), || "wait for an event".to_owned())
    }

    /// Whether the work before it is done.
    ///
    /// # Errors
    /// Also those of kernels issued before it.
    pub fn is_done(&self) -> Result<bool> {
        // SAFETY: the event lives as long as `self`.
        let result = unsafe { sys::cuEventQuery(self.event) };
        if result == sys::CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        check(result, self.gpu.stream(), || "look at an event".to_owned()).map(|()| true)
    }

    /// Milliseconds from `earlier` to this one. Both timed, recorded and done.
    ///
    /// # Errors
    /// The driver's, for instance that one of them is not done.
    pub fn since(&self, earlier: &Self) -> Result<f32> {
        let mut milliseconds = 0.0;
        // SAFETY: a place for one number, two events that live.
        let result = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, earlier.event, self.event) };
        check(result, self.gpu.stream(), || "time between events".to_owned()).map(|()| milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `with`, destroyed once; the driver waits for work that uses it.
        unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}
