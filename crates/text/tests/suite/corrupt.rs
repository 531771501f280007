//! Broken tokenizer files end in typed errors.

use mirai_text::{Tokenizer, TokenizerError};
use proptest::prelude::*;

use crate::data;

fn small() -> Option<String> {
    let path = data::path("models/stories260K/hf/tokenizer.json")?;
    Some(std::fs::read_to_string(path).unwrap())
}

fn load(text: &str) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_json_bytes(text.as_bytes())
}

#[test]
fn named_corruptions() {
    let Some(good) = small() else { return };
    load(&good).unwrap();
    let change = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replace(from, to)
    };
    let bad = [
        String::new(),
        "{".to_owned(),
        "[]".to_owned(),
        r#"{"decoder":[}}}"#.to_owned(),
        "{}".to_owned(),
        good[..good.len() / 2].to_owned(),
        change("\"merges\"", "\"merged\""),
        change("\"vocab\"", "\"vocabulary\""),
        change("\"type\": \"BPE\"", "\"type\": \"Magic\""),
        change("\"<0x00>\": 3", "\"<0x00>\": 4294967295"),
        change("\"<0x00>\": 3", "\"<0x00>\": -3"),
        change("\"ByteFallback\"", "\"WordPiece\""),
        change("\"TemplateProcessing\"", "\"Nothing\""),
        change("\"ids\": [1]", "\"ids\": [1, 2]"),
        change("\"unk_token\": \"<unk>\"", "\"unk_token\": \"<missing>\"").replace("<unk>", "<u>"),
    ];
    for text in bad {
        // Some are accepted by the format; then they must work.
        match load(&text) {
            Ok(tokenizer) => drop(tokenizer.encode("Hello é 🦙", true, true)),
            Err(error) => assert!(
                matches!(error, TokenizerError::Invalid { .. } | TokenizerError::Unsupported { .. }),
                "{error}"
            ),
        }
    }
    assert!(load("{}").is_err() && load(&good[..good.len() / 2]).is_err());
    let huge_id = change("\"<0x00>\": 3", "\"<0x00>\": 4294967295");
    assert!(load(&huge_id).unwrap_err().to_string().contains("vocabulary"));
    // What every text would begin with is no token: found when it is loaded, not when a text is decoded.
    let no_token = change("\"ids\": [1]", "\"ids\": [600]");
    assert!(matches!(load(&no_token), Err(TokenizerError::UnknownId { id: 600, .. })));
}

#[test]
fn too_many_added_tokens() {
    let tokens = vec!["{}"; (1 << 16) + 1].join(",");
    let error = load(&format!("{{\"added_tokens\":[{tokens}]}}")).unwrap_err();
    assert!(error.to_string().contains("65537"), "{error}");
}

#[test]
fn a_text_that_the_post_processor_doubles_is_refused() {
    let Some(good) = small() else { return };
    let doubled = good.replace(
        r#"{"Sequence": {"id": "A", "type_id": 0}}], "pair""#,
        r#"{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair""#,
    );
    assert_ne!(good, doubled);
    assert!(matches!(load(&doubled), Err(TokenizerError::Unsupported { component: "post_processor", .. })));
}

#[test]
fn dropout_is_a_matter_of_training() {
    let Some(good) = small() else { return };
    let tokenizer = load(&good.replace("\"dropout\": null", "\"dropout\": 0.9")).unwrap();
    let reference = load(&good).unwrap();
    let text = "Once upon a time there was a little girl";
    for _ in 0..20 {
        assert_eq!(
            tokenizer.encode(text, false, false).unwrap(),
            reference.encode(text, false, false).unwrap()
        );
    }
}

#[test]
fn missing_files_name_their_path() {
    let error = Tokenizer::from_file(std::path::Path::new("no/such/tokenizer.json")).unwrap_err();
    assert!(error.to_string().contains("no/such/tokenizer.json"));
}

#[test]
fn random_damage_never_panics() {
    let Some(good) = small() else { return };
    let config = ProptestConfig::with_cases(150);
    proptest!(config, |(at in 0.0..1.0, len in 0usize..40, with in "[ -~]{0,8}|null|\\]|\\}|-1|1e99")| {
        let begin = (good.len() as f64 * at) as usize;
        let floor = |mut i: usize| { while !good.is_char_boundary(i) { i -= 1; } i };
        let (begin, end) = (floor(begin), floor((begin + len).min(good.len())));
        let text = [&good[..begin], &with, &good[end.max(begin)..]].concat();
        if let Ok(tokenizer) = load(&text)
            && let Ok(ids) = tokenizer.encode("Hello é 🦙", true, true)
        {
            tokenizer.decode(&ids, false).unwrap();
        }
    });
}
