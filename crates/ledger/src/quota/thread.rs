//! The thread that speaks with the store.
//!
//! Owns the store and this replica's place in it. Each turn tells what requests used, asks for what they wait
//! for, and hands it out. One transaction is under way at a time; where nobody heard whether it took effect, that
//! is found out by its number before anything else is said, so nothing is counted twice or not at all.

use std::sync::Arc;
use std::time::Duration;

use super::QuotaHealth;
use super::account::Item;
use super::landing::{Landing, tell};
use super::local::{StoreTime, Verdict, Waiter};
use super::shared::{Book, Shared};
use super::sql::{Holder, QuotaStore, Synced, Terms};
use crate::error::StoreError;
use crate::value::Hex;

/// Applications in one transaction.
const ITEMS: usize = 128;
/// Turns in which an end waits for a store that fails.
const FAREWELLS: usize = 3;

pub(super) struct Syncer {
    store: Box<dyn QuotaStore>,
    shared: Arc<Shared>,
    holder: Option<Holder>,
    /// Transactions of this holder that took effect.
    sequence: u64,
    /// One of which nobody knows whether it did.
    unresolved: Option<Flight>,
    /// When the store may be asked again; `None` if it did not fail.
    retry_at: Option<Duration>,
    sync_at: Duration,
    beat_at: Duration,
    sweep_at: Duration,
    /// Whether nothing more is to be held.
    leaving: bool,
}

/// A transaction and the requests that wait for it.
struct Flight {
    /// Our clock, before it began.
    began: Duration,
    items: Vec<Item>,
    /// For each item.
    waiters: Vec<Vec<Waiter>>,
    outcome: Option<Synced>,
}

impl Syncer {
    pub(super) fn new(store: Box<dyn QuotaStore>, shared: Arc<Shared>) -> Self {
        let now = Duration::ZERO;
        Self {
            store,
            shared,
            holder: None,
            sequence: 0,
            unresolved: None,
            retry_at: None,
            sync_at: now,
            beat_at: now,
            sweep_at: now,
            leaving: false,
        }
    }

    /// Registers, before the first request.
    pub(super) fn first(&mut self) -> Result<(), StoreError> {
        self.register(self.shared.config.takeover)
    }

    pub(super) fn run(mut self) {
        // Also when a panic ends it: nobody would be answered any more.
        let _end = End(self.shared.clone());
        loop {
            let wait = self.turn(self.shared.clock.monotonic());
            let book = self.shared.book();
            if book.stopping {
                break;
            }
            let rests = |book: &mut Book| !book.urgent && !book.stopping && !book.woken;
            // A poisoned lock is taken all the same, at the next turn.
            if let Ok((mut book, _)) = self.shared.work.wait_timeout_while(book, wait, rests) {
                book.woken = false;
            }
        }
        self.farewell();
    }

    /// Does what there is to do. Returns how long there will be nothing else, unless somebody calls.
    pub(super) fn turn(&mut self, now: Duration) -> Duration {
        let broken = self.shared.health() == QuotaHealth::Broken;
        if broken || self.retry_at.is_some_and(|at| now < at) {
            self.release_all();
            return if broken { self.shared.config.lease } else { self.retry_at.unwrap_or(now) - now };
        }
        if let Err(error) = self.work(now) {
            self.failed(&error, self.shared.clock.monotonic());
        }
        let book = self.shared.book();
        let next = match self.retry_at {
            Some(at) => at,
            None if book.urgent => now,
            None if !book.active.is_empty() => self.sync_at.min(self.beat_at),
            None => self.beat_at.min(self.sweep_at),
        };
        next.saturating_sub(now)
    }

    fn work(&mut self, now: Duration) -> Result<(), StoreError> {
        self.resolve(now)?;
        if self.holder.is_none() {
            self.register(false)?;
        }
        let flight = self.plan(now);
        // A store that failed is back when it says so.
        if !flight.items.is_empty() || now >= self.beat_at || self.retry_at.is_some() {
            self.fly(flight)?;
        }
        if now >= self.sweep_at {
            self.sweep(now)?;
        }
        self.retry_at = None;
        self.shared.set_health(QuotaHealth::Ok);
        Ok(())
    }

    fn terms(&self) -> Terms {
        Terms { lease: self.shared.config.lease, wall: self.shared.clock.wall() }
    }

    fn register(&mut self, takeover: bool) -> Result<(), StoreError> {
        let config = &self.shared.config;
        // Unlike any other's: what was registered without our hearing of it is nobody's, and ends by itself.
        let name = format!("{}/{}", config.writer, Hex(rand::random::<[u8; 8]>()));
        let holder = Holder { name, writer: config.writer.clone(), by_rows: config.rows_tell };
        self.store.enrol(&holder, self.terms(), takeover)?;
        (self.holder, self.sequence, self.beat_at) = (Some(holder), 0, Duration::ZERO);
        Ok(())
    }

