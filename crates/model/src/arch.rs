//! The one registry of supported architectures, and the functions that turn a `config.json` into a
//! [`ModelSpec`].
//!
//! Owns the meaning of configuration fields, defaults included. To add a family, add a row to [`REGISTRY`].

use serde_json::{Map, Value};

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::rope::{RopeScaling, RopeSpec, YarnSpec};
use crate::spec::{AttentionLayer, LayerSpec, MlpLayer, ModelSpec, NormSpec, bounds};

/// One supported architecture.
pub struct Architecture {
    /// Its name in `architectures` of `config.json`.
    pub name: &'static str,
    /// Its name in `general.architecture` of GGUF files. Mistral's are usually written as `llama`.
    pub gguf: &'static str,
    /// Differences between the families.
    pub traits: Traits,
}

/// What distinguishes the families of dense decoders.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// q, k and v have biases: never, always, or by this field (which also rules the output's bias).
    pub qkv_bias: Bias,
    /// Heads of q and k are normed.
    pub qk_norm: bool,
    /// How layers with a window are found.
    pub window: WindowRule,
    /// Elements of a head where the configuration does not say; else `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// GGUF files store the rows of q and k pairwise, for another way to rotate.
    pub gguf_pairs: bool,
}

/// When projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// Never.
    None,
    /// q, k and v; not the output.
    Qkv,
    /// All four, if `attention_bias` says so.
    Field,
}

/// Which layers have a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowRule {
    /// None.
    None,
    /// All, if `sliding_window` is set.
    All,
    /// Those from `max_window_layers` on, or those that `layer_types` names, if `use_sliding_window` is set.
    Upper,
}

/// All of them.
pub const REGISTRY: &[Architecture] = &[
    Architecture {
        name: "LlamaForCausalLM",
        gguf: "llama",
        traits: Traits {
            qkv_bias: Bias::Field,
            qk_norm: false,
            window: WindowRule::None,
            head_dim: None,
            gguf_pairs: true,
        },
    },
    Architecture {
        name: "MistralForCausalLM",
        gguf: "mistral",
        traits: Traits {
            qkv_bias: Bias::None,
            qk_norm: false,
            window: WindowRule::All,
            head_dim: None,
            gguf_pairs: true,
        },
    },
    Architecture {
        name: "Qwen2ForCausalLM",
        gguf: "qwen2",
        traits: Traits {
            qkv_bias: Bias::Qkv,
            qk_norm: false,
            window: WindowRule::Upper,
            head_dim: None,
            gguf_pairs: false,
        },
    },
    Architecture {
        name: "Qwen3ForCausalLM",
        gguf: "qwen3",
        traits: Traits {
            qkv_bias: Bias::Field,
            qk_norm: true,
            window: WindowRule::Upper,
            head_dim: Some(128),
            gguf_pairs: false,
        },
    },
];

/// Fields that change the numbers in families which are not in the registry. In a configuration of ours they
/// would be ignored by mistake, so they are refused unless they say "nothing special".
const FOREIGN: &[&str] = &[
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "query_pre_attn_scalar",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "no_rope_layers",
    "kv_lora_rank",
];

/// Derives the specification of the architecture that the configuration names.
///
/// # Errors
/// Unknown architecture; a field that is missing, of the wrong type, out of bounds, unsupported, or contradicts
/// another.
pub fn spec_from_config(file: &str, object: &Map<String, Value>) -> Result<ModelSpec> {
    let config = Config::new(file, object);
    let names = config.opt_texts("architectures")?.unwrap_or_default();
    let [name] = names[..] else {
        return Err(config.error("architectures", format!("expected exactly one name, got {names:?}")));
    };
    let arch = REGISTRY.iter().find(|a| a.name == name).ok_or_else(|| ModelError::UnknownArchitecture {
        file: file.to_owned(),
        name: name.escape_default().to_string(),
        known: REGISTRY.iter().map(|a| a.name).collect::<Vec<_>>().join(", "),
    })?;
    for field in FOREIGN {
        if let Some(value) = config.get(field) {
            let why = format!("{} does not support it (it is {})", arch.name, short(value));
            return Err(config.error(field, why));
        }
    }
    decoder(&config, arch)
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(40).collect()
}

