//! `tekken.json`, built here and compared with a naive reading of its rules; and files that lie.

use std::sync::LazyLock;

use mirai_text::{Detokenizer, TokenId, Tokenizer, TokenizerError, tekken_special_tokens};
use proptest::prelude::*;
use serde_json::{Value, json};

const PATTERN: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SPECIAL: usize = 12;

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0u32, |bits, i| bits << 8 | u32::from(group.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let c = char::from(ALPHABET[(bits >> (18 - 6 * i) & 63) as usize]);
            out.push(if i <= group.len() { c } else { '=' });
        }
    }
    out
}

/// Entries beyond the bytes, in the order of rank. Several are made of the same pieces in different ways, and one
/// (`aaa`) by two overlapping merges.
const MERGES: &[&str] = &[
    "aa", "ab", "ba", "aaa", "bb", "abab", " a", " ab", "é", " é", "th", "the", " the", "hello", "🦙", "  ",
    "\n\n", "abba", "ca", "cab",
];

fn entries() -> Vec<Vec<u8>> {
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    bytes.chain(MERGES.iter().map(|text| text.as_bytes().to_vec())).collect()
}

fn file() -> Value {
    let entry = |(rank, bytes): (usize, &Vec<u8>)| json!({"rank": rank, "token_bytes": base64(bytes), "token_str": String::from_utf8(bytes.clone()).ok()});
    let vocab: Vec<Value> = entries().iter().enumerate().map(entry).collect();
    let special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[THINK]", "[/THINK]"];
    let special = special.iter().enumerate();
    let special: Vec<Value> =
        special.map(|(rank, name)| json!({"rank": rank, "token_str": name, "is_control": true})).collect();
    json!({
        "config": {"pattern": PATTERN, "num_vocab_tokens": vocab.len(), "default_vocab_size": SPECIAL + vocab.len(),
                   "default_num_special_tokens": SPECIAL, "version": "v13"},
        "vocab": vocab, "special_tokens": special, "image": {"image_patch_size": 14},
    })
}

fn load(file: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_tekken_bytes(file.to_string().as_bytes())
}

pub(crate) fn tokenizer() -> Tokenizer {
    static ONCE: LazyLock<Tokenizer> = LazyLock::new(|| load(&file()).unwrap());
    ONCE.clone()
}

/// The definition, read off: merge the lowest rank, the leftmost of equals, until nothing merges.
fn naive(piece: &[u8], entries: &[Vec<u8>]) -> Vec<usize> {
    let rank = |bytes: &[u8]| entries.iter().position(|entry| entry == bytes);
    if let Some(rank) = rank(piece) {
        return vec![rank];
    }
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|byte| vec![*byte]).collect();
    loop {
        let merged = |i: usize| rank(&[&parts[i][..], &parts[i + 1]].concat()).map(|rank| (rank, i));
        let Some((_, at)) = (0..parts.len().saturating_sub(1)).filter_map(merged).min() else { break };
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
    parts.iter().map(|part| rank(part).unwrap()).collect()
}

/// Pieces of a text of letters, spaces and line feeds, by the pattern's rules for these.
fn pieces(text: &str) -> Vec<&str> {
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    let at = |i: usize| chars.get(i).map_or(text.len(), |c| c.0);
    let letter = |i: usize| chars.get(i).is_some_and(|c| c.1.is_alphabetic());
    let mut out = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let mut end = i;
        if letter(i) || (chars[i].1 == ' ' && letter(i + 1)) {
            end += 1;
            while letter(end) {
                end += 1;
            }
        } else {
            while chars.get(end).is_some_and(|c| c.1.is_whitespace()) {
                end += 1;
            }
            let last_line = (i..end).rev().find(|j| chars[*j].1 == '\n');
            match last_line {
                Some(line) => end = line + 1,
                // The last space before a word belongs to the word.
                None if end < chars.len() && end > i + 1 => end -= 1,
                None => {}
            }
        }
        out.push(&text[at(i)..at(end)]);
        i = end;
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]
    #[test]
    fn encodes_as_the_naive_reading_does(text in "[abcthelo é\n]{0,40}") {
        let tokenizer = tokenizer();
        let entries = entries();
        let expected: Vec<TokenId> = pieces(&text)
            .iter()
            .flat_map(|piece| naive(piece.as_bytes(), &entries))
            .map(|rank| TokenId::try_from(rank + SPECIAL).unwrap())
            .collect();
        prop_assert_eq!(&tokenizer.encode(&text, false, false).unwrap(), &expected);
        prop_assert_eq!(tokenizer.decode(&expected, true).unwrap(), text);
    }

    #[test]
    fn every_text_survives_and_streams(text in "\\PC{0,30}", cut in 0usize..30) {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode(&text, true, false).unwrap();
        prop_assert_eq!(ids[0], 1);
        prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text.clone());
        let cut = cut.min(ids.len());
        let mut stream = Detokenizer::new(&tokenizer, &ids[..cut], true).unwrap();
        let mut rest = String::new();
        for id in &ids[cut..] {
            rest.push_str(stream.push(*id).unwrap());
        }
        rest.push_str(&stream.finish());
        prop_assert!(text.ends_with(&rest) && rest.chars().count() <= text.chars().count());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn random_damage_never_panics(at in 0.0..1.0f64, byte: u8, cut: bool) {
        static ONCE: LazyLock<Vec<u8>> = LazyLock::new(|| file().to_string().into_bytes());
        let mut bytes = ONCE.clone();
        let index = (bytes.len() as f64 * at) as usize;
        bytes[index] = byte;
        if cut {
            bytes.truncate(index + 1);
        }
        if let Ok(tokenizer) = Tokenizer::from_tekken_bytes(&bytes) {
            let ids = tokenizer.encode("a text [INST] é", true, true).unwrap();
            prop_assert!(ids.iter().all(|id| tokenizer.token_bytes(*id).is_some()));
        }
    }
}

