//! From files to an executor: the one way in.
//!
//! Owns the order of loading, the choice between sources, and what is handed to others besides the executor
//! (tokenizer files, chat template, generation defaults). It opens no socket and downloads nothing.

use std::collections::BTreeMap;

use mirai_engine::{BLOCK_TOKENS, Geometry};

use crate::arch::{Description, describe};
use crate::backend::{Backend, CacheDtype, CacheLayout, StepLimits, Storage};
use crate::budget::CacheBudget;
use crate::cache::{CacheReport, CacheRequest, Grouping, plan_cache};
use crate::config::{MAX_CONFIG_BYTES, parse_object};
use crate::convert::{Conversion, Quantization};
use crate::dummy::DummySource;
use crate::error::{ModelError, Result};
use crate::executor::ModelExecutor;
use crate::forward::Model;
use crate::gguf::GgufSource;
use crate::mmap::FileSource;
use crate::pooling::{PublishedPooling, Task};
use crate::safetensors::SafetensorsSource;
use crate::source::ModelSource;
use crate::spec::{Head, ModelSpec};
use crate::texts::Texts;
use crate::weights::WeightSource;

/// How to load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Random weights from this seed instead of files (`--load-format dummy`).
    pub dummy: Option<u64>,
    /// Float type of the weights; as in the files if none.
    pub dtype: Option<Storage>,
    /// Blocks for linear weights.
    pub quantization: Option<Quantization>,
    /// KV memory.
    pub cache: CacheBudget,
    /// Bytes of it that snapshots of recurrent state may take; by default an eighth.
    pub snapshot_bytes: Option<u64>,
    /// Element of the KV cache.
    pub cache_dtype: CacheDtype,
    /// Longest sequence; else the model's context, or what fits in the cache.
    pub max_model_len: Option<usize>,
    /// Sequences at once.
    pub max_slots: usize,
    /// Most tokens in a step.
    pub max_step_tokens: usize,
    /// What the model is for.
    pub task: Task,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dummy: None,
            dtype: None,
            quantization: None,
            cache: CacheBudget::Bytes(1 << 30),
            snapshot_bytes: None,
            cache_dtype: CacheDtype::Bf16,
            max_model_len: None,
            max_slots: 256,
            max_step_tokens: 512,
            task: Task::Native,
        }
    }
}

/// What loading is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Configuration and headers.
    Opening,
    /// Weights.
    Weights,
    /// KV memory.
    Cache,
    /// Steps recorded in advance, on devices that do so.
    WarmUp,
}

/// Told while loading: the phase and the share of it that is done, from 0 to 1.
pub type Progress<'a> = dyn FnMut(Phase, f32) + 'a;

/// A model that is ready to run.
pub struct LoadedModel<B: Backend> {
    /// For the engine.
    pub executor: ModelExecutor<B>,
    /// What it is.
    pub spec: ModelSpec,
    /// Bytes of the weights, conversions applied.
    pub weight_bytes: u64,
    /// What the cache has room for.
    pub cache: CacheReport,
    /// Vocabulary, chat template, defaults of generation.
    pub texts: Texts,
    /// Tokens that end a text: the configuration's and the generation defaults'. Sorted.
    pub eos_ids: Vec<u32>,
    /// Tensors in the files that the model has no place for.
    pub unused_tensors: Vec<String>,
    /// What the folder says about its embeddings.
    pub pooling: Option<PublishedPooling>,
}

/// Everything of a source but the weights' values.
struct Opened {
    spec: ModelSpec,
    weights: Box<dyn WeightSource>,
    unused_tensors: Vec<String>,
    texts: Texts,
    pooling: Option<PublishedPooling>,
}

