//! What the device says about itself: energy, power, memory, clocks, faults.
//!
//! Owns the connection to NVML, which is loaded when it is asked for. Without it, or without one of its functions,
//! there are no figures, and nothing else changes.

use super::stream::Facts;

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

/// A connection to NVML.
pub struct Telemetry {}

impl Telemetry {
    /// Connects, if there is something to connect to.
    pub fn open(_facts: &Facts) -> Option<Self> {
        None
    }

    /// Asks for all figures.
    pub fn read(&self) -> TelemetryReading {
        TelemetryReading::default()
    }
}
