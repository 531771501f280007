//! Quotas: what an application may use, counted over all replicas that share a store.
//!
//! Owns the counters and their leases. Never sees a prompt, an answer or a user; knows no HTTP.
//!
//! **Reserve, then settle.** A request is admitted when the most that it may use, its prompt and the longest
//! answers that it asks for, fits into every limit of its application. That much is reserved; when it is over,
//! what it did not use is free again. So no stream is ever cut off by a quota, and none is exceeded.
//! A request counts in the second, the day and the month in which it was admitted, whenever it ends.
//!
//! **Leases.** A replica takes from the store what waiting requests need, and beyond that what it used in the last
//! second, at most a twentieth of the limit; from that it admits without asking. A request that needs more than
//! a twentieth gets exactly what it needs, if that much is left: the share bounds what lies idle on a replica, not
//! what a request may be. What is idle goes back within a second or two.
//!
//! **Minutes** are sliding windows over seconds of the store's clock: no interval of 60 s sees more than the limit.
//! What is taken in one second may be used until the end of the next, so it counts for 62.
//! **Days and months** begin in a configured zone.
//!
//! **A replica dies.** After its lease its places (`concurrent_requests`) come back. Its tokens count as spent, up
//! to what its rows in the ledger say once recovery has closed them: rows tell at most 16 tokens a stream less
//! than left, and that is all by which a quota can be exceeded. Where rows cannot tell (no ledger, or a spool
//! that may hold them) all of its tokens count as spent. A reservation that is dropped without a word counts as
//! spent too. A replica that was believed dead and comes back counts what still runs once more.
//!
//! **The store is lost.** A replica spends what it holds, for as long as its lease lasts, and then does what
//! [`OnStoreLoss`] says. What it admitted alone is counted when the store is back.
//!
//! **Clocks.** Only the store's is read; between two readings a replica's monotonic clock carries it on. Set back,
//! it frees nothing early, and what was taken before counts for a minute more. Set forward by mistake, it ends
//! minutes, days and months early: what is then taken twice is bounded by one limit a jump.

mod account;
mod calendar;
mod counters;
mod kind;
mod landing;
mod local;
mod refusal;
mod reservation;
mod shared;
mod sql;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout)]
mod tests;
mod thread;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub use calendar::UnknownZone;
pub use counters::Counters;
pub use kind::{Demand, Kind};
pub use refusal::{Exceeded, Level, Refusal, Standing};
pub use reservation::Reservation;

use crate::error::StoreError;
use crate::identity::Quota;
use crate::store::SqlStore;
use crate::store::sql::Sql;
use calendar::Calendar;
use shared::{Shared, Step};
use sql::QuotaStore;
use thread::Syncer;

/// What happens once a replica's lease is spent and the store does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStoreLoss {
    /// New requests of applications with a quota are refused.
    #[default]
    Refuse,
    /// The replica holds limits against what it knows, as if it were alone: each replica may then admit up to a
    /// whole limit.
    Allow,
}

/// How quotas behave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaConfig {
    /// The zone whose days and months count, by its IANA name.
    pub zone: String,
    /// The ledger's writer in this process.
    pub writer: String,
    /// Whether earlier processes of that writer are known to be over, as under SQLite's lock.
    pub takeover: bool,
    /// Whether that writer's rows are in the same store and nowhere else: not where it has a spool.
    pub rows_tell: bool,
    /// How long a replica may be silent before its leases end.
    pub lease: Duration,
    /// Between reports to the store while something happens.
    pub sync_every: Duration,
    /// Between attempts to reach a store that failed.
    pub retry: Duration,
    /// How long a request waits for the store at most.
    pub max_wait: Duration,
    /// How long a refusal by the store is repeated without asking it.
    pub recheck: Duration,
    /// Requests that may wait at once.
    pub max_waiting: usize,
    /// Applications that are remembered at once.
    pub max_applications: usize,
    /// When the store is lost.
    pub on_store_loss: OnStoreLoss,
}

impl Default for QuotaConfig {
    fn default() -> Self {
        Self {
            zone: "Europe/Paris".to_owned(),
            writer: "mirai".to_owned(),
            takeover: false,
            rows_tell: false,
            lease: Duration::from_secs(30),
            sync_every: Duration::from_millis(500),
            retry: Duration::from_millis(250),
            max_wait: Duration::from_secs(1),
            recheck: Duration::from_millis(250),
            max_waiting: 1024,
            max_applications: crate::identity::MAX_APPLICATIONS,
            on_store_loss: OnStoreLoss::default(),
        }
    }
}

