//! The thread itself, and what waits for it.

use super::*;

fn start(db: &SqliteFile, config: QuotaConfig) -> Quotas {
    Quotas::start(db.connect(), config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_are_admitted_up_to_the_limit() {
    let db = SqliteFile::new();
    let quotas = Arc::new(start(&db, QuotaConfig { max_wait: Duration::from_secs(60), ..config() }));
    let app = application("a", "tokens_per_day = 10000");
    let tasks: Vec<_> = (0..200)
        .map(|_| {
            let (quotas, app) = (quotas.clone(), app.clone());
            tokio::spawn(async move {
                quotas.reserve(&app.name, &app.quota, demand(10, 90)).await.map(|held| held.settle(100))
            })
        })
        .collect();
    let mut admitted = 0;
    for task in tasks {
        admitted += u64::from(task.await.unwrap().is_ok());
    }
    assert_eq!(admitted, 100);
    assert_eq!((quotas.health(), quotas.applications()), (QuotaHealth::Ok, 1));
    let counters = quotas.counters();
    assert_eq!((counters.admitted.get(), counters.refused_by(Kind::TokensPerDay)), (100, 100));
    assert!(counters.waited.get() >= 1 && counters.syncs.get() >= 1);
    assert_eq!(quotas.standing(&app.name, &app.quota).tokens.map(|level| level.remaining), Some(0));
    assert_eq!(
        quotas.standing("b", &application("b", "requests_per_minute = 7").quota).requests.unwrap().remaining,
        7
    );
    quotas.stop();
    let world = World { db, ..World::new(SqliteFile::new(), 0, config()) };
    assert_eq!(world.stored("a", Kind::TokensPerDay), (10_000, 0));
    assert_eq!(world.holders(), 0);
}

/// A disk that hangs: no error, no answer.
#[tokio::test]
#[allow(clippy::await_holding_lock)]
async fn who_waits_does_not_wait_for_ever() {
    let db = SqliteFile::new();
    let (store, plan) = crate::store::tests::faults::faulty(&db);
    let config = QuotaConfig { max_wait: Duration::from_millis(5), ..config() };
    let quotas = Quotas::start(store, config).unwrap();
    let app = application("a", "tokens_per_day = 1000");
    {
        let _hangs = plan.lock().unwrap();
        let refused = quotas.reserve(&app.name, &app.quota, demand(1, 1)).await.unwrap_err();
        assert!(matches!(refused, Refusal::Unavailable { .. }));
    }
    while quotas.reserve(&app.name, &app.quota, demand(0, 1000)).await.map(|held| held.settle(1000)).is_err()
    {
        tokio::task::yield_now().await;
    }
    assert_eq!(quotas.counters().refused_unavailable.get(), quotas.counters().waited.get() - 1);
}

#[tokio::test]
async fn a_store_that_is_broken_is_said_and_a_lost_one_comes_back() {
    let db = SqliteFile::new();
    let (store, plan) = crate::store::tests::faults::faulty(&db);
    let config = QuotaConfig { retry: Duration::from_millis(1), ..config() };
    let quotas = Quotas::start(store, config).unwrap();
    let app = application("a", "tokens_per_day = 1000");
    *plan.lock().unwrap() = DOWN;
    let lost = quotas.reserve(&app.name, &app.quota, demand(1, 1)).await.unwrap_err();
    assert!(matches!(lost, Refusal::Unavailable { .. }));
    assert_eq!(quotas.health(), QuotaHealth::Lost);
    *plan.lock().unwrap() = UP;
    while quotas.reserve(&app.name, &app.quota, demand(1, 1)).await.map(|held| held.settle(1)).is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(quotas.health(), QuotaHealth::Ok);
    let mut other = db.connect();
    other.driver().execute("DROP TABLE mirai_quota", &[]).unwrap();
    assert!(quotas.reserve(&app.name, &app.quota, demand(1, 500)).await.is_err());
    assert_eq!(quotas.health(), QuotaHealth::Broken);
    assert!(quotas.counters().sync_failures.get() >= 2);
}

#[test]
fn it_does_not_start_in_an_unknown_zone_or_on_a_store_that_fails() {
    let db = SqliteFile::new();
    let zone = QuotaConfig { zone: "Europe/Lutece".into(), ..config() };
    assert!(matches!(Quotas::start(db.connect(), zone), Err(QuotaStartError::Zone(_))));
    let (store, plan) = crate::store::tests::faults::faulty(&db);
    *plan.lock().unwrap() = DOWN;
    assert!(matches!(Quotas::start(store, config()), Err(QuotaStartError::Store(_))));
    let started = start(&db, config());
    assert_eq!(format!("{:?}", started.shared), "Shared { health: Ok, .. }");
}

#[tokio::test]
async fn it_counts_beside_a_ledger_and_without_one() {
    let folder = SqliteFile::new();
    let here: crate::location::Location = format!("sqlite://{}", folder.path().display()).parse().unwrap();
    let _ledger = here.open(None).unwrap();
    let app = application("a", "tokens_per_day = 10");
    for quotas in [here.start_quotas(config()).unwrap(), Quotas::start_in_memory(config()).unwrap()] {
        quotas.reserve(&app.name, &app.quota, demand(1, 9)).await.unwrap().settle(10);
        let refused = quotas.reserve(&app.name, &app.quota, demand(1, 0)).await.unwrap_err();
        assert!(matches!(refused, Refusal::Exceeded(no) if no.kind == Kind::TokensPerDay), "{refused}");
    }
}

/// What the fast path costs: printed, because it depends on the machine.
#[test]
fn the_fast_path_asks_nobody() {
    let mut world = World::new(SqliteFile::new(), 1, config());
    let app = application(
        "a",
        "tokens_per_day = 1000000000000\nrequests_per_minute = 100000000\nconcurrent_requests = 1000",
    );
    for _ in 0..3000 {
        world.reserve(0, &app, demand(100, 900)).unwrap().settle(500);
    }
    world.turn(0);
    let shared = world.replicas[0].shared.clone();
    let calls = world.replicas[0].plan.lock().unwrap().calls;
    let (count, began) = (1000u32, std::time::Instant::now());
    for _ in 0..count {
        let Step::Done(Ok(held)) = shared.begin(&app.name, &app.quota, &demand(100, 900)) else {
            panic!("a lease is at hand")
        };
        held.settle(500);
    }
    println!("reserve and settle from a lease: {} ns", (began.elapsed() / count).as_nanos());
    assert_eq!(world.replicas[0].plan.lock().unwrap().calls, calls);
}
