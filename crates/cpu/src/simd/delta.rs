//! The recurrence of a gated delta net (arXiv 2412.06464) over a ragged batch, with its convolution before and its gated
//! norm after.
//!
//! Owns: the arithmetic of one layer, token by token, and how heads are spread over threads. Never: which state belongs
//! to whom.
//!
//! A work item is one key head of one sequence: its convolution channels and the states of its value heads. Tokens are
//! taken one after the other, in blocks whose length changes no operation, so a prompt cut anywhere gives the same bits.
//! Inside a block the state is walked in strips of columns that stay in the nearest cache for all its tokens.

use super::Isa;
use super::lanes::{Kernel, LANES, Simd};
use super::ops::{NormParams, NormRow, load_at, store_at};
use super::shared::SharedMut;
use crate::pool::Pool;
use std::cell::RefCell;
use std::ops::Range;

/// Tokens that are worked on together.
const BLOCK: usize = 32;
/// Added to the sum of squares of queries and keys.
const LENGTH_EPS: f32 = 1e-6;

/// Shape of a layer; value heads are a multiple of key heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaDims {
    /// Heads of queries and keys.
    pub k_heads: usize,
    /// Heads of values.
    pub v_heads: usize,
    /// Values of a query or key head.
    pub k_dim: usize,
    /// Values of a value head.
    pub v_dim: usize,
    /// Taps of the convolution.
    pub taps: usize,
}

impl DeltaDims {
    /// Channels of the convolution: `[q | k | v]`.
    #[must_use]
    pub const fn channels(&self) -> usize {
        2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
    }

    /// Values of an input row `[q | k | v | z | b | a]`.
    #[must_use]
    pub const fn in_width(&self) -> usize {
        self.channels() + self.v_heads * self.v_dim + 2 * self.v_heads
    }

    /// Values of a sequence's state: `[taps - 1][channels]`, then `[v_heads][k_dim][v_dim]`.
    #[must_use]
    pub const fn state(&self) -> usize {
        self.conv_state() + self.v_heads * self.k_dim * self.v_dim
    }

    const fn conv_state(&self) -> usize {
        self.channels() * (self.taps - 1)
    }

    /// Value heads of a key head.
    const fn group(&self) -> usize {
        self.v_heads / self.k_heads
    }

    /// Channels of a key head: its query, its key, its values.
    fn ranges(&self, head: usize) -> [Range<usize>; 3] {
        let keys = self.k_heads * self.k_dim;
        let values = self.group() * self.v_dim;
        let at = |start: usize, len: usize| start..start + len;
        [
            at(head * self.k_dim, self.k_dim),
            at(keys + head * self.k_dim, self.k_dim),
            at(2 * keys + head * values, values),
        ]
    }
}

/// Parameters of a layer.
#[derive(Debug, Clone, Copy)]
pub struct DeltaParams<'a> {
    /// `[taps][channels]`, oldest tap first.
    pub conv: &'a [f32],
    /// `[v_heads]`: logarithm of the decay rate.
    pub a_log: &'a [f32],
    /// `[v_heads]`: added to a.
    pub dt_bias: &'a [f32],
    /// Norm of an output head, before SiLU of z multiplies it.
    pub norm: NormParams<'a>,
}

/// The tokens of one sequence in a ragged batch.
#[derive(Debug, Clone, Copy)]
pub struct DeltaRow {
    /// Index of its first token in the batch.
    pub first: usize,
    /// Its tokens.
    pub len: usize,
    /// First value of its state.
    pub state: usize,
}

/// Buffers of one thread; they grow to the largest head and stay.
#[derive(Default)]
struct Buffers {
    /// `[taps - 1 + tokens][channels of the head]`: what the convolution reads.
    history: Vec<f32>,
    /// `[tokens][channels of the head]`: what it gives.
    mixed: Vec<f32>,
    /// `[tokens][v_dim]` of one value head.
    out: Vec<f32>,
    /// `[k_dim][16]`: the columns of a state that fill no vector.
    rest: Vec<f32>,
    /// Decay and strength of each token for one value head.
    gates: Vec<(f32, f32)>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// One call of [`delta_rule`].
struct Call<'a> {
    dims: DeltaDims,
    params: DeltaParams<'a>,
    x: &'a [f32],
    states: SharedMut<'a, f32>,
    out: SharedMut<'a, f32>,
}

