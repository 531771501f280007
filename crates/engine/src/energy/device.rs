//! How long steps take.
//!
//! Owns the last time of a step of each size; it never shares anything out.

/// Sizes that are told apart: powers of two of a step's tokens.
const SIZES: usize = 33;

/// Tokens and nanoseconds of the last step of each size; 0 tokens where there was none.
#[derive(Debug)]
pub(super) struct StepTimes([(u64, u64); SIZES]);

impl Default for StepTimes {
    fn default() -> Self {
        Self([(0, 0); SIZES])
    }
}

fn size(tokens: u64) -> usize {
    ((u64::BITS - tokens.leading_zeros()) as usize).min(SIZES - 1)
}

impl StepTimes {
    pub(super) fn note(&mut self, tokens: u64, nanos: u64) {
        self.0[size(tokens)] = (tokens, nanos);
    }

    /// What a step of so many tokens should take: on the line between the nearest smaller and the nearest larger
    /// one, or as long as the nearest where all are on one side.
    pub(super) fn of(&self, tokens: u64) -> u64 {
        let known = |step: &&(u64, u64)| step.0 > 0;
        let at = size(tokens);
        let smaller = self.0[..=at].iter().filter(known).rfind(|step| step.0 <= tokens);
        let larger = self.0[at..].iter().filter(known).find(|step| step.0 >= tokens);
        match (smaller, larger) {
            (Some(&(few, short)), Some(&(many, long))) if many > few => {
                let part = (tokens - few) as f64 / (many - few) as f64;
                (short as f64 + (long as f64 - short as f64) * part) as u64
            }
            (Some(&(_, nanos)), _) | (None, Some(&(_, nanos))) => nanos,
            (None, None) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_what_the_last_of_its_size_took() {
        let mut times = StepTimes::default();
        assert_eq!(times.of(5), 0);
        times.note(300, 3000);
        assert_eq!((times.of(1), times.of(256), times.of(511), times.of(1 << 40)), (3000, 3000, 3000, 3000));
        times.note(500, 5000);
        assert_eq!((times.of(300), times.of(511)), (5000, 5000), "only the last of a size is known");
        times.note(100, 1000);
        times.note(1 << 40, 7);
        assert_eq!([100, 300, 500].map(|tokens| times.of(tokens)), [1000, 3000, 5000]);
    }
}
