//! Replicas turned by hand, on clocks and with faults of the test's own.

mod history;
#[cfg(feature = "postgres")]
mod pg;
mod rules;
mod sweeping;
mod threads;

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::calendar::Calendar;
use super::local::Verdict;
use super::shared::{Shared, Step};
use super::thread::Syncer;
use super::*;
use crate::identity::Quota;
use crate::store::sql::take;
use crate::store::tests::faults::{Faulty, Plan};
use crate::store::tests::{Database, SqliteFile};
use crate::value::Value;

/// Tuesday, 2026-11-24, 12:00 in Paris.
const NOON: &str = "2026-11-24T11:00:00Z";

fn micros(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().unwrap().as_microsecond()
}

/// A driver on a clock that the test sets.
struct Clocked<C> {
    inner: C,
    now: Arc<AtomicI64>,
}

impl<C: Sql> Sql for Clocked<C> {
    const FOR_UPDATE: &'static str = C::FOR_UPDATE;
    fn begin(&mut self, write: bool) -> Result<(), StoreError> {
        self.inner.begin(write)
    }
    fn commit(&mut self) -> Result<(), StoreError> {
        self.inner.commit()
    }
    fn rollback(&mut self) {
        self.inner.rollback();
    }
    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError> {
        self.inner.execute(sql, params)
    }
    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Vec<Value>>, StoreError> {
        self.inner.query(sql, params)
    }
    fn now(&mut self) -> Result<i64, StoreError> {
        Ok(self.now.load(Ordering::SeqCst))
    }
}

#[derive(Default)]
struct TestClock {
    /// Microseconds.
    monotonic: AtomicU64,
    wall: AtomicI64,
    /// Microseconds that pass whenever somebody looks.
    tick: AtomicU64,
}

impl Clock for TestClock {
    fn monotonic(&self) -> Duration {
        let tick = self.tick.load(Ordering::SeqCst);
        Duration::from_micros(self.monotonic.fetch_add(tick, Ordering::SeqCst))
    }
    fn wall(&self) -> i64 {
        self.wall.load(Ordering::SeqCst)
    }
}

/// A replica without its thread.
struct Replica {
    syncer: Syncer,
    shared: Arc<Shared>,
    plan: Arc<Mutex<Plan>>,
}

const UP: Plan = Plan { after: None, took_effect: false, calls: 0, for_good: false };
const DOWN: Plan = Plan { after: Some(0), took_effect: false, calls: 0, for_good: true };

/// Replicas on one database.
struct World<D> {
    db: D,
    /// The store's clock.
    now: Arc<AtomicI64>,
    /// The replicas'.
    clock: Arc<TestClock>,
    config: QuotaConfig,
    replicas: Vec<Replica>,
}

fn config() -> QuotaConfig {
    QuotaConfig { writer: "w".into(), ..QuotaConfig::default() }
}

/// An application and what it may use.
#[derive(Clone)]
struct App {
    name: Arc<str>,
    quota: Quota,
}

fn application(name: &str, quota: &str) -> App {
    App { name: name.into(), quota: toml::from_str(quota).unwrap() }
}

fn demand(prompt_tokens: u64, max_output_tokens: u64) -> Demand {
    Demand { prompt_tokens, max_output_tokens, choices: 1 }
}

/// As the server would call it.
fn standing(shared: &Shared, app: &App) -> Standing {
    shared.standing(&app.name, &app.quota)
}

impl<D: Database> World<D>
where
    D::Driver: 'static,
{
    fn new(db: D, replicas: usize, config: QuotaConfig) -> Self {
        let now = Arc::new(AtomicI64::new(micros(NOON)));
        let clock = Arc::new(TestClock::default());
        clock.wall.store(micros(NOON), Ordering::SeqCst);
        let mut world = Self { db, now, clock, config, replicas: Vec::new() };
        world.replicas = (0..replicas).map(|_| world.replica()).collect();
        world
    }

    fn replica(&self) -> Replica {
        let plan: Arc<Mutex<Plan>> = Arc::default();
        let now = self.now.clone();
        let store = self.db.connect().map(|sql| Clocked { inner: sql, now });
        let store = store.map(|inner| Faulty { inner, plan: plan.clone() });
        let calendar = Calendar::new(&self.config.zone).unwrap();
        let shared = Arc::new(Shared::new(self.config.clone(), calendar, self.clock.clone()));
        let mut syncer = Syncer::new(Box::new(store), shared.clone());
        syncer.first().unwrap();
        Replica { syncer, shared, plan }
    }

    fn pass(&self, time: Duration) {
        let micros = time.as_micros() as i64;
        self.clock.monotonic.fetch_add(micros as u64, Ordering::SeqCst);
        self.clock.wall.fetch_add(micros, Ordering::SeqCst);
        self.now.fetch_add(micros, Ordering::SeqCst);
    }

    fn seconds(&self, seconds: u64) {
        self.pass(Duration::from_secs(seconds));
    }

    /// Lets a replica come to rest: it says all, and holds nothing that is idle.
    fn rest(&mut self, replica: usize) {
        for _ in 0..3 {
            self.seconds(2);
            self.turn(replica);
        }
    }

    fn turn(&mut self, replica: usize) -> Duration {
        let now = self.clock.monotonic();
        self.replicas[replica].syncer.turn(now)
    }

    /// As the asynchronous call does, with turns where it would wait.
    fn reserve(&mut self, replica: usize, app: &App, demand: Demand) -> Result<Reservation, Refusal> {
        let shared = self.replicas[replica].shared.clone();
        let done = match shared.begin(&app.name, &app.quota, &demand) {
            Step::Done(done) => done,
            Step::Wait(mut waits) => {
                let mut turns = 0;
                loop {
                    self.turn(replica);
                    turns += 1;
                    assert!(turns < 5, "nobody answers");
                    match waits.try_recv() {
                        Ok(Verdict::Go(unclaimed)) => break Ok(unclaimed.claim().unwrap()),
                        Ok(Verdict::No(refusal)) => break Err(refusal),
                        Ok(Verdict::Lost) => break shared.without_store(&app.name, &app.quota, &demand),
                        Err(_) => {}
                    }
                }
            }
        };
        shared.counted(done)
    }

    fn set(&self, replica: usize, plan: Plan) {
        *self.replicas[replica].plan.lock().unwrap() = plan;
    }

    /// What the store holds: spent and leased.
    fn stored(&self, application: &str, kind: Kind) -> (u64, u64) {
        let mut store = self.db.connect();
        let sums = "SELECT CAST(COALESCE(SUM(used), 0) AS BIGINT), CAST(COALESCE(SUM(leased), 0) AS BIGINT) \
                    FROM mirai_quota WHERE application = $1 AND kind = $2";
        let params = [Value::Text(application.into()), Value::Text(kind.word().into())];
        let mut values = store.driver().query(sums, &params).unwrap().into_iter().flatten();
        (take(&mut values, "used").unwrap(), take(&mut values, "leased").unwrap())
    }

    fn holders(&self) -> u64 {
        let mut store = self.db.connect();
        let rows = store.driver().query("SELECT COUNT(*) FROM mirai_quota_holder", &[]).unwrap();
        take(&mut rows.into_iter().flatten(), "count").unwrap()
    }
}
