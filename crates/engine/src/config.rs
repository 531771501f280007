//! What may be set about an engine.
//!
//! Owns the limits and their defaults; each is clamped and used where its subject lives.

use std::sync::Arc;

use crate::energy::EnergyCounter;

/// Limits and switches of one engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most tokens in one step (`--max-num-batched-tokens`); clamped to the executor's.
    pub max_step_tokens: u32,
    /// Most sequences that run at once (`--max-num-seqs`); clamped to the executor's slots and to
    /// `max_step_tokens`, so that every running sequence can have a token in every step.
    pub max_running: u32,
    /// Most requests that wait for their first slot.
    pub max_queued_requests: usize,
    /// Most prompt tokens of those requests.
    pub max_queued_tokens: usize,
    /// Whether prompts are looked up in the prefix index. Choices of one request share their prompt regardless.
    pub prefix_caching: bool,
    /// Tokens between two snapshots of recurrent state (rounded up to whole blocks).
    pub snapshot_interval: u32,
    /// Whether step n+1 is submitted before step n is collected; `None` asks the executor.
    pub look_ahead: Option<bool>,
    /// Batches of events that may wait for the demultiplexer before the engine waits for it.
    pub event_batches: usize,
    /// Devices that work on each step: a step's time counts so many times.
    pub devices: u32,
    /// The devices' energy counter, read on the engine's thread. Without it sequences have no energy.
    pub energy: Option<Arc<dyn EnergyCounter>>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_step_tokens: 2048,
            max_running: 256,
            max_queued_requests: 1024,
            max_queued_tokens: 4 << 20,
            prefix_caching: true,
            snapshot_interval: 1024,
            look_ahead: None,
            event_batches: 64,
            devices: 1,
            energy: None,
        }
    }
}
