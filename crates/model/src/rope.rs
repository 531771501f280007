//! Rotary position embeddings: from a configuration's scaling rule to tables of cosines and sines.
//!
//! Owns the frequency formulas. Formulas and their defaults are those of HF transformers
//! (`modeling_rope_utils`), computed here in f64 and rounded once, to f32.

use std::f64::consts::PI;

use crate::backend::{Pairing, RopeTable};

/// One rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Elements of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Which of them make a pair.
    pub pairing: Pairing,
    /// How queries grow with their position, where they do.
    pub q_scale: Option<QueryScale>,
    /// How frequencies are changed for contexts longer than those of the first training.
    pub scaling: RopeScaling,
}

/// Factor on the queries of position p: `1 + beta ln(1 + floor(p / original_context))` (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    /// Slope.
    pub beta: f64,
    /// Context of the first training.
    pub original_context: f64,
}

/// Change of the frequencies `theta^(-2i / rotary_dim)`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All divided by one factor (position interpolation).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a smooth step between (Llama 3.1).
    Llama3 {
        /// Divides low frequencies.
        factor: f64,
        /// `original_context / low_freq_factor` is the shortest wavelength that is divided whole.
        low_freq_factor: f64,
        /// `original_context / high_freq_factor` is the longest wavelength that is kept.
        high_freq_factor: f64,
        /// Context of the first training.
        original_context: f64,
    },
    /// YaRN (arXiv 2309.00071): interpolation ramped over the dimensions, and a factor on cosine and sine.
    Yarn(YarnSpec),
    /// One divisor for each frequency, as GGUF files store them.
    Divisors(Vec<f32>),
    /// LongRoPE (arXiv 2402.13753).
    LongRope(LongRopeSpec),
    /// The fastest frequencies of a head of `dim` elements, divided by one factor; the others stand still (Gemma 4).
    Proportional {
        /// Elements of the whole head: frequencies are `theta^(-2i / dim)`.
        dim: usize,
        /// At least 1.
        factor: f64,
    },
}

/// Parameters of LongRoPE: two sets of divisors. Which one applies is decided once, by the context that is served, and
/// not, as in transformers, by the length that a text happens to have: else what is cached of a text would change its
/// meaning on the day the text grows beyond the first training's context.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRopeSpec {
    /// One divisor for each frequency, in contexts up to `original_context`.
    pub short: Vec<f64>,
    /// In longer ones.
    pub long: Vec<f64>,
    /// Context of the first training.
    pub original_context: usize,
    /// Multiplies cosine and sine.
    pub attention_factor: f64,
}

/// Parameters of YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct YarnSpec {
    /// Divides interpolated frequencies.
    pub factor: f64,
    /// Context of the first training.
    pub original_context: f64,
    /// Rotations above which a dimension is extrapolated; 32 usually.
    pub beta_fast: f64,
    /// Rotations below which a dimension is interpolated; 1 usually.
    pub beta_slow: f64,
    /// Multiplies cosine and sine.
    pub attention_factor: f64,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub truncate: bool,
}

