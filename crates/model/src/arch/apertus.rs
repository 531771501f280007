//! Apertus: normed heads, and a feed-forward block without a gate whose activation is trained (xIELU).

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention_with_biases, decoder, layer};
use crate::backend::Activation;
use crate::config::Config;
use crate::error::Result;
use crate::names::{Naming, Stored, decoder_layer};
use crate::rope::RopeScaling;
use crate::spec::{AttentionLayer, Ffn, Mixer, MlpLayer, ModelSpec, QkNorm, bounds};
use crate::weights::{Part, TensorId, shape};

/// Its norms have names of their own.
pub(super) const NAMING: Naming = Naming { layer: names, ..Naming::DECODER };

fn names(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let whole = |name: &str| vec![Stored::whole(name, shape(spec, TensorId::Layer(layer, part)))];
    match part {
        Part::AttentionNorm => whole("attention_layernorm.weight"),
        Part::MlpNorm => whole("feedforward_layernorm.weight"),
        _ => decoder_layer(spec, layer, part),
    }
}

pub(super) fn apertus(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let a = AttentionLayer {
        qk_norm: Some(QkNorm { norm: c.norm, across_heads: false }),
        ..attention_with_biases(config, c.hidden, HeadDefaults::default())?
    };
    let mut rope = rope(config, a.head_dim, c.context, RopeDefaults { theta: 12e6, ..RopeDefaults::USUAL })?;
    if config.get("rope_parameters").or_else(|| config.get("rope_scaling")).is_none() {
        rope.scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8_192.0,
        };
    }
    if let Some(name) = config.opt_text("hidden_act")?.filter(|name| *name != "xielu") {
        let why = format!("`{}` is not supported; supported: xielu", name.escape_default());
        return Err(config.error("hidden_act", why));
    }
    let mlp = MlpLayer {
        intermediate: config.count("intermediate_size", bounds::INTERMEDIATE)?,
        activation: Activation::Xielu { alpha_p: 0.0, alpha_n: 0.0, beta: 0.5, eps: -1e-6 },
        gated: false,
        bias: false,
    };
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{refusal, spec};
    use super::*;
    use crate::weights::layer_parts;

    const NAME: &str = "ApertusForCausalLM";

    #[test]
    fn no_gate_and_trained_activation() {
        let s = spec(NAME, &json!({}));
        let parts = layer_parts(&s, 0);
        assert!(parts.contains(&Part::XieluP) && parts.contains(&Part::XieluN));
        assert!(!parts.contains(&Part::Mlp(crate::weights::MlpPart::Gate)));
        assert_eq!(names(&s, 0, Part::MlpNorm)[0].name, "feedforward_layernorm.weight");
        assert!(matches!(s.ropes[0].scaling, RopeScaling::Llama3 { factor: 8.0, .. }), "its default");
        assert_eq!(s.ropes[0].theta, 12e6);
        let plain = spec(NAME, &json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}));
        assert_eq!((&plain.ropes[0].scaling, plain.ropes[0].theta), (&RopeScaling::None, 5e5));
        assert!(refusal(NAME, &json!({"hidden_act": "silu"})).contains("supported: xielu"));
    }
}
