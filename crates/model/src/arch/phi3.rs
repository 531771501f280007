//! Phi 3 and Phi 4: Llama with fused projections, a rotation of a part of each head, and LongRoPE.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention, decoder, layer, mlp, sliding_window};
use crate::config::Config;
use crate::error::Result;
use crate::rope::RopeScaling;
use crate::spec::{AttentionLayer, Ffn, Mixer, ModelSpec};

pub(super) fn phi3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let a = attention(config, c.hidden, HeadDefaults::default())?;
    let a = AttentionLayer { window: sliding_window(config, None)?, ..a };
    let absent = RopeDefaults { original_context: Some(4_096), ..RopeDefaults::USUAL };
    let rope = rope(config, a.head_dim, c.context, absent)?;
    if !matches!(rope.scaling, RopeScaling::None | RopeScaling::LongRope(_)) {
        let field = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        return Err(config.error(field, "this architecture knows the types default and longrope"));
    }
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp(config)?));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}
