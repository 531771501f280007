//! Tokens of one choice into the two texts of its answer: the reasoning and the content.
//!
//! Owns detokenization, the split, and stop strings. It never knows where output goes, nor why a choice ends
//! otherwise.
//!
//! Stop strings count in the content only: a model that thinks about the question repeats its words, and a stop
//! there would leave an answer without content. (vLLM looks for them everywhere, to the regret of its users.)

use mirai_text::{Detokenizer, Part, ReasoningParser, StopMatcher, Tokenizer};

use super::pending::Pending;
use crate::format::json;
use crate::model::ModelInfo;
use crate::validate::{OutputOptions, Prompt};

/// The text side of one choice.
pub(super) struct Text {
    decoder: Decoder,
    sorter: Sorter,
}

enum Decoder {
    /// The vocabulary cannot even say what begins here.
    Silent,
    Plain(Detokenizer),
    Split(Box<ReasoningParser>),
}

/// Where each part of the text goes.
struct Sorter {
    stop: Option<StopMatcher>,
    hide_reasoning: bool,
    /// Index of the stop string that has been found.
    stopped: Option<usize>,
}

/// Tokens of a prompt's end that tell how its text goes on.
const TAIL: usize = 8;

impl Text {
    pub(super) fn new(prompt: &Prompt, output: &OutputOptions, model: &ModelInfo) -> Self {
        let decoder = match detokenizer(&prompt.ids, output, &model.tokenizer) {
            None => Decoder::Silent,
            Some(detokenizer) => match (&model.reasoning, prompt.reasoning) {
                (Some(format), Some(start)) => {
                    Decoder::Split(Box::new(ReasoningParser::new(format, start, detokenizer)))
                }
                _ => Decoder::Plain(detokenizer),
            },
        };
        let stop = (!output.stop.is_empty()).then(|| StopMatcher::new(&output.stop, output.include_stop));
        Self { decoder, sorter: Sorter { stop, hide_reasoning: output.hide_reasoning, stopped: None } }
    }

    /// Adds a token's text. Returns the index of the stop string that it completes; stop strings count only where
    /// `may_stop`.
    pub(super) fn push(&mut self, token: u32, may_stop: bool, out: &mut Pending) -> Option<usize> {
        let sorter = &mut self.sorter;
        match &mut self.decoder {
            Decoder::Silent => {}
            // An id beyond the tokenizer's vocabulary (padded logits) has no text.
            Decoder::Plain(detokenizer) => {
                sorter.add(Part::Content, detokenizer.push(token).unwrap_or_default(), may_stop, out);
            }
            Decoder::Split(parser) => parser.push(token, |part, text| sorter.add(part, text, may_stop, out)),
        }
        sorter.stopped
    }

    /// Ends the text: what was held back belongs to it after all. Returns the stop string that it completes.
    pub(super) fn finish(&mut self, out: &mut Pending) -> Option<usize> {
        let sorter = &mut self.sorter;
        match &mut self.decoder {
            Decoder::Silent => {}
            Decoder::Plain(detokenizer) => sorter.add(Part::Content, &detokenizer.finish(), true, out),
            Decoder::Split(parser) => parser.finish(|part, text| sorter.add(part, text, true, out)),
        }
        if let (Some(matcher), None) = (&mut sorter.stop, sorter.stopped) {
            json::escape(&mut out.text, &matcher.finish());
        }
        sorter.stopped
    }

    /// Tokens so far that are reasoning.
    pub(super) fn reasoning_tokens(&self) -> u32 {
        match &self.decoder {
            Decoder::Split(parser) => parser.reasoning_tokens(),
            Decoder::Silent | Decoder::Plain(_) => 0,
        }
    }
}

fn detokenizer(prompt: &[u32], output: &OutputOptions, tokenizer: &Tokenizer) -> Option<Detokenizer> {
    let tail = &prompt[prompt.len().saturating_sub(TAIL)..];
    Detokenizer::new(tokenizer, tail, output.skip_special)
        // A prompt may name ids of padded logits, which have no text.
        .or_else(|_| Detokenizer::new(tokenizer, &[], output.skip_special))
        .ok()
}

impl Sorter {
    fn add(&mut self, part: Part, text: &str, may_stop: bool, out: &mut Pending) {
        if self.stopped.is_some() {
            return;
        }
        if part == Part::Reasoning {
            if !self.hide_reasoning {
                json::escape(&mut out.reasoning, text);
            }
            return;
        }
        let Some(matcher) = &mut self.stop else { return json::escape(&mut out.text, text) };
        // Stop strings count only where stop tokens would.
        if !may_stop {
            json::escape(&mut out.text, &matcher.finish());
            return json::escape(&mut out.text, text);
        }
        let found = matcher.push(text);
        json::escape(&mut out.text, &found.emit);
        self.stopped = found.stopped;
    }
}
