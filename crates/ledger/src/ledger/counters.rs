//! Counters of a ledger, for metrics. Atomics: a scrape takes no lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::row::Row;

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What ended for one application.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApplicationCounts {
    /// Requests.
    pub requests: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Those of them that were not computed again.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
}

impl ApplicationCounts {
    pub(super) const fn add(&mut self, row: &Row) {
        self.requests += 1;
        self.prompt_tokens += row.prompt_tokens;
        self.cached_tokens += row.cached_tokens;
        self.completion_tokens += row.completion_tokens;
    }
}

/// Upper bounds of the buckets of commit times, seconds; a last one has no bound.
pub const COMMIT_SECONDS: [f64; 10] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];

/// What a ledger did since it started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Rows durably opened.
    pub opened: Counter,
    /// Rows durably closed.
    pub closed: Counter,
    /// Completion tokens in rows durably closed.
    pub closed_tokens: Counter,
    /// Requests refused because the store is out of reach.
    pub refused_unavailable: Counter,
    /// Requests refused because too many are open.
    pub refused_full: Counter,
    /// Rows refused because another request has their id.
    pub conflicts: Counter,
    /// Commits that succeeded.
    pub commits: Counter,
    /// Rows in them.
    pub committed_rows: Counter,
    /// Commits that failed.
    pub commit_failures: Counter,
    /// Time in commits that succeeded, microseconds.
    pub commit_micros: Counter,
    /// Commits that succeeded, by time: not cumulative, bounds in [`COMMIT_SECONDS`].
    pub commit_buckets: [Counter; COMMIT_SECONDS.len() + 1],
    /// Rows written to the spool.
    pub spooled_rows: Counter,
    /// Rows replayed from it.
    pub replayed_rows: Counter,
    /// Rows of dead writers closed here.
    pub recovered_rows: Counter,
    /// Times this writer was given up by others.
    pub fenced: Counter,
}

impl Counters {
    pub(super) fn committed(&self, rows: usize, took: Duration) {
        self.commits.add(1);
        self.committed_rows.add(rows as u64);
        self.commit_micros.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        let bucket = COMMIT_SECONDS.iter().take_while(|bound| took.as_secs_f64() > **bound).count();
        self.commit_buckets[bucket].add(1);
    }
}
