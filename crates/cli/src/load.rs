//! From a configuration to a loaded model behind an engine.
//!
//! Owns the choice of source, backend and memory, and turns what the model's files say into what the server
//! needs. Formats are read by `model` and `text`.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use mirai_cpu::{CpuBackend, CpuOptions};
use mirai_cuda::{CudaBackend, Gpu, OpenError};
use mirai_engine::{EngineHandle, Event, Executor, StartError};
use mirai_hub::{ModelRef, StoreOptions};
use mirai_model::backend::{Backend, BackendError, CacheDtype};
use mirai_model::loader::Phase;
use mirai_model::pooling::PublishedPooling;
use mirai_model::texts::Texts;
use mirai_model::{CacheBudget, LoadOptions, LoadedModel, ModelError, ModelSource, ModelSpec};
use mirai_server::{FimTokens, GenerationDefaults, ServedModel, ServerHandle, Task};
use mirai_text::{ChatTemplate, ReasoningFormat, SpecialTokens, Tokenizer};

use crate::config::{Config, KvCacheDtype, LoadFormat, Quantization};
use crate::demo;
use crate::device::{self, Chosen};
use crate::exit::Failure;
use crate::task;
use crate::telemetry;
use crate::tokenizer::tokenizer;

/// Seed of `--load-format dummy`: two runs measure the same numbers.
const DUMMY_SEED: u64 = 0;
/// Most bytes of KV memory unless the configuration says otherwise.
const DEFAULT_CACHE_BYTES: u64 = 4 << 30;

/// What loading a model yields besides the executor, which stays on the engine's thread.
struct Described {
    spec: ModelSpec,
    pooling: Option<PublishedPooling>,
    texts: Texts,
    eos_ids: Vec<u32>,
}

/// Loads the model and starts its engine. Blocks; `server` is told how far it is.
pub(crate) fn load(config: &Config, device: Chosen, server: &ServerHandle) -> Result<ServedModel, Failure> {
    let Named { source, name, revision } = source(config)?;
    let options = task::options(config.model.task, &source, options(config, device))?;
    let cpu = CpuOptions { threads: config.engine.threads, ..CpuOptions::default() };
    let cuda = device::cuda_options(config);
    if let Chosen::Cuda(ordinal) = device {
        telemetry::start(ordinal, server);
    }
    let energy = match device {
        Chosen::Cuda(ordinal) if config.energy.measures() => telemetry::energy_counter(ordinal),
        Chosen::Cuda(_) | Chosen::Cpu => None,
    };
    let engine = mirai_engine::EngineConfig {
        max_step_tokens: options.max_step_tokens as u32,
        energy,
        ..engine_config(config, device)
    };
    let (send, described) = sync_channel(1);
    let told = server.clone();
    // The executor never leaves the thread that makes it: devices are bound to theirs.
    let make = move || match device {
        Chosen::Cpu => executor(&source, &options, CpuBackend::new(&cpu), &told, &send),
        Chosen::Cuda(ordinal) => {
            let backend = CudaBackend::new(Gpu::open(ordinal)?, cuda)?;
            executor(&source, &options, backend, &told, &send)
        }
    };
    let (handle, events) = mirai_engine::start(engine, make).map_err(start_failure)?;
    let described = described.recv().map_err(|_| Failure::model("the model was loaded but not described"))?;
    server.loading("tokenizer", 99);
    served(config, (name, revision), described, handle, events)
}

/// The model on a device. What else its files say goes to `described`.
fn executor<B: Backend + 'static>(
    source: &ModelSource,
    options: &LoadOptions,
    backend: B,
    server: &ServerHandle,
    described: &SyncSender<Described>,
) -> Result<Box<dyn Executor>, mirai_engine::BoxError> {
    let mut report = |phase, share| server.loading(phase_name(phase), percent(phase, share));
    let model = mirai_model::load(source, options, backend, &mut report)?;
    let LoadedModel { executor, spec, pooling, texts, eos_ids, .. } = model;
    described.send(Described { spec, pooling, texts, eos_ids })?;
    Ok(Box::new(executor))
}

/// Tokens of one step. On a GPU a few hundred rows are where arithmetic and not memory limits its matmuls; the default
/// is several times that, so that a prompt's steps are few, and yet some 50 ms of an H200 with 8 billion parameters,
/// which running streams may have to wait. To be tuned where one is.
pub(crate) fn step_tokens(config: &Config, device: Chosen) -> u32 {
    let default = match device {
        Chosen::Cpu => 512,
        Chosen::Cuda(_) => 2048,
    };
    config.engine.max_num_batched_tokens.unwrap_or(default)
}

