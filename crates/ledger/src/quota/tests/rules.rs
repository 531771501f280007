//! Each rule once.

use super::*;

fn after(refusal: &Refusal) -> Option<u64> {
    refusal.retry_after_seconds()
}

fn named(refusal: Result<Reservation, Refusal>) -> (Kind, u64, u64, Option<u64>) {
    let refusal = refusal.unwrap_err();
    match refusal {
        Refusal::Exceeded(exceeded) => (exceeded.kind, exceeded.limit, exceeded.remaining, after(&refusal)),
        other => panic!("{other}"),
    }
}

pub(super) fn all<D: Database>(make: impl Fn() -> D)
where
    D::Driver: 'static,
{
    the_longest_answer_is_reserved_and_the_rest_comes_back(make());
    a_minute_slides(make());
    a_day_ends_at_midnight_in_paris(make());
    places_come_back(make());
    a_request_of_the_whole_limit_fits(make());
    idle_leases_go_back(make());
    a_lease_is_spent_and_then_the_answer_depends(make());
    replicas_do_not_exceed_a_limit_together(make());
}

#[test]
fn the_rules_hold() {
    all(SqliteFile::new);
}

fn the_longest_answer_is_reserved_and_the_rest_comes_back<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 1, config());
    let app = application("a", "tokens_per_day = 1000\nrequests_per_minute = 10");
    let held = world.reserve(0, &app, demand(100, 800)).unwrap();
    assert_eq!(world.stored("a", Kind::TokensPerDay), (0, 900));
    assert_eq!(named(world.reserve(0, &app, demand(1, 100))).0, Kind::TokensPerDay);
    held.settle(150);
    let standing = standing(&world.replicas[0].shared, &app);
    assert_eq!(standing.tokens.map(|level| (level.limit, level.remaining)), Some((1000, 850)));
    assert_eq!(standing.requests.map(|level| level.remaining), Some(9));
    let again = world.reserve(0, &app, demand(50, 800)).unwrap();
    assert_eq!(again.standing().tokens.map(|level| level.remaining), Some(0));
    // Dropped without a word: all of it counts. Cancelled: nothing, not even the request.
    drop(again);
    world.seconds(1);
    world.turn(0);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (1000, 0));
    assert_eq!(world.stored("a", Kind::RequestsPerMinute).0, 2);
    assert_eq!(world.replicas[0].shared.counters.dropped.get(), 1);
    let free = application("b", "requests_per_minute = 10");
    world.reserve(0, &free, demand(1, 1)).unwrap().cancel();
    world.seconds(2);
    world.turn(0);
    assert_eq!(world.stored("b", Kind::RequestsPerMinute), (0, 0));
    // Who uses more than was reserved is counted for it.
    let more = application("c", "tokens_per_day = 1000\ntokens_per_minute = 1000");
    world.reserve(0, &more, demand(1, 9)).unwrap().settle(26);
    world.seconds(2);
    world.turn(0);
    assert_eq!(world.stored("c", Kind::TokensPerDay), (26, 0));
    assert_eq!(world.stored("c", Kind::TokensPerMinute), (26, 0));
}

fn a_minute_slides<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 1, config());
    let app = application("a", "requests_per_minute = 3\ntokens_per_minute = 100000");
    for _ in 0..3 {
        world.reserve(0, &app, demand(1, 1)).unwrap().settle(2);
        world.seconds(10);
    }
    // The first leaves 62 seconds after the second in which it came; 30 have passed.
    assert_eq!(named(world.reserve(0, &app, demand(1, 1))), (Kind::RequestsPerMinute, 3, 0, Some(32)));
    world.seconds(31);
    world.reserve(0, &app, demand(1, 1)).unwrap_err();
    world.seconds(1);
    let one = world.reserve(0, &app, demand(1, 1)).unwrap();
    let level = one.standing().requests.unwrap();
    assert_eq!((level.limit, level.remaining, level.reset), (3, 0, Duration::from_secs(62)));
    one.settle(2);
    world.seconds(70);
    world.turn(0);
    let level = standing(&world.replicas[0].shared, &app).requests.unwrap();
    assert_eq!((level.remaining, level.reset), (3, Duration::ZERO));
    assert_eq!(world.replicas[0].shared.counters.refused_by(Kind::RequestsPerMinute), 2);
}

