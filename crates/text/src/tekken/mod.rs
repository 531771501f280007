//! `tekken.json`: Mistral's own tokenizer file.
//!
//! Owns the reading of the file under limits, and encoding: special tokens are cut out, the rest is split by the
//! file's pattern, and each piece is merged by rank ([`bpe`]). The file has no decoder and no post-processor: a token
//! is its bytes, and `<s>` stands before a text.
//!
//! Special tokens have the first ids; the vocabulary's entry of rank r has the id r + their number.

mod base64;
mod bpe;

use aho_corasick::{AhoCorasick, MatchKind};
use serde::Deserialize;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

use crate::byte_table::ByteTable;
use crate::decode_rule::Leading;
use crate::parts::{Encoder, MAX_VOCAB, Parts};
use crate::{SpecialTokens, TokenId, Tokenizer, TokenizerError};
use bpe::Ranks;

const FILE: &str = "tekken.json";
/// The published files have about 20 MB.
const MAX_FILE_BYTES: usize = 256 << 20;
/// The published pattern has about 300 bytes.
const MAX_PATTERN_BYTES: usize = 16 << 10;
/// The longest published entry has 128 bytes. Merging hashes candidates of up to twice this length.
const MAX_TOKEN_BYTES: usize = 1024;
/// Published files have 1,000.
const MAX_SPECIAL: usize = 1 << 16;
const BOS: &str = "<s>";

/// Names of the special tokens in files of the first versions, which do not list them.
const EARLY_SPECIAL: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

#[derive(Deserialize)]
struct File {
    config: Config,
    vocab: Vec<Entry>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Entry {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

fn invalid(reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Invalid { file: FILE, reason: reason.into() }
}

pub(crate) struct TekkenEncoder {
    split: Split,
    ranks: Ranks,
    /// Names of the special tokens, by id.
    special: Vec<String>,
    cutter: Option<AhoCorasick>,
    /// Bytes of the other tokens, by rank.
    tokens: Vec<Box<[u8]>>,
}

pub(crate) fn load(bytes: &[u8]) -> Result<Parts, TokenizerError> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(TokenizerError::FileTooLarge { bytes: bytes.len() as u64, limit: MAX_FILE_BYTES as u64 });
    }
    let file: File = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
    let pattern = file.config.pattern;
    if pattern.is_empty() || pattern.len() > MAX_PATTERN_BYTES {
        let text =
            format!("config.pattern has {} bytes, accepted are 1 to {MAX_PATTERN_BYTES}", pattern.len());
        return Err(invalid(text));
    }
    let size = file.config.default_vocab_size;
    if size == 0 || size > MAX_VOCAB {
        return Err(invalid(format!("config.default_vocab_size is {size}, accepted are 1 to {MAX_VOCAB}")));
    }
    let special = special_tokens(file.special_tokens, file.config.default_num_special_tokens)?;
    let Some(plain) = size.checked_sub(special.len()).filter(|plain| *plain <= file.vocab.len()) else {
        return Err(invalid(format!(
            "config.default_vocab_size is {size}, but there are {} special tokens and {} others",
            special.len(),
            file.vocab.len()
        )));
    };
    let tokens = vocabulary(&file.vocab[..plain])?;
    let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false)
        .map_err(|e| invalid(format!("config.pattern: {e}")))?;
    let cutter = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(&special)
        .map_err(|e| invalid(format!("special_tokens: {e}")))?;
    let ranks = Ranks::new(&tokens)?;
    let bos = special.iter().position(|name| name == BOS);
    let table = ByteTable::from_entries(
        special
            .iter()
            .map(|name| Some((name.as_bytes().to_vec(), true)))
            .chain(tokens.iter().map(|bytes| Some((bytes.to_vec(), false)))),
    );
    let cutter = (!special.is_empty()).then_some(cutter);
    Ok(Parts {
        encoder: Box::new(TekkenEncoder { split, ranks, special, cutter, tokens }),
        table,
        leading: Leading::Done,
        prefix: bos.map(as_id).into_iter().collect(),
        suffix: Vec::new(),
    })
}

fn as_id(index: usize) -> TokenId {
    // The vocabulary's size has been checked against `MAX_VOCAB`.
    TokenId::try_from(index).unwrap_or(TokenId::MAX)
}