fn decoder(config: &Config<'_>, arch: &Architecture) -> Result<ModelSpec> {
    let hidden = config.count("hidden_size", bounds::HIDDEN)?;
    let vocab = config.count("vocab_size", bounds::VOCAB)?;
    let layers = config.count("num_hidden_layers", bounds::LAYERS)?;
    let context = config.count("max_position_embeddings", bounds::CONTEXT)?;
    let eps = config.opt_positive("rms_norm_eps")?.unwrap_or(1e-6);
    let norm = NormSpec { eps: eps as f32, offset: 0.0 };
    let attention = attention(config, arch, hidden, norm)?;
    let mlp = MlpLayer {
        intermediate: config.count("intermediate_size", bounds::INTERMEDIATE)?,
        activation: config.activation("hidden_act")?,
        bias: arch.name == "LlamaForCausalLM" && config.flag("mlp_bias", false)?,
    };
    let windows = windows(config, arch.traits.window, layers)?;
    let rope = rope(config, attention.head_dim, context)?;
    let tied = config.flag("tie_word_embeddings", false)?;
    let bos = config.token_ids("bos_token_id", vocab)?.first().copied();
    let eos = config.token_ids("eos_token_id", vocab)?;
    let layer = |window: &Option<u32>| LayerSpec {
        attention_norm: norm,
        attention: AttentionLayer { window: *window, ..attention.clone() },
        mlp_norm: norm,
        mlp: mlp.clone(),
    };
    Ok(ModelSpec {
        architecture: arch.name,
        hidden,
        vocab,
        context,
        layers: windows.iter().map(layer).collect(),
        ropes: vec![rope],
        embed_scale: 1.0,
        final_norm: norm,
        tied,
        logits_scale: 1.0,
        logits_soft_cap: None,
        dtype: config.dtype()?,
        bos,
        eos,
        ignored_fields: config.unasked(),
    })
}

fn attention(
    config: &Config<'_>,
    arch: &Architecture,
    hidden: usize,
    norm: NormSpec,
) -> Result<AttentionLayer> {
    let q_heads = config.count("num_attention_heads", bounds::HEADS)?;
    let kv_heads = config.opt_count("num_key_value_heads", bounds::HEADS)?.unwrap_or(q_heads);
    if !q_heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide `num_attention_heads` {q_heads}");
        return Err(config.error("num_key_value_heads", why));
    }
    let head_dim = match config.opt_count("head_dim", bounds::HEAD_DIM)?.or(arch.traits.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
        None => {
            let why = format!("{q_heads} does not divide `hidden_size` {hidden}, and `head_dim` is absent");
            return Err(config.error("num_attention_heads", why));
        }
    };
    if !head_dim.is_multiple_of(2) || head_dim as u64 > bounds::HEAD_DIM {
        let why = format!("is {head_dim}, expected an even number of at most {}", bounds::HEAD_DIM);
        return Err(config.error("head_dim", why));
    }
    let (qkv_bias, output_bias) = match arch.traits.qkv_bias {
        Bias::None => (false, false),
        Bias::Qkv => (true, false),
        Bias::Field => {
            let bias = config.flag("attention_bias", false)?;
            (bias, bias)
        }
    };
    Ok(AttentionLayer {
        q_heads,
        kv_heads,
        head_dim,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        window: None,
        soft_cap: None,
        rope: Some(0),
        qk_norm: arch.traits.qk_norm.then_some(norm),
        qkv_bias,
        output_bias,
    })
}

/// The window of each layer. Absent fields have the values that transformers gives them.
fn windows(config: &Config<'_>, rule: WindowRule, layers: usize) -> Result<Vec<Option<u32>>> {
    let types = config.opt_texts("layer_types")?;
    if let Some(types) = &types
        && types.len() != layers
    {
        let why = format!("has {} entries, `num_hidden_layers` is {layers}", types.len());
        return Err(config.error("layer_types", why));
    }
    let given = config.opt_count("sliding_window", bounds::CONTEXT)?.map(|w| w as u32);
    let window = if config.has("sliding_window") { given } else { Some(4_096) };
    let (window, first) = match rule {
        WindowRule::None => (None, 0),
        WindowRule::All => (window, 0),
        WindowRule::Upper => {
            let enabled = config.flag("use_sliding_window", false)?;
            (window.filter(|_| enabled), config.opt_whole("max_window_layers")?.unwrap_or(28))
        }
    };
    let layer = |index: usize| match types.as_ref().map(|t| t[index]) {
        None => Ok(window.filter(|_| index >= first)),
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(config.error("layer_types", "names `sliding_attention`, but no `sliding_window` is in force"))
        }
        Some(other) => {
            Err(config.error("layer_types", format!("`{}` is not supported", short(&other.into()))))
        }
    };
    (0..layers).map(layer).collect()
}

/// Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
fn rope(config: &Config<'_>, head_dim: usize, context: usize) -> Result<RopeSpec> {
    let outer_theta = config.opt_positive("rope_theta")?;
    let (new, old) = (config.object("rope_parameters")?, config.object("rope_scaling")?);
    if new.is_some() && old.is_some() && config.get("rope_parameters") != config.get("rope_scaling") {
        return Err(config.error("rope_scaling", "differs from `rope_parameters`; one of them must go"));
    }
    let inner = new.or(old);
    let inner_theta = inner.as_ref().map(|c| c.opt_positive("rope_theta")).transpose()?.flatten();
    if let (Some(a), Some(b)) = (outer_theta, inner_theta)
        && a != b
    {
        return Err(config.error("rope_theta", format!("is {a}, but the rope parameters say {b}")));
    }
    let theta = inner_theta.or(outer_theta).unwrap_or(10_000.0);
    if theta <= 1.0 {
        return Err(config.error("rope_theta", format!("is {theta}, expected more than 1")));
    }
    for c in inner.iter().chain([config]) {
        if let Some(part) = c.opt_number("partial_rotary_factor")?
            && part != 1.0
        {
            return Err(c.error("partial_rotary_factor", format!("{part} is not supported, expected 1")));
        }
    }
    let scaling = match &inner {
        None => RopeScaling::None,
        Some(c) => scaling(c, config, context)?,
    };
    Ok(RopeSpec { theta, rotary_dim: head_dim, scaling })
}

