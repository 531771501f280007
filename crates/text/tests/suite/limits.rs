//! Long inputs take time and memory in proportion, and the limit is a typed error.

use std::time::{Duration, Instant};

use mirai_text::{DEFAULT_MAX_INPUT_BYTES, Tokenizer, TokenizerError};

use crate::{llama3, spm_gguf};

#[test]
fn the_input_limit_is_exact() {
    let Some((gguf, json)) = spm_gguf::pair() else { return };
    assert_eq!(gguf.max_input_bytes(), DEFAULT_MAX_INPUT_BYTES);
    for tokenizer in [gguf, json] {
        let tokenizer = tokenizer.with_max_input_bytes(10);
        assert!(tokenizer.encode("0123456789", false, false).is_ok());
        assert!(matches!(
            tokenizer.encode("0123456789a", false, false),
            Err(TokenizerError::InputTooLong { bytes: 11, limit: 10 })
        ));
    }
}

/// Quadratic time would be hours here, so the bound may be generous for a busy machine.
fn encode_in_time(tokenizer: &Tokenizer, name: &str, text: &str) {
    let begin = Instant::now();
    let ids = tokenizer.encode(text, false, false).unwrap();
    let took = begin.elapsed();
    println!("{name}: {} bytes, {} ids, {took:?}", text.len(), ids.len());
    assert!(took < Duration::from_secs(30), "{name}: {took:?}");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
}

#[test]
fn a_megabyte_without_spaces_is_not_quadratic() {
    const MB: usize = 1 << 20;
    let texts = [
        ("a", "a".repeat(MB)),
        ("spaces", " ".repeat(MB)),
        ("spaces and a word", " ".repeat(MB) + "x"),
        ("new lines", "\n".repeat(MB)),
        ("ab", "ab".repeat(MB / 2)),
        ("digits", "7".repeat(MB)),
        ("punctuation", "!?".repeat(MB / 2)),
        ("emoji", "🦙".repeat(MB / 4)),
        ("special names", "<|eot_id|>".repeat(MB / 10)),
    ];
    if let Some(tokenizer) = llama3::tokenizer() {
        for (name, text) in &texts {
            encode_in_time(tokenizer, &format!("llama3 {name}"), text);
        }
    }
    if let Some((gguf, json)) = spm_gguf::pair() {
        for (name, text) in &texts {
            encode_in_time(&gguf, &format!("spm {name}"), text);
            encode_in_time(&json, &format!("spm json {name}"), text);
        }
    }
}
