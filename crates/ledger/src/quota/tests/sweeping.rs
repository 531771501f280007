//! Replicas that die, and one that only seemed to.

use super::*;
use crate::row::{Finish, Row, State};
use crate::store::{Entry, Store};

const LEASE: Duration = Duration::from_secs(3600);

fn expired<D: Database>(world: &mut World<D>, by: usize)
where
    D::Driver: 'static,
{
    for _ in 0..5 {
        world.seconds(9);
        world.turn(by);
    }
}

#[test]
fn a_dead_replica_frees_its_places_and_its_tokens_count_as_spent() {
    let mut world = World::new(SqliteFile::new(), 2, config());
    let app = application("a", "tokens_per_day = 1000\nconcurrent_requests = 1");
    let held = world.reserve(0, &app, demand(0, 600)).unwrap();
    // Killed: nobody says anything any more.
    world.set(0, DOWN);
    world.reserve(1, &app, demand(0, 100)).unwrap_err();
    expired(&mut world, 1);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (600, 0));
    assert_eq!(world.stored("a", Kind::ConcurrentRequests), (0, 0));
    assert_eq!(world.holders(), 1);
    assert_eq!(world.replicas[1].shared.counters.swept_spent_tokens.get(), 600);
    world.reserve(1, &app, demand(0, 401)).unwrap_err();
    world.reserve(1, &app, demand(0, 400)).unwrap().cancel();
    world.rest(1);
    // It was only paused: what it still runs counts once more, and never less than once.
    world.set(0, UP);
    world.seconds(1);
    world.turn(0);
    world.turn(0);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (600, 600));
    assert_eq!(world.stored("a", Kind::ConcurrentRequests), (0, 1));
    assert_eq!(world.replicas[0].shared.counters.given_up.get(), 1);
    held.settle(250);
    world.rest(0);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (850, 0));
}

fn row(world: &World<SqliteFile>, id: &str, tokens: (u64, u64)) -> Row {
    Row {
        id: id.into(),
        queued_at: world.clock.wall(),
        application: "a".into(),
        prompt_tokens: tokens.0,
        completion_tokens: tokens.1,
        status: 200,
        ..Row::default()
    }
}

/// Rows of the dead replica say what it used: to the token where its end was seen, and at its last checkpoint
/// where it was not. The rest of its leases comes back.
#[test]
fn rows_tell_what_a_dead_replica_used() {
    let config = QuotaConfig { rows_tell: true, ..config() };
    let mut world = World::new(SqliteFile::new(), 2, config);
    let app = application("a", "tokens_per_day = 100000\ntokens_per_month = 1000000");
    let mut ledger = world.db.connect();
    let writer = ledger.register("w", LEASE, false).unwrap();
    let entry = |row| Entry { row, stored: false };
    // One that ended and was reported long before.
    let early = world.reserve(0, &app, demand(100, 900)).unwrap();
    let ended =
        Row { state: State::Closed, finish: Finish::Stop, duration: 1, ..row(&world, "R0", (100, 300)) };
    ledger.commit(&writer, LEASE, &[entry(ended)]).unwrap();
    early.settle(400);
    for _ in 0..10 {
        world.seconds(9);
        world.turn(0);
        world.turn(1);
    }
    // Two run when it dies; one of another application does not count.
    let held =
        [world.reserve(0, &app, demand(100, 900)).unwrap(), world.reserve(0, &app, demand(50, 950)).unwrap()];
    let mut open = [row(&world, "R1", (100, 32)), row(&world, "R2", (50, 500))];
    let other = Row { application: "b".into(), ..row(&world, "R3", (1, 1)) };
    let all: Vec<Entry> = open.iter().cloned().chain([other]).map(entry).collect();
    ledger.commit(&writer, LEASE, &all).unwrap();
    world.set(0, DOWN);
    let (used, leased) = world.stored("a", Kind::TokensPerDay);
    assert!(used == 400 && leased >= 2000, "{used} {leased}");
    expired(&mut world, 1);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (used, leased), "rows are open: nobody can tell yet");
    for row in &mut open {
        (row.state, row.finish) = (State::Closed, Finish::Crashed);
    }
    ledger.commit(&writer, LEASE, &open.map(|row| Entry { row, stored: true })).unwrap();
    let other = Row { state: State::Closed, finish: Finish::Crashed, ..row(&world, "R3", (1, 1)) };
    ledger.commit(&writer, LEASE, &[Entry { row: other, stored: true }]).unwrap();
    expired(&mut world, 1);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (400 + 132 + 550, 0));
    assert_eq!(world.stored("a", Kind::TokensPerMonth), (400 + 132 + 550, 0));
    let counters = &world.replicas[1].shared.counters;
    assert_eq!(counters.swept_spent_tokens.get(), 2 * (132 + 550));
    assert_eq!(counters.swept_returned_tokens.get(), 2 * (leased - 132 - 550));
    assert_eq!((counters.swept.get(), world.holders()), (1, 1));
    drop(held);
}

