//! Statistics of samples, with the definitions of numpy that `vllm bench serve` uses: population standard
//! deviation, percentiles by linear interpolation.

/// Summary of one metric, in the unit of the samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Number of samples.
    pub count: usize,
    /// Arithmetic mean; 0 without samples.
    pub mean: f64,
    /// 50th percentile.
    pub median: f64,
    /// Population standard deviation.
    pub std: f64,
    /// Smallest sample.
    pub min: f64,
    /// Largest sample.
    pub max: f64,
    /// (percentile, value), in the order asked for.
    pub percentiles: Vec<(f64, f64)>,
}

impl Summary {
    /// Summarises samples, which are sorted in place. Without samples everything is 0, as in vLLM.
    pub fn of(samples: &mut [f64], percentiles: &[f64]) -> Self {
        samples.sort_unstable_by(f64::total_cmp);
        let count = samples.len();
        let mean = if count == 0 { 0.0 } else { samples.iter().sum::<f64>() / count as f64 };
        let variance = if count == 0 {
            0.0
        } else {
            samples.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count as f64
        };
        Self {
            count,
            mean,
            median: percentile(samples, 50.0),
            std: variance.sqrt(),
            min: samples.first().copied().unwrap_or(0.0),
            max: samples.last().copied().unwrap_or(0.0),
            percentiles: percentiles.iter().map(|&p| (p, percentile(samples, p))).collect(),
        }
    }
}

/// Percentile `p` (0 to 100) of sorted samples by linear interpolation between the closest ranks.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let rank = p / 100.0 * last as f64;
    let low = (rank.floor() as usize).min(last);
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * (rank - low as f64)
}

/// Largest number of intervals `[start, end)` that overlap at one moment.
pub(crate) fn peak_overlap(intervals: impl Iterator<Item = (f64, f64)>) -> usize {
    let mut edges: Vec<(f64, i32)> = Vec::new();
    for (start, end) in intervals {
        edges.push((start, 1));
        edges.push((end, -1));
    }
    // Ends sort before starts at the same moment: a connection that is reused is one.
    edges.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut peak) = (0_i64, 0_i64);
    for (_, change) in edges {
        now += i64::from(change);
        peak = peak.max(now);
    }
    usize::try_from(peak).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * (1.0 + b.abs())
    }

    #[test]
    fn closed_forms_of_1_to_n() {
        for n in [1_u32, 2, 3, 10, 101, 1000] {
            let mut samples: Vec<f64> = (1..=n).rev().map(f64::from).collect();
            let summary = Summary::of(&mut samples, &[0.0, 25.0, 50.0, 90.0, 99.0, 100.0]);
            let n = f64::from(n);
            assert!(close(summary.mean, f64::midpoint(n, 1.0)));
            assert!(close(summary.median, f64::midpoint(n, 1.0)));
            assert!(close(summary.std, ((n * n - 1.0) / 12.0).sqrt()), "{n}: {}", summary.std);
            for (p, value) in summary.percentiles {
                assert!(close(value, 1.0 + p / 100.0 * (n - 1.0)), "{n}: p{p} = {value}");
            }
            assert_eq!((summary.min, summary.max), (1.0, n));
        }
    }

    #[test]
    fn values_from_numpy() {
        // numpy.percentile([15, 20, 35, 40, 50], 40) == 29.0
        let mut samples = [35.0, 15.0, 50.0, 40.0, 20.0];
        assert!(close(Summary::of(&mut samples, &[40.0]).percentiles[0].1, 29.0));
    }

    #[test]
    fn nothing_is_zero() {
        let summary = Summary::of(&mut [], &[99.0]);
        assert_eq!((summary.count, summary.mean, summary.median, summary.std), (0, 0.0, 0.0, 0.0));
        assert_eq!(summary.percentiles, [(99.0, 0.0)]);
    }

    #[test]
    fn overlap() {
        assert_eq!(peak_overlap(std::iter::empty()), 0);
        assert_eq!(peak_overlap([(0.0, 1.0), (1.0, 2.0)].into_iter()), 1);
        assert_eq!(peak_overlap([(0.0, 3.0), (1.0, 2.0), (1.5, 4.0), (5.0, 6.0)].into_iter()), 3);
    }

    proptest! {
        #[test]
        fn percentiles_are_ordered_and_bounded(mut samples in prop::collection::vec(-1e6..1e6_f64, 1..200)) {
            let summary = Summary::of(&mut samples, &[1.0, 50.0, 90.0, 99.0]);
            let values: Vec<f64> = summary.percentiles.iter().map(|p| p.1).collect();
            prop_assert!(values.windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert!(summary.min <= values[0] && values[3] <= summary.max);
            prop_assert!(summary.mean >= summary.min - 1e-6 && summary.mean <= summary.max + 1e-6);
        }

        #[test]
        fn overlap_matches_counting(intervals in prop::collection::vec((0_u8..50, 1_u8..20), 0..40)) {
            let spans: Vec<(f64, f64)> =
                intervals.iter().map(|&(s, d)| (f64::from(s), f64::from(s) + f64::from(d))).collect();
            let by_counting = spans
                .iter()
                .map(|&(at, _)| spans.iter().filter(|&&(s, e)| s <= at && at < e).count())
                .max()
                .unwrap_or(0);
            prop_assert_eq!(peak_overlap(spans.into_iter()), by_counting);
        }
    }
}
