//! What a store of rows must do.
//!
//! Owns the trait and its types. A store is used by one thread at a time and blocks; [`crate::Ledger`] gives it
//! a thread. Several stores, in one process or many, may share one database.

mod audit;
mod merge;
mod operations;
mod outbox;
#[cfg(feature = "postgres")]
pub mod postgres;
mod recover;
mod retention;
mod schema;
pub(crate) mod sql;
pub mod sqlite;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout)]
pub(crate) mod tests;
mod usage;

use std::time::Duration;

pub use outbox::{Batch, Outbox};
pub use sql::SqlStore;
pub use usage::{Grouping, MAX_FILTER, UsageKey, UsageQuery, UsageRow, for_each_usage};

use crate::chain::{Epoch, Link};
use crate::error::StoreError;
use crate::row::Row;
use crate::value::Hash;

/// Ends what a store is doing, from another thread.
pub type Interrupter = Box<dyn Fn() + Send + Sync>;

/// What a row is now, on its way to the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The whole row. Its `writer` and `epoch` are set by the store.
    pub row: Row,
    /// Whether the store is known to have it already: a hint that saves a statement.
    pub stored: bool,
}

/// What a commit did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Rows that were new.
    pub inserted: u64,
    /// Rows that changed.
    pub updated: u64,
    /// Rows that were stored already, as they are or further on.
    pub unchanged: u64,
    /// Ids under which another request is stored. Those rows were left out.
    pub conflicts: Vec<String>,
}

/// What a round of recovery did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Rows closed at their last checkpoint.
    pub rows: u64,
    /// Writers' runs that are over now.
    pub epochs: u64,
    /// Whether there is more to do.
    pub more: bool,
}

/// What a round of purging did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Rows removed.
    pub rows: u64,
    /// Links removed.
    pub links: u64,
    /// Whether there is more to do.
    pub more: bool,
}

/// A chain as its writer left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainHead {
    /// Whose.
    pub chain: Epoch,
    /// Whether its run is over and all its rows are closed.
    pub ended: bool,
    /// Its last link's place; 0 without one.
    pub seq: u64,
    /// Its hash.
    pub head: Hash,
    /// The signature of the head: the key's version and the MAC.
    pub signature: Option<(u32, Hash)>,
}

/// What a purge left of a chain's beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurgeRecord {
    /// Whose chain.
    pub chain: Epoch,
    /// The last link that was removed.
    pub seq: u64,
    /// The chain's hash there.
    pub head: Hash,
    /// Rows removed so far.
    pub rows: u64,
    /// When, microseconds since 1970.
    pub at: i64,
    /// The key's version and the MAC.
    pub signature: (u32, Hash),
}

/// A link and what the store holds of its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditLink {
    /// The link.
    pub link: Link,
    /// The request's row and the digest that was stored with it.
    pub row: Option<(Row, Hash)>,
    /// Whether no later link attests the same row.
    pub newest: bool,
    /// Whether the link that opened the row is still there.
    pub opened: bool,
}

/// Durable storage of rows. Every method that writes is one transaction, or a bounded number of them.
///
/// Rows are merged, never blindly written, so that any commit may be repeated: tokens of an open row only grow;
/// an end by the owner stands against everything but its word that the client was told of a failure; an end by recovery gives way to what the owner knows.
pub trait Store: Send {
    /// Begins a run of a writer: a new epoch. With `takeover` all its earlier runs are given up at once, which
    /// is right only if they are known to be over.
    ///
    /// # Errors
    /// The store failed.
    fn register(&mut self, writer: &str, lease: Duration, takeover: bool) -> Result<Epoch, StoreError>;

    /// Merges rows, extends the owner's chain and lease, and returns when all of it is durable.
    ///
    /// # Errors
    /// The store failed, or the owner was given up; then nothing was stored, except that a failure of the
    /// commit itself leaves both possible.
    fn commit(&mut self, owner: &Epoch, lease: Duration, entries: &[Entry]) -> Result<Committed, StoreError>;

    /// Extends the owner's lease.
    ///
    /// # Errors
    /// As [`Store::commit`].
    fn heartbeat(&mut self, owner: &Epoch, lease: Duration) -> Result<(), StoreError> {
        self.commit(owner, lease, &[]).map(|_| ())
    }

    /// Closes up to `limit` rows of one writer whose lease is over, at their last checkpoints. Never `by`'s own.
    ///
    /// # Errors
    /// The store failed.
    fn recover(&mut self, by: &Epoch, limit: usize) -> Result<Recovered, StoreError>;

    /// Ends a run. If rows are still open, any replica may close them from now on.
    ///
    /// # Errors
    /// The store failed.
    fn release(&mut self, owner: &Epoch) -> Result<(), StoreError>;

    /// Sums over rows, in the order of buckets, applications, keys, models and price lists.
    ///
    /// # Errors
    /// The store failed.
    fn usage(&mut self, query: &UsageQuery) -> Result<Vec<UsageRow>, StoreError>;

    /// One row.
    ///
    /// # Errors
    /// The store failed, or the row cannot be read.
    fn row(&mut self, id: &str) -> Result<Option<Row>, StoreError>;

    /// Up to `limit` rows whose ids follow `after`, in the order of ids. Ids sort by arrival.
    ///
    /// # Errors
    /// The store failed, or a row cannot be read.
    fn rows(&mut self, after: &str, limit: usize) -> Result<Vec<Row>, StoreError>;

    /// Erases the pseudonyms of up to `limit` rows that ended before a time (microseconds since 1970). Returns
    /// how many; call again until that is 0.
    ///
    /// # Errors
    /// The store failed.
    fn anonymize(&mut self, before: i64, limit: usize) -> Result<u64, StoreError>;

    /// Removes rows that ended before a time, from each chain's beginning, at most `limit` links of each, and
    /// signs what remains. Rows that came after one that stays wait for it.
    ///
    /// # Errors
    /// The store failed, or has no key.
    fn purge(&mut self, before: i64, limit: usize) -> Result<Purged, StoreError>;

    /// Begins to read one consistent state, for [`crate::verify`].
    ///
    /// # Errors
    /// The store failed.
    fn begin_audit(&mut self) -> Result<(), StoreError>;

    /// Ends what [`Store::begin_audit`] began.
    fn end_audit(&mut self);

    /// Every chain, in the order of writers and epochs.
    ///
    /// # Errors
    /// The store failed.
    fn chains(&mut self) -> Result<Vec<ChainHead>, StoreError>;

    /// What purges left.
    ///
    /// # Errors
    /// The store failed.
    fn purges(&mut self) -> Result<Vec<PurgeRecord>, StoreError>;

    /// Up to `limit` links of a chain after a place, in order.
    ///
    /// # Errors
    /// The store failed, or a row cannot be read.
    fn links(&mut self, chain: &Epoch, after: u64, limit: usize) -> Result<Vec<AuditLink>, StoreError>;

    /// The newest version that a row may have.
    ///
    /// # Errors
    /// The store failed.
    fn schema(&mut self) -> Result<u32, StoreError>;

    /// How many rows there are.
    ///
    /// # Errors
    /// The store failed.
    fn count(&mut self) -> Result<u64, StoreError>;

    /// What ends a statement that runs, from another thread; the statement then fails as unavailable. `None`
    /// where the database itself bounds every statement.
    fn interrupter(&self) -> Option<Interrupter> {
        None
    }
}
