//! One choice: its output, as it grows.
//!
//! Owns what has not been sent yet, and why the choice ended; it never knows where output goes.

use mirai_engine::{SamplingParams, TokenLogprobs};

use super::pending::Pending;
use super::text::Text;
use crate::format::chunk::{Finish, StopReason};
use crate::format::json;
use crate::format::logprobs::{LogprobsBuffer, Names};
use crate::model::ModelInfo;
use crate::validate::{Kind, OutputOptions, Prompt};

/// State of one choice.
pub(crate) struct Choice {
    text: Text,
    pub(crate) pending: Pending,
    /// Output tokens that belong to the answer.
    pub(crate) tokens: u32,
    /// Reasoning tokens that the usage of the request counts already.
    counted: u32,
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
    pub(crate) fn new(kind: Kind, prompt: &Prompt, output: &OutputOptions, model: &ModelInfo) -> Self {
        Self {
            text: Text::new(prompt, output, model),
            pending: Pending {
                text: Vec::with_capacity(64),
                reasoning: Vec::new(),
                logprobs: LogprobsBuffer::new(kind),
                token_ids: Vec::new(),
            },
            tokens: 0,
            counted: 0,
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
        let may_stop = self.tokens >= sampling.min_tokens.max(1);
        match self.text.push(token, may_stop, &mut self.pending) {
            Some(index) => {
                self.finish = Some(stopped(output, index));
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
        let found = self.text.finish(&mut self.pending);
        self.finish = Some(found.map_or(finish, |index| stopped(output, index)));
    }

    /// Reasoning tokens that have been found since this was last asked.
    pub(crate) fn new_reasoning_tokens(&mut self) -> u32 {
        let all = self.text.reasoning_tokens();
        all - std::mem::replace(&mut self.counted, all)
    }
}

fn stopped(output: &OutputOptions, index: usize) -> Finish {
    Finish { reason: "stop", stop: output.stop.get(index).cloned().map(StopReason::Text) }
}
