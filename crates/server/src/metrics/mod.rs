//! The one registry of metrics.
//!
//! Owns every counter of the HTTP surface and what it means. Updates are single relaxed atomic operations;
//! a scrape reads them without a lock. No label takes a value that a client chose.

mod device;
mod histogram;
pub(crate) mod identity;
mod ledger;
mod page;
mod quota;
mod render;
mod usage;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) use device::Device;
pub use device::DeviceFigure;
pub(crate) use histogram::Histogram;
pub(crate) use render::{CONTENT_TYPE, EngineView, Seen, render};

use crate::routes::{ROUTES, RouteId};

/// Grows only.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn inc(&self) {
        self.add(1);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Goes up and down.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicI64);

impl Gauge {
    pub(crate) fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stop,
    Length,
    Abort,
    Error,
}

impl Ended {
    pub(crate) const ALL: [(Self, &'static str); 4] =
        [(Self::Stop, "stop"), (Self::Length, "length"), (Self::Abort, "abort"), (Self::Error, "error")];
}

/// Why a request was not accepted although it was well formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    QueueRequests,
    QueueTokens,
    Workers,
    BodyBudget,
    Loading,
    Draining,
    EngineStopped,
    Ledger,
    Quota,
}

impl Refused {
    pub(crate) const ALL: [(Self, &'static str); 9] = [
        (Self::QueueRequests, "max_num_queued_reqs"),
        (Self::QueueTokens, "max_num_queued_tokens"),
        (Self::Workers, "worker_queue"),
        (Self::BodyBudget, "body_budget"),
        (Self::Loading, "loading"),
        (Self::Draining, "draining"),
        (Self::EngineStopped, "engine_stopped"),
        (Self::Ledger, "ledger"),
        (Self::Quota, "quota"),
    ];
}

/// What is read again when its files change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reloaded {
    ApiKeys,
    Certificates,
    /// Applications, and the secrets beside them.
    Identity,
}

impl Reloaded {
    pub(crate) const ALL: [(Self, &'static str); 3] =
        [(Self::ApiKeys, "api_keys"), (Self::Certificates, "certificates"), (Self::Identity, "identity")];

    /// In words.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ApiKeys => "API keys",
            Self::Certificates => "TLS certificates",
            Self::Identity => "applications and their secrets",
        }
    }
}

/// Status classes; with the routes they are all there is to `mirai_http_requests_total`.
pub(crate) const CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// Buckets of times from a millisecond to minutes, seconds.
pub(crate) const LATENCY: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of times between two tokens, seconds.
pub(crate) const TOKEN_LATENCY: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
];
/// Buckets of token counts.
pub(crate) const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
/// Buckets of `n`.
pub(crate) const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];
/// Buckets of preemptions.
pub(crate) const PREEMPTIONS: &[f64] = &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// Every metric of the HTTP surface.
#[derive(Debug)]
pub(crate) struct Metrics {
    started: Instant,
    /// Answers by route (the last row: no route) and status class.
    http: Vec<[Counter; 4]>,
    finished: [Counter; Ended::ALL.len()],
    refused: [Counter; Refused::ALL.len()],
    /// By [`Reloaded`]: taken, and refused because the files are not usable.
    reloads: [[Counter; 2]; Reloaded::ALL.len()],
    /// Who was let in.
    pub(crate) identity: Arc<identity::IdentityMetrics>,
    /// Open connections.
    pub(crate) connections: Gauge,
    /// Connections accepted.
    pub(crate) accepted: Counter,
    /// `accept` failed (usually: no file descriptor left).
    pub(crate) accept_errors: Counter,
    /// Connections ended because a head or a body came too slowly.
    pub(crate) read_timeouts: Counter,
    /// Connections ended because the client took no byte.
    pub(crate) write_stalls: Counter,
    /// Requests from their head to the end of their answer.
    pub(crate) active: Gauge,
    /// Bytes of bodies that are held.
    pub(crate) body_bytes: Gauge,
    /// Groups of choices that the demultiplexer holds.
    pub(crate) streams: Gauge,
    /// Fields of bodies that nobody knows.
    pub(crate) unknown_fields: Counter,
    /// Requests cancelled because their client was too slow.
    pub(crate) slow_readers: Counter,
    /// Panics caught at a request's boundary.
    pub(crate) panics: Counter,
    /// Requests whose client was gone before their end.
    pub(crate) disconnects: Counter,
    /// Tokens of prompts of accepted requests.
    pub(crate) prompt_tokens: Counter,
    /// Of these, from the prefix cache.
    pub(crate) cached_tokens: Counter,
    /// Output tokens of answers.
    pub(crate) generation_tokens: Counter,
    /// Tokens computed and thrown away.
    pub(crate) wasted_tokens: Counter,
    /// Choices that ended by NaN or infinity.
    pub(crate) corrupted: Counter,
    /// What the device says about itself.
    pub(crate) device: Device,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) time_per_output_token: Histogram,
    pub(crate) e2e: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) decode: Histogram,
    pub(crate) inference: Histogram,
    pub(crate) request_prompt_tokens: Histogram,
    pub(crate) request_generation_tokens: Histogram,
    pub(crate) params_max_tokens: Histogram,
    pub(crate) params_n: Histogram,
    pub(crate) preemptions: Histogram,
    engine_rate: FinishRate,
    job_rate: FinishRate,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let seconds = |bounds| Histogram::new(bounds, 1e-9);
        let counts = |bounds| Histogram::new(bounds, 1.0);
        Self {
            started: Instant::now(),
            http: (0..=ROUTES.len()).map(|_| Default::default()).collect(),
            finished: Default::default(),
            refused: Default::default(),
            reloads: Default::default(),
            identity: Arc::default(),
            connections: Gauge::default(),
            accepted: Counter::default(),
            accept_errors: Counter::default(),
            read_timeouts: Counter::default(),
            write_stalls: Counter::default(),
            active: Gauge::default(),
            body_bytes: Gauge::default(),
            streams: Gauge::default(),
            unknown_fields: Counter::default(),
            slow_readers: Counter::default(),
            panics: Counter::default(),
            disconnects: Counter::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            wasted_tokens: Counter::default(),
            corrupted: Counter::default(),
            device: Device::default(),
            time_to_first_token: seconds(LATENCY),
            inter_token: seconds(TOKEN_LATENCY),
            time_per_output_token: seconds(TOKEN_LATENCY),
            e2e: seconds(LATENCY),
            queue: seconds(LATENCY),
            prefill: seconds(LATENCY),
            decode: seconds(LATENCY),
            inference: seconds(LATENCY),
            request_prompt_tokens: counts(TOKENS),
            request_generation_tokens: counts(TOKENS),
            params_max_tokens: counts(TOKENS),
            params_n: counts(CHOICES),
            preemptions: counts(PREEMPTIONS),
            engine_rate: FinishRate::default(),
            job_rate: FinishRate::default(),
        }
    }

    /// Counts an answer.
    pub(crate) fn answered(&self, route: Option<RouteId>, status: u16) {
        let row = route.map_or(ROUTES.len(), |route| route.0);
        let class = usize::from(status / 100).clamp(2, 5) - 2;
        self.http[row][class].inc();
    }

    /// Counts the end of a choice.
    pub(crate) fn finished(&self, ended: Ended) {
        self.finished[ended as usize].inc();
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, reason: Refused) {
        self.refused[reason as usize].inc();
    }

    /// Counts a change of files: whether what they hold now was taken.
    pub(crate) fn reloaded(&self, what: Reloaded, taken: bool) {
        self.reloads[what as usize][usize::from(!taken)].inc();
    }

    /// Changes taken, changes refused.
    pub(crate) fn reloads(&self, what: Reloaded) -> [u64; 2] {
        let [taken, refused] = &self.reloads[what as usize];
        [taken.get(), refused.get()]
    }

    /// Counts the end of so many of the engine's requests (prompts or items, which its queue counts too).
    pub(crate) fn engine_requests_ended(&self, count: u64) {
        self.engine_rate.count(self.started.elapsed().as_secs(), count);
    }

    /// When a place in the engine's queue of `waiting` requests should be free, at the rate of the last seconds.
    pub(crate) fn queue_drain_time(&self, waiting: u64) -> Duration {
        self.engine_rate.drain_time(waiting, self.started.elapsed().as_secs())
    }

    /// Counts the end of a worker's job.
    pub(crate) fn job_ended(&self) {
        self.job_rate.count(self.started.elapsed().as_secs(), 1);
    }

    /// When a place among `waiting` jobs of the workers should be free, at the rate of the last seconds.
    pub(crate) fn jobs_drain_time(&self, waiting: u64) -> Duration {
        self.job_rate.drain_time(waiting, self.started.elapsed().as_secs())
    }
}

