//! What can go wrong with a store, and what it means for the server.

use std::path::PathBuf;

use crate::chain::Epoch;
use crate::row::RowError;

/// A store did not do what was asked. Reasons never hold a value of a row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Not now: busy, full or out of reach. Nothing was stored, or what was is stored again without harm.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// What it holds can no longer be trusted to last: a failed sync, a corrupt file, a read-only disk. The
    /// process must stop and start again; asking once more could report success for pages that are lost.
    #[error("the store is broken: {0}")]
    Broken(String),
    /// This writer's lease ran out and another closed its rows. It must register again.
    #[error("writer {0} was given up")]
    Fenced(Epoch),
    /// Another process writes to this file.
    #[error("{0} is in use by another process")]
    Locked(PathBuf),
    /// The store's schema is newer than this build can write.
    #[error("the store has schema {found}, which needs at least reader {needs}; this build is {ours}")]
    Newer {
        /// Its version.
        found: u32,
        /// The oldest version that may use it.
        needs: u32,
        /// Ours.
        ours: u32,
    },
    /// A stored row cannot be read.
    #[error("a stored row cannot be read: {0}")]
    Row(#[from] RowError),
    /// A purge needs a key to sign what remains.
    #[error("a purge must be signed, and there is no chain key")]
    NoKey,
}

impl StoreError {
    /// Whether the same may be asked again later.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}
