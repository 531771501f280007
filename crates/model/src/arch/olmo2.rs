//! OLMo 2: norms after the blocks, and of all query heads and all key heads together.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention_with_biases, decoder, layer, mlp};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{AttentionLayer, Ffn, LayerSpec, Mixer, ModelSpec, Placement, QkNorm};

pub(super) fn olmo2(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let a = AttentionLayer {
        qk_norm: Some(QkNorm { norm: c.norm, across_heads: true }),
        ..attention_with_biases(config, c.hidden, HeadDefaults::default())?
    };
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let layer = LayerSpec {
        placement: Placement::After,
        ..layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp(config)?))
    };
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}
