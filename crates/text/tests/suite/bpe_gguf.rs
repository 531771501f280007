//! Byte-level BPE vocabularies of GGUF files. The data folder has none, so the Llama 3
//! `tokenizer.json` is rewritten as llama.cpp's converter would.

use mirai_text::{GgufVocab, KNOWN_PRE_TOKENIZERS, Tokenizer, TokenizerError};
use serde_json::Value;

use crate::{data, llama3};

fn llama3_as_gguf() -> Option<GgufVocab> {
    let path = data::path("tokenizers/llama3/tokenizer.json")?;
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); 128_256];
    let mut types = vec![1; 128_256];
    for (token, id) in vocab {
        tokens[usize::try_from(id.as_u64().unwrap()).unwrap()] = token.clone();
    }
    for added in json["added_tokens"].as_array().unwrap() {
        let id = usize::try_from(added["id"].as_u64().unwrap()).unwrap();
        tokens[id] = added["content"].as_str().unwrap().to_owned();
        types[id] = 3;
    }
    let merges = json["model"]["merges"].as_array().unwrap();
    let merge = |m: &Value| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap());
    Some(GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some("llama-bpe".to_owned()),
        tokens,
        token_types: Some(types),
        merges: Some(merges.iter().map(merge).collect()),
        bos_id: Some(128_000),
        eos_id: Some(128_001),
        ..GgufVocab::default()
    })
}

#[test]
fn llama3_through_gguf_passes_the_vectors() {
    let (Some(vocab), Some(vectors)) = (llama3_as_gguf(), llama3::vectors()) else {
        return;
    };
    let gguf = Tokenizer::from_gguf_vocab(vocab).unwrap();
    let json = llama3::tokenizer().unwrap();
    for (text, ids) in vectors {
        assert_eq!(gguf.encode(&text, false, false).unwrap(), ids, "{text:?}");
        let mut with_bos = vec![128_000];
        with_bos.extend(&ids);
        assert_eq!(gguf.encode(&text, true, false).unwrap(), with_bos);
        assert_eq!(gguf.decode(&ids, true).unwrap(), text);
    }
    for id in 0..128_256 {
        assert_eq!(gguf.token_bytes(id), json.token_bytes(id), "id {id}");
        assert_eq!(gguf.is_special(id), json.is_special(id), "id {id}");
    }
    assert_eq!(gguf.encode("a<|eot_id|>", false, true).unwrap(), [64, 128_009]);
}

/// The 256 byte tokens, in GPT-2's alphabet, and a few more.
fn small(pre: Option<&str>) -> GgufVocab {
    let printable = |b: &u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut shifted = 0x100;
    let mut tokens: Vec<String> = (0u32..256)
        .map(|b| {
            let code = if printable(&b) {
                b
            } else {
                shifted += 1;
                shifted - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect();
    let mut types = vec![1; 256];
    for (token, kind) in [("12", 1), ("Ġa", 1), ("<é>", 4), ("<end>", 3), ("Ã©", 1)] {
        tokens.push(token.to_owned());
        types.push(kind);
    }
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: pre.map(str::to_owned),
        tokens,
        token_types: Some(types),
        merges: Some(vec!["1 2".to_owned(), "Ġ a".to_owned(), "Ã ©".to_owned()]),
        eos_id: Some(259),
        ..GgufVocab::default()
    }
}

#[test]
fn every_known_pre_tokenizer_encodes_and_decodes() {
    for pre in KNOWN_PRE_TOKENIZERS.iter().map(|p| Some(*p)).chain([None]) {
        let tokenizer = Tokenizer::from_gguf_vocab(small(pre)).unwrap();
        for text in ["", " a 12 it's été — 日本\n\n  x\t<end>", "  \n a", "l'État ABCdef 1234567"] {
            let ids = tokenizer.encode(text, false, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{pre:?}");
        }
    }
}

#[test]
fn digits_are_cut_as_the_name_says() {
    let ids = |pre| {
        let tokenizer = Tokenizer::from_gguf_vocab(small(Some(pre))).unwrap();
        tokenizer.encode("12", false, false).unwrap().len()
    };
    assert_eq!((ids("gpt-2"), ids("llama-bpe")), (1, 1));
    assert_eq!((ids("qwen2"), ids("smollm"), ids("tekken")), (2, 2, 2));
}

#[test]
fn qwen_composes_characters_first() {
    let tokenizer = |pre| Tokenizer::from_gguf_vocab(small(Some(pre))).unwrap();
    assert_eq!(tokenizer("qwen2").encode("e\u{301}", false, false).unwrap(), [260]);
    assert_eq!(tokenizer("gpt-2").encode("e\u{301}", false, false).unwrap().len(), 3);
}

#[test]
fn user_defined_tokens_are_always_cut_and_are_plain_text() {
    let tokenizer = Tokenizer::from_gguf_vocab(small(Some("gpt-2"))).unwrap();
    assert_eq!(tokenizer.encode("<é><end>", false, true).unwrap(), [258, 259]);
    let plain = tokenizer.encode("<é><end>", false, false).unwrap();
    assert_eq!((plain[0], plain.len()), (258, 6));
    assert_eq!(tokenizer.decode(&[258, 259], true).unwrap(), "<é>");
    assert_eq!(tokenizer.token_bytes(258), Some("<é>".as_bytes()));
}

#[test]
fn bad_merges_and_names_are_errors() {
    for merges in [vec!["12"], vec!["1 "], vec![""], vec!["1 zz"], vec![" 12"]] {
        let merges = Some(merges.into_iter().map(str::to_owned).collect());
        let vocab = GgufVocab { merges, ..small(None) };
        let error = Tokenizer::from_gguf_vocab(vocab).unwrap_err();
        assert!(matches!(error, TokenizerError::Gguf { field: "merges", .. }), "{error}");
    }
    assert!(matches!(
        Tokenizer::from_gguf_vocab(small(Some("nope"))),
        Err(TokenizerError::UnknownPreTokenizer { .. })
    ));
}
