//! Gemma 4: full layers with larger heads whose keys may be their values, windowed ones between, a number that scales each
//! layer, and experts beside the dense block.
//!
//! The multimodal wrapper's text part is the same model. Models with inputs for each layer are refused.

use super::gemma::{GemmaDefaults, attention, check_kv_heads, common, decoder, mlp};
use super::rope::{RopeDefaults, rope_of_kind};
use super::shared::{Common, Kind, check_head_dim, layer, layer_kinds, top_k};
use crate::backend::{RouteSpec, Scoring};
use crate::config::Config;
use crate::error::Result;
use crate::rope::RopeSpec;
use crate::spec::{
    AttentionLayer, Ffn, KvSource, LayerSpec, Mixer, MlpLayer, ModelSpec, MoeLayer, Placement, QkNorm, bounds,
};

const DEFAULTS: GemmaDefaults = GemmaDefaults { vocab: 262_144, context: 131_072, layers: 30, window: 512 };

pub(super) fn gemma4(config: &Config<'_>) -> Result<ModelSpec> {
    let c = common(config, DEFAULTS)?;
    refuse(config)?;
    let kinds = kinds(config, c.layers)?;
    let window = config.count_or("sliding_window", bounds::CONTEXT, DEFAULTS.window as usize)? as u32;
    let sliding = AttentionLayer {
        qk_norm: Some(QkNorm { norm: c.norm, across_heads: false }),
        v_norm: Some(c.norm),
        ..attention(config)?
    };
    let shared_from = c.layers - shared_layers(config, c.layers)?;
    let full_heads = full_heads(config, &kinds, &sliding)?;
    let keys_are_values = config.flag("attention_k_eq_v", false)?;
    let mixer = |i: usize| -> Result<AttentionLayer> {
        let kv = source(config, &kinds, shared_from, i)?;
        Ok(match kinds[i] {
            Kind::Full => {
                if keys_are_values && kv != KvSource::Own {
                    let why =
                        "layers that read the keys of layers whose values are their keys are not supported";
                    return Err(config.error("num_kv_shared_layers", why));
                }
                let kv = if kv == KvSource::Own && keys_are_values { KvSource::KeysAreValues } else { kv };
                AttentionLayer { head_dim: full_heads.0, kv_heads: full_heads.1, kv, ..sliding.clone() }
            }
            _ => AttentionLayer { window: Some(window), rope: Some(1), kv, ..sliding.clone() },
        })
    };
    let dense = mlp(config)?;
    let wide = config.flag("use_double_wide_mlp", false)?;
    let moe = experts(config, &dense)?;
    let of = |i: usize| -> Result<LayerSpec> {
        let factor = if wide && i >= shared_from { 2 } else { 1 };
        let dense = MlpLayer { intermediate: factor * dense.intermediate, ..dense.clone() };
        let ffn = match &moe {
            Some(moe) => Ffn::DenseAndMoe(dense, moe.clone()),
            None => Ffn::Dense(dense),
        };
        let layer = layer(c.norm, Mixer::Attention(mixer(i)?), ffn);
        Ok(LayerSpec { placement: Placement::Around, output_scale: true, ..layer })
    };
    let layers = (0..c.layers).map(of).collect::<Result<_>>()?;
    let ropes = ropes(config, full_heads.0, sliding.head_dim, c.context)?;
    let cap = config.opt_positive("final_logit_softcapping")?;
    decoder(config, &Common { ..c }, layers, ropes, cap)
}

/// What changes the numbers and is not built.
fn refuse(config: &Config<'_>) -> Result<()> {
    const INPUTS: &str = "hidden_size_per_layer_input";
    // Where the field is absent it is 256.
    let inputs = if config.has(INPUTS) { config.opt_whole(INPUTS)?.unwrap_or(0) } else { 256 };
    if inputs > 0 {
        let why = format!("is {inputs}; models with inputs for each layer (E2B, E4B) are not supported");
        return Err(config.error(INPUTS, why));
    }
    // `vision` lets the tokens of an image see each other; text stays causal.
    match config.opt_text("use_bidirectional_attention")? {
        None | Some("vision") => Ok(()),
        Some(other) => {
            let other = other.escape_default();
            let why = format!("`{other}`: text tokens that see later ones are not supported");
            Err(config.error("use_bidirectional_attention", why))
        }
    }
}