fn scaling(c: &Config<'_>, outer: &Config<'_>, context: usize) -> Result<RopeScaling> {
    if let Some(field) = c.nested_field() {
        return Err(c.error(field, "rope parameters for each layer type are not supported"));
    }
    let kind = match c.either("rope_type", "type")? {
        None => "default",
        Some((field, v)) => {
            v.as_str().ok_or_else(|| c.error(field, format!("expected a text, got {}", short(v))))?
        }
    };
    let factor = || match c.positive("factor")? {
        f if f < 1.0 => Err(c.error("factor", format!("is {f}, expected at least 1"))),
        f => Ok(f),
    };
    let original = || -> Result<f64> {
        // The outer field wins, as in transformers.
        let outer = outer.opt_count("original_max_position_embeddings", bounds::CONTEXT)?;
        let inner = c.opt_count("original_max_position_embeddings", bounds::CONTEXT)?;
        Ok(outer.or(inner).unwrap_or(context) as f64)
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => {
            let low_freq_factor = c.positive("low_freq_factor")?;
            let high_freq_factor = c.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let why =
                    format!("is {high_freq_factor}, expected more than `low_freq_factor` {low_freq_factor}");
                return Err(c.error("high_freq_factor", why));
            }
            let (factor, original_context) = (factor()?, original()?);
            Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
        }
        "yarn" => {
            let original_context = original()?;
            let factor = match c.get("factor") {
                Some(_) => factor()?,
                None => context as f64 / original_context,
            };
            let mscale = (c.opt_number("mscale")?, c.opt_number("mscale_all_dim")?);
            let attention_factor = c
                .opt_positive("attention_factor")?
                .unwrap_or_else(|| YarnSpec::default_attention_factor(factor, mscale.0, mscale.1));
            let beta_fast = c.opt_positive("beta_fast")?.unwrap_or(32.0);
            let beta_slow = c.opt_positive("beta_slow")?.unwrap_or(1.0);
            if beta_fast < beta_slow {
                return Err(c.error("beta_fast", format!("is {beta_fast}, below `beta_slow` {beta_slow}")));
            }
            let truncate = c.flag("truncate", true)?;
            Ok(RopeScaling::Yarn(YarnSpec {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            }))
        }
        other => Err(c.error(
            "rope_type",
            format!(
                "`{}` is not supported; supported: default, linear, llama3, yarn",
                other.escape_default()
            ),
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(fields: &Value) -> ModelSpec {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 512,
        });
        for (key, value) in fields.as_object().unwrap() {
            config[key] = value.clone();
        }
        spec_from_config("config.json", config.as_object().unwrap()).unwrap()
    }

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec(&json!({}));
        let a = &s.layers[2].attention;
        assert_eq!((a.q_heads, a.kv_heads, a.head_dim, a.scale), (4, 4, 16, 0.25));
        assert!(!a.qkv_bias && !a.output_bias && a.qk_norm.is_none() && a.window.is_none());
        assert_eq!((s.tied, s.final_norm.eps, s.dtype, &s.eos[..]), (false, 1e-6, None, &[][..]));
        assert_eq!(s.ropes, [RopeSpec { theta: 1e4, rotary_dim: 16, scaling: RopeScaling::None }]);
        assert_eq!(s.parameters(), 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 2 * 6_400 + 64);
    }

    #[test]
    fn families_differ_where_they_should() {
        let window = |fields: Value| -> Vec<Option<u32>> {
            spec(&fields).layers.iter().map(|l| l.attention.window).collect()
        };
        let mistral = json!({"architectures": ["MistralForCausalLM"]});
        assert_eq!(window(mistral), [Some(4_096); 3], "transformers' default");
        assert_eq!(
            window(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null})),
            [None; 3]
        );
        let qwen = |extra: Value| {
            let mut fields = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9});
            fields.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            fields
        };
        assert_eq!(window(qwen(json!({"max_window_layers": 0}))), [None; 3], "not in use");
        let used = json!({"use_sliding_window": true, "max_window_layers": 1});
        assert_eq!(window(qwen(used)), [None, Some(9), Some(9)]);
        let types = json!({"use_sliding_window": true,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]});
        assert_eq!(window(qwen(types)), [Some(9), None, Some(9)]);
        let s = spec(&qwen(json!({})));
        assert!(s.layers[0].attention.qkv_bias && !s.layers[0].attention.output_bias);
        let s = spec(&json!({"architectures": ["Qwen3ForCausalLM"]}));
        assert_eq!(s.layers[0].attention.head_dim, 128, "Qwen3's default, not hidden / heads");
        assert!(s.layers[0].attention.qk_norm.is_some());
        let s = spec(&json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}));
        assert!(s.layers[0].attention.output_bias && s.layers[0].mlp.bias);
        let more = (4 * 64) + (2 * 96 + 64);
        let plain = spec(&json!({"tie_word_embeddings": true}));
        assert_eq!(s.parameters() - plain.parameters(), 3 * more);
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}});
        assert_eq!(spec(&new).ropes, spec(&old).ropes);
        let default = json!({"rope_scaling": {"rope_type": "default"}});
        assert_eq!(spec(&default).ropes[0].scaling, RopeScaling::None);
        let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": null,
            "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 0.5}});
        let RopeScaling::Yarn(yarn) = &spec(&yarn).ropes[0].scaling else { panic!("not yarn") };
        assert_eq!((yarn.factor, yarn.original_context, yarn.truncate), (4.0, 128.0, true));
        let expected = (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
        assert!((yarn.attention_factor - expected).abs() < 1e-12);
        let outer = json!({"original_max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn",
            "factor": 8.0, "original_max_position_embeddings": 128}});
        let RopeScaling::Yarn(yarn) = &spec(&outer).ropes[0].scaling else { panic!("not yarn") };
        assert_eq!(yarn.original_context, 64.0, "the outer field wins");
    }

    #[test]
    fn fields_without_meaning_are_listed() {
        let s = spec(&json!({"use_cache": true, "initializer_range": 0.02, "auto_map": {"x": "y"}}));
        assert_eq!(s.ignored_fields, ["use_cache", "initializer_range", "auto_map"]);
        assert_eq!(REGISTRY.len(), 4);
    }
}
