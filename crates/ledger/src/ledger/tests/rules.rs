//! Each promise of the handle by itself.

use super::*;
use crate::error::StoreError;
use crate::row::EnergyMethod;

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn nothing_leaves_before_the_opening_is_durable_and_no_more_than_a_window_after() {
    let mut rig = Rig::new(config(), None);
    let open = rig.open(1).unwrap();
    assert_eq!((open.permitted(), rig.row(1)), (None, None));
    rig.settle();
    assert_eq!(open.permitted(), Some(16));
    assert_eq!(rig.row(1).unwrap().state, State::Open);
    // Seven tokens are not worth a commit.
    open.checkpoint(&counts(7));
    rig.settle();
    assert_eq!((open.permitted(), rig.row(1).unwrap().completion_tokens), (Some(16), 0));
    for tokens in 8..=15 {
        open.checkpoint(&counts(tokens));
    }
    assert_eq!(open.permitted(), Some(16));
    rig.settle();
    assert_eq!((open.permitted(), rig.row(1).unwrap().completion_tokens), (Some(31), 15));
    assert_eq!(rig.shared.counters.commits.get(), 2, "eight checkpoints, one commit");
    // An earlier number takes nothing back.
    open.checkpoint(&counts(3));
    rig.settle();
    assert_eq!(open.permitted(), Some(31));
}

#[test]
fn no_window_is_so_small_that_a_stream_waits_for_ever() {
    for (window, checkpoint_every) in [(0, 8), (1, 0), (5, 100), (16, 16)] {
        let mut rig = Rig::new(LedgerConfig { window, checkpoint_every, max_batch: 0, ..config() }, None);
        let open = rig.open(1).unwrap();
        rig.settle();
        for tokens in 1..40 {
            open.checkpoint(&counts(tokens));
            rig.settle();
            assert!(open.permitted().unwrap() >= tokens, "{window}, {checkpoint_every}: {tokens}");
            assert!(rig.row(1).unwrap().completion_tokens + window >= tokens);
        }
    }
}

#[test]
fn the_end_is_durable_before_it_is_told_and_the_first_end_counts() {
    let mut rig = Rig::new(config(), None);
    let open = rig.open(1).unwrap();
    rig.settle();
    open.checkpoint(&counts(20));
    rig.settle();
    open.close(&ended(18));
    assert!(!open.is_closed());
    rig.settle();
    assert!(open.is_closed());
    open.close(&ended(5));
    open.checkpoint(&counts(99));
    rig.settle();
    let row = rig.row(1).unwrap();
    assert_eq!((row.completion_tokens, row.finish, row.status), (18, Finish::Stop, 200));
    assert_eq!(row.user_anon, UserKind::Present);
    let counters = &rig.shared.counters;
    assert_eq!((counters.opened.get(), counters.closed.get(), counters.closed_tokens.get()), (1, 1, 18));
    assert_eq!(counters.commit_buckets.iter().map(Counter::get).sum::<u64>(), counters.commits.get());
    assert_eq!(rig.shared.open.load(Ordering::Acquire), 0);
    sound(&mut rig.db.connect());
}

#[test]
fn a_client_that_was_told_of_a_failure_does_not_pay_for_a_success() {
    for when in ["before the end", "before it is written", "after it was written"] {
        let mut rig = Rig::new(config(), None);
        let open = rig.open(1).unwrap();
        rig.settle();
        if when == "before the end" {
            open.fail(503);
        }
        open.close(&ended(18));
        if when == "after it was written" {
            rig.settle();
            assert_eq!(rig.row(1).unwrap().finish, Finish::Stop);
        }
        open.fail(503);
        open.fail(200);
        rig.settle();
        let row = rig.row(1).unwrap();
        assert_eq!((row.completion_tokens, row.finish, row.status), (18, Finish::Error, 503), "{when}");
        let counters = &rig.shared.counters;
        assert_eq!((counters.closed.get(), counters.closed_tokens.get()), (1, 18), "{when}");
        assert_eq!(rig.shared.open.load(Ordering::Acquire), 0, "{when}");
        sound(&mut rig.db.connect());
    }
    // What has failed by itself stays what it is.
    let mut rig = Rig::new(config(), None);
    let open = rig.open(1).unwrap();
    open.close(&Outcome { finish: Finish::Abort, status: 499, ..ended(3) });
    open.fail(503);
    rig.settle();
    let row = rig.row(1).unwrap();
    assert_eq!((row.finish, row.status), (Finish::Abort, 499));
}

