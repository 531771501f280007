//! Log-probabilities in the shapes of both endpoints.
//!
//! Owns their JSON, for one token or for many: a stream takes them chunk by chunk, a whole answer at its end.

use std::borrow::Cow;

use mirai_engine::TokenLogprobs;
use mirai_text::Tokenizer;

use super::json;
use crate::validate::Kind;

/// How tokens are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// `token_id:<id>` instead of text.
    pub(crate) as_ids: bool,
}

impl Names<'_> {
    fn text(&self, id: u32) -> Cow<'_, str> {
        if self.as_ids {
            return Cow::Owned(format!("token_id:{id}"));
        }
        String::from_utf8_lossy(self.tokenizer.token_bytes(id).unwrap_or_default())
    }

    fn bytes(&self, out: &mut Vec<u8>, id: u32) {
        out.push(b'[');
        for (i, &byte) in self.tokenizer.token_bytes(id).unwrap_or_default().iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            json::int(out, byte);
        }
        out.push(b']');
    }
}

/// Log-probabilities of consecutive tokens of one choice, not yet sent.
#[derive(Debug)]
pub(crate) struct LogprobsBuffer {
    kind: Kind,
    /// Chat: entries. Completion: texts.
    tokens: Vec<u8>,
    token_logprobs: Vec<u8>,
    top_logprobs: Vec<u8>,
    text_offset: Vec<u8>,
    /// Characters of text so far, over all chunks.
    offset: u32,
}

impl LogprobsBuffer {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
            offset: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.token_logprobs.clear();
        self.top_logprobs.clear();
        self.text_offset.clear();
    }

    /// Adds a token. `entry` is what the engine said of it; `None` for the first token of an echoed prompt.
    pub(crate) fn push(&mut self, id: u32, entry: Option<&TokenLogprobs>, names: Names<'_>) {
        match self.kind {
            Kind::Chat => self.push_chat(id, entry, names),
            Kind::Completion => self.push_completion(id, entry, names),
        }
    }

    fn push_chat(&mut self, id: u32, entry: Option<&TokenLogprobs>, names: Names<'_>) {
        let out = &mut self.tokens;
        if !out.is_empty() {
            out.push(b',');
        }
        let one = |out: &mut Vec<u8>, id: u32, logprob: f32| {
            out.extend_from_slice(b"{\"token\":");
            json::string(out, &names.text(id));
            out.extend_from_slice(b",\"logprob\":");
            json::logprob(out, logprob);
            out.extend_from_slice(b",\"bytes\":");
            names.bytes(out, id);
        };
        one(out, id, entry.map_or(f32::NEG_INFINITY, |entry| entry.logprob));
        out.extend_from_slice(b",\"top_logprobs\":[");
        for (i, &(id, logprob)) in entry.map(|e| e.top.as_slice()).unwrap_or_default().iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            one(out, id, logprob);
            out.push(b'}');
        }
        out.extend_from_slice(b"]}");
    }

    fn push_completion(&mut self, id: u32, entry: Option<&TokenLogprobs>, names: Names<'_>) {
        if !self.tokens.is_empty() {
            for list in
                [&mut self.tokens, &mut self.token_logprobs, &mut self.top_logprobs, &mut self.text_offset]
            {
                list.push(b',');
            }
        }
        let text = names.text(id);
        json::string(&mut self.tokens, &text);
        json::int(&mut self.text_offset, self.offset);
        self.offset = self.offset.saturating_add(u32::try_from(text.chars().count()).unwrap_or(u32::MAX));
        let Some(entry) = entry else {
            self.token_logprobs.extend_from_slice(b"null");
            self.top_logprobs.extend_from_slice(b"null");
            return;
        };
        json::logprob(&mut self.token_logprobs, entry.logprob);
        // Different tokens can have one text (parts of a character); of equal names the likeliest is kept.
        let mut seen: Vec<Cow<'_, str>> = Vec::with_capacity(entry.top.len() + 1);
        let out = &mut self.top_logprobs;
        out.push(b'{');
        for &(id, logprob) in entry.top.iter().chain([&(entry.token, entry.logprob)]) {
            let text = names.text(id);
            if seen.contains(&text) {
                continue;
            }
            if !seen.is_empty() {
                out.push(b',');
            }
            json::string(out, &text);
            out.push(b':');
            json::logprob(out, logprob);
            seen.push(text);
        }
        out.push(b'}');
    }

    /// Appends the value of `logprobs`.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        match self.kind {
            Kind::Chat => {
                out.extend_from_slice(b"{\"content\":[");
                out.extend_from_slice(&self.tokens);
                out.extend_from_slice(b"],\"refusal\":null}");
            }
            Kind::Completion => {
                for (name, list) in [
                    (&b"{\"text_offset\":["[..], &self.text_offset),
                    (b"],\"token_logprobs\":[", &self.token_logprobs),
                    (b"],\"tokens\":[", &self.tokens),
                    (b"],\"top_logprobs\":[", &self.top_logprobs),
                ] {
                    out.extend_from_slice(name);
                    out.extend_from_slice(list);
                }
                out.extend_from_slice(b"]}");
            }
        }
    }
}

/// Appends the value of `prompt_logprobs`: for each prompt token an object by token id, `null` for the first.
pub(crate) fn prompt(out: &mut Vec<u8>, entries: &[TokenLogprobs], tokenizer: &Tokenizer) {
    let names = Names { tokenizer, as_ids: false };
    out.extend_from_slice(b"[null");
    for entry in entries {
        out.extend_from_slice(b",{");
        let mut one = |id: u32, logprob: f32, rank: u32, first: bool| {
            if !first {
                out.push(b',');
            }
            out.push(b'"');
            json::int(out, id);
            out.extend_from_slice(b"\":{\"logprob\":");
            json::logprob(out, logprob);
            out.extend_from_slice(b",\"rank\":");
            json::int(out, rank);
            out.extend_from_slice(b",\"decoded_token\":");
            json::string(out, &names.text(id));
            out.push(b'}');
        };
        one(entry.token, entry.logprob, entry.rank, true);
        for (rank, &(id, logprob)) in (1..).zip(&entry.top) {
            if id != entry.token {
                one(id, logprob, rank, false);
            }
        }
        out.push(b'}');
    }
    out.push(b']');
}
