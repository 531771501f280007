//! SentencePiece vocabularies of GGUF files, against the same model's `tokenizer.json`.

use mirai_text::{GgufVocab, Tokenizer, TokenizerError};
use proptest::prelude::*;

use crate::data;

pub(crate) fn pair() -> Option<(Tokenizer, Tokenizer)> {
    let gguf = data::path("models/stories260K/gguf/stories260K-F16.gguf")?;
    let json = data::path("models/stories260K/hf/tokenizer.json")?;
    Some((Tokenizer::from_gguf_vocab(data::gguf_vocab(&gguf)).unwrap(), Tokenizer::from_file(&json).unwrap()))
}

#[test]
fn gguf_and_tokenizer_json_agree() {
    let Some((gguf, json)) = pair() else { return };
    let texts = [
        "",
        " ",
        "  ",
        "Hello",
        " Hello  world ",
        "Once upon a time, there was a little girl.\n",
        "élan 🦙 ▁ ▁▁",
        "<s> is a token",
        "tab\tnew\r\nline",
        "<0x41>",
        "aaaaaaaaaaaaaaaaaaaa",
        "日本語 and Ünïcödé",
        "\u{0}\u{7f}",
    ];
    for text in texts {
        for special in [false, true] {
            let ids = json.encode(text, special, special).unwrap();
            assert_eq!(gguf.encode(text, special, special).unwrap(), ids, "{text:?}");
            assert_eq!(gguf.decode(&ids, special).unwrap(), json.decode(&ids, special).unwrap());
        }
    }
    for id in 0..512 {
        assert_eq!(gguf.token_bytes(id), json.token_bytes(id), "id {id}");
        assert_eq!(gguf.token_text(id), json.token_text(id));
        assert_eq!(gguf.is_special(id), json.is_special(id));
        let text = json.token_text(id).unwrap();
        assert_eq!(gguf.token_to_id(&text), json.token_to_id(&text));
    }
    assert_eq!(gguf.vocab_size(), json.vocab_size());
}

#[test]
fn random_texts_agree_and_come_back() {
    let Some((gguf, json)) = pair() else { return };
    let config = ProptestConfig::with_cases(400);
    proptest!(config, |(text in "[a-z ,.\n\u{e9}\u{2581}]{0,60}|\\PC{0,20}|<s>[a-z ]{0,5}</s>[a-z ]*")| {
        for parse in [false, true] {
            let ids = json.encode(&text, false, parse).unwrap();
            prop_assert_eq!(gguf.encode(&text, false, parse).unwrap(), ids);
        }
        let ids = gguf.encode(&text, false, false).unwrap();
        // The escape character itself comes back as a space.
        prop_assert_eq!(gguf.decode(&ids, true).unwrap(), text.replace('▁', " "));
    });
}

#[test]
fn every_gguf_of_the_data_folder_loads() {
    for file in [
        "stories260K/gguf/stories260K-F32.gguf",
        "stories260K/gguf/stories260K-Q4_0.gguf",
        "stories260K/gguf/stories260K-Q8_0.gguf",
        "rand256/rand256-F16.gguf",
        "rand256/rand256-Q4_K_M.gguf",
    ] {
        let Some(path) = data::path(&format!("models/{file}")) else { return };
        let vocab = data::gguf_vocab(&path);
        let size = vocab.tokens.len();
        let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
        assert_eq!(tokenizer.vocab_size(), size);
        let ids = tokenizer.encode("Tim and Lily", true, true).unwrap();
        assert_eq!(ids[0], 1);
        // A vocabulary without byte tokens has one unknown token for a run of unknown characters.
        assert!(!tokenizer.encode("\u{1F999}\u{1F999}", false, false).unwrap().is_empty());
    }
}

fn small() -> GgufVocab {
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "abab", "<user>", "ba", "bab"];
    GgufVocab {
        model: "llama".to_owned(),
        tokens: tokens.iter().map(|t| (*t).to_owned()).collect(),
        scores: Some(vec![0., 0., 0., -1., -2., -3., -4., -5., 0., -6., -9.]),
        token_types: Some(vec![2, 3, 3, 1, 1, 1, 5, 1, 4, 5, 1]),
        bos_id: Some(1),
        eos_id: Some(2),
        unk_id: Some(0),
        add_eos: Some(true),
        ..GgufVocab::default()
    }
}

#[test]
fn unused_pieces_are_taken_apart_and_user_defined_ones_always_cut() {
    let tokenizer = Tokenizer::from_gguf_vocab(small()).unwrap();
    // `ab` is only a step towards `abab`.
    assert_eq!(tokenizer.encode("ab", false, false).unwrap(), [3, 4, 5]);
    assert_eq!(tokenizer.encode("abab", false, false).unwrap(), [3, 7]);
    assert_eq!(tokenizer.encode("a<user>b", true, false).unwrap(), [1, 3, 4, 8, 3, 5, 2]);
    // Runs of unknown characters are one token.
    assert_eq!(tokenizer.encode("xyz<s>a", false, false).unwrap(), [3, 0, 4]);
    assert_eq!(tokenizer.encode("x<s>a", false, true).unwrap(), [3, 0, 1, 3, 4]);
}

#[test]
fn without_prefix_space_the_text_is_taken_as_it_is() {
    let vocab = GgufVocab { add_space_prefix: Some(false), add_bos: Some(false), ..small() };
    let tokenizer = Tokenizer::from_gguf_vocab(vocab).unwrap();
    assert_eq!(tokenizer.encode("a b", true, false).unwrap(), [4, 3, 5, 2]);
    assert_eq!(tokenizer.decode(&[3, 4], false).unwrap(), " a");
}

#[test]
fn contradictions_name_their_field() {
    let cases: Vec<(&str, GgufVocab)> = vec![
        ("model", GgufVocab { model: "bert".to_owned(), ..small() }),
        ("tokens", GgufVocab { tokens: Vec::new(), ..small() }),
        ("scores", GgufVocab { scores: None, ..small() }),
        ("scores", GgufVocab { scores: Some(vec![0.0; 3]), ..small() }),
        ("scores", GgufVocab { scores: Some(vec![f32::NAN; 11]), ..small() }),
        ("token_type", GgufVocab { token_types: Some(vec![1]), ..small() }),
        ("token_type", GgufVocab { token_types: Some(vec![9; 11]), ..small() }),
        ("tokens", GgufVocab { token_types: Some(vec![6; 11]), ..small() }),
        ("bos_token_id", GgufVocab { bos_id: Some(11), ..small() }),
        ("eos_token_id", GgufVocab { eos_id: Some(u32::MAX), ..small() }),
        ("unknown_token_id", GgufVocab { unk_id: Some(99), ..small() }),
        ("bos_token_id", GgufVocab { bos_id: None, add_bos: Some(true), ..small() }),
        ("merges", GgufVocab { model: "gpt2".to_owned(), ..small() }),
    ];
    for (wanted, vocab) in cases {
        match Tokenizer::from_gguf_vocab(vocab) {
            Err(TokenizerError::Gguf { field, .. }) => assert_eq!(field, wanted),
            other => panic!("{wanted}: {other:?}"),
        }
    }
    let no_unknown = GgufVocab { unk_id: None, token_types: None, ..small() };
    let tokenizer = Tokenizer::from_gguf_vocab(no_unknown).unwrap();
    assert!(matches!(tokenizer.encode("x", false, false), Err(TokenizerError::Encode(_))));
}
