//! When things happened to a choice, and what the metrics are told of it.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::ticket::Ticket;
use crate::metrics::Metrics;

/// The times of one choice.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clock {
    scheduled: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Clock {
    /// The engine took it up.
    pub(super) fn schedule(&mut self, at: Instant) {
        self.scheduled = Some(at);
    }

    /// A token came, of a request that arrived at `arrived`.
    pub(super) fn token(&mut self, arrived: Instant, now: Instant, ticket: &Ticket, metrics: &Metrics) {
        match self.last {
            Some(last) => metrics.inter_token.observe_time(now - last),
            None => {
                self.first = Some(now);
                let since = now.saturating_duration_since(arrived);
                metrics.time_to_first_token.observe_time(since);
                if let Some(scheduled) = self.scheduled {
                    metrics.prefill.observe_time(now.saturating_duration_since(scheduled));
                }
                if ticket.first_token_micros.load(Ordering::Relaxed) == 0 {
                    let micros = u64::try_from(since.as_micros()).unwrap_or(u64::MAX).max(1);
                    ticket.first_token_micros.store(micros, Ordering::Relaxed);
                }
            }
        }
        self.last = Some(now);
    }

    /// The choice ended with so many tokens.
    pub(super) fn end(&self, tokens: u32, now: Instant, metrics: &Metrics) {
        if let Some(scheduled) = self.scheduled {
            metrics.inference.observe_time(now.saturating_duration_since(scheduled));
        }
        if let (Some(first), Some(last)) = (self.first, self.last) {
            metrics.decode.observe_time(now.saturating_duration_since(first));
            if tokens > 1 {
                let mean = (last - first).as_secs_f64() / f64::from(tokens - 1);
                metrics.time_per_output_token.observe(mean);
            }
        }
    }
}