const WINDOW: u64 = 10;

/// What ended in each of the last seconds. Slots are reused; a slot of another second counts as 0.
#[derive(Debug, Default)]
struct FinishRate {
    /// (second << 32) | count
    slots: [AtomicU64; WINDOW as usize],
}

impl FinishRate {
    fn count(&self, second: u64, count: u64) {
        let slot = &self.slots[(second % WINDOW) as usize];
        let _ = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
            Some(if old >> 32 == second & 0xffff_ffff { old + count } else { (second << 32) | count })
        });
    }

    fn per_second(&self, now: u64) -> f64 {
        let recent = |value: u64| now.saturating_sub(value >> 32) < WINDOW;
        let sum: u64 = self
            .slots
            .iter()
            .map(|slot| slot.load(Ordering::Relaxed))
            .filter(|value| recent(*value))
            .map(|value| value & 0xffff_ffff)
            .sum();
        sum as f64 / now.clamp(1, WINDOW) as f64
    }

    /// When a place in a queue of `waiting` should be free.
    fn drain_time(&self, waiting: u64, now: u64) -> Duration {
        let per_second = self.per_second(now);
        if per_second <= 0.0 {
            return Duration::from_secs(10);
        }
        // Not the whole queue has to drain, but at a tenth of it a newcomer stands a chance against others.
        Duration::from_secs_f64((waiting as f64 * 0.1 / per_second).clamp(1.0, 60.0))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_of_the_last_seconds() {
        let rate = FinishRate::default();
        for second in 100..120 {
            rate.count(second, 3);
            rate.count(second, 1);
        }
        assert!((rate.per_second(119) - 4.0).abs() < 1e-9);
        assert!((rate.per_second(124) - 2.0).abs() < 1e-9);
        assert_eq!(rate.per_second(1000), 0.0);
    }

    #[test]
    fn drain_time_follows_the_rate() {
        let rate = FinishRate::default();
        assert_eq!(rate.drain_time(100, 50), Duration::from_secs(10));
        (40..50).for_each(|second| rate.count(second, 5));
        assert_eq!(rate.drain_time(1000, 49), Duration::from_secs(20));
        assert_eq!(rate.drain_time(1, 49), Duration::from_secs(1));
        assert_eq!(rate.drain_time(1 << 40, 49), Duration::from_secs(60));
    }

    #[test]
    fn the_engine_and_the_workers_have_rates_of_their_own() {
        let metrics = Metrics::new();
        metrics.engine_requests_ended(1000);
        assert_eq!(metrics.queue_drain_time(100), Duration::from_secs(1));
        assert_eq!(metrics.jobs_drain_time(100), Duration::from_secs(10), "none is known");
        metrics.job_ended();
        assert!(metrics.jobs_drain_time(600) > Duration::from_secs(30));
    }

    #[test]
    fn indices_match_their_tables() {
        for (i, (ended, _)) in Ended::ALL.iter().enumerate() {
            assert_eq!(*ended as usize, i);
        }
        for (i, (refused, _)) in Refused::ALL.iter().enumerate() {
            assert_eq!(*refused as usize, i);
        }
        for (i, (reloaded, _)) in Reloaded::ALL.iter().enumerate() {
            assert_eq!(*reloaded as usize, i);
        }
    }
}