fn a_day_ends_at_midnight_in_paris<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 1, config());
    let app = application("a", "tokens_per_day = 100\ntokens_per_month = 150");
    let over = world.reserve(0, &app, demand(1, 99)).unwrap();
    // What is only reserved may come back at any moment.
    assert_eq!(named(world.reserve(0, &app, demand(1, 1))), (Kind::TokensPerDay, 100, 0, Some(1)));
    let level = over.standing().tokens.unwrap();
    assert_eq!((level.limit, level.reset), (100, Duration::from_secs(12 * 3600)));
    world.seconds(12 * 3600);
    world.turn(0);
    // What began yesterday is yesterday's, though it ends today.
    let today = world.reserve(0, &app, demand(1, 49)).unwrap();
    assert_eq!(named(world.reserve(0, &app, demand(1, 49))).0, Kind::TokensPerMonth);
    over.settle(40);
    today.settle(50);
    world.rest(0);
    world.reserve(0, &app, demand(1, 49)).unwrap().settle(50);
    world.rest(0);
    assert_eq!(world.stored("a", Kind::TokensPerMonth), (140, 0));
    let (kind, limit, left, wait) = named(world.reserve(0, &app, demand(1, 10)));
    // To the first of December.
    assert_eq!((kind, limit, left), (Kind::TokensPerMonth, 150, 10));
    assert_eq!(wait, Some(6 * 24 * 3600 - 12));
}

fn places_come_back<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 2, config());
    let app = application("a", "concurrent_requests = 2\nmax_output_tokens = 10");
    let long = world.reserve(0, &app, demand(1, 11)).unwrap_err();
    assert_eq!(long, Refusal::OutputTooLong { limit: 10, requested: 11 });
    let one = world.reserve(0, &app, demand(1, 10)).unwrap();
    let two = world.reserve(1, &app, demand(1, 10)).unwrap();
    assert_eq!(named(world.reserve(0, &app, demand(1, 1))), (Kind::ConcurrentRequests, 2, 0, Some(1)));
    one.settle(5);
    world.reserve(0, &app, demand(1, 1)).unwrap().cancel();
    drop(two);
    world.rest(0);
    world.rest(1);
    assert_eq!(world.stored("a", Kind::ConcurrentRequests), (0, 0));
}

fn a_request_of_the_whole_limit_fits<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 1, config());
    let app = application("a", "tokens_per_day = 1000");
    let refused = world.reserve(0, &app, demand(1, 1000)).unwrap_err();
    assert_eq!(refused.retry_after_seconds(), None, "it never fits: {refused}");
    // A few that leave something at hand, which the large one needs too.
    for _ in 0..3 {
        world.reserve(0, &app, demand(5, 5)).unwrap().settle(0);
    }
    world.turn(0);
    assert!(world.stored("a", Kind::TokensPerDay).1 > 0, "something is at hand");
    let all = world.reserve(0, &app, demand(0, 1000)).unwrap();
    assert_eq!(world.stored("a", Kind::TokensPerDay), (0, 1000));
    all.settle(1000);
    // A wider limit counts at once.
    let wider = application("a", "tokens_per_day = 1200");
    world.reserve(0, &wider, demand(0, 200)).unwrap().settle(200);
    assert_eq!(named(world.reserve(0, &wider, demand(1, 0))).0, Kind::TokensPerDay);
}

fn idle_leases_go_back<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 1, config());
    let app =
        application("a", "tokens_per_day = 1000000\ntokens_per_minute = 100000\nconcurrent_requests = 100");
    let mut most = 0;
    for _ in 0..50 {
        world.reserve(0, &app, demand(100, 900)).unwrap().settle(300);
        world.pass(Duration::from_millis(100));
        world.turn(0);
        most = most.max(world.stored("a", Kind::TokensPerDay).1);
    }
    // One second of what it uses, at a twentieth of the limit at most, and one request.
    assert!((10_000..=50_000).contains(&most), "{most}");
    let counters = &world.replicas[0].shared.counters;
    assert_eq!(counters.admitted.get(), 50);
    world.seconds(3);
    world.turn(0);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (15_000, 0));
    assert_eq!(world.stored("a", Kind::TokensPerMinute), (15_000, 0));
    assert_eq!(world.stored("a", Kind::ConcurrentRequests), (0, 0));
    // And then the thread rests until its next sign of life.
    world.seconds(1);
    world.turn(0);
    assert!(world.replicas[0].shared.book().active.is_empty());
}

