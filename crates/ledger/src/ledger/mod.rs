//! The handle that a server holds: rows on their way to a store, and what may leave to clients meanwhile.
//!
//! Owns one thread that gathers what all requests have to say into commits. A request never waits for another's
//! lock; what waits is bounded: each open request is in the queue once at most, whatever it has to say.
//!
//! The rules that the server keeps by asking here:
//!
//! * no byte of a 200 leaves before [`Open::permitted`] is `Some`;
//! * never more tokens than `permitted` have left: the window beyond the last durable checkpoint;
//! * the final chunk, `[DONE]` or the whole body leaves only once [`Open::is_closed`].

mod committer;
mod counters;
mod slot;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use counters::{ApplicationCounts, COMMIT_SECONDS, Counter, Counters};
pub use slot::{Counts, Open, Outcome};

use tokio::sync::Notify;

use crate::error::StoreError;
use crate::row::{Finish, Row, RowError, State, UserKind};
use crate::spool::{MAX_ROW_BYTES, Spool};
use crate::store::Store;
use crate::value::Hex;
use committer::Committer;
use slot::Slot;

/// How a ledger behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerConfig {
    /// This process's name: the same after a restart, unlike any other's at the same time.
    pub writer: String,
    /// Whether earlier runs of that name are known to be over, as under SQLite's lock: their rows are then
    /// closed at once, without waiting for their lease.
    pub takeover: bool,
    /// How long this process may be silent before others close its rows.
    pub lease: Duration,
    /// Tokens that may leave beyond the last durable checkpoint.
    pub window: u64,
    /// Tokens after which a checkpoint is worth writing: at most `window`, and less, or streams stop and go.
    pub checkpoint_every: u64,
    /// How long a checkpoint waits for others to share its commit. Openings and ends do not wait.
    pub gather: Duration,
    /// Requests that may be open at once.
    pub max_open: usize,
    /// Rows in one commit.
    pub max_batch: usize,
    /// Between attempts to reach a store that failed.
    pub retry: Duration,
    /// How long the store may fail before requests that wait for it are told so.
    pub stall: Duration,
    /// Between looks for rows of dead writers.
    pub recover_every: Duration,
    /// Applications of which counts are kept for metrics, at most; what ends for others is not counted there.
    pub applications: usize,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            writer: "mirai".to_owned(),
            takeover: false,
            lease: Duration::from_secs(30),
            window: 16,
            checkpoint_every: 8,
            gather: Duration::from_millis(5),
            max_open: 16_384,
            max_batch: 1024,
            retry: Duration::from_millis(250),
            stall: Duration::from_secs(10),
            recover_every: Duration::from_secs(10),
            applications: 0,
        }
    }
}

/// How the ledger is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// Rows reach the store.
    Ok = 0,
    /// Rows go to the spool, and are durable there.
    Spooling = 1,
    /// The store failed, and is tried again. New requests are refused; those that run may yet go on.
    Retrying = 2,
    /// It has failed for longer than `stall`: those that wait are told.
    Unavailable = 3,
    /// It must not be asked again: the process has to stop and start anew.
    Broken = 4,
}

impl Health {
    fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Ok,
            1 => Self::Spooling,
            2 => Self::Retrying,
            3 => Self::Unavailable,
            _ => Self::Broken,
        }
    }
}

/// A request cannot be accounted for, so it must not be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The store is out of reach, and there is no spool or no room in it. Answer 503.
    #[error("the ledger is unavailable")]
    Store,
    /// Too many requests are open. Answer 503.
    #[error("{0} requests are open, as many as the ledger takes")]
    Full(usize),
    /// The row breaks a bound.
    #[error("this request cannot be accounted for: {0}")]
    Row(#[from] RowError),
    /// Another request has its id.
    #[error("another request has this id")]
    Conflict,
    /// The ledger is stopping.
    #[error("the ledger is stopping")]
    Stopping,
}

#[derive(Debug, Default)]
struct Queue {
    /// Slots with something to say, each once.
    dirty: Vec<Arc<Slot>>,
    /// Whether one of them cannot wait for others.
    urgent: bool,
    stopping: bool,
}