/// The engine's part of the configuration.
pub(crate) fn engine_config(config: &Config, device: Chosen) -> mirai_engine::EngineConfig {
    mirai_engine::EngineConfig {
        max_step_tokens: step_tokens(config, device),
        max_running: config.engine.max_num_seqs,
        max_queued_requests: config.engine.max_queued_requests,
        max_queued_tokens: config.engine.max_queued_tokens,
        prefix_caching: config.engine.enable_prefix_caching,
        ..mirai_engine::EngineConfig::default()
    }
}

fn start_failure(error: StartError) -> Failure {
    match error {
        // What a device lacks is the machine's, what a file lacks the model's; options are the user's.
        StartError::Executor(inner) if inner.is::<OpenError>() || inner.is::<BackendError>() => {
            Failure::environment(inner)
        }
        StartError::Executor(inner) => match inner.downcast_ref::<ModelError>().map(ModelError::exit_code) {
            Some(2) => Failure::usage(inner),
            Some(3) => Failure::environment(inner),
            _ => Failure::model(inner),
        },
        StartError::Thread(inner) => Failure::environment(inner),
        other => Failure::model(other),
    }
}

const fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Opening => "opening",
        Phase::Weights => "weights",
        Phase::Cache => "kv cache",
        Phase::WarmUp => "warm-up",
    }
}

/// Share of the whole, of which weights take nearly all.
fn percent(phase: Phase, share: f32) -> u8 {
    let (from, to) = match phase {
        Phase::Opening => (0.0, 2.0),
        Phase::Weights => (2.0, 90.0),
        Phase::Cache => (90.0, 92.0),
        Phase::WarmUp => (92.0, 99.0),
    };
    (from + (to - from) * share.clamp(0.0, 1.0)) as u8
}

/// Where a model is, what it is called if nobody says otherwise, and which weights exactly it has, if that is known.
pub(crate) struct Named {
    pub(crate) source: ModelSource,
    pub(crate) name: String,
    pub(crate) revision: Option<String>,
}

fn source(config: &Config) -> Result<Named, Failure> {
    let Some(given) = &config.model.path else {
        let demo =
            demo::model().ok_or_else(|| Failure::usage("this build has no demo model: pass --model"))?;
        let files: [(&str, &'static [u8]); 5] = [
            ("config.json", demo.config),
            ("generation_config.json", demo.generation_config),
            ("tokenizer.json", demo.tokenizer),
            ("tokenizer_config.json", demo.tokenizer_config),
            ("model.safetensors", demo.weights),
        ];
        let source = ModelSource::memory("embedded demo model", &files);
        // It comes with the binary, and changes with it only.
        let revision = Some(concat!("mirai-", env!("CARGO_PKG_VERSION")).to_owned());
        return Ok(Named { source, name: demo::NAME.to_owned(), revision });
    };
    let store = StoreOptions {
        allow_missing_weights: config.model.load_format == LoadFormat::Dummy,
        ..StoreOptions::from_env()
    };
    named_source(given, &store)
}

/// The model that a folder, a file or a name in the local store stands for, and its own name.
pub(crate) fn named_source(given: &str, store: &StoreOptions) -> Result<Named, Failure> {
    let reference = ModelRef::parse(given).map_err(Failure::model)?;
    let local = mirai_hub::resolve(&reference, store).map_err(Failure::model)?;
    let source = match &local.weights {
        mirai_hub::Weights::Gguf(file) => ModelSource::gguf(file),
        _ => ModelSource::directory(&local.root).map_err(Failure::model)?,
    };
    Ok(Named { source, name: reference.default_name(), revision: local.revision })
}

fn options(config: &Config, device: Chosen) -> LoadOptions {
    let cache = match (device, config.engine.kv_cache_memory_bytes) {
        // The device's own budget knows what was configured, and says what fits where it does not.
        (Chosen::Cuda(_), _) => CacheBudget::Device,
        (Chosen::Cpu, Some(bytes)) => CacheBudget::Bytes(bytes),
        (Chosen::Cpu, None) => CacheBudget::Bytes(
            memory_limit().map_or(DEFAULT_CACHE_BYTES / 4, |bytes| (bytes / 4).min(DEFAULT_CACHE_BYTES)),
        ),
    };
    LoadOptions {
        dummy: (config.model.load_format == LoadFormat::Dummy).then_some(DUMMY_SEED),
        quantization: config.model.quantization.map(|q| match q {
            Quantization::Q8_0 => mirai_model::Quantization::Q8_0,
            Quantization::Q4K => mirai_model::Quantization::Q4K,
            Quantization::Fp8 => mirai_model::Quantization::F8E4M3,
        }),
        cache_dtype: match config.engine.kv_cache_dtype {
            KvCacheDtype::Auto | KvCacheDtype::Bf16 => CacheDtype::Bf16,
            KvCacheDtype::Fp8 => CacheDtype::F8E4M3,
        },
        cache,
        max_model_len: config.model.max_len.map(|n| n as usize),
        max_slots: config.engine.max_num_seqs as usize,
        max_step_tokens: step_tokens(config, device) as usize,
        ..LoadOptions::default()
    }
}

/// Memory of this machine, or of its control group if that is less, in bytes.
fn memory_limit() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    });
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|t| t.trim().parse().ok());
    machine.into_iter().chain(group).min()
}

