//! Llama, and whatever calls itself so.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, Kind, attention_with_biases, decoder, layer, layer_kinds, mlp};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{Ffn, Mixer, MlpLayer, ModelSpec};

pub(super) fn llama(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let a = attention_with_biases(config, c.hidden, HeadDefaults::default())?;
    layer_kinds(config, c.layers, &[Kind::Full], |_| Kind::Full)?;
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let mlp = MlpLayer { bias: config.flag("mlp_bias", false)?, ..mlp(config)? };
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}
