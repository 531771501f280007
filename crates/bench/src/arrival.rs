//! Arrival process of the open loop: absolute times, drawn before the run so that a slow client cannot
//! stretch the schedule.

use std::time::Duration;

use rand::Rng;

/// Times of `count` arrivals since the start. Gaps are gamma distributed with mean `1 / rate` seconds and
/// shape `burstiness`: 1 gives a Poisson process, smaller values are burstier (variance of a gap is
/// `1 / (burstiness * rate^2)`).
pub(crate) fn arrivals(rng: &mut impl Rng, count: usize, rate: f64, burstiness: f64) -> Vec<Duration> {
    let scale = 1.0 / (rate * burstiness);
    let mut at = 0.0;
    (0..count)
        .map(|_| {
            let now = at;
            at += scale * gamma(rng, burstiness);
            seconds(now)
        })
        .collect()
}

/// `Duration::from_secs_f64` that saturates at 100 years instead of panicking.
pub(crate) fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, 3.2e9))
}

/// A sample of the gamma distribution with the given shape and scale 1.
///
/// G. Marsaglia, W. W. Tsang, "A simple method for generating gamma variables", ACM TOMS 26 (2000); shapes
/// below 1 by their boost `gamma(k) = gamma(k + 1) * u^(1/k)`.
fn gamma(rng: &mut impl Rng, shape: f64) -> f64 {
    if (shape - 1.0).abs() < f64::EPSILON {
        return -open01(rng).ln();
    }
    if shape < 1.0 {
        return gamma(rng, shape + 1.0) * open01(rng).powf(1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    // Accepts more than 95 % of the draws, so the bound is never met in practice.
    for _ in 0..10_000 {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && open01(rng).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
    shape
}

/// Standard normal by Box and Muller.
fn normal(rng: &mut impl Rng) -> f64 {
    (-2.0 * open01(rng).ln()).sqrt() * (std::f64::consts::TAU * open01(rng)).cos()
}

/// Uniform in (0, 1]: its logarithm is finite.
fn open01(rng: &mut impl Rng) -> f64 {
    1.0 - rng.random::<f64>()
}

#[cfg(test)]
#[allow(clippy::print_stdout)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn fresh_seed() -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_nanos() as u64)
    }

    /// Mean and variance of the gaps.
    fn moments(times: &[Duration]) -> (f64, f64) {
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance)
    }

    #[test]
    fn mean_and_variance_of_the_gaps() {
        let seed = fresh_seed();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let count = 200_000;
        for (rate, burstiness) in [(10.0, 1.0), (0.5, 1.0), (200.0, 0.25), (3.0, 4.0), (7.0, 0.5)] {
            let times = arrivals(&mut rng, count + 1, rate, burstiness);
            assert_eq!(times[0], Duration::ZERO);
            let (mean, variance) = moments(&times);
            let expected = 1.0 / (burstiness * rate * rate);
            // Six standard errors; kurtosis of the gamma distribution is 3 + 6 / shape.
            let n = count as f64;
            let mean_error = 6.0 * (expected / n).sqrt();
            let variance_error = 6.0 * expected * ((2.0 + 6.0 / burstiness) / n).sqrt();
            assert!((mean - 1.0 / rate).abs() < mean_error, "rate {rate}: mean {mean}");
            assert!((variance - expected).abs() < variance_error, "rate {rate}: {variance} vs {expected}");
        }
    }

    #[test]
    fn poisson_counts_have_equal_mean_and_variance() {
        let seed = fresh_seed();
        println!("seed {seed}");
        let times = arrivals(&mut StdRng::seed_from_u64(seed), 200_000, 5.0, 1.0);
        let mut counts = vec![0.0_f64; times[times.len() - 1].as_secs() as usize];
        for time in &times {
            if let Some(count) = counts.get_mut(time.as_secs() as usize) {
                *count += 1.0;
            }
        }
        let n = counts.len() as f64;
        let mean = counts.iter().sum::<f64>() / n;
        let variance = counts.iter().map(|count| (count - mean).powi(2)).sum::<f64>() / n;
        assert!((variance / mean - 1.0).abs() < 6.0 * (2.0 / n).sqrt(), "{variance} / {mean}");
    }

    #[test]
    fn same_seed_same_times() {
        let draw = |seed| arrivals(&mut StdRng::seed_from_u64(seed), 100, 2.0, 0.7);
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(3).windows(2).all(|pair| pair[0] <= pair[1]));
    }

    #[test]
    fn huge_times_saturate() {
        assert_eq!(seconds(f64::INFINITY), Duration::from_secs(3_200_000_000));
        assert_eq!(seconds(-1.0), Duration::ZERO);
    }
}
