//! Rotary embeddings as configurations describe them: `rope_parameters` (transformers 5), or `rope_theta` and
//! `rope_scaling` (before), for the whole model or for each kind of layer.
//!
//! Owns the fields and their defaults; the formulas are those of [`crate::rope`].

use super::short;
use crate::backend::Pairing;
use crate::config::Config;
use crate::error::Result;
use crate::rope::{LongRopeSpec, QueryScale, RopeScaling, RopeSpec, YarnSpec};
use crate::spec::bounds;

/// What a family's rotation is where the configuration does not say.
#[derive(Clone, Copy, Debug)]
pub(super) struct RopeDefaults {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Share of a head's elements that is rotated.
    pub partial: f64,
    /// Which elements make a pair: never said by a configuration.
    pub pairing: Pairing,
    /// Context of the first training, which then wins over the one in the rope parameters; else the whole context.
    pub original_context: Option<usize>,
    /// Whether queries may grow with their position.
    pub query_scale: bool,
}

impl RopeDefaults {
    /// As most families have it.
    pub(super) const USUAL: Self = Self {
        theta: 10_000.0,
        partial: 1.0,
        pairing: Pairing::Halves,
        original_context: None,
        query_scale: false,
    };
}

/// The rotation of all layers.
pub(super) fn rope(
    config: &Config<'_>,
    head_dim: usize,
    context: usize,
    absent: RopeDefaults,
) -> Result<RopeSpec> {
    read(config, parameters(config)?.as_ref(), head_dim, context, absent)
}

/// The rotation of one kind of layers: `rope_parameters` may have an object for it.
pub(super) fn rope_of_kind(
    config: &Config<'_>,
    kind: &str,
    head_dim: usize,
    context: usize,
    absent: RopeDefaults,
) -> Result<RopeSpec> {
    let all = parameters(config)?;
    let own = all.as_ref().map(|c| c.object(kind)).transpose()?.flatten();
    read(config, own.or(all).as_ref(), head_dim, context, absent)
}

/// `rope_parameters` or `rope_scaling`.
fn parameters<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>> {
    let (new, old) = (config.object("rope_parameters")?, config.object("rope_scaling")?);
    if new.is_some() && old.is_some() && config.get("rope_parameters") != config.get("rope_scaling") {
        return Err(config.error("rope_scaling", "differs from `rope_parameters`; one of them must go"));
    }
    Ok(new.or(old))
}

fn read(
    config: &Config<'_>,
    inner: Option<&Config<'_>>,
    head_dim: usize,
    context: usize,
    absent: RopeDefaults,
) -> Result<RopeSpec> {
    if let Some(c) = inner
        && let Some(field) = c.nested_field()
    {
        return Err(c.error(field, "rope parameters for each layer type are not supported"));
    }
    let outer_theta = config.opt_positive("rope_theta")?;
    let inner_theta = inner.map(|c| c.opt_positive("rope_theta")).transpose()?.flatten();
    if let (Some(a), Some(b)) = (outer_theta, inner_theta)
        && a != b
    {
        return Err(config.error("rope_theta", format!("is {a}, but the rope parameters say {b}")));
    }
    let theta = inner_theta.or(outer_theta).unwrap_or(absent.theta);
    if theta <= 1.0 {
        return Err(config.error("rope_theta", format!("is {theta}, expected more than 1")));
    }
    let rotary_dim = rotary_dim(config, inner, head_dim, absent.partial)?;
    let scaling = match inner {
        None => RopeScaling::None,
        Some(c) => scaling(c, original(config, c, context, absent)?, context, rotary_dim)?,
    };
    let q_scale = match inner {
        Some(c) => query_scale(c, original(config, c, context, absent)?, absent)?,
        None => None,
    };
    Ok(RopeSpec { theta, rotary_dim, pairing: absent.pairing, q_scale, scaling })
}

/// Elements that are rotated: `partial_rotary_factor` of a head, an even number.
fn rotary_dim(
    config: &Config<'_>,
    inner: Option<&Config<'_>>,
    head_dim: usize,
    absent: f64,
) -> Result<usize> {
    const FIELD: &str = "partial_rotary_factor";
    let (mut part, mut place) = (absent, config);
    for c in [Some(config), inner].into_iter().flatten() {
        if let Some(given) = c.opt_positive(FIELD)? {
            (part, place) = (given, c);
        }
    }
    let dim = (head_dim as f64 * part) as usize;
    if part > 1.0 || dim == 0 || !dim.is_multiple_of(2) {
        let why = format!("is {part}, so that {dim} of {head_dim} elements rotate, expected an even number");
        return Err(place.error(FIELD, why));
    }
    Ok(dim)
}

