//! Random histories of several writers against a naive model.
//!
//! What the store owes of the ledger's invariants: one row a request (I1), the owner's word kept to the token
//! (I2), nothing below the last durable checkpoint after a crash (I4), sums that agree (I6), recovery that
//! changes nothing the second time (I8); and chains that verify throughout.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::faults::{Faulty, Plan, faulty};
use super::*;
use crate::error::StoreError;
use crate::store::{Recovered, UsageQuery};

/// One step. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Op {
    Open {
        writer: usize,
        tokens: u64,
    },
    Checkpoint {
        row: usize,
        by: usize,
        more: u64,
    },
    Close {
        row: usize,
        by: usize,
        tokens: u64,
    },
    OpenClose {
        writer: usize,
        tokens: u64,
    },
    /// A dead process's spool speaks of a row.
    Replay {
        row: usize,
        by: usize,
        tokens: u64,
    },
    Expire {
        writer: usize,
    },
    Recover {
        by: usize,
        limit: usize,
    },
    Restart {
        writer: usize,
        takeover: bool,
    },
    Release {
        writer: usize,
    },
    Anonymize {
        before: i64,
    },
    Purge {
        before: i64,
        limit: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..1000usize;
    prop_oneof![
        4 => (n.clone(), 0..20u64).prop_map(|(writer, tokens)| Op::Open { writer, tokens }),
        6 => (n.clone(), n.clone(), 0..20u64).prop_map(|(row, by, more)| Op::Checkpoint { row, by, more }),
        4 => (n.clone(), n.clone(), 0..60u64).prop_map(|(row, by, tokens)| Op::Close { row, by, tokens }),
        1 => (n.clone(), 0..20u64).prop_map(|(writer, tokens)| Op::OpenClose { writer, tokens }),
        2 => (n.clone(), n.clone(), 0..60u64).prop_map(|(row, by, tokens)| Op::Replay { row, by, tokens }),
        2 => n.clone().prop_map(|writer| Op::Expire { writer }),
        3 => (n.clone(), 1..4usize).prop_map(|(by, limit)| Op::Recover { by, limit }),
        2 => (n.clone(), any::<bool>()).prop_map(|(writer, takeover)| Op::Restart { writer, takeover }),
        1 => n.prop_map(|writer| Op::Release { writer }),
        1 => (990..1040i64).prop_map(|before| Op::Anonymize { before }),
        1 => (990..1040i64, 1..20usize).prop_map(|(before, limit)| Op::Purge { before, limit }),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Live,
    Expired,
    Recovering,
    Ended,
}

#[derive(Clone, Debug)]
struct Known {
    row: Row,
    owner: Epoch,
    gone: bool,
}

const WRITERS: [&str; 3] = ["a", "b", "c"];

/// The naive model and the store under test.
struct World<D: Database> {
    db: D,
    store: SqlStore<Faulty<D::Driver>>,
    plan: Arc<Mutex<Plan>>,
    runs: BTreeMap<(String, u64), Run>,
    /// The newest run of each writer.
    current: Vec<Epoch>,
    rows: BTreeMap<String, Known>,
    next: u64,
}

impl<D: Database> World<D> {
    fn new(db: D) -> Self {
        let (store, plan) = faulty(&db);
        let mut world = Self {
            db,
            store,
            plan,
            runs: BTreeMap::new(),
            current: Vec::new(),
            rows: BTreeMap::new(),
            next: 0,
        };
        world.current = WRITERS.map(|writer| Epoch { writer: writer.into(), epoch: 0 }).to_vec();
        (0..WRITERS.len()).for_each(|writer| world.restart(writer, false));
        world
    }

    fn state(&mut self, run: &Epoch) -> &mut Run {
        self.runs.get_mut(&(run.writer.clone(), run.epoch)).unwrap()
    }

    /// As the ledger does: until the store answers.
    fn retry<T>(
        &mut self,
        what: impl Fn(&mut SqlStore<Faulty<D::Driver>>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            match what(&mut self.store) {
                Err(error) if error.is_unavailable() => {}
                other => return other,
            }
        }
    }

    fn restart(&mut self, writer: usize, takeover: bool) {
        // A registration whose answer is lost leaves a run without rows; another takes its place.
        let saved = std::mem::take(&mut *self.plan.lock().unwrap());
        let epoch = self.retry(|store| store.register(WRITERS[writer], LEASE, takeover)).unwrap();
        *self.plan.lock().unwrap() = saved;
        assert_eq!(epoch.epoch, self.current[writer].epoch + 1);
        if takeover {
            for ((name, _), run) in &mut self.runs {
                if name == WRITERS[writer] && *run == Run::Live {
                    *run = Run::Expired;
                }
            }
        }
        self.runs.insert((epoch.writer.clone(), epoch.epoch), Run::Live);
        self.current[writer] = epoch;
    }

    /// Commits one row by a writer's newest run, and tells what the model expects.
    fn commit(&mut self, writer: usize, mut row: Row, stored: bool) {
        let owner = self.current[writer].clone();
        let entry = Entry { row: row.clone(), stored };
        let done = self.retry(|store| store.commit(&owner, LEASE, std::slice::from_ref(&entry)));
        match *self.state(&owner) {
            Run::Recovering | Run::Ended => {
                assert_eq!(done, Err(StoreError::Fenced(owner)));
                return;
            }
            // The commit has extended it.
            Run::Live | Run::Expired => *self.state(&owner) = Run::Live,
        }
        done.unwrap();
        let Some(known) = self.rows.get_mut(&row.id).filter(|known| !known.gone) else {
            self.rows.insert(row.id.clone(), Known { row, owner, gone: false });
            return;
        };
        let before = &known.row;
        if before.state == State::Closed && before.finish != Finish::Crashed {
            return;
        }
        if row.state == State::Open || row.finish == Finish::Crashed {
            row.completion_tokens = row.completion_tokens.max(before.completion_tokens);
            row.duration = row.duration.max(before.duration);
        }
        let again =
            before.is_crashed() && row.is_crashed() && row.completion_tokens == before.completion_tokens;
        row.user.clone_from(&before.user);
        row.user_salt = before.user_salt;
        if !again {
            known.owner = owner;
        }
        known.row = row;
    }

    fn pick(&self, row: usize) -> Option<Row> {
        let ids: Vec<&Known> = self.rows.values().filter(|known| !known.gone).collect();
        (!ids.is_empty()).then(|| ids[row % ids.len()].row.clone())
    }

    fn fresh(&mut self) -> Row {
        self.next += 1;
        request(self.next)
    }

    fn apply(&mut self, op: &Op) {
        let w = |writer: usize| writer % WRITERS.len();
        match *op {
            Op::Open { writer, tokens: n } => {
                let row = self.fresh();
                self.commit(w(writer), tokens(&row, n), false);
            }
            Op::OpenClose { writer, tokens: n } => {
                let row = self.fresh();
                self.commit(w(writer), closed(&row, n), false);
            }
            Op::Checkpoint { row, by, more } => {
                if let Some(row) = self.pick(row) {
                    let open = Row { state: State::Open, finish: Finish::None, ..row.clone() };
                    self.commit(w(by), tokens(&open, row.completion_tokens + more), by % 2 == 0);
                }
            }
            Op::Close { row, by, tokens } => {
                if let Some(row) = self.pick(row) {
                    self.commit(w(by), closed(&row, tokens), by % 2 == 0);
                }
            }
            Op::Replay { row, by, tokens: n } => {
                if let Some(row) = self.pick(row) {
                    let crashed = Row { state: State::Closed, finish: Finish::Crashed, ..row };
                    self.commit(w(by), tokens(&crashed, n), false);
                }
            }
            Op::Expire { writer } => {
                let run = self.current[w(writer)].clone();
                expire(&mut self.db.connect(), &run);
                let state = self.state(&run);
                if *state == Run::Live {
                    *state = Run::Expired;
                }
            }
            Op::Recover { by, limit } => self.recover(w(by), limit),
            Op::Restart { writer, takeover } => self.restart(w(writer), takeover),
            Op::Release { writer } => self.release(w(writer)),
            Op::Anonymize { before } => {
                while self.retry(|store| store.anonymize(before, 3)).unwrap() > 0 {}
                for known in self.rows.values_mut() {
                    let ended = known.row.queued_at + known.row.duration as i64;
                    if known.row.state == State::Closed && ended < before {
                        (known.row.user, known.row.user_salt) = (None, None);
                    }
                }
            }
            Op::Purge { before, limit } => self.purge(before, limit),
        }
    }

    fn recover(&mut self, writer: usize, limit: usize) {
        let by = self.current[writer].clone();
        // A fault after the commit hides what was done: the round is compared through the rows.
        let saved = std::mem::take(&mut *self.plan.lock().unwrap());
        let done = self.store.recover(&by, limit).unwrap();
        *self.plan.lock().unwrap() = saved;
        let due = |(key, run): (&(String, u64), &Run)| {
            (matches!(run, Run::Expired | Run::Recovering) && *key != (by.writer.clone(), by.epoch))
                .then(|| key.clone())
        };
        let Some(key) = self.runs.iter().find_map(due) else {
            assert_eq!(done, Recovered::default());
            return;
        };
        let victim = Epoch { writer: key.0.clone(), epoch: key.1 };
        let mut rows = 0;
        for known in self.rows.values_mut() {
            let open = !known.gone && known.owner == victim && known.row.state == State::Open;
            if open && rows < limit {
                rows += 1;
                known.row.state = State::Closed;
                known.row.finish = Finish::Crashed;
            }
        }
        let over = rows < limit;
        self.runs.insert(key, if over { Run::Ended } else { Run::Recovering });
        assert_eq!(done, Recovered { rows: rows as u64, epochs: u64::from(over), more: true });
    }

    fn release(&mut self, writer: usize) {
        let owner = self.current[writer].clone();
        let saved = std::mem::take(&mut *self.plan.lock().unwrap());
        let done = self.store.release(&owner);
        *self.plan.lock().unwrap() = saved;
        let open = self.rows.values().any(|k| !k.gone && k.owner == owner && k.row.state == State::Open);
        let state = self.state(&owner);
        if matches!(*state, Run::Recovering | Run::Ended) {
            assert_eq!(done, Err(StoreError::Fenced(owner)));
            return;
        }
        done.unwrap();
        *state = if open { Run::Recovering } else { Run::Ended };
    }

    fn purge(&mut self, before: i64, limit: usize) {
        self.retry(|store| store.purge(before, limit)).unwrap();
        let left: Vec<String> = self.store_rows().into_iter().map(|row| row.id).collect();
        for (id, known) in &mut self.rows {
            let ended = known.row.queued_at + known.row.duration as i64;
            if !left.contains(id) && !known.gone {
                assert!(known.row.state == State::Closed && ended < before, "{id} went too early");
                known.gone = true;
            }
        }
    }

    fn store_rows(&mut self) -> Vec<Row> {
        self.db.connect().rows("", 10_000).unwrap()
    }

    fn check(&mut self) {
        let expected: Vec<Row> = self
            .rows
            .values()
            .filter(|known| !known.gone)
            .map(|known| Row {
                writer: known.owner.writer.clone(),
                epoch: known.owner.epoch,
                ..known.row.clone()
            })
            .collect();
        assert_eq!(self.store_rows(), expected);
        let mut store = self.db.connect();
        let report = sound(&mut store);
        assert_eq!(report.rows, expected.len() as u64);
        let sums = store.usage(&UsageQuery::ALL).unwrap();
        let sum = |of: fn(&Row) -> u64| expected.iter().map(of).sum::<u64>();
        assert_eq!(sums.iter().map(|s| s.requests).sum::<u64>(), expected.len() as u64);
        assert_eq!(sums.iter().map(|s| s.completion_tokens).sum::<u64>(), sum(|row| row.completion_tokens));
        assert_eq!(sums.iter().map(|s| s.open).sum::<u64>(), report.open);
    }
}

pub(crate) fn runner(cases: u32) -> TestRunner {
    let seed: u64 =
        std::env::var("LEDGER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("LEDGER_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, rng)
}

pub(super) fn agrees_with_the_model<D: Database>(cases: u32, make: impl Fn() -> D) {
    let faults = proptest::collection::vec((0..60u32, any::<bool>()), 0..4);
    let history = (proptest::collection::vec(op(), 1..40), faults);
    let result = runner(cases).run(&history, |(ops, faults)| {
        let mut world = World::new(make());
        for (index, op) in ops.iter().enumerate() {
            if let Some(&(after, took_effect)) = faults.get(index / 10).filter(|_| index % 10 == 0) {
                *world.plan.lock().unwrap() = Plan { after: Some(after), took_effect, ..Plan::default() };
            }
            world.apply(op);
            world.check();
        }
        Ok(())
    });
    result.unwrap();
}

#[test]
fn random_histories_agree_with_the_model() {
    agrees_with_the_model(if cfg!(coverage) { 20 } else { 48 }, SqliteFile::new);
}
