//! What the cache may take, as it is asked for.

/// How much memory the cache may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheBudget {
    /// Bytes of pages, recurrent states and snapshots together.
    Bytes(u64),
    /// Tokens, summed over sequences, that all groups can hold at once. States and snapshots come on top.
    Tokens(u64),
    /// What the device has left beside the weights ([`Backend::cache_room`](crate::backend::Backend::cache_room)).
    Device,
}