/// What a model's texts mean, understood. It needs no weight and no device, so that `verify` can say what loading
/// would.
#[derive(Debug)]
pub(crate) struct Understood {
    tokenizer: Tokenizer,
    special: SpecialTokens,
    template: Option<ChatTemplate>,
    reasoning: Option<ReasoningFormat>,
    task: Task,
    generation_defaults: GenerationDefaults,
}

/// Understands a model's texts as serving it needs them.
pub(crate) fn understood(
    spec: &ModelSpec,
    pooling: Option<&PublishedPooling>,
    texts: Texts,
    reasoning_parser: &str,
) -> Result<Understood, Failure> {
    let (tokenizer, special) = tokenizer(texts.tokenizer)?;
    let template = texts.chat_template.as_deref();
    let reasoning = reasoning(reasoning_parser, template, &tokenizer)?;
    let template = template.map(|source| ChatTemplate::compile(source, special.clone()));
    let template = template.transpose().map_err(|e| Failure::model(format!("chat template: {e}")))?;
    let task = task::served(spec, pooling, &tokenizer, &special)?;
    let generation_defaults = match texts.generation_config {
        Some(map) => serde_json::from_value(serde_json::Value::Object(map))
            .map_err(|e| Failure::model(format!("generation_config.json: {e}")))?,
        None => GenerationDefaults::default(),
    };
    Ok(Understood { tokenizer, special, template, reasoning, task, generation_defaults })
}

/// What the server needs, out of what the files say.
fn served(
    config: &Config,
    (own_name, revision): (String, Option<String>),
    described: Described,
    engine: EngineHandle,
    events: Receiver<Vec<Event>>,
) -> Result<ServedModel, Failure> {
    let Described { spec, pooling, texts, mut eos_ids } = described;
    let parameters = (spec.active_parameters(), spec.parameters());
    let understood = understood(&spec, pooling.as_ref(), texts, &config.model.reasoning_parser)?;
    let Understood { tokenizer, special, template, reasoning, task, generation_defaults } = understood;
    let token = |text: &Option<String>| text.as_deref().and_then(|t| tokenizer.token_to_id(t));
    eos_ids.extend(token(&special.eos));
    let geometry = engine.geometry();
    let (vocab, max_model_len) = (geometry.vocab, geometry.max_context);
    if tokenizer.vocab_size() > vocab as usize {
        tracing::warn!(
            tokenizer = tokenizer.vocab_size(),
            model = vocab,
            "the tokenizer has more tokens than the model; those beyond are refused"
        );
    }
    let names =
        if config.model.served_names.is_empty() { vec![own_name] } else { config.model.served_names.clone() };
    Ok(ServedModel {
        names,
        revision: revision.unwrap_or_default(),
        estimate: config.energy.estimates(parameters),
        footprint: config.energy.footprint(),
        max_model_len,
        bos_token_id: token(&special.bos),
        fim: fim_tokens(&tokenizer),
        tokenizer,
        template,
        task,
        reasoning,
        eos_token_ids: eos_ids,
        generation_defaults,
        vocab,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        engine,
        events,
    })
}

