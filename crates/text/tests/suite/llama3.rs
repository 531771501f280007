//! The 47 vectors of llama.cpp for the Llama 3 vocabulary, and the same vocabulary through GGUF.

use std::sync::OnceLock;

use mirai_text::Tokenizer;

use crate::data;

/// Loaded once: the file has 7 MB.
pub(crate) fn tokenizer() -> Option<&'static Tokenizer> {
    static LOADED: OnceLock<Option<Tokenizer>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            let path = data::path("tokenizers/llama3/tokenizer.json")?;
            Some(Tokenizer::from_file(&path).unwrap())
        })
        .as_ref()
}

pub(crate) fn vectors() -> Option<Vec<(String, Vec<u32>)>> {
    let texts = std::fs::read_to_string(data::path("tokenizers/llama3/vectors.inp")?).unwrap();
    let ids = std::fs::read_to_string(data::path("tokenizers/llama3/vectors.out")?).unwrap();
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let ids: Vec<Vec<u32>> =
        ids.split('\n').map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    // The text ends with a separator, so there may be one empty text more.
    let count = ids.len();
    assert_eq!(count, 47);
    assert!(texts.len() == count || texts.len() == count + 1, "{}", texts.len());
    Some(texts.into_iter().map(str::to_owned).zip(ids).collect())
}

#[test]
fn all_47_vectors() {
    let (Some(tokenizer), Some(vectors)) = (tokenizer(), vectors()) else {
        return;
    };
    for (text, ids) in vectors {
        assert_eq!(tokenizer.encode(&text, false, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
}

#[test]
fn special_tokens_in_a_text_are_parsed_only_on_request() {
    let Some(tokenizer) = tokenizer() else { return };
    let text = "a<|eot_id|>b";
    let parsed = tokenizer.encode(text, false, true).unwrap();
    let plain = tokenizer.encode(text, false, false).unwrap();
    assert_eq!(parsed, [64, 128_009, 65]);
    assert!(plain.iter().all(|id| !tokenizer.is_special(*id)), "{plain:?}");
    assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
    assert_eq!(tokenizer.decode(&parsed, true).unwrap(), "ab");
    assert_eq!(tokenizer.decode(&parsed, false).unwrap(), text);
}

#[test]
fn lookups() {
    let Some(tokenizer) = tokenizer() else { return };
    assert_eq!(tokenizer.vocab_size(), 128_256);
    let id = tokenizer.token_to_id("Ġthe").unwrap();
    assert_eq!(tokenizer.token_text(id).as_deref(), Some("Ġthe"));
    assert_eq!(tokenizer.token_bytes(id), Some(&b" the"[..]));
    assert_eq!(tokenizer.token_bytes(128_256), None);
    assert_eq!(tokenizer.token_text(128_256), None);
    assert_eq!(tokenizer.token_to_id("no such token"), None);
    assert!(tokenizer.is_special(128_000) && !tokenizer.is_special(id));
    assert!(!tokenizer.is_special(u32::MAX));
    assert!(format!("{tokenizer:?}").contains("128256"));
}

#[test]
fn bos_and_eos_from_the_configuration() {
    let Some(tokenizer) = tokenizer() else { return };
    assert_eq!(tokenizer.encode("a", true, false).unwrap(), [64]);
    let with = tokenizer.clone().with_default_special(Some(128_000), Some(128_001)).unwrap();
    assert_eq!(with.encode("a", true, false).unwrap(), [128_000, 64, 128_001]);
    assert_eq!(with.encode("a", false, false).unwrap(), [64]);
    // A rule that exists is kept.
    let again = with.with_default_special(Some(64), None).unwrap();
    assert_eq!(again.encode("a", true, false).unwrap(), [128_000, 64, 128_001]);
    assert!(tokenizer.clone().with_default_special(Some(128_256), None).is_err());
}
