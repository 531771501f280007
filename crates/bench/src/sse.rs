//! Reads a stream of server-sent events with the least work a chunk: splits lines, then skims the JSON of a
//! `data:` line for the few facts the metrics need. Only `usage` is parsed.
//!
//! Every `data:` line is taken as one event, which is how all OpenAI-compatible servers write; comments and
//! other fields are skipped. Never keeps more than one incomplete line.

use serde::Deserialize;

/// Longest line in bytes. A chunk of one token has some hundred.
pub(crate) const MAX_LINE_BYTES: usize = 1 << 20;

/// Splits bytes that arrive in any pieces into `data:` payloads.
#[derive(Debug, Default)]
pub(crate) struct Scanner {
    /// Start of a line whose end has not arrived; usually empty.
    partial: Vec<u8>,
}

impl Scanner {
    /// Feeds the next piece; `on_data` gets each complete payload, without `data:` and line break.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut on_data: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            if self.partial.is_empty() {
                self.line(line, &mut on_data)?;
            } else {
                self.keep(line)?;
                let whole = std::mem::take(&mut self.partial);
                self.line(&whole, &mut on_data)?;
                // Give the allocation back for the next incomplete line.
                self.partial = whole;
                self.partial.clear();
            }
        }
        self.keep(bytes)
    }

    /// Whether the stream ended within a line.
    pub(crate) fn is_mid_line(&self) -> bool {
        !self.partial.is_empty()
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), String> {
        if self.partial.len() + bytes.len() > MAX_LINE_BYTES {
            return Err(format!("a line of more than {MAX_LINE_BYTES} bytes"));
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    fn line(&self, line: &[u8], on_data: &mut impl FnMut(&[u8]) -> Result<(), String>) -> Result<(), String> {
        if line.len() > MAX_LINE_BYTES {
            return Err(format!("a line of more than {MAX_LINE_BYTES} bytes"));
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(payload) = line.strip_prefix(b"data:") {
            return on_data(payload.strip_prefix(b" ").unwrap_or(payload));
        }
        let field = line.split(|&byte| byte == b':').next().unwrap_or_default();
        match field {
            b"" | b"event" | b"id" | b"retry" => Ok(()),
            _ => Err(format!("not a line of an event stream: {}", excerpt(line))),
        }
    }
}

/// Start of a line for a message.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    const MAX: usize = 120;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX)]).into_owned();
    if bytes.len() > MAX { format!("{text:?}...") } else { format!("{text:?}") }
}

/// Token counts as the server reports them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    #[serde(default)]
    pub(crate) completion_tokens: u64,
    #[serde(default, deserialize_with = "cached_tokens", rename = "prompt_tokens_details")]
    pub(crate) cached_tokens: u64,
}

fn cached_tokens<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    struct Details {
        cached_tokens: Option<u64>,
    }
    Ok(Option::<Details>::deserialize(deserializer)?.and_then(|details| details.cached_tokens).unwrap_or(0))
}

/// What one chunk says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `[DONE]`.
    Done,
    /// Carries generated text, or stands for a token whose text the server holds back.
    Token,
    /// Ends a choice without new text.
    Finish,
    /// Announces the role, or carries only usage.
    Other,
    /// An error event.
    Error,
}

/// A skimmed chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) kind: Kind,
    pub(crate) usage: Option<Usage>,
}

/// Facts that the walk over one chunk collects.
#[derive(Default)]
struct Facts {
    choices: bool,
    text: bool,
    role: bool,
    finish: bool,
    error: bool,
    usage: Option<Usage>,
}

/// Skims one payload: a single pass over its strings and brackets.
///
/// A quote inside a JSON string is always escaped, so a string followed by a colon is a key; text that looks
/// like JSON cannot deceive the walk.
pub(crate) fn skim(payload: &[u8]) -> Result<Chunk, String> {
    if payload == b"[DONE]" {
        return Ok(Chunk { kind: Kind::Done, usage: None });
    }
    let malformed = || format!("not a JSON object: {}", excerpt(payload));
    let payload = payload.trim_ascii();
    if payload.first() != Some(&b'{') {
        return Err(malformed());
    }
    let mut facts = Facts::default();
    let mut depth = 0_usize;
    let mut at = 0;
    while at < payload.len() {
        match payload[at] {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth = depth.checked_sub(1).ok_or_else(malformed)?;
                if depth == 0 && at + 1 != payload.len() {
                    return Err(malformed());
                }
            }
            b'"' => {
                let end = string_end(payload, at + 1).ok_or_else(malformed)?;
                let after = skip_space(payload, end + 1);
                if payload.get(after) == Some(&b':') {
                    let value = skip_space(payload, after + 1);
                    note(&mut facts, &payload[at + 1..end], payload, value, depth)?;
                    at = value;
                    continue;
                }
                at = end;
            }
            _ => {}
        }
        at += 1;
    }
    if depth != 0 {
        return Err(malformed());
    }
    let kind = if facts.error {
        Kind::Error
    } else if facts.text {
        Kind::Token
    } else if !facts.choices || facts.role {
        Kind::Other
    } else if facts.finish {
        Kind::Finish
    } else {
        Kind::Token
    };
    Ok(Chunk { kind, usage: facts.usage })
}

