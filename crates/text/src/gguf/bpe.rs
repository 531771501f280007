//! Byte-level BPE from GGUF: assembles the same pipeline that a `tokenizer.json` describes.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::{GgufVocab, bad, kind, pre};
use crate::TokenizerError;
use crate::decode_rule::DecodeRule;
use crate::parts::Parts;

pub(super) fn load(mut vocab: GgufVocab) -> Result<Parts, TokenizerError> {
    let pre = pre::find(vocab.pre.as_deref())?;
    let (prefix, suffix) = vocab.surrounding(pre.add_bos)?;
    let merges = vocab.merges.take().ok_or_else(|| bad("merges", "missing; a gpt2 vocabulary needs them"))?;
    let merges = merges
        .iter()
        .enumerate()
        .map(|(index, merge)| split_merge(index, merge))
        .collect::<Result<Vec<_>, _>>()?;
    let ids: Vocab = vocab.tokens.iter().cloned().zip(0u32..).collect();
    let mut builder = BPE::builder().vocab_and_merges(ids, merges).ignore_merges(pre.ignore_merges);
    if let Some(unk) = vocab.unk_id {
        builder = builder.unk_token(vocab.tokens[unk as usize].clone());
    }
    let model = builder.build().map_err(|e| bad("merges", e.to_string()))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    if pre.nfc {
        tokenizer.with_normalizer(Some(NFC)).map_err(|e| bad("pre", e.to_string()))?;
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(pre.patterns)?));
    for (index, token) in vocab.tokens.iter().enumerate() {
        let kind = vocab.kind_of(index);
        let added = matches!(kind, kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN);
        if added && !token.is_empty() {
            let special = kind != kind::USER_DEFINED;
            let entry = AddedToken::from(token.clone(), special).normalized(false);
            let result =
                if special { tokenizer.add_special_tokens([entry]) } else { tokenizer.add_tokens([entry]) };
            result.map_err(|e| bad("tokens", e.to_string()))?;
        }
    }
    // Added tokens are plain text here, where `tokenizer.json` runs them through its decoder.
    crate::hf::finish(tokenizer, &DecodeRule::byte_level(), prefix, suffix, |id, token| {
        let plain = !matches!(vocab.kind_of(id as usize), kind::NORMAL | kind::UNUSED);
        plain.then(|| token.as_bytes().to_vec())
    })
}

fn split_merge(index: usize, merge: &str) -> Result<(String, String), TokenizerError> {
    // The first character may itself be a space.
    let first = merge.chars().next().map_or(0, char::len_utf8);
    match merge[first..].find(' ').map(|at| merge.split_at(first + at)) {
        Some((left, right)) if right.len() > 1 => Ok((left.to_owned(), right[1..].to_owned())),
        _ => Err(bad("merges", format!("entry {index} is not `left right`"))),
    }
}

fn pre_tokenizer(patterns: &[&str]) -> Result<PreTokenizerWrapper, TokenizerError> {
    let mut steps = Vec::with_capacity(patterns.len() + 1);
    for pattern in patterns {
        let split =
            Split::new(SplitPattern::Regex((*pattern).to_owned()), SplitDelimiterBehavior::Isolated, false)
                .map_err(|e| bad("pre", e.to_string()))?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    let bytes = ByteLevel::new(false, false, false);
    steps.push(PreTokenizerWrapper::ByteLevel(bytes));
    Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
}