use super::super::counters::Counter;

#[test]
fn a_row_that_ends_before_its_first_commit_is_one_row() {
    let mut rig = Rig::new(config(), None);
    let open = rig.open(1).unwrap();
    open.checkpoint(&counts(50));
    open.close(&ended(50));
    rig.settle();
    assert!(open.is_closed());
    assert_eq!(sound(&mut rig.db.connect()).links, 2);
    assert_eq!(rig.shared.counters.opened.get(), 1);
}

#[test]
fn a_dropped_handle_ends_its_row_with_an_error() {
    let mut rig = Rig::new(config(), None);
    let open = rig.open(1).unwrap();
    open.checkpoint(&counts(12));
    drop(open);
    for finish in [Finish::Crashed, Finish::None, Finish::Other("long".into())] {
        let open = rig.open(2).unwrap();
        open.close(&Outcome { finish, ..ended(3) });
        assert_eq!(open.slot.take().row.finish, Finish::Error, "the word is not the owner's");
    }
    rig.settle();
    let row = rig.row(1).unwrap();
    assert_eq!(
        (row.completion_tokens, row.finish, row.energy_method),
        (12, Finish::Error, EnergyMethod::None)
    );
}

#[test]
fn too_many_or_wrong_requests_are_refused_and_leave_no_row() {
    let mut rig = Rig::new(LedgerConfig { max_open: 2, ..config() }, None);
    let opens = [rig.open(1).unwrap(), rig.open(2).unwrap()];
    assert_eq!(rig.open(3).unwrap_err(), Unavailable::Full(2));
    let wrong = Row { model: "x".repeat(300), ..crate::store::tests::request(4) };
    assert!(matches!(open_on(&rig.shared, wrong, Instant::now()), Err(Unavailable::Row(_))));
    drop(opens);
    rig.settle();
    let third = rig.open(3).unwrap();
    rig.settle();
    assert_eq!(third.permitted(), Some(16));
    assert_eq!((rig.rows().len(), rig.shared.counters.refused_full.get()), (3, 1));
}

#[test]
fn two_requests_of_one_id_are_told_apart() {
    let mut rig = Rig::new(config(), None);
    let first = rig.open(1).unwrap();
    rig.settle();
    let twin = Row { application: "other".into(), ..crate::store::tests::request(1) };
    let second = open_on(&rig.shared, twin, Instant::now()).unwrap();
    rig.settle();
    assert_eq!((second.permitted(), second.fault()), (None, Some(Unavailable::Conflict)));
    assert_eq!((first.permitted(), first.fault()), (Some(16), None));
    drop(second);
    rig.settle();
    assert_eq!(rig.shared.counters.conflicts.get(), 1);
    assert_eq!(rig.shared.open.load(Ordering::Acquire), 1);
}

#[test]
fn without_a_spool_new_work_is_refused_while_the_store_fails() {
    let mut rig = Rig::new(config(), None);
    let open = rig.open(1).unwrap();
    rig.settle();
    rig.set(DOWN);
    open.checkpoint(&counts(10));
    let late = rig.open(2).unwrap();
    rig.turn();
    assert_eq!(rig.shared.health(), Health::Retrying);
    assert_eq!(rig.open(3).unwrap_err(), Unavailable::Store);
    assert_eq!((open.permitted(), open.fault(), late.permitted()), (Some(16), None, None));
    // Not before the next attempt is due; then again and again, until those that wait are told.
    let failures = rig.shared.counters.commit_failures.get();
    assert!(rig.turn() > Duration::ZERO);
    assert_eq!(rig.shared.counters.commit_failures.get(), failures);
    rig.pass(Duration::from_secs(11));
    rig.turn();
    assert_eq!(rig.shared.health(), Health::Unavailable);
    assert_eq!((open.fault(), late.fault()), (Some(Unavailable::Store), Some(Unavailable::Store)));
    // The server gives both up; their ends are written when the store is back, once each.
    late.close(&Outcome { finish: Finish::Error, status: 503, ..ended(0) });
    open.close(&Outcome { finish: Finish::Error, ..ended(10) });
    rig.set(UP);
    rig.pass(MINUTE);
    rig.settle();
    assert_eq!(rig.shared.health(), Health::Ok);
    assert!(open.is_closed() && late.is_closed());
    assert_eq!((rig.row(1).unwrap().completion_tokens, rig.row(2).unwrap().status), (10, 503));
    assert_eq!(rig.shared.counters.refused_unavailable.get(), 1);
    assert!(rig.row(3).is_none());
    sound(&mut rig.db.connect());
}