/// Takes note of one member; `value` is where its value begins.
fn note(facts: &mut Facts, key: &[u8], payload: &[u8], value: usize, depth: usize) -> Result<(), String> {
    let first = payload.get(value).copied();
    let is_text = first == Some(b'"');
    match key {
        b"text" | b"content" | b"reasoning" | b"reasoning_content" | b"arguments" | b"refusal" => {
            facts.text |= is_text && payload.get(value + 1) != Some(&b'"');
        }
        b"tool_calls" => facts.text |= is_filled_list(payload, value),
        b"role" => facts.role |= is_text,
        b"finish_reason" => facts.finish |= is_text,
        b"choices" if depth == 1 => facts.choices = is_filled_list(payload, value),
        b"error" if depth == 1 => facts.error = first != Some(b'n'),
        b"usage" if depth == 1 && first == Some(b'{') => {
            let mut parser = serde_json::Deserializer::from_slice(&payload[value..]);
            let usage = Usage::deserialize(&mut parser).map_err(|error| format!("field usage: {error}"))?;
            facts.usage = Some(usage);
        }
        _ => {}
    }
    Ok(())
}

fn is_filled_list(payload: &[u8], value: usize) -> bool {
    payload.get(value) == Some(&b'[') && payload.get(skip_space(payload, value + 1)) != Some(&b']')
}