    /// Finds out whether the transaction of which nobody heard took effect.
    fn resolve(&mut self, now: Duration) -> Result<(), StoreError> {
        let (Some(flight), Some(holder)) = (&self.unresolved, &self.holder) else { return Ok(()) };
        let found = self.store.sequence(&holder.name)?;
        let outcome = flight.outcome.clone();
        let Some(flight) = self.unresolved.take() else { return Ok(()) };
        match (found, outcome) {
            (None, _) => self.given_up(flight, now),
            (Some(found), Some(outcome)) if found > self.sequence => {
                self.sequence = found;
                self.land(flight, outcome);
            }
            _ => self.unsaid(&flight),
        }
        Ok(())
    }

    /// Gathers what there is to say: of all applications when it is time, and else of those that wait.
    fn plan(&mut self, now: Duration) -> Flight {
        let mut guard = self.shared.book();
        let book = &mut *guard;
        let at = self.shared.moment(book, now);
        let due = now >= self.sync_at;
        let expired = now >= book.alive_until;
        book.urgent = false;
        let mut flight = Flight { began: now, items: Vec::new(), waiters: Vec::new(), outcome: None };
        for name in std::mem::take(&mut book.active) {
            let Some(local) = book.apps.get_mut(&name) else { continue };
            if expired {
                local.expire();
            }
            let waits = !local.waiting.is_empty() || local.runs_low(now);
            let full = flight.items.len() >= ITEMS;
            if full || !(due || waits) {
                book.urgent |= full;
                book.active.push(name);
                continue;
            }
            if local.is_quiet(now) {
                local.listed = false;
                continue;
            }
            book.active.push(name.clone());
            let waiting = local.waiting.len();
            let (mut item, waiters) = local.plan(&name, &at, now);
            if self.leaving {
                item.headroom = Default::default();
            }
            book.waiting -= waiting - waiters.len();
            if item.has_something() {
                flight.items.push(item);
                flight.waiters.push(waiters);
            }
        }
        if due && !book.urgent {
            self.sync_at = now + self.shared.config.sync_every;
        }
        // The same order everywhere: replicas must not wait for each other in a circle.
        let mut both: Vec<_> = flight.items.into_iter().zip(flight.waiters).collect();
        both.sort_by(|a, b| a.0.application.cmp(&b.0.application));
        (flight.items, flight.waiters) = both.into_iter().unzip();
        flight
    }

    fn fly(&mut self, mut flight: Flight) -> Result<(), StoreError> {
        let Some(holder) = &self.holder else { return Ok(()) };
        flight.began = self.shared.clock.monotonic();
        let (who, terms) = ((holder.name.as_str(), self.sequence), self.terms());
        let mut outcome = None;
        let done = self.store.sync(&self.shared.calendar, who, terms, &flight.items, &mut outcome);
        match (done, outcome) {
            (Ok(()), Some(Synced::Done { now, answers })) => {
                self.sequence += 1;
                self.shared.counters.syncs.add(1);
                self.beat_at = flight.began + self.shared.config.lease / 3;
                self.land(flight, Synced::Done { now, answers });
                Ok(())
            }
            (Ok(()), _) => {
                let now = flight.began;
                self.given_up(flight, now);
                Ok(())
            }
            (Err(error), outcome) => {
                // Before anybody is told: who hears of it may ask how quotas are.
                self.worsen(&error);
                self.release(&mut flight);
                match outcome {
                    // It may have taken effect.
                    Some(Synced::Done { .. }) => {
                        flight.outcome = outcome;
                        self.unresolved = Some(flight);
                    }
                    _ => self.unsaid(&flight),
                }
                Err(error)
            }
        }
    }

    /// A transaction took effect: what it granted is handed out.
    fn land(&mut self, flight: Flight, outcome: Synced) {
        let Synced::Done { now: store_now, answers } = outcome else { return };
        let now = self.shared.clock.monotonic();
        let mut tells = Vec::new();
        let mut guard = self.shared.book();
        let book = &mut *guard;
        book.time = Some(StoreTime { micros: store_now, read_at: flight.began });
        book.alive_until = flight.began + self.shared.config.lease;
        let at = self.shared.moment(book, now);
        for ((item, waiters), answer) in flight.items.iter().zip(flight.waiters).zip(answers) {
            let Some(local) = book.apps.get_mut(&item.application) else { continue };
            let landing = Landing { shared: &self.shared, began: flight.began, now, at, answer: &answer };
            let (told, back) = landing.hand_out(local, item, waiters);
            book.waiting -= told.len();
            book.urgent |= back > 0;
            tells.extend(told);
            book.touch(&item.application);
        }
        drop(guard);
        tell(tells);
    }