/// Loads a model onto a backend.
///
/// # Errors
/// Names the file, the tensor or field, and the reason.
pub fn load<B: Backend>(
    source: &ModelSource,
    options: &LoadOptions,
    mut backend: B,
    progress: &mut Progress<'_>,
) -> Result<LoadedModel<B>> {
    progress(Phase::Opening, 0.0);
    let opened = open(source, options)?;
    let spec = opened.spec;
    let eos_ids = opened.texts.eos_ids(&spec)?;
    let request = CacheRequest {
        budget: options.cache,
        snapshot_bytes: options.snapshot_bytes,
        dtype: options.cache_dtype,
        max_model_len: options.max_model_len,
        slots: options.max_slots,
        max_step_tokens: options.max_step_tokens,
    };
    let (slots, max_step_tokens) = (
        small(options.max_slots, "max-num-seqs", 1 << 16)?,
        small(options.max_step_tokens, "max-num-batched-tokens", 1 << 20)?,
    );
    let wanted = request.context(&spec)?;
    // What the device has left is known only when the weights are there.
    let planned = match options.cache {
        CacheBudget::Device => None,
        _ => Some(plan_cache(&spec, &request)?),
    };
    let context = planned.as_ref().map_or(wanted, |(_, _, cache)| cache.max_context);
    let grouping = planned
        .as_ref()
        .map_or_else(|| Grouping::new(&spec, options.cache_dtype, wanted), |(grouping, ..)| grouping.clone());
    let failed = |what: &'static str| move |source| ModelError::Backend { what: what.into(), source };
    let limits = StepLimits { tokens: options.max_step_tokens, rows: options.max_slots };
    backend.limits(limits).map_err(failed("step limits"))?;
    backend.outline(&grouping.outline(&spec)).map_err(failed("model"))?;
    progress(Phase::Weights, 0.0);
    let conversion = Conversion { dtype: options.dtype, quantization: options.quantization };
    let model = Model::load(
        &spec,
        &grouping,
        opened.weights.as_ref(),
        conversion,
        context,
        &mut backend,
        &mut |share| progress(Phase::Weights, share),
    )?;
    // Unmapped before the cache takes its memory, and before anything is served.
    drop(opened.weights);
    progress(Phase::Cache, 0.0);
    let (grouping, layout, cache) = match planned {
        Some(planned) => planned,
        None => plan_on_device(&spec, &request, &grouping, &mut backend)?,
    };
    backend.allocate_cache(&layout).map_err(failed("KV cache"))?;
    progress(Phase::Cache, 1.0);
    let geometry = Geometry {
        groups: grouping.kinds,
        blocks: cache.blocks as u32,
        slots,
        snapshots: cache.snapshots as u32,
        max_step_tokens,
        max_context: cache.max_context as u32,
        vocab: spec.vocab as u32,
        generates: matches!(spec.head, Head::Logits { .. }),
        pools: matches!(spec.head, Head::Pool(_)),
        whole_prompts: spec.whole_prompts(),
    };
    let weight_bytes = model.weight_bytes();
    say(&spec, options, weight_bytes, &cache, &opened.unused_tensors);
    let mut executor = ModelExecutor::new(backend, model, geometry);
    executor.warm_up(&mut |share| progress(Phase::WarmUp, share)).map_err(failed("warm-up"))?;
    Ok(LoadedModel {
        weight_bytes,
        executor,
        spec,
        cache,
        texts: opened.texts,
        eos_ids,
        unused_tensors: opened.unused_tensors,
        pooling: opened.pooling,
    })
}

/// Says what was loaded, and what the user may not expect of it.
fn say(
    spec: &ModelSpec,
    options: &LoadOptions,
    weight_bytes: u64,
    cache: &CacheReport,
    unused_tensors: &[String],
) {
    tracing::info!(
        architecture = spec.architecture,
        parameters = spec.parameters(),
        weight_bytes,
        cache_bytes = cache.bytes,
        cache_tokens = cache.tokens,
        token_bytes = cache.token_bytes,
        state_bytes = cache.state_bytes,
        snapshots = cache.snapshots,
        max_context = cache.max_context,
        "model loaded"
    );
    if spec.whole_prompts() && cache.max_context > options.max_step_tokens {
        tracing::warn!(
            max_context = cache.max_context,
            max_num_batched_tokens = options.max_step_tokens,
            "prompts are computed whole: longer ones than a step are refused"
        );
    }
    if !unused_tensors.is_empty() {
        tracing::warn!(tensors = ?unused_tensors, "tensors that the model has no place for");
    }
}