/// Position of the quote that ends the string whose text begins at `at`.
fn string_end(payload: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match payload.get(at)? {
            b'"' => return Some(at),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

fn skip_space(payload: &[u8], mut at: usize) -> usize {
    while payload.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payloads(pieces: &[&[u8]]) -> Result<Vec<String>, String> {
        let mut scanner = Scanner::default();
        let mut found = Vec::new();
        for piece in pieces {
            scanner.feed(piece, |data| {
                found.push(String::from_utf8_lossy(data).into_owned());
                Ok(())
            })?;
        }
        Ok(found)
    }

    const STREAM: &[u8] = b": ping\r\n\r\nevent: message\ndata: {\"a\":1}\n\ndata:{\"b\":\"\xc3\xa9\"}\r\n\r\nid: 7\nretry: 5\ndata: [DONE]\n\n";

    #[test]
    fn every_split_in_three_gives_the_same_lines() {
        let whole = payloads(&[STREAM]).unwrap();
        assert_eq!(whole, ["{\"a\":1}", "{\"b\":\"é\"}", "[DONE]"]);
        for i in 0..=STREAM.len() {
            for j in i..=STREAM.len() {
                let parts = [&STREAM[..i], &STREAM[i..j], &STREAM[j..]];
                assert_eq!(payloads(&parts).unwrap(), whole, "{i} {j}");
            }
        }
    }

    #[test]
    fn garbage_and_endless_lines_are_refused() {
        assert!(payloads(&[b"<html>\n"]).unwrap_err().contains("<html>"));
        let piece = vec![b'x'; MAX_LINE_BYTES / 2];
        let error = payloads(&[b"data: ", &piece, &piece, &piece]).unwrap_err();
        assert!(error.contains("more than"), "{error}");
        let mut one = vec![b'd'; MAX_LINE_BYTES + 1];
        one.push(b'\n');
        assert!(payloads(&[&one]).unwrap_err().contains("more than"));
        let mut scanner = Scanner::default();
        scanner.feed(b"data: {", |_| Ok(())).unwrap();
        assert!(scanner.is_mid_line());
    }

    fn kind(payload: &str) -> Kind {
        skim(payload.as_bytes()).unwrap().kind
    }

    #[test]
    fn kinds_of_chunks() {
        for (payload, expected) in [
            ("[DONE]", Kind::Done),
            (r#"{"choices":[{"index":0,"text":" a","finish_reason":null}],"usage":null}"#, Kind::Token),
            (r#"{ "choices" : [ { "text" : "a" } ] }"#, Kind::Token),
            (r#"{"choices":[{"text":"","finish_reason":null}]}"#, Kind::Token),
            (r#"{"choices":[{"text":"","finish_reason":"length"}]}"#, Kind::Finish),
            (r#"{"choices":[{"text":"a","finish_reason":"length"}]}"#, Kind::Token),
            (r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, Kind::Other),
            (r#"{"choices":[{"delta":{"role":"assistant","content":"a"}}]}"#, Kind::Token),
            (r#"{"choices":[{"delta":{"role":null,"content":""},"finish_reason":null}]}"#, Kind::Token),
            (r#"{"choices":[{"delta":{"reasoning_content":"a","content":null}}]}"#, Kind::Token),
            (r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#, Kind::Finish),
            (r#"{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":""}}]}}]}"#, Kind::Token),
            (r#"{"choices":[{"delta":{"role":"assistant","tool_calls":[]}}]}"#, Kind::Other),
            (r#"{"choices":[ ],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#, Kind::Other),
            (r#"{"error":{"message":"x"}}"#, Kind::Error),
            (r#"{"error":null,"choices":[{"text":"a"}]}"#, Kind::Token),
            // Text that imitates members.
            (r#"{"choices":[{"text":"\"error\":{\"choices\":[]"}]}"#, Kind::Token),
            (
                r#"{"choices":[{"delta":{"content":"","x":"\"content\":\"a\""},"finish_reason":"stop"}]}"#,
                Kind::Finish,
            ),
            // A logprobs object has a member `content` that is a list.
            (r#"{"choices":[{"delta":{},"logprobs":{"content":[]},"finish_reason":"stop"}]}"#, Kind::Finish),
        ] {
            assert_eq!(kind(payload), expected, "{payload}");
        }
    }

    #[test]
    fn usage_is_exact() {
        let chunk = skim(
            br#"{"choices":[],"usage":{"prompt_tokens":10,"total_tokens":17,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":4,"audio":0}},"x":1}"#,
        );
        let usage = Usage { prompt_tokens: 10, completion_tokens: 7, cached_tokens: 4 };
        assert_eq!(chunk.unwrap().usage, Some(usage));
        let sparse =
            skim(br#"{"usage":{"prompt_tokens":10,"prompt_tokens_details":null},"choices":[]}"#).unwrap();
        assert_eq!(sparse.usage, Some(Usage { prompt_tokens: 10, completion_tokens: 0, cached_tokens: 0 }));
        assert_eq!(skim(br#"{"choices":[{"text":"a"}],"usage":null}"#).unwrap().usage, None);
        let error = skim(br#"{"usage":{"prompt_tokens":-1},"choices":[]}"#).unwrap_err();
        assert!(error.contains("field usage"), "{error}");
    }

    #[test]
    fn malformed_payloads() {
        for payload in ["", "x", "[1]", "{", "{\"a", "{\"a\\", "{\"a\":[1}}}", "{} {}", "{\"a\":1}]"] {
            assert!(skim(payload.as_bytes()).is_err(), "{payload:?}");
        }
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same(
            texts in prop::collection::vec("\\PC{0,20}", 0..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
        ) {
            let mut stream = Vec::new();
            let mut expected = Vec::new();
            for (i, text) in texts.iter().enumerate() {
                let payload = serde_json::json!({"choices": [{"text": text}]}).to_string();
                let ending = if i % 2 == 0 { "\n\n" } else { "\r\n\r\n" };
                stream.extend_from_slice(format!(":c\ndata: {payload}{ending}").as_bytes());
                expected.push(payload);
            }
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            ends.push(stream.len());
            ends.sort_unstable();
            let mut start = 0;
            let mut pieces = Vec::new();
            for end in ends {
                pieces.push(&stream[start..end]);
                start = end;
            }
            prop_assert_eq!(payloads(&pieces).unwrap(), expected);
        }

        #[test]
        fn skim_agrees_with_a_full_parse(text in "\\PC{0,30}", role in any::<bool>(), finish in any::<bool>()) {
            let value = serde_json::json!({"id": text, "choices": [{
                "delta": {"role": role.then_some("assistant"), "content": text},
                "finish_reason": finish.then_some("stop")}]});
            let expected = if !text.is_empty() { Kind::Token }
                else if role { Kind::Other } else if finish { Kind::Finish } else { Kind::Token };
            prop_assert_eq!(skim(value.to_string().as_bytes()).unwrap().kind, expected);
            let pretty = serde_json::to_string_pretty(&value).unwrap();
            prop_assert_eq!(skim(pretty.as_bytes()).unwrap().kind, expected);
        }

        #[test]
        fn skim_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = skim(&bytes);
            let mut object = vec![b'{'];
            object.extend_from_slice(&bytes);
            let _ = skim(&object);
        }
    }
}
