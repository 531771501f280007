//! The one registry of supported architectures, and the way from a `config.json` to a [`ModelSpec`].
//!
//! Owns the meaning of configuration fields, defaults included: a file a family, `shared` and `rope` for what several
//! have in common. To add a family, write its function and add a row to [`REGISTRY`]. A function asks for every field
//! that means something to it; those of `FOREIGN` that nobody asked for are refused, because they change the numbers.

mod apertus;
mod cohere2;
mod deepseek;
mod encoder;
mod gemma;
mod gemma4;
mod glm4;
mod gpt_oss;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen;
mod qwen_delta;
mod rope;
mod shared;
mod smollm3;

use serde_json::{Map, Value};

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::gguf::dialect::Dialect;
use crate::names::{Checkpoint, Naming};
use crate::quant::Quantized;
use crate::spec::ModelSpec;

/// One supported architecture.
pub struct Architecture {
    /// Its name in `architectures` of `config.json`.
    pub name: &'static str,
    /// Whether the model's configuration is the field `text_config` of one for several modalities. Only the text part is
    /// run.
    pub wrapped: bool,
    /// Makes the specification. `architecture` and `ignored_fields` are filled in by [`describe`].
    build: fn(&Config<'_>) -> Result<ModelSpec>,
    /// How safetensors files spell its tensors.
    pub naming: &'static Naming,
    /// What GGUF files of it look like, where they are read.
    pub gguf: Option<Dialect>,
}

impl Architecture {
    const fn new(
        name: &'static str,
        build: fn(&Config<'_>) -> Result<ModelSpec>,
        naming: &'static Naming,
    ) -> Self {
        Self { name, wrapped: false, build, naming, gguf: None }
    }

    const fn wrapped(self, name: &'static str) -> Self {
        Self { name, wrapped: true, gguf: None, ..self }
    }

    const fn gguf(self, dialect: Dialect) -> Self {
        Self { gguf: Some(dialect), ..self }
    }
}

const DECODER: &Naming = &Naming::DECODER;

/// All of them.
pub const REGISTRY: &[Architecture] = &[
    Architecture::new("LlamaForCausalLM", llama::llama, DECODER).gguf(Dialect::LLAMA),
    Architecture::new("MistralForCausalLM", mistral::mistral, DECODER).gguf(Dialect::MISTRAL),
    Architecture::new("Ministral3ForCausalLM", mistral::ministral3, DECODER),
    Architecture::new("", mistral::mistral3, DECODER).wrapped("Mistral3ForConditionalGeneration"),
    Architecture::new("MixtralForCausalLM", mistral::mixtral, DECODER),
    Architecture::new("Qwen2ForCausalLM", qwen::qwen2, DECODER).gguf(Dialect::QWEN2),
    Architecture::new("Qwen3ForCausalLM", qwen::qwen3, DECODER).gguf(Dialect::QWEN3),
    Architecture::new("Qwen3MoeForCausalLM", qwen::qwen3_moe, DECODER),
    Architecture::new("Phi3ForCausalLM", phi3::phi3, DECODER),
    Architecture::new("GraniteForCausalLM", granite::granite, DECODER),
    Architecture::new("Olmo2ForCausalLM", olmo2::olmo2, DECODER),
    Architecture::new("SmolLM3ForCausalLM", smollm3::smollm3, DECODER),
    Architecture::new("ApertusForCausalLM", apertus::apertus, &apertus::NAMING),
    Architecture::new("Cohere2ForCausalLM", cohere2::cohere2, DECODER),
    Architecture::new("Glm4ForCausalLM", glm4::glm4, &glm4::NAMING),
    Architecture::new("GptOssForCausalLM", gpt_oss::gpt_oss, &gpt_oss::NAMING),
    Architecture::new("Gemma2ForCausalLM", gemma::gemma2, DECODER),
    Architecture::new("Gemma2Model", gemma::gemma2_embedder, DECODER),
    Architecture::new("Gemma3ForCausalLM", gemma::gemma3, DECODER),
    Architecture::new("", gemma::gemma3, DECODER).wrapped("Gemma3ForConditionalGeneration"),
    Architecture::new("Gemma4ForCausalLM", gemma4::gemma4, DECODER),
    Architecture::new("", gemma4::gemma4, DECODER).wrapped("Gemma4ForConditionalGeneration"),
    Architecture::new("Qwen3NextForCausalLM", qwen_delta::qwen3_next, DECODER),
    Architecture::new("Qwen3_5ForCausalLM", qwen_delta::qwen3_5, DECODER),
    Architecture::new("", qwen_delta::qwen3_5, DECODER).wrapped("Qwen3_5ForConditionalGeneration"),
    Architecture::new("Qwen3_5MoeForCausalLM", qwen_delta::qwen3_5_moe, DECODER),
    Architecture::new("", qwen_delta::qwen3_5_moe, DECODER).wrapped("Qwen3_5MoeForConditionalGeneration"),
    Architecture::new("DeepseekV3ForCausalLM", deepseek::deepseek_v3, DECODER),
    Architecture::new("XLMRobertaModel", encoder::xlm_roberta, &encoder::NAMING),
    Architecture::new(
        "XLMRobertaForSequenceClassification",
        encoder::xlm_roberta_classifier,
        &encoder::NAMING,
    ),
];

/// Fields that change the numbers in some family. Where a family's function does not ask for one of them it would be
/// ignored by mistake, so it is refused unless it says "nothing special".
const FOREIGN: &[&str] = &[
    "attention_multiplier",
    "attn_logit_softcapping",
    "attn_output_gate",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "first_k_dense_replace",
    "hidden_size_per_layer_input",
    "kv_lora_rank",
    "linear_num_value_heads",
    "logit_scale",
    "logits_scaling",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "no_rope_layers",
    "num_experts",
    "num_kv_shared_layers",
    "num_local_experts",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "shared_expert_intermediate_size",
    "swiglu_limit",
    "use_bidirectional_attention",
    "use_qk_norm",
];

/// Layers after the last that only draft tokens.
const DRAFT_LAYERS: &str = "num_nextn_predict_layers";
/// Most of them.
const MAX_DRAFT_LAYERS: usize = 64;

/// Fields of a configuration for several modalities that are also its text part's, unless that has its own.
const INHERITED: &[&str] =
    &["bos_token_id", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype"];

/// What a configuration says: the model, and the files beside it.
#[derive(Clone, Debug)]
pub struct Description {
    /// The model.
    pub spec: ModelSpec,
    /// How its tensors are stored.
    pub checkpoint: Checkpoint,
}

/// Reads the configuration of the architecture that it names.
///
/// # Errors
/// Unknown architecture; a field that is missing, of the wrong type, out of bounds, unsupported, or contradicts
/// another.
pub fn describe(file: &str, object: &Map<String, Value>) -> Result<Description> {
    let outer = Config::new(file, object);
    let names = outer.opt_texts("architectures")?.unwrap_or_default();
    let [name] = names[..] else {
        return Err(outer.error("architectures", format!("expected exactly one name, got {names:?}")));
    };
    let arch = REGISTRY.iter().find(|a| a.name == name).ok_or_else(|| ModelError::UnknownArchitecture {
        file: file.to_owned(),
        name: name.escape_default().to_string(),
        known: REGISTRY.iter().map(|a| a.name).collect::<Vec<_>>().join(", "),
    })?;
    if arch.wrapped {
        let text = text_part(&outer, object)?;
        described(arch, &Config::nested(file, "text_config", &text))
    } else {
        described(arch, &outer)
    }
}

/// The configuration of the text part, with what it inherits.
fn text_part(outer: &Config<'_>, object: &Map<String, Value>) -> Result<Map<String, Value>> {
    if outer.object("text_config")?.is_none() {
        return Err(outer.error("text_config", "is missing"));
    }
    let mut text = object["text_config"].as_object().cloned().unwrap_or_default();
    let has_dtype = text.contains_key("dtype") || text.contains_key("torch_dtype");
    for field in INHERITED {
        let settled = text.contains_key(*field) || (has_dtype && field.ends_with("dtype"));
        if let Some(value) = object.get(*field).filter(|_| !settled) {
            text.insert((*field).to_owned(), value.clone());
        }
    }
    Ok(text)
}

fn described(arch: &'static Architecture, config: &Config<'_>) -> Result<Description> {
    let mut spec = (arch.build)(config)?;
    spec.architecture = arch.name;
    let quantized = Quantized::from_config(config)?;
    let draft_layers = config.opt_whole(DRAFT_LAYERS)?.unwrap_or(0);
    if draft_layers > MAX_DRAFT_LAYERS {
        let why = format!("is {draft_layers}, expected at most {MAX_DRAFT_LAYERS}");
        return Err(config.error(DRAFT_LAYERS, why));
    }
    for field in FOREIGN.iter().filter(|field| !config.was_asked(field)) {
        if let Some(value) = config.get(field).filter(|v| !says_nothing(v)) {
            let why = format!("{} does not support it (it is {})", arch.name, short(value));
            return Err(config.error(field, why));
        }
    }
    spec.ignored_fields = config.unasked();
    Ok(Description { spec, checkpoint: Checkpoint { naming: arch.naming, quantized, draft_layers } })
}

/// Values that mean the same as an absent field: false, none of something, times one.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Bool(set) => !set,
        Value::Number(n) => n.as_u64() == Some(0) || (n.is_f64() && n.as_f64() == Some(1.0)),
        _ => false,
    }
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(40).collect()
}

/// Derives the specification alone.
///
/// # Errors
/// As [`describe`].
pub fn spec_from_config(file: &str, object: &Map<String, Value>) -> Result<ModelSpec> {
    describe(file, object).map(|described| described.spec)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::backend::Storage;
    use crate::rope::{RopeScaling, RopeSpec};
    use crate::spec::{AttentionLayer, Ffn, Head, Mixer};

    /// A small configuration of this architecture with some fields set; `null` is written as such.
    pub(super) fn read(name: &str, fields: &Value) -> Result<ModelSpec> {
        let mut config = json!({
            "architectures": [name], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 8, "vocab_size": 100, "max_position_embeddings": 512,
        });
        for (key, value) in fields.as_object().unwrap() {
            config[key] = value.clone();
        }
        spec_from_config("config.json", config.as_object().unwrap())
    }

    pub(super) fn spec(name: &str, fields: &Value) -> ModelSpec {
        read(name, fields).unwrap()
    }

    /// The text of the error that reading ends in.
    pub(super) fn refusal(name: &str, fields: &Value) -> String {
        read(name, fields).unwrap_err().to_string()
    }

    pub(super) fn attention(spec: &ModelSpec, layer: usize) -> &AttentionLayer {
        match &spec.layers[layer].mixer {
            Mixer::Attention(a) => a,
            other => panic!("not attention: {other:?}"),
        }
    }

    pub(super) fn windows(spec: &ModelSpec) -> Vec<Option<u32>> {
        (0..spec.layers.len()).map(|i| attention(spec, i).window).collect()
    }

    pub(super) fn is_tied(spec: &ModelSpec) -> bool {
        matches!(spec.head, Head::Logits { tied: true, .. })
    }

    const LLAMA: &str = "LlamaForCausalLM";

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec(LLAMA, &json!({"num_attention_heads": 4, "num_hidden_layers": 3}));
        let a = attention(&s, 2);
        assert_eq!((a.q_heads, a.kv_heads, a.head_dim, a.scale), (4, 4, 16, 0.25));
        assert!(!a.qkv_bias && !a.output_bias && a.qk_norm.is_none() && a.window.is_none());
        assert_eq!(
            (is_tied(&s), s.final_norm.unwrap().eps, s.dtype, &s.eos[..]),
            (false, 1e-6, None, &[][..])
        );
        assert_eq!(s.ropes, [RopeSpec::plain(1e4, 16)]);
        assert_eq!(s.parameters(), 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 2 * 6_400 + 64);
        assert_eq!((s.architecture, s.parameters()), (LLAMA, s.active_parameters()));
    }