/// The last layer is always a full one.
fn kinds(config: &Config<'_>, layers: usize) -> Result<Vec<Kind>> {
    let absent = |i: usize| if (i + 1).is_multiple_of(6) { Kind::Full } else { Kind::Sliding };
    let mut kinds = layer_kinds(config, layers, &[Kind::Full, Kind::Sliding], absent)?;
    if let Some(last) = kinds.last_mut() {
        *last = Kind::Full;
    }
    Ok(kinds)
}

fn shared_layers(config: &Config<'_>, layers: usize) -> Result<usize> {
    let shared = config.opt_whole("num_kv_shared_layers")?.unwrap_or(0);
    if shared > 0 && shared >= layers {
        let why = format!("is {shared} of {layers} layers, which leaves none with keys of its own");
        return Err(config.error("num_kv_shared_layers", why));
    }
    Ok(shared)
}

/// The layers at the end read what the last layer of their kind before them has stored.
fn source(config: &Config<'_>, kinds: &[Kind], shared_from: usize, layer: usize) -> Result<KvSource> {
    if layer < shared_from {
        return Ok(KvSource::Own);
    }
    let earlier = kinds[..shared_from].iter().rposition(|kind| *kind == kinds[layer]);
    let why = "leaves no layer with keys of its own for each kind of layer";
    earlier.map(KvSource::Layer).ok_or_else(|| config.error("num_kv_shared_layers", why))
}

/// Head size and key heads of full layers: from fields of their own, or from `per_layer_config`, which transformers writes
/// when it saves a model again.
fn full_heads(config: &Config<'_>, kinds: &[Kind], sliding: &AttentionLayer) -> Result<(usize, usize)> {
    const KV_HEADS: &str = "num_global_key_value_heads";
    let Some(each) = config.object("per_layer_config")? else {
        let head_dim = config.count_or("global_head_dim", bounds::HEAD_DIM, 512)?;
        check_head_dim(config, "global_head_dim", head_dim)?;
        // Where keys are not values, transformers does not look at the field.
        let given = config.opt_count(KV_HEADS, bounds::HEADS)?;
        let kv_heads = given.filter(|_| config.flag("attention_k_eq_v", false).unwrap_or(false));
        let kv_heads = kv_heads.unwrap_or(sliding.kv_heads);
        check_kv_heads(config, KV_HEADS, kv_heads, sliding.q_heads)?;
        return Ok((head_dim, kv_heads));
    };
    let mut found = None;
    for (i, kind) in kinds.iter().enumerate() {
        let own = each.object(&i.to_string())?;
        let read = |field: &str, most, absent| match &own {
            Some(own) => own.count_or(field, most, absent),
            None => Ok(absent),
        };
        let heads = (
            read("head_dim", bounds::HEAD_DIM, sliding.head_dim)?,
            read("num_key_value_heads", bounds::HEADS, sliding.kv_heads)?,
        );
        let wanted = match kind {
            Kind::Full => *found.get_or_insert(heads),
            _ => (sliding.head_dim, sliding.kv_heads),
        };
        if heads != wanted {
            let why = format!("has heads {heads:?}, other layers of its kind have {wanted:?}");
            return Err(each.error(&i.to_string(), why));
        }
    }
    let heads = found.unwrap_or((sliding.head_dim, sliding.kv_heads));
    check_head_dim(config, "per_layer_config", heads.0)?;
    check_kv_heads(config, "per_layer_config", heads.1, sliding.q_heads)?;
    Ok(heads)
}

