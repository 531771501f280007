//! Operations on rows of activations: norms, rotation, activations, gates, sums, softmax, argmax.
//!
//! Owns: their vector loops. Never: shapes of a model beyond what a call says.
//!
//! A row is computed by one thread in one order, so results depend neither on the batch nor on the threads.

mod activation;
mod norm;
mod rope;
mod softmax;

pub use activation::{Activation, Glu, activate, glu};
pub use norm::{NormParams, add_norm, head_norm, norm};
pub use rope::{Pairs, RopeTables, rope, scale_heads};
pub use softmax::{argmax, softmax};

pub(crate) use norm::NormRow;

use super::Isa;
use super::lanes::{Kernel, LANES, Simd};
use super::shared::SharedMut;
use crate::pool::Pool;

/// Values that make splitting worth a dispatch.
const PARALLEL: usize = 16 * 1024;

/// Where the heads of a row lie: row `t` of a buffer starts at `t * stride`, its heads at `first` within the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Values from a row to the next.
    pub stride: usize,
    /// First value of the first head in a row.
    pub first: usize,
    /// Heads.
    pub heads: usize,
    /// Values of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Rows that hold nothing but these heads.
    #[must_use]
    pub fn contiguous(heads: usize, head_dim: usize) -> Self {
        Self { stride: heads * head_dim, first: 0, heads, head_dim }
    }

    /// First value of a head.
    fn at(self, row: usize, head: usize) -> usize {
        row * self.stride + self.first + head * self.head_dim
    }

    /// A head of a row.
    pub(crate) fn of(self, x: &[f32], row: usize, head: usize) -> &[f32] {
        let at = self.at(row, head);
        &x[at..at + self.head_dim]
    }

    /// All heads of a row as one.
    #[must_use]
    pub fn joined(self) -> Self {
        Self { heads: 1, head_dim: self.heads * self.head_dim, ..self }
    }

    /// Asserts that a slice of `len` values holds `rows` rows.
    pub(crate) fn check(self, len: usize, rows: usize) {
        let width = self.first + self.heads * self.head_dim;
        assert!(width <= self.stride, "heads end at {width} in rows of {}", self.stride);
        assert!(len >= rows * self.stride, "{rows} rows of {} in a slice of {len}", self.stride);
    }
}

/// Runs `f` over all rows, split over the threads when they hold enough values.
fn for_rows(pool: &Pool, rows: usize, width: usize, f: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
    if rows * width < PARALLEL {
        f(0..rows);
    } else {
        pool.chunks(rows, rows.div_ceil(pool.threads() * 4), &|_, range| f(range));
    }
}

/// Number of rows of `width` in `len` values.
fn rows_of(len: usize, width: usize) -> usize {
    assert!(width > 0 && len.is_multiple_of(width), "{len} values are no whole rows of {width}");
    len / width
}

/// Sixteen values from `at`; zeros beyond the end.
#[inline(always)]
pub(crate) fn load_at<S: Simd>(s: S, x: &[f32], at: usize) -> S::F {
    if let Some(line) = x.get(at..).and_then(<[f32]>::first_chunk::<LANES>) {
        return s.load(line);
    }
    let mut padded = [0.0; LANES];
    let rest = &x[at..];
    padded[..rest.len()].copy_from_slice(rest);
    s.load(&padded)
}

/// Writes sixteen values at `at`; those beyond the end are dropped.
#[inline(always)]
pub(crate) fn store_at<S: Simd>(s: S, v: S::F, x: &mut [f32], at: usize) {
    let rest = &mut x[at..];
    if let Some(line) = rest.first_chunk_mut::<LANES>() {
        s.store(v, line);
    } else {
        let mut padded = [0.0; LANES];
        s.store(v, &mut padded);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

/// `x += scale * add`.
#[inline(always)]
fn add_row<S: Simd>(s: S, x: &mut [f32], add: &[f32], scale: f32) {
    let scale = s.splat(scale);
    for at in (0..x.len()).step_by(LANES) {
        let sum = s.fma(load_at(s, add, at), scale, load_at(s, x, at));
        store_at(s, sum, x, at);
    }
}

/// `x += scale * add`.
struct AddRow<'a> {
    x: &'a mut [f32],
    add: &'a [f32],
    scale: f32,
}

impl Kernel for AddRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        add_row(s, self.x, self.add, self.scale);
    }
}

/// `x += scale * add`; where `add` is shorter it is one row that is added to every row of `x` (a bias).
///
/// # Panics
/// When `x` is no whole number of rows.
pub fn add(pool: &Pool, isa: Isa, x: &mut [f32], add: &[f32], scale: f32) {
    let width = add.len();
    if x.len() == width {
        // Nothing repeats, so rows may be cut anywhere; whole lines a piece keep vectors whole.
        const PIECE: usize = PARALLEL / 4;
        let pieces = width.div_ceil(PIECE);
        let x = SharedMut::new(x);
        for_rows(pool, pieces, PIECE, &|range| {
            let at = range.start * PIECE..(range.end * PIECE).min(width);
            // SAFETY: pieces do not overlap.
            let x = unsafe { x.range(at.clone()) };
            isa.run(AddRow { x, add: &add[at], scale });
        });
        return;
    }
    let rows = rows_of(x.len(), width);
    let x = SharedMut::new(x);
    for_rows(pool, rows, width, &|range| {
        for row in range {
            // SAFETY: each row is computed by one thread.
            let x = unsafe { x.range(row * width..(row + 1) * width) };
            isa.run(AddRow { x, add, scale });
        }
    });
}

/// `x += scale * add` on this thread.
///
/// # Panics
/// When the lengths differ.
pub fn add_to(isa: Isa, x: &mut [f32], add: &[f32], scale: f32) {
    assert!(add.len() == x.len(), "{} += {}", x.len(), add.len());
    isa.run(AddRow { x, add, scale });
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    // Plain enough for the compiler to vectorise.
    for x in x {
        *x *= factor;
    }
}

/// `x *= sigmoid(gate)`.
struct GateRow<'a> {
    x: &'a mut [f32],
    gate: &'a [f32],
}

impl Kernel for GateRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let one = (self.gate.len() == 1).then(|| s.sigmoid(s.splat(self.gate[0])));
        for at in (0..self.x.len()).step_by(LANES) {
            let gate = match one {
                Some(gate) => gate,
                None => s.sigmoid(load_at(s, self.gate, at)),
            };
            let product = s.mul(load_at(s, self.x, at), gate);
            store_at(s, product, self.x, at);
        }
    }
}

/// Multiplies rows of `width` with the sigmoid of gates, one a value or one a row. Row `t`'s gates are the values of
/// head 0 of row `t` as `place` says.
///
/// # Panics
/// When the lengths do not fit together.
pub fn gate(pool: &Pool, isa: Isa, x: &mut [f32], width: usize, gates: &[f32], place: Heads) {
    let rows = rows_of(x.len(), width);
    place.check(gates.len(), rows);
    assert!(
        place.heads == 1 && (place.head_dim == width || place.head_dim == 1),
        "{} gates for rows of {width}",
        place.head_dim
    );
    let x = SharedMut::new(x);
    for_rows(pool, rows, width, &|range| {
        for row in range {
            // SAFETY: each row is computed by one thread.
            let x = unsafe { x.range(row * width..(row + 1) * width) };
            isa.run(GateRow { x, gate: place.of(gates, row, 0) });
        }
    });
}
