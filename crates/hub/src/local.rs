//! Finds the files of one model. Owns the list of file names that make a model and the choice of weights;
//! never reads their content, except the shard index.

use std::path::{Path, PathBuf};

use crate::HubError;
use crate::files::Bounds;
use crate::index::{INDEX_NAME, shards};
use crate::model_ref::ModelRef;
use crate::store::{StoreOptions, find_snapshot};

/// Most entries of a model directory.
const MAX_ENTRIES: usize = 10_000;
const PICKLE_EXTENSIONS: [&str; 6] = ["bin", "pt", "pth", "pkl", "pickle", "ckpt"];

/// The weights of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Weights {
    /// One or more safetensors files, sorted by name.
    Safetensors {
        /// The files; never empty.
        shards: Vec<PathBuf>,
        /// `model.safetensors.index.json`, where the model has one.
        index: Option<PathBuf>,
    },
    /// One GGUF file, which also holds configuration and tokenizer.
    Gguf(PathBuf),
    /// None, which only [`StoreOptions::allow_missing_weights`] permits.
    Absent,
}

/// The tokenizer's files that are there; which of them suffices is for the `text` crate to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// `tokenizer.json`: the whole tokenizer.
    pub tokenizer_json: Option<PathBuf>,
    /// `tokenizer_config.json`: special tokens and often the chat template.
    pub tokenizer_config: Option<PathBuf>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<PathBuf>,
    /// `added_tokens.json`.
    pub added_tokens: Option<PathBuf>,
    /// `tokenizer.model`: a SentencePiece model.
    pub sentencepiece: Option<PathBuf>,
    /// `tekken.json`: Mistral's vocabulary.
    pub tekken: Option<PathBuf>,
    /// `vocab.json`: an older byte-level BPE, with `merges`.
    pub vocab: Option<PathBuf>,
    /// `merges.txt`.
    pub merges: Option<PathBuf>,
}

/// A model whose files are on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalModel {
    /// The reference it was found by.
    pub reference: ModelRef,
    /// The model's directory, canonical; of a GGUF file, the directory it is in.
    pub root: PathBuf,
    /// The commit id, where the model comes from the store.
    pub revision: Option<String>,
    /// `config.json`; always there beside safetensors weights.
    pub config: Option<PathBuf>,
    /// `generation_config.json`: defaults of sampling.
    pub generation_config: Option<PathBuf>,
    /// `chat_template.jinja`, else `chat_template.json`.
    pub chat_template: Option<PathBuf>,
    /// The tokenizer's files.
    pub tokenizer: TokenizerFiles,
    /// Where there is a `modules.json` of sentence-transformers: it, and each `FOLDER/config.json` that it may
    /// name.
    pub modules: Vec<PathBuf>,
    /// The weights.
    pub weights: Weights,
}

impl LocalModel {
    /// The weight files, in order.
    pub fn weight_files(&self) -> &[PathBuf] {
        match &self.weights {
            Weights::Safetensors { shards, .. } => shards,
            Weights::Gguf(file) => std::slice::from_ref(file),
            Weights::Absent => &[],
        }
    }
}

/// Finds the files of a model on this machine. Never uses the network.
///
/// # Errors
/// Names the file, the field and the reason: something is missing, unreadable, out of bounds, ambiguous, or
/// in a format that is never opened.
pub fn resolve(reference: &ModelRef, options: &StoreOptions) -> Result<LocalModel, HubError> {
    match reference {
        ModelRef::Gguf(path) => from_gguf_file(reference, path),
        ModelRef::Dir(path) => from_dir(reference, path, None, options),
        ModelRef::HubRepo { org, name, revision } => {
            let snapshot = find_snapshot(options, org, name, revision.as_deref())?;
            from_dir(reference, &snapshot.dir, Some(snapshot.commit), options)
        }
    }
}

fn from_gguf_file(reference: &ModelRef, path: &Path) -> Result<LocalModel, HubError> {
    // A file that the operator names is taken from wherever a link leads to.
    let file = path.canonicalize().map_err(HubError::io(path, "open"))?;
    if !file.is_file() {
        return Err(HubError::NotAFile { path: path.to_owned() });
    }
    Ok(LocalModel {
        reference: reference.clone(),
        root: file.parent().map(Path::to_owned).unwrap_or_default(),
        revision: None,
        config: None,
        generation_config: None,
        chat_template: None,
        tokenizer: TokenizerFiles::default(),
        modules: Vec::new(),
        weights: Weights::Gguf(file),
    })
}

