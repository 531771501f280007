//! What requests and the thread share.
//!
//! Owns the lock, under which nothing ever waits, and the way a request takes through it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::calendar::{Calendar, Moment};
use super::counters::Counters;
use super::kind::{Demand, Kind, PerKind, limits};
use super::local::{Charges, Local, StoreTime, Verdict, Waiter};
use super::refusal::{Exceeded, Refusal, Standing};
use super::reservation::Reservation;
use super::{Clock, OnStoreLoss, QuotaConfig, QuotaHealth};
use crate::identity::Quota;

/// How long an application stays remembered of which nothing is left to say, where room is short.
const REMEMBERED: Duration = Duration::from_secs(60);

/// What replicas know, under the lock.
#[derive(Debug, Default)]
pub(super) struct Book {
    pub(super) apps: HashMap<Arc<str>, Local>,
    /// Applications with something to say or to fetch, each once.
    pub(super) active: Vec<Arc<str>>,
    pub(super) waiting: usize,
    /// Whether the thread should not wait for its time.
    pub(super) urgent: bool,
    pub(super) stopping: bool,
    /// Whether there is something new since the thread last looked.
    pub(super) woken: bool,
    pub(super) time: Option<StoreTime>,
    /// Until when this replica's own lease lasts, by our clock.
    pub(super) alive_until: Duration,
    /// When room for applications was last looked for in vain.
    crowded_at: Option<Duration>,
}

pub(super) struct Shared {
    pub(super) config: QuotaConfig,
    pub(super) calendar: Calendar,
    pub(super) clock: Arc<dyn Clock>,
    book: Mutex<Book>,
    pub(super) work: Condvar,
    health: AtomicU8,
    pub(super) counters: Counters,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("health", &self.health()).finish_non_exhaustive()
    }
}

/// How far a request came.
#[expect(clippy::large_enum_variant, reason = "it is on its way from one frame to the next")]
pub(super) enum Step {
    Done(Result<Reservation, Refusal>),
    Wait(oneshot::Receiver<Verdict>),
}

impl Shared {
    pub(super) fn new(config: QuotaConfig, calendar: Calendar, clock: Arc<dyn Clock>) -> Self {
        Self {
            config,
            calendar,
            clock,
            book: Mutex::default(),
            work: Condvar::new(),
            health: AtomicU8::new(QuotaHealth::Ok as u8),
            counters: Counters::default(),
        }
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self) -> QuotaHealth {
        match self.health.load(Ordering::Acquire) {
            0 => QuotaHealth::Ok,
            1 => QuotaHealth::Lost,
            _ => QuotaHealth::Broken,
        }
    }

    pub(super) fn set_health(&self, health: QuotaHealth) {
        self.health.store(health as u8, Ordering::Release);
    }

    pub(super) fn stop(&self) {
        self.book().stopping = true;
        self.work.notify_all();
    }

    /// The store's time, as far as it is known.
    pub(super) fn moment(&self, book: &Book, now: Duration) -> Moment {
        self.calendar.at(book.time.map_or_else(|| self.clock.wall(), |time| time.at(now)))
    }

    /// Admits or refuses a request from what is at hand, or lets it wait.
    pub(super) fn begin(self: &Arc<Self>, application: &Arc<str>, quota: &Quota, demand: &Demand) -> Step {
        if let Some(limit) = quota.max_output_tokens.filter(|limit| demand.max_output_tokens > *limit) {
            return Step::Done(Err(Refusal::OutputTooLong { limit, requested: demand.max_output_tokens }));
        }
        let (limits, needs) = (limits(quota), demand.needs());
        if limits == PerKind::default() {
            return Step::Done(Ok(Reservation::new(self, application, quota, Charges::default())));
        }
        if let Some(refusal) = never(&limits, &needs) {
            return Step::Done(Err(refusal));
        }
        let now = self.clock.monotonic();
        let mut guard = self.book();
        let book = &mut *guard;
        let expired = now >= book.alive_until;
        let (waiting, stopping) = (book.waiting, book.stopping);
        let Some(local) = book.local(&self.config, application, &limits, now) else {
            return Step::Done(Err(self.lost()));
        };
        if expired {
            local.expire();
        }
        if !local.is_busy()
            && let Some(charges) = local.take(&needs, now)
        {
            let low = local.runs_low(now);
            // After a rest the thread has to be told that there is something to do.
            let wakes = book.touch(application) || (low && !book.urgent);
            book.urgent |= low;
            drop(guard);
            if wakes {
                self.work.notify_one();
            }
            return Step::Done(Ok(Reservation::new(self, application, quota, charges)));
        }
        if local.is_denied(&needs, now) {
            let at = self.moment(&guard, now);
            let refusal = guard.apps.get(application).and_then(|local| {
                local.refusal(&needs, &at, now, |kind| local.remaining(kind, &at, now) < needs[kind.index()])
            });
            if let Some(refusal) = refusal {
                return Step::Done(Err(refusal));
            }
        }
        if self.health() != QuotaHealth::Ok || waiting >= self.config.max_waiting || stopping {
            drop(guard);
            return Step::Done(self.without_store(application, quota, demand));
        }
        let (tell, verdict) = oneshot::channel();
        if let Some(local) = guard.apps.get_mut(application) {
            local.waiting.push_back(Waiter {
                quota: *quota,
                needs,
                has: Charges::default(),
                again: false,
                tell,
            });
        }
        guard.waiting += 1;
        guard.touch(application);
        guard.urgent = true;
        drop(guard);
        self.work.notify_one();
        Step::Wait(verdict)
    }

