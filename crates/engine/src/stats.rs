//! The engine's counters: plain numbers on its thread, lock-free copies for everybody else.
//!
//! Owns what is counted and what it means; it never formats a metric (the server does).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds, inclusive, of the tokens of a step that [`Counters::steps_by_tokens`] tells apart; what is larger
/// has a place of its own at the end. vLLM's buckets.
pub const STEP_TOKEN_BOUNDS: [u64; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384];

const STEP_SIZES: usize = STEP_TOKEN_BOUNDS.len() + 1;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Everything that is counted, at one moment. Counters only grow; gauges say so.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
            /// Steps collected, by their tokens: in place `i` those of at most `STEP_TOKEN_BOUNDS[i]` and more than
            /// the bound before.
            pub steps_by_tokens: [u64; STEP_SIZES],
        }

        /// The published copy of [`Counters`]. Written by the engine's thread after each step, read by anybody
        /// without a lock; values of one step may be seen beside values of the next.
        #[derive(Debug, Default)]
        pub struct EngineStats {
            $($name: AtomicU64,)*
            steps_by_tokens: [AtomicU64; STEP_SIZES],
        }

        impl EngineStats {
            /// Reads all of it.
            #[must_use]
            pub fn snapshot(&self) -> Counters {
                Counters {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    steps_by_tokens: std::array::from_fn(|i| self.steps_by_tokens[i].load(Ordering::Relaxed)),
                }
            }

            pub(crate) fn publish(&self, counters: &Counters) {
                $(self.$name.store(counters.$name, Ordering::Relaxed);)*
                for (shown, counted) in self.steps_by_tokens.iter().zip(counters.steps_by_tokens) {
                    shown.store(counted, Ordering::Relaxed);
                }
            }
        }
    };
}

counters! {
    /// Steps collected.
    steps,
    /// Tokens computed in those steps (prefill and decode).
    step_tokens,
    /// Rows in those steps.
    step_rows,
    /// Device time of those steps, nanoseconds.
    device_nanos,
    /// Energy that sequences were charged with, microjoules.
    energy_attributed_microjoules,
    /// Energy of the time in which no step ran, microjoules.
    energy_idle_microjoules,
    /// Gauge: sequences that have a slot.
    running,
    /// Gauge: sequences that wait for a slot, preempted ones and waiting choices included.
    waiting,
    /// Gauge: requests of which no sequence has had a slot yet.
    queued_requests,
    /// Gauge: prompt tokens of those requests.
    queued_tokens,
    /// Gauge: when the oldest of those requests arrived, nanoseconds since the engine's start; 0 without one.
    oldest_queued_nanos,
    /// Gauge: pages that can be given out (the reserved page excluded).
    blocks_total,
    /// Gauge: pages that a sequence holds.
    blocks_used,
    /// Gauge: pages that no sequence holds and the prefix index could still give back.
    blocks_cached,
    /// Gauge: snapshots of recurrent state that are kept.
    snapshots_cached,
    /// Tokens that were looked up in the prefix index.
    prefix_query_tokens,
    /// Of these, tokens that were found.
    prefix_hit_tokens,
    /// Pages whose cached content was given up for another use.
    evictions,
    /// Sequences that lost their slot to be computed again.
    preemptions,
    /// Requests accepted by the scheduler.
    requests,
    /// Of these, requests that left the queue: by a first slot, or by their end. Their growth in a second is how fast
    /// the queue drains.
    dequeued_requests,
    /// Prompt tokens of those requests.
    dequeued_tokens,
    /// Sequences that ended, for whatever reason.
    finished,
    /// Sequences that ended by a fault of their own.
    faults,
    /// Prompt tokens of ended sequences.
    prompt_tokens,
    /// Prompt tokens of ended sequences that came from the prefix index.
    cached_tokens,
    /// Output tokens sent to the demultiplexer, as they are drawn.
    generated_tokens,
    /// Output tokens of ended sequences that belong to their answers.
    completion_tokens,
    /// Tokens of ended sequences that were computed and thrown away.
    wasted_tokens,
    /// Idle integrity checks that found a violated invariant. Anything but 0 is a bug.
    integrity_failures,
}

impl Counters {
    /// Counts a collected step.
    pub(crate) fn count_step(&mut self, tokens: u32, rows: usize) {
        let tokens = u64::from(tokens);
        self.steps += 1;
        self.step_tokens += tokens;
        self.step_rows += rows as u64;
        self.steps_by_tokens[STEP_TOKEN_BOUNDS.partition_point(|bound| *bound < tokens)] += 1;
    }

    /// How long the oldest request has been queued at `now` (time since the engine's start).
    #[must_use]
    pub fn oldest_queued_age(&self, now: Duration) -> Duration {
        if self.queued_requests == 0 {
            return Duration::ZERO;
        }
        now.saturating_sub(Duration::from_nanos(self.oldest_queued_nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_read_back() {
        let stats = EngineStats::default();
        let mut counters = Counters { wasted_tokens: 7, ..Counters::default() };
        for tokens in [1, 2, 8, 9, 16_384, 16_385] {
            counters.count_step(tokens, 1);
        }
        stats.publish(&counters);
        assert_eq!(stats.snapshot(), counters);
        assert_eq!((counters.steps, counters.step_rows, counters.step_tokens), (6, 6, 32_789));
        assert_eq!(counters.steps_by_tokens, [1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn an_empty_queue_has_no_age() {
        let now = Duration::from_secs(9);
        assert_eq!(Counters::default().oldest_queued_age(now), Duration::ZERO);
        let queued =
            Counters { queued_requests: 1, oldest_queued_nanos: 4_000_000_000, ..Counters::default() };
        assert_eq!(queued.oldest_queued_age(now), Duration::from_secs(5));
    }
}