/// One key head of one sequence.
struct Item<'a> {
    call: &'a Call<'a>,
    row: DeltaRow,
    head: usize,
    buffers: &'a mut Buffers,
}

/// Runs the tokens of all rows through the layer: `x` has rows of [`DeltaDims::in_width`], `out` of
/// `v_heads * v_dim`; states are read and written in place.
///
/// # Panics
/// When shapes, states or slices do not fit together.
#[allow(clippy::too_many_arguments)] // one more than the lint allows, and none of them optional
pub fn delta_rule(
    pool: &Pool,
    isa: Isa,
    dims: DeltaDims,
    params: DeltaParams<'_>,
    x: &[f32],
    rows: &[DeltaRow],
    states: &mut [f32],
    out: &mut [f32],
) {
    check(&dims, &params, x.len(), rows, states.len(), out.len());
    let call = Call { dims, params, x, states: SharedMut::new(states), out: SharedMut::new(out) };
    pool.chunks(rows.len() * dims.k_heads, 1, &|_, range| {
        BUFFERS.with_borrow_mut(|buffers| {
            for item in range {
                let (row, head) = (rows[item / dims.k_heads], item % dims.k_heads);
                isa.run(Item { call: &call, row, head, buffers });
            }
        });
    });
}

fn check(d: &DeltaDims, p: &DeltaParams<'_>, x: usize, rows: &[DeltaRow], states: usize, out: usize) {
    assert!(d.k_heads > 0 && d.v_heads.is_multiple_of(d.k_heads) && d.taps > 0, "{d:?}");
    assert!(p.conv.len() == d.taps * d.channels(), "{} weights for {d:?}", p.conv.len());
    let heads = (p.a_log.len(), p.dt_bias.len());
    assert!(heads == (d.v_heads, d.v_heads), "decays of {heads:?} heads for {d:?}");
    let mut end = 0;
    for row in rows {
        assert!(row.first >= end, "rows overlap at token {}", row.first);
        end = row.first + row.len;
    }
    assert!(x >= end * d.in_width(), "{end} tokens of {} in a slice of {x}", d.in_width());
    assert!(out >= end * d.v_heads * d.v_dim, "{end} tokens of output in a slice of {out}");
    let mut starts: Vec<usize> = rows.iter().map(|row| row.state).collect();
    starts.sort_unstable();
    assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= d.state()), "states overlap: {starts:?}");
    assert!(starts.last().is_none_or(|last| last + d.state() <= states), "states end beyond {states}");
}

impl Kernel for Item<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let d = self.call.dims;
        let channels = 2 * d.k_dim + d.group() * d.v_dim;
        let b = &mut *self.buffers;
        b.history.resize((d.taps - 1 + BLOCK) * channels, 0.0);
        b.mixed.resize(BLOCK * channels, 0.0);
        b.out.resize(BLOCK * d.v_dim, 0.0);
        b.rest.resize(d.k_dim * LANES, 0.0);
        self.move_history(channels, false);
        for start in (0..self.row.len).step_by(BLOCK) {
            let tokens = BLOCK.min(self.row.len - start);
            self.mix(s, start, tokens, channels);
            self.normalize(s, tokens, channels);
            for value_head in 0..d.group() {
                self.gates(start, tokens, value_head);
                self.recur(s, tokens, channels, value_head);
                self.finish(s, start, tokens, value_head);
            }
        }
        self.move_history(channels, true);
    }
}

