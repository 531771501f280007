//! One open request: what it has to say, and how much of that is durable.
//!
//! Owns the moment at which a request is queued for the next commit. The last state counts: what was said
//! before and not yet written is never written.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::{Health, Shared, Unavailable};
use crate::row::{EnergyMethod, Finish, Row, State};
use crate::store::Entry;

/// What a request has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens of all answers, sent or not.
    pub completion_tokens: u64,
    /// Those of them that were reasoning.
    pub reasoning_tokens: u64,
    /// Tokens of prompts that were not computed again.
    pub cached_tokens: u64,
    /// Computed and not delivered.
    pub wasted_tokens: u64,
    /// Arrival to first token, microseconds.
    pub first_token_after: Option<u64>,
    /// Share of each step times devices, device microseconds.
    pub gpu_micros: u64,
    /// Energy, microjoules.
    pub energy_microjoules: u64,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What it used, to the token.
    pub counts: Counts,
    /// How it ended; never [`Finish::Crashed`].
    pub finish: Finish,
    /// HTTP status.
    pub status: u16,
    /// How the energy was measured.
    pub energy_method: EnergyMethod,
}

/// How far a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing is durable.
    New = 0,
    /// It is durably open.
    Opened = 1,
    /// It is durably closed.
    Closed = 2,
    /// Another request has its id.
    Conflict = 3,
}

#[derive(Debug)]
struct Inner {
    row: Row,
    /// Whether the store has it.
    stored: bool,
    /// Whether it is in the queue.
    queued: bool,
    /// Tokens of the last state that was queued.
    submitted: u64,
    /// The status of the failure that its client was told of, if it was.
    failed: Option<u16>,
}

impl Inner {
    /// A client that was told of a failure does not pay for a success.
    fn retract(&mut self) {
        if let Some(status) = self.failed
            && matches!(self.row.finish, Finish::Stop | Finish::Length)
        {
            self.row.finish = Finish::Error;
            self.row.status = status;
        }
    }
}

/// What the handle and the thread share of a request.
#[derive(Debug)]
pub(super) struct Slot {
    inner: Mutex<Inner>,
    began: Instant,
    durable: AtomicU64,
    phase: AtomicU8,
    changed: Notify,
}

fn apply(row: &mut Row, counts: &Counts) {
    row.completion_tokens = row.completion_tokens.max(counts.completion_tokens);
    row.reasoning_tokens = counts.reasoning_tokens;
    row.cached_tokens = counts.cached_tokens;
    row.wasted_tokens = counts.wasted_tokens;
    row.first_token_after = counts.first_token_after;
    row.gpu_micros = counts.gpu_micros;
    row.energy_microjoules = counts.energy_microjoules;
}

impl Slot {
    pub(super) fn new(row: Row, began: Instant) -> Self {
        Self {
            inner: Mutex::new(Inner { row, stored: false, queued: true, submitted: 0, failed: None }),
            began,
            durable: AtomicU64::new(0),
            phase: AtomicU8::new(0),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::New,
            1 => Phase::Opened,
            2 => Phase::Closed,
            _ => Phase::Conflict,
        }
    }

    /// What it has to say now; it is out of the queue then.
    pub(super) fn take(&self) -> Entry {
        let mut inner = self.lock();
        inner.queued = false;
        Entry { row: inner.row.clone(), stored: inner.stored }
    }

    /// Back into the queue, after a failure. Returns whether it was out of it.
    pub(super) fn requeue(&self) -> bool {
        !std::mem::replace(&mut self.lock().queued, true)
    }

    /// A state is durable, in the store or in the spool.
    pub(super) fn durable(&self, row: &Row, stored: bool) {
        self.lock().stored |= stored;
        let phase = if row.state == State::Closed { Phase::Closed } else { Phase::Opened };
        self.durable.fetch_max(row.completion_tokens, Ordering::AcqRel);
        self.phase.store(phase as u8, Ordering::Release);
        self.changed.notify_waiters();
    }

    pub(super) fn conflict(&self) {
        self.phase.store(Phase::Conflict as u8, Ordering::Release);
        self.changed.notify_waiters();
    }
}

/// The handle of an open request. Dropped without an end, it ends with an error: no row is forgotten.
#[derive(Debug)]
pub struct Open {
    pub(super) slot: Arc<Slot>,
    shared: Arc<Shared>,
}

impl Open {
    pub(super) fn new(slot: Arc<Slot>, shared: Arc<Shared>) -> Self {
        Self { slot, shared }
    }

    /// Tells how far the request is. Cheap: only each `checkpoint_every` tokens it asks for a commit.
    pub fn checkpoint(&self, counts: &Counts) {
        let submit = {
            let mut inner = self.slot.lock();
            if inner.row.state == State::Closed {
                return;
            }
            apply(&mut inner.row, counts);
            inner.row.duration = self.elapsed();
            let due = inner.row.completion_tokens >= inner.submitted + self.shared.config.checkpoint_every;
            if due {
                inner.submitted = inner.row.completion_tokens;
            }
            due && !std::mem::replace(&mut inner.queued, true)
        };
        if submit {
            self.shared.submit(&self.slot, false);
        }
    }

