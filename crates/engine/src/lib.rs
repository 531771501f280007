//! Continuous batching: sequences, scheduler, KV block pool, prefix index, fairness, and the engine's thread.
//!
//! Knows tokens and blocks; never a tensor, never HTTP, never text.

mod config;
mod door;
pub mod energy;
mod executor;
mod fair;
mod handle;
#[cfg(feature = "test-hooks")]
pub mod hooks;
mod ids;
mod mailbox;
mod params;
mod pool;
mod prefix;
mod queue;
mod request;
mod scheduler;
mod sequence;
#[cfg(feature = "test-hooks")]
pub mod sim;
mod slab;
mod stats;
mod step;
mod thread;
mod time;

pub use config::EngineConfig;
pub use door::{AdmissionError, MAX_CHOICES};
pub use energy::{EnergyCounter, EnergyMethod};
pub use executor::{DeviceFault, Executor};
pub use handle::{Admission, BoxError, EngineHandle, EngineHealth, StartError};
pub use ids::{BLOCK_TOKENS, BlockId, RequestId, SeqId, SlotId, SnapshotId, TenantId, TokenId};
pub use params::{SamplingParams, Task};
pub use request::{EngineRequest, Event, FinishReason, SeqUsage};
pub use scheduler::{CommitError, HashKey, IntegrityError, MAX_PREEMPTIONS, Scheduler};
pub use stats::{Counters, EngineStats, STEP_TOKEN_BOUNDS};
pub use step::{
    BlockAppend, Geometry, GroupKind, Row, RowFault, RowInput, RowLogprobs, RowOutcome, RowOutput, SlotOpen,
    SnapshotSave, StepOutcome, StepPlan, TokenLogprobs,
};
pub use thread::start;
pub use time::Time;