/// What handles and the thread share.
#[derive(Debug)]
struct Shared {
    config: LedgerConfig,
    queue: Mutex<Queue>,
    work: Condvar,
    health: AtomicU8,
    /// Told when the health has become worse.
    changed: Notify,
    /// Requests whose rows are not durably closed.
    open: AtomicUsize,
    spooled_bytes: AtomicU64,
    spool_limit: u64,
    stopped: AtomicBool,
    counters: Counters,
    applications: Mutex<BTreeMap<String, ApplicationCounts>>,
    started: Instant,
    /// When the thread's turn began, by [`Shared::micros`]; 0 while it waits.
    busy_since: AtomicU64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> Health {
        let health = Health::from_number(self.health.load(Ordering::Acquire));
        let since = self.busy_since.load(Ordering::Acquire);
        // A store that does not answer at all keeps the thread from saying so.
        let stuck = since > 0 && self.micros().saturating_sub(since) >= self.config.stall.as_micros() as u64;
        if stuck { health.max(Health::Unavailable) } else { health }
    }

    /// A row has durably ended.
    fn count_for_application(&self, row: &Row) {
        if self.config.applications == 0 {
            return;
        }
        let mut all = self.applications.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < self.config.applications || all.contains_key(&row.application) {
            all.entry(row.application.clone()).or_default().add(row);
        }
    }

    /// Since the start, from 1.
    fn micros(&self) -> u64 {
        self.started.elapsed().as_micros() as u64 + 1
    }

    /// A turn of the thread begins or ends.
    fn set_busy(&self, busy: bool) {
        self.busy_since.store(if busy { self.micros() } else { 0 }, Ordering::Release);
    }

    fn set_health(&self, health: Health) {
        if self.health.swap(health as u8, Ordering::AcqRel) < health as u8 {
            self.changed.notify_waiters();
        }
    }

    fn submit(&self, slot: &Arc<Slot>, urgent: bool) {
        let mut queue = self.queue();
        queue.dirty.push(slot.clone());
        queue.urgent |= urgent;
        self.work.notify_one();
    }

    /// Bytes of the spool that the ends of open requests will need.
    fn reserved(&self, more: usize) -> u64 {
        (self.open.load(Ordering::Acquire) + more) as u64 * MAX_ROW_BYTES
    }

    /// Whether a new request can be accounted for to its end.
    fn takes_more(&self) -> Result<(), Unavailable> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(Unavailable::Stopping);
        }
        match self.health() {
            Health::Ok => Ok(()),
            // An opening and an end for it, and an end for each that is open.
            Health::Spooling
                if self.spooled_bytes.load(Ordering::Acquire) + self.reserved(2) <= self.spool_limit =>
            {
                Ok(())
            }
            _ => Err(Unavailable::Store),
        }
    }
}

/// Accounts for requests.
#[derive(Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A ledger could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store failed, and there is no spool to make up for it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system refused a thread.
    #[error("no thread for the ledger: {0}")]
    Thread(#[from] std::io::Error),
}

fn shared(mut config: LedgerConfig, spool: Option<&Spool>) -> Arc<Shared> {
    // A stream at the end of its window must have asked for a checkpoint, or it would wait for ever.
    config.checkpoint_every = config.checkpoint_every.clamp(1, config.window.max(1));
    config.max_batch = config.max_batch.max(1);
    Arc::new(Shared {
        queue: Mutex::default(),
        work: Condvar::new(),
        health: AtomicU8::new(0),
        changed: Notify::new(),
        open: AtomicUsize::new(0),
        spooled_bytes: AtomicU64::new(spool.map_or(0, Spool::len)),
        spool_limit: spool.map_or(0, Spool::limit),
        stopped: AtomicBool::new(false),
        counters: Counters::default(),
        applications: Mutex::default(),
        started: Instant::now(),
        busy_since: AtomicU64::new(0),
        config,
    })
}

