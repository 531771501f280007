//! Qwen 2, whose q, k and v have biases; Qwen 3, whose heads are normed; and Qwen 3 with experts.

use super::rope::{RopeDefaults, rope};
use super::shared::{
    Common, HeadDefaults, Kind, attention, attention_with_biases, decoder, layer, layer_kinds, mlp,
    sliding_window, windows,
};
use crate::backend::{RouteSpec, Scoring};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{AttentionLayer, Ffn, Mixer, MlpLayer, ModelSpec, MoeLayer, QkNorm, bounds};

pub(super) fn qwen2(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let heads = HeadDefaults { kv_heads: Some(32), head_dim: None };
    let a = AttentionLayer { qkv_bias: true, ..attention(config, c.hidden, heads)? };
    dense(config, c, &a)
}

pub(super) fn qwen3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let heads = HeadDefaults { kv_heads: Some(32), head_dim: Some(128) };
    let qk_norm = Some(QkNorm { norm: c.norm, across_heads: false });
    let a = AttentionLayer { qk_norm, ..attention_with_biases(config, c.hidden, heads)? };
    dense(config, c, &a)
}

/// Windows in the upper layers, or in those that `layer_types` names, if they are in use.
fn dense(config: &Config<'_>, c: Common, a: &AttentionLayer) -> Result<ModelSpec> {
    let used = config.flag("use_sliding_window", false)?;
    let window = sliding_window(config, Some(4_096))?.filter(|_| used);
    let first = config.opt_whole("max_window_layers")?.unwrap_or(28);
    let absent = |i| if window.is_some() && i >= first { Kind::Sliding } else { Kind::Full };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let ffn = Ffn::Dense(mlp(config)?);
    let layer = |window| layer(c.norm, Mixer::Attention(AttentionLayer { window, ..a.clone() }), ffn.clone());
    let layers = windows(config, &kinds, window)?.into_iter().map(layer).collect();
    decoder(config, &c, layers, vec![rope], false)
}

pub(super) fn qwen3_moe(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let heads = HeadDefaults { kv_heads: Some(4), head_dim: None };
    let used = config.flag("use_sliding_window", false)?;
    let a = AttentionLayer {
        qk_norm: Some(QkNorm { norm: c.norm, across_heads: false }),
        window: sliding_window(config, Some(4_096))?.filter(|_| used),
        ..attention_with_biases(config, c.hidden, heads)?
    };
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let dense = mlp(config)?;
    let moe = experts(config, &dense)?;
    let step = config.count_or("decoder_sparse_step", bounds::LAYERS, 1)?;
    let only_dense = config.opt_wholes("mlp_only_layers", bounds::LAYERS as usize)?.unwrap_or_default();
    let layer = |i: usize| {
        let sparse = !only_dense.contains(&i) && (i + 1).is_multiple_of(step);
        let ffn = if sparse { Ffn::Moe(moe.clone()) } else { Ffn::Dense(dense.clone()) };
        layer(c.norm, Mixer::Attention(a.clone()), ffn)
    };
    decoder(config, &c, (0..c.layers).map(layer).collect(), vec![rope], false)
}

/// Experts as Qwen's configurations describe them: softmax over all, the largest chosen; no shared one.
fn experts(config: &Config<'_>, dense: &MlpLayer) -> Result<MoeLayer> {
    // transformers knows the number under both names.
    let experts = match config.opt_count("num_experts", bounds::EXPERTS)? {
        Some(n) => n,
        None => config.count_or("num_local_experts", bounds::EXPERTS, 128)?,
    };
    let expert = MlpLayer {
        intermediate: config.count_or("moe_intermediate_size", bounds::INTERMEDIATE, 768)?,
        ..dense.clone()
    };
    Ok(MoeLayer {
        route: RouteSpec {
            experts,
            top_k: config.count_or("num_experts_per_tok", experts as u64, 8)?,
            scoring: Scoring::Softmax,
            normalize: config.flag("norm_topk_prob", false)?,
            scale: 1.0,
            groups: None,
        },
        router_bias: false,
        correction: false,
        expert_scale: false,
        expert,
        shared: None,
        shared_gate: false,
    })
}