    /// What becomes of a request when the store does not answer.
    pub(super) fn without_store(
        self: &Arc<Self>,
        application: &Arc<str>,
        quota: &Quota,
        demand: &Demand,
    ) -> Result<Reservation, Refusal> {
        let (limits, needs) = (limits(quota), demand.needs());
        let now = self.clock.monotonic();
        let mut guard = self.book();
        let at = self.moment(&guard, now);
        let book = &mut *guard;
        let expired = now >= book.alive_until;
        let Some(local) = book.local(&self.config, application, &limits, now) else {
            return Err(self.lost());
        };
        if expired {
            local.expire();
        }
        let mut charges = local.take(&needs, now);
        let mut refusal = None;
        if charges.is_none() && self.config.on_store_loss == OnStoreLoss::Allow {
            charges = local.take_alone(&needs, &at, now);
            let short = |kind: Kind| local.remaining(kind, &at, now) < needs[kind.index()];
            match charges {
                Some(_) => self.counters.alone.add(1),
                None => refusal = local.refusal(&needs, &at, now, short),
            }
        }
        if charges.is_some() {
            book.touch(application);
        }
        drop(guard);
        match charges {
            Some(charges) => Ok(Reservation::new(self, application, quota, charges)),
            None => Err(refusal.unwrap_or_else(|| self.lost())),
        }
    }

    pub(super) fn lost(&self) -> Refusal {
        Refusal::Unavailable { retry_after: self.config.retry.max(Duration::from_secs(1)) }
    }

    /// Counts what became of a request.
    pub(super) fn counted(&self, done: Result<Reservation, Refusal>) -> Result<Reservation, Refusal> {
        let counters = &self.counters;
        match &done {
            Ok(reservation) if reservation.is_empty() => {}
            Ok(_) => counters.admitted.add(1),
            Err(Refusal::Exceeded(exceeded)) => counters.refused[exceeded.kind.index()].add(1),
            Err(Refusal::OutputTooLong { .. }) => counters.refused_output.add(1),
            Err(Refusal::Unavailable { .. }) => counters.refused_unavailable.add(1),
        }
        done
    }

    /// A request is over.
    pub(super) fn finish(&self, application: &Arc<str>, charges: &Charges, used: impl Fn(Kind, u64) -> u64) {
        let now = self.clock.monotonic();
        let mut book = self.book();
        let alive = now < book.alive_until;
        if let Some(local) = book.apps.get_mut(application) {
            if !alive {
                local.expire();
            }
            for kind in Kind::ALL {
                if let Some(charge) = charges[kind.index()] {
                    local.settle(kind, charge, used(kind, charge.1), now);
                }
            }
        }
        // It is told with the next report; nobody waits for it.
        let news = book.touch(application);
        drop(book);
        if news {
            self.work.notify_one();
        }
    }

    pub(super) fn standing(&self, application: &str, quota: &Quota) -> Standing {
        let now = self.clock.monotonic();
        let book = self.book();
        let at = self.moment(&book, now);
        if let Some(local) = book.apps.get(application) {
            return local.standing(&at, now);
        }
        let mut fresh = Local::default();
        fresh.set_limits(&limits(quota));
        fresh.standing(&at, now)
    }
}

/// A refusal where a request is larger than a whole limit.
fn never(limits: &PerKind<Option<u64>>, needs: &PerKind<u64>) -> Option<Refusal> {
    Kind::ALL.into_iter().find_map(|kind| {
        let (limit, requested) = (limits[kind.index()]?, needs[kind.index()]);
        let exceeded = Exceeded { kind, limit, remaining: limit, requested, retry_after: None };
        (requested > limit).then_some(Refusal::Exceeded(exceeded))
    })
}

impl Book {
    /// An application's part, with its limits as they are today. `None` if there is no room for another.
    fn local(
        &mut self,
        config: &QuotaConfig,
        application: &Arc<str>,
        limits: &PerKind<Option<u64>>,
        now: Duration,
    ) -> Option<&mut Local> {
        let crowded = self.apps.len() >= config.max_applications;
        if crowded && !self.apps.contains_key(application) && !self.make_room(now, config.retry) {
            return None;
        }
        let local = self.apps.entry(application.clone()).or_default();
        local.set_limits(limits);
        local.touched = now;
        Some(local)
    }

    /// Forgets applications that have been idle; not again at once where that found none.
    fn make_room(&mut self, now: Duration, retry: Duration) -> bool {
        if self.crowded_at.is_some_and(|at| now < at + retry) {
            return false;
        }
        let before = self.apps.len();
        self.apps.retain(|_, local| local.listed || now < local.touched + REMEMBERED || !local.is_idle(now));
        let found = self.apps.len() < before;
        self.crowded_at = (!found).then_some(now);
        found
    }

    /// Lists an application for the thread's next turn. Says whether it was not listed.
    pub(super) fn touch(&mut self, name: &Arc<str>) -> bool {
        match self.apps.get_mut(name) {
            Some(local) if !local.listed => {
                local.listed = true;
                self.woken = true;
                self.active.push(name.clone());
                true
            }
            _ => false,
        }
    }
}
