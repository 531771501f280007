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
    // Some published configurations say so; it is always so.
    if !config.flag("use_qk_norm", true)? {
        return Err(config.error("use_qk_norm", "is false, but heads of this architecture are always normed"));
    }
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{attention, refusal, spec};
    use super::*;

    const KV: &str = "num_key_value_heads";

    #[test]
    fn windows_are_in_the_upper_layers_if_they_are_in_use() {
        let windows = |extra: Value| {
            let mut fields = json!({"sliding_window": 9, KV: 2});
            fields.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
            super::super::tests::windows(&spec("Qwen2ForCausalLM", &fields))
        };
        assert_eq!(windows(json!({"max_window_layers": 0})), [None; 4], "not in use");
        let used = json!({"use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(windows(used), [None, None, Some(9), Some(9)]);
        let types = json!({"use_sliding_window": true, "layer_types":
            ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]});
        assert_eq!(windows(types), [Some(9), None, Some(9), None]);
        let unused = json!({KV: 2, "layer_types": vec!["sliding_attention"; 4]});
        assert!(refusal("Qwen2ForCausalLM", &unused).contains("no `sliding_window` is in force"));
        let linear = json!({KV: 2, "layer_types": vec!["linear_attention"; 4]});
        assert!(refusal("Qwen3ForCausalLM", &linear).contains("`linear_attention` is not supported"));
    }

    #[test]
    fn biases_norms_and_heads() {
        let s = spec("Qwen2ForCausalLM", &json!({KV: null}));
        let a = attention(&s, 0);
        assert!(a.qkv_bias && !a.output_bias && a.qk_norm.is_none());
        assert_eq!((a.kv_heads, a.head_dim), (8, 8), "null is as many as queries have");
        assert!(refusal("Qwen2ForCausalLM", &json!({})).contains("32 does not divide"), "the default is 32");
        let s = spec("Qwen3ForCausalLM", &json!({KV: 2}));
        let a = attention(&s, 0);
        assert_eq!(a.head_dim, 128, "Qwen 3's default, not hidden / heads");
        assert!(a.qk_norm.is_some_and(|n| !n.across_heads) && !a.qkv_bias);
    }

    #[test]
    fn layers_with_and_without_experts() {
        let name = "Qwen3MoeForCausalLM";
        let s = spec(
            name,
            &json!({"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts": 16,
            "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
        );
        let sparse: Vec<_> = s.layers.iter().map(|l| matches!(l.ffn, Ffn::Moe(_))).collect();
        assert_eq!(sparse, [false, true, false, false]);
        let Ffn::Moe(moe) = &s.layers[1].ffn else { panic!("no experts") };
        assert_eq!((moe.route.experts, moe.route.top_k, moe.route.normalize), (16, 3, false));
        assert_eq!((moe.expert.intermediate, attention(&s, 0).head_dim), (24, 8));
        assert_eq!(s.parameters() - s.active_parameters(), 13 * 3 * 64 * 24);
        let defaults = spec(name, &json!({}));
        let Ffn::Moe(moe) = &defaults.layers[0].ffn else { panic!("no experts") };
        assert_eq!((moe.route.experts, moe.route.top_k, moe.expert.intermediate), (128, 8, 768));
        let Ffn::Moe(moe) = &spec(name, &json!({"num_local_experts": 12})).layers[0].ffn else { panic!() };
        assert_eq!(moe.route.experts, 12);
        spec(name, &json!({"use_qk_norm": true, "shared_expert_intermediate_size": 0}));
        assert!(refusal(name, &json!({"use_qk_norm": false})).contains("`use_qk_norm`"));
        assert!(refusal(name, &json!({"mlp_only_layers": 3})).contains("`mlp_only_layers`"));
        assert!(refusal(name, &json!({"n_shared_experts": 1.5})).contains("`n_shared_experts`"));
    }
}
