//! The public tokenizer: one type over `tokenizer.json`, `tekken.json` and GGUF vocabularies.
//!
//! Owns the byte table, the special ids added around a text, and the input limit. The encoders
//! behind it are in [`crate::hf`], [`crate::gguf`] and [`crate::tekken`].

use std::path::Path;
use std::sync::Arc;

use crate::byte_table::{ByteTable, TokenBytes};
use crate::decode_rule::Leading;
use crate::gguf::GgufVocab;
use crate::parts::{Encoder, Parts};
use crate::{TokenId, TokenizerError};

/// Input limit of a new tokenizer, in bytes of UTF-8. Encoding takes memory in proportion (about
/// 100 bytes a byte in the worst case), so a caller with a context of n tokens should lower it.
pub const DEFAULT_MAX_INPUT_BYTES: usize = 16 << 20;

struct Inner {
    encoder: Box<dyn Encoder>,
    table: ByteTable,
    leading: Leading,
}

/// Text to ids and back. Cloning shares the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    prefix: Arc<[TokenId]>,
    suffix: Arc<[TokenId]>,
    max_input_bytes: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("prefix", &self.prefix)
            .field("suffix", &self.suffix)
            .field("max_input_bytes", &self.max_input_bytes)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// Malformed JSON, a component that cannot be reproduced exactly, or a size beyond the limits.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        crate::hf::load(bytes).and_then(Self::from_parts)
    }

    /// Reads a `tokenizer.json` file.
    ///
    /// # Errors
    /// As [`Self::from_json_bytes`], and [`TokenizerError::Io`].
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let io = |source| TokenizerError::Io { path: path.display().to_string(), source };
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        crate::hf::check_size(bytes)?;
        Self::from_json_bytes(&std::fs::read(path).map_err(io)?)
    }

    /// Reads the contents of a `tekken.json`, Mistral's own tokenizer file. `<s>` is put before a text that is
    /// encoded with special tokens.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`] naming the field, or a size beyond the limits.
    pub fn from_tekken_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        crate::tekken::load(bytes).and_then(Self::from_parts)
    }

    /// Builds a tokenizer from the vocabulary of a GGUF file.
    ///
    /// # Errors
    /// [`TokenizerError::Gguf`] naming the field, or [`TokenizerError::UnknownPreTokenizer`].
    pub fn from_gguf_vocab(vocab: GgufVocab) -> Result<Self, TokenizerError> {
        crate::gguf::load(vocab).and_then(Self::from_parts)
    }

    fn from_parts(parts: Parts) -> Result<Self, TokenizerError> {
        // What every text would begin or end with must mean something.
        let vocab_size = parts.table.len();
        if let Some(&id) = parts.prefix.iter().chain(&parts.suffix).find(|id| parts.table.get(**id).is_none())
        {
            return Err(TokenizerError::UnknownId { id, vocab_size });
        }
        Ok(Self {
            inner: Arc::new(Inner { encoder: parts.encoder, table: parts.table, leading: parts.leading }),
            prefix: parts.prefix.into(),
            suffix: parts.suffix.into(),
            max_input_bytes: DEFAULT_MAX_INPUT_BYTES,
        })
    }

    /// The same tokenizer with another input limit, in bytes of UTF-8.
    #[must_use]
    pub fn with_max_input_bytes(mut self, limit: usize) -> Self {
        self.max_input_bytes = limit;
        self
    }

    /// The same tokenizer, which puts `bos` before and `eos` after a text encoded with special
    /// tokens. Some models say this only in `tokenizer_config.json` (`add_bos_token`,
    /// `add_eos_token`). A position for which the tokenizer's own file already has a rule keeps it.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary.
    pub fn with_default_special(
        mut self,
        bos: Option<TokenId>,
        eos: Option<TokenId>,
    ) -> Result<Self, TokenizerError> {
        for (ids, id) in [(&mut self.prefix, bos), (&mut self.suffix, eos)] {
            if let Some(id) = id.filter(|_| ids.is_empty()) {
                self.inner
                    .table
                    .get(id)
                    .ok_or(TokenizerError::UnknownId { id, vocab_size: self.inner.table.len() })?;
                *ids = Arc::new([id]);
            }
        }
        Ok(self)
    }

    /// Ids of `text`.
    ///
    /// With `add_special`, the ids that the model expects around a text (BOS, EOS) are added. With
    /// `parse_special`, the names of special tokens inside `text` become those tokens; without it
    /// they are ordinary text, which is what untrusted text should be. Time is O(n log n).
    ///
    /// # Errors
    /// [`TokenizerError::InputTooLong`] above the input limit; [`TokenizerError::Encode`] where
    /// the vocabulary cannot express the text.
    pub fn encode(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        if text.len() > self.max_input_bytes {
            return Err(TokenizerError::InputTooLong { bytes: text.len(), limit: self.max_input_bytes });
        }
        let mut ids = Vec::new();
        if add_special {
            ids.extend_from_slice(&self.prefix);
        }
        self.inner.encoder.encode(text, parse_special, &mut ids)?;
        if add_special {
            ids.extend_from_slice(&self.suffix);
        }
        Ok(ids)
    }

    /// Text of `ids`: the lossy UTF-8 (U+FFFD) of their bytes, put together.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> Result<String, TokenizerError> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut leading = self.inner.leading;
        for &id in ids {
            let token = self.entry(id)?;
            if !(token.special && skip_special) {
                bytes.extend_from_slice(&leading.apply(token.bytes));
            }
        }
        Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }

    /// The exact bytes of one token inside a text; they need not be whole characters. `None` for
    /// an id outside the vocabulary.
    #[must_use]
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.inner.table.get(id).map(|token| token.bytes)
    }

    /// The vocabulary's own spelling of a token (`Ġthe`, `▁the`, `<0x0A>`).
    #[must_use]
    pub fn token_text(&self, id: TokenId) -> Option<String> {
        self.inner.encoder.token_text(id)
    }

    /// The id of a token in the vocabulary's own spelling.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.encoder.token_to_id(token)
    }

    /// One more than the largest id. A model's logits may be wider (padding) or, where a fine-tune
    /// added tokens without resizing, narrower.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.table.len()
    }

    /// Whether the token is a special one (control or unknown), which `skip_special` leaves out.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.inner.table.get(id).is_some_and(|token| token.special)
    }

    /// The input limit in bytes.
    #[must_use]
    pub fn max_input_bytes(&self) -> usize {
        self.max_input_bytes
    }

    pub(crate) fn entry(&self, id: TokenId) -> Result<TokenBytes<'_>, TokenizerError> {
        self.inner.table.get(id).ok_or(TokenizerError::UnknownId { id, vocab_size: self.inner.table.len() })
    }

    pub(crate) fn leading(&self) -> Leading {
        self.inner.leading
    }
}
