//! The vocabulary inside a GGUF file, as plain data.
//!
//! Owns the keys' names and types. What the entries mean is the `text` crate's.

use super::parse::{GgufHeader, Value};
use crate::error::{ModelError, Result};

/// `tokenizer.*` of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: `llama` (SentencePiece) or `gpt2` (byte-level BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer.
    pub pre: Option<String>,
    /// The vocabulary in the order of ids.
    pub tokens: Vec<String>,
    /// Log-probabilities of the pieces.
    pub scores: Option<Vec<f32>>,
    /// 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `left right`, best first.
    pub merges: Option<Vec<String>>,
    /// First token of a text.
    pub bos_id: Option<u32>,
    /// End of a text.
    pub eos_id: Option<u32>,
    /// For what has no token.
    pub unk_id: Option<u32>,
    /// Whether texts start with `bos_id`.
    pub add_bos: Option<bool>,
    /// Whether texts end with `eos_id`.
    pub add_eos: Option<bool>,
    /// Whether a space is put before the first word.
    pub add_space_prefix: Option<bool>,
    /// Jinja template of chats.
    pub chat_template: Option<String>,
}

fn list<'a, T>(
    file: &str,
    header: &'a GgufHeader,
    key: &str,
    pick: impl Fn(&'a Value) -> Option<&'a Vec<T>>,
) -> Result<Option<&'a Vec<T>>> {
    match header.keys.get(key) {
        None => Ok(None),
        Some(value) => pick(value).map(Some).ok_or_else(|| {
            ModelError::field(file, key, format!("is {}, another kind of array was expected", value.show()))
        }),
    }
}

impl GgufTokenizer {
    /// Reads the vocabulary.
    ///
    /// # Errors
    /// A key is missing, of another type, of another length than the vocabulary, or names a token beyond it.
    pub fn read(file: &str, header: &GgufHeader) -> Result<Self> {
        let key = |k: &str| format!("tokenizer.ggml.{k}");
        let text = |k: &str| header.text(file, k).map(|t| t.map(str::to_owned));
        let texts = |k: &str| {
            list(file, header, &key(k), |v| match v {
                Value::Texts(t) => Some(t),
                _ => None,
            })
        };
        let missing = |k: &str| ModelError::field(file, key(k), "is missing");
        let tokens = texts("tokens")?.ok_or_else(|| missing("tokens"))?.clone();
        let scores = list(file, header, &key("scores"), |v| match v {
            Value::Floats(f) => Some(f),
            _ => None,
        })?;
        let types = list(file, header, &key("token_type"), |v| match v {
            Value::Integers(i) => Some(i),
            _ => None,
        })?;
        for (k, n) in [("scores", scores.map(Vec::len)), ("token_type", types.map(Vec::len))] {
            if let Some(n) = n
                && n != tokens.len()
            {
                let why = format!("has {n} entries, `tokens` has {}", tokens.len());
                return Err(ModelError::field(file, key(k), why));
            }
        }
        let id = |k: &str| match header.whole(file, &key(k))? {
            Some(id) if id >= tokens.len() as u64 => {
                let why = format!("is {id}, `tokens` has {} entries", tokens.len());
                Err(ModelError::field(file, key(k), why))
            }
            id => Ok(id.map(|id| id as u32)),
        };
        Ok(Self {
            model: text(&key("model"))?.ok_or_else(|| missing("model"))?,
            pre: text(&key("pre"))?,
            scores: scores.cloned(),
            token_types: types.map(|t| t.iter().map(|&t| t as i32).collect()),
            merges: texts("merges")?.cloned(),
            bos_id: id("bos_token_id")?,
            eos_id: id("eos_token_id")?,
            unk_id: id("unknown_token_id")?,
            add_bos: header.flag(file, &key("add_bos_token"))?,
            add_eos: header.flag(file, &key("add_eos_token"))?,
            add_space_prefix: header.flag(file, &key("add_space_prefix"))?,
            chat_template: text("tokenizer.chat_template")?,
            tokens,
        })
    }
}
