//! How the device's memory is divided, said before it is taken.
//!
//! Owns the table, its print and the answer to "what would fit". Pure: no device.

/// How much of the device's memory may be taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryOptions {
    /// Share of all memory that this process may use, context and graphs included.
    pub utilization: f64,
    /// Bytes for the cache; without it all that is left.
    pub cache: Option<u64>,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { utilization: 0.9, cache: None }
    }
}
