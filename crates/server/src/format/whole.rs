//! The answer of a request that does not stream.
//!
//! Owns the JSON of whole answers; their pieces were written as the tokens came.

use super::chunk::{Finish, UsageCounts, head};
use super::json;
use super::logprobs::LogprobsBuffer;
use crate::validate::Kind;

/// One finished choice.
#[derive(Debug)]
pub(crate) struct WholeChoice<'a> {
    pub(crate) index: u32,
    /// Escaped text.
    pub(crate) text: &'a [u8],
    /// Escaped text of the reasoning.
    pub(crate) reasoning: &'a [u8],
    pub(crate) logprobs: Option<&'a LogprobsBuffer>,
    pub(crate) finish: &'a Finish,
    pub(crate) token_ids: Option<&'a [u32]>,
    /// Completions carry the prompt's details in each choice.
    pub(crate) prompt: PromptDetails<'a>,
}

/// What was asked for about a prompt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PromptDetails<'a> {
    /// As JSON.
    pub(crate) logprobs: Option<&'a [u8]>,
    pub(crate) ids: Option<&'a [u32]>,
}

impl PromptDetails<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        if let Some(logprobs) = self.logprobs {
            out.extend_from_slice(b",\"prompt_logprobs\":");
            out.extend_from_slice(logprobs);
        }
        if let Some(ids) = self.ids {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            json::ints(out, ids);
        }
    }
}

/// Identity of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity<'a> {
    pub(crate) kind: Kind,
    pub(crate) id: &'a str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
}

/// Writes the whole answer.
pub(crate) fn write<'a>(
    identity: Identity<'_>,
    choices: impl Iterator<Item = WholeChoice<'a>>,
    usage: UsageCounts,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    let object = match identity.kind {
        Kind::Chat => "chat.completion",
        Kind::Completion => "text_completion",
    };
    head(&mut out, identity.id, object, identity.created, identity.model);
    let mut prompt = PromptDetails::default();
    for (i, choice) in choices.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        prompt = choice.prompt;
        choice.write(&mut out, identity.kind);
    }
    out.extend_from_slice(b"],\"usage\":");
    usage.write(&mut out);
    if identity.kind == Kind::Chat {
        prompt.write(&mut out);
    }
    out.push(b'}');
    out
}

impl WholeChoice<'_> {
    fn write(&self, out: &mut Vec<u8>, kind: Kind) {
        out.extend_from_slice(b"{\"index\":");
        json::int(out, self.index);
        match kind {
            Kind::Chat => {
                out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",\"content\":");
                // Without reasoning an empty answer is a text like any other.
                let silent = self.text.is_empty() && !self.reasoning.is_empty();
                text_or_null(out, (!silent).then_some(self.text));
                let reasoning = Some(self.reasoning).filter(|text| !text.is_empty());
                for name in [&b",\"reasoning\":"[..], b",\"reasoning_content\":"] {
                    out.extend_from_slice(name);
                    text_or_null(out, reasoning);
                }
                out.extend_from_slice(b",\"refusal\":null}");
            }
            Kind::Completion => {
                out.extend_from_slice(b",\"text\":\"");
                out.extend_from_slice(self.text);
                out.push(b'"');
            }
        }
        out.extend_from_slice(b",\"logprobs\":");
        match self.logprobs {
            Some(logprobs) => logprobs.write(out),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"finish_reason\":");
        json::string(out, self.finish.reason);
        out.extend_from_slice(b",\"stop_reason\":");
        self.finish.write_stop(out);
        if kind == Kind::Completion {
            self.prompt.write(out);
        }
        if let Some(ids) = self.token_ids {
            out.extend_from_slice(b",\"token_ids\":");
            json::ints(out, ids);
        }
        out.push(b'}');
    }
}

fn text_or_null(out: &mut Vec<u8>, escaped: Option<&[u8]>) {
    match escaped {
        Some(text) => {
            out.push(b'"');
            out.extend_from_slice(text);
            out.push(b'"');
        }
        None => out.extend_from_slice(b"null"),
    }
}
