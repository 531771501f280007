//! Activations of feed-forward layers, with and without a gate.
//!
//! Owns: their vector loops. Never: which layer has which.

use super::{for_rows, load_at, rows_of, store_at};
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::lanes::{Kernel, LANES, Simd};
use crate::simd::shared::SharedMut;

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU, exact.
    Gelu,
    /// `tanh(x)`.
    Tanh,
    /// `x > 0: alpha_p x^2 + beta x; else (expm1(min(x, eps)) - x) alpha_n + beta x`.
    Xielu {
        /// Of positive values.
        alpha_p: f32,
        /// Of negative values.
        alpha_n: f32,
        /// Linear part.
        beta: f32,
        /// Negative, close to 0.
        eps: f32,
    },
}

/// A function of a gate and what it lets through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Glu {
    /// `activation(gate) * up`.
    Gated(Activation),
    /// Gate limited above, up limited on both sides, `(up + 1) * gate * sigmoid(alpha * gate)`.
    ClampedSwiglu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Limit of gate and up.
        limit: f32,
    },
}

impl Activation {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        let one = s.splat(1.0);
        match self {
            Self::Silu => s.div(x, s.add(one, s.exp(s.sub(s.splat(0.0), x)))),
            // x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3).
            Self::GeluTanh => {
                let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), one);
                let inner = s.mul(s.mul(x, s.splat(1.595_769)), cubic);
                s.div(x, s.add(one, s.exp(s.sub(s.splat(0.0), inner))))
            }
            Self::Gelu => {
                let erf = s.erf(s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
                s.mul(s.mul(x, s.splat(0.5)), s.add(one, erf))
            }
            Self::Tanh => s.tanh(x),
            Self::Xielu { alpha_p, alpha_n, beta, eps } => {
                let linear = s.mul(s.splat(beta), x);
                let above = s.fma(s.mul(s.splat(alpha_p), x), x, linear);
                let below = s.sub(s.expm1(s.min(s.splat(eps), x)), x);
                s.positive(x, above, s.fma(below, s.splat(alpha_n), linear))
            }
        }
    }
}

impl Glu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, gate: S::F, up: S::F) -> S::F {
        match self {
            Self::Gated(activation) => s.mul(activation.of(s, gate), up),
            Self::ClampedSwiglu { alpha, limit } => {
                // NaN stays NaN: `min` gives it back as its second operand.
                let gate = s.min(s.splat(limit), gate);
                let up = s.max(s.splat(-limit), s.min(s.splat(limit), up));
                let gated = s.mul(gate, s.sigmoid(s.mul(s.splat(alpha), gate)));
                s.mul(s.add(up, s.splat(1.0)), gated)
            }
        }
    }
}

/// `out = glu(gate, up)` for one row.
struct GluRow<'a> {
    glu: Glu,
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for GluRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for at in (0..self.out.len()).step_by(LANES) {
            let value = self.glu.of(s, load_at(s, self.gate, at), load_at(s, self.up, at));
            store_at(s, value, self.out, at);
        }
    }
}

/// On rows `[gate | up]` of `2 * width`: `out` gets rows of `width`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn glu(pool: &Pool, isa: Isa, glu: Glu, gate_up: &[f32], width: usize, out: &mut [f32]) {
    let rows = rows_of(out.len(), width);
    assert!(gate_up.len() == 2 * out.len(), "gates of {} values for {}", gate_up.len(), out.len());
    let out = SharedMut::new(out);
    for_rows(pool, rows, 2 * width, &|range| {
        for row in range {
            let (gate, up) = gate_up[2 * row * width..2 * (row + 1) * width].split_at(width);
            // SAFETY: each row is computed by one thread.
            let out = unsafe { out.range(row * width..(row + 1) * width) };
            isa.run(GluRow { glu, gate, up, out });
        }
    });
}

/// `out = activation(x)` for one row.
struct ActivateRow<'a> {
    activation: Activation,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for ActivateRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for at in (0..self.out.len()).step_by(LANES) {
            let value = self.activation.of(s, load_at(s, self.x, at));
            store_at(s, value, self.out, at);
        }
    }
}

/// `out = activation(x)`, for rows of `width`.
///
/// # Panics
/// When the lengths do not fit together.
pub fn activate(pool: &Pool, isa: Isa, activation: Activation, x: &[f32], width: usize, out: &mut [f32]) {
    let rows = rows_of(out.len(), width);
    assert!(x.len() == out.len(), "an activation of {} values into {}", x.len(), out.len());
    let out = SharedMut::new(out);
    for_rows(pool, rows, width, &|range| {
        for row in range {
            let at = row * width..(row + 1) * width;
            // SAFETY: each row is computed by one thread.
            let out = unsafe { out.range(at.clone()) };
            isa.run(ActivateRow { activation, x: &x[at], out });
        }
    });
}
