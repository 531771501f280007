//! Operations on rows of activations: norms, rotation, gated activations, sums, softmax, argmax.
//!
//! Owns: their vector loops. Never: shapes of a model beyond what a call says.
//!
//! A row is computed by one thread in one order, so results depend neither on the batch nor on the threads.

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

/// Scale and shift of a root-mean-square norm.
#[derive(Debug, Clone, Copy)]
pub struct NormWeight<'a> {
    /// One a value of the row.
    pub weight: &'a [f32],
    /// Added to each weight.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Norm of one row: `x` becomes `x / rms(x) * (weight + offset)`; with `add`, first `x += add` and the sum is kept in
/// `residual`.
struct NormRow<'a> {
    norm: NormWeight<'a>,
    /// Read, and written where there is no `out`.
    x: &'a mut [f32],
    add: Option<&'a [f32]>,
    out: Option<&'a mut [f32]>,
}

impl Kernel for NormRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, add, out } = self;
        if let Some(add) = add {
            add_row(s, x, add);
        }
        let mut square = s.splat(0.0);
        let (lines, rest) = x.as_chunks::<LANES>();
        for line in lines {
            let v = s.load(line);
            square = s.fma(v, v, square);
        }
        let square = s.sum(square) + rest.iter().map(|v| v * v).sum::<f32>();
        let inverse = 1.0 / (square / x.len() as f32 + norm.eps).sqrt();
        match out {
            Some(out) => {
                out.copy_from_slice(x);
                scale_row(s, out, inverse, norm);
            }
            None => scale_row(s, x, inverse, norm),
        }
    }
}

/// `x += add`.
#[inline(always)]
fn add_row<S: Simd>(s: S, x: &mut [f32], add: &[f32]) {
    let (lines, rest) = x.as_chunks_mut::<LANES>();
    let (add_lines, add_rest) = add.as_chunks::<LANES>();
    for (line, add) in lines.iter_mut().zip(add_lines) {
        s.store(s.add(s.load(line), s.load(add)), line);
    }
    for (x, add) in rest.iter_mut().zip(add_rest) {
        *x += add;
    }
}

/// `x *= inverse * (weight + offset)`.
#[inline(always)]
fn scale_row<S: Simd>(s: S, x: &mut [f32], inverse: f32, norm: NormWeight<'_>) {
    let (lines, rest) = x.as_chunks_mut::<LANES>();
    let (weights, weights_rest) = norm.weight.as_chunks::<LANES>();
    for (line, weight) in lines.iter_mut().zip(weights) {
        let weight = s.add(s.load(weight), s.splat(norm.offset));
        s.store(s.mul(s.mul(s.load(line), s.splat(inverse)), weight), line);
    }
    for (x, weight) in rest.iter_mut().zip(weights_rest) {
        *x = *x * inverse * (weight + norm.offset);
    }
}

/// Number of rows of `width` in `len` values.
fn rows_of(len: usize, width: usize) -> usize {
    assert!(width > 0 && len.is_multiple_of(width), "{len} values are no whole rows of {width}");
    len / width
}

/// `out = x / rms(x) * (weight + offset)` for each row.
///
/// # Panics
/// When the lengths do not fit together.
pub fn rms_norm(pool: &Pool, isa: Isa, x: &[f32], norm: NormWeight<'_>, out: &mut [f32]) {
    assert!(x.len() == out.len(), "a norm of {} values into {}", x.len(), out.len());
    let width = norm.weight.len();
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

/// `residual += x`, then `out` is the norm of each row of `residual`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn add_rms_norm(
    pool: &Pool,
    isa: Isa,
    residual: &mut [f32],
    x: &[f32],
    norm: NormWeight<'_>,
    out: &mut [f32],
) {
    let (len, width) = (x.len(), norm.weight.len());
    assert!(residual.len() == len && out.len() == len, "{} += {len}, into {}", residual.len(), out.len());
    let rows = rows_of(len, width);
    let (residual, out) = (SharedMut::new(residual), SharedMut::new(out));
    for_rows(pool, rows, width, &|range| {
        for row in range {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is computed by one thread.
            let (residual, out) = unsafe { (residual.range(at.clone()), out.range(at.clone())) };
            isa.run(NormRow { norm, x: residual, add: Some(&x[at]), out: Some(out) });
        }
    });
}

/// Norms each head of each of `rows` rows in place; the weight has one value per value of a head.
///
/// # Panics
/// When the lengths do not fit together.
pub fn head_rms_norm(pool: &Pool, isa: Isa, x: &mut [f32], heads: Heads, rows: usize, norm: NormWeight<'_>) {
    heads.check(x.len(), rows);
    let width = heads.head_dim;
    assert!(norm.weight.len() == width, "{} weights for heads of {width}", norm.weight.len());
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

/// Cosines and sines of a rotation, `[positions, rotary_dim / 2]` each.
#[derive(Debug, Clone, Copy)]
pub struct RopeTables<'a> {
    /// Values of a head that are rotated, as two halves: `i` with `i + rotary_dim / 2`.
    pub rotary_dim: usize,
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// Rotation of one head.
struct RopeHead<'a> {
    low: &'a mut [f32],
    high: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for RopeHead<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (lows, low_rest) = self.low.as_chunks_mut::<LANES>();
        let (highs, high_rest) = self.high.as_chunks_mut::<LANES>();
        let (cosines, cos_rest) = self.cos.as_chunks::<LANES>();
        let (sines, sin_rest) = self.sin.as_chunks::<LANES>();
        for (((low, high), cos), sin) in lows.iter_mut().zip(highs).zip(cosines).zip(sines) {
            let (a, b, cos, sin) = (s.load(low), s.load(high), s.load(cos), s.load(sin));
            s.store(s.sub(s.mul(a, cos), s.mul(b, sin)), low);
            s.store(s.fma(a, sin, s.mul(b, cos)), high);
        }
        for (((low, high), cos), sin) in low_rest.iter_mut().zip(high_rest).zip(cos_rest).zip(sin_rest) {
            (*low, *high) = (*low * cos - *high * sin, *low * sin + *high * cos);
        }
    }
}