/// Context of the first training. The outer field wins, as in transformers.
fn original(config: &Config<'_>, inner: &Config<'_>, context: usize, absent: RopeDefaults) -> Result<f64> {
    const FIELD: &str = "original_max_position_embeddings";
    let outer = config.opt_count(FIELD, bounds::CONTEXT)?.or(absent.original_context);
    let inner = inner.opt_count(FIELD, bounds::CONTEXT)?;
    Ok(outer.or(inner).unwrap_or(context) as f64)
}

/// `llama_4_scaling_beta`: how fast queries grow.
fn query_scale(c: &Config<'_>, original_context: f64, absent: RopeDefaults) -> Result<Option<QueryScale>> {
    const FIELD: &str = "llama_4_scaling_beta";
    match c.opt_number(FIELD)? {
        None | Some(0.0) => Ok(None),
        Some(beta) if absent.query_scale => Ok(Some(QueryScale { beta, original_context })),
        Some(beta) => Err(c.error(FIELD, format!("is {beta}, which this architecture does not support"))),
    }
}

fn scaling(c: &Config<'_>, original: f64, context: usize, rotary_dim: usize) -> Result<RopeScaling> {
    let kind = match c.either("rope_type", "type")? {
        None => "default",
        Some((field, v)) => {
            v.as_str().ok_or_else(|| c.error(field, format!("expected a text, got {}", short(v))))?
        }
    };
    let factor = || match c.positive("factor")? {
        f if f < 1.0 => Err(c.error("factor", format!("is {f}, expected at least 1"))),
        f => Ok(f),
    };
    let factor_or_context = || match c.get("factor") {
        Some(_) => factor(),
        None => Ok(context as f64 / original),
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => {
            let low_freq_factor = c.positive("low_freq_factor")?;
            let high_freq_factor = c.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let why =
                    format!("is {high_freq_factor}, expected more than `low_freq_factor` {low_freq_factor}");
                return Err(c.error("high_freq_factor", why));
            }
            let (factor, original_context) = (factor()?, original);
            Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
        }
        "yarn" => yarn(c, factor_or_context()?, original),
        "longrope" | "su" => longrope(c, factor_or_context()?, original, rotary_dim),
        other => {
            let known = "default, linear, llama3, yarn, longrope";
            let why = format!("`{}` is not supported; supported: {known}", other.escape_default());
            Err(c.error("rope_type", why))
        }
    }
}

fn yarn(c: &Config<'_>, factor: f64, original_context: f64) -> Result<RopeScaling> {
    let mscale = (c.opt_number("mscale")?, c.opt_number("mscale_all_dim")?);
    let attention_factor = c
        .opt_positive("attention_factor")?
        .unwrap_or_else(|| YarnSpec::default_attention_factor(factor, mscale.0, mscale.1));
    let beta_fast = c.positive_or("beta_fast", 32.0)?;
    let beta_slow = c.positive_or("beta_slow", 1.0)?;
    if beta_fast < beta_slow {
        return Err(c.error("beta_fast", format!("is {beta_fast}, below `beta_slow` {beta_slow}")));
    }
    let truncate = c.flag("truncate", true)?;
    Ok(RopeScaling::Yarn(YarnSpec {
        factor,
        original_context,
        beta_fast,
        beta_slow,
        attention_factor,
        truncate,
    }))
}

fn longrope(c: &Config<'_>, factor: f64, original: f64, rotary_dim: usize) -> Result<RopeScaling> {
    let grown = || (1.0 + factor.ln() / original.ln()).sqrt();
    let absent = if factor <= 1.0 || original <= 1.0 { 1.0 } else { grown() };
    Ok(RopeScaling::LongRope(LongRopeSpec {
        short: c.positives("short_factor", rotary_dim / 2)?,
        long: c.positives("long_factor", rotary_dim / 2)?,
        original_context: original as usize,
        attention_factor: c.positive_or("attention_factor", absent)?,
    }))
}
