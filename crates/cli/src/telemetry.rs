//! The GPU's own figures: once a second for `/metrics`, and its energy counter for the engine.
//!
//! Owns the thread that asks, because asking can take longer than a scrape may. The engine asks for itself, on its
//! own thread and by a connection of its own, since energy is shared out by when the counter moved.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mirai_cuda::{Gpu, Telemetry, TelemetryReading};
use mirai_engine::EnergyCounter;
use mirai_server::{DeviceFigure, ServerHandle};

/// Time between two readings.
const EVERY: Duration = Duration::from_secs(1);

/// Starts asking, if there is somebody to ask. The thread ends with the process.
pub(crate) fn start(ordinal: usize, server: &ServerHandle) {
    let Some(telemetry) = Gpu::look(ordinal).ok().and_then(|facts| Telemetry::open(&facts.bus)) else {
        tracing::info!("no NVML: /metrics has no figures of the GPU");
        return;
    };
    let server = server.clone();
    let thread = std::thread::Builder::new().name("telemetry".to_owned()).spawn(move || {
        let mut last = None;
        loop {
            let reading = telemetry.read();
            if let Some(xid) = reading.xid.filter(|_| reading.xid != last) {
                tracing::error!(xid, "the GPU reports a critical fault");
            }
            last = reading.xid;
            tell(&reading, |figure, value| server.device_figure(figure, value));
            std::thread::sleep(EVERY);
        }
    });
    if let Err(error) = thread {
        tracing::warn!(%error, "no thread for the GPU's figures");
    }
}

/// The energy counter of one GPU.
struct GpuCounter(Telemetry);

impl fmt::Debug for GpuCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GpuCounter")
    }
}

impl EnergyCounter for GpuCounter {
    fn microjoules(&self) -> Option<u64> {
        self.0.energy_microjoules()
    }
}

/// The GPU's energy counter, if it has one.
pub(crate) fn energy_counter(ordinal: usize) -> Option<Arc<dyn EnergyCounter>> {
    let telemetry = Gpu::look(ordinal).ok().and_then(|facts| Telemetry::open(&facts.bus))?;
    let counter = telemetry.energy_microjoules().map(|_| Arc::new(GpuCounter(telemetry)) as _);
    if counter.is_none() {
        tracing::info!("this GPU has no energy counter");
    }
    counter
}

/// A reading in the units of `/metrics`.
fn tell(reading: &TelemetryReading, set: impl Fn(DeviceFigure, Option<f64>)) {
    let hertz = |megahertz: Option<u32>| megahertz.map(|mhz| f64::from(mhz) * 1e6);
    set(DeviceFigure::Energy, reading.energy_joules);
    set(DeviceFigure::Power, reading.power_watts);
    set(DeviceFigure::MemoryUsed, reading.memory_used.map(|bytes| bytes as f64));
    set(DeviceFigure::Memory, reading.memory_total.map(|bytes| bytes as f64));
    set(DeviceFigure::Clock, hertz(reading.sm_clock_mhz));
    set(DeviceFigure::MemoryClock, hertz(reading.memory_clock_mhz));
    set(DeviceFigure::Fault, Some(reading.xid.unwrap_or(0) as f64));
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_reading_is_told_in_base_units() {
        let reading = TelemetryReading {
            energy_joules: Some(1.5),
            memory_used: Some(1 << 30),
            sm_clock_mhz: Some(1980),
            xid: Some(79),
            ..TelemetryReading::default()
        };
        let told = RefCell::new(Vec::new());
        tell(&reading, |figure, value| told.borrow_mut().push((figure, value)));
        let expected = [
            (DeviceFigure::Energy, Some(1.5)),
            (DeviceFigure::Power, None),
            (DeviceFigure::MemoryUsed, Some(1_073_741_824.0)),
            (DeviceFigure::Memory, None),
            (DeviceFigure::Clock, Some(1.98e9)),
            (DeviceFigure::MemoryClock, None),
            (DeviceFigure::Fault, Some(79.0)),
        ];
        assert_eq!(*told.borrow(), expected);
    }
}
