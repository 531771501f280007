//! Server-sent events.
//!
//! Owns the bytes of every event of a stream. What does not change between the chunks of a choice is written
//! once; a token costs its escaping and a few copies.

use super::json;
use super::logprobs::LogprobsBuffer;
use crate::error::ApiError;
use crate::validate::Kind;

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct UsageCounts {
    pub(crate) prompt: u64,
    pub(crate) cached: u64,
    pub(crate) completion: u64,
    pub(crate) reasoning: u64,
    /// In the price list's currency, once all of it has ended and where its model has a price.
    pub(crate) cost: Option<f64>,
    /// kWh and kgCO2eq, once all of it has ended and where the site says what energy means.
    pub(crate) impacts: Option<(f64, f64)>,
}

impl UsageCounts {
    /// Appends the usage object.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        for (name, value) in [
            (&b"{\"prompt_tokens\":"[..], self.prompt),
            (b",\"completion_tokens\":", self.completion),
            (b",\"total_tokens\":", self.prompt + self.completion),
            (b",\"prompt_tokens_details\":{\"cached_tokens\":", self.cached),
            (b"},\"completion_tokens_details\":{\"reasoning_tokens\":", self.reasoning),
        ] {
            out.extend_from_slice(name);
            json::int(out, value);
        }
        out.push(b'}');
        // As OpenGateLLM names them.
        if let Some(cost) = self.cost {
            out.extend_from_slice(format!(",\"cost\":{cost}").as_bytes());
        }
        if let Some((kwh, kgco2eq)) = self.impacts {
            let impacts = format!(",\"impacts\":{{\"kWh\":{kwh},\"kgCO2eq\":{kgco2eq}}}");
            out.extend_from_slice(impacts.as_bytes());
        }
        out.push(b'}');
    }
}

/// What a chunk says about usage.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UsageField {
    /// Nothing: it was not asked for.
    Left,
    /// `null`: it comes in the last chunk.
    Null,
    /// The counts so far.
    SoFar(UsageCounts),
}

impl UsageField {
    fn write(self, out: &mut Vec<u8>) {
        match self {
            Self::Left => {}
            Self::Null => out.extend_from_slice(b",\"usage\":null"),
            Self::SoFar(counts) => {
                out.extend_from_slice(b",\"usage\":");
                counts.write(out);
            }
        }
    }
}

/// Why a choice ended, as clients see it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    /// The stop string or token that the request named.
    pub(crate) stop: Option<StopReason>,
}

/// What ended a choice.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StopReason {
    Text(String),
    Token(u32),
}

impl Finish {
    /// Appends the value of `stop_reason`.
    pub(crate) fn write_stop(&self, out: &mut Vec<u8>) {
        match &self.stop {
            None => out.extend_from_slice(b"null"),
            Some(StopReason::Text(text)) => json::string(out, text),
            Some(StopReason::Token(id)) => json::int(out, *id),
        }
    }
}

/// The part of `data: {...}` that all chunks of one request share.
#[derive(Debug)]
pub(crate) struct Events {
    kind: Kind,
    /// Up to and including `"choices":[`.
    head: Vec<u8>,
}

/// How a chat's delta begins where it holds nothing but text.
const CONTENT: &[u8] = b",\"delta\":{\"content\":\"";

/// New output of one choice.
#[derive(Debug, Default)]
pub(crate) struct Piece<'a> {
    /// Escaped text.
    pub(crate) text: &'a [u8],
    /// Escaped text of the reasoning; it comes before `text`.
    pub(crate) reasoning: &'a [u8],
    pub(crate) logprobs: Option<&'a LogprobsBuffer>,
    pub(crate) token_ids: Option<&'a [u32]>,
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
}

/// Appends `"id":...,"object":...,"created":...,"model":...,"choices":[` after an opening brace.
pub(crate) fn head(out: &mut Vec<u8>, id: &str, object: &str, created: u64, model: &str) {
    out.extend_from_slice(b"{\"id\":");
    json::string(out, id);
    out.extend_from_slice(b",\"object\":");
    json::string(out, object);
    out.extend_from_slice(b",\"created\":");
    json::int(out, created);
    out.extend_from_slice(b",\"model\":");
    json::string(out, model);
    out.extend_from_slice(b",\"choices\":[");
}

impl Events {
    pub(crate) fn new(kind: Kind, id: &str, created: u64, model: &str) -> Self {
        let mut bytes = b"data: ".to_vec();
        let object = match kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        head(&mut bytes, id, object, created, model);
        Self { kind, head: bytes }
    }

