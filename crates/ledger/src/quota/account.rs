//! What a transaction does to the counters of one application.
//!
//! Owns the arithmetic, and nothing else: from what the store holds, what a replica reports and what it asks
//! for, to what the store shall hold and what the replica is told. No clock, no store.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::calendar::Moment;
use super::kind::{Kind, PerKind, Span};

/// One counter in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// Spent.
    pub(super) used: u64,
    /// Held by replicas: it may be spent or come back.
    pub(super) leased: u64,
}

impl Cell {
    pub(super) fn taken(&self) -> u64 {
        self.used.saturating_add(self.leased)
    }
}

/// A kind and a bucket.
pub(super) type Key = (Kind, i64);

/// What the store holds of one application, and of it what one replica holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(super) cells: BTreeMap<Key, Cell>,
    pub(super) held: BTreeMap<Key, u64>,
}

/// What a replica has to say of a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Spent of its lease.
    pub(super) settled: u64,
    /// Given back.
    pub(super) returned: u64,
    /// Taken without leave: into its lease, whatever the limit says.
    pub(super) forced: u64,
    /// Spent beyond its lease.
    pub(super) spent: u64,
}

impl Report {
    pub(super) fn add(&mut self, other: &Self) {
        self.settled = self.settled.saturating_add(other.settled);
        self.returned = self.returned.saturating_add(other.returned);
        self.forced = self.forced.saturating_add(other.forced);
        self.spent = self.spent.saturating_add(other.spent);
    }
}

/// What a replica says and wants of one application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(super) application: Arc<str>,
    pub(super) limits: PerKind<Option<u64>>,
    pub(super) reports: Vec<(Key, Report)>,
    /// What requests that wait still need, in their order. Each gets all of it or nothing.
    pub(super) asks: Vec<PerKind<u64>>,
    /// What the replica would like to have at hand beyond that.
    pub(super) headroom: PerKind<u64>,
}

impl Item {
    /// Whether the store has to be asked.
    pub(super) fn has_something(&self) -> bool {
        !self.reports.is_empty() || !self.asks.is_empty() || self.headroom.iter().any(|amount| *amount > 0)
    }
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// When, by the store's clock.
    pub(super) at: Moment,
    /// For each ask the kinds of which there was not enough.
    pub(super) lacking: Vec<PerKind<bool>>,
    /// What it got beyond.
    pub(super) headroom: PerKind<u64>,
    /// What is taken by all, by bucket: those that count now.
    pub(super) seen: PerKind<Vec<(i64, u64)>>,
    /// What of that is spent for good: the rest may yet come back.
    pub(super) spent: PerKind<u64>,
}

impl State {
    /// The cells of a kind that count now.
    fn counting<'a>(&'a self, kind: Kind, at: &'a Moment) -> impl Iterator<Item = (i64, &'a Cell)> {
        let all = self.cells.range((kind, i64::MIN)..=(kind, i64::MAX));
        all.map(|((_, bucket), cell)| (*bucket, cell)).filter(move |(bucket, _)| at.counts(kind, *bucket))
    }

    fn sum(&self, kind: Kind, at: &Moment, of: impl Fn(&Cell) -> u64) -> u64 {
        self.counting(kind, at).fold(0, |sum, (_, cell)| sum.saturating_add(of(cell)))
    }

    /// Applies reports, then grants what there is room for.
    pub(super) fn apply(&mut self, item: &Item, at: Moment) -> Answer {
        for (key, report) in &item.reports {
            self.report(*key, report);
        }
        let mut room = Kind::ALL.map(|kind| {
            let limit = item.limits[kind.index()];
            limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.sum(kind, &at, Cell::taken)))
        });
        let mut granted = [0u64; Kind::ALL.len()];
        let mut lacking = Vec::with_capacity(item.asks.len());
        for ask in &item.asks {
            let lacks = Kind::ALL.map(|kind| ask[kind.index()] > room[kind.index()]);
            if !lacks.contains(&true) {
                for i in 0..granted.len() {
                    room[i] -= ask[i];
                    granted[i] = granted[i].saturating_add(ask[i]);
                }
            }
            lacking.push(lacks);
        }
        let headroom = Kind::ALL.map(|kind| item.headroom[kind.index()].min(room[kind.index()]));
        for kind in Kind::ALL {
            self.grant(kind, granted[kind.index()].saturating_add(headroom[kind.index()]), &at);
        }
        self.forget(&at);
        let seen = Kind::ALL.map(|kind| self.seen(kind, &at));
        let spent = Kind::ALL.map(|kind| self.sum(kind, &at, |cell| cell.used));
        Answer { at, lacking, headroom, seen, spent }
    }

    fn grant(&mut self, kind: Kind, amount: u64, at: &Moment) {
        if amount == 0 {
            return;
        }
        let key = (kind, at.bucket(kind));
        let cell = self.cells.entry(key).or_default();
        if kind.is_leased() {
            cell.leased = cell.leased.saturating_add(amount);
            let held = self.held.entry(key).or_default();
            *held = held.saturating_add(amount);
        } else {
            cell.used = cell.used.saturating_add(amount);
        }
    }

    fn report(&mut self, key: Key, report: &Report) {
        if !key.0.is_leased() {
            let more = report.forced.saturating_add(report.spent);
            if more > 0 {
                let cell = self.cells.entry(key).or_default();
                cell.used = cell.used.saturating_add(more);
            }
            // A bucket that is gone counts no more.
            if let Some(cell) = self.cells.get_mut(&key) {
                cell.used = cell.used.saturating_sub(report.returned);
            }
            return;
        }
        let held = self.held.entry(key).or_default();
        let cell = self.cells.entry(key).or_default();
        *held = held.saturating_add(report.forced);
        cell.leased = cell.leased.saturating_add(report.forced);
        let over = report.settled.saturating_add(report.returned).min(*held);
        *held -= over;
        cell.leased = cell.leased.saturating_sub(over);
        // What is spent counts even if nobody knows of its lease any more.
        cell.used = cell.used.saturating_add(report.settled).saturating_add(report.spent);
    }

    /// Leaves out what counts no more. Yesterday stays for a while, for requests that began then.
    fn forget(&mut self, at: &Moment) {
        self.held.retain(|_, amount| *amount > 0);
        self.cells.retain(|(kind, bucket), cell| match kind.span() {
            Span::Window => cell.used > 0 && at.counts(*kind, *bucket),
            _ => cell.leased > 0 || (cell.used > 0 && *bucket >= at.bucket(*kind) - 1),
        });
    }

    fn seen(&self, kind: Kind, at: &Moment) -> Vec<(i64, u64)> {
        self.counting(kind, at).map(|(bucket, cell)| (bucket, cell.taken())).collect()
    }
}