fn from_dir(
    reference: &ModelRef,
    dir: &Path,
    revision: Option<String>,
    options: &StoreOptions,
) -> Result<LocalModel, HubError> {
    let bounds = Bounds::of_dir(dir)?;
    let names = list_names(&bounds)?;
    let weights = find_weights(&bounds, &names, options.allow_missing_weights)?;
    let config = bounds.optional("config.json")?;
    if config.is_none() && !matches!(weights, Weights::Gguf(_)) {
        return Err(HubError::MissingFile {
            dir: dir.to_owned(),
            file: "config.json".into(),
            reason: "it describes the model".into(),
        });
    }
    let chat_template = match bounds.optional("chat_template.jinja")? {
        Some(path) => Some(path),
        None => bounds.optional("chat_template.json")?,
    };
    Ok(LocalModel {
        reference: reference.clone(),
        root: bounds.root().to_owned(),
        revision,
        config,
        generation_config: bounds.optional("generation_config.json")?,
        chat_template,
        tokenizer: TokenizerFiles {
            tokenizer_json: bounds.optional("tokenizer.json")?,
            tokenizer_config: bounds.optional("tokenizer_config.json")?,
            special_tokens_map: bounds.optional("special_tokens_map.json")?,
            added_tokens: bounds.optional("added_tokens.json")?,
            sentencepiece: bounds.optional("tokenizer.model")?,
            tekken: bounds.optional("tekken.json")?,
            vocab: bounds.optional("vocab.json")?,
            merges: bounds.optional("merges.txt")?,
        },
        modules: modules(&bounds, &names)?,
        weights,
    })
}

/// The files by which sentence-transformers describes an embedder.
fn modules(bounds: &Bounds, names: &[String]) -> Result<Vec<PathBuf>, HubError> {
    let Some(list) = bounds.optional("modules.json")? else { return Ok(Vec::new()) };
    let mut files = vec![list];
    for name in names.iter().filter(|name| bounds.root().join(name).is_dir()) {
        files.extend(bounds.optional(&format!("{name}/config.json"))?);
    }
    Ok(files)
}

/// Names of the directory's entries, sorted.
fn list_names(bounds: &Bounds) -> Result<Vec<String>, HubError> {
    let dir = bounds.root();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(HubError::io(dir, "list"))? {
        let entry = entry.map_err(HubError::io(dir, "list"))?;
        if names.len() >= MAX_ENTRIES {
            return Err(HubError::TooManyFiles { dir: dir.to_owned(), limit: MAX_ENTRIES });
        }
        // A name that is not UTF-8 is none of ours.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn find_weights(bounds: &Bounds, names: &[String], allow_missing: bool) -> Result<Weights, HubError> {
    if allow_missing && !names.iter().any(|name| is_weights(name)) {
        return Ok(Weights::Absent);
    }
    if let Some(index) = bounds.optional(INDEX_NAME)? {
        return match shards(&index, bounds) {
            Ok(shards) => Ok(Weights::Safetensors { shards, index: Some(index) }),
            // A checkpoint whose shards were left out on purpose, for dummy weights.
            Err(HubError::MissingFile { .. }) if allow_missing => Ok(Weights::Absent),
            Err(error) => Err(error),
        };
    }
    if let Some(single) = bounds.optional("model.safetensors")? {
        return Ok(Weights::Safetensors { shards: vec![single], index: None });
    }
    let with = |extension: &str| -> Vec<&String> {
        names.iter().filter(|name| has_extension(name, extension)).collect()
    };
    let ambiguous = |found: &[&String], hint| HubError::Ambiguous {
        dir: bounds.root().to_owned(),
        count: found.len(),
        examples: found.iter().take(4).map(|name| name.as_str()).collect::<Vec<_>>().join(", "),
        hint,
    };
    match with("safetensors").as_slice() {
        [] => {}
        [single] if !is_shard_name(single) => {
            return Ok(Weights::Safetensors {
                shards: vec![bounds.check(bounds.root().join(single))?],
                index: None,
            });
        }
        [single] => {
            return Err(HubError::MissingFile {
                dir: bounds.root().to_owned(),
                file: INDEX_NAME.into(),
                reason: format!("{single} is one shard of several"),
            });
        }
        several => {
            return Err(ambiguous(several, "model.safetensors.index.json must say which tensors are where"));
        }
    }
    match with("gguf").as_slice() {
        [] => {}
        [single] => return Ok(Weights::Gguf(bounds.check(bounds.root().join(single))?)),
        several => return Err(ambiguous(several, "give the path of one .gguf file")),
    }
    let pickle = names.iter().find(|name| PICKLE_EXTENSIONS.iter().any(|ext| has_extension(name, ext)));
    match pickle {
        Some(found) => Err(HubError::PickleOnly { dir: bounds.root().to_owned(), found: found.clone() }),
        None => Err(HubError::NoWeights { dir: bounds.root().to_owned() }),
    }
}

fn is_weights(name: &str) -> bool {
    has_extension(name, "safetensors") || has_extension(name, "gguf") || name == INDEX_NAME
}

pub(crate) fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// `model-00001-of-00003.safetensors` and the like; a set of one is complete by itself.
fn is_shard_name(name: &str) -> bool {
    let stem = name.strip_suffix(".safetensors").unwrap_or(name);
    let mut parts = stem.rsplitn(3, '-');
    let (Some(total), Some("of"), Some(_)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    total.parse::<u32>().is_ok_and(|total| total > 1)
}
