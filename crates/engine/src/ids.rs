//! The names of things that cross the boundary between the engine, its executor and its callers.
//!
//! Owns identifiers only; it never gives any of them a lifetime: who may use a block or a slot, and until
//! when, is decided in the scheduler.

use std::fmt;

/// Index into the model's vocabulary.
pub type TokenId = u32;

/// Tokens of one sequence that share one block of KV memory.
pub const BLOCK_TOKENS: usize = 16;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// One accepted request. Ours, never the caller's `X-Request-Id`.
    RequestId(u64)
}
id! {
    /// One sequence: one choice of one request. Never reused while the engine lives.
    SeqId(u64)
}
id! {
    /// Who a request is charged to in the fair share.
    TenantId(u64)
}
id! {
    /// A running sequence's place on the device: last token, length, block tables, penalty counts, RNG key,
    /// recurrent state.
    SlotId(u32)
}
id! {
    /// One page of KV memory in the pool that all layer groups share. [`BlockId::NULL`] is never given out.
    BlockId(u32)
}
id! {
    /// One saved copy of a slot's recurrent state.
    SnapshotId(u32)
}

impl BlockId {
    /// The reserved page: padding rows write here, and window tables point here where a block was freed.
    pub const NULL: Self = Self(0);
}
