//! gpt-oss: experts with biases and limited gates, a sink in every head, and a window in every other layer.

use super::rope::{RopeDefaults, rope};
use super::shared::{
    Common, HeadDefaults, Kind, attention, decoder, layer, layer_kinds, sliding_window, top_k, windows,
};
use crate::backend::{Activation, RouteSpec, Scoring};
use crate::config::Config;
use crate::error::Result;
use crate::names::{Naming, gpt_oss_layer};
use crate::rope::{RopeScaling, YarnSpec};
use crate::spec::{AttentionLayer, Ffn, Mixer, MlpLayer, ModelSpec, MoeLayer, bounds};

/// Its experts are stored in a way of their own.
pub(super) const NAMING: Naming = Naming { layer: gpt_oss_layer, ..Naming::DECODER };

/// Slope of the gate's sigmoid; published configurations do not name it.
const ALPHA: f64 = 1.702;

pub(super) fn gpt_oss(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let heads = HeadDefaults { kv_heads: Some(8), head_dim: Some(64) };
    let bias = config.flag("attention_bias", true)?;
    let a = attention(config, c.hidden, heads)?;
    let a = AttentionLayer { sinks: true, qkv_bias: bias, output_bias: bias, ..a };
    let absent = |i: usize| if i.is_multiple_of(2) { Kind::Sliding } else { Kind::Full };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let windows = windows(config, &kinds, sliding_window(config, Some(128))?)?;
    let mut rope =
        rope(config, a.head_dim, c.context, RopeDefaults { theta: 150_000.0, ..RopeDefaults::USUAL })?;
    if config.get("rope_parameters").or_else(|| config.get("rope_scaling")).is_none() {
        rope.scaling = RopeScaling::Yarn(YarnSpec {
            factor: 32.0,
            original_context: 4_096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: YarnSpec::default_attention_factor(32.0, None, None),
            truncate: false,
        });
    }
    let ffn = Ffn::Moe(experts(config)?);
    let layer = |window| layer(c.norm, Mixer::Attention(AttentionLayer { window, ..a.clone() }), ffn.clone());
    decoder(config, &c, windows.into_iter().map(layer).collect(), vec![rope], false)
}

fn experts(config: &Config<'_>) -> Result<MoeLayer> {
    // transformers knows the number under both names.
    let experts = match config.opt_count("num_local_experts", bounds::EXPERTS)? {
        Some(n) => n,
        None => config.count_or("num_experts", bounds::EXPERTS, 128)?,
    };
    let (alpha, limit) =
        (config.positive_or("swiglu_alpha", ALPHA)?, config.positive_or("swiglu_limit", 7.0)?);
    Ok(MoeLayer {
        route: RouteSpec {
            experts,
            top_k: top_k(config, "num_experts_per_tok", experts, 4)?,
            scoring: Scoring::SoftmaxOfChosen,
            normalize: false,
            scale: 1.0,
            groups: None,
        },
        router_bias: true,
        correction: false,
        expert_scale: false,
        expert: MlpLayer {
            intermediate: config.count_or("intermediate_size", bounds::INTERMEDIATE, 2_880)?,
            activation: Activation::ClampedSwiglu { alpha: alpha as f32, limit: limit as f32 },
            gated: true,
            bias: true,
        },
        shared: None,
        shared_gate: false,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::spec_from_config;
    use super::*;

    fn spec(fields: &serde_json::Value) -> Result<ModelSpec> {
        let mut config = json!({
            "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 100,
            "num_attention_heads": 16, "max_position_embeddings": 512,
        });
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config("config.json", config.as_object().unwrap())
    }

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec(&json!({})).unwrap();
        let windows: Vec<_> = s.layers.iter().map(|l| attention_of(l).window).collect();
        assert_eq!(windows, [Some(128), None, Some(128)]);
        let a = attention_of(&s.layers[0]);
        assert!(a.sinks && a.qkv_bias && a.output_bias);
        assert_eq!((a.kv_heads, a.head_dim), (8, 64));
        let RopeScaling::Yarn(yarn) = &s.ropes[0].scaling else { panic!("not yarn") };
        assert!(!yarn.truncate && yarn.factor == 32.0 && s.ropes[0].theta == 150_000.0);
        let Ffn::Moe(moe) = &s.layers[1].ffn else { panic!("no experts") };
        assert_eq!((moe.route.experts, moe.route.top_k, moe.expert.intermediate), (128, 4, 2_880));
        assert_eq!(moe.expert.activation, Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 });
        assert!(moe.router_bias && moe.expert.bias);
    }

    fn attention_of(layer: &crate::spec::LayerSpec) -> &AttentionLayer {
        match &layer.mixer {
            Mixer::Attention(a) => a,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn fields_are_read_and_checked() {
        let s = spec(&json!({"num_experts": 5, "swiglu_limit": 3.0, "attention_bias": false})).unwrap();
        let Ffn::Moe(moe) = &s.layers[0].ffn else { panic!("no experts") };
        assert_eq!(moe.route.experts, 5);
        assert_eq!(moe.expert.activation, Activation::ClampedSwiglu { alpha: 1.702, limit: 3.0 });
        assert!(!attention_of(&s.layers[0]).qkv_bias);
        let e = spec(&json!({"num_local_experts": 3})).unwrap_err();
        assert!(e.to_string().contains("`num_experts_per_tok`: is 4, expected 1 to 3"), "absent: {e}");
        let e = spec(&json!({"num_local_experts": 9, "num_experts_per_tok": 10})).unwrap_err();
        assert!(e.to_string().contains("`num_experts_per_tok`: is 10, expected 1 to 9"), "{e}");
        let e = spec(&json!({"sliding_window": null})).unwrap_err();
        assert!(e.to_string().contains("layer_types"), "{e}");
    }
}