    /// Everything before the text of a chunk of choice `index`; made once for each choice.
    pub(crate) fn before_text(&self, index: u32) -> Vec<u8> {
        let mut out = self.head.clone();
        out.extend_from_slice(b"{\"index\":");
        json::int(&mut out, index);
        out.extend_from_slice(match self.kind {
            Kind::Chat => CONTENT,
            Kind::Completion => &b",\"text\":\""[..],
        });
        out
    }

    /// A chunk with text, reasoning or both.
    pub(crate) fn text(&self, out: &mut Vec<u8>, before_text: &[u8], piece: &Piece<'_>, usage: UsageField) {
        match piece.reasoning {
            [] => out.extend_from_slice(before_text),
            reasoning => {
                out.extend_from_slice(&before_text[..before_text.len() - CONTENT.len()]);
                for name in [&b",\"delta\":{\"reasoning\":\""[..], b"\",\"reasoning_content\":\""] {
                    out.extend_from_slice(name);
                    out.extend_from_slice(reasoning);
                }
                if !piece.text.is_empty() {
                    out.extend_from_slice(b"\",\"content\":\"");
                }
            }
        }
        out.extend_from_slice(piece.text);
        out.extend_from_slice(if self.kind == Kind::Chat { b"\"}" } else { b"\"" });
        out.extend_from_slice(b",\"logprobs\":");
        match piece.logprobs.filter(|buffer| !buffer.is_empty()) {
            Some(buffer) => buffer.write(out),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"finish_reason\":null");
        ids(out, piece);
        end_of_choice(out, usage);
    }

    /// The first chunk of a chat choice.
    pub(crate) fn role(&self, out: &mut Vec<u8>, index: u32, prompt_ids: Option<&[u32]>, usage: UsageField) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        json::int(out, index);
        out.extend_from_slice(
            b",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]",
        );
        if let Some(ids) = prompt_ids {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            json::ints(out, ids);
        }
        usage.write(out);
        out.extend_from_slice(b"}\n\n");
    }

    /// The last chunk of a choice.
    pub(crate) fn finish(&self, out: &mut Vec<u8>, index: u32, finish: &Finish, usage: UsageField) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        json::int(out, index);
        out.extend_from_slice(match self.kind {
            Kind::Chat => b",\"delta\":{}",
            Kind::Completion => &b",\"text\":\"\""[..],
        });
        out.extend_from_slice(b",\"logprobs\":null,\"finish_reason\":");
        json::string(out, finish.reason);
        out.extend_from_slice(b",\"stop_reason\":");
        finish.write_stop(out);
        end_of_choice(out, usage);
    }

    /// The usage of the whole request.
    pub(crate) fn usage(&self, out: &mut Vec<u8>, counts: UsageCounts) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"],\"usage\":");
        counts.write(out);
        out.extend_from_slice(b"}\n\n");
    }
}

fn ids(out: &mut Vec<u8>, piece: &Piece<'_>) {
    for (name, ids) in
        [(&b",\"prompt_token_ids\":"[..], piece.prompt_token_ids), (b",\"token_ids\":", piece.token_ids)]
    {
        if let Some(ids) = ids {
            out.extend_from_slice(name);
            json::ints(out, ids);
        }
    }
}

fn end_of_choice(out: &mut Vec<u8>, usage: UsageField) {
    out.extend_from_slice(b"}]");
    usage.write(out);
    out.extend_from_slice(b"}\n\n");
}

/// An error after the head of the answer has left.
pub(crate) fn error(out: &mut Vec<u8>, error: &ApiError, copy: bool) {
    out.extend_from_slice(b"data: ");
    error.write(out, copy);
    out.extend_from_slice(b"\n\n");
}

/// The end of every stream.
pub(crate) const DONE: &[u8] = b"data: [DONE]\n\n";

