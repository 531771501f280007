//! What accounting costs: paced streams against a file, as a server would drive them.
//!
//! `cargo run --release -p mirai-ledger --example pace -- FOLDER [STREAMS] [TOKENS_PER_SECOND] [SECONDS]`

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mirai_ledger::store::SqlStore;
use mirai_ledger::store::sqlite::SqliteOptions;
use mirai_ledger::{
    COMMIT_SECONDS, ChainKey, Counts, EnergyMethod, Finish, Ledger, LedgerConfig, Open, Outcome, Row,
};

fn counts(completion_tokens: u64) -> Counts {
    Counts { completion_tokens, ..Counts::default() }
}

/// Processor time of this process, seconds.
fn processor() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
    let ticks = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(12) + ticks(13)) / 100.0
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, or: u64| args.get(i).and_then(|arg| arg.parse().ok()).unwrap_or(or);
    let folder = PathBuf::from(args.first().ok_or("a folder is needed")?);
    let (streams, rate, seconds) = (number(1, 256), number(2, 50), number(3, 10));
    let key = ChainKey::new(1, &[0; 32])?;
    let store = SqlStore::open(&folder.join("pace.db"), Some(key), &SqliteOptions::default())?;
    let config = LedgerConfig { takeover: true, ..LedgerConfig::default() };
    let ledger = Ledger::start(Box::new(store), None, config)?;
    let (began, used) = (Instant::now(), processor());
    let begun = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_micros();
    let open = |n: u64| -> Result<Open, Box<dyn std::error::Error>> {
        Ok(ledger.open(Row { id: format!("{begun}-{n}"), ..Row::default() }, Instant::now())?)
    };
    // Each answer has 200 tokens; they begin at different times.
    let mut next = 0;
    let mut live = Vec::new();
    for stream in 0..streams {
        next += 1;
        live.push((open(next)?, stream * 200 / streams));
    }
    let (mut sent, mut held) = (0u64, 0u64);
    for tick in 1..=rate * seconds {
        let due = Duration::from_secs_f64(tick as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        for (handle, tokens) in &mut live {
            *tokens += 1;
            handle.checkpoint(&counts(*tokens));
            sent += 1;
            held += u64::from(handle.permitted().is_none_or(|permitted| permitted < *tokens));
            if *tokens >= 200 {
                let energy_method = EnergyMethod::None;
                let finish = Finish::Length;
                handle.close(&Outcome { counts: counts(*tokens), finish, status: 200, energy_method });
                next += 1;
                (*handle, *tokens) = (open(next)?, 0);
            }
        }
    }
    let used = processor() - used;
    let counters = ledger.counters();
    let commits = counters.commits.get();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{sent} tokens of {next} requests; {held} waited for a checkpoint")?;
    writeln!(
        out,
        "{commits} commits, mean {:.2} ms, {:.1} rows each; {:.1} % of a processor in all",
        counters.commit_micros.get() as f64 / commits as f64 / 1000.0,
        counters.committed_rows.get() as f64 / commits as f64,
        100.0 * used / began.elapsed().as_secs_f64(),
    )?;
    let mut seen = 0;
    for (i, bucket) in counters.commit_buckets.iter().enumerate() {
        seen += bucket.get();
        let bound = COMMIT_SECONDS.get(i).map_or("more".to_owned(), |bound| format!("{} ms", bound * 1000.0));
        writeln!(out, "up to {bound}: {:.2} %", 100.0 * seen as f64 / commits as f64)?;
    }
    drop(out);
    drop(live);
    ledger.stop();
    Ok(())
}
