//! The thread itself, and what waits for it.

use super::*;

fn start(db: &SqliteFile, config: LedgerConfig) -> Ledger {
    Ledger::start(Box::new(db.connect()), None, config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_share_commits_and_each_keeps_its_window() {
    let db = SqliteFile::new();
    let ledger = Arc::new(start(&db, LedgerConfig { max_open: 1000, ..config() }));
    let mut tasks = Vec::new();
    for n in 0..64u64 {
        let ledger = ledger.clone();
        tasks.push(tokio::spawn(async move {
            let open = ledger.open(crate::store::tests::request(n), Instant::now()).unwrap();
            open.opened().await.unwrap();
            for token in 1..=60 {
                open.checkpoint(&counts(token));
                open.may_send(token).await.unwrap();
            }
            open.close(&ended(60));
            open.closed().await.unwrap();
            assert!(open.is_closed());
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let counters = ledger.counters();
    assert_eq!((counters.closed.get(), counters.closed_tokens.get()), (64, 64 * 60));
    assert!(counters.commits.get() < counters.committed_rows.get());
    assert_eq!((ledger.open_requests(), ledger.health(), ledger.spooled_bytes()), (0, Health::Ok, 0));
    ledger.takes_more().unwrap();
    drop(ledger);
    let mut store = db.connect();
    assert!(store.chains().unwrap().iter().all(|chain| chain.ended), "it said good-bye");
    let report = sound(&mut store);
    assert_eq!((report.rows, report.open), (64, 0));
}

#[tokio::test]
async fn who_waits_learns_that_the_store_is_away() {
    let db = SqliteFile::new();
    let (store, plan) = faulty(&db);
    let config =
        LedgerConfig { retry: Duration::from_millis(1), stall: Duration::from_millis(5), ..config() };
    let ledger = Ledger::start(Box::new(store), None, config).unwrap();
    let first = ledger.open(crate::store::tests::request(1), Instant::now()).unwrap();
    first.opened().await.unwrap();
    *plan.lock().unwrap() = DOWN;
    first.checkpoint(&counts(20));
    assert_eq!(first.may_send(20).await, Err(Unavailable::Store));
    first.close(&ended(20));
    assert_eq!(first.closed().await, Err(Unavailable::Store));
    *plan.lock().unwrap() = UP;
    // The thread finds out by itself.
    loop {
        match first.closed().await {
            Ok(()) => break,
            Err(error) => assert_eq!(error, Unavailable::Store),
        }
        tokio::task::yield_now().await;
    }
    ledger.stop();
    assert_eq!(db.connect().row("R000001").unwrap().unwrap().completion_tokens, 20);
}

/// A disk that hangs: no error, no answer.
#[tokio::test]
#[allow(clippy::await_holding_lock)]
async fn who_waits_learns_that_the_store_hangs() {
    let db = SqliteFile::new();
    let (store, plan) = faulty(&db);
    let config = LedgerConfig { stall: Duration::from_millis(5), ..config() };
    let ledger = Ledger::start(Box::new(store), None, config).unwrap();
    let open = ledger.open(crate::store::tests::request(1), Instant::now()).unwrap();
    open.opened().await.unwrap();
    {
        // Whoever calls the store waits for this lock.
        let _hangs = plan.lock().unwrap();
        open.close(&ended(3));
        assert_eq!(open.closed().await, Err(Unavailable::Store));
        assert_eq!(ledger.health(), Health::Unavailable);
        assert_eq!(ledger.takes_more(), Err(Unavailable::Store));
    }
    while open.closed().await.is_err() {
        tokio::task::yield_now().await;
    }
    ledger.stop();
}

#[tokio::test]
async fn a_panic_in_the_thread_is_a_broken_ledger() {
    let db = SqliteFile::new();
    let (store, plan) = faulty(&db);
    let ledger = Ledger::start(Box::new(store), None, config()).unwrap();
    let open = ledger.open(crate::store::tests::request(7), Instant::now()).unwrap();
    open.opened().await.unwrap();
    // Whoever calls the store panics from now on: it unwraps this lock.
    let poison = std::thread::spawn(move || {
        let _held = plan.lock().unwrap();
        panic!("told to panic");
    });
    assert!(poison.join().is_err());
    open.checkpoint(&counts(30));
    assert_eq!(open.may_send(60).await, Err(Unavailable::Store));
    assert_eq!(ledger.health(), Health::Broken);
    assert!(ledger.open(crate::store::tests::request(8), Instant::now()).is_err());
    drop(ledger);
}

#[test]
fn stopping_refuses_new_work_and_leaves_open_rows_to_recovery() {
    let db = SqliteFile::new();
    let ledger = start(&db, config());
    let open = ledger.open(crate::store::tests::request(1), Instant::now()).unwrap();
    let shared = ledger.shared.clone();
    ledger.stop();
    assert_eq!(
        open_on(&shared, crate::store::tests::request(2), Instant::now()).unwrap_err(),
        Unavailable::Stopping
    );
    assert_eq!(open.permitted(), Some(16), "what was said before is stored");
    let next = start(&db, config());
    next.stop();
    assert!(db.connect().row("R000001").unwrap().unwrap().is_crashed());
}

/// One client after another until it is told to stop. Returns what they got: id and tokens of each end.
#[cfg(feature = "postgres")]
async fn clients(ledger: &Ledger, first: u64, stop: &AtomicBool) -> Vec<(String, u64)> {
    let mut tape = Vec::new();
    let mut n = first;
    while !stop.load(Ordering::Acquire) {
        n += 1;
        let row = crate::store::tests::request(n);
        let (id, tokens) = (row.id.clone(), 10 + n % 20);
        let open = ledger.open(row, Instant::now()).unwrap();
        open.opened().await.unwrap();
        for token in 1..=tokens {
            open.checkpoint(&counts(token));
            open.may_send(token).await.unwrap();
        }
        open.close(&ended(tokens));
        open.closed().await.unwrap();
        tape.push((id, tokens));
        // A client thinks for a moment: what piles up while the server is away must be replayed.
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    tape
}

#[cfg(feature = "postgres")]
#[test]
fn postgresql_killed_and_restarted_under_load_loses_and_doubles_nothing() {
    use crate::store::tests::pg::Server;
    let Some(server) = Server::start() else { return };
    let schema = server.database();
    let folder = SqliteFile::new();
    let spool = Spool::open(&spool_path(&folder), 64 << 20).unwrap();
    let config =
        LedgerConfig { retry: Duration::from_millis(10), stall: Duration::from_secs(60), ..config() };
    let ledger = Arc::new(Ledger::start(Box::new(schema.connect()), Some(spool), config).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|of| {
            let (ledger, stop) = (ledger.clone(), stop.clone());
            runtime.spawn(async move { clients(&ledger, of * 100_000, &stop).await })
        })
        .collect();
    for _ in 0..2 {
        let closed = ledger.counters().closed.get();
        while ledger.counters().closed.get() < closed + 20 {
            std::thread::yield_now();
        }
        server.down();
        let spooled = ledger.counters().spooled_rows.get();
        while ledger.counters().spooled_rows.get() < spooled + 20 {
            std::thread::yield_now();
        }
        server.up();
    }
    stop.store(true, Ordering::Release);
    let tapes: Vec<(String, u64)> =
        tasks.into_iter().flat_map(|task| runtime.block_on(task).unwrap()).collect();
    while ledger.health() != Health::Ok {
        std::thread::yield_now();
    }
    assert_eq!(ledger.counters().closed.get(), tapes.len() as u64);
    drop(ledger);
    let mut store = schema.connect();
    let rows = store.rows("", 1_000_000).unwrap();
    assert_eq!(rows.len(), tapes.len(), "I1");
    let rows: HashMap<String, Row> = rows.into_iter().map(|row| (row.id.clone(), row)).collect();
    for (id, tokens) in tapes {
        assert_eq!((rows[&id].completion_tokens, &rows[&id].finish), (tokens, &Finish::Stop), "I2: {id}");
    }
    sound(&mut store);
}