#[test]
fn with_a_spool_work_goes_on_and_the_store_gets_everything_later() {
    let mut rig = Rig::new(config(), Some(1 << 20));
    let open = rig.open(1).unwrap();
    rig.settle();
    rig.set(DOWN);
    open.checkpoint(&counts(10));
    let late = rig.open(2).unwrap();
    rig.turn();
    assert_eq!(rig.shared.health(), Health::Spooling);
    assert_eq!((open.permitted(), late.permitted()), (Some(26), Some(16)));
    late.close(&ended(4));
    rig.pass(MINUTE);
    rig.turn();
    assert!(late.is_closed());
    let third = rig.open(3).unwrap();
    rig.turn();
    assert_eq!(third.permitted(), Some(16));
    assert!(rig.shared.spooled_bytes.load(Ordering::Acquire) > 0);
    assert_eq!(rig.row(2), None);
    rig.set(UP);
    rig.pass(MINUTE);
    rig.settle();
    assert_eq!((rig.shared.health(), rig.shared.spooled_bytes.load(Ordering::Acquire)), (Health::Ok, 0));
    assert_eq!(rig.row(1).unwrap().completion_tokens, 10);
    assert_eq!(rig.row(2).unwrap().completion_tokens, 4);
    assert_eq!(rig.row(3).unwrap().state, State::Open);
    open.close(&ended(11));
    third.close(&ended(1));
    rig.settle();
    assert_eq!(sound(&mut rig.db.connect()).rows, 3);
    let counters = &rig.shared.counters;
    assert_eq!((counters.spooled_rows.get(), counters.replayed_rows.get()), (4, 4));
}

#[test]
fn a_full_spool_keeps_room_for_ends() {
    let mut rig = Rig::new(config(), Some(10 * MAX_ROW_BYTES));
    let open = rig.open(1).unwrap();
    rig.settle();
    rig.set(DOWN);
    let mut opens = Vec::new();
    for n in 2..50 {
        let Ok(next) = rig.open(n) else { break };
        rig.turn();
        opens.push(next);
    }
    assert!(opens.len() > 3 && opens.len() < 9, "{}", opens.len());
    assert_eq!(rig.open(50).unwrap_err(), Unavailable::Store);
    // Checkpoints fill what is left, then streams wait; ends still find their room.
    for round in 1..200 {
        for open in &opens {
            open.checkpoint(&counts(round * 8));
        }
        rig.pass(Duration::from_secs(1));
        rig.turn();
    }
    assert_eq!(rig.shared.health(), Health::Unavailable);
    assert!(opens[0].fault().is_some());
    for open in &opens {
        open.close(&ended(2000));
    }
    rig.turn();
    assert!(opens.iter().all(Open::is_closed));
    rig.set(UP);
    rig.pass(MINUTE);
    rig.settle();
    open.close(&ended(1));
    rig.settle();
    assert_eq!(rig.shared.health(), Health::Ok);
    let report = sound(&mut rig.db.connect());
    assert_eq!((report.rows, report.open), (1 + opens.len() as u64, 0));
}

