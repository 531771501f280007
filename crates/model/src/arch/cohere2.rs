//! Command R7B and A: both blocks beside each other under one norm, which subtracts the mean; positions only where there
//! is a window.

use super::rope::{RopeDefaults, rope};
use super::shared::{
    Common, HeadDefaults, Kind, attention_with_biases, decoder, layer, layer_kinds, mlp, scale_logits,
    sliding_window, windows,
};
use crate::backend::{NormKind, Pairing};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{AttentionLayer, Ffn, LayerSpec, Mixer, ModelSpec, NormSpec, bounds};

pub(super) fn cohere2(config: &Config<'_>) -> Result<ModelSpec> {
    let eps = config.positive_or("layer_norm_eps", 1e-5)? as f32;
    let norm = NormSpec { kind: NormKind::Layer, eps, offset: 0.0, bias: false };
    let c = Common { norm, ..Common::read(config, 1e-5)? };
    let a = attention_with_biases(config, c.hidden, HeadDefaults::default())?;
    let pattern = config.count_or("sliding_window_pattern", bounds::LAYERS, 4)?;
    let absent = |i: usize| if (i + 1).is_multiple_of(pattern) { Kind::Full } else { Kind::Sliding };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let windows = windows(config, &kinds, sliding_window(config, Some(4_096))?)?;
    let adjacent = RopeDefaults { pairing: Pairing::Adjacent, ..RopeDefaults::USUAL };
    let rope = rope(config, a.head_dim, c.context, adjacent)?;
    let ffn = Ffn::Dense(mlp(config)?);
    let layer = |window: Option<u32>| {
        let a = AttentionLayer { rope: window.map(|_| 0), window, ..a.clone() };
        LayerSpec { parallel: true, ..layer(c.norm, Mixer::Attention(a), ffn.clone()) }
    };
    let layers = windows.into_iter().map(layer).collect();
    let mut spec = decoder(config, &c, layers, vec![rope], true)?;
    scale_logits(&mut spec, config.positive_or("logit_scale", 0.0625)?);
    Ok(spec)
}