#[test]
fn special_tokens_come_first_and_only_where_they_are_asked_for() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), SPECIAL + 256 + MERGES.len());
    assert_eq!(tokenizer.encode("[INST]a[/INST]", true, true).unwrap(), [1, 3, 97 + 12, 4]);
    assert!(!tokenizer.encode("[INST]a[/INST]", false, false).unwrap().contains(&3));
    assert!(tokenizer.is_special(11) && !tokenizer.is_special(12));
    assert_eq!(tokenizer.token_text(11).unwrap(), "<SPECIAL_11>", "ids without a name are filled up");
    assert_eq!(tokenizer.token_text(12 + 0xC3).unwrap(), "<0xC3>");
    assert_eq!(tokenizer.token_to_id("hello"), Some(12 + 256 + 13));
    assert_eq!(tokenizer.token_to_id("[THINK]"), Some(6));
    assert_eq!(tokenizer.token_to_id(&"x".repeat(5000)), None);
    assert_eq!(tokenizer.decode(&[3, 12 + 97, 4], false).unwrap(), "[INST]a[/INST]");
    assert_eq!(tokenizer.decode(&[3, 12 + 97, 4], true).unwrap(), "a");
    let special = tekken_special_tokens(&tokenizer);
    assert_eq!((special.bos.as_deref(), special.eos.as_deref()), (Some("<s>"), Some("</s>")));
}

#[test]
fn early_files_name_no_special_tokens_and_list_more_than_they_use() {
    let mut file = file();
    file.as_object_mut().unwrap().remove("special_tokens");
    file["config"]["default_num_special_tokens"] = json!(20);
    file["config"]["default_vocab_size"] = json!(20 + 256 + 3);
    let tokenizer = load(&file).unwrap();
    assert_eq!(tokenizer.token_to_id("[TOOL_CONTENT]"), Some(19));
    assert_eq!(tokenizer.vocab_size(), 20 + 259);
    assert_eq!(tokenizer.token_to_id("ba"), Some(20 + 258));
    assert_eq!(tokenizer.token_to_id("aaa"), None, "beyond the default size");
    assert_eq!(tokenizer.encode("aaa", false, false).unwrap(), [20 + 256, 20 + 97]);
}

#[test]
fn files_that_lie_are_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: &[(&str, Change)] = &[
        ("config.pattern", |f| f["config"]["pattern"] = json!("(")),
        ("config.pattern", |f| f["config"]["pattern"] = json!("")),
        ("config.pattern", |f| f["config"]["pattern"] = json!("a".repeat(20_000))),
        ("default_vocab_size", |f| f["config"]["default_vocab_size"] = json!(0)),
        ("default_vocab_size", |f| f["config"]["default_vocab_size"] = json!(1u64 << 40)),
        ("default_vocab_size", |f| f["config"]["default_vocab_size"] = json!(5)),
        ("default_vocab_size", |f| f["config"]["default_vocab_size"] = json!(10_000)),
        ("default_num_special_tokens", |f| f["config"]["default_num_special_tokens"] = json!(1u64 << 40)),
        ("fewer than there are bytes", |f| f["config"]["default_vocab_size"] = json!(SPECIAL + 9)),
        ("special_tokens[7]", |f| f["special_tokens"][7]["rank"] = json!(6)),
        ("special_tokens[7]", |f| f["special_tokens"][7]["rank"] = json!(12)),
        ("special_tokens[2]", |f| f["special_tokens"][2]["token_str"] = json!("")),
        ("occurs twice", |f| f["special_tokens"][2]["token_str"] = json!("<s>")),
        ("occurs twice", |f| f["special_tokens"][2]["token_str"] = json!("<SPECIAL_9>")),
        ("vocab[300]", |f| f["vocab"][260] = json!({"rank": 0, "token_bytes": "YQ==", "token_str": null})),
        ("vocab[258].rank", |f| f["vocab"][258]["rank"] = json!(259)),
        ("vocab[258].token_bytes", |f| f["vocab"][258]["token_bytes"] = json!("a")),
        ("vocab[258].token_bytes", |f| f["vocab"][258]["token_bytes"] = json!("")),
        ("vocab[258].token_bytes", |f| f["vocab"][258]["token_bytes"] = json!(base64(&[b'x'; 1025]))),
        ("vocab[258] has the bytes", |f| f["vocab"][258]["token_bytes"] = json!("YWE=")),
        ("vocab[97] is not the byte", |f| f["vocab"][97]["token_bytes"] = json!("YWE=")),
        ("missing field", |f| *f = json!({"config": {}})),
    ];
    for (name, change) in cases {
        let mut file = file();
        change(&mut file);
        let message = load(&file).unwrap_err().to_string();
        let name = name.replace("vocab[300]", "vocab[260].rank");
        assert!(
            message.starts_with("tekken.json is invalid: ") && message.contains(&name),
            "{name}: {message}"
        );
    }
    assert!(Tokenizer::from_tekken_bytes(b"{").is_err());
}

#[test]
fn a_megabyte_in_one_piece_is_not_quadratic() {
    let tokenizer = tokenizer();
    for unit in ["a", "ab", " ", "c", "[INST]"] {
        let text = unit.repeat((1 << 20) / unit.len());
        let begin = std::time::Instant::now();
        let ids = tokenizer.encode(&text, false, true).unwrap();
        // Quadratic time would be hours.
        assert!(begin.elapsed() < std::time::Duration::from_secs(30), "{unit}: {:?}", begin.elapsed());
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
}
