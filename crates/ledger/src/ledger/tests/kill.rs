//! `kill -9` at random moments of a real process, with and without a store that comes and goes.
//!
//! The child is this test binary again. It serves streams and writes to its standard output what leaves: that is
//! the clients' tape, and it survives the child. The parent kills it, starts the ledger, and holds rows against
//! tapes. `LEDGER_KILLS=1000` runs as many.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::store::UsageQuery;
use crate::store::sqlite::SqliteOptions;

const FOLDER: &str = "LEDGER_KILL_CHILD";
const STREAMS: u64 = 24;

fn parts_at(folder: &std::path::Path) -> (SqlStore<Faulty<Sqlite>>, Spool, Arc<Mutex<Plan>>) {
    let options = SqliteOptions::default();
    let store =
        SqlStore::open(&folder.join("ledger.db"), Some(crate::store::tests::key()), &options).unwrap();
    let spool = Spool::open(&folder.join("spool"), 1 << 20).unwrap();
    let plan: Arc<Mutex<Plan>> = Arc::default();
    (store.map(|sql| Faulty { inner: sql, plan: plan.clone() }), spool, plan)
}

/// Starts, does what there is to do for the dead, and stops.
fn start_and_stop(folder: &std::path::Path) {
    let (store, spool, _) = parts_at(folder);
    let shared = shared(config(), Some(&spool));
    let mut committer = Committer::new(Box::new(store), Some(spool), shared, Instant::now());
    committer.first().unwrap();
    while committer.turn(Instant::now()) == Duration::ZERO {}
    committer.shared.queue().stopping = true;
    committer.run();
}

fn start(folder: &std::path::Path, faults: bool) -> (Ledger, Arc<Mutex<Plan>>) {
    let (store, spool, plan) = parts_at(folder);
    let config = LedgerConfig {
        retry: Duration::from_millis(if faults { 1 } else { 250 }),
        gather: Duration::from_micros(200),
        ..config()
    };
    (Ledger::start(Box::new(store), Some(spool), config).unwrap(), plan)
}

fn say(line: std::fmt::Arguments<'_>) {
    // One write, so that a kill leaves a whole line or none.
    let line = format!("{line}\n");
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).unwrap();
}

/// One client's stream. The tape is written after the permission and before the next token, as bytes leave.
async fn stream(ledger: &Ledger, n: u64, length: u64) {
    let Ok(open) = ledger.open(crate::store::tests::request(n), Instant::now()) else { return };
    if open.opened().await.is_err() {
        return;
    }
    say(format_args!("T {n} 0"));
    for token in 1..=length {
        open.checkpoint(&counts(token));
        if open.may_send(token).await.is_err() {
            return;
        }
        say(format_args!("T {n} {token}"));
    }
    open.close(&ended(length));
    if open.closed().await.is_ok() {
        say(format_args!("E {n} {length}"));
    }
}

/// Does nothing unless it is started by the test below.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let folder = PathBuf::from(folder);
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let (first, faults) = (number("LEDGER_KILL_FIRST"), number("LEDGER_KILL_FAULTS") == 1);
    let (ledger, plan) = start(&folder, faults);
    let ledger = Arc::new(ledger);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for of in 0..STREAMS {
            let ledger = ledger.clone();
            tasks.spawn(async move {
                for round in 0..10_000 {
                    let n = first + round * STREAMS + of;
                    stream(&ledger, n, 5 + n * 7 % 60).await;
                }
            });
        }
        if faults {
            let mut rng = StdRng::seed_from_u64(first);
            tasks.spawn(async move {
                loop {
                    let next = if rng.random() { UP } else { DOWN };
                    *plan.lock().unwrap() =
                        Plan { after: next.after.map(|_| rng.random_range(0..40)), ..next };
                    for _ in 0..200 {
                        tokio::task::yield_now().await;
                    }
                }
            });
        }
        while tasks.join_next().await.is_some() {}
    });
}

/// What the clients of all children have: tokens, and whether they saw the end.
type Tapes = HashMap<String, (u64, bool)>;

fn run_and_kill(folder: &std::path::Path, first: u64, faults: bool, lines: usize, tapes: &mut Tapes) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "ledger::tests::kill::child", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env("LEDGER_KILL_FIRST", first.to_string())
        .env("LEDGER_KILL_FAULTS", u64::from(faults).to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut seen = 0;
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let [kind @ ("T" | "E"), n, tokens] = words[..] else { continue };
        let id = format!("R{:06}", n.parse::<u64>().unwrap());
        tapes.insert(id, (tokens.parse().unwrap(), kind == "E"));
        seen += 1;
        if seen == lines {
            killed = true;
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    assert!(killed, "the child ended by itself after {seen} lines");
}

fn check(folder: &std::path::Path, tapes: &Tapes) -> (usize, u64) {
    let mut store = SqlStore::open_reading(&folder.join("ledger.db")).unwrap();
    let rows: HashMap<String, Row> =
        store.rows("", 1_000_000).unwrap().into_iter().map(|row| (row.id.clone(), row)).collect();
    for (id, (tape, ended)) in tapes {
        let row = rows.get(id).unwrap_or_else(|| panic!("I1: {id} has no row"));
        assert_eq!(row.state, State::Closed, "{id}");
        if *ended {
            assert_eq!((row.completion_tokens, &row.finish), (*tape, &Finish::Stop), "I2: {id}");
        } else {
            assert!(*tape <= row.completion_tokens + 16, "I4: {id}: {tape} beyond {row:?}");
        }
    }
    let report = sound(&mut store);
    assert_eq!((report.rows, report.open), (rows.len() as u64, 0));
    let sums = store.usage(&UsageQuery::ALL).unwrap();
    let total: u64 = rows.values().map(|row| row.completion_tokens).sum();
    assert_eq!(sums.iter().map(|sum| sum.completion_tokens).sum::<u64>(), total, "I6");
    (rows.len(), total)
}

#[test]
fn killed_at_random_moments_nothing_is_lost_or_doubled() {
    let kills = std::env::var("LEDGER_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(50u64);
    let seed: u64 =
        std::env::var("LEDGER_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or_else(rand::random);
    println!("LEDGER_SEED={seed} LEDGER_KILLS={kills}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut folder = SqliteFile::new();
    let mut tapes = Tapes::new();
    for kill in 0..kills {
        if kill % 25 == 0 {
            (folder, tapes) = (SqliteFile::new(), Tapes::new());
        }
        let path = folder.folder.path();
        let lines = rng.random_range(1..400);
        run_and_kill(path, kill * 10_000, kill % 2 == 1, lines, &mut tapes);
        if kill % 4 == 3 || kill + 1 == kills {
            // Twice: the second start must find nothing to do.
            let mut last = None;
            for _ in 0..2 {
                start_and_stop(path);
                let found = check(path, &tapes);
                assert!(last.is_none_or(|last| last == found), "I8");
                last = Some(found);
            }
        }
    }
}
