//! `mirai usage`: what was used, by whom; and what is kept of people.
//!
//! Owns the order of each command. Formats, sums and erasing belong to `mirai-ledger`.

mod args;
mod serve;

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use mirai_ledger::export::{ExportError, Exported, Footprint, Request, export};
use mirai_ledger::location::Location;
use mirai_ledger::store::sqlite::system_micros;
use mirai_ledger::store::{MAX_FILTER, UsageQuery};
use mirai_ledger::{State, StoreError, date, event, registry_json, verify};

pub(crate) use args::UsageArgs;
use args::{BeforeArgs, LedgerArgs, ReportArgs, RowsArgs, UsageCommand, grouping};
pub(crate) use serve::{check, start};

use crate::config::LedgerConfig;
use crate::exit::Failure;
use crate::{ledger, prices};

/// Rows read, erased or removed at a time: each time is one transaction, so others wait shortly.
const BATCH: usize = 1000;

pub(crate) fn run(args: &UsageArgs) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    let notes = match &args.command {
        None => report(&args.ledger, &args.report, system_micros(), &mut out),
        Some(UsageCommand::Rows(args)) => rows(args, &mut out),
        Some(UsageCommand::Anonymize(args)) => anonymize(args, system_micros()),
        Some(UsageCommand::Purge(args)) => purge(args, system_micros()),
        Some(UsageCommand::Verify(args)) => verified(args, &mut out),
        Some(UsageCommand::Registry) => registry(&mut out),
    }?;
    notes.iter().for_each(|note| say(note));
    Ok(())
}

/// What is no part of the output.
#[allow(clippy::print_stderr, reason = "standard output may be a file of data")]
fn say(note: &str) {
    eprintln!("mirai: {note}");
}

/// What a command has to say beside its output.
type Notes = Vec<String>;

fn config(args: &LedgerArgs) -> LedgerConfig {
    LedgerConfig {
        store: args.ledger.clone(),
        password_file: args.ledger_password_file.clone(),
        password: std::env::var("MIRAI_LEDGER_PASSWORD").ok(),
        chain_key_file: args.chain_key_file.clone(),
        ..LedgerConfig::default()
    }
}

fn place(args: &LedgerArgs) -> Result<Location, Failure> {
    ledger::place(&config(args))?.ok_or_else(|| Failure::usage("which ledger? Give --ledger URL"))
}

/// Out of reach is the environment's fault, damage is found by the run.
fn store_failure(location: &Location) -> impl Fn(StoreError) -> Failure {
    move |error| {
        let text = format!("ledger {location}: {error}");
        match error {
            StoreError::Unavailable(_) | StoreError::Locked(_) => Failure::environment(text),
            StoreError::NoKey => Failure::usage("a purge must be signed: give --chain-key-file"),
            _ => Failure::run(text),
        }
    }
}

fn query(args: &ReportArgs, now: i64) -> Result<UsageQuery, Failure> {
    let from = args.from.map_or_else(|| date::month(now).0, |moment| moment.0);
    let to = args.to.map_or(now, |moment| moment.0);
    if from >= to {
        let (from, to) = (date::rfc3339(from), date::rfc3339(to));
        return Err(Failure::usage(format!("--from {from} is not before --to {to}")));
    }
    for (flag, values) in [("application", &args.application), ("key", &args.key), ("model", &args.model)] {
        if values.len() > MAX_FILTER {
            return Err(Failure::usage(format!("--{flag}: {} values, at most {MAX_FILTER}", values.len())));
        }
    }
    Ok(UsageQuery {
        from,
        to,
        bucket: args.bucket.micros(),
        group_by: grouping(&args.group_by),
        applications: args.application.clone(),
        key_ids: args.key.clone(),
        models: args.model.clone(),
        ..UsageQuery::ALL
    })
}

fn footprint(args: &ReportArgs) -> Result<Option<Footprint>, Failure> {
    let (Some(pue), Some(kg_per_kwh)) = (args.pue, args.grid_factor) else { return Ok(None) };
    if !(1.0..=10.0).contains(&pue) || !(0.0..=10.0).contains(&kg_per_kwh) {
        return Err(Failure::usage("--pue must be from 1 to 10, and --grid-factor from 0 to 10"));
    }
    Ok(Some(Footprint { pue, kg_per_kwh }))
}

fn report(
    ledger: &LedgerArgs,
    args: &ReportArgs,
    now: i64,
    out: &mut (dyn Write + Send),
) -> Result<Notes, Failure> {
    let book = args.prices.as_deref().map(prices::read).transpose()?;
    let request = Request {
        query: query(args, now)?,
        prices: book.as_ref(),
        footprint: footprint(args)?,
        account: args.account.clone(),
    };
    let location = place(ledger)?;
    let failed = store_failure(&location);
    let mut store = location.open_reading().map_err(&failed)?;
    let done = to_file(args.output.as_deref(), out, |out| {
        export(&mut *store, &request, args.format.into(), out).map_err(|error| match error {
            ExportError::Store(error) => failed(error),
            ExportError::TooLong => Failure::usage(error),
            ExportError::Write(_) => Failure::run(error),
        })
    })?;
    Ok(report_notes(&done))
}

