//! Softmax and the largest value of a row.
//!
//! Owns: their vector loops. Never: what the row means.

use crate::simd::Isa;
use crate::simd::lanes::{Kernel, LANES, Simd};

/// Softmax of one row.
struct Softmax<'a> {
    x: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    /// Logarithm of the sum of exponentials.
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let max = largest(s, self.x);
        if max == f32::NEG_INFINITY {
            return max;
        }
        let (lines, rest) = self.x.as_chunks_mut::<LANES>();
        let mut sum = s.splat(0.0);
        for line in lines.iter_mut() {
            let e = s.exp(s.sub(s.load(line), s.splat(max)));
            sum = s.add(sum, e);
            s.store(e, line);
        }
        let mut padded = [f32::NEG_INFINITY; LANES];
        padded[..rest.len()].copy_from_slice(rest);
        let e = s.exp(s.sub(s.load(&padded), s.splat(max)));
        s.store(e, &mut padded);
        rest.copy_from_slice(&padded[..rest.len()]);
        let sum = s.sum(s.add(sum, e));
        for x in self.x.iter_mut() {
            *x /= sum;
        }
        max + sum.ln()
    }
}

/// Largest value; NaN where there is one.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (lines, rest) = x.as_chunks::<LANES>();
    let mut max = s.splat(f32::NEG_INFINITY);
    for line in lines {
        max = s.max(max, s.load(line));
    }
    let mut padded = [f32::NEG_INFINITY; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    max = s.max(max, s.load(&padded));
    s.largest(max)
}

/// Turns logits into probabilities in place and returns the logarithm of the sum of exponentials. A row of nothing
/// but negative infinity is left as it is.
pub fn softmax(isa: Isa, x: &mut [f32]) -> f32 {
    isa.run(Softmax { x })
}

/// Index of the largest value, the first of equals; `None` for an empty slice or where a value is NaN.
#[must_use]
pub fn argmax(isa: Isa, x: &[f32]) -> Option<usize> {
    struct Largest<'a>(&'a [f32]);
    impl Kernel for Largest<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            largest(s, self.0)
        }
    }
    let max = isa.run(Largest(x));
    x.iter().position(|&v| v == max)
}
