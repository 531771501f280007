//! What a model is, what it needs and what would be refused, from headers alone.
//!
//! Owns the report; loads no weight and touches no device. The same specification, names and checks as in
//! [`crate::loader`] make it, so that what passes here loads.

use std::collections::BTreeMap;

use mirai_engine::GroupKind;

use crate::backend::{CacheDtype, GroupLayout, Storage};
use crate::cache::Grouping;
use crate::error::{ModelError, Result};
use crate::gguf::GgufSource;
use crate::loader::describe_files;
use crate::pooling::{PublishedPooling, Task};
use crate::quant::Quantized;
use crate::safetensors::{SafetensorsSource, Unused};
use crate::source::ModelSource;
use crate::spec::{Ffn, Head, KvSource, Mixer, ModelSpec, PoolOutput};
use crate::weights::{TensorId, WeightSource, embedding_id, shape, tensors};

/// Most faults that are listed.
const MAX_FAULTS: usize = 20;

/// A model's files, looked at.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// What the model is.
    pub spec: ModelSpec,
    /// How its weights are quantized, if the configuration says so.
    pub quantized: Option<Quantized>,
    /// What its folder says about embeddings.
    pub pooling: Option<PublishedPooling>,
    /// Bytes of the weights' files by type of element.
    pub stored: BTreeMap<String, u64>,
    /// Bytes of the weights once the CPU has them: storages with scales are widened to f32 there.
    pub cpu_bytes: u64,
    /// Tensors that the specification has no place for.
    pub unused: Unused,
    /// Layer groups of the cache.
    pub groups: Vec<Group>,
    /// Files that make a tokenizer, or the name of the vocabulary in a GGUF file.
    pub tokenizer: Vec<String>,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// Why loading would fail: files, tensors and reasons. Empty where it would not.
    pub faults: Vec<String>,
}

/// What one layer group keeps of a sequence, in bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// How long it keeps it.
    pub kind: GroupKind,
    /// Its layers.
    pub layers: usize,
    /// Bytes of a token; 0 in a recurrent group.
    pub token_bytes: usize,
    /// Bytes of a sequence's state; 0 in a paged group.
    pub state_bytes: usize,
}

/// Looks at a model's files.
///
/// # Errors
/// The configuration or the files' outer form is broken, or the architecture is not known. What is wrong with single
/// tensors is told in [`Inspection::faults`].
pub fn inspect(source: &ModelSource, task: Task) -> Result<Inspection> {
    match source {
        ModelSource::Files { place, files } => {
            let (described, pooling) = describe_files(place, files, task)?;
            let (spec, checkpoint) = (described.spec, described.checkpoint);
            let weights = match SafetensorsSource::open(place, files, checkpoint) {
                // A configuration alone is worth a report too.
                Err(error @ ModelError::MissingFile { .. }) => Err(error),
                opened => Ok(opened?),
            };
            let named = |names: &[&str]| names.iter().any(|name| files.contains_key(*name));
            let tokenizer = files.keys().filter(|name| name.starts_with("token") || *name == "tekken.json");
            let template = named(&["chat_template.jinja", "chat_template.json"])
                || files
                    .get("tokenizer_config.json")
                    .is_some_and(|f| f.read("", 1 << 24).is_ok_and(|bytes| mentions_template(&bytes)));
            let seen = Seen {
                quantized: checkpoint.quantized,
                stored: weights.as_ref().map(SafetensorsSource::bytes_by_type).unwrap_or_default(),
                unused: weights
                    .as_ref()
                    .map_or_else(|_| Ok(Unused::default()), |weights| weights.unused(&spec)),
                tokenizer: tokenizer.cloned().collect(),
                chat_template: template,
            };
            let weights = weights.as_ref().map(|weights| weights as &dyn WeightSource);
            Ok(report(spec, pooling, weights.map_err(ToString::to_string), seen))
        }
        ModelSource::Gguf { name, file } => {
            let weights = GgufSource::open(name, file)?;
            let mut spec = weights.spec()?;
            task.apply(&mut spec, None)?;
            let tokenizer = weights.tokenizer()?;
            let unused = weights.unused(&spec).map(|names| Unused { names, ignored: 0 });
            let seen = Seen {
                quantized: None,
                stored: weights.bytes_by_type(),
                unused,
                tokenizer: vec![format!("{} in the file", tokenizer.model)],
                chat_template: tokenizer.chat_template.is_some(),
            };
            Ok(report(spec, None, Ok(&weights), seen))
        }
    }
}

fn mentions_template(bytes: &[u8]) -> bool {
    let config = serde_json::from_slice::<serde_json::Value>(bytes).unwrap_or_default();
    config.get("chat_template").is_some_and(|template| !template.is_null())
}

/// What the kinds of sources tell in their own ways.
struct Seen {
    quantized: Option<Quantized>,
    stored: BTreeMap<String, u64>,
    unused: Result<Unused>,
    tokenizer: Vec<String>,
    chat_template: bool,
}

