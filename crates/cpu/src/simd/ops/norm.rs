//! Norms: by the root of the mean square, or by the standard deviation around the mean.
//!
//! Owns: their vector loops. Never: where a model places them.

use super::{Heads, add_row, for_rows, load_at, rows_of, store_at};
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::lanes::{Kernel, LANES, Simd};
use crate::simd::shared::SharedMut;

/// Parameters of a norm: `x / size * (weight + offset) + bias`.
#[derive(Debug, Clone, Copy)]
pub struct NormParams<'a> {
    /// Whether the mean is subtracted first, so that the size is the standard deviation.
    pub center: bool,
    /// One a value of the row; without, nothing multiplies.
    pub weight: Option<&'a [f32]>,
    /// One a value of the row.
    pub bias: Option<&'a [f32]>,
    /// Added to each weight.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormParams<'_> {
    fn check(&self, width: usize) {
        for part in [self.weight, self.bias].into_iter().flatten() {
            assert!(part.len() == width, "a norm of {} over rows of {width}", part.len());
        }
    }
}

/// Norm of one row; with `add`, first `x += add.1 * add.0`.
pub(crate) struct NormRow<'a> {
    pub(crate) norm: NormParams<'a>,
    /// Read, and written where there is no `out`.
    pub(crate) x: &'a mut [f32],
    pub(crate) add: Option<(&'a [f32], f32)>,
    pub(crate) out: Option<&'a mut [f32]>,
}

/// Sum of the squares of `x - mean`; lines first, then the rest.
#[inline(always)]
fn squares<S: Simd>(s: S, x: &[f32], mean: f32) -> f32 {
    let mut square = s.splat(0.0);
    let (lines, rest) = x.as_chunks::<LANES>();
    for line in lines {
        let v = s.sub(s.load(line), s.splat(mean));
        square = s.fma(v, v, square);
    }
    s.sum(square) + rest.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>()
}

/// Mean of a row.
#[inline(always)]
fn mean<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    let (lines, rest) = x.as_chunks::<LANES>();
    for line in lines {
        sum = s.add(sum, s.load(line));
    }
    (s.sum(sum) + rest.iter().sum::<f32>()) / x.len() as f32
}

impl Kernel for NormRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, add, out } = self;
        if let Some((add, scale)) = add {
            add_row(s, x, add, scale);
        }
        let mean = if norm.center { mean(s, x) } else { 0.0 };
        let inverse = 1.0 / (squares(s, x, mean) / x.len() as f32 + norm.eps).sqrt();
        let to = match out {
            Some(out) => {
                out.copy_from_slice(x);
                out
            }
            None => x,
        };
        for at in (0..to.len()).step_by(LANES) {
            let mut v = load_at(s, to, at);
            if norm.center {
                v = s.sub(v, s.splat(mean));
            }
            v = s.mul(v, s.splat(inverse));
            if let Some(weight) = norm.weight {
                v = s.mul(v, s.add(load_at(s, weight, at), s.splat(norm.offset)));
            }
            if let Some(bias) = norm.bias {
                v = s.add(v, load_at(s, bias, at));
            }
            store_at(s, v, to, at);
        }
    }
}

/// `out = norm(x)` for each row of `width`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn norm(pool: &Pool, isa: Isa, x: &[f32], width: usize, norm: NormParams<'_>, out: &mut [f32]) {
    assert!(x.len() == out.len(), "a norm of {} values into {}", x.len(), out.len());
    norm.check(width);
    let rows = rows_of(x.len(), width);
    let out = SharedMut::new(out);
    for_rows(pool, rows, width, &|range| {
        for row in range {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is computed by one thread.
            let out = unsafe { out.range(at.clone()) };
            out.copy_from_slice(&x[at]);
            isa.run(NormRow { norm, x: out, add: None, out: None });
        }
    });
}

/// `residual += scale * x`, then `out` is the norm of each row of `residual`.
///
/// # Panics
/// When the lengths do not fit together.
#[allow(clippy::too_many_arguments)] // one more than the lint allows, and none of them optional
pub fn add_norm(
    pool: &Pool,
    isa: Isa,
    residual: &mut [f32],
    (x, scale): (&[f32], f32),
    width: usize,
    norm: NormParams<'_>,
    out: &mut [f32],
) {
    let len = x.len();
    assert!(residual.len() == len && out.len() == len, "{} += {len}, into {}", residual.len(), out.len());
    norm.check(width);
    let rows = rows_of(len, width);
    let (residual, out) = (SharedMut::new(residual), SharedMut::new(out));
    for_rows(pool, rows, width, &|range| {
        for row in range {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is computed by one thread.
            let (residual, out) = unsafe { (residual.range(at.clone()), out.range(at.clone())) };
            isa.run(NormRow { norm, x: residual, add: Some((&x[at], scale)), out: Some(out) });
        }
    });
}

/// Norms each head of each of `rows` rows in place; weights have one value per value of a head.
///
/// # Panics
/// When the lengths do not fit together.
pub fn head_norm(pool: &Pool, isa: Isa, x: &mut [f32], heads: Heads, rows: usize, norm: NormParams<'_>) {
    heads.check(x.len(), rows);
    let width = heads.head_dim;
    norm.check(width);
    let x = SharedMut::new(x);
    for_rows(pool, rows, heads.heads * width, &|range| {
        for (row, head) in range.flat_map(|row| (0..heads.heads).map(move |head| (row, head))) {
            let at = heads.at(row, head);
            // SAFETY: each row is computed by one thread, and heads do not overlap.
            let x = unsafe { x.range(at..at + width) };
            isa.run(NormRow { norm, x, add: None, out: None });
        }
    });
}
