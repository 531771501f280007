//! Access to `../shared/data`, and a reader of GGUF metadata that is just enough for vocabularies.

use std::collections::HashMap;
use std::path::PathBuf;

use mirai_text::GgufVocab;

/// A path below the data folder, or `None` (after one clear word) where the folder is missing.
pub(crate) fn path(relative: &str) -> Option<PathBuf> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data");
    let path = PathBuf::from(root).join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no {relative} in the data folder");
    None
}

/// A GGUF metadata value of a kind that vocabularies use.
#[derive(Debug, Clone)]
enum Meta {
    Number(f64),
    Bool(bool),
    Text(String),
    List(Vec<Meta>),
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk::<N>().unwrap();
        self.0 = rest;
        *head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> usize {
        usize::try_from(u64::from_le_bytes(self.take())).unwrap()
    }

    fn text(&mut self) -> String {
        let len = self.u64();
        let (text, rest) = self.0.split_at(len);
        self.0 = rest;
        String::from_utf8(text.to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Meta {
        match kind {
            0 => Meta::Number(f64::from(self.take::<1>()[0])),
            4 => Meta::Number(f64::from(self.u32())),
            5 => Meta::Number(f64::from(i32::from_le_bytes(self.take()))),
            6 => Meta::Number(f64::from(f32::from_le_bytes(self.take()))),
            7 => Meta::Bool(self.take::<1>()[0] != 0),
            8 => Meta::Text(self.text()),
            9 => {
                let kind = self.u32();
                let count = self.u64();
                Meta::List((0..count).map(|_| self.value(kind)).collect())
            }
            other => panic!("GGUF value kind {other}"),
        }
    }
}

/// The vocabulary of a GGUF file.
pub(crate) fn gguf_vocab(path: &std::path::Path) -> GgufVocab {
    let bytes = std::fs::read(path).unwrap();
    let mut reader = Reader(&bytes);
    assert_eq!(&reader.take::<4>(), b"GGUF");
    assert_eq!(reader.u32(), 3);
    let _tensors = reader.u64();
    let count = reader.u64();
    let meta: HashMap<String, Meta> = (0..count)
        .map(|_| {
            let key = reader.text();
            let kind = reader.u32();
            (key, reader.value(kind))
        })
        .collect();
    let get = |key: &'static str| meta.get(&format!("tokenizer.ggml.{key}")).cloned();
    let text = |key| match get(key) {
        Some(Meta::Text(text)) => Some(text),
        _ => None,
    };
    let flag = |key| match get(key) {
        Some(Meta::Bool(flag)) => Some(flag),
        _ => None,
    };
    let number = |key| match get(key) {
        Some(Meta::Number(number)) => Some(number as u32),
        _ => None,
    };
    let list = |key| match get(key) {
        Some(Meta::List(list)) => Some(list),
        _ => None,
    };
    let texts = |key| {
        list(key).map(|list| {
            let text = |m: Meta| match m {
                Meta::Text(text) => text,
                other => panic!("{other:?}"),
            };
            list.into_iter().map(text).collect::<Vec<String>>()
        })
    };
    let numbers = |key| {
        list(key).map(|list| {
            let number = |m: Meta| match m {
                Meta::Number(number) => number,
                other => panic!("{other:?}"),
            };
            list.into_iter().map(number).collect::<Vec<f64>>()
        })
    };
    GgufVocab {
        model: text("model").unwrap(),
        pre: text("pre"),
        tokens: texts("tokens").unwrap(),
        scores: numbers("scores").map(|s| s.into_iter().map(|n| n as f32).collect()),
        token_types: numbers("token_type").map(|s| s.into_iter().map(|n| n as i32).collect()),
        merges: texts("merges"),
        bos_id: number("bos_token_id"),
        eos_id: number("eos_token_id"),
        unk_id: number("unknown_token_id"),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
    }
}