/// A comment that keeps proxies from closing a silent stream.
pub(crate) const PING: &[u8] = b": ping\n\n";

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::api::chat::ChatChunk;
    use crate::api::completions::CompletionChunk;
    use serde::{Serialize, de::DeserializeOwned};

    /// The chunk parses as its documented type, and the type writes the same JSON back.
    fn check<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> serde_json::Value {
        let text = std::str::from_utf8(bytes).unwrap();
        let body = text.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        assert!(!body.contains('\n'), "one line for each event");
        let mut value: serde_json::Value = serde_json::from_str(body).unwrap();
        let typed: T = serde_json::from_str(body).unwrap();
        let again = serde_json::to_value(&typed).unwrap();
        if value.get("usage").is_some_and(serde_json::Value::is_null) {
            value.as_object_mut().unwrap().remove("usage");
        }
        if let Some(choice) = value["choices"].get_mut(0).and_then(serde_json::Value::as_object_mut)
            && choice.get("stop_reason").is_some_and(serde_json::Value::is_null)
        {
            choice.remove("stop_reason");
        }
        assert_eq!(value, again);
        value
    }

    #[test]
    fn chat_chunks_have_their_documented_shape() {
        let events = Events::new(Kind::Chat, "chatcmpl-1", 7, "a\"b");
        let before = events.before_text(3);
        let impacts = Some((1.5e-7, 6e-9));
        let counts =
            UsageCounts { prompt: 5, cached: 2, completion: 3, reasoning: 1, cost: Some(2.85e-4), impacts };
        let ids = [1, 2];
        let mut out = Vec::new();
        let piece = Piece { text: b"\\n\\u0000", token_ids: Some(&ids), ..Piece::default() };
        events.text(&mut out, &before, &piece, UsageField::SoFar(counts));
        let value = check::<ChatChunk>(&out);
        assert_eq!(value["model"], "a\"b");
        assert_eq!(value["choices"][0]["delta"]["content"], "\n\0");
        assert_eq!(value["choices"][0]["index"], 3);
        assert_eq!(value["usage"]["total_tokens"], 8);
        assert_eq!(value["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
        assert_eq!(value["usage"]["cost"], 2.85e-4);
        assert_eq!(value["usage"]["impacts"]["kWh"], 1.5e-7);
        assert_eq!(value["usage"]["impacts"]["kgCO2eq"], 6e-9);
        for text in [&b""[..], b"so"] {
            out.clear();
            let piece = Piece { text, reasoning: b"\\\"hm", ..Piece::default() };
            events.text(&mut out, &before, &piece, UsageField::Left);
            let value = check::<ChatChunk>(&out);
            assert_eq!(value["choices"][0]["delta"]["reasoning"], "\"hm");
            assert_eq!(value["choices"][0]["delta"]["reasoning_content"], "\"hm");
            let content = value["choices"][0]["delta"]["content"].as_str();
            assert_eq!(content, (!text.is_empty()).then_some("so"));
        }
        for usage in [UsageField::Left, UsageField::Null] {
            out.clear();
            events.role(&mut out, 0, Some(&ids), usage);
            assert_eq!(check::<ChatChunk>(&out)["choices"][0]["delta"]["role"], "assistant");
        }
        for stop in [None, Some(StopReason::Text("\"x".into())), Some(StopReason::Token(9))] {
            out.clear();
            events.finish(&mut out, 1, &Finish { reason: "stop", stop }, UsageField::Left);
            assert_eq!(check::<ChatChunk>(&out)["choices"][0]["finish_reason"], "stop");
        }
        out.clear();
        events.usage(&mut out, counts);
        assert_eq!(check::<ChatChunk>(&out)["choices"], serde_json::json!([]));
    }

    #[test]
    fn completion_chunks_have_their_documented_shape() {
        let events = Events::new(Kind::Completion, "cmpl-1", 7, "m");
        let before = events.before_text(0);
        let ids = [1, 2];
        let mut out = Vec::new();
        let piece =
            Piece { text: b"hi", token_ids: Some(&ids), prompt_token_ids: Some(&ids), ..Piece::default() };
        events.text(&mut out, &before, &piece, UsageField::Null);
        assert_eq!(check::<CompletionChunk>(&out)["choices"][0]["text"], "hi");
        out.clear();
        events.finish(&mut out, 0, &Finish { reason: "length", stop: None }, UsageField::Left);
        assert_eq!(check::<CompletionChunk>(&out)["choices"][0]["finish_reason"], "length");
        out.clear();
        events.usage(&mut out, UsageCounts::default());
        check::<CompletionChunk>(&out);
    }

    #[test]
    fn errors_are_events_too() {
        let mut out = Vec::new();
        error(&mut out, &ApiError::internal("x\ny"), false);
        let text = String::from_utf8(out).unwrap();
        let body = text.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        assert!(!body.contains('\n'));
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["error"]["message"], "x\ny");
    }
}
