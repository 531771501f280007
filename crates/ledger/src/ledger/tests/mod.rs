//! The ledger turned by hand: one turn at a time, with a clock and faults of the test's own.

mod history;
mod kill;
mod rules;
mod threads;

use std::collections::HashMap;
use std::path::PathBuf;

use super::*;
use crate::spool::Spool;
use crate::store::Store;
use crate::store::sqlite::Sqlite;
use crate::store::tests::faults::{Faulty, Plan, faulty};
use crate::store::tests::{Database, SqliteFile, sound};

/// A ledger without its thread.
pub(super) struct Rig {
    pub(super) db: SqliteFile,
    pub(super) plan: Arc<Mutex<Plan>>,
    pub(super) committer: Committer,
    pub(super) shared: Arc<Shared>,
    pub(super) now: Instant,
    pub(super) spool: Option<u64>,
    config: LedgerConfig,
}

pub(super) fn config() -> LedgerConfig {
    LedgerConfig { writer: "w".into(), takeover: true, max_open: 100, ..LedgerConfig::default() }
}

fn spool_path(db: &SqliteFile) -> PathBuf {
    db.folder.path().join("spool")
}

type Parts = (Committer, Arc<Shared>, Arc<Mutex<Plan>>);

fn parts(db: &SqliteFile, config: &LedgerConfig, spool: Option<u64>, now: Instant, plan: Plan) -> Parts {
    let (store, shared_plan) = faulty(db);
    *shared_plan.lock().unwrap() = plan;
    let store: SqlStore<Faulty<Sqlite>> = store;
    let spool = spool.map(|limit| Spool::open(&spool_path(db), limit).unwrap());
    let shared = shared(config.clone(), spool.as_ref());
    (Committer::new(Box::new(store), spool, shared.clone(), now), shared, shared_plan)
}

use crate::store::SqlStore;

/// Every call fails from now on.
pub(super) const DOWN: Plan = Plan { after: Some(0), took_effect: false, calls: 0, for_good: true };
pub(super) const UP: Plan = Plan { after: None, took_effect: false, calls: 0, for_good: false };

impl Rig {
    pub(super) fn new(config: LedgerConfig, spool: Option<u64>) -> Self {
        let (db, now) = (SqliteFile::new(), Instant::now());
        let (mut committer, shared, plan) = parts(&db, &config, spool, now, UP);
        committer.first().unwrap();
        Self { db, plan, committer, shared, now, spool, config }
    }

    pub(super) fn turn(&mut self) -> Duration {
        self.committer.turn(self.now)
    }

    /// Turns until there is nothing to do.
    pub(super) fn settle(&mut self) {
        for _ in 0..1000 {
            if self.turn() > Duration::ZERO {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    pub(super) fn set(&self, plan: Plan) {
        *self.plan.lock().unwrap() = plan;
    }

    pub(super) fn open(&self, n: u64) -> Result<Open, Unavailable> {
        open_on(&self.shared, crate::store::tests::request(n), Instant::now())
    }

    /// The process dies and is started again.
    pub(super) fn crash(&mut self, plan: Plan) {
        let (committer, shared, plan) = {
            // The old one's locks go first.
            let idle = idle_committer(&self.config, self.now);
            drop(std::mem::replace(&mut self.committer, idle));
            parts(&self.db, &self.config, self.spool, self.now, plan)
        };
        (self.committer, self.shared, self.plan) = (committer, shared, plan);
        self.committer.first().unwrap();
    }

    pub(super) fn row(&self, n: u64) -> Option<Row> {
        self.db.connect().row(&format!("R{n:06}")).unwrap()
    }

    pub(super) fn rows(&self) -> HashMap<String, Row> {
        let rows = self.db.connect().rows("", 100_000).unwrap();
        rows.into_iter().map(|row| (row.id.clone(), row)).collect()
    }
}

fn idle_committer(config: &LedgerConfig, now: Instant) -> Committer {
    let (store, _) = faulty(&SqliteFile::new());
    Committer::new(Box::new(store), None, shared(config.clone(), None), now)
}

pub(super) fn counts(completion_tokens: u64) -> Counts {
    Counts { completion_tokens, ..Counts::default() }
}

pub(super) fn ended(completion_tokens: u64) -> Outcome {
    Outcome {
        counts: counts(completion_tokens),
        finish: Finish::Stop,
        status: 200,
        energy_method: crate::row::EnergyMethod::None,
    }
}