    #[test]
    fn biases_by_field() {
        let biased = json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true});
        let s = spec(LLAMA, &biased);
        let Ffn::Dense(mlp) = &s.layers[0].ffn else { panic!("not dense") };
        assert!(attention(&s, 0).qkv_bias && attention(&s, 0).output_bias && mlp.bias && is_tied(&s));
        let plain = spec(LLAMA, &json!({"tie_word_embeddings": true}));
        assert_eq!(s.parameters() - plain.parameters(), 4 * ((4 * 64) + (2 * 96 + 64)));
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let ropes = |fields: Value| spec(LLAMA, &fields).ropes;
        let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}});
        assert_eq!(ropes(new), ropes(old));
        assert_eq!(ropes(json!({"rope_scaling": {"rope_type": "default"}}))[0].scaling, RopeScaling::None);
        let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": null,
            "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 0.5}});
        let RopeScaling::Yarn(yarn) = &ropes(yarn)[0].scaling else { panic!("not yarn") };
        assert_eq!((yarn.factor, yarn.original_context, yarn.truncate), (4.0, 128.0, true));
        let expected = (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
        assert!((yarn.attention_factor - expected).abs() < 1e-12);
        let outer = json!({"original_max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn",
            "factor": 8.0, "original_max_position_embeddings": 128}});
        let RopeScaling::Yarn(yarn) = &ropes(outer)[0].scaling else { panic!("not yarn") };
        assert_eq!(yarn.original_context, 64.0, "the outer field wins");
        assert_eq!(ropes(json!({"partial_rotary_factor": 0.5}))[0].rotary_dim, 4);
    }

    #[test]
    fn fields_without_meaning_are_listed_and_those_of_other_families_refused() {
        let s = spec(LLAMA, &json!({"use_cache": true, "initializer_range": 0.02, "auto_map": {"x": "y"}}));
        assert_eq!(s.ignored_fields, ["use_cache", "initializer_range", "auto_map"]);
        for field in FOREIGN {
            let error = refusal(LLAMA, &json!({ *field: 2.5 }));
            assert!(error.contains(field) && error.contains(LLAMA), "{error}");
        }
        spec(
            LLAMA,
            &json!({"num_experts": 0, "logit_scale": 1.0, "use_qk_norm": false, "kv_lora_rank": null}),
        );
        let growing = json!({"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}});
        assert!(refusal(LLAMA, &growing).contains("rope_parameters.llama_4_scaling_beta"));
    }

    #[test]
    fn unknown_architectures_are_refused_with_the_list() {
        let error = refusal("MambaForCausalLM", &json!({}));
        assert!(REGISTRY.iter().all(|a| !a.name.is_empty() && error.contains(a.name)), "{error}");
        let mut names: Vec<_> = REGISTRY.iter().map(|a| a.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), REGISTRY.len(), "a name twice");
    }

    #[test]
    fn text_parts_inherit_what_they_lack() {
        let wrapper = |text: Value| {
            let outer = json!({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text,
                "eos_token_id": 7, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 9}});
            describe("config.json", outer.as_object().unwrap())
        };
        let text = json!({"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 8, "vocab_size": 100, "max_position_embeddings": 512});
        let s = wrapper(text.clone()).unwrap().spec;
        assert_eq!((&s.eos[..], s.dtype, s.hidden), (&[7][..], Some(Storage::Bf16), 64));
        assert_eq!(s.architecture, "Mistral3ForConditionalGeneration");
        let mut own = text.clone();
        own["eos_token_id"] = json!([3]);
        own["dtype"] = json!("float32");
        let s = wrapper(own).unwrap().spec;
        assert_eq!((&s.eos[..], s.dtype), (&[3][..], Some(Storage::F32)));
        let mut wrong = text;
        wrong["hidden_size"] = json!(-1);
        let error = wrapper(wrong).unwrap_err().to_string();
        assert!(error.contains("field `text_config.hidden_size`"), "{error}");
        let error = wrapper(Value::Null).unwrap_err().to_string();
        assert!(error.contains("`text_config`: is missing"), "{error}");
    }
}