fn a_lease_is_spent_and_then_the_answer_depends<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 1, QuotaConfig { on_store_loss: OnStoreLoss::Refuse, ..config() });
    let app = application("a", "tokens_per_day = 1000");
    let warm = |world: &mut World<D>| {
        for _ in 0..4 {
            world.reserve(0, &app, demand(5, 5)).unwrap().settle(10);
        }
        world.turn(0);
    };
    warm(&mut world);
    world.set(0, DOWN);
    let refused = world.reserve(0, &app, demand(500, 0)).unwrap_err();
    assert_eq!(refused.retry_after_seconds(), Some(1));
    assert!(matches!(refused, Refusal::Unavailable { .. }));
    assert_eq!(world.replicas[0].shared.health(), QuotaHealth::Lost);
    world.reserve(0, &app, demand(5, 5)).unwrap().settle(10);
    // The lease itself ends.
    world.seconds(31);
    assert!(matches!(world.reserve(0, &app, demand(1, 1)), Err(Refusal::Unavailable { .. })));
    world.set(0, UP);
    world.seconds(1);
    world.turn(0);
    assert_eq!(world.replicas[0].shared.health(), QuotaHealth::Ok);
    world.reserve(0, &app, demand(5, 5)).unwrap().settle(10);
    // Told to allow, it goes on as if it were alone, up to the limit, and tells later.
    let allow = QuotaConfig { on_store_loss: OnStoreLoss::Allow, ..config() };
    world.replicas[0].syncer.farewell();
    world.config = allow;
    world.replicas[0] = world.replica();
    world.reserve(0, &app, demand(5, 5)).unwrap().settle(10);
    world.set(0, DOWN);
    world.turn(0);
    let alone = world.reserve(0, &app, demand(500, 0)).unwrap();
    assert_eq!(named(world.reserve(0, &app, demand(500, 0))).0, Kind::TokensPerDay);
    alone.settle(400);
    world.reserve(0, &app, demand(500, 0)).unwrap().settle(500);
    assert_eq!(world.replicas[0].shared.counters.alone.get(), 2);
    world.set(0, UP);
    world.seconds(40);
    for _ in 0..3 {
        world.turn(0);
        world.seconds(1);
    }
    assert_eq!(world.stored("a", Kind::TokensPerDay).0, 40 + 10 + 10 + 10 + 900);
}

fn replicas_do_not_exceed_a_limit_together<D: Database>(db: D)
where
    D::Driver: 'static,
{
    let mut world = World::new(db, 3, config());
    let app = application("a", "tokens_per_minute = 10000\nrequests_per_minute = 1000");
    let (mut used, mut refused) = (0, 0);
    for n in 0..400 {
        match world.reserve(n % 3, &app, demand(10, 90)) {
            Ok(held) => {
                held.settle(60);
                used += 60;
            }
            Err(refusal) => {
                assert!((1..=62).contains(&refusal.retry_after_seconds().unwrap()), "{refusal:?}");
                refused += 1;
            }
        }
        world.pass(Duration::from_millis(20));
    }
    assert!(used <= 10_000 && used > 8_000 && refused > 0, "{used} {refused}");
}

#[test]
fn nothing_is_counted_where_there_is_no_limit() {
    let mut world = World::new(SqliteFile::new(), 1, config());
    let app = application("a", "");
    let held = world.reserve(0, &app, demand(u64::MAX, u64::MAX)).unwrap();
    assert_eq!(held.standing(), Standing::default());
    held.settle(5);
    let counters = &world.replicas[0].shared.counters;
    assert_eq!((counters.admitted.get(), counters.dropped.get()), (0, 0));
    assert_eq!(world.replicas[0].shared.book().apps.len(), 0);
}

#[test]
fn applications_that_are_remembered_are_bounded() {
    let mut world = World::new(SqliteFile::new(), 1, QuotaConfig { max_applications: 2, ..config() });
    let app = |name| application(name, "tokens_per_day = 1000");
    let held = world.reserve(0, &app("a"), demand(1, 1)).unwrap();
    world.reserve(0, &app("b"), demand(1, 1)).unwrap().settle(2);
    assert!(matches!(world.reserve(0, &app("c"), demand(1, 1)), Err(Refusal::Unavailable { .. })));
    world.seconds(61);
    for _ in 0..3 {
        world.turn(0);
        world.seconds(2);
    }
    // The one with a request under way stays.
    world.reserve(0, &app("c"), demand(1, 1)).unwrap().settle(2);
    assert!(world.replicas[0].shared.book().apps.contains_key("a"));
    held.settle(1);
}

