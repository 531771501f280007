//! Continuous batching: sequences, scheduler, KV block pool, prefix index, fairness, and the engine's thread.
//!
//! Knows tokens and blocks; never a tensor, never HTTP, never text.

mod executor;
mod ids;
mod request;
mod step;

pub use executor::{DeviceFault, Executor};
pub use ids::{BLOCK_TOKENS, BlockId, RequestId, SeqId, SlotId, SnapshotId, TenantId, TokenId};
pub use request::{EngineRequest, Event, FinishReason, SamplingParams, SeqUsage, Time};
pub use step::{
    BlockAppend, Geometry, GroupKind, Row, RowFault, RowInput, RowLogprobs, RowOutcome, RowOutput, SlotOpen,
    SnapshotSave, StepOutcome, StepPlan, TokenLogprobs,
};
