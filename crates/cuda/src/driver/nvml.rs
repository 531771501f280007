//! What the device says about itself: energy, power, memory, clocks, faults.
//!
//! Owns the connection to NVML, which is loaded when it is asked for. Without it, or without one of its functions,
//! there are no figures, and nothing else changes.

use std::ffi::{CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

use libloading::Library;

/// The library, as the driver installs it.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// `NVML_SUCCESS`.
const SUCCESS: c_int = 0;
/// `NVML_CLOCK_SM`.
const CLOCK_SM: c_uint = 1;
/// `NVML_CLOCK_MEM`.
const CLOCK_MEMORY: c_uint = 2;
/// `nvmlEventTypeXidCriticalError`.
const XID_CRITICAL: c_ulonglong = 8;
/// Most faults that one reading takes from the queue.
const MAX_EVENTS: usize = 64;

/// Figures at a moment; what the device or the driver does not have is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TelemetryReading {
    /// Joules since the driver was loaded.
    pub energy_joules: Option<f64>,
    /// Watts now.
    pub power_watts: Option<f64>,
    /// Bytes in use, of all processes.
    pub memory_used: Option<u64>,
    /// Bytes in all.
    pub memory_total: Option<u64>,
    /// Clock of the multiprocessors, MHz.
    pub sm_clock_mhz: Option<u32>,
    /// Clock of the memory, MHz.
    pub memory_clock_mhz: Option<u32>,
    /// The last critical fault (XID) since the connection was made.
    pub xid: Option<u64>,
}

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// `nvmlEventData_t`.
#[repr(C)]
struct EventData {
    device: *mut c_void,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// A connection to NVML, for one device. May be used from any thread.
pub struct Telemetry {
    library: Library,
    /// Handles, as numbers: NVML says when they are good on any thread.
    device: usize,
    events: Option<usize>,
    /// The last fault; 0 is none.
    xid: AtomicU64,
}

impl Telemetry {
    /// Connects to the device at a PCI bus address ([`Facts::bus`](super::Facts::bus)), if there is NVML.
    pub fn open(bus: &str) -> Option<Self> {
        let bus = CString::new(bus).ok()?;
        // SAFETY: runs the library's initialisers, which is what loading it means.
        let library = unsafe { Library::new(LIBRARY) }.ok()?;
        // SAFETY: the type of `nvmlInit_v2`.
        let init = unsafe { library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2") }.ok()?;
        // SAFETY: takes nothing.
        if unsafe { init() } != SUCCESS {
            return None;
        }
        let mut telemetry = Self { library, device: 0, events: None, xid: AtomicU64::new(0) };
        let mut device: *mut c_void = std::ptr::null_mut();
        type ByBus = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
        // SAFETY: the function's type; a string that ends in zero and a place for one handle.
        unsafe {
            telemetry.call::<ByBus>(b"nvmlDeviceGetHandleByPciBusId_v2", |f| f(bus.as_ptr(), &raw mut device))
        }?;
        telemetry.device = device as usize;
        telemetry.events = telemetry.listen();
        Some(telemetry)
    }

    /// Asks for all figures. Takes some microseconds.
    pub fn read(&self) -> TelemetryReading {
        let memory = self.memory();
        TelemetryReading {
            energy_joules: self.energy().map(|millijoules| millijoules as f64 / 1e3),
            power_watts: self
                .number(b"nvmlDeviceGetPowerUsage")
                .map(|milliwatts| f64::from(milliwatts) / 1e3),
            memory_used: memory.as_ref().map(|m| m.used),
            memory_total: memory.as_ref().map(|m| m.total),
            sm_clock_mhz: self.clock(CLOCK_SM),
            memory_clock_mhz: self.clock(CLOCK_MEMORY),
            xid: self.last_xid(),
        }
    }

    /// Microjoules of the whole board, all its processes together, since the driver was loaded, if the device has such a
    /// counter. It moves some ten times a second. Takes some tens of microseconds.
    pub fn energy_microjoules(&self) -> Option<u64> {
        self.energy().map(|millijoules| millijoules * 1000)
    }

    /// Calls a function of the library; none if it is not there or fails.
    ///
    /// # Safety
    /// `F` is the function's type, and `call` calls it with arguments that it may have.
    unsafe fn call<F>(&self, name: &[u8], call: impl FnOnce(&F) -> c_int) -> Option<()> {
        // SAFETY: as the caller promises.
        let function = unsafe { self.library.get::<F>(name) }.ok()?;
        (call(&function) == SUCCESS).then_some(())
    }

    fn handle(&self) -> *mut c_void {
        self.device as *mut c_void
    }

    fn energy(&self) -> Option<u64> {
        type Energy = unsafe extern "C" fn(*mut c_void, *mut c_ulonglong) -> c_int;
        let mut value = 0;
        // SAFETY: the function's type; a handle of this library and a place for one number.
        unsafe {
            self.call::<Energy>(b"nvmlDeviceGetTotalEnergyConsumption", |f| f(self.handle(), &raw mut value))
        }?;
        Some(value)
    }

    /// A figure of 32 bits.
    fn number(&self, name: &[u8]) -> Option<u32> {
        type Number = unsafe extern "C" fn(*mut c_void, *mut c_uint) -> c_int;
        let mut value = 0;
        // SAFETY: as in `energy`, for the functions that this is called with.
        unsafe { self.call::<Number>(name, |f| f(self.handle(), &raw mut value)) }?;
        Some(value)
    }

    fn clock(&self, which: c_uint) -> Option<u32> {
        type Clock = unsafe extern "C" fn(*mut c_void, c_uint, *mut c_uint) -> c_int;
        let mut value = 0;
        // SAFETY: as in `energy`.
        unsafe {
            self.call::<Clock>(b"nvmlDeviceGetClockInfo", |f| f(self.handle(), which, &raw mut value))
        }?;
        Some(value)
    }

    fn memory(&self) -> Option<Memory> {
        type Info = unsafe extern "C" fn(*mut c_void, *mut Memory) -> c_int;
        let mut value = Memory::default();
        // SAFETY: as in `energy`, with a place for the struct of that version of the function.
        unsafe { self.call::<Info>(b"nvmlDeviceGetMemoryInfo", |f| f(self.handle(), &raw mut value)) }?;
        Some(value)
    }

    /// Asks NVML to keep critical faults for us.
    fn listen(&self) -> Option<usize> {
        type Create = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
        type Register = unsafe extern "C" fn(*mut c_void, c_ulonglong, *mut c_void) -> c_int;
        let mut set: *mut c_void = std::ptr::null_mut();
        // SAFETY: the function's type; a place for one handle.
        unsafe { self.call::<Create>(b"nvmlEventSetCreate", |f| f(&raw mut set)) }?;
        // SAFETY: the function's type; handles of this library.
        unsafe {
            self.call::<Register>(b"nvmlDeviceRegisterEvents", |f| f(self.handle(), XID_CRITICAL, set))
        }?;
        Some(set as usize)
    }

    /// Takes what has come, without waiting.
    fn last_xid(&self) -> Option<u64> {
        type Wait = unsafe extern "C" fn(*mut c_void, *mut EventData, c_uint) -> c_int;
        let set = self.events? as *mut c_void;
        for _ in 0..MAX_EVENTS {
            let mut event = EventData {
                device: std::ptr::null_mut(),
                kind: 0,
                data: 0,
                gpu_instance: 0,
                compute_instance: 0,
            };
            // SAFETY: the function's type; a set of this library, a place for one event, no wait.
            let came = unsafe { self.call::<Wait>(b"nvmlEventSetWait_v2", |f| f(set, &raw mut event, 0)) };
            if came.is_none() {
                break;
            }
            if event.kind == XID_CRITICAL {
                self.xid.store(event.data, Ordering::Relaxed);
            }
        }
        Some(self.xid.load(Ordering::Relaxed)).filter(|&xid| xid != 0)
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(set) = self.events {
            // SAFETY: the function's type; a set of this library, freed once.
            unsafe {
                self.call::<unsafe extern "C" fn(*mut c_void) -> c_int>(b"nvmlEventSetFree", |f| {
                    f(set as *mut c_void)
                });
            }
        }
        // SAFETY: the function's type; answers the one call of `nvmlInit_v2`.
        unsafe { self.call::<unsafe extern "C" fn() -> c_int>(b"nvmlShutdown", |f| f()) };
    }
}