#[test]
fn what_a_dead_process_spooled_is_stored_by_the_next() {
    let mut rig = Rig::new(config(), Some(1 << 20));
    let opens: Vec<Open> = (1..=4).map(|n| rig.open(n).unwrap()).collect();
    rig.settle();
    rig.set(DOWN);
    opens[0].checkpoint(&counts(10));
    opens[1].close(&ended(7));
    let fresh = rig.open(5).unwrap();
    rig.turn();
    opens[2].checkpoint(&counts(30));
    rig.turn();
    assert_eq!((opens[2].permitted(), fresh.permitted()), (Some(46), Some(16)));
    // It comes back while the store is still away, and serves.
    rig.crash(DOWN);
    assert_eq!(rig.shared.health(), Health::Ok, "judged at the first turn");
    rig.turn();
    assert_eq!(rig.shared.health(), Health::Spooling);
    let after = rig.open(6).unwrap();
    rig.turn();
    assert_eq!(after.permitted(), Some(16));
    rig.set(UP);
    rig.pass(MINUTE);
    rig.settle();
    let tokens: Vec<u64> = (1..=6).map(|n| rig.row(n).unwrap().completion_tokens).collect();
    assert_eq!(tokens, [10, 7, 30, 0, 0, 0]);
    let crashed: Vec<bool> = (1..=6).map(|n| rig.row(n).unwrap().is_crashed()).collect();
    assert_eq!(crashed, [true, false, true, true, true, false]);
    assert_eq!(rig.row(6).unwrap().state, State::Open);
    sound(&mut rig.db.connect());
    // The store goes away again: what is spooled now is of the living.
    rig.set(DOWN);
    let later = rig.open(7).unwrap();
    rig.turn();
    assert_eq!(later.permitted(), Some(16));
    rig.set(UP);
    rig.pass(MINUTE);
    rig.settle();
    assert_eq!(rig.row(7).unwrap().state, State::Open);
    later.close(&ended(2));
    // Once more, and nothing changes.
    after.close(&ended(3));
    rig.settle();
    let rows = rig.rows();
    rig.crash(UP);
    rig.settle();
    assert_eq!(rig.rows(), rows);
}

#[test]
fn a_writer_that_others_gave_up_goes_on_under_a_new_number() {
    let mut rig = Rig::new(config(), None);
    let opens = [rig.open(1).unwrap(), rig.open(2).unwrap()];
    rig.settle();
    opens[0].checkpoint(&counts(10));
    rig.settle();
    let mut other = rig.db.connect();
    let by = other.register("other", MINUTE, false).unwrap();
    let owner = rig.committer.owner.clone().unwrap();
    crate::store::tests::expire(&mut other, &owner);
    assert_eq!(other.recover(&by, 10).unwrap().rows, 2);
    assert_eq!(opens[0].permitted(), Some(26));
    opens[0].checkpoint(&counts(20));
    rig.settle();
    assert_eq!(opens[0].permitted(), Some(36));
    assert_eq!(rig.row(1).unwrap().state, State::Open);
    assert!(rig.row(2).unwrap().is_crashed());
    opens[0].close(&ended(21));
    opens[1].close(&ended(2));
    rig.settle();
    assert_eq!((rig.row(1).unwrap().completion_tokens, rig.row(2).unwrap().finish), (21, Finish::Stop));
    assert_eq!(rig.shared.counters.fenced.get(), 1);
    sound(&mut rig.db.connect());
}

#[test]
fn rows_of_dead_writers_are_closed_now_and_then_and_silence_is_broken_by_heartbeats() {
    let mut rig = Rig::new(config(), None);
    rig.settle();
    let mut other = rig.db.connect();
    let dead = other.register("dead", MINUTE, false).unwrap();
    let entry = crate::store::tests::new(crate::store::tests::request(9));
    other.commit(&dead, MINUTE, &[entry]).unwrap();
    crate::store::tests::expire(&mut other, &dead);
    rig.settle();
    assert_eq!(rig.row(9).unwrap().state, State::Open, "not yet due");
    let owner = rig.committer.owner.clone().unwrap();
    crate::store::tests::expire(&mut other, &owner);
    rig.pass(Duration::from_secs(11));
    rig.settle();
    assert!(rig.row(9).unwrap().is_crashed());
    assert_eq!(rig.shared.counters.recovered_rows.get(), 1);
    // The heartbeat came first: its own lease holds again.
    assert_eq!(other.recover(&dead, 10).unwrap().rows, 0);
    // Faults in either are faults of the store.
    for after in 0..5 {
        rig.set(Plan { after: Some(after), ..UP });
        rig.pass(MINUTE);
        rig.settle();
        assert_ne!(rig.shared.health(), Health::Ok, "call {after}");
        rig.set(UP);
        rig.pass(MINUTE);
        rig.settle();
        assert_eq!(rig.shared.health(), Health::Ok);
    }
}