#[test]
fn a_successor_that_knows_its_predecessor_is_over_waits_for_no_lease() {
    let mut world = World::new(SqliteFile::new(), 1, QuotaConfig { takeover: true, ..config() });
    let app = application("a", "concurrent_requests = 1");
    let held = world.reserve(0, &app, demand(1, 1)).unwrap();
    let successor = world.replica();
    let dead = std::mem::replace(&mut world.replicas[0], successor);
    world.turn(0);
    world.reserve(0, &app, demand(1, 1)).unwrap().settle(1);
    drop((dead, held));
}

#[test]
fn who_leaves_leaves_nothing_but_what_runs() {
    let mut world = World::new(SqliteFile::new(), 2, config());
    let app = application("a", "tokens_per_day = 100000\ntokens_per_minute = 100000");
    for _ in 0..9 {
        world.reserve(0, &app, demand(100, 900)).unwrap().settle(500);
    }
    world.turn(0);
    assert!(world.stored("a", Kind::TokensPerDay).1 > 0);
    world.replicas[0].syncer.farewell();
    assert_eq!(world.stored("a", Kind::TokensPerDay), (4500, 0));
    assert_eq!(world.stored("a", Kind::TokensPerMinute), (4500, 0));
    assert_eq!(world.holders(), 1);
    let running = world.reserve(1, &app, demand(100, 900)).unwrap();
    world.replicas[1].syncer.farewell();
    assert_eq!((world.stored("a", Kind::TokensPerDay).1, world.holders()), (1000, 1));
    drop(running);
}

/// Each call of a transaction in turn fails, before or after it took effect: nothing is lost or doubled.
#[test]
fn a_fault_at_every_call_changes_no_count() {
    let mut calls = u32::MAX;
    let mut after = 0;
    while after < calls {
        for took_effect in [false, true] {
            let config = QuotaConfig { on_store_loss: OnStoreLoss::Allow, ..config() };
            let mut world = World::new(SqliteFile::new(), 1, config);
            let app = application(
                "a",
                "tokens_per_day = 100000\nconcurrent_requests = 50\ntokens_per_minute = 50000",
            );
            world.set(0, Plan { after: Some(after), took_effect, ..UP });
            for _ in 0..4 {
                world.reserve(0, &app, demand(100, 900)).unwrap().settle(300);
                let two = world.reserve(0, &app, demand(100, 400)).unwrap();
                world.pass(Duration::from_millis(600));
                world.turn(0);
                two.settle(500);
            }
            calls = world.replicas[0].plan.lock().unwrap().calls;
            world.set(0, UP);
            for _ in 0..4 {
                world.seconds(1);
                world.turn(0);
            }
            assert_eq!(world.stored("a", Kind::TokensPerDay), (3200, 0), "call {after}, {took_effect}");
            assert_eq!(world.stored("a", Kind::TokensPerMinute), (3200, 0), "call {after}, {took_effect}");
            assert_eq!(world.stored("a", Kind::ConcurrentRequests), (0, 0), "call {after}, {took_effect}");
        }
        after += 1;
    }
    assert!(calls > 60, "{calls}");
}
