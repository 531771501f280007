//! Vocabularies from GGUF metadata.
//!
//! Owns the checks of the metadata and the choice between SentencePiece (`llama`) and byte-level
//! BPE (`gpt2`). Reading GGUF files is not its business: the caller fills [`GgufVocab`].

mod bpe;
mod pre;
mod spm;

pub use pre::KNOWN_PRE_TOKENIZERS;

use crate::parts::{MAX_VOCAB, Parts};
use crate::{TokenId, TokenizerError};

/// The `tokenizer.ggml.*` metadata of a GGUF file. Fields are named after their keys.
#[derive(Debug, Clone, Default)]
pub struct GgufVocab {
    /// `llama` (SentencePiece) or `gpt2` (byte-level BPE).
    pub model: String,
    /// Name of the pre-tokenizer; only for `gpt2`.
    pub pre: Option<String>,
    /// The vocabulary in the order of ids.
    pub tokens: Vec<String>,
    /// Log-probabilities of the pieces; needed for `llama`.
    pub scores: Option<Vec<f32>>,
    /// `token_type`: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `left right`, best first; needed for `gpt2`.
    pub merges: Option<Vec<String>>,
    /// `bos_token_id`.
    pub bos_id: Option<TokenId>,
    /// `eos_token_id`.
    pub eos_id: Option<TokenId>,
    /// `unknown_token_id`.
    pub unk_id: Option<TokenId>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
}

/// Values of `tokenizer.ggml.token_type`.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

fn bad(field: &'static str, reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Gguf { field, reason: reason.into() }
}

pub(crate) fn load(vocab: GgufVocab) -> Result<Parts, TokenizerError> {
    check(&vocab)?;
    match vocab.model.as_str() {
        "llama" => spm::load(vocab),
        "gpt2" => bpe::load(vocab),
        other => Err(bad("model", format!("`{other}` is not supported; known: llama, gpt2"))),
    }
}

fn check(vocab: &GgufVocab) -> Result<(), TokenizerError> {
    let size = vocab.tokens.len();
    if size == 0 || size > MAX_VOCAB {
        return Err(bad("tokens", format!("{size} entries, accepted are 1 to {MAX_VOCAB}")));
    }
    let lengths = [
        ("scores", vocab.scores.as_ref().map(Vec::len)),
        ("token_type", vocab.token_types.as_ref().map(Vec::len)),
    ];
    for (field, len) in lengths {
        if let Some(len) = len.filter(|len| *len != size) {
            return Err(bad(field, format!("{len} entries for {size} tokens")));
        }
    }
    if let Some(index) =
        vocab.token_types.iter().flatten().position(|t| !(kind::NORMAL..=kind::BYTE).contains(t))
    {
        return Err(bad("token_type", format!("entry {index} is not in 1..=6")));
    }
    if let Some(index) = vocab.scores.iter().flatten().position(|s| s.is_nan()) {
        return Err(bad("scores", format!("entry {index} is not a number")));
    }
    let ids =
        [("bos_token_id", vocab.bos_id), ("eos_token_id", vocab.eos_id), ("unknown_token_id", vocab.unk_id)];
    for (field, id) in ids {
        if let Some(id) = id.filter(|id| *id as usize >= size) {
            return Err(bad(field, format!("id {id} of {size} tokens")));
        }
    }
    Ok(())
}

impl GgufVocab {
    fn kind_of(&self, index: usize) -> i32 {
        if let Some(types) = &self.token_types {
            return types[index];
        }
        let is = |id: Option<TokenId>| id.is_some_and(|id| id as usize == index);
        if is(self.bos_id) || is(self.eos_id) {
            kind::CONTROL
        } else if is(self.unk_id) {
            kind::UNKNOWN
        } else {
            kind::NORMAL
        }
    }

    /// BOS and EOS around a text, with the format's default where the file is silent.
    fn surrounding(&self, default_bos: bool) -> Result<(Vec<TokenId>, Vec<TokenId>), TokenizerError> {
        let pick = |wanted: bool, explicit: bool, id: Option<TokenId>, field: &'static str| match id
            .filter(|_| wanted)
        {
            Some(id) => Ok(vec![id]),
            None if wanted && explicit => Err(bad(field, "the file says to add it, but has none")),
            None => Ok(Vec::new()),
        };
        Ok((
            pick(self.add_bos.unwrap_or(default_bos), self.add_bos.is_some(), self.bos_id, "bos_token_id")?,
            pick(self.add_eos.unwrap_or(false), self.add_eos.is_some(), self.eos_id, "eos_token_id")?,
        ))
    }
}