impl YarnSpec {
    /// The factor on cosine and sine where a configuration gives none.
    #[must_use]
    pub fn default_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
        let get = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        match (mscale, mscale_all_dim) {
            (Some(m), Some(all)) if m != 0.0 && all != 0.0 => get(m) / get(all),
            _ => get(1.0),
        }
    }

    /// Dimension (of `dim / 2`) whose wavelength makes `rotations` turns in the original context.
    fn correction_dim(&self, rotations: f64, dim: f64, theta: f64) -> f64 {
        dim * (self.original_context / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
    }

    /// `(1 - interpolated share)` of each of `dim / 2` frequencies.
    fn extrapolation(&self, dim: usize, theta: f64) -> impl Fn(usize) -> f64 + use<> {
        let mut low = self.correction_dim(self.beta_fast, dim as f64, theta);
        let mut high = self.correction_dim(self.beta_slow, dim as f64, theta);
        if self.truncate {
            low = low.floor();
            high = high.ceil();
        }
        let low = low.max(0.0);
        let mut high = high.min(dim as f64 - 1.0);
        if low == high {
            // A ramp of no width would divide by zero.
            high += 0.001;
        }
        move |i| 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

impl RopeSpec {
    /// Neither scaled nor growing, paired by halves.
    #[must_use]
    pub const fn plain(theta: f64, rotary_dim: usize) -> Self {
        Self { theta, rotary_dim, pairing: Pairing::Halves, q_scale: None, scaling: RopeScaling::None }
    }

    /// Radians a position of each of the `rotary_dim / 2` pairs where `context` positions are served, and the factor on
    /// cosine and sine.
    #[must_use]
    pub fn frequencies(&self, context: usize) -> (Vec<f64>, f64) {
        let dim = self.rotary_dim;
        let plain = (0..dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / dim as f64));
        match &self.scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let scaled = plain.map(|f| {
                    let turns = original_context * f / (2.0 * PI);
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let kept = if turns < *low_freq_factor {
                        0.0
                    } else if turns > *high_freq_factor {
                        1.0
                    } else {
                        kept
                    };
                    (1.0 - kept) * f / factor + kept * f
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                let extrapolated = yarn.extrapolation(dim, self.theta);
                let scaled = plain.enumerate().map(|(i, f)| {
                    let keep = extrapolated(i);
                    f / yarn.factor * (1.0 - keep) + f * keep
                });
                (scaled.collect(), yarn.attention_factor)
            }
            RopeScaling::Divisors(divisors) => {
                (plain.zip(divisors).map(|(f, &d)| f / f64::from(d)).collect(), 1.0)
            }
            RopeScaling::LongRope(spec) => {
                let divisors = if context > spec.original_context { &spec.long } else { &spec.short };
                (plain.zip(divisors).map(|(f, d)| f / d).collect(), spec.attention_factor)
            }
            RopeScaling::Proportional { dim, factor } => {
                let of_head = |i: usize| self.theta.powf(-2.0 * i as f64 / *dim as f64) / factor;
                ((0..self.rotary_dim / 2).map(of_head).collect(), 1.0)
            }
        }
    }

    /// The rotation of a share of a head's pairs, which lie half a head apart: `rotary_dim` of its `head_dim` elements.
    #[must_use]
    pub const fn proportional(theta: f64, rotary_dim: usize, head_dim: usize, factor: f64) -> Self {
        let scaling = RopeScaling::Proportional { dim: head_dim, factor };
        Self { theta, rotary_dim, pairing: Pairing::Apart(head_dim / 2), q_scale: None, scaling }
    }

    /// Tables for positions below `context`: 4 bytes times `rotary_dim` times `context`.
    #[must_use]
    pub fn table(&self, context: usize) -> RopeTable {
        let (frequencies, factor) = self.frequencies(context);
        let mut cos = Vec::with_capacity(context * frequencies.len());
        let mut sin = Vec::with_capacity(context * frequencies.len());
        for position in 0..context {
            for f in &frequencies {
                let (s, c) = (position as f64 * f).sin_cos();
                cos.push((c * factor) as f32);
                sin.push((s * factor) as f32);
            }
        }
        let grown = |scale: QueryScale| {
            let turns = move |p: usize| (p as f64 / scale.original_context).floor();
            (0..context).map(move |p| (1.0 + scale.beta * turns(p).ln_1p()) as f32)
        };
        let q_scale = self.q_scale.map_or_else(Vec::new, |scale| grown(scale).collect());
        RopeTable { rotary_dim: self.rotary_dim, pairing: self.pairing, cos, sin, q_scale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> RopeSpec {
        RopeSpec { scaling, ..RopeSpec::plain(10_000.0, 8) }
    }

    #[test]
    fn linear_divides_every_frequency() {
        let (plain, _) = rope(RopeScaling::None).frequencies(64);
        let (scaled, factor) = rope(RopeScaling::Linear { factor: 4.0 }).frequencies(64);
        assert!(plain.iter().zip(&scaled).all(|(p, s)| (p / 4.0 - s).abs() < 1e-15));
        assert_eq!(factor, 1.0);
        assert!((plain[1] - 0.1).abs() < 1e-12, "10000^(-2/8)");
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64.0,
        };
        let (plain, _) = rope(RopeScaling::None).frequencies(64);
        let (scaled, _) = rope(scaling).frequencies(64);
        assert_eq!(scaled[0], plain[0], "10.2 turns in 64 positions");
        assert!((scaled[3] - plain[3] / 8.0).abs() < 1e-15, "0.01 turns");
        assert!(scaled[1] < plain[1] && scaled[1] > plain[1] / 8.0 - 1e-12, "1.02 turns: on the step");
    }

    #[test]
    fn yarn_interpolates_slow_dimensions_and_scales_the_amplitude() {
        let yarn = YarnSpec {
            factor: 4.0,
            original_context: 64.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: YarnSpec::default_attention_factor(4.0, None, None),
            truncate: true,
        };
        let (plain, _) = rope(RopeScaling::None).frequencies(64);
        let (scaled, factor) = rope(RopeScaling::Yarn(yarn)).frequencies(64);
        assert!((factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-15);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[3] - plain[3] / 4.0).abs() < 1e-15);
        assert_eq!(YarnSpec::default_attention_factor(4.0, Some(1.0), Some(1.0)), 1.0);
        assert_eq!(YarnSpec::default_attention_factor(1.0, None, None), 1.0);
    }

    #[test]
    fn proportional_rotation_has_the_frequencies_of_the_whole_head() {
        let rope = RopeSpec::proportional(10_000.0, 4, 16, 2.0);
        let (frequencies, factor) = rope.frequencies(64);
        assert_eq!((frequencies.len(), factor, rope.pairing), (2, 1.0, Pairing::Apart(8)));
        let whole = RopeSpec::plain(10_000.0, 16).frequencies(64).0;
        assert!(frequencies.iter().zip(whole).all(|(f, w)| (f - w / 2.0).abs() < 1e-15));
    }

    #[test]
    fn the_served_context_chooses_long_factors() {
        let spec = LongRopeSpec {
            short: vec![1.0, 2.0, 3.0, 4.0],
            long: vec![10.0; 4],
            original_context: 64,
            attention_factor: 1.25,
        };
        let rope = rope(RopeScaling::LongRope(spec));
        let plain = RopeSpec::plain(10_000.0, 8).frequencies(64).0;
        let (short, factor) = rope.frequencies(64);
        assert!(factor == 1.25 && (short[3] - plain[3] / 4.0).abs() < 1e-15);
        assert!((rope.frequencies(65).0[0] - plain[0] / 10.0).abs() < 1e-15);
    }

    #[test]
    fn queries_grow_at_multiples_of_the_first_context() {
        let scale = QueryScale { beta: 0.1, original_context: 4.0 };
        let table = RopeSpec { q_scale: Some(scale), ..RopeSpec::plain(10_000.0, 8) }.table(9);
        let grown = |turns: f64| (1.0 + 0.1 * (1.0 + turns).ln()) as f32;
        assert_eq!(table.q_scale[..4], [1.0; 4]);
        assert_eq!(
            (table.q_scale[4], table.q_scale[7], table.q_scale[8]),
            (grown(1.0), grown(1.0), grown(2.0))
        );
    }

    #[test]
    fn divisors_and_tables() {
        let (scaled, _) = rope(RopeScaling::Divisors(vec![1.0, 2.0, 4.0, 8.0])).frequencies(64);
        let (plain, _) = rope(RopeScaling::None).frequencies(64);
        assert!((scaled[2] - plain[2] / 4.0).abs() < 1e-15);
        let table = rope(RopeScaling::None).table(3);
        assert_eq!((table.cos.len(), table.sin.len()), (12, 12));
        assert_eq!((table.cos[0], table.sin[0]), (1.0, 0.0));
        assert!((table.sin[8] - 2f32.sin()).abs() < 1e-7);
    }
}
