//! Mistral: Llama with a window in every layer; Ministral 3, whose queries grow with their position; their wrapper for
//! images; and Mixtral, which has experts.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention, decoder, layer, mlp, sliding_window};
use crate::backend::{RouteSpec, Scoring};
use crate::config::Config;
use crate::error::Result;
use crate::rope::{QueryScale, RopeScaling, YarnSpec};
use crate::spec::{AttentionLayer, Ffn, Mixer, ModelSpec, MoeLayer, bounds};

pub(super) fn mistral(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let heads = HeadDefaults { kv_heads: Some(8), head_dim: None };
    let a = attention(config, c.hidden, heads)?;
    let a = AttentionLayer { window: sliding_window(config, Some(4_096))?, ..a };
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp(config)?));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}

pub(super) fn ministral3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let heads = HeadDefaults { kv_heads: Some(8), head_dim: Some(128) };
    let a = attention(config, c.hidden, heads)?;
    let a = AttentionLayer { window: sliding_window(config, None)?, ..a };
    let absent = RopeDefaults { query_scale: true, theta: 1e6, ..RopeDefaults::USUAL };
    let mut rope = rope(config, a.head_dim, c.context, absent)?;
    if config.get("rope_parameters").or_else(|| config.get("rope_scaling")).is_none() {
        let original_context = 16_384.0;
        rope.scaling = RopeScaling::Yarn(YarnSpec {
            factor: 16.0,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: YarnSpec::default_attention_factor(16.0, Some(1.0), Some(1.0)),
            truncate: true,
        });
        rope.q_scale = Some(QueryScale { beta: 0.1, original_context });
    }
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp(config)?));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}

/// The text part says by `model_type` which of the two it is.
pub(super) fn mistral3(config: &Config<'_>) -> Result<ModelSpec> {
    match config.opt_text("model_type")?.unwrap_or("mistral") {
        "mistral" => mistral(config),
        "ministral3" => ministral3(config),
        other => {
            let why =
                format!("`{}` is not supported; supported: mistral, ministral3", other.escape_default());
            Err(config.error("model_type", why))
        }
    }
}

pub(super) fn mixtral(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let heads = HeadDefaults { kv_heads: Some(8), head_dim: None };
    let a = attention(config, c.hidden, heads)?;
    let a = AttentionLayer { window: sliding_window(config, None)?, ..a };
    let rope = rope(config, a.head_dim, c.context, RopeDefaults { theta: 1e6, ..RopeDefaults::USUAL })?;
    let experts = config.count_or("num_local_experts", bounds::EXPERTS, 8)?;
    let moe = MoeLayer {
        route: RouteSpec {
            experts,
            top_k: config.count_or("num_experts_per_tok", experts as u64, 2)?,
            scoring: Scoring::Softmax,
            normalize: true,
            scale: 1.0,
            groups: None,
        },
        router_bias: false,
        correction: false,
        expert_scale: false,
        expert: mlp(config)?,
        shared: None,
        shared_gate: false,
    };
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Moe(moe));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{attention, refusal, spec, windows};
    use super::*;

    #[test]
    fn mistral_has_a_window_unless_told_otherwise() {
        let name = "MistralForCausalLM";
        assert_eq!(windows(&spec(name, &json!({}))), [Some(4_096); 4], "transformers' default");
        assert_eq!(windows(&spec(name, &json!({"sliding_window": null}))), [None; 4]);
        assert!(refusal(name, &json!({"sliding_window": 0})).contains("`sliding_window`"));
    }

    #[test]
    fn ministral_grows_its_queries() {
        let name = "Ministral3ForCausalLM";
        let s = spec(name, &json!({}));
        assert_eq!((attention(&s, 0).head_dim, attention(&s, 0).window), (128, None));
        assert!(
            matches!(&s.ropes[0].scaling, RopeScaling::Yarn(y) if y.factor == 16.0 && y.attention_factor == 1.0)
        );
        assert_eq!(s.ropes[0].q_scale, Some(QueryScale { beta: 0.1, original_context: 16_384.0 }));
        assert_eq!(s.ropes[0].theta, 1e6);
        let given = json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
            "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.25}});
        let q_scale = spec(name, &given).ropes[0].q_scale;
        assert_eq!(q_scale, Some(QueryScale { beta: 0.25, original_context: 32.0 }));
    }

    #[test]
    fn mixtral_divides_by_the_sum_of_the_chosen() {
        let name = "MixtralForCausalLM";
        let s = spec(name, &json!({}));
        let Ffn::Moe(moe) = &s.layers[3].ffn else { panic!("no experts") };
        assert_eq!((moe.route.experts, moe.route.top_k, moe.route.normalize), (8, 2, true));
        assert_eq!((attention(&s, 0).window, s.ropes[0].theta), (None, 1e6));
        assert_eq!(s.parameters() - s.active_parameters(), 4 * 6 * 3 * 64 * 96);
        let error = refusal(name, &json!({"num_experts_per_tok": 9}));
        assert!(error.contains("`num_experts_per_tok`: is 9, expected 1 to 8"), "{error}");
        assert!(refusal(name, &json!({"num_local_experts": 1 << 20})).contains("`num_local_experts`"));
    }
}