impl Item<'_> {
    /// Copies the head's channels of the convolution's state into the history, or back.
    fn move_history(&mut self, channels: usize, back: bool) {
        let d = self.call.dims;
        for tap in 0..d.taps - 1 {
            let mut to = tap * channels;
            for range in d.ranges(self.head) {
                let at = self.row.state + tap * d.channels();
                // SAFETY: a head's channels belong to one item, and states do not overlap (checked).
                let state = unsafe { self.call.states.range(at + range.start..at + range.end) };
                let history = &mut self.buffers.history[to..to + range.len()];
                if back {
                    state.copy_from_slice(history);
                } else {
                    history.copy_from_slice(state);
                }
                to += range.len();
            }
        }
    }

    /// The convolution and SiLU after it, for tokens `start..start + tokens` of the row.
    #[inline(always)]
    fn mix<S: Simd>(&mut self, s: S, start: usize, tokens: usize, channels: usize) {
        let d = self.call.dims;
        let b = &mut *self.buffers;
        for token in 0..tokens {
            let row = (self.row.first + start + token) * d.in_width();
            let mut to = (d.taps - 1 + token) * channels;
            for range in d.ranges(self.head) {
                let from = &self.call.x[row + range.start..row + range.end];
                b.history[to..to + range.len()].copy_from_slice(from);
                to += range.len();
            }
        }
        let mut to = 0;
        for range in d.ranges(self.head) {
            for at in (0..range.len()).step_by(LANES) {
                let end = to + range.len();
                for token in 0..tokens {
                    let mut sum = s.splat(0.0);
                    for tap in 0..d.taps {
                        let line = (token + tap) * channels;
                        let x = load_at(s, &b.history[line + to..line + end], at);
                        let first = tap * d.channels();
                        let weights = &self.call.params.conv[first + range.start..first + range.end];
                        sum = s.fma(x, load_at(s, weights, at), sum);
                    }
                    let line = token * channels;
                    store_at(s, s.mul(sum, s.sigmoid(sum)), &mut b.mixed[line + to..line + end], at);
                }
            }
            to += range.len();
        }
        b.history.copy_within(tokens * channels..(tokens + d.taps - 1) * channels, 0);
    }

    /// Divides queries and keys by their length, queries also by the root of the dimension.
    #[inline(always)]
    fn normalize<S: Simd>(&mut self, s: S, tokens: usize, channels: usize) {
        let dim = self.call.dims.k_dim;
        let shrink = 1.0 / (dim as f32).sqrt();
        for line in self.buffers.mixed.chunks_exact_mut(channels).take(tokens) {
            let (q, rest) = line.split_at_mut(dim);
            for (x, factor) in [(q, shrink), (&mut rest[..dim], 1.0)] {
                let mut square = s.splat(0.0);
                for at in (0..dim).step_by(LANES) {
                    let v = load_at(s, x, at);
                    square = s.fma(v, v, square);
                }
                let inverse = factor / (s.sum(square) + LENGTH_EPS).sqrt();
                for at in (0..dim).step_by(LANES) {
                    let v = s.mul(load_at(s, x, at), s.splat(inverse));
                    store_at(s, v, x, at);
                }
            }
        }
    }

    /// Decay and strength of each token.
    fn gates(&mut self, start: usize, tokens: usize, value_head: usize) {
        let (d, p) = (self.call.dims, &self.call.params);
        let head = self.head * d.group() + value_head;
        let rate = p.a_log[head].exp();
        let b_at = d.channels() + d.v_heads * d.v_dim + head;
        let gates = &mut self.buffers.gates;
        gates.clear();
        gates.extend((start..start + tokens).map(|token| {
            let row = (self.row.first + token) * d.in_width();
            let (b, a) = (self.call.x[row + b_at], self.call.x[row + b_at + d.v_heads]);
            ((-rate * softplus(a + p.dt_bias[head])).exp(), 1.0 / (1.0 + (-b).exp()))
        }));
    }

    /// The recurrence of one value head.
    #[inline(always)]
    fn recur<S: Simd>(&mut self, s: S, tokens: usize, channels: usize, value_head: usize) {
        let d = self.call.dims;
        let head = self.head * d.group() + value_head;
        let at = self.row.state + d.conv_state() + head * d.k_dim * d.v_dim;
        // SAFETY: a value head's state belongs to one item, and states do not overlap (checked).
        let state = unsafe { self.call.states.range(at..at + d.k_dim * d.v_dim) };
        let b = &mut *self.buffers;
        let mut strip = Strip {
            mixed: &b.mixed[..tokens * channels],
            channels,
            k_dim: d.k_dim,
            v_dim: d.v_dim,
            value: 2 * d.k_dim + value_head * d.v_dim,
            gates: &b.gates,
            out: &mut b.out,
        };
        let whole = d.v_dim / LANES * LANES;
        let mut column = 0;
        // As many columns at once as the register file holds accumulators for.
        if S::MAX_ROWS >= 8 {
            while column + 8 * LANES <= whole {
                strip.run::<S, 8>(s, &mut state[column..], d.v_dim, column);
                column += 8 * LANES;
            }
        }
        while column + 4 * LANES <= whole {
            strip.run::<S, 4>(s, &mut state[column..], d.v_dim, column);
            column += 4 * LANES;
        }
        while column < whole {
            strip.run::<S, 1>(s, &mut state[column..], d.v_dim, column);
            column += LANES;
        }
        if column < d.v_dim {
            let lines = state.chunks_exact_mut(d.v_dim);
            for (line, padded) in lines.zip(b.rest.as_chunks_mut::<LANES>().0) {
                padded.fill(0.0);
                padded[..d.v_dim - column].copy_from_slice(&line[column..]);
            }
            strip.run::<S, 1>(s, &mut b.rest, LANES, column);
            let lines = state.chunks_exact_mut(d.v_dim);
            for (line, padded) in lines.zip(b.rest.as_chunks::<LANES>().0) {
                line[column..].copy_from_slice(&padded[..d.v_dim - column]);
            }
        }
    }

    /// The norm of the output head and its gate, into the output.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S, start: usize, tokens: usize, value_head: usize) {
        let d = self.call.dims;
        let head = self.head * d.group() + value_head;
        let outs = self.buffers.out.chunks_exact_mut(d.v_dim);
        for (token, x) in outs.enumerate().take(tokens) {
            let token = self.row.first + start + token;
            NormRow { norm: self.call.params.norm, x: &mut *x, add: None, out: None }.run(s);
            let z = token * d.in_width() + d.channels() + head * d.v_dim;
            let z = &self.call.x[z..z + d.v_dim];
            let at = (token * d.v_heads + head) * d.v_dim;
            // SAFETY: a token's head belongs to one item, and rows of the batch do not overlap (checked).
            let to = unsafe { self.call.out.range(at..at + d.v_dim) };
            for at in (0..d.v_dim).step_by(LANES) {
                let z = load_at(s, z, at);
                let v = s.mul(load_at(s, x, at), s.mul(z, s.sigmoid(z)));
                store_at(s, v, to, at);
            }
        }
    }
}

