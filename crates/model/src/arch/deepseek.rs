//! DeepSeek V3: latent attention, experts in groups beside shared ones, and dense layers at the bottom.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, decoder, layer, mlp, top_k};
use crate::backend::{LatentShape, Pairing, RouteGroups, RouteSpec, Scoring};
use crate::config::Config;
use crate::error::Result;
use crate::rope::{RopeScaling, YarnSpec};
use crate::spec::{Ffn, LatentLayer, Mixer, MlpLayer, ModelSpec, MoeLayer, NormSpec, bounds};

pub(super) fn deepseek_v3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let (mixer, rope) = latent(config, &c)?;
    let dense = mlp(config)?;
    let moe = experts(config, &dense)?;
    let first = config.opt_whole("first_k_dense_replace")?.unwrap_or(3);
    if let Some(freq) = config.opt_count("moe_layer_freq", bounds::LAYERS)?.filter(|&freq| freq != 1) {
        return Err(config.error("moe_layer_freq", format!("{freq} is not supported, expected 1")));
    }
    let layer = |i: usize| {
        let ffn = if i < first { Ffn::Dense(dense.clone()) } else { Ffn::Moe(moe.clone()) };
        layer(c.norm, Mixer::Latent(mixer.clone()), ffn)
    };
    decoder(config, &c, (0..c.layers).map(layer).collect(), vec![rope], false)
}

fn latent(config: &Config<'_>, c: &Common) -> Result<(LatentLayer, crate::rope::RopeSpec)> {
    let shape = LatentShape {
        latent: config.count_or("kv_lora_rank", bounds::RANK, 512)?,
        rope: config.count_or("qk_rope_head_dim", bounds::HEAD_DIM, 64)?,
        nope: config.count_or("qk_nope_head_dim", bounds::HEAD_DIM, 128)?,
        value: config.count_or("v_head_dim", bounds::HEAD_DIM, 128)?,
    };
    // `null` means that queries are not compressed.
    let q_rank = match config.opt_count("q_lora_rank", bounds::RANK)? {
        None if !config.has("q_lora_rank") => Some(1_536),
        rank => rank,
    };
    let pairing = if config.flag("rope_interleave", true)? { Pairing::Adjacent } else { Pairing::Halves };
    let rope = rope(config, shape.rope, c.context, RopeDefaults { pairing, ..RopeDefaults::USUAL })?;
    let layer = LatentLayer {
        heads: config.count("num_attention_heads", bounds::HEADS)?,
        shape,
        q_rank,
        // Not that of `rms_norm_eps`.
        norm: NormSpec::rms(1e-6),
        scale: (softmax_growth(config, &rope.scaling)? / ((shape.nope + shape.rope) as f64).sqrt()) as f32,
        rope: 0,
        bias: config.flag("attention_bias", false)?,
    };
    Ok((layer, rope))
}

/// Where contexts are stretched, `mscale_all_dim` makes scores larger too: the square of what it makes of cosine and
/// sine.
fn softmax_growth(config: &Config<'_>, scaling: &RopeScaling) -> Result<f64> {
    let (new, old) = (config.object("rope_parameters")?, config.object("rope_scaling")?);
    let all_dim = new.or(old).map(|c| c.opt_number("mscale_all_dim")).transpose()?.flatten();
    match (scaling, all_dim) {
        (RopeScaling::Yarn(YarnSpec { factor, .. }), Some(all)) if all != 0.0 && *factor > 1.0 => {
            Ok((0.1 * all * factor.ln() + 1.0).powi(2))
        }
        _ => Ok(1.0),
    }
}

fn experts(config: &Config<'_>, dense: &MlpLayer) -> Result<MoeLayer> {
    for (field, known) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        if let Some(other) = config.opt_text(field)?.filter(|name| *name != known) {
            let why = format!("`{}` is not supported; supported: {known}", other.escape_default());
            return Err(config.error(field, why));
        }
    }
    // transformers knows the number under both names.
    let experts = match config.opt_count("n_routed_experts", bounds::EXPERTS)? {
        Some(n) => n,
        None => config.count_or("num_local_experts", bounds::EXPERTS, 256)?,
    };
    let top_k = top_k(config, "num_experts_per_tok", experts, 8)?;
    let inner = |factor| MlpLayer { intermediate: factor, ..dense.clone() };
    let width = config.count_or("moe_intermediate_size", bounds::INTERMEDIATE, 2_048)?;
    let shared = config.opt_whole("n_shared_experts")?.unwrap_or(1);
    let shared = match shared.checked_mul(width).filter(|&n| n as u64 <= bounds::INTERMEDIATE) {
        Some(0) => None,
        Some(all) => Some(inner(all)),
        None => {
            let why = format!(
                "{shared} of `moe_intermediate_size` {width} are wider than {}",
                bounds::INTERMEDIATE
            );
            return Err(config.error("n_shared_experts", why));
        }
    };
    Ok(MoeLayer {
        route: RouteSpec {
            experts,
            top_k,
            scoring: Scoring::Sigmoid,
            normalize: config.flag("norm_topk_prob", true)?,
            scale: config.positive_or("routed_scaling_factor", 2.5)? as f32,
            groups: groups(config, experts, top_k)?,
        },
        router_bias: false,
        correction: true,
        expert_scale: false,
        expert: inner(width),
        shared,
        shared_gate: false,
    })
}

