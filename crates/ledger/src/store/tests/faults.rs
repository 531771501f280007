//! A database that fails when it is told to: each call in turn, before or after it took effect.

use std::sync::{Arc, Mutex};

use super::*;
use crate::error::StoreError;
use crate::store::sql::Sql;
use crate::value::Value;

/// What fails next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Calls until the fault; `None` for never.
    pub(crate) after: Option<u32>,
    /// The call takes effect, and its answer is lost: the worst of commits.
    pub(crate) took_effect: bool,
    /// Every later call fails too.
    pub(crate) for_good: bool,
    /// Calls that were made.
    pub(crate) calls: u32,
}

/// A driver with faults.
pub(crate) struct Faulty<C> {
    pub(crate) inner: C,
    pub(crate) plan: Arc<Mutex<Plan>>,
}

impl<C: Sql> Faulty<C> {
    fn call<T>(&mut self, run: impl FnOnce(&mut C) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut plan = self.plan.lock().unwrap();
        plan.calls += 1;
        let fails = plan.after == Some(0);
        plan.after = match plan.after {
            Some(0) if plan.for_good => Some(0),
            other => other.and_then(|n| n.checked_sub(1)),
        };
        if fails && !plan.took_effect {
            return Err(StoreError::Unavailable("told to fail".into()));
        }
        let value = run(&mut self.inner)?;
        if fails { Err(StoreError::Unavailable("told to fail afterwards".into())) } else { Ok(value) }
    }
}

impl<C: Sql> Sql for Faulty<C> {
    const FOR_UPDATE: &'static str = C::FOR_UPDATE;
    fn begin(&mut self, write: bool) -> Result<(), StoreError> {
        self.call(|inner| inner.begin(write))
    }
    fn commit(&mut self) -> Result<(), StoreError> {
        self.call(Sql::commit)
    }
    fn rollback(&mut self) {
        self.inner.rollback();
    }
    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError> {
        self.call(|inner| inner.execute(sql, params))
    }
    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Vec<Value>>, StoreError> {
        self.call(|inner| inner.query(sql, params))
    }
    fn now(&mut self) -> Result<i64, StoreError> {
        self.inner.now()
    }
}

pub(crate) fn faulty<D: Database>(db: &D) -> (SqlStore<Faulty<D::Driver>>, Arc<Mutex<Plan>>) {
    let plan: Arc<Mutex<Plan>> = Arc::default();
    (db.connect().map(|sql| Faulty { inner: sql, plan: plan.clone() }), plan)
}

/// A short history in which every operation of the store has a part.
fn history<C: Sql>(
    store: &mut SqlStore<C>,
    mut retry: impl FnMut(&mut dyn FnMut() -> Result<(), StoreError>),
) -> Vec<Row> {
    let mut run = |what: &mut dyn FnMut(&mut SqlStore<C>) -> Result<(), StoreError>| {
        retry(&mut || what(store));
    };
    let (mut dead, mut me) = (None, None);
    run(&mut |s| s.register("dead", LEASE, false).map(|e| dead = Some(e)));
    let dead = dead.unwrap();
    let rows: Vec<Row> = (0..4).map(request).collect();
    let open: Vec<Entry> = rows[..3].iter().cloned().map(new).collect();
    run(&mut |s| s.commit(&dead, LEASE, &open).map(|_| ()));
    run(&mut |s| s.commit(&dead, LEASE, &[old(tokens(&rows[0], 7)), old(closed(&rows[1], 9))]).map(|_| ()));
    run(&mut |s| s.release(&dead).or_else(|e| if e.is_unavailable() { Err(e) } else { Ok(()) }));
    run(&mut |s| s.register("me", LEASE, false).map(|e| me = Some(e)));
    let me = me.unwrap();
    run(&mut |s| {
        while s.recover(&me, 1)?.more {}
        Ok(())
    });
    run(&mut |s| s.commit(&me, LEASE, &[old(closed(&rows[2], 3)), new(closed(&rows[3], 4))]).map(|_| ()));
    run(&mut |s| s.anonymize(1003, 100).map(|_| ()));
    run(&mut |s| s.purge(1001, 100).map(|_| ()));
    let mut all = Vec::new();
    run(&mut |s| s.rows("", 100).map(|rows| all = rows));
    all
}

fn the_end_is_the_same<D: Database>(make: impl Fn() -> D) {
    let (mut calm, plan) = faulty(&make());
    let expected: Vec<Row> =
        history(&mut calm, |run| run().unwrap()).into_iter().map(|row| Row { epoch: 0, ..row }).collect();
    let calls = plan.lock().unwrap().calls;
    assert!(calls > 60, "{calls}");
    for after in 0..calls {
        for took_effect in [false, true] {
            let db = make();
            let (mut store, plan) = faulty(&db);
            *plan.lock().unwrap() = Plan { after: Some(after), took_effect, ..Plan::default() };
            let mut failures = 0;
            let end = history(&mut store, |run| {
                while let Err(error) = run() {
                    assert!(error.is_unavailable(), "{error}");
                    failures += 1;
                    assert!(failures < 3);
                }
            });
            assert_eq!(failures, 1, "call {after}");
            let end: Vec<Row> = end.into_iter().map(|row| Row { epoch: 0, ..row }).collect();
            assert_eq!(end, expected, "call {after}, {took_effect}");
            sound(&mut db.connect());
        }
    }
}

#[test]
fn a_fault_at_every_call_loses_nothing_and_doubles_nothing() {
    the_end_is_the_same(SqliteFile::new);
}