/// The rotation of full layers, and that of windowed ones.
fn ropes(config: &Config<'_>, full_dim: usize, sliding_dim: usize, context: usize) -> Result<Vec<RopeSpec>> {
    let absent = |theta| RopeDefaults { theta, ..RopeDefaults::USUAL };
    let Some(each) = config.object("rope_parameters")? else {
        return Ok(vec![proportional(1e6, 0.25, full_dim, 1.0), RopeSpec::plain(1e4, sliding_dim)]);
    };
    let full = match each.object("full_attention")? {
        Some(own) if own.opt_text("rope_type")? == Some("proportional") => {
            let part = own.positive_or("partial_rotary_factor", 1.0)?;
            let factor = own.positive_or("factor", 1.0)?;
            let theta = own.positive_or("rope_theta", 1e6)?;
            if part > 1.0 || ((part * full_dim as f64) as usize) < 2 {
                let why = format!("is {part}, which rotates no pair, or too many, of {full_dim} elements");
                return Err(own.error("partial_rotary_factor", why));
            }
            if theta <= 1.0 || factor < 1.0 {
                return Err(
                    own.error("rope_theta", format!("is {theta} with factor {factor}, expected more than 1"))
                );
            }
            proportional(theta, part, full_dim, factor)
        }
        _ => rope_of_kind(config, "full_attention", full_dim, context, absent(1e6))?,
    };
    Ok(vec![full, rope_of_kind(config, "sliding_attention", sliding_dim, context, absent(1e4))?])
}

/// This part of a head's pairs rotates.
fn proportional(theta: f64, part: f64, head_dim: usize, factor: f64) -> RopeSpec {
    RopeSpec::proportional(theta, (part * head_dim as f64) as usize / 2 * 2, head_dim, factor)
}

