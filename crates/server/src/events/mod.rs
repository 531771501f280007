//! Ended requests as CloudEvents for another system, at least once each.
//!
//! Owns the loop: which replica tells, what is told again after a fault, and how long it waits. Which rows there
//! are to tell is the ledger's; how bytes travel is the [`Deliver`]er's. An event that is refused holds up those
//! behind it, and says so by its lag: what is billed elsewhere must not be lost quietly.

mod post;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use mirai_ledger::StoreError;
use mirai_ledger::event::{Event, EventOptions};
use mirai_ledger::location::Location;
use mirai_ledger::price::PriceBook;
use mirai_ledger::store::sqlite::system_micros;
use mirai_ledger::store::{Batch, Outbox};

pub use post::EventsError;
pub(crate) use post::Post;

/// The consumer's name in the store: one, because there is one address.
const CONSUMER: &str = "events";
/// Links of chains read for one batch.
const BATCH: usize = 256;
/// Events on their way at once.
const AT_ONCE: usize = 8;
/// How long the right to tell lasts; it is renewed with every batch and every attempt.
const LEASE: Duration = Duration::from_secs(60);
/// Between looks for something to tell.
const LOOK: Duration = Duration::from_secs(1);
/// Between attempts after a fault: doubled each time, up to the most.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const MOST_WAIT: Duration = Duration::from_secs(60);

/// Where usage events go, and what they say.
#[derive(Clone, Debug)]
pub struct UsageEvents {
    /// Whose rows.
    pub ledger: Location,
    /// `https://`, or `http://` where no token is sent.
    pub url: String,
    /// File with a bearer token; read again when events are sent.
    pub token_file: Option<PathBuf>,
    /// Authorities to trust instead of the system's.
    pub ca_bundle: Option<PathBuf>,
    /// What events say.
    pub options: EventOptions,
    /// Costs in them.
    pub prices: Option<Arc<PriceBook>>,
    /// This process's name among the replicas.
    pub holder: String,
}

/// How events reach their receiver.
pub(crate) trait Deliver: Send + Sync + 'static {
    /// Called before some events are delivered.
    ///
    /// # Errors
    /// They cannot be now.
    fn prepare(&self) -> impl Future<Output = Result<(), String>> + Send {
        std::future::ready(Ok(()))
    }

    /// Returns once the receiver has taken the event.
    ///
    /// # Errors
    /// It has not, or nobody knows. In words that repeat nothing of the event.
    fn deliver(&self, event: &Event) -> impl Future<Output = Result<(), String>> + Send;
}

/// What the exporter did and what it has still to do, for metrics.
#[derive(Debug, Default)]
pub(crate) struct EventCounters {
    pub(crate) delivered: AtomicU64,
    pub(crate) failures: AtomicU64,
    /// Links of chains that wait: at most so many events.
    pub(crate) pending: AtomicU64,
    /// Since the oldest event that waits ended, microseconds; 0 if none does, or another replica tells.
    pub(crate) lag_micros: AtomicU64,
}

/// What the loop needs.
pub(crate) struct Exporter<D> {
    pub(crate) location: Location,
    pub(crate) options: EventOptions,
    pub(crate) prices: Option<Arc<PriceBook>>,
    pub(crate) deliver: D,
    pub(crate) counters: Arc<EventCounters>,
    /// This process's name, unlike any other's at the same time.
    pub(crate) holder: String,
}

/// What one round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// A batch was told; there may be more.
    Told,
    /// There is nothing to tell.
    Idle,
    /// Another replica tells.
    Other,
    /// The receiver or the store failed.
    Failed,
}

type Store = Option<Box<dyn Outbox>>;

/// Runs a call of the store on a thread for blocking work. A store that failed is opened anew the next time.
async fn blocking<T: Send + 'static>(
    location: &Location,
    store: &mut Store,
    call: impl FnOnce(&mut dyn Outbox) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let (taken, location) = (store.take(), location.clone());
    let work = tokio::task::spawn_blocking(move || {
        let mut outbox = match taken {
            Some(outbox) => outbox,
            None => location.open_outbox()?,
        };
        call(&mut *outbox).map(|value| (value, outbox))
    });
    let gone = |_| Err(StoreError::Unavailable("a call of the store panicked".to_owned()));
    let (value, outbox) = work.await.unwrap_or_else(gone)?;
    *store = Some(outbox);
    Ok(value)
}

impl Exporter<Post> {
    pub(crate) fn new(events: UsageEvents) -> Result<Self, EventsError> {
        Ok(Self {
            deliver: Post::new(&events.url, events.token_file, events.ca_bundle.as_deref())?,
            location: events.ledger,
            options: events.options,
            prices: events.prices,
            counters: Arc::default(),
            holder: events.holder,
        })
    }
}

