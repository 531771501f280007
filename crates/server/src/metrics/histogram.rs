//! A histogram with fixed bounds.
//!
//! Owns its buckets; observing is two relaxed atomic additions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts of observations up to each bound, and their sum in whole units.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    /// One more than `bounds`: the last counts what lies above.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    /// What one unit of `sum` stands for.
    unit: f64,
}

impl Histogram {
    pub(crate) fn new(bounds: &'static [f64], unit: f64) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0), unit }
    }

    pub(crate) fn observe(&self, value: f64) {
        self.observe_many(value, 1);
    }

    /// `n` equal observations.
    pub(crate) fn observe_many(&self, value: f64, n: u64) {
        let value = if value.is_finite() { value.max(0.0) } else { 0.0 };
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.buckets[bucket].fetch_add(n, Ordering::Relaxed);
        self.sum.fetch_add((value / self.unit) as u64 * n, Ordering::Relaxed);
    }

    pub(crate) fn observe_time(&self, time: Duration) {
        self.observe(time.as_secs_f64());
    }

    /// (bound, observations up to it), the sum, and the number of all observations.
    pub(crate) fn read(&self) -> (Vec<(f64, u64)>, f64, u64) {
        let mut total = 0;
        let mut rows = Vec::with_capacity(self.bounds.len());
        for (bucket, bound) in self.buckets.iter().zip(self.bounds) {
            total += bucket.load(Ordering::Relaxed);
            rows.push((*bound, total));
        }
        total += self.buckets.last().map_or(0, |last| last.load(Ordering::Relaxed));
        (rows, self.sum.load(Ordering::Relaxed) as f64 * self.unit, total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_bounds_inclusive() {
        let histogram = Histogram::new(&[1.0, 2.0], 1e-9);
        for value in [0.5, 1.0, 1.5, 9.0, f64::NAN, -3.0] {
            histogram.observe(value);
        }
        let (rows, sum, count) = histogram.read();
        assert_eq!(rows, [(1.0, 4), (2.0, 5)]);
        assert_eq!(count, 6);
        assert!((sum - 12.0).abs() < 1e-6);
        histogram.observe_time(Duration::from_millis(1500));
        assert_eq!(histogram.read().0[1], (2.0, 6));
    }
}
