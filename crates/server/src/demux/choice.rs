//! One choice: its text, as it grows.
//!
//! Owns detokenization, stop strings and what has not been sent yet; it never knows where output goes.

use mirai_engine::{SamplingParams, TokenLogprobs};
use mirai_text::{Detokenizer, StopMatcher, Tokenizer};

use crate::format::chunk::{Finish, StopReason};
use crate::format::json;
use crate::format::logprobs::{LogprobsBuffer, Names};
use crate::validate::{Kind, OutputOptions};

/// Output that has not left yet.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Escaped for JSON.
    pub(crate) text: Vec<u8>,
    pub(crate) logprobs: LogprobsBuffer,
    pub(crate) token_ids: Vec<u32>,
}

impl Pending {
    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_empty() && self.token_ids.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.text.clear();
        self.logprobs.clear();
        self.token_ids.clear();
    }
}

/// State of one choice.
pub(crate) struct Choice {
    detokenizer: Option<Detokenizer>,
    stop: Option<StopMatcher>,
    pub(crate) pending: Pending,
    /// Output tokens that belong to the answer.
    pub(crate) tokens: u32,
    /// Its first event has been seen.
    pub(crate) started: bool,
    /// Set once nothing more belongs to the answer.
    pub(crate) finish: Option<Finish>,
    /// The engine has said its last word on it.
    pub(crate) ended: bool,
}

/// What a token led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// The choice goes on.
    Open,
    /// A stop string ended it; the engine does not know yet.
    Stopped,
}

impl Choice {
    pub(crate) fn new(kind: Kind, prompt: &[u32], output: &OutputOptions, tokenizer: &Tokenizer) -> Self {
        let tail = &prompt[prompt.len().saturating_sub(8)..];
        let detokenizer = Detokenizer::new(tokenizer, tail, output.skip_special)
            // A prompt may name ids of padded logits, which have no text.
            .or_else(|_| Detokenizer::new(tokenizer, &[], output.skip_special))
            .ok();
        let stop = (!output.stop.is_empty()).then(|| StopMatcher::new(&output.stop, output.include_stop));
        Self {
            detokenizer,
            stop,
            pending: Pending {
                text: Vec::with_capacity(64),
                logprobs: LogprobsBuffer::new(kind),
                token_ids: Vec::new(),
            },
            tokens: 0,
            started: false,
            finish: None,
            ended: false,
        }
    }

    /// Adds the prompt to the output.
    pub(crate) fn echo(
        &mut self,
        text: &str,
        ids: &[u32],
        entries: &[TokenLogprobs],
        names: Option<Names<'_>>,
    ) {
        json::escape(&mut self.pending.text, text);
        if let Some(names) = names {
            let entries = std::iter::once(None).chain(entries.iter().map(Some));
            for (&id, entry) in ids.iter().zip(entries) {
                self.pending.logprobs.push(id, entry, names);
            }
        }
    }

    /// Adds a token.
    pub(crate) fn push(
        &mut self,
        token: u32,
        entry: Option<&TokenLogprobs>,
        sampling: &SamplingParams,
        output: &OutputOptions,
        names: Names<'_>,
    ) -> Pushed {
        self.tokens += 1;
        if let Some(entry) = entry {
            self.pending.logprobs.push(token, Some(entry), names);
        }
        if output.return_token_ids {
            self.pending.token_ids.push(token);
        }
        // A stop token is never drawn before `min_tokens`, and always the last.
        if sampling.stop_token_ids.binary_search(&token).is_ok() && !output.include_stop {
            return Pushed::Open;
        }
        let Some(detokenizer) = &mut self.detokenizer else { return Pushed::Open };
        // An id beyond the tokenizer's vocabulary (padded logits) has no text.
        let text = detokenizer.push(token).unwrap_or_default();
        let Some(matcher) = &mut self.stop else {
            json::escape(&mut self.pending.text, text);
            return Pushed::Open;
        };
        // Stop strings count only where stop tokens would.
        if self.tokens < sampling.min_tokens.max(1) {
            let held = matcher.finish();
            json::escape(&mut self.pending.text, &held);
            json::escape(&mut self.pending.text, text);
            return Pushed::Open;
        }
        let found = matcher.push(text);
        json::escape(&mut self.pending.text, &found.emit);
        match found.stopped {
            Some(index) => {
                let stop = output.stop.get(index).cloned().map(StopReason::Text);
                self.finish = Some(Finish { reason: "stop", stop });
                Pushed::Stopped
            }
            None => Pushed::Open,
        }
    }

    /// Ends the choice: what was held back belongs to the answer after all.
    pub(crate) fn close(&mut self, finish: Finish, output: &OutputOptions) {
        if self.finish.is_some() {
            return;
        }
        let rest = self.detokenizer.as_mut().map(Detokenizer::finish).unwrap_or_default();
        self.finish = Some(finish);
        let Some(matcher) = &mut self.stop else {
            json::escape(&mut self.pending.text, &rest);
            return;
        };
        let found = matcher.push(&rest);
        json::escape(&mut self.pending.text, &found.emit);
        match found.stopped {
            Some(index) => {
                let stop = output.stop.get(index).cloned().map(StopReason::Text);
                self.finish = Some(Finish { reason: "stop", stop });
            }
            None => json::escape(&mut self.pending.text, &matcher.finish()),
        }
    }
}
