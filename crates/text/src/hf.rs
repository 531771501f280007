//! `tokenizer.json`: loading with limits, and encoding by the `tokenizers` crate.
//!
//! Owns the pipeline added tokens -> normalizer -> pre-tokenizer -> model. Decoding is not done
//! here: the loader turns the file's decoder into a byte table once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::{
    AddedVocabulary, Encoding, Model, ModelWrapper, OffsetReferential, OffsetType, PostProcessor,
    PreTokenizer, Token,
};

use crate::byte_table::ByteTable;
use crate::decode_rule::DecodeRule;
use crate::parts::{Encoder, MAX_VOCAB, Parts};
use crate::{TokenId, TokenizerError};

const FILE: &str = "tokenizer.json";
/// The largest published vocabularies have about 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Published tokenizers have at most a few thousand added tokens.
const MAX_ADDED_TOKENS: usize = 1 << 16;

/// The fields that are judged before the file is handed to the `tokenizers` crate.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    added_tokens: Vec<IgnoredAny>,
    #[serde(default)]
    decoder: Value,
}

pub(crate) struct HfEncoder {
    tokenizer: tokenizers::Tokenizer,
    /// The added vocabulary in the mode where special tokens inside a text stay text.
    plain_added: AddedVocabulary,
}

/// Refuses a file that is larger than any vocabulary.
pub(crate) fn check_size(bytes: u64) -> Result<(), TokenizerError> {
    if bytes > MAX_FILE_BYTES {
        return Err(TokenizerError::FileTooLarge { bytes, limit: MAX_FILE_BYTES });
    }
    Ok(())
}

#[allow(clippy::needless_pass_by_value, reason = "is itself an argument of map_err")]
fn invalid(reason: impl ToString) -> TokenizerError {
    TokenizerError::Invalid { file: FILE, reason: reason.to_string() }
}

pub(crate) fn load(bytes: &[u8]) -> Result<Parts, TokenizerError> {
    check_size(u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
    let head: Head = serde_json::from_slice(bytes).map_err(invalid)?;
    if head.added_tokens.len() > MAX_ADDED_TOKENS {
        return Err(invalid(format!(
            "added_tokens has {} entries, the limit is {MAX_ADDED_TOKENS}",
            head.added_tokens.len()
        )));
    }
    let rule = DecodeRule::from_json(&head.decoder)?;
    // The crate's deserializers assert some invariants of the file instead of checking them.
    let mut tokenizer = catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
        .map_err(|_| invalid("its parts contradict each other"))?
        .map_err(invalid)?;
    if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
        && bpe.dropout.is_some()
    {
        // A training-time switch that would make encoding random.
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        tokenizer.with_model(bpe);
    }
    let (prefix, suffix) = surrounding_ids(&tokenizer)?;
    finish(tokenizer, &rule, prefix, suffix, |_, _| None)
}

/// Builds the byte table. `raw` may give an entry's bytes itself instead of the rule.
pub(crate) fn finish(
    tokenizer: tokenizers::Tokenizer,
    rule: &DecodeRule,
    prefix: Vec<TokenId>,
    suffix: Vec<TokenId>,
    raw: impl Fn(TokenId, &str) -> Option<Vec<u8>>,
) -> Result<Parts, TokenizerError> {
    let vocab = tokenizer.get_vocab(true);
    let size = vocab.values().max().map_or(0, |id| *id as usize + 1);
    if size == 0 || size > MAX_VOCAB {
        return Err(invalid(format!("the vocabulary ends at id {size}, accepted are 1 to {MAX_VOCAB}")));
    }
    let mut entries: Vec<Option<(Vec<u8>, bool)>> = vec![None; size];
    let added = tokenizer.get_added_vocabulary();
    for (token, id) in vocab {
        let token = tokenizer.id_to_token(id).unwrap_or(token);
        let bytes = raw(id, &token).unwrap_or_else(|| rule.bytes_of(&token));
        entries[id as usize] = Some((bytes, added.is_special_token(&token)));
    }
    let mut plain_added = added.clone();
    plain_added.set_encode_special_tokens(true);
    Ok(Parts {
        encoder: Box::new(HfEncoder { tokenizer, plain_added }),
        table: ByteTable::from_entries(entries.into_iter()),
        leading: rule.leading,
        prefix,
        suffix,
    })
}

/// Asks the post-processor what it puts around a text, by letting it process one marked token.
fn surrounding_ids(
    tokenizer: &tokenizers::Tokenizer,
) -> Result<(Vec<TokenId>, Vec<TokenId>), TokenizerError> {
    let Some(processor) = tokenizer.get_post_processor() else {
        return Ok((Vec::new(), Vec::new()));
    };
    const MARK: u32 = u32::MAX;
    let marked = Encoding::from_tokens(vec![Token::new(MARK, "x".to_owned(), (0, 1))], 0);
    let processed = catch_unwind(AssertUnwindSafe(|| processor.process(marked, None, true)))
        .map_err(|_| invalid("post_processor contradicts itself"))?
        .map_err(invalid)?;
    let parts: Vec<&[TokenId]> = processed.get_ids().split(|id| *id == MARK).collect();
    match parts.as_slice() {
        [prefix, suffix] => Ok((prefix.to_vec(), suffix.to_vec())),
        _ => Err(TokenizerError::Unsupported {
            component: "post_processor",
            detail: format!("the text appears {} times", parts.len().saturating_sub(1)),
        }),
    }
}

impl Encoder for HfEncoder {
    fn encode(&self, text: &str, parse_special: bool, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let failed = |e: tokenizers::Error| TokenizerError::Encode(e.to_string());
        let added = if parse_special { self.tokenizer.get_added_vocabulary() } else { &self.plain_added };
        let mut pieces = added.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = self.tokenizer.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(failed)?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    fn token_text(&self, id: TokenId) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.tokenizer.token_to_id(token)
    }
}
