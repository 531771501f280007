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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{attention, refusal, spec};
    use crate::spec::Head;

    const NAME: &str = "GraniteForCausalLM";

    #[test]
    fn four_factors() {
        let s = spec(
            NAME,
            &json!({"embedding_multiplier": 12.0, "logits_scaling": 8, "residual_multiplier": 0.25,
            "attention_multiplier": 0.125}),
        );
        assert_eq!((s.embed_scale, s.layers[1].residual_scale, attention(&s, 0).scale), (12.0, 0.25, 0.125));
        assert!(matches!(s.head, Head::Logits { scale: 0.125, tied: false, .. }));
        let s = spec(NAME, &json!({}));
        assert_eq!((s.embed_scale, s.layers[1].residual_scale, attention(&s, 0).scale), (1.0, 1.0, 1.0));
        assert!(refusal(NAME, &json!({"logits_scaling": 0})).contains("`logits_scaling`"));
    }
}
