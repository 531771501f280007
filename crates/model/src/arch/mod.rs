//! The one registry of supported architectures, and the way from a `config.json` to a [`ModelSpec`].
//!
//! Owns the meaning of configuration fields, defaults included: a file a family, `shared` and `rope` for what several
//! have in common. To add a family, write its function and add a row to [`REGISTRY`]. A function asks for every field
//! that means something to it; those of `FOREIGN` that nobody asked for are refused, because they change the numbers.

mod apertus;
mod cohere2;
mod glm4;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen;
mod rope;
mod shared;
mod smollm3;

use serde_json::{Map, Value};

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::gguf::Dialect;
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
    let draft_layers = config.opt_count("num_nextn_predict_layers", 64)?.unwrap_or(0);
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
