//! The incremental detokenizer against decoding the whole.

use mirai_text::{Detokenizer, GgufVocab, TokenId, Tokenizer, TokenizerError};
use proptest::prelude::*;

use crate::{llama3, spm_gguf};

/// Decodes `ids[prompt..]` one by one, checking what each step returns.
fn incremental(tokenizer: &Tokenizer, ids: &[TokenId], prompt: usize, skip: bool) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer, &ids[..prompt], skip).unwrap();
    let mut text = String::new();
    for id in &ids[prompt..] {
        text.push_str(detokenizer.push(*id).unwrap());
    }
    text.push_str(&detokenizer.finish());
    assert_eq!(detokenizer.finish(), "");
    text
}

/// `decode(ids)` without what it has in common with `decode(prompt)`. Only the U+FFFD of a
/// character that the prompt leaves unfinished may differ between the two.
fn expected(tokenizer: &Tokenizer, ids: &[TokenId], prompt: usize, skip: bool) -> String {
    let whole = tokenizer.decode(ids, skip).unwrap();
    let before = tokenizer.decode(&ids[..prompt], skip).unwrap();
    if let Some(rest) = whole.strip_prefix(before.as_str()) {
        return rest.to_owned();
    }
    let before = before.strip_suffix('\u{FFFD}').unwrap();
    whole.strip_prefix(before).unwrap().to_owned()
}

pub(crate) fn check(tokenizer: &Tokenizer, ids: &[TokenId], prompt: usize) {
    for skip in [false, true] {
        assert_eq!(
            incremental(tokenizer, ids, prompt, skip),
            expected(tokenizer, ids, prompt, skip),
            "{ids:?} after {prompt}"
        );
    }
}

/// Ids of which many are single bytes of multi-byte characters, many special, many spaces.
fn ids(size: u32, bytes: Vec<TokenId>, special: Vec<TokenId>) -> impl Strategy<Value = Vec<TokenId>> {
    let id = prop_oneof![
        2 => 0..size,
        3 => proptest::sample::select(bytes),
        1 => proptest::sample::select(special),
    ];
    proptest::collection::vec(id, 0..40)
}

/// Tokens for single bytes: lead and continuation bytes of real characters above all.
fn byte_ids(tokenizer: &Tokenizer) -> Vec<TokenId> {
    let size = TokenId::try_from(tokenizer.vocab_size()).unwrap();
    let single = |id: &TokenId| {
        let bytes = tokenizer.token_bytes(*id);
        bytes.is_some_and(|b| b.len() <= 3 && std::str::from_utf8(b).is_err() || b == b" ")
    };
    (0..size).filter(single).collect()
}

fn property(tokenizer: &Tokenizer, special: Vec<TokenId>) {
    let size = TokenId::try_from(tokenizer.vocab_size()).unwrap();
    let strategy = ids(size, byte_ids(tokenizer), special);
    let config = ProptestConfig::with_cases(1_500);
    proptest!(config, |(ids in strategy, at in 0.0..1.0)| {
        let prompt = (ids.len() as f64 * at) as usize;
        check(tokenizer, &ids, 0);
        // The oracle cannot tell a character of the text from the prompt's own U+FFFD.
        let shows_fffd = ids.iter().any(|id| tokenizer.token_bytes(*id).unwrap()
            .windows(3).any(|w| w == "\u{FFFD}".as_bytes()));
        if !shows_fffd {
            check(tokenizer, &ids, prompt);
        }
    });
}

#[test]
fn byte_level_bpe() {
    let Some(tokenizer) = llama3::tokenizer() else { return };
    property(tokenizer, vec![128_000, 128_001, 128_009]);
}

#[test]
fn sentence_piece_from_json_and_gguf() {
    let Some((gguf, json)) = spm_gguf::pair() else { return };
    property(&json, vec![0, 1, 2]);
    property(&gguf, vec![0, 1, 2]);
}

#[test]
fn metaspace_and_plain_word_decoders() {
    for (decoder, text) in [
        (r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"always"}"#, "ab a"),
        (r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"never"}"#, " ab a"),
        ("null", "▁ab ▁a"),
    ] {
        let json = format!(
            r#"{{"version":"1.0","added_tokens":[{{"id":3,"content":"<s>","single_word":false,
                "lstrip":false,"rstrip":false,"normalized":false,"special":true}}],
                "normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":{decoder},
                "model":{{"type":"WordLevel","vocab":{{"▁ab":0,"▁a":1,"é":2}},"unk_token":"é"}}}}"#
        );
        let tokenizer = Tokenizer::from_json_bytes(json.as_bytes()).unwrap();
        assert_eq!(tokenizer.decode(&[3, 0, 1], true).unwrap(), text);
        for prompt in 0..5 {
            check(&tokenizer, &[3, 0, 1, 2, 0], prompt);
        }
    }
}

#[test]
fn whole_texts_agree_with_the_reference_decoder() {
    let Some(path) = crate::data::path("models/stories260K/hf/tokenizer.json") else { return };
    let reference = tokenizers::Tokenizer::from_file(&path).unwrap();
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    for text in ["Hello  world", " élan 🦙\n", "", "日本語"] {
        let encoded = reference.encode(text, true).unwrap();
        let ids = encoded.get_ids();
        assert_eq!(tokenizer.encode(text, true, true).unwrap(), ids);
        for skip in [false, true] {
            assert_eq!(tokenizer.decode(ids, skip).unwrap(), reference.decode(ids, skip).unwrap());
        }
    }
}

#[test]
fn an_unknown_id_is_an_error_and_changes_nothing() {
    let tokenizer = Tokenizer::from_gguf_vocab(GgufVocab {
        model: "llama".to_owned(),
        tokens: vec!["<0xC3>".to_owned(), "<0xA9>".to_owned(), "▁a".to_owned()],
        scores: Some(vec![0.0; 3]),
        token_types: Some(vec![6, 6, 1]),
        ..GgufVocab::default()
    })
    .unwrap();
    let mut detokenizer = Detokenizer::new(&tokenizer, &[2], true).unwrap();
    assert_eq!(detokenizer.push(0).unwrap(), "");
    assert!(matches!(detokenizer.push(3), Err(TokenizerError::UnknownId { id: 3, vocab_size: 3 })));
    assert_eq!(detokenizer.push(1).unwrap(), "é");
    assert!(Detokenizer::new(&tokenizer, &[9], true).is_err());
    assert!(tokenizer.decode(&[u32::MAX], true).is_err());
}