/// Groups of experts; one group, or all chosen, is the same as none.
fn groups(config: &Config<'_>, experts: usize, top_k: usize) -> Result<Option<RouteGroups>> {
    let count = config.count_or("n_group", experts as u64, 8)?;
    let chosen = config.count_or("topk_group", count as u64, 4)?;
    if chosen > count {
        return Err(config.error("topk_group", format!("is {chosen}, expected 1 to {count}")));
    }
    if count == chosen {
        return Ok(None);
    }
    // A group counts by its two best experts.
    if !experts.is_multiple_of(count) || experts / count < 2 {
        let why = format!("{count} groups of {experts} experts, expected equal groups of at least 2");
        return Err(config.error("n_group", why));
    }
    if chosen * (experts / count) < top_k {
        let why = format!("{chosen} groups of {} experts have no {top_k} experts", experts / count);
        return Err(config.error("topk_group", why));
    }
    Ok(Some(RouteGroups { count, chosen }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::spec_from_config;
    use super::*;

    fn spec(fields: &serde_json::Value) -> Result<ModelSpec> {
        let mut config = json!({
            "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100,
            "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 4096,
        });
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config("config.json", config.as_object().unwrap())
    }

    fn parts(s: &ModelSpec) -> (&LatentLayer, &MoeLayer) {
        let last = s.layers.last().unwrap();
        match (&last.mixer, &last.ffn) {
            (Mixer::Latent(l), Ffn::Moe(moe)) => (l, moe),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec(&json!({})).unwrap();
        let (l, moe) = parts(&s);
        assert_eq!(l.shape, LatentShape { latent: 512, rope: 64, nope: 128, value: 128 });
        assert_eq!((l.q_rank, l.scale, l.bias), (Some(1_536), 1.0 / 192f32.sqrt(), false));
        assert_eq!(s.ropes[0].pairing, Pairing::Adjacent);
        assert_eq!((moe.route.experts, moe.route.top_k, moe.route.scale), (256, 8, 2.5));
        assert_eq!(moe.route.groups, Some(RouteGroups { count: 8, chosen: 4 }));
        assert_eq!(moe.shared.as_ref().map(|m| m.intermediate), Some(2_048));
        let dense: Vec<_> = s.layers.iter().map(|l| matches!(l.ffn, Ffn::Dense(_))).collect();
        assert_eq!(dense, [true, true, true, false, false]);
    }

    #[test]
    fn fields_are_read() {
        let s = spec(&json!({"q_lora_rank": null, "rope_interleave": false, "n_shared_experts": 0, "n_group": 1,
            "topk_group": 1, "rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096}}))
        .unwrap();
        let (l, moe) = parts(&s);
        assert!(l.q_rank.is_none() && moe.shared.is_none() && moe.route.groups.is_none());
        let grown = (0.1 * 40f64.ln() + 1.0).powi(2) / 192f64.sqrt();
        assert!((f64::from(l.scale) - grown).abs() < 1e-7);
        assert_eq!(s.ropes[0].pairing, Pairing::Halves);
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        let table = [
            (json!({"scoring_func": "softmax"}), "`scoring_func`"),
            (json!({"topk_method": "greedy"}), "`topk_method`"),
            (json!({"moe_layer_freq": 2}), "`moe_layer_freq`"),
            (json!({"n_routed_experts": 12, "n_group": 5, "topk_group": 2}), "5 groups of 12 experts"),
            (json!({"n_group": 2}), "`topk_group`: is 4"),
            (json!({"n_routed_experts": 8}), "8 groups of 8 experts"),
            (json!({"n_routed_experts": 16, "n_group": 8, "topk_group": 2}), "have no 8 experts"),
            (json!({"n_shared_experts": 9999}), "`n_shared_experts`"),
            (json!({"num_experts_per_tok": 300}), "`num_experts_per_tok`"),
        ];
        for (fields, words) in table {
            let e = spec(&fields).unwrap_err();
            assert!(e.to_string().contains(words), "{fields}: {e}");
        }
    }
}