fn report_notes(done: &Exported) -> Notes {
    let note = |n: u64, what: &str| (n > 0).then(|| format!("{n} {what}"));
    let open = note(done.open, "requests still run and are in no sum");
    let unpriced = note(done.unpriced, "requests have no price");
    open.into_iter().chain(unpriced).collect()
}

/// Runs `write` on standard output, or on a file that takes its name when it is whole.
fn to_file<T>(
    path: Option<&Path>,
    out: &mut (dyn Write + Send),
    write: impl FnOnce(&mut (dyn Write + Send)) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let Some(path) = path else { return write(&mut BufWriter::new(out)) };
    let failed = |error: std::io::Error| Failure::run(format!("{}: {error}", path.display()));
    let part = PathBuf::from(format!("{}.part", path.display()));
    let file = std::fs::File::create(&part).map_err(failed)?;
    let mut buffered = BufWriter::new(file);
    let done = write(&mut buffered).and_then(|done| {
        let file = buffered.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        std::fs::rename(&part, path).map_err(failed)?;
        Ok(done)
    });
    if done.is_err() {
        // The reason is told; that half a file could not be removed adds nothing.
        let _ = std::fs::remove_file(&part);
    }
    done
}

fn rows(args: &RowsArgs, out: &mut (dyn Write + Send)) -> Result<Notes, Failure> {
    let location = place(&args.ledger)?;
    let failed = store_failure(&location);
    let mut store = location.open_reading().map_err(&failed)?;
    let from = args.from.map_or(0, |moment| moment.0);
    let to = args.to.map_or(i64::MAX, |moment| moment.0);
    let open = to_file(args.output.as_deref(), out, |out| {
        let (mut after, mut open) = (String::new(), 0);
        loop {
            let page = store.rows(&after, BATCH).map_err(&failed)?;
            let Some(last) = page.last() else { break };
            last.id.clone_into(&mut after);
            for row in page.iter().filter(|row| (from..to).contains(&row.queued_at)) {
                if row.state == State::Open {
                    open += 1;
                    continue;
                }
                let record = serde_json::Value::Object(event::record(row, args.with_user));
                writeln!(out, "{record}").map_err(Failure::run)?;
            }
        }
        out.flush().map_err(Failure::run)?;
        Ok(open)
    })?;
    Ok(report_notes(&Exported { open, ..Exported::default() }))
}

/// A time to erase up to. What is still to come would be erased the moment it ends.
fn passed(args: &BeforeArgs, now: i64) -> Result<i64, Failure> {
    if args.before.0 > now {
        return Err(Failure::usage(format!("--before {} has not come yet", date::rfc3339(args.before.0))));
    }
    Ok(args.before.0)
}

fn anonymize(args: &BeforeArgs, now: i64) -> Result<Notes, Failure> {
    let before = passed(args, now)?;
    let location = place(&args.ledger)?;
    let failed = store_failure(&location);
    let mut store = location.open_beside(None).map_err(&failed)?;
    let mut total = 0;
    loop {
        let done = store.anonymize(before, BATCH).map_err(&failed)?;
        total += done;
        if done == 0 {
            return Ok(vec![format!("{total} requests have no pseudonym any more")]);
        }
    }
}

fn purge(args: &BeforeArgs, now: i64) -> Result<Notes, Failure> {
    let before = passed(args, now)?;
    let location = place(&args.ledger)?;
    let failed = store_failure(&location);
    let key = ledger::chain_key(args.ledger.chain_key_file.as_deref())?;
    if key.is_none() {
        return Err(failed(StoreError::NoKey));
    }
    let mut store = location.open_beside(key).map_err(&failed)?;
    let (mut rows, mut links) = (0, 0);
    loop {
        let done = store.purge(before, BATCH).map_err(&failed)?;
        (rows, links) = (rows + done.rows, links + done.links);
        if !done.more {
            return Ok(vec![format!("{rows} requests and {links} links of chains were removed")]);
        }
    }
}

fn verified(args: &LedgerArgs, out: &mut (dyn Write + Send)) -> Result<Notes, Failure> {
    let location = place(args)?;
    let failed = store_failure(&location);
    let key = ledger::chain_key(args.chain_key_file.as_deref())?;
    let mut store = location.open_reading().map_err(&failed)?;
    let found = verify(&mut *store, key.as_ref()).map_err(&failed)?;
    let mut write = |line: String| writeln!(out, "{line}").map_err(Failure::run);
    write(format!(
        "{} chains, {} links, {} requests of which {} run; {} were purged",
        found.chains, found.links, found.rows, found.open, found.purged
    ))?;
    for problem in &found.problems {
        write(problem.to_string())?;
    }
    if !found.is_sound() {
        return Err(Failure::run(format!("ledger {location}: {} problems", found.problem_count)));
    }
    write("sound".to_owned())?;
    let note = |n: u64, what: &str| (n > 0).then(|| format!("{n} {what}"));
    let unsigned = note(found.unsigned, "heads or purges whose signature was not checked");
    let newer = note(found.newer, "rows of a newer version whose digest was not checked");
    Ok(unsigned.into_iter().chain(newer).collect())
}

fn registry(out: &mut (dyn Write + Send)) -> Result<Notes, Failure> {
    writeln!(out, "{}", registry_json()).map_err(Failure::run)?;
    Ok(Vec::new())
}

#[cfg(test)]
mod tests;
