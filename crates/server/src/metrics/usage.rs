//! Figures of usage by application, where that is configured, and of the events that tell of it.
//!
//! Owns their names. An application's name comes from configuration, never from a client.

use std::sync::atomic::Ordering;

use mirai_ledger::Ledger;

use super::page::{Page, escape};
use crate::events::EventCounters;

/// Writes the figures by application: none unless they are kept.
pub(super) fn by_application(page: &mut Page, ledger: &Ledger) {
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