    /// How many tokens may have left by now; `None` while not even the first byte may.
    pub fn permitted(&self) -> Option<u64> {
        match self.slot.phase() {
            Phase::New | Phase::Conflict => None,
            Phase::Opened | Phase::Closed => {
                Some(self.slot.durable.load(Ordering::Acquire).saturating_add(self.shared.config.window))
            }
        }
    }

    /// Ends the row. The first end counts. It may count fewer tokens than a checkpoint did: what a stop string
    /// took back.
    pub fn close(&self, outcome: &Outcome) {
        let submit = {
            let mut inner = self.slot.lock();
            if inner.row.state == State::Closed {
                return;
            }
            apply(&mut inner.row, &outcome.counts);
            inner.row.completion_tokens = outcome.counts.completion_tokens;
            inner.row.duration = self.elapsed();
            inner.row.state = State::Closed;
            // One word is recovery's: an owner that said it could unsay its end. Ours are all short.
            inner.row.finish = match &outcome.finish {
                Finish::Crashed | Finish::None | Finish::Other(_) => Finish::Error,
                finish => finish.clone(),
            };
            inner.row.status = outcome.status;
            inner.row.energy_method = outcome.energy_method.clone();
            inner.retract();
            if inner.queued {
                // It is still in the queue, and now it cannot wait.
                self.shared.queue().urgent = true;
                self.shared.work.notify_one();
            }
            !std::mem::replace(&mut inner.queued, true)
        };
        if submit {
            self.shared.submit(&self.slot, true);
        }
    }

    /// The client was told that its request failed, with this status, because its row is not known to be durable.
    /// An end that says otherwise is taken back, even if it was written meanwhile.
    pub fn fail(&self, status: u16) {
        let submit = {
            let mut inner = self.slot.lock();
            let before = inner.row.finish.clone();
            inner.failed.get_or_insert(status);
            inner.retract();
            inner.row.finish != before && !std::mem::replace(&mut inner.queued, true)
        };
        if submit {
            self.shared.submit(&self.slot, true);
        }
    }

    /// Whether the end is durable: the final chunk may leave.
    pub fn is_closed(&self) -> bool {
        self.slot.phase() == Phase::Closed
    }

    /// Why waiting is in vain, if it is.
    pub fn fault(&self) -> Option<Unavailable> {
        if self.slot.phase() == Phase::Conflict {
            return Some(Unavailable::Conflict);
        }
        (self.shared.health() >= Health::Unavailable).then_some(Unavailable::Store)
    }

    /// Waits until the row is durably open.
    ///
    /// # Errors
    /// It will not be in time. End the request, and close the row as a failure.
    pub async fn opened(&self) -> Result<(), Unavailable> {
        self.wait(|phase| phase != Phase::New).await
    }

    /// Waits until the row is durably closed, after [`Open::close`].
    ///
    /// # Errors
    /// It will not be in time. The row is written as soon as that is possible; the client must not be told
    /// that its request has ended well.
    pub async fn closed(&self) -> Result<(), Unavailable> {
        self.wait(|phase| phase == Phase::Closed).await
    }

    /// Waits until `tokens` may have left.
    ///
    /// # Errors
    /// They may not in time.
    pub async fn may_send(&self, tokens: u64) -> Result<(), Unavailable> {
        self.wait(|_| self.permitted().is_some_and(|permitted| permitted >= tokens)).await
    }

    async fn wait(&self, done: impl Fn(Phase) -> bool) -> Result<(), Unavailable> {
        loop {
            let (row, health) = (self.slot.changed.notified(), self.shared.changed.notified());
            tokio::pin!(row, health);
            // Count from here, so that a change between the look and the wait is not missed.
            row.as_mut().enable();
            health.as_mut().enable();
            let phase = self.slot.phase();
            if phase != Phase::Conflict && done(phase) {
                return Ok(());
            }
            if let Some(fault) = self.fault() {
                return Err(fault);
            }
            tokio::select! {
                () = row => {}
                () = health => {}
                // A store that hangs changes nothing: looked at again after that time.
                () = tokio::time::sleep(self.shared.config.stall) => {}
            }
        }
    }

    fn elapsed(&self) -> u64 {
        u64::try_from(self.slot.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let (counts, status) = {
            let inner = self.slot.lock();
            let row = &inner.row;
            let counts = Counts {
                completion_tokens: row.completion_tokens,
                reasoning_tokens: row.reasoning_tokens,
                cached_tokens: row.cached_tokens,
                wasted_tokens: row.wasted_tokens,
                first_token_after: row.first_token_after,
                gpu_micros: row.gpu_micros,
                energy_microjoules: row.energy_microjoules,
            };
            (counts, row.status)
        };
        self.close(&Outcome { counts, finish: Finish::Error, status, energy_method: EnergyMethod::None });
    }
}
