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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::tests::{attention, spec};
    use crate::weights::{Part, TensorId, layer_parts, shape};

    #[test]
    fn norms_after_blocks_and_across_heads() {
        let s = spec("Olmo2ForCausalLM", &json!({"num_key_value_heads": 2}));
        assert!(attention(&s, 0).qk_norm.unwrap().across_heads);
        let parts = layer_parts(&s, 0);
        assert!(!parts.contains(&Part::AttentionNorm) && parts.contains(&Part::MlpPostNorm));
        assert_eq!(shape(&s, TensorId::Layer(0, Part::QNorm)), [64]);
        assert_eq!(shape(&s, TensorId::Layer(0, Part::KNorm)), [16]);
        assert_eq!(s.final_norm.unwrap().eps, 1e-5);
    }
}
