//! Qwen 3-Next and 3.5 (3.6 too): gated delta nets and gated attention by turns.
//!
//! The multimodal wrappers' text parts are the same models: text has one position in all sections of their rotation.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, Kind, attention, decoder, layer, layer_kinds, mlp, top_k};
use crate::backend::{Activation, DeltaShape, RouteSpec, Scoring};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{
    AttentionLayer, DeltaLayer, Ffn, Mixer, MlpLayer, ModelSpec, MoeLayer, NormSpec, QkNorm, bounds,
};

/// Where the generations differ in what an absent field means.
struct ExpertDefaults {
    experts: usize,
    top_k: usize,
    /// Whether `norm_topk_prob` is a field; else weights are always divided by their sum.
    norm_field: bool,
}

pub(super) fn qwen3_next(config: &Config<'_>) -> Result<ModelSpec> {
    let dense = mlp(config)?;
    // 0 experts are dense layers everywhere.
    let none = config.opt_whole("num_experts")? == Some(0);
    let absent = ExpertDefaults { experts: 512, top_k: 10, norm_field: true };
    let moe = if none { None } else { Some(experts(config, &dense, &absent)?) };
    let step = config.count_or("decoder_sparse_step", bounds::LAYERS, 1)?;
    let only_dense = config.opt_wholes("mlp_only_layers", bounds::LAYERS as usize)?.unwrap_or_default();
    hybrid(config, 2, |i| match &moe {
        Some(moe) if !only_dense.contains(&i) && (i + 1).is_multiple_of(step) => Ffn::Moe(moe.clone()),
        _ => Ffn::Dense(dense.clone()),
    })
}

pub(super) fn qwen3_5(config: &Config<'_>) -> Result<ModelSpec> {
    let dense = mlp(config)?;
    hybrid(config, 4, |_| Ffn::Dense(dense.clone()))
}

pub(super) fn qwen3_5_moe(config: &Config<'_>) -> Result<ModelSpec> {
    let activation = config.activation("hidden_act")?;
    let expert = MlpLayer { intermediate: 512, activation, gated: true, bias: false };
    let absent = ExpertDefaults { experts: 256, top_k: 8, norm_field: false };
    let moe = experts(config, &expert, &absent)?;
    hybrid(config, 2, |_| Ffn::Moe(moe.clone()))
}

/// The layers, as `layer_types` says, else with full attention in every fourth.
fn hybrid(config: &Config<'_>, kv_heads: usize, ffn: impl Fn(usize) -> Ffn) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let plain = c.norm;
    let c = Common { norm: NormSpec { offset: 1.0, ..plain }, ..c };
    let heads = HeadDefaults { kv_heads: Some(kv_heads), head_dim: Some(256) };
    let a = AttentionLayer {
        qk_norm: Some(QkNorm { norm: c.norm, across_heads: false }),
        gated: true,
        ..attention(config, c.hidden, heads)?
    };
    refuse(config)?;
    let delta = DeltaLayer { shape: delta_shape(config)?, norm: plain };
    let interval = config.count_or("full_attention_interval", bounds::LAYERS, 4)?;
    let absent = |i: usize| if (i + 1).is_multiple_of(interval) { Kind::Full } else { Kind::Linear };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Linear], absent)?;
    let rope = rope(config, a.head_dim, c.context, RopeDefaults { partial: 0.25, ..RopeDefaults::USUAL })?;
    let of = |(i, kind): (usize, &Kind)| {
        let mixer = match kind {
            Kind::Linear => Mixer::Delta(delta.clone()),
            _ => Mixer::Attention(a.clone()),
        };
        layer(c.norm, mixer, ffn(i))
    };
    decoder(config, &c, kinds.iter().enumerate().map(of).collect(), vec![rope], false)
}

/// What changes the numbers and is not built.
fn refuse(config: &Config<'_>) -> Result<()> {
    if config.flag("attention_bias", false)? {
        return Err(config.error("attention_bias", "is true, which is not supported beside a gate"));
    }
    if !config.flag("attn_output_gate", true)? {
        return Err(config.error("attn_output_gate", "is false, but this architecture's attention is gated"));
    }
    // It follows the convolution too.
    if config.activation("hidden_act")? != Activation::Silu {
        return Err(config.error("hidden_act", "is not silu, which is all that delta nets have"));
    }
    Ok(())
}

fn delta_shape(config: &Config<'_>) -> Result<DeltaShape> {
    let shape = DeltaShape {
        k_heads: config.count_or("linear_num_key_heads", bounds::HEADS, 16)?,
        v_heads: config.count_or("linear_num_value_heads", bounds::HEADS, 32)?,
        k_dim: config.count_or("linear_key_head_dim", bounds::HEAD_DIM, 128)?,
        v_dim: config.count_or("linear_value_head_dim", bounds::HEAD_DIM, 128)?,
        taps: config.count_or("linear_conv_kernel_dim", bounds::TAPS, 4)?,
    };
    if !shape.v_heads.is_multiple_of(shape.k_heads) {
        let why = format!("is {}, no multiple of `linear_num_key_heads` {}", shape.v_heads, shape.k_heads);
        return Err(config.error("linear_num_value_heads", why));
    }
    Ok(shape)
}

