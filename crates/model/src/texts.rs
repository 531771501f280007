//! What a model's files say besides its shape and its weights: vocabulary, chat template, defaults of generation.
//!
//! Owns which files count and which of them wins. What is in them is for the `text` crate and the server to
//! understand.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::config::{Config, MAX_CONFIG_BYTES, parse_object};
use crate::error::{ModelError, Result};
use crate::gguf::{GgufSource, GgufTokenizer};
use crate::mmap::FileSource;
use crate::source::ModelSource;
use crate::spec::ModelSpec;

/// Largest tokenizer or template file.
const MAX_TEXT_FILE: usize = 64 << 20;
/// Files that make a tokenizer, as far as they are there.
const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];
/// Where a model's author writes defaults of generation.
const GENERATION: &str = "generation_config.json";

/// What a tokenizer is made from.
#[derive(Clone, Debug)]
pub enum TokenizerData {
    /// Files by name; possibly none.
    Files(BTreeMap<String, Vec<u8>>),
    /// The vocabulary of a GGUF file.
    Gguf(Box<GgufTokenizer>),
}

/// A model's texts.
#[derive(Clone, Debug)]
pub struct Texts {
    /// For the `text` crate.
    pub tokenizer: TokenizerData,
    /// Jinja source, if the model brings one.
    pub chat_template: Option<String>,
    /// `generation_config.json`, if there is one.
    pub generation_config: Option<Map<String, Value>>,
}

impl Texts {
    /// Reads them, and no weight.
    ///
    /// # Errors
    /// A file cannot be read, is too large, or is not in the outer form that it must have.
    pub fn read(source: &ModelSource) -> Result<Self> {
        match source {
            ModelSource::Files { files, .. } => Self::of_files(files),
            ModelSource::Gguf { name, file } => Self::of_gguf(&GgufSource::open(name, file)?),
        }
    }

    pub(crate) fn of_files(files: &BTreeMap<String, FileSource>) -> Result<Self> {
        let mut tokenizer = BTreeMap::new();
        for name in TOKENIZER_FILES {
            if let Some(file) = files.get(name) {
                tokenizer.insert(name.to_owned(), file.read(name, MAX_TEXT_FILE)?);
            }
        }
        let generation_config = match files.get(GENERATION) {
            None => None,
            Some(file) => Some(parse_object(GENERATION, file.open(GENERATION)?.as_ref(), MAX_CONFIG_BYTES)?),
        };
        Ok(Self {
            chat_template: chat_template(files, &tokenizer)?,
            tokenizer: TokenizerData::Files(tokenizer),
            generation_config,
        })
    }

    pub(crate) fn of_gguf(gguf: &GgufSource) -> Result<Self> {
        let tokenizer = gguf.tokenizer()?;
        Ok(Self {
            chat_template: tokenizer.chat_template.clone(),
            tokenizer: TokenizerData::Gguf(Box::new(tokenizer)),
            generation_config: None,
        })
    }

    /// Tokens that end a text: the configuration's and the generation defaults'. Sorted.
    ///
    /// # Errors
    /// `eos_token_id` is no token of the model.
    pub fn eos_ids(&self, spec: &ModelSpec) -> Result<Vec<u32>> {
        let mut ids: BTreeSet<u32> = spec.eos.iter().copied().collect();
        if let Some(object) = &self.generation_config {
            let config = Config::new(GENERATION, object);
            ids.extend(config.token_ids("eos_token_id", spec.vocab)?);
        }
        Ok(ids.into_iter().collect())
    }
}

/// `chat_template.jinja`, else `chat_template.json`, else `chat_template` of `tokenizer_config.json`: a text, or
/// a list of named templates of which `default` counts.
fn chat_template(
    files: &BTreeMap<String, FileSource>,
    tokenizer: &BTreeMap<String, Vec<u8>>,
) -> Result<Option<String>> {
    const JINJA: &str = "chat_template.jinja";
    if let Some(file) = files.get(JINJA) {
        let bytes = file.read(JINJA, MAX_TEXT_FILE)?;
        let text = String::from_utf8(bytes);
        return text.map(Some).map_err(|e| ModelError::corrupt(JINJA, "file", format!("not UTF-8: {e}")));
    }
    const JSON: &str = "chat_template.json";
    let (name, bytes) = match files.get(JSON) {
        Some(file) => (JSON, file.read(JSON, MAX_TEXT_FILE)?),
        None => match tokenizer.get("tokenizer_config.json") {
            Some(bytes) => ("tokenizer_config.json", bytes.clone()),
            None => return Ok(None),
        },
    };
    let object = parse_object(name, &bytes, MAX_TEXT_FILE)?;
    match object.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
            let default = default.ok_or_else(|| {
                ModelError::field(name, "chat_template", "the list has no template named `default`")
            })?;
            Ok(Some(default.to_owned()))
        }
        Some(_) => Err(ModelError::field(name, "chat_template", "expected a text or a list of templates")),
    }
}
