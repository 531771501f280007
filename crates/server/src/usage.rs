//! Reading the ledger beside those who write it.
//!
//! Owns connections that only read, how many queries run at once, and how long one may take. A query runs on a
//! thread for blocking work, never on one that serves the network.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mirai_ledger::StoreError;
use mirai_ledger::location::Location;
use mirai_ledger::store::{Interrupter, Store};
use tokio::sync::Semaphore;

use crate::error::ApiError;

/// Queries at once. More would only take the disk from those who write.
const QUERIES: usize = 2;
/// How long a query waits for its turn.
const TURN: Duration = Duration::from_secs(5);
/// How long a query may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Between interruptions of one that took longer.
const AGAIN: Duration = Duration::from_millis(20);

/// Connections to the ledger that only read.
#[derive(Clone)]
pub(crate) struct Reader(Arc<Shared>);

struct Shared {
    location: Location,
    turns: Arc<Semaphore>,
    limit: Duration,
    idle: Mutex<Vec<Box<dyn Store>>>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("location", &self.0.location).finish_non_exhaustive()
    }
}

/// How to end a query that runs, while one does.
type Running = Arc<Mutex<Option<Interrupter>>>;

impl Reader {
    pub(crate) fn new(location: Location) -> Self {
        Self::with_limit(location, LIMIT)
    }

    fn with_limit(location: Location, limit: Duration) -> Self {
        let turns = Arc::new(Semaphore::new(QUERIES));
        Self(Arc::new(Shared { location, turns, limit, idle: Mutex::default() }))
    }

    /// Runs a query.
    ///
    /// # Errors
    /// 503: too many run, it took too long, or the store failed.
    pub(crate) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let busy = || ApiError::saturated("too many usage queries run").retry_after(TURN);
        let turn = tokio::time::timeout(TURN, self.0.turns.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else { return Err(busy()) };
        let (shared, running) = (self.0.clone(), Running::default());
        let ours = running.clone();
        let mut work = tokio::task::spawn_blocking(move || {
            // Held until the query has really ended, not until nobody waits for it.
            let _turn = turn;
            shared.run(&ours, query)
        });
        let done = match tokio::time::timeout(self.0.limit, &mut work).await {
            Ok(done) => done,
            Err(_) => {
                tokio::spawn(end(running, work));
                let text = "the usage query takes too long: ask for less time or wider buckets";
                return Err(ApiError::ledger_unavailable(text).retry_after(TURN));
            }
        };
        match done {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a usage query failed");
                Err(ApiError::ledger_unavailable("the ledger cannot be read now").retry_after(TURN))
            }
            Err(_) => Err(ApiError::internal("this request failed; others are not affected")),
        }
    }
}

/// Interrupts a query until it has ended: between two statements, an interruption does nothing.
async fn end<T>(running: Running, mut work: tokio::task::JoinHandle<T>) {
    loop {
        if let Some(interrupt) = &*running.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt();
        }
        if tokio::time::timeout(AGAIN, &mut work).await.is_ok() {
            return;
        }
    }
}

impl Shared {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Box<dyn Store>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T>(
        &self,
        running: &Running,
        query: impl FnOnce(&mut dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let waiting = self.idle().pop();
        let mut store = match waiting {
            Some(store) => store,
            None => self.location.open_reading()?,
        };
        let set = |interrupter| *running.lock().unwrap_or_else(PoisonError::into_inner) = interrupter;
        set(store.interrupter());
        let result = query(&mut *store);
        // Whoever uses the connection next must not be interrupted for us.
        set(None);
        if result.is_ok() {
            self.idle().push(store);
        }
        result
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mirai_ledger::store::UsageQuery;

    use super::*;

    fn ledger() -> (tempfile::TempDir, Location) {
        let folder = tempfile::tempdir().unwrap();
        let location: Location = format!("sqlite://{}/ledger.db", folder.path().display()).parse().unwrap();
        location.open(None).unwrap().register("w", Duration::from_secs(30), true).unwrap();
        (folder, location)
    }

    #[tokio::test]
    async fn connections_are_used_again_and_broken_ones_are_not() {
        let (_folder, location) = ledger();
        let reader = Reader::new(location);
        assert!(format!("{reader:?}").contains("ledger.db"));
        for _ in 0..3 {
            assert!(reader.query(|store| store.usage(&UsageQuery::ALL)).await.unwrap().is_empty());
            assert_eq!(reader.0.idle().len(), 1);
        }
        let failed = reader.query(|_| Err::<(), _>(StoreError::Broken("canary".into()))).await.unwrap_err();
        assert_eq!((failed.status.as_u16(), failed.code), (503, "ledger_unavailable"));
        assert!(!failed.message.contains("canary"));
        assert!(reader.0.idle().is_empty());
        let none = Reader::new("sqlite:/no/such/ledger.db".parse().unwrap());
        assert_eq!(none.query(|store| store.count()).await.unwrap_err().status.as_u16(), 503);
        let panics = reader.query(|_| -> Result<(), _> { panic!("on purpose") }).await.unwrap_err();
        assert_eq!(panics.status.as_u16(), 500);
    }

    /// A query that takes too long is interrupted, and has its turn until it has ended.
    #[tokio::test]
    async fn a_long_query_is_ended() {
        let (_folder, location) = ledger();
        let reader = Reader::with_limit(location, Duration::from_millis(50));
        let (ended, end) = tokio::sync::oneshot::channel();
        let late = reader.query(move |store| {
            // The statement that is interrupted fails; those before it do not.
            let error = loop {
                if let Err(error) = store.count() {
                    break error;
                }
            };
            ended.send(error.is_unavailable()).unwrap();
            Err::<(), _>(error)
        });
        let late = late.await.unwrap_err();
        assert_eq!((late.status.as_u16(), late.message.contains("takes too long")), (503, true));
        assert!(end.await.unwrap());
        let both = reader.0.turns.acquire_many(QUERIES as u32).await.unwrap();
        assert!(reader.0.idle().is_empty());
        drop(both);
    }
}
