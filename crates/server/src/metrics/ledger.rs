//! The ledger's figures on the page of metrics.
//!
//! Owns their names. Neither an application nor a key is a label here: both are for who reads the ledger.

use mirai_ledger::{COMMIT_SECONDS, Ledger};

use super::page::Page;

pub(super) fn ledger(page: &mut Page, ledger: &Ledger) {
    let c = ledger.counters();
    for (name, help, counter) in [
        ("mirai_ledger_rows_opened_total", "Rows durably opened.", &c.opened),
        ("mirai_ledger_rows_closed_total", "Rows durably closed.", &c.closed),
        ("mirai_ledger_closed_tokens_total", "Output tokens in rows durably closed.", &c.closed_tokens),
        ("mirai_ledger_conflicts_total", "Rows refused because another has their id.", &c.conflicts),
        ("mirai_ledger_committed_rows_total", "Rows in commits that succeeded.", &c.committed_rows),
        ("mirai_ledger_commit_failures_total", "Commits that failed.", &c.commit_failures),
        ("mirai_ledger_spooled_rows_total", "Rows written to the spool.", &c.spooled_rows),
        ("mirai_ledger_replayed_rows_total", "Rows replayed from it.", &c.replayed_rows),
        ("mirai_ledger_recovered_rows_total", "Rows of dead writers closed here.", &c.recovered_rows),
        ("mirai_ledger_fenced_total", "Times this writer was given up by others.", &c.fenced),
    ] {
        page.single(name, "counter", help, counter.get() as f64);
    }
    for (name, help, value) in [
        (
            "mirai_ledger_open_rows",
            "Requests whose rows are not durably closed.",
            ledger.open_requests() as u64,
        ),
        ("mirai_ledger_spool_bytes", "Bytes that wait in the spool.", ledger.spooled_bytes()),
        (
            "mirai_ledger_health",
            "0: in order; 1: rows go to the spool; 2: the store is tried again; 3: out of reach; 4: broken.",
            ledger.health() as u64,
        ),
    ] {
        page.single(name, "gauge", help, value as f64);
    }
    let mut total = 0;
    let mut rows = Vec::with_capacity(COMMIT_SECONDS.len());
    for (bound, bucket) in COMMIT_SECONDS.iter().zip(&c.commit_buckets) {
        total += bucket.get();
        rows.push((*bound, total));
    }
    let beyond = c.commit_buckets.last().map_or(0, mirai_ledger::Counter::get);
    let sum = c.commit_micros.get() as f64 * 1e-6;
    page.buckets(
        "mirai_ledger_commit_seconds",
        "Time in commits that succeeded.",
        "",
        &rows,
        sum,
        total + beyond,
    );
}