impl<D: Deliver> Exporter<D> {
    /// Tells for ever.
    pub(crate) async fn run(self) {
        let mut store = None;
        let mut wait = FIRST_WAIT;
        loop {
            match self.round(&mut store).await {
                Round::Told => wait = FIRST_WAIT,
                Round::Idle => {
                    wait = FIRST_WAIT;
                    tokio::time::sleep(LOOK).await;
                }
                Round::Other => tokio::time::sleep(LEASE / 6).await,
                Round::Failed => {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(MOST_WAIT);
                }
            }
        }
    }

    async fn hold(&self, store: &mut Store) -> Result<bool, StoreError> {
        let holder = self.holder.clone();
        blocking(&self.location, store, move |store| store.hold(CONSUMER, &holder, LEASE)).await
    }

    async fn round(&self, store: &mut Store) -> Round {
        match self.try_round(store).await {
            Ok(round) => round,
            Err(error) => {
                self.counters.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "usage events wait for the ledger");
                Round::Failed
            }
        }
    }

    async fn try_round(&self, store: &mut Store) -> Result<Round, StoreError> {
        if !self.hold(store).await? {
            self.counters.lag_micros.store(0, Ordering::Relaxed);
            self.counters.pending.store(0, Ordering::Relaxed);
            return Ok(Round::Other);
        }
        let (batch, pending) = blocking(&self.location, store, |store| {
            Ok((store.next(CONSUMER, BATCH)?, store.pending(CONSUMER)?))
        })
        .await?;
        self.counters.pending.store(pending, Ordering::Relaxed);
        if batch.is_empty() {
            self.counters.lag_micros.store(0, Ordering::Relaxed);
            return Ok(Round::Idle);
        }
        self.tell(store, batch).await
    }

    /// Delivers a batch, what failed of it again and again, as long as this process has the right to.
    async fn tell(&self, store: &mut Store, batch: Batch) -> Result<Round, StoreError> {
        let ended = |row: &mirai_ledger::Row| row.queued_at.saturating_add_unsigned(row.duration);
        let oldest = batch.rows.iter().map(|(row, _)| ended(row)).min();
        let prices = self.prices.as_deref();
        let mut left: Vec<Event> =
            batch.rows.iter().map(|(row, digest)| Event::new(row, *digest, prices, &self.options)).collect();
        let mut wait = FIRST_WAIT;
        loop {
            let lag = oldest.map_or(0, |oldest| system_micros().saturating_sub(oldest).max(0));
            self.counters.lag_micros.store(lag.unsigned_abs(), Ordering::Relaxed);
            left = self.attempt(left).await;
            if left.is_empty() {
                break;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MOST_WAIT / 2);
            if !self.hold(store).await? {
                return Ok(Round::Other);
            }
        }
        let holder = self.holder.clone();
        let told =
            blocking(&self.location, store, move |store| store.told(CONSUMER, &holder, &batch)).await?;
        Ok(if told { Round::Told } else { Round::Other })
    }

    /// Delivers events, some at once. Returns those that failed.
    async fn attempt(&self, events: Vec<Event>) -> Vec<Event> {
        if let Err(reason) = self.deliver.prepare().await {
            self.counters.failures.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(reason, "usage events cannot be sent");
            return events;
        }
        let one = |event: Event| async move {
            match self.deliver.deliver(&event).await {
                Ok(()) => {
                    self.counters.delivered.fetch_add(1, Ordering::Relaxed);
                    None
                }
                Err(reason) => {
                    self.counters.failures.fetch_add(1, Ordering::Relaxed);
                    Some((event, reason))
                }
            }
        };
        let failed: Vec<_> = stream::iter(events)
            .map(one)
            .buffer_unordered(AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        if let Some((_, reason)) = failed.first() {
            tracing::warn!(events = failed.len(), reason, "usage events were not taken; they are sent again");
        }
        failed.into_iter().map(|(event, _)| event).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use mirai_ledger::store::Entry;
    use mirai_ledger::{Epoch, Finish, Row, State};

    use super::*;

    /// A receiver that remembers, and fails as told.
    #[derive(Clone, Default)]
    struct Receiver {
        /// How often each event came, by id.
        seen: Arc<Mutex<HashMap<String, u32>>>,
        /// Takes nothing.
        down: Arc<AtomicBool>,
        /// Takes it, and says that it did not: the first time for each.
        forgetful: bool,
    }

    impl Receiver {
        fn times(&self) -> Vec<u32> {
            let mut times: Vec<u32> = self.seen.lock().unwrap().values().copied().collect();
            times.sort_unstable();
            times
        }
    }

    impl Deliver for Receiver {
        async fn deliver(&self, event: &Event) -> Result<(), String> {
            tokio::task::yield_now().await;
            if self.down.load(Ordering::Relaxed) {
                return Err("down".to_owned());
            }
            let mut seen = self.seen.lock().unwrap();
            let times = seen.entry(event.id.clone()).or_default();
            *times += 1;
            if self.forgetful && *times == 1 { Err("forgot".to_owned()) } else { Ok(()) }
        }
    }

    struct Bed {
        _folder: tempfile::TempDir,
        location: Location,
        writer: Box<dyn mirai_ledger::store::Store>,
        me: Epoch,
        next: u64,
    }

    const LONG: Duration = Duration::from_secs(3600);

    impl Bed {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let location: Location =
                format!("sqlite://{}/ledger.db", folder.path().display()).parse().unwrap();
            let mut writer = location.open(None).unwrap();
            let me = writer.register("w", LONG, true).unwrap();
            Self { _folder: folder, location, writer, me, next: 0 }
        }

        fn end_rows(&mut self, count: u64) {
            let row = |n: u64| Row {
                id: format!("R{n:06}"),
                state: State::Closed,
                finish: Finish::Stop,
                queued_at: system_micros() - 5_000_000,
                duration: 1_000_000,
                ..Row::default()
            };
            let rows: Vec<Entry> =
                (self.next..self.next + count).map(|n| Entry { row: row(n), stored: false }).collect();
            self.next += count;
            self.writer.commit(&self.me, LONG, &rows).unwrap();
        }

        fn exporter(&self, holder: &str, receiver: &Receiver) -> Exporter<Receiver> {
            Exporter {
                location: self.location.clone(),
                options: EventOptions::default(),
                prices: None,
                deliver: receiver.clone(),
                counters: Arc::default(),
                holder: holder.to_owned(),
            }
        }
    }

    async fn drain(exporter: &Exporter<Receiver>) {
        let mut store = None;
        while exporter.round(&mut store).await != Round::Idle {}
    }

    #[tokio::test]
    async fn every_ended_row_is_told_once() {
        let mut bed = Bed::new();
        let receiver = Receiver::default();
        let exporter = bed.exporter("a", &receiver);
        assert_eq!(exporter.round(&mut None).await, Round::Idle);
        bed.end_rows(600);
        drain(&exporter).await;
        assert_eq!(receiver.times(), vec![1; 600]);
        let counters = &exporter.counters;
        assert_eq!(counters.delivered.load(Ordering::Relaxed), 600);
        assert_eq!(
            (counters.pending.load(Ordering::Relaxed), counters.lag_micros.load(Ordering::Relaxed)),
            (0, 0)
        );
        // Another process of the same name goes on where it was.
        bed.end_rows(1);
        drain(&bed.exporter("a", &receiver)).await;
        assert_eq!(receiver.times(), vec![1; 601]);
    }

    /// An answer that was lost: the event comes again, with the same id, and nothing else does.
    #[tokio::test(start_paused = true)]
    async fn what_was_not_confirmed_is_told_again() {
        let mut bed = Bed::new();
        bed.end_rows(20);
        let receiver = Receiver { forgetful: true, ..Receiver::default() };
        let exporter = bed.exporter("a", &receiver);
        drain(&exporter).await;
        assert_eq!(receiver.times(), vec![2; 20]);
        assert_eq!(exporter.counters.failures.load(Ordering::Relaxed), 20);
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_is_down_costs_time_and_nothing_else() {
        let mut bed = Bed::new();
        bed.end_rows(3);
        let receiver = Receiver::default();
        receiver.down.store(true, Ordering::Relaxed);
        let exporter = bed.exporter("a", &receiver);
        let counters = exporter.counters.clone();
        let task = tokio::spawn(exporter.run());
        while counters.failures.load(Ordering::Relaxed) < 9 {
            tokio::time::sleep(LOOK).await;
        }
        assert!(counters.lag_micros.load(Ordering::Relaxed) >= 4_000_000);
        assert!(receiver.times().is_empty() && counters.pending.load(Ordering::Relaxed) == 6);
        receiver.down.store(false, Ordering::Relaxed);
        while counters.lag_micros.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(LOOK).await;
        }
        assert_eq!(receiver.times(), [1, 1, 1]);
        task.abort();
    }

    #[tokio::test]
    async fn one_replica_tells_and_a_store_that_is_gone_is_waited_for() {
        let mut bed = Bed::new();
        bed.end_rows(2);
        let receiver = Receiver::default();
        let (one, two) = (bed.exporter("a", &receiver), bed.exporter("b", &receiver));
        assert_eq!(one.round(&mut None).await, Round::Told);
        bed.end_rows(1);
        assert_eq!(two.round(&mut None).await, Round::Other);
        assert_eq!(receiver.times(), [1, 1]);
        let lost = Exporter { location: "sqlite:/no/such/ledger.db".parse().unwrap(), ..one };
        assert_eq!(lost.round(&mut None).await, Round::Failed);
        assert_eq!(lost.counters.failures.load(Ordering::Relaxed), 1);
    }
}