#[test]
fn requests_that_wait_are_bounded_and_answered_in_order() {
    let world = World::new(SqliteFile::new(), 1, QuotaConfig { max_waiting: 2, ..config() });
    let app = application("a", "tokens_per_day = 1000");
    let shared = &world.replicas[0].shared;
    let Step::Wait(mut one) = shared.begin(&app.name, &app.quota, &demand(0, 900)) else {
        unreachable!("nothing is at hand")
    };
    let Step::Wait(mut two) = shared.begin(&app.name, &app.quota, &demand(0, 200)) else {
        unreachable!("nothing is at hand")
    };
    let Step::Done(full) = shared.begin(&app.name, &app.quota, &demand(0, 10)) else {
        unreachable!("no room")
    };
    assert!(matches!(full, Err(Refusal::Unavailable { .. })));
    let mut world = world;
    world.turn(0);
    assert!(matches!(one.try_recv(), Ok(Verdict::Go(_))));
    assert!(matches!(two.try_recv(), Ok(Verdict::No(_))));
    drop((one, two));
    // The verdict was never claimed, so it costs nothing.
    world.seconds(2);
    world.turn(0);
    assert_eq!(world.stored("a", Kind::TokensPerDay), (0, 0));
    assert_eq!(world.replicas[0].shared.book().waiting, 0);
}

#[test]
fn a_request_that_gave_up_leaves_no_trace() {
    let mut world = World::new(SqliteFile::new(), 1, config());
    let app = application("a", "tokens_per_day = 1000\nconcurrent_requests = 1");
    let Step::Wait(waits) = world.replicas[0].shared.begin(&app.name, &app.quota, &demand(0, 900)) else {
        unreachable!("nothing is at hand")
    };
    drop(waits);
    world.turn(0);
    assert_eq!(world.replicas[0].shared.book().waiting, 0);
    world.reserve(0, &app, demand(0, 1000)).unwrap().settle(1);
}

#[test]
fn a_refusal_is_repeated_without_asking_and_not_for_long() {
    let mut world = World::new(SqliteFile::new(), 2, config());
    let app = application("a", "tokens_per_day = 1000");
    let all = world.reserve(0, &app, demand(0, 1000)).unwrap();
    world.reserve(1, &app, demand(0, 10)).unwrap_err();
    let asked = world.replicas[1].plan.lock().unwrap().calls;
    for _ in 0..100 {
        world.reserve(1, &app, demand(0, 10)).unwrap_err();
    }
    assert_eq!(world.replicas[1].plan.lock().unwrap().calls, asked);
    all.settle(0);
    world.seconds(1);
    world.turn(0);
    world.reserve(1, &app, demand(0, 10)).unwrap().settle(0);
}

#[test]
fn a_clock_set_back_frees_nothing_early_and_blocks_nothing_for_long() {
    let mut world = World::new(SqliteFile::new(), 1, config());
    let app = application("a", "requests_per_minute = 2");
    world.reserve(0, &app, demand(1, 1)).unwrap().settle(2);
    world.seconds(30);
    world.reserve(0, &app, demand(1, 1)).unwrap().settle(2);
    world.now.fetch_sub(3_600_000_000, Ordering::SeqCst);
    world.seconds(29);
    assert_eq!(named(world.reserve(0, &app, demand(1, 1))).0, Kind::RequestsPerMinute);
    world.seconds(34);
    world.reserve(0, &app, demand(1, 1)).unwrap().settle(2);
    let level = standing(&world.replicas[0].shared, &app).requests.unwrap();
    assert!(level.reset <= Duration::from_secs(62), "{level:?}");
}

#[test]
fn what_is_granted_too_late_is_not_used() {
    let mut world = World::new(SqliteFile::new(), 1, config());
    let app = application("a", "requests_per_minute = 1\ntokens_per_day = 100");
    let Step::Wait(mut waits) = world.replicas[0].shared.begin(&app.name, &app.quota, &demand(1, 1)) else {
        unreachable!("nothing is at hand")
    };
    // The store takes longer than the second that it grants.
    world.clock.tick.store(2_000_000, Ordering::SeqCst);
    world.turn(0);
    assert!(waits.try_recv().is_err());
    assert_eq!(world.stored("a", Kind::RequestsPerMinute), (1, 0));
    world.clock.tick.store(0, Ordering::SeqCst);
    world.turn(0);
    let Ok(Verdict::Go(unclaimed)) = waits.try_recv() else { panic!("it was given back, and taken anew") };
    unclaimed.claim().unwrap().settle(2);
    world.rest(0);
    assert_eq!(world.stored("a", Kind::RequestsPerMinute), (1, 0));
    assert_eq!(world.stored("a", Kind::TokensPerDay), (2, 0));
}
