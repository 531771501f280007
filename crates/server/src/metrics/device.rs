//! What the device says about itself.
//!
//! Owns the names of its figures. Who asks the device, and how often, is the caller's: a scrape must not wait for it.

use std::sync::atomic::{AtomicU64, Ordering};

/// A figure of the device that computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFigure {
    /// Joules since its driver was loaded.
    Energy,
    /// Watts.
    Power,
    /// Bytes in use, of all processes.
    MemoryUsed,
    /// Bytes in all.
    Memory,
    /// Clock of its processors, Hz.
    Clock,
    /// Clock of its memory, Hz.
    MemoryClock,
    /// Number of its last critical fault; 0 if there was none.
    Fault,
}

impl DeviceFigure {
    /// All, in the page's order, with name, type and help.
    pub(super) const ALL: [(Self, &'static str, &'static str, &'static str); 7] = [
        (Self::Energy, "mirai_gpu_energy_joules_total", "counter", "Energy since the driver was loaded."),
        (Self::Power, "mirai_gpu_power_watts", "gauge", "Power."),
        (Self::MemoryUsed, "mirai_gpu_memory_used_bytes", "gauge", "Memory in use, of all processes."),
        (Self::Memory, "mirai_gpu_memory_bytes", "gauge", "Memory in all."),
        (Self::Clock, "mirai_gpu_clock_hertz", "gauge", "Clock of the multiprocessors."),
        (Self::MemoryClock, "mirai_gpu_memory_clock_hertz", "gauge", "Clock of the memory."),
        (Self::Fault, "mirai_gpu_last_xid", "gauge", "Number of the last critical fault (XID); 0 is none."),
    ];
}

/// The last known figures.
#[derive(Debug)]
pub(crate) struct Device([AtomicU64; DeviceFigure::ALL.len()]);

impl Default for Device {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(f64::NAN.to_bits())))
    }
}

impl Device {
    /// Sets a figure; none is "not known".
    pub(crate) fn set(&self, figure: DeviceFigure, value: Option<f64>) {
        self.0[figure as usize].store(value.unwrap_or(f64::NAN).to_bits(), Ordering::Relaxed);
    }

    /// A figure, if it is known.
    pub(crate) fn get(&self, figure: DeviceFigure) -> Option<f64> {
        Some(f64::from_bits(self.0[figure as usize].load(Ordering::Relaxed))).filter(|value| !value.is_nan())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_unknown_until_they_are_set() {
        let device = Device::default();
        for (at, (figure, ..)) in DeviceFigure::ALL.into_iter().enumerate() {
            assert_eq!((figure as usize, device.get(figure)), (at, None));
            device.set(figure, Some(at as f64));
        }
        for (at, (figure, ..)) in DeviceFigure::ALL.into_iter().enumerate() {
            assert_eq!(device.get(figure), Some(at as f64));
        }
        device.set(DeviceFigure::Power, None);
        assert_eq!(device.get(DeviceFigure::Power), None);
    }
}