impl QuotaConfig {
    /// Whether there is such a zone.
    ///
    /// # Errors
    /// There is none.
    pub fn check_zone(zone: &str) -> Result<(), UnknownZone> {
        Calendar::new(zone).map(|_| ())
    }
}

/// How quotas are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum QuotaHealth {
    /// The store counts.
    Ok = 0,
    /// It does not answer, and is tried again.
    Lost = 1,
    /// It must not be asked again.
    Broken = 2,
}

/// Quotas could not start.
#[derive(Debug, thiserror::Error)]
pub enum QuotaStartError {
    /// The zone is unknown.
    #[error(transparent)]
    Zone(#[from] UnknownZone),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system refused a thread.
    #[error("no thread for quotas: {0}")]
    Thread(#[from] std::io::Error),
}

/// The clocks of this machine.
pub(crate) trait Clock: Send + Sync {
    /// Never goes back.
    fn monotonic(&self) -> Duration;
    /// Microseconds since 1970, as rows are dated.
    fn wall(&self) -> i64;
}

/// Real ones.
struct SystemClock(std::time::Instant);

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
    fn wall(&self) -> i64 {
        crate::store::sqlite::system_micros()
    }
}

/// Counts what applications use, and says who may use more.
#[derive(Debug)]
pub struct Quotas {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Quotas {
    /// Registers with the store and starts the thread that speaks with it. `store` is a connection of its own,
    /// beside the ledger's.
    ///
    /// # Errors
    /// The zone is unknown, or the store failed.
    pub fn start<C: Sql + 'static>(store: SqlStore<C>, config: QuotaConfig) -> Result<Self, QuotaStartError> {
        let clock = Arc::new(SystemClock(std::time::Instant::now()));
        Self::start_with(Box::new(store), config, clock)
    }

    /// Counts in this process alone, and only while it lives.
    ///
    /// # Errors
    /// The zone is unknown.
    pub fn start_in_memory(config: QuotaConfig) -> Result<Self, QuotaStartError> {
        Self::start(SqlStore::in_memory()?, config)
    }

    pub(crate) fn start_with(
        store: Box<dyn QuotaStore>,
        config: QuotaConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, QuotaStartError> {
        let calendar = Calendar::new(&config.zone)?;
        let shared = Arc::new(Shared::new(config, calendar, clock));
        let mut syncer = Syncer::new(store, shared.clone());
        let (told, started) = std::sync::mpsc::sync_channel(1);
        // Everything that touches the store happens on that thread: a driver may not like others.
        let thread = std::thread::Builder::new().name("quotas".to_owned()).spawn(move || {
            let first = syncer.first();
            let starts = first.is_ok();
            if told.send(first).is_ok() && starts {
                syncer.run();
            }
        })?;
        let quotas = Self { shared, thread: Mutex::new(Some(thread)) };
        let gone = || StoreError::Broken("the thread of quotas ended at once".to_owned());
        started.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(quotas)
    }

    /// Takes what a request may use from its application's limits, as they are now. Returns at once while the
    /// replica's lease lasts, and within `max_wait` otherwise. An application without limits is never counted.
    ///
    /// # Errors
    /// The request must not be served.
    pub async fn reserve(
        &self,
        application: &Arc<str>,
        quota: &Quota,
        demand: Demand,
    ) -> Result<Reservation, Refusal> {
        let shared = &self.shared;
        let waits = match shared.begin(application, quota, &demand) {
            Step::Done(done) => return shared.counted(done),
            Step::Wait(waits) => waits,
        };
        shared.counters.waited.add(1);
        let verdict = tokio::time::timeout(shared.config.max_wait, waits).await;
        let done = match verdict {
            Ok(Ok(local::Verdict::Go(unclaimed))) => unclaimed.claim().ok_or_else(|| shared.lost()),
            Ok(Ok(local::Verdict::No(refusal))) => Err(refusal),
            // It said so, it is gone, or it takes too long.
            Ok(Ok(local::Verdict::Lost) | Err(_)) | Err(_) => {
                shared.without_store(application, quota, &demand)
            }
        };
        shared.counted(done)
    }

    /// How an application stands. `None` of both where it has no such limit.
    pub fn standing(&self, application: &str, quota: &Quota) -> Standing {
        self.shared.standing(application, quota)
    }

    /// How quotas are.
    pub fn health(&self) -> QuotaHealth {
        self.shared.health()
    }

    /// What they did since they started.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Applications that are remembered now.
    pub fn applications(&self) -> usize {
        self.shared.book().apps.len()
    }

    /// Gives back what is not in use. Reservations that are still open are left to the store as after a crash.
    pub fn stop(&self) {
        self.shared.stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread of quotas panicked");
        }
    }
}

impl Drop for Quotas {
    fn drop(&mut self) {
        self.stop();
    }
}