fn report(
    spec: ModelSpec,
    pooling: Option<PublishedPooling>,
    weights: std::result::Result<&dyn WeightSource, String>,
    seen: Seen,
) -> Inspection {
    let mut faults = Vec::new();
    let mut note = |error: String| {
        if faults.len() < MAX_FAULTS {
            faults.push(error);
        }
    };
    let unused = seen.unused.unwrap_or_else(|error| {
        note(error.to_string());
        Unused::default()
    });
    let mut cpu_bytes = 0;
    match weights {
        Ok(weights) => {
            let embedding = embedding_id(&spec, weights).unwrap_or(TensorId::Embedding);
            for id in tensors(&spec) {
                let id = if id == TensorId::Embedding { embedding } else { id };
                match weights.check(&spec, id) {
                    Ok(storage) => cpu_bytes += bytes_on_cpu(storage, &shape(&spec, id)),
                    Err(error) => note(error.to_string()),
                }
            }
        }
        Err(error) => note(error),
    }
    Inspection {
        groups: groups(&spec),
        quantized: seen.quantized,
        pooling,
        stored: seen.stored,
        cpu_bytes,
        unused,
        tokenizer: seen.tokenizer,
        chat_template: seen.chat_template,
        faults,
        spec,
    }
}

fn bytes_on_cpu(storage: Storage, shape: &[usize]) -> u64 {
    let storage = if storage.is_scaled() { Storage::F32 } else { storage };
    storage.tensor_bytes(shape).unwrap_or_default() as u64
}

/// Groups of the cache at the model's whole context, in bf16.
fn groups(spec: &ModelSpec) -> Vec<Group> {
    let grouping = Grouping::new(spec, CacheDtype::Bf16, spec.context);
    let group = |(kind, layout): (&GroupKind, &GroupLayout)| match layout {
        GroupLayout::Paged(pages) => Group {
            kind: *kind,
            layers: pages.layers,
            token_bytes: pages.page_bytes() / mirai_engine::BLOCK_TOKENS,
            state_bytes: 0,
        },
        GroupLayout::Recurrent(state) => {
            Group { kind: *kind, layers: state.layers, token_bytes: 0, state_bytes: 4 * state.elements() }
        }
    };
    let all = grouping.kinds.iter().zip(&grouping.layouts).map(group);
    // Layers that only memory's arithmetic has parted are one group to a reader.
    all.fold(Vec::new(), |mut merged: Vec<Group>, group| {
        match merged.iter_mut().find(|g| g.kind == group.kind && same_layer(g, &group)) {
            Some(found) => {
                found.layers += group.layers;
                found.token_bytes += group.token_bytes;
                found.state_bytes += group.state_bytes;
            }
            None => merged.push(group),
        }
        merged
    })
}

fn same_layer(a: &Group, b: &Group) -> bool {
    a.token_bytes * b.layers == b.token_bytes * a.layers
        && a.state_bytes * b.layers == b.state_bytes * a.layers
}

impl Inspection {
    /// Bytes of the cache that a token takes in all layers, windows not counted off.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.groups.iter().map(|g| g.token_bytes).sum()
    }

    /// Bytes of a sequence's recurrent state.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.groups.iter().map(|g| g.state_bytes).sum()
    }

    /// What the model is for: `generate`, `embed` or `score`.
    #[must_use]
    pub const fn task(&self) -> &'static str {
        match &self.spec.head {
            Head::Logits { .. } => "generate",
            Head::Pool(pool) => match pool.output {
                PoolOutput::Embedding => "embed",
                PoolOutput::Classifier { .. } | PoolOutput::Tokens { .. } => "score",
            },
        }
    }

    /// Features of the engine that this model uses, by the names of the documentation.
    #[must_use]
    pub fn features(&self) -> Vec<&'static str> {
        features(&self.spec, self.quantized)
    }
}

/// Names of all features, in the order of [`features`].
pub const FEATURES: [&str; 17] = [
    "grouped heads",
    "sliding window",
    "attention sinks",
    "soft caps",
    "norms of queries and keys",
    "gated attention",
    "keys that are values",
    "latent attention",
    "gated delta net",
    "bidirectional attention",
    "experts",
    "shared expert",
    "parallel blocks",
    "layers without positions",
    "tied embeddings",
    "pooling head",
    "quantized weights",
];

/// Features of the engine that a model uses.
#[must_use]
pub fn features(spec: &ModelSpec, quantized: Option<Quantized>) -> Vec<&'static str> {
    let attention = || {
        spec.layers.iter().filter_map(|layer| match &layer.mixer {
            Mixer::Attention(a) => Some(a),
            _ => None,
        })
    };
    let moe = || {
        spec.layers.iter().filter_map(|layer| match &layer.ffn {
            Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe) => Some(moe),
            Ffn::Dense(_) => None,
        })
    };
    let logits_cap = matches!(spec.head, Head::Logits { soft_cap: Some(_), .. });
    let used = [
        attention().any(|a| a.q_heads > a.kv_heads),
        attention().any(|a| a.window.is_some()),
        attention().any(|a| a.sinks),
        logits_cap || attention().any(|a| a.soft_cap.is_some()),
        attention().any(|a| a.qk_norm.is_some()),
        attention().any(|a| a.gated),
        attention().any(|a| a.kv == KvSource::KeysAreValues),
        spec.layers.iter().any(|l| matches!(l.mixer, Mixer::Latent(_))),
        spec.layers.iter().any(|l| matches!(l.mixer, Mixer::Delta(_))),
        spec.is_bidirectional(),
        moe().next().is_some(),
        moe().any(|m| m.shared.is_some()),
        spec.layers.iter().any(|l| l.parallel),
        attention().any(|a| a.rope.is_none()) && spec.learned_positions.is_none(),
        matches!(spec.head, Head::Logits { tied: true, .. }),
        matches!(spec.head, Head::Pool(_)),
        quantized.is_some(),
    ];
    FEATURES.into_iter().zip(used).filter_map(|(name, used)| used.then_some(name)).collect()
}
