//! The ledger's figures on `/metrics`.
//!
//! Owns their names. Every value is an atomic, or a copy made under a lock that is held for a few numbers.

use std::sync::atomic::Ordering;

use mirai_ledger::{COMMIT_SECONDS, Health, Ledger};

use super::render::{Page, escape};
use crate::events::EventCounters;

/// What the health of the ledger is called.
const HEALTH: [(Health, &str); 5] = [
    (Health::Ok, "ok"),
    (Health::Spooling, "spooling"),
    (Health::Retrying, "retrying"),
    (Health::Unavailable, "unavailable"),
    (Health::Broken, "broken"),
];

/// Writes the figures of a ledger.
pub(super) fn ledger(page: &mut Page, ledger: &Ledger) {
    let counters = ledger.counters();
    page.family("mirai_ledger_health", "gauge", "Whether the ledger is in this state.");
    let health = ledger.health();
    for (state, name) in HEALTH {
        page.sample(
            "mirai_ledger_health",
            &format!("state=\"{name}\""),
            f64::from(u8::from(state == health)),
        );
    }
    for (name, help, value) in [
        ("open_requests", "Requests whose rows are not durably closed.", ledger.open_requests() as u64),
        ("spooled_bytes", "Bytes that wait in the spool.", ledger.spooled_bytes()),
    ] {
        page.single(&format!("mirai_ledger_{name}"), "gauge", help, value as f64);
    }
    for (name, help, counter) in [
        ("opened_rows", "Rows durably opened.", &counters.opened),
        ("closed_rows", "Rows durably closed.", &counters.closed),
        ("closed_completion_tokens", "Completion tokens in rows durably closed.", &counters.closed_tokens),
        ("conflicts", "Rows refused because another request has their id.", &counters.conflicts),
        ("committed_rows", "Rows in commits.", &counters.committed_rows),
        ("commit_failures", "Commits that failed.", &counters.commit_failures),
        ("spooled_rows", "Rows written to the spool.", &counters.spooled_rows),
        ("replayed_rows", "Rows replayed from the spool.", &counters.replayed_rows),
        ("recovered_rows", "Rows of dead writers closed here.", &counters.recovered_rows),
        ("fenced", "Times this writer was given up by others.", &counters.fenced),
    ] {
        page.single(&format!("mirai_ledger_{name}_total"), "counter", help, counter.get() as f64);
    }
    let name = "mirai_ledger_refused_requests_total";
    page.family(name, "counter", "Requests refused because they could not be accounted for.");
    page.sample(name, "reason=\"unavailable\"", counters.refused_unavailable.get() as f64);
    page.sample(name, "reason=\"full\"", counters.refused_full.get() as f64);
    let mut so_far = 0;
    let rows: Vec<(f64, u64)> = COMMIT_SECONDS
        .iter()
        .zip(&counters.commit_buckets)
        .map(|(bound, bucket)| {
            so_far += bucket.get();
            (*bound, so_far)
        })
        .collect();
    let all = so_far + counters.commit_buckets.last().map_or(0, |last| last.get());
    let sum = counters.commit_micros.get() as f64 / 1e6;
    page.buckets("mirai_ledger_commit_seconds", "Time of commits that succeeded.", "", &rows, sum, all);
    by_application(page, ledger);
}

/// Figures by application, where that is configured. Names come from configuration, never from clients.
fn by_application(page: &mut Page, ledger: &Ledger) {
    let all = ledger.by_application();
    if all.is_empty() {
        return;
    }
    type Pick = fn(&mirai_ledger::ApplicationCounts) -> u64;
    let families: [(&str, &str, Pick); 4] = [
        ("requests", "Requests that ended, by application.", |counts| counts.requests),
        ("prompt_tokens", "Tokens of prompts, by application.", |counts| counts.prompt_tokens),
        ("cached_tokens", "Tokens of prompts not computed again, by application.", |counts| {
            counts.cached_tokens
        }),
        ("completion_tokens", "Tokens of answers, by application.", |counts| counts.completion_tokens),
    ];
    for (name, help, pick) in families {
        let name = format!("mirai_ledger_application_{name}_total");
        page.family(&name, "counter", help);
        for (application, counts) in &all {
            page.sample(&name, &format!("application=\"{}\"", escape(application)), pick(counts) as f64);
        }
    }
}

/// Writes the figures of the exporter of events.
pub(super) fn events(page: &mut Page, counters: &EventCounters) {
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
    let name = "mirai_ledger_events";
    page.single(
        &format!("{name}_delivered_total"),
        "counter",
        "Usage events that their receiver took.",
        get(&counters.delivered),
    );
    let help = "Attempts to deliver a usage event, or to read what to deliver, that failed.";
    page.single(&format!("{name}_failures_total"), "counter", help, get(&counters.failures));
    let help = "Links of chains that the receiver of usage events was not told of.";
    page.single(&format!("{name}_pending"), "gauge", help, get(&counters.pending));
    let help = "Age of the oldest usage event that was not delivered; 0 where another replica delivers.";
    page.single(&format!("{name}_lag_seconds"), "gauge", help, get(&counters.lag_micros) / 1e6);
}