impl Ledger {
    /// Registers with the store and starts the thread. What an earlier process left in the spool is replayed
    /// by it, and rows of dead writers are closed.
    ///
    /// # Errors
    /// The store is broken, or out of reach while there is no spool.
    pub fn start(
        store: Box<dyn Store>,
        spool: Option<Spool>,
        config: LedgerConfig,
    ) -> Result<Self, StartError> {
        let shared = shared(config, spool.as_ref());
        let mut committer = Committer::new(store, spool, shared.clone(), Instant::now());
        let (told, started) = std::sync::mpsc::sync_channel(1);
        // Everything that touches the store happens on that thread: a driver may not like others.
        let thread = std::thread::Builder::new().name("ledger".to_owned()).spawn(move || {
            let first = committer.first();
            let starts = first.is_ok();
            if told.send(first).is_ok() && starts {
                committer.run();
            }
        })?;
        let ledger = Self { shared, thread: Mutex::new(Some(thread)) };
        let gone = || StoreError::Broken("the ledger's thread ended at once".to_owned());
        started.recv().unwrap_or_else(|_| Err(gone().into()))?;
        Ok(ledger)
    }

    /// Accounts for a request from now on. Returns at once: the row becomes durable while the request is
    /// queued and computed. Durations count from `arrived`. The ledger
    /// salts the user's pseudonym, and keeps the row's `state`, `finish` and durations itself.
    ///
    /// # Errors
    /// The request must not be served.
    pub fn open(&self, row: Row, arrived: Instant) -> Result<Open, Unavailable> {
        open_on(&self.shared, row, arrived)
    }

    /// How it is.
    pub fn health(&self) -> Health {
        self.shared.health()
    }

    /// Returns once the store must not be asked again.
    pub async fn broken(&self) {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // Count from here, so that a change between the look and the wait is not missed.
            changed.as_mut().enable();
            if self.health() == Health::Broken {
                return;
            }
            changed.await;
        }
    }

    /// Whether a new request would be refused now.
    ///
    /// # Errors
    /// Why it would.
    pub fn takes_more(&self) -> Result<(), Unavailable> {
        self.shared.takes_more()
    }

    /// Requests whose rows are not durably closed.
    pub fn open_requests(&self) -> usize {
        self.shared.open.load(Ordering::Acquire)
    }

    /// Bytes that wait in the spool.
    pub fn spooled_bytes(&self) -> u64 {
        self.shared.spooled_bytes.load(Ordering::Acquire)
    }

    /// What it did since it started.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// What ended for each application since the start, in the order of names; empty unless
    /// [`LedgerConfig::applications`] asks for it.
    pub fn by_application(&self) -> Vec<(String, ApplicationCounts)> {
        let all = self.shared.applications.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(name, counts)| (name.clone(), *counts)).collect()
    }

    /// Takes no more requests, stores what there is to store, and ends the run. Rows that are still open are
    /// left to recovery. Blocks until it is done.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.queue().stopping = true;
        self.shared.work.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the ledger's thread panicked");
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open_on(shared: &Arc<Shared>, mut row: Row, arrived: Instant) -> Result<Open, Unavailable> {
    let counters = &shared.counters;
    row.state = State::Open;
    row.finish = Finish::None;
    row.completion_tokens = 0;
    row.duration = 0;
    row.user_anon = UserKind::None;
    (row.user_salt, row.user_commitment) = (None, None);
    if let Some(user) = &row.user {
        let salt = Hex(rand::random());
        row.user_commitment = Some(crate::chain::commitment(&salt, user));
        row.user_salt = Some(salt);
        row.user_anon = UserKind::Present;
    }
    row.check()?;
    shared.takes_more().inspect_err(|_| counters.refused_unavailable.add(1))?;
    if shared.open.fetch_add(1, Ordering::AcqRel) >= shared.config.max_open {
        shared.open.fetch_sub(1, Ordering::AcqRel);
        counters.refused_full.add(1);
        return Err(Unavailable::Full(shared.config.max_open));
    }
    let slot = Arc::new(Slot::new(row, arrived));
    shared.submit(&slot, true);
    Ok(Open::new(slot, shared.clone()))
}
