//! Unnormalised probabilities of a row: `exp((logit - peak) / temperature)`, and their sum.
//!
//! Owns the exponential of this crate's sampler: branch-free, so that the compiler vectorises it for whatever the
//! target has, and the same numbers on every target.

/// Weights are zero below this exponent; `e^-87` is the smallest that is still a normal number.
const LOWEST: f32 = -87.0;
/// Adding and subtracting it rounds to a whole number.
const ROUNDER: f32 = 12_582_912.0;

/// `e^x` for `x <= 0`, relative error below 3e-7; 0 below [`LOWEST`]. `e^0` is exactly 1.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let clamped = if x > LOWEST { x } else { LOWEST };
    let n = (clamped * std::f32::consts::LOG2_E + ROUNDER) - ROUNDER;
    // Cody and Waite: ln 2 in two parts, the first exact times any n here.
    let r = clamped - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let scale = f32::from_bits(((n as i32 + 127) << 23).cast_unsigned());
    if x > LOWEST { p * scale } else { 0.0 }
}

/// Writes the weights of a row; `peak` is its largest value and `scale` the reciprocal of the temperature.
pub(crate) fn fill(row: &[f32], peak: f32, scale: f32, out: &mut Vec<f32>) {
    // Only the length matters here: every element is written below.
    out.resize(row.len(), 0.0);
    for (w, x) in out.iter_mut().zip(row) {
        *w = exp((x - peak) * scale);
    }
}

/// Sum in double precision, in a fixed order.
pub(crate) fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (chunks, rest) = weights.as_chunks::<8>();
    for chunk in chunks {
        for (lane, w) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*w);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|w| f64::from(*w)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_accurate() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        for i in 0..87_000 {
            let x = -(i as f32) * 0.001;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
    }

    #[test]
    fn weights_and_their_sum() {
        let row: Vec<f32> = (0..1003).map(|i| ((i * 37) % 101) as f32 * 0.1).collect();
        let mut weights = Vec::new();
        fill(&row, 10.0, 0.5, &mut weights);
        let want: f64 = row.iter().map(|x| ((f64::from(*x) - 10.0) * 0.5).exp()).sum();
        assert!((sum(&weights) - want).abs() < 1e-6 * want);
        assert_eq!(weights.len(), row.len());
    }
}