/// Some columns of a state, for all tokens of a block.
struct Strip<'a> {
    /// `[tokens][channels]`: `q | k | v` of the head.
    mixed: &'a [f32],
    channels: usize,
    k_dim: usize,
    v_dim: usize,
    /// First value of the value head in a line of `mixed`.
    value: usize,
    gates: &'a [(f32, f32)],
    out: &'a mut [f32],
}

impl Strip<'_> {
    /// Columns `column..column + 16 N`; `state` begins with the first of them and has lines of `stride`.
    #[inline(always)]
    fn run<S: Simd, const N: usize>(&mut self, s: S, state: &mut [f32], stride: usize, column: usize) {
        let lines = self.mixed.chunks_exact(self.channels);
        for ((line, &(decay, strength)), out) in
            lines.zip(self.gates).zip(self.out.chunks_exact_mut(self.v_dim))
        {
            let (q, rest) = line.split_at(self.k_dim);
            let k = &rest[..self.k_dim];
            let mut found = [s.splat(0.0); N];
            for (row, k) in state.chunks(stride).zip(k) {
                let row = row.as_chunks::<LANES>().0;
                let k = s.splat(*k);
                for i in 0..N {
                    found[i] = s.fma(s.load(&row[i]), k, found[i]);
                }
            }
            let value = &line[self.value..self.value + self.v_dim];
            let decay = s.splat(decay);
            let mut delta = [s.splat(0.0); N];
            for i in 0..N {
                let v = load_at(s, value, column + i * LANES);
                delta[i] = s.mul(s.sub(v, s.mul(decay, found[i])), s.splat(strength));
            }
            let mut sum = [s.splat(0.0); N];
            for ((row, k), q) in state.chunks_mut(stride).zip(k).zip(q) {
                let row = row.as_chunks_mut::<LANES>().0;
                let (k, q) = (s.splat(*k), s.splat(*q));
                for i in 0..N {
                    let new = s.fma(delta[i], k, s.mul(decay, s.load(&row[i])));
                    s.store(new, &mut row[i]);
                    sum[i] = s.fma(new, q, sum[i]);
                }
            }
            for i in 0..N {
                store_at(s, sum[i], out, column + i * LANES);
            }
        }
    }
}

/// `ln(1 + e^x)`.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
