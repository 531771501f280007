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