/// Plans the cache in what the device has left.
fn plan_on_device<B: Backend>(
    spec: &ModelSpec,
    request: &CacheRequest,
    grouping: &Grouping,
    backend: &mut B,
) -> Result<(Grouping, CacheLayout, CacheReport)> {
    let draft = CacheLayout {
        groups: grouping.layouts.clone(),
        blocks: 0,
        slots: request.slots,
        snapshots: 0,
        table_len: request.context(spec)?.div_ceil(BLOCK_TOKENS),
    };
    let room = backend
        .cache_room(&draft)
        .map_err(|source| ModelError::Backend { what: "KV cache".into(), source })?;
    let bytes = room.ok_or_else(|| ModelError::Option {
        option: "kv cache",
        why: "is what the device has left, and this device does not say how much that is".into(),
    })?;
    let planned = plan_cache(spec, &CacheRequest { budget: CacheBudget::Bytes(bytes), ..*request });
    planned.map_err(|mut error| {
        if let ModelError::CacheTooSmall { memory, .. } = &mut error {
            *memory = backend.memory_table();
        }
        error
    })
}

/// Reads the specification alone: for checks and plans that need no weights.
///
/// # Errors
/// As [`load`].
pub fn read_spec(source: &ModelSource) -> Result<ModelSpec> {
    match source {
        ModelSource::Files { place, files } => Ok(describe_files(place, files, Task::Native)?.0.spec),
        ModelSource::Gguf { name, file } => GgufSource::open(name, file)?.spec(),
    }
}

fn small(value: usize, option: &'static str, max: usize) -> Result<u32> {
    if value == 0 || value > max {
        return Err(ModelError::Option { option, why: format!("is {value}, expected 1 to {max}") });
    }
    Ok(value as u32)
}

fn open(source: &ModelSource, options: &LoadOptions) -> Result<Opened> {
    match source {
        ModelSource::Files { place, files } => open_files(place, files, options),
        ModelSource::Gguf { name, file } => open_gguf(name, file, options),
    }
}

fn open_gguf(name: &str, file: &FileSource, options: &LoadOptions) -> Result<Opened> {
    let gguf = GgufSource::open(name, file)?;
    let mut spec = gguf.spec()?;
    options.task.apply(&mut spec, None)?;
    let texts = Texts::of_gguf(&gguf)?;
    let unused_tensors = gguf.unused(&spec)?;
    let weights: Box<dyn WeightSource> = match options.dummy {
        Some(seed) => Box::new(dummy(seed, &spec, options)?),
        None => Box::new(gguf),
    };
    Ok(Opened { spec, weights, unused_tensors, texts, pooling: None })
}

/// What the configuration says, with the head that the task needs, and what the folder says about pooling.
pub(crate) fn describe_files(
    place: &str,
    files: &BTreeMap<String, FileSource>,
    task: Task,
) -> Result<(Description, Option<PublishedPooling>)> {
    let config = files.get("config.json").ok_or_else(|| ModelError::MissingFile {
        place: place.to_owned(),
        why: "has no `config.json`".to_owned(),
    })?;
    let bytes = config.open("config.json")?;
    let mut described =
        describe("config.json", &parse_object("config.json", bytes.as_ref(), MAX_CONFIG_BYTES)?)?;
    let pooling = PublishedPooling::read(files)?;
    task.apply(&mut described.spec, pooling.as_ref())?;
    Ok((described, pooling))
}

fn open_files(place: &str, files: &BTreeMap<String, FileSource>, options: &LoadOptions) -> Result<Opened> {
    let (Description { spec, checkpoint }, pooling) = describe_files(place, files, options.task)?;
    let (weights, unused_tensors): (Box<dyn WeightSource>, _) = match options.dummy {
        Some(seed) => (Box::new(dummy(seed, &spec, options)?), Vec::new()),
        None => {
            let source = SafetensorsSource::open(place, files, checkpoint)?;
            let unused = source.unused(&spec)?;
            if unused.ignored > 0 {
                tracing::info!(tensors = unused.ignored, "tensors of parts that are not run");
            }
            (Box::new(source), unused.names)
        }
    };
    Ok(Opened { spec, weights, unused_tensors, texts: Texts::of_files(files)?, pooling })
}

fn dummy(seed: u64, spec: &ModelSpec, options: &LoadOptions) -> Result<DummySource> {
    DummySource::new(seed, options.dtype.or(spec.dtype).unwrap_or(Storage::Bf16))
}
