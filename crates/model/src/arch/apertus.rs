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