/// Rotates the heads of each row by its position.
///
/// # Panics
/// When a position lies beyond the tables or the lengths do not fit together.
pub fn rope(pool: &Pool, isa: Isa, x: &mut [f32], heads: Heads, positions: &[u32], tables: RopeTables<'_>) {
    heads.check(x.len(), positions.len());
    let (rotary, half) = (tables.rotary_dim, tables.rotary_dim / 2);
    assert!(rotary <= heads.head_dim && rotary.is_multiple_of(2), "{rotary} of {} rotate", heads.head_dim);
    let x = SharedMut::new(x);
    for_rows(pool, positions.len(), heads.heads * heads.head_dim, &|range| {
        for (row, head) in range.flat_map(|row| (0..heads.heads).map(move |head| (row, head))) {
            let table = positions[row] as usize * half..(positions[row] as usize + 1) * half;
            let at = heads.at(row, head);
            // SAFETY: each row is computed by one thread, and heads do not overlap.
            let (low, high) = unsafe { x.range(at..at + rotary) }.split_at_mut(half);
            let (cos, sin) = (&tables.cos[table.clone()], &tables.sin[table]);
            isa.run(RopeHead { low, high, cos, sin });
        }
    });
}

/// Which gate a gated layer has.
#[derive(Clone, Copy)]
enum Gate {
    Silu,
    GeluTanh,
}

/// `out = gate(x) * up` for one row.
struct GluRow<'a> {
    gate: Gate,
    x: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl GluRow<'_> {
    #[inline(always)]
    fn value<S: Simd>(gate: Gate, s: S, x: S::F, up: S::F) -> S::F {
        let one = s.splat(1.0);
        // gelu_tanh(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
        let inner = match gate {
            Gate::Silu => x,
            Gate::GeluTanh => {
                let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), one);
                s.mul(s.mul(x, s.splat(1.595_769)), cubic)
            }
        };
        let e = s.exp(s.sub(s.splat(0.0), inner));
        s.mul(s.div(x, s.add(one, e)), up)
    }
}

impl Kernel for GluRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { gate, x, up, out } = self;
        let (lines, rest) = out.as_chunks_mut::<LANES>();
        let (xs, x_rest) = x.as_chunks::<LANES>();
        let (ups, up_rest) = up.as_chunks::<LANES>();
        for ((out, x), up) in lines.iter_mut().zip(xs).zip(ups) {
            s.store(Self::value(gate, s, s.load(x), s.load(up)), out);
        }
        if !rest.is_empty() {
            let mut padded = [[0.0; LANES]; 2];
            padded[0][..x_rest.len()].copy_from_slice(x_rest);
            padded[1][..up_rest.len()].copy_from_slice(up_rest);
            let mut line = [0.0; LANES];
            s.store(Self::value(gate, s, s.load(&padded[0]), s.load(&padded[1])), &mut line);
            rest.copy_from_slice(&line[..rest.len()]);
        }
    }
}

fn glu(pool: &Pool, isa: Isa, gate: Gate, gate_up: &[f32], width: usize, out: &mut [f32]) {
    let rows = rows_of(out.len(), width);
    assert!(gate_up.len() == 2 * out.len(), "gates of {} values for {}", gate_up.len(), out.len());
    let out = SharedMut::new(out);
    for_rows(pool, rows, 2 * width, &|range| {
        for row in range {
            let (x, up) = gate_up[2 * row * width..2 * (row + 1) * width].split_at(width);
            // SAFETY: each row is computed by one thread.
            let out = unsafe { out.range(row * width..(row + 1) * width) };
            isa.run(GluRow { gate, x, up, out });
        }
    });
}

/// On rows `[gate | up]` of `2 * width`: `out = silu(gate) * up`, rows of `width`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn silu_mul(pool: &Pool, isa: Isa, gate_up: &[f32], width: usize, out: &mut [f32]) {
    glu(pool, isa, Gate::Silu, gate_up, width, out);
}

/// On rows `[gate | up]` of `2 * width`: `out = gelu_tanh(gate) * up`, rows of `width`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn gelu_tanh_mul(pool: &Pool, isa: Isa, gate_up: &[f32], width: usize, out: &mut [f32]) {
    glu(pool, isa, Gate::GeluTanh, gate_up, width, out);
}

/// `x += add`.
struct AddRow<'a> {
    x: &'a mut [f32],
    add: &'a [f32],
}

impl Kernel for AddRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        add_row(s, self.x, self.add);
    }
}

/// `x += add`; where `add` is shorter it is one row that is added to every row of `x` (a bias).
///
/// # Panics
/// When `x` is no whole number of rows.
pub fn add(pool: &Pool, isa: Isa, x: &mut [f32], add: &[f32]) {
    // Rows may be cut anywhere when nothing repeats; a whole line a piece keeps vectors whole.
    let width = add.len();
    let rows = rows_of(x.len(), width);
    if rows == 1 {
        isa.run(AddRow { x, add });
        return;
    }
    let x = SharedMut::new(x);
    for_rows(pool, rows, width, &|range| {
        for row in range {
            // SAFETY: each row is computed by one thread.
            let x = unsafe { x.range(row * width..(row + 1) * width) };
            isa.run(AddRow { x, add });
        }
    });
}

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