/// Experts beside a gated shared one.
fn experts(config: &Config<'_>, expert: &MlpLayer, absent: &ExpertDefaults) -> Result<MoeLayer> {
    let experts = config.count_or("num_experts", bounds::EXPERTS, absent.experts)?;
    let width = |field| -> Result<MlpLayer> {
        let intermediate = config.count_or(field, bounds::INTERMEDIATE, 512)?;
        Ok(MlpLayer { intermediate, ..expert.clone() })
    };
    Ok(MoeLayer {
        route: RouteSpec {
            experts,
            top_k: top_k(config, "num_experts_per_tok", experts, absent.top_k)?,
            scoring: Scoring::Softmax,
            normalize: !absent.norm_field || config.flag("norm_topk_prob", true)?,
            scale: 1.0,
            groups: None,
        },
        router_bias: false,
        correction: false,
        expert_scale: false,
        expert: width("moe_intermediate_size")?,
        shared: Some(width("shared_expert_intermediate_size")?),
        shared_gate: true,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::super::spec_from_config;
    use super::*;

    fn spec(name: &str, fields: &Value) -> Result<ModelSpec> {
        let mut config = json!({"architectures": [name], "hidden_size": 64, "num_hidden_layers": 5, "vocab_size": 100,
            "intermediate_size": 96, "num_attention_heads": 8, "max_position_embeddings": 512});
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config("config.json", config.as_object().unwrap())
    }

    fn moe(s: &ModelSpec, layer: usize) -> &MoeLayer {
        match &s.layers[layer].ffn {
            Ffn::Moe(moe) => moe,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec("Qwen3NextForCausalLM", &json!({})).unwrap();
        let delta: Vec<_> = s.layers.iter().map(|l| matches!(l.mixer, Mixer::Delta(_))).collect();
        assert_eq!(delta, [true, true, true, false, true]);
        let Mixer::Delta(d) = &s.layers[0].mixer else { panic!("no delta net") };
        assert_eq!(d.shape, DeltaShape { k_heads: 16, v_heads: 32, k_dim: 128, v_dim: 128, taps: 4 });
        assert_eq!((d.norm.offset, s.layers[0].norm.offset), (0.0, 1.0));
        let Mixer::Attention(a) = &s.layers[3].mixer else { panic!("no attention") };
        assert!(a.gated && a.qk_norm.is_some() && a.head_dim == 256 && a.kv_heads == 2);
        assert_eq!(s.ropes[0].rotary_dim, 64);
        let m = moe(&s, 0);
        assert_eq!((m.route.experts, m.route.top_k, m.route.normalize, m.shared_gate), (512, 10, true, true));
        let s = spec("Qwen3_5MoeForCausalLM", &json!({"norm_topk_prob": false})).unwrap();
        let m = moe(&s, 0);
        assert_eq!((m.route.experts, m.route.top_k, m.route.normalize), (256, 8, true), "not a field here");
        let s = spec("Qwen3_5ForCausalLM", &json!({"full_attention_interval": 2})).unwrap();
        assert!(matches!(s.layers[1].mixer, Mixer::Attention(_)) && matches!(s.layers[0].ffn, Ffn::Dense(_)));
    }

    #[test]
    fn layers_may_be_dense() {
        let fields = json!({"mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": false});
        let s = spec("Qwen3NextForCausalLM", &fields).unwrap();
        let dense: Vec<_> = s.layers.iter().map(|l| matches!(l.ffn, Ffn::Dense(_))).collect();
        assert_eq!(dense, [true, true, true, false, true]);
        assert!(!moe(&s, 3).route.normalize);
        let s = spec("Qwen3NextForCausalLM", &json!({"num_experts": 0})).unwrap();
        assert!(s.layers.iter().all(|l| matches!(l.ffn, Ffn::Dense(_))));
    }

    #[test]
    fn wrappers_and_their_rotation() {
        let text = json!({"text_config": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
            "intermediate_size": 96, "num_attention_heads": 8, "max_position_embeddings": 512, "attn_output_gate": true,
            "layer_types": ["linear_attention", "full_attention"], "rope_parameters": {"rope_type": "default",
            "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": true, "mrope_section": [11, 11, 10]}}});
        let s = spec("Qwen3_5ForConditionalGeneration", &text).unwrap();
        assert_eq!((s.ropes[0].theta, s.ropes[0].rotary_dim), (1e7, 64));
        assert_eq!(s.architecture, "Qwen3_5ForConditionalGeneration");
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        let table = [
            (json!({"attention_bias": true}), "`attention_bias`"),
            (json!({"attn_output_gate": false}), "`attn_output_gate`"),
            (json!({"hidden_act": "gelu"}), "`hidden_act`"),
            (json!({"linear_num_value_heads": 24}), "`linear_num_value_heads`"),
            (json!({"num_experts": 4}), "`num_experts_per_tok`"),
            (
                json!({"layer_types": ["full_attention", "full_attention", "full_attention", "full_attention", "sliding_attention"]}),
                "sliding_attention",
            ),
        ];
        for (fields, words) in table {
            let e = spec("Qwen3NextForCausalLM", &fields).unwrap_err();
            assert!(e.to_string().contains(words), "{fields}: {e}");
        }
    }
}
