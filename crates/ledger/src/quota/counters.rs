//! Counters of quotas, for metrics. Atomics: a scrape takes no lock.

use super::kind::{Kind, PerKind};
use crate::ledger::Counter;

/// What quotas did since they started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests admitted, of applications that have a quota.
    pub admitted: Counter,
    /// Those of them that waited for the store.
    pub waited: Counter,
    /// Those of them that were admitted without the store's leave.
    pub alone: Counter,
    /// Requests refused, by the limit that was named; in the order of [`Kind::ALL`].
    pub refused: PerKind<Counter>,
    /// Requests refused because of the length of the answers that they asked for.
    pub refused_output: Counter,
    /// Requests refused because nobody could tell.
    pub refused_unavailable: Counter,
    /// Reservations whose use was never told: they count as used.
    pub dropped: Counter,
    /// Transactions that succeeded.
    pub syncs: Counter,
    /// Transactions that failed.
    pub sync_failures: Counter,
    /// Times others gave this replica up.
    pub given_up: Counter,
    /// Dead replicas whose leases were ended here.
    pub swept: Counter,
    /// Tokens of their leases that count as spent.
    pub swept_spent_tokens: Counter,
    /// Tokens of their leases that came back.
    pub swept_returned_tokens: Counter,
}

impl Counters {
    /// Requests refused because of a limit.
    pub fn refused_by(&self, kind: Kind) -> u64 {
        self.refused[kind.index()].get()
    }
}
