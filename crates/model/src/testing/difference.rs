//! How far numbers are from those that were expected.

/// Differences of all numbers that were compared, in order of size.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    all: Vec<f32>,
}

impl Difference {
    /// Compares lists element by element. What is not a number differs infinitely.
    ///
    /// # Panics
    /// They differ in length.
    pub fn add(&mut self, expected: &[f32], got: &[f32]) {
        assert_eq!(expected.len(), got.len(), "numbers");
        self.all.extend(expected.iter().zip(got).map(|(a, b)| {
            let d = (a - b).abs();
            if d.is_nan() { f32::INFINITY } else { d }
        }));
        self.all.sort_by(f32::total_cmp);
    }

    /// The mean; 0 of none.
    #[must_use]
    pub fn mean(&self) -> f32 {
        self.all.iter().sum::<f32>() / self.all.len().max(1) as f32
    }

    /// The difference below which this share of all lies; 0 of none.
    #[must_use]
    pub fn at(&self, share: f32) -> f32 {
        let last = self.all.len().saturating_sub(1);
        self.all.get((last as f32 * share) as usize).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_ordered_and_nothing_hides() {
        let mut difference = Difference::default();
        assert!(difference.mean().abs() < 1e-9 && difference.at(1.0).abs() < 1e-9);
        difference.add(&[1.0, 2.0], &[1.0, 5.0]);
        difference.add(&[1.0], &[2.0]);
        assert!((difference.mean() - 4.0 / 3.0).abs() < 1e-6);
        assert!((difference.at(0.5) - 1.0).abs() < 1e-6 && (difference.at(1.0) - 3.0).abs() < 1e-6);
        difference.add(&[0.0], &[f32::NAN]);
        assert!(difference.mean().is_infinite() && difference.at(1.0).is_infinite());
    }
}