/// How the model marks its reasoning, as told or as found.
fn reasoning(
    wanted: &str,
    template: Option<&str>,
    tokenizer: &Tokenizer,
) -> Result<Option<ReasoningFormat>, Failure> {
    let format = match wanted {
        "none" => None,
        "auto" => ReasoningFormat::detect(template, tokenizer),
        name => {
            let named = ReasoningFormat::named(name, tokenizer);
            Some(named.map_err(|e| Failure::usage(format!("--reasoning-parser (or auto, none): {e}")))?)
        }
    };
    let name = format.as_ref().map_or("none", ReasoningFormat::name);
    tracing::info!(reasoning_parser = name, asked = wanted, "reasoning in chats");
    Ok(format)
}

/// The three tokens around a gap, under the names that model families give them.
fn fim_tokens(tokenizer: &Tokenizer) -> Option<FimTokens> {
    const NAMES: [[&str; 3]; 3] = [
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ];
    NAMES.iter().find_map(|names| {
        let [prefix, suffix, middle] = names.map(|name| tokenizer.token_to_id(name));
        Some(FimTokens { prefix: prefix?, suffix: suffix?, middle: middle? })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use mirai_model::texts::TokenizerData;
    use serde_json::{Value, json};

    use super::*;

    /// A `tekken.json` of the bytes and four special tokens.
    fn tekken() -> Vec<u8> {
        const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digit = |six: u8| char::from(ALPHABET[usize::from(six)]);
        let vocab: Vec<Value> = (0..=255u8)
            .map(|byte| {
                let bytes = format!("{}{}==", digit(byte >> 2), digit((byte & 3) << 4));
                json!({"rank": byte, "token_bytes": bytes, "token_str": null})
            })
            .collect();
        let special: Vec<Value> = ["<s>", "</s>", "[THINK]", "[/THINK]"]
            .iter()
            .enumerate()
            .map(|(rank, name)| json!({"rank": rank, "token_str": name, "is_control": true}))
            .collect();
        let config = json!({"pattern": ".+", "default_vocab_size": 260, "default_num_special_tokens": 4});
        json!({"config": config, "vocab": vocab, "special_tokens": special}).to_string().into_bytes()
    }

    fn files(list: &[(&str, &[u8])]) -> TokenizerData {
        let files: BTreeMap<String, Vec<u8>> =
            list.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        TokenizerData::Files(files)
    }

    #[test]
    fn a_folder_with_tekken_alone_has_a_tokenizer_and_its_special_tokens() {
        let (tokens, special) = tokenizer(files(&[("tekken.json", &tekken())])).unwrap();
        assert_eq!(tokens.encode("a", true, false).unwrap(), [0, 4 + 97]);
        assert_eq!((special.bos.as_deref(), special.eos.as_deref()), (Some("<s>"), Some("</s>")));
        assert_eq!(special.pad, None);
        let named =
            files(&[("tekken.json", &tekken()), ("tokenizer_config.json", br#"{"bos_token": "</s>"}"#)]);
        assert_eq!(tokenizer(named).unwrap().1.bos.as_deref(), Some("</s>"), "the configuration wins");
    }

    #[test]
    fn tokenizer_json_wins_and_without_either_the_error_names_both() {
        let both = files(&[("tekken.json", &tekken()), ("tokenizer.json", b"{}")]);
        let error = format!("{:?}", tokenizer(both).unwrap_err());
        assert!(error.contains("tokenizer.json is invalid"), "{error}");
        let neither = format!("{:?}", tokenizer(files(&[("vocab.json", b"{}")])).unwrap_err());
        assert!(neither.contains("neither tokenizer.json nor tekken.json (found: vocab.json)"), "{neither}");
    }

    #[test]
    fn the_reasoning_format_is_found_named_or_none() {
        let (tokens, _) = tokenizer(files(&[("tekken.json", &tekken())])).unwrap();
        let name = |wanted: &str| reasoning(wanted, None, &tokens).map(|f| f.map(|f| f.name()));
        assert_eq!(name("auto").unwrap(), Some("mistral"));
        assert_eq!(name("none").unwrap(), None);
        assert_eq!(name("deepseek_r1").unwrap(), Some("think"));
        for wrong in ["openai_gptoss", "nothing"] {
            let error = format!("{:?}", name(wrong).unwrap_err());
            assert!(error.contains("--reasoning-parser"), "{error}");
        }
    }
}
