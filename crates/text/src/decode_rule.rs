//! How token strings become bytes, derived from the `decoder` of `tokenizer.json`.
//!
//! Owns the translation of a decoder into (a) a function of one token and (b) a rule for the start
//! of the text. Decoders that cannot be split so are refused, because an incremental decoder for
//! them would differ from the whole one.

use std::borrow::Cow;

use serde_json::Value;

use crate::TokenizerError;

/// What happens at the start of a decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leading {
    /// Nothing, or it has already happened.
    Done,
    /// Up to `count` bytes equal to `byte` are dropped from the start of the text.
    Strip { byte: u8, count: usize },
    /// All spaces of the first token are dropped (the `Metaspace` decoder).
    FirstTokenSpaces,
}

impl Leading {
    pub(crate) fn is_done(self) -> bool {
        self == Self::Done
    }

    /// Applies the rule to the next token's bytes and advances its state.
    pub(crate) fn apply<'a>(&mut self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        match *self {
            Self::Done => Cow::Borrowed(bytes),
            Self::Strip { byte, count } => {
                let cut = bytes.iter().take(count).take_while(|b| **b == byte).count();
                *self = if cut == count || cut < bytes.len() {
                    Self::Done
                } else {
                    Self::Strip { byte, count: count - cut }
                };
                Cow::Borrowed(&bytes[cut..])
            }
            Self::FirstTokenSpaces => {
                *self = Self::Done;
                Cow::Owned(bytes.iter().copied().filter(|b| *b != b' ').collect())
            }
        }
    }
}

/// One step on a single token's string.
#[derive(Debug, Clone)]
enum Step {
    Replace { from: String, to: String },
    Strip { content: char, start: usize, stop: usize },
}

/// The whole decoder.
#[derive(Debug, Clone)]
pub(crate) struct DecodeRule {
    /// Each character of a token stands for one byte (GPT-2's table).
    byte_level: bool,
    /// `<0x41>` stands for the byte 0x41.
    byte_fallback: bool,
    steps: Vec<Step>,
    /// Without a decoder, tokens are joined by a space.
    joined: bool,
    pub(crate) leading: Leading,
}

impl DecodeRule {
    /// GPT-2's byte-level alphabet.
    pub(crate) fn byte_level() -> Self {
        Self {
            byte_level: true,
            byte_fallback: false,
            steps: Vec::new(),
            joined: false,
            leading: Leading::Done,
        }
    }

    /// SentencePiece: `▁` is a space, `<0x41>` a byte, and with `strip_space` the first space of the
    /// text is not part of it.
    pub(crate) fn sentence_piece(strip_space: bool) -> Self {
        Self {
            byte_level: false,
            byte_fallback: true,
            steps: vec![Step::Replace { from: "▁".to_owned(), to: " ".to_owned() }],
            joined: false,
            leading: if strip_space { Leading::Strip { byte: b' ', count: 1 } } else { Leading::Done },
        }
    }

    /// Reads the `decoder` field of `tokenizer.json`; `Null` joins tokens by spaces, as HF does.
    pub(crate) fn from_json(decoder: &Value) -> Result<Self, TokenizerError> {
        let mut rule = Self {
            byte_level: false,
            byte_fallback: false,
            steps: Vec::new(),
            joined: decoder.is_null(),
            leading: Leading::Done,
        };
        if rule.joined {
            rule.leading = Leading::Strip { byte: b' ', count: 1 };
            return Ok(rule);
        }
        let mut parts = Vec::new();
        flatten(decoder, &mut parts);
        let mut fused = false;
        for part in parts {
            rule.add(part, &mut fused)?;
        }
        Ok(rule)
    }

    fn add(&mut self, part: &Value, fused: &mut bool) -> Result<(), TokenizerError> {
        let unsupported = |why: &str| TokenizerError::Unsupported {
            component: "decoder",
            detail: format!("{why}: {part}"),
        };
        let untouched = !self.byte_level && !self.byte_fallback && !*fused;
        match part["type"].as_str() {
            Some("ByteLevel") if untouched && self.steps.is_empty() => {
                self.byte_level = true;
                *fused = true;
            }
            Some("ByteFallback") if untouched => self.byte_fallback = true,
            Some("Fuse") => *fused = true,
            Some("Replace") if untouched => {
                let (Some(from), Some(to)) = (part["pattern"]["String"].as_str(), part["content"].as_str())
                else {
                    return Err(unsupported("only string patterns can be replaced"));
                };
                self.steps.push(Step::Replace { from: from.to_owned(), to: to.to_owned() });
            }
            Some("Strip") => self.add_strip(part, *fused).ok_or_else(|| {
                unsupported("only one strip of an ASCII character at the start of the text")
            })?,
            Some("Metaspace") if untouched => {
                let replacement = part["replacement"].as_str().unwrap_or("▁");
                self.steps.push(Step::Replace { from: replacement.to_owned(), to: " ".to_owned() });
                let never = part["prepend_scheme"].as_str() == Some("never")
                    || part["add_prefix_space"].as_bool() == Some(false);
                if !never {
                    self.leading = Leading::FirstTokenSpaces;
                }
            }
            _ => return Err(unsupported("cannot be decoded incrementally")),
        }
        Ok(())
    }

