//! Granite: Llama with factors on the embedding, the scores, the residual stream and the logits.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention_with_biases, decoder, layer, mlp, scale_logits};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{AttentionLayer, Ffn, LayerSpec, Mixer, MlpLayer, ModelSpec};

pub(super) fn granite(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let scale = config.positive_or("attention_multiplier", 1.0)? as f32;
    let a = attention_with_biases(config, c.hidden, HeadDefaults::default())?;
    let a = AttentionLayer { scale, ..a };
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let mlp = MlpLayer { bias: config.flag("mlp_bias", false)?, ..mlp(config)? };
    let layer = LayerSpec {
        residual_scale: config.positive_or("residual_multiplier", 1.0)? as f32,
        ..layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp))
    };
    let mut spec = decoder(config, &c, vec![layer; c.layers], vec![rope], false)?;
    spec.embed_scale = config.positive_or("embedding_multiplier", 1.0)? as f32;
    scale_logits(&mut spec, 1.0 / config.positive_or("logits_scaling", 1.0)?);
    Ok(spec)
}
