//! The figures of quotas on the page of metrics.
//!
//! Owns their names. No application is a label: who is refused reads it in the answer, and operators in the ledger.

use mirai_ledger::quota::{Kind, Quotas};

use super::page::Page;

pub(super) fn quotas(page: &mut Page, quotas: &Quotas) {
    let c = quotas.counters();
    for (name, help, counter) in [
        ("mirai_quota_admitted_total", "Requests admitted, of applications with limits.", &c.admitted),
        ("mirai_quota_waited_total", "Requests that waited for the store.", &c.waited),
        ("mirai_quota_alone_total", "Requests admitted while the store was lost.", &c.alone),
        (
            "mirai_quota_unavailable_total",
            "Requests refused because nobody could tell.",
            &c.refused_unavailable,
        ),
        (
            "mirai_quota_unsettled_total",
            "Reservations whose use was never told; all of it counts.",
            &c.dropped,
        ),
        ("mirai_quota_syncs_total", "Transactions with the store.", &c.syncs),
        ("mirai_quota_sync_failures_total", "Those that failed.", &c.sync_failures),
        ("mirai_quota_given_up_total", "Times others believed this replica dead.", &c.given_up),
        ("mirai_quota_swept_replicas_total", "Dead replicas whose leases were ended here.", &c.swept),
        (
            "mirai_quota_swept_spent_tokens_total",
            "Tokens of their leases that count as spent.",
            &c.swept_spent_tokens,
        ),
        (
            "mirai_quota_swept_returned_tokens_total",
            "Tokens of their leases that came back.",
            &c.swept_returned_tokens,
        ),
    ] {
        page.single(name, "counter", help, counter.get() as f64);
    }
    let name = "mirai_quota_refused_total";
    page.family(name, "counter", "Requests refused, by the limit that was reached.");
    for kind in Kind::ALL {
        page.sample(name, &format!("limit=\"{}\"", kind.word()), c.refused_by(kind) as f64);
    }
    let health = "0: the store counts; 1: it is tried again; 2: it must not be used any more.";
    page.single("mirai_quota_health", "gauge", health, quotas.health() as u64 as f64);
    let name = "mirai_quota_applications";
    page.single(name, "gauge", "Applications whose limits are at hand.", quotas.applications() as f64);
}