    fn add_strip(&mut self, part: &Value, fused: bool) -> Option<()> {
        let content = part["content"].as_str()?.chars().next()?;
        let start = usize::try_from(part["start"].as_u64()?).ok()?;
        let stop = usize::try_from(part["stop"].as_u64()?).ok()?;
        if !fused {
            // Byte tokens are already merged here, so a strip would see more than one token.
            if self.byte_fallback {
                return None;
            }
            self.steps.push(Step::Strip { content, start, stop });
            return Some(());
        }
        if stop != 0 || !content.is_ascii() || !self.leading.is_done() {
            return None;
        }
        if start > 0 {
            self.leading = Leading::Strip { byte: u8::try_from(content).ok()?, count: start };
        }
        Some(())
    }

    /// The bytes of one vocabulary entry.
    pub(crate) fn bytes_of(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            return byte_level_bytes(token).unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let mut text = Cow::Borrowed(token);
        for step in &self.steps {
            text = Cow::Owned(match step {
                Step::Replace { from, to } => text.replace(from.as_str(), to),
                Step::Strip { content, start, stop } => strip(&text, *content, *start, *stop),
            });
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(&text)
        {
            return vec![byte];
        }
        if self.joined {
            return format!(" {text}").into_bytes();
        }
        text.into_owned().into_bytes()
    }
}

fn flatten<'a>(decoder: &'a Value, out: &mut Vec<&'a Value>) {
    if decoder["type"].as_str() == Some("Sequence")
        && let Some(parts) = decoder["decoders"].as_array()
    {
        for part in parts {
            flatten(part, out);
        }
    } else {
        out.push(decoder);
    }
}

fn strip(text: &str, content: char, start: usize, stop: usize) -> String {
    let chars: Vec<char> = text.chars().collect();
    let front = chars.iter().take(start).take_while(|c| **c == content).count();
    let rest = &chars[front..];
    let back = rest.iter().rev().take(stop).take_while(|c| **c == content).count();
    rest[..rest.len() - back].iter().collect()
}

/// The byte that `<0x41>` stands for.
pub(crate) fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// The bytes behind a token written in GPT-2's byte alphabet, or `None` where a character is not
/// in that alphabet.
pub(crate) fn byte_level_bytes(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of_char).collect()
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes follow U+0100.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_a_bijection_on_256_bytes() {
        let mut seen = [false; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of_char) {
                assert!(!seen[usize::from(byte)], "byte {byte:#x} has two characters");
                seen[usize::from(byte)] = true;
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!(byte_level_bytes("Ġé").unwrap(), vec![b' ', 0xE9]);
        assert_eq!(byte_level_bytes("a b"), None);
    }

    #[test]
    fn sentence_piece_sequence() {
        let rule = DecodeRule::from_json(&json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}))
        .unwrap();
        assert_eq!(rule.bytes_of("▁the"), b" the");
        assert_eq!(rule.bytes_of("<0xE2>"), vec![0xE2]);
        assert_eq!(rule.bytes_of("<0xZZ>"), b"<0xZZ>");
        assert_eq!(rule.leading, Leading::Strip { byte: b' ', count: 1 });
    }

    #[test]
    fn strip_counts_across_tokens() {
        let mut rule = Leading::Strip { byte: b' ', count: 3 };
        assert_eq!(&*rule.apply(b" "), b"");
        assert_eq!(&*rule.apply(b""), b"");
        assert_eq!(&*rule.apply(b"   x"), b" x");
        assert!(rule.is_done());
    }

    #[test]
    fn metaspace_drops_the_spaces_of_the_first_token() {
        let mut rule = DecodeRule::from_json(
            &json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}),
        )
        .unwrap();
        assert_eq!(&*rule.leading.apply(&rule.bytes_of("▁a▁b")), b"ab");
        let never = DecodeRule::from_json(
            &json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}),
        )
        .unwrap();
        assert!(never.leading.is_done());
    }

    #[test]
    fn without_a_decoder_tokens_are_joined_by_spaces() {
        let mut rule = DecodeRule::from_json(&Value::Null).unwrap();
        let mut out = rule.leading.apply(&rule.bytes_of("a")).into_owned();
        out.extend_from_slice(&rule.leading.apply(&rule.bytes_of("b")));
        assert_eq!(out, b"a b");
    }

    #[test]
    fn a_strip_of_single_tokens_is_static() {
        let rule =
            DecodeRule::from_json(&json!({"type": "Strip", "content": "_", "start": 1, "stop": 2})).unwrap();
        assert_eq!(rule.bytes_of("__a___"), b"_a_");
        assert_eq!(rule.bytes_of("_"), b"");
    }

    #[test]
    fn what_cannot_be_incremental_is_refused() {
        for decoder in [
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "CTC"}),
            json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": " "}),
            json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]}),
            json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
            json!({"type": "Sequence", "decoders": [{"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
        ] {
            let error = DecodeRule::from_json(&decoder).unwrap_err();
            assert!(matches!(error, TokenizerError::Unsupported { component: "decoder", .. }));
        }
    }
}