/// Names by id; ids that the file does not name get a filler, as in Mistral's own reader.
fn special_tokens(listed: Option<Vec<Special>>, count: usize) -> Result<Vec<String>, TokenizerError> {
    if count > MAX_SPECIAL {
        return Err(invalid(format!(
            "config.default_num_special_tokens is {count}, the limit is {MAX_SPECIAL}"
        )));
    }
    let mut names: Vec<Option<String>> = vec![None; count];
    let early = || EARLY_SPECIAL.iter().enumerate();
    let listed = listed.unwrap_or_else(|| {
        early().map(|(rank, name)| Special { rank, token_str: (*name).to_owned() }).collect()
    });
    for (index, token) in listed.into_iter().enumerate() {
        let slot = names.get_mut(token.rank).filter(|slot| slot.is_none());
        let Some(slot) = slot.filter(|_| !token.token_str.is_empty()) else {
            return Err(invalid(format!(
                "special_tokens[{index}] has rank {} of {count} and {} bytes; ranks are different and names \
                 not empty",
                token.rank,
                token.token_str.len()
            )));
        };
        *slot = Some(token.token_str);
    }
    let names: Vec<String> = names
        .into_iter()
        .enumerate()
        .map(|(rank, name)| name.unwrap_or_else(|| format!("<SPECIAL_{rank}>")))
        .collect();
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort_unstable();
    match sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        true => Err(invalid("special_tokens: a name occurs twice")),
        false => Ok(names),
    }
}

/// Bytes by rank. The first 256 are the single bytes, so that every text can be said.
fn vocabulary(entries: &[Entry]) -> Result<Vec<Box<[u8]>>, TokenizerError> {
    if entries.len() < 256 {
        return Err(invalid(format!("vocab has {} entries, fewer than there are bytes", entries.len())));
    }
    let mut tokens = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let bytes = base64::decode(&entry.token_bytes)
            .filter(|bytes| !bytes.is_empty() && bytes.len() <= MAX_TOKEN_BYTES)
            .ok_or_else(|| {
                invalid(format!("vocab[{index}].token_bytes is not base64 of 1 to {MAX_TOKEN_BYTES} bytes"))
            })?;
        if entry.rank != index {
            return Err(invalid(format!("vocab[{index}].rank is {}; ranks count up from 0", entry.rank)));
        }
        if index < 256 && (bytes.len() > 1 || usize::from(bytes[0]) != index) {
            return Err(invalid(format!("vocab[{index}] is not the byte {index}")));
        }
        tokens.push(bytes.into_boxed_slice());
    }
    Ok(tokens)
}

impl Encoder for TekkenEncoder {
    fn encode(&self, text: &str, parse_special: bool, out: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let mut begin = 0;
        let cutter = self.cutter.as_ref().filter(|_| parse_special);
        for found in cutter.iter().flat_map(|cutter| cutter.find_iter(text)) {
            self.encode_plain(&text[begin..found.start()], out)?;
            out.push(found.pattern().as_u32());
            begin = found.end();
        }
        self.encode_plain(&text[begin..], out)
    }

    /// A special token's name, or the text of an entry; bytes that are no text as `<0xE2><0x82>`.
    fn token_text(&self, id: TokenId) -> Option<String> {
        let index = usize::try_from(id).ok()?;
        if let Some(name) = self.special.get(index) {
            return Some(name.clone());
        }
        let bytes = self.tokens.get(index - self.special.len())?;
        Some(match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().map(|byte| format!("<0x{byte:02X}>")).collect(),
        })
    }

    fn token_to_id(&self, token: &str) -> Option<TokenId> {
        if let Some(index) = self.special.iter().position(|name| name == token) {
            return Some(as_id(index));
        }
        self.ranks.get(token.as_bytes()).map(|rank| as_id(self.special.len()) + rank)
    }
}

impl TekkenEncoder {
    fn encode_plain(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        let mut pieces = PreTokenizedString::from(text);
        self.split.pre_tokenize(&mut pieces).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        let offset = as_id(self.special.len());
        for (piece, _, _) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            self.ranks.encode(piece.as_bytes(), |rank| out.push(offset + rank));
        }
        Ok(())
    }
}

/// The special tokens that templates name, for a folder whose only tokenizer is `tekken.json`: the format fixes
/// their names, and each is left out where the file has not got it.
#[must_use]
pub fn tekken_special_tokens(tokenizer: &Tokenizer) -> SpecialTokens {
    let named = |name: &str| tokenizer.token_to_id(name).map(|_| name.to_owned());
    SpecialTokens { bos: named(BOS), eos: named("</s>"), unk: named("<unk>"), pad: named("<pad>") }
}