fn experts(config: &Config<'_>, dense: &MlpLayer) -> Result<Option<MoeLayer>> {
    let used = config.flag("enable_moe_block", false)?;
    let experts = config.opt_count("num_experts", bounds::EXPERTS)?;
    let intermediate = config.opt_count("moe_intermediate_size", bounds::INTERMEDIATE)?;
    if !used {
        return Ok(None);
    }
    let missing = |field| move || config.error(field, "is missing, but `enable_moe_block` is true");
    let experts = experts.ok_or_else(missing("num_experts"))?;
    let chosen = config.opt_count("top_k_experts", bounds::EXPERTS)?.ok_or_else(missing("top_k_experts"))?;
    let intermediate = intermediate.ok_or_else(missing("moe_intermediate_size"))?;
    Ok(Some(MoeLayer {
        route: RouteSpec {
            experts,
            top_k: top_k(config, "top_k_experts", experts, chosen)?,
            scoring: Scoring::Softmax,
            normalize: true,
            scale: 1.0,
            groups: None,
        },
        router_bias: false,
        correction: false,
        expert_scale: true,
        expert: MlpLayer { intermediate, ..dense.clone() },
        shared: None,
        shared_gate: false,
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::super::spec_from_config;
    use super::*;
    use crate::backend::Pairing;

    fn spec(fields: &Value) -> Result<ModelSpec> {
        let mut config = json!({"architectures": ["Gemma4ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 7,
            "hidden_size_per_layer_input": 0});
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config("config.json", config.as_object().unwrap())
    }

    fn heads(s: &ModelSpec, layer: usize) -> &AttentionLayer {
        match &s.layers[layer].mixer {
            Mixer::Attention(a) => a,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec(&json!({})).unwrap();
        let windows: Vec<_> = (0..7).map(|i| heads(&s, i).window.is_some()).collect();
        assert_eq!(windows, [true, true, true, true, true, false, false], "the last is always full");
        let (sliding, full) = (heads(&s, 0), heads(&s, 5));
        assert_eq!((sliding.head_dim, sliding.kv_heads, sliding.scale), (256, 4, 1.0));
        assert_eq!((full.head_dim, full.kv_heads, full.kv), (512, 4, KvSource::Own));
        assert_eq!((s.ropes[0].rotary_dim, s.ropes[0].pairing), (128, Pairing::Apart(256)));
        assert_eq!(s.ropes[1], RopeSpec::plain(1e4, 256));
        assert!(
            sliding.v_norm.is_some() && s.layers[0].output_scale && matches!(s.layers[0].ffn, Ffn::Dense(_))
        );
    }

    #[test]
    fn full_layers_have_heads_of_their_own() {
        let s =
            spec(&json!({"attention_k_eq_v": true, "global_head_dim": 64, "num_global_key_value_heads": 2}))
                .unwrap();
        let full = heads(&s, 5);
        assert_eq!((full.head_dim, full.kv_heads, full.kv), (64, 2, KvSource::KeysAreValues));
        let each = json!({"per_layer_config": {"5": {"head_dim": 64, "num_key_value_heads": 2},
            "6": {"head_dim": 64, "num_key_value_heads": 2}}});
        let full = spec(&each).unwrap();
        assert_eq!((heads(&full, 6).head_dim, heads(&full, 6).kv_heads), (64, 2));
        let uneven = json!({"per_layer_config": {"5": {"head_dim": 64}}});
        let e = spec(&uneven).unwrap_err();
        assert!(e.to_string().contains("`per_layer_config.6`"), "{e}");
    }

    #[test]
    fn layers_at_the_end_share_keys() {
        let shared = json!({"num_kv_shared_layers": 1, "use_double_wide_mlp": true, "intermediate_size": 10});
        let s = spec(&shared).unwrap();
        assert_eq!((heads(&s, 5).kv, heads(&s, 6).kv), (KvSource::Own, KvSource::Layer(5)));
        let width = |i: usize| match &s.layers[i].ffn {
            Ffn::Dense(mlp) => mlp.intermediate,
            other => panic!("{other:?}"),
        };
        assert_eq!((width(5), width(6)), (10, 20));
        let both = json!({"num_kv_shared_layers": 1, "attention_k_eq_v": true});
        assert!(spec(&both).unwrap_err().to_string().contains("num_kv_shared_layers"));
    }

    #[test]
    fn experts_lie_beside_the_dense_block() {
        let moe = json!({"enable_moe_block": true, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 8});
        let s = spec(&moe).unwrap();
        let Ffn::DenseAndMoe(dense, moe) = &s.layers[0].ffn else { panic!("no experts") };
        assert_eq!((dense.intermediate, moe.expert.intermediate), (9_216, 8));
        assert_eq!(
            (moe.route.experts, moe.route.top_k, moe.route.normalize, moe.expert_scale),
            (6, 2, true, true)
        );
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        let table = [
            (json!({"hidden_size_per_layer_input": 256}), "E2B"),
            (json!({"use_bidirectional_attention": "all"}), "`use_bidirectional_attention`"),
            (json!({"num_kv_shared_layers": 7}), "`num_kv_shared_layers`"),
            (json!({"num_kv_shared_layers": 2}), "each kind of layer"),
            (json!({"enable_moe_block": true}), "`num_experts`"),
            (
                json!({"enable_moe_block": true, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 8}),
                "`top_k_experts`",
            ),
            (
                json!({"attention_k_eq_v": true, "num_global_key_value_heads": 3}),
                "`num_global_key_value_heads`",
            ),
            (json!({"global_head_dim": 9}), "`global_head_dim`"),
            (
                json!({"rope_parameters": {"full_attention": {"rope_type": "proportional",
                "partial_rotary_factor": 0.001}}}),
                "partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 0.5}}}),
                "rope_theta",
            ),
        ];
        for (fields, words) in table {
            let e = spec(&fields).unwrap_err();
            assert!(e.to_string().contains(words), "{fields}: {e}");
        }
        let absent = json!({"architectures": ["Gemma4ForCausalLM"]});
        let e = spec_from_config("config.json", absent.as_object().unwrap()).unwrap_err();
        assert!(e.to_string().contains("is 256"), "absent means 256: {e}");
        assert!(spec(&json!({"use_bidirectional_attention": "vision"})).is_ok());
    }
}