/// A store that is broken, or whatever else it is told.
struct Fails(StoreError);

macro_rules! fails {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $out:ty;)*) => {
        impl Store for Fails {
            $(fn $name(&mut self, $($arg: $ty),*) -> Result<$out, StoreError> {
                $(let _ = $arg;)*
                Err(self.0.clone())
            })*
            fn end_audit(&mut self) {}
        }
    };
}

use crate::chain::Epoch;
use crate::store::{
    AuditLink, ChainHead, Committed, Entry, PurgeRecord, Purged, Recovered, UsageQuery, UsageRow,
};

fails! {
    register(a: &str, b: Duration, c: bool) -> Epoch;
    commit(a: &Epoch, b: Duration, c: &[Entry]) -> Committed;
    recover(a: &Epoch, b: usize) -> Recovered;
    release(a: &Epoch) -> ();
    usage(a: &UsageQuery) -> Vec<UsageRow>;
    row(a: &str) -> Option<Row>;
    rows(a: &str, b: usize) -> Vec<Row>;
    anonymize(a: i64, b: usize) -> u64;
    purge(a: i64, b: usize) -> Purged;
    begin_audit() -> ();
    chains() -> Vec<ChainHead>;
    purges() -> Vec<PurgeRecord>;
    links(a: &Epoch, b: u64, c: usize) -> Vec<AuditLink>;
    schema() -> u32;
    count() -> u64;
}

#[test]
fn a_broken_store_ends_everything_and_is_not_asked_again() {
    let mut rig = Rig::new(config(), Some(1 << 20));
    let open = rig.open(1).unwrap();
    rig.settle();
    rig.committer.store = Box::new(Fails(StoreError::Broken("no sync".into())));
    open.checkpoint(&counts(10));
    rig.turn();
    assert_eq!(rig.shared.health(), Health::Broken);
    assert_eq!((open.fault(), open.permitted()), (Some(Unavailable::Store), Some(16)));
    assert_eq!(rig.open(2).unwrap_err(), Unavailable::Store);
    assert!(rig.committer.spool.as_ref().unwrap().is_empty());
    rig.turn();
    assert_eq!(rig.shared.counters.commit_failures.get(), 1);
}

#[test]
fn a_start_needs_a_store_or_a_spool() {
    let away = || Box::new(Fails(StoreError::Unavailable("away".into())));
    let start = |store, spool| Ledger::start(store, spool, config());
    assert!(matches!(start(away(), None), Err(StartError::Store(StoreError::Unavailable(_)))));
    let folder = tempfile::tempdir().unwrap();
    let spool = || Some(Spool::open(&folder.path().join("spool"), 1 << 20).unwrap());
    let ledger = start(away(), spool()).unwrap();
    let open = ledger.open(crate::store::tests::request(1), Instant::now()).unwrap();
    open.close(&ended(2));
    ledger.stop();
    assert!(open.is_closed());
    assert!(!spool().unwrap().is_empty());
    let broken = Box::new(Fails(StoreError::Broken("broken".into())));
    assert!(matches!(start(broken, spool()), Err(StartError::Store(StoreError::Broken(_)))));
}

#[test]
fn a_writer_that_is_given_up_without_end_is_unavailable() {
    let mut rig = Rig::new(config(), None);
    let owner = rig.committer.owner.clone().unwrap();
    rig.committer.store = Box::new(Fails(StoreError::Fenced(owner.clone())));
    rig.committer.owner = Some(owner);
    let open = rig.open(1).unwrap();
    rig.turn();
    // Registering fails in the same way here, which is no way for a store to fail.
    assert_eq!(rig.shared.health(), Health::Broken);
    assert_eq!(open.permitted(), None);
}
