//! What a loader of a vocabulary hands to the tokenizer.

use crate::byte_table::ByteTable;
use crate::decode_rule::Leading;
use crate::{TokenId, TokenizerError};

/// No real vocabulary has more entries; the byte table is sized by the largest id.
pub(crate) const MAX_VOCAB: usize = 1 << 22;

/// Text to ids by one kind of vocabulary, and its own spelling of tokens.
pub(crate) trait Encoder: Send + Sync {
    /// Appends the ids of `text`. With `parse_special`, names of special tokens in it become those tokens.
    fn encode(&self, text: &str, parse_special: bool, out: &mut Vec<TokenId>) -> Result<(), TokenizerError>;

    /// The vocabulary's spelling of a token.
    fn token_text(&self, id: TokenId) -> Option<String>;

    /// The id of a spelling.
    fn token_to_id(&self, token: &str) -> Option<TokenId>;
}

/// A vocabulary, read.
pub(crate) struct Parts {
    pub(crate) encoder: Box<dyn Encoder>,
    pub(crate) table: ByteTable,
    pub(crate) leading: Leading,
    /// Ids put before a text that is encoded with special tokens.
    pub(crate) prefix: Vec<TokenId>,
    /// Ids put after it.
    pub(crate) suffix: Vec<TokenId>,
}
