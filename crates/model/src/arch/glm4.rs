//! GLM 4 (0414): norms around both blocks, a fused feed-forward projection, and half of each head rotated in pairs of
//! neighbours.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention, decoder, layer, mlp};
use crate::backend::Pairing;
use crate::config::Config;
use crate::error::Result;
use crate::names::{Naming, Stored, decoder_layer};
use crate::spec::{AttentionLayer, Ffn, LayerSpec, Mixer, ModelSpec, Placement};
use crate::weights::{Part, TensorId, shape};

/// Its norms have names of their own.
pub(super) const NAMING: Naming = Naming { layer: names, ..Naming::DECODER };

fn names(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let whole = |name: &str| vec![Stored::whole(name, shape(spec, TensorId::Layer(layer, part)))];
    match part {
        Part::AttentionPostNorm => whole("post_self_attn_layernorm.weight"),
        Part::MlpNorm => whole("post_attention_layernorm.weight"),
        Part::MlpPostNorm => whole("post_mlp_layernorm.weight"),
        _ => decoder_layer(spec, layer, part),
    }
}

pub(super) fn glm4(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1.5625e-7)?;
    let heads = HeadDefaults { kv_heads: Some(2), head_dim: Some(128) };
    // Its field rules q, k and v; the output has none.
    let qkv_bias = config.flag("attention_bias", true)?;
    let a = AttentionLayer { qkv_bias, ..attention(config, c.hidden, heads)? };
    let half = RopeDefaults { pairing: Pairing::Adjacent, partial: 0.5, ..RopeDefaults::USUAL };
    let rope = rope(config, a.head_dim, c.context, half)?;
    let layer = LayerSpec {
        placement: Placement::Around,
        ..layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp(config)?))
    };
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{attention, refusal, spec};
    use super::*;
    use crate::weights::MlpPart;

    const NAME: &str = "Glm4ForCausalLM";

    #[test]
    fn half_of_each_head_rotates() {
        let s = spec(NAME, &json!({}));
        let a = attention(&s, 0);
        assert_eq!((a.head_dim, a.kv_heads, s.ropes[0].rotary_dim), (128, 2, 64));
        assert_eq!(s.ropes[0].pairing, Pairing::Adjacent);
        assert!(a.qkv_bias && !a.output_bias, "biases are the default");
        let name = |part| names(&s, 0, part).into_iter().map(|stored| stored.name).collect::<Vec<_>>();
        assert_eq!(name(Part::MlpNorm), ["post_attention_layernorm.weight"]);
        assert_eq!(name(Part::Mlp(MlpPart::Up)), ["mlp.up_proj.weight", "mlp.gate_up_proj.weight"]);
        assert!(refusal(NAME, &json!({"head_dim": 7})).contains("`head_dim`"));
    }
}
