//! SentencePiece models as `tokenizer.json` has them: Unigram with and without byte fallback, and the decoders of
//! XLM-R, Gemma and Mistral.
//!
//! Whole decoding is held to the `tokenizers` crate, incremental decoding to whole decoding.

use std::sync::LazyLock;

use mirai_text::{TokenId, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::detokenizer::check;

const PIECES: &[&str] = &[
    "▁", "▁the", "▁a", "a", "b", "é", "▁▁", "▁日", "本", "the", "▁a▁b", "x", "▁x", "🦙", "\n", "t", "h", "e",
];

/// A Unigram file. Its ids: `<s>`, `</s>`, `<unk>`, the 256 bytes if there are any, the pieces.
fn file(bytes: bool, normalizer: &Value, pre_tokenizer: &Value, decoder: &Value) -> Value {
    let mut vocab = vec![json!(["<s>", 0.0]), json!(["</s>", 0.0]), json!(["<unk>", 0.0])];
    if bytes {
        vocab.extend((0..=255u8).map(|byte| json!([format!("<0x{byte:02X}>"), 0.0])));
    }
    for (i, piece) in PIECES.iter().enumerate() {
        vocab.push(json!([piece, -2.0 - i as f64 / 7.0 - 1.0 / piece.chars().count() as f64]));
    }
    let special = |id: usize, name: &str| {
        json!({"id": id, "content": name, "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<unk>")],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder,
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": bytes, "vocab": vocab},
    })
}

fn replace() -> Value {
    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})
}

/// XLM-R (bge-m3 and its reranker).
fn xlm_r() -> Value {
    let space = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    file(false, &Value::Null, &space, &space)
}

/// Gemma: spaces become pieces, nothing is put before a text, nothing is taken from it.
fn gemma() -> Value {
    let normalizer = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let decoder =
        json!({"type": "Sequence", "decoders": [replace(), {"type": "ByteFallback"}, {"type": "Fuse"}]});
    file(true, &normalizer, &Value::Null, &decoder)
}

/// Mistral v1 to v3 and Llama 2: a space before each text, which decoding takes away again.
fn mistral() -> Value {
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    let decoder = json!({"type": "Sequence", "decoders": [replace(), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    file(true, &normalizer, &Value::Null, &decoder)
}

fn both(file: &Value) -> (Tokenizer, tokenizers::Tokenizer) {
    let bytes = file.to_string().into_bytes();
    (Tokenizer::from_json_bytes(&bytes).unwrap(), tokenizers::Tokenizer::from_bytes(&bytes).unwrap())
}

#[test]
fn texts_come_back_from_all_three_kinds() {
    for (name, file, bytes) in
        [("xlm-r", xlm_r(), false), ("gemma", gemma(), true), ("mistral", mistral(), true)]
    {
        let (tokenizer, reference) = both(&file);
        for text in ["the a b", "the  the", "é日本 x", "ab\nth", "the 🦙 ß→", " the"] {
            let ids = tokenizer.encode(text, false, false).unwrap();
            assert_eq!(ids, reference.encode(text, false).unwrap().get_ids(), "{name}: {text:?}");
            assert_eq!(
                tokenizer.decode(&ids, true).unwrap(),
                reference.decode(&ids, true).unwrap(),
                "{name}"
            );
            if bytes {
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{name}: nothing is unknown");
            }
            for prompt in 0..=ids.len() {
                check(&tokenizer, &ids, prompt);
            }
        }
    }
}

#[test]
fn a_character_that_no_piece_has_is_its_bytes_or_unknown() {
    let (gemma, _) = both(&gemma());
    let ids = gemma.encode("ß", false, false).unwrap();
    assert_eq!(ids, [3 + 0xC3, 3 + 0x9F]);
    assert_eq!(gemma.token_bytes(ids[0]), Some(&[0xC3][..]));
    let (xlm, _) = both(&xlm_r());
    let ids = xlm.encode("ßß", false, false).unwrap();
    assert_eq!(ids.last(), Some(&2));
    assert!(xlm.is_special(2), "and what is unknown is not shown");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    /// Any ids at all, half characters and special tokens in between included.
    #[test]
    fn streams_equal_the_whole(
        picks in proptest::collection::vec(0usize..1000, 0..24), at in 0.0..1.0f64, kind in 0usize..3,
    ) {
        static ALL: LazyLock<[Tokenizer; 3]> = LazyLock::new(|| [xlm_r(), gemma(), mistral()].map(|f| both(&f).0));
        let tokenizer = &ALL[kind];
        let size = tokenizer.vocab_size();
        let lead = |byte: usize| if kind == 0 { byte % size } else { 3 + byte };
        let ids: Vec<TokenId> = picks
            .iter()
            .map(|pick| match pick % 4 {
                0 => lead(0xC0 + pick % 64),
                1 => lead(0x80 + pick % 64),
                2 => pick % 3,
                _ => size - 1 - pick % PIECES.len(),
            } as TokenId)
            .collect();
        check(tokenizer, &ids, 0);
        check(tokenizer, &ids, (ids.len() as f64 * at) as usize);
    }
}