    /// A transaction did not take effect: what it reported is still to be said.
    fn unsaid(&self, flight: &Flight) {
        let mut book = self.shared.book();
        for item in &flight.items {
            if let Some(local) = book.apps.get_mut(&item.application) {
                local.sent(false);
            }
            book.touch(&item.application);
        }
    }

    /// Tells the requests of a flight that the store does not answer.
    fn release(&self, flight: &mut Flight) {
        let mut tells = Vec::new();
        let now = self.shared.clock.monotonic();
        let mut book = self.shared.book();
        for (item, waiters) in flight.items.iter().zip(&mut flight.waiters) {
            book.waiting -= waiters.len();
            if let Some(local) = book.apps.get_mut(&item.application) {
                local.asked = 0;
                for mut waiter in waiters.drain(..) {
                    local.give_back(&mut waiter.has, now);
                    tells.push((waiter.tell, Verdict::Lost));
                }
            }
        }
        drop(book);
        tell(tells);
    }

    /// Tells all that wait that the store does not answer.
    fn release_all(&self) {
        let mut tells = Vec::new();
        let mut guard = self.shared.book();
        let book = &mut *guard;
        book.urgent = false;
        for name in &book.active {
            let Some(local) = book.apps.get_mut(name) else { continue };
            tells.extend(local.waiting.drain(..).map(|waiter| (waiter.tell, Verdict::Lost)));
        }
        book.waiting -= tells.len();
        drop(guard);
        tell(tells);
    }

    /// Others believed this replica dead. It registers anew and says again what runs.
    fn given_up(&mut self, flight: Flight, now: Duration) {
        tracing::warn!("the leases of this replica were ended by another; it takes new ones");
        self.shared.counters.given_up.add(1);
        (self.holder, self.sync_at) = (None, now);
        let mut guard = self.shared.book();
        let book = &mut *guard;
        for (item, waiters) in flight.items.iter().zip(flight.waiters) {
            if let Some(local) = book.apps.get_mut(&item.application) {
                local.requeue(waiters, now);
            }
        }
        let names: Vec<Arc<str>> = book.apps.keys().cloned().collect();
        for name in names {
            if let Some(local) = book.apps.get_mut(&name) {
                local.sent(false);
                local.given_up();
            }
            book.touch(&name);
        }
        book.urgent = true;
    }

    fn sweep(&mut self, now: Duration) -> Result<(), StoreError> {
        let Some(holder) = &self.holder else { return Ok(()) };
        let lease = self.shared.config.lease;
        let done = self.store.sweep(&holder.name, lease)?;
        let counters = &self.shared.counters;
        counters.swept.add(done.holders);
        counters.swept_spent_tokens.add(done.spent);
        counters.swept_returned_tokens.add(done.back);
        self.sweep_at = if done.more { now } else { now + lease / 3 };
        Ok(())
    }

    fn worsen(&self, error: &StoreError) {
        let lost = error.is_unavailable();
        self.shared.set_health(if lost { QuotaHealth::Lost } else { QuotaHealth::Broken });
    }

    fn failed(&mut self, error: &StoreError, now: Duration) {
        self.shared.counters.sync_failures.add(1);
        self.worsen(error);
        if !error.is_unavailable() {
            tracing::error!(%error, "the store of quotas failed for good");
        } else if self.retry_at.replace(now + self.shared.config.retry).is_none() {
            tracing::warn!(%error, "the store of quotas failed; it will be tried again");
        }
        self.release_all();
    }

    /// Gives back what is not in use.
    pub(super) fn farewell(&mut self) {
        self.leaving = true;
        for _ in 0..FAREWELLS {
            let now = self.shared.clock.monotonic();
            self.release_all();
            {
                let mut guard = self.shared.book();
                let book = &mut *guard;
                for local in book.apps.values_mut() {
                    local.retire();
                }
            }
            (self.sync_at, self.retry_at) = (now, None);
            let broken = self.shared.health() == QuotaHealth::Broken;
            if broken
                || self.resolve(now).is_err()
                || (self.holder.is_none() && self.register(false).is_err())
            {
                continue;
            }
            let flight = self.plan(now);
            let over = flight.items.is_empty();
            if !over && self.fly(flight).is_err() {
                continue;
            }
            if over {
                break;
            }
        }
        if let Some(holder) = self.holder.take()
            && let Err(error) = self.store.leave(&holder.name)
        {
            tracing::warn!(%error, "what this replica holds is left to its lease");
        }
    }
}

/// The thread is gone.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set_health(QuotaHealth::Broken);
        }
        let mut book = self.0.book();
        book.stopping = true;
        // Who waits sees that nobody will answer.
        let waiting: Vec<_> = book.apps.values_mut().flat_map(|local| local.waiting.drain(..)).collect();
        drop(book);
        drop(waiting);
    }
}
