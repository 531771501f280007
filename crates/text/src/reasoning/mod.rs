//! Reasoning apart from the answer: token ids in, text of two parts out.
//!
//! Owns what marks reasoning in the output of each model family ([`families`]), the two machines that follow it
//! (sections between markers, harmony's messages), and the count of reasoning tokens. It sees one choice's
//! tokens, once, in order; it never sees a request, and never changes a byte of what it passes on.
//!
//! A marker that the vocabulary has as one token is that token and nothing else: the same characters spelled
//! out of other tokens are text. Only where the vocabulary has no such token is it looked for in the text, across
//! tokens, and held back while it may still be completed.

mod families;
mod harmony;
mod sections;
mod tally;

use std::sync::Arc;

use crate::{Detokenizer, ReasoningError, TokenId, Tokenizer};
use families::{Family, Shape};
use harmony::{Harmony, HarmonyIds};
use sections::{SectionSpec, Sections};

pub use families::REASONING_NAMES;

/// What a piece of output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Thoughts before or between the parts of the answer.
    Reasoning,
    /// The answer.
    Content,
}

/// How one loaded model marks its reasoning. Cloning shares it.
#[derive(Debug, Clone)]
pub struct ReasoningFormat {
    name: &'static str,
    rules: Rules,
}

#[derive(Debug, Clone)]
enum Rules {
    Sections(Arc<SectionSpec>),
    Harmony(HarmonyIds),
}

/// Where a prompt leaves the model: what its first token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasoningStart(Start);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// The answer begins; reasoning may.
    Fresh,
    /// Inside of reasoning (or of a message of that part).
    Open(Part),
    /// In harmony: after `<|start|>assistant`.
    Header,
}

impl ReasoningFormat {
    /// Finds the format by what the template says and what the vocabulary has; `None` where neither marks
    /// reasoning.
    #[must_use]
    pub fn detect(template: Option<&str>, tokenizer: &Tokenizer) -> Option<Self> {
        let family = families::detect(template.unwrap_or_default(), tokenizer)?;
        // What was detected by its tokens has them.
        Self::build(family, tokenizer).ok()
    }

    /// The format of that name; vLLM's names of parsers are understood too.
    ///
    /// # Errors
    /// An unknown name, or a vocabulary without the tokens that the format needs.
    pub fn named(name: &str, tokenizer: &Tokenizer) -> Result<Self, ReasoningError> {
        let family = families::find(name).ok_or_else(|| ReasoningError::UnknownFormat {
            name: name.to_owned(),
            known: REASONING_NAMES.join(", "),
        })?;
        Self::build(family, tokenizer)
    }

    fn build(family: &Family, tokenizer: &Tokenizer) -> Result<Self, ReasoningError> {
        let rules = match &family.shape {
            Shape::Harmony => Rules::Harmony(HarmonyIds::find(family.name, tokenizer)?),
            Shape::Sections { markers, label, repeats } => {
                Rules::Sections(Arc::new(SectionSpec::new(markers, label, *repeats, tokenizer)))
            }
        };
        Ok(Self { name: family.name, rules })
    }

    /// One of [`REASONING_NAMES`].
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Tokens that end the assistant's turn in this format, whatever the model's files say.
    #[must_use]
    pub fn end_token_ids(&self) -> Vec<TokenId> {
        match &self.rules {
            Rules::Sections(_) => Vec::new(),
            Rules::Harmony(ids) => ids.ends_of_turn().to_vec(),
        }
    }

    /// Where a rendered conversation leaves the model. Only its end counts, so that markers in what a user wrote
    /// open nothing; `continued` is the text of the assistant's message that is to be continued, if one is.
    #[must_use]
    pub fn start(&self, prompt: &str, continued: Option<&str>) -> ReasoningStart {
        ReasoningStart(match &self.rules {
            Rules::Sections(spec) => spec.start(prompt, continued),
            Rules::Harmony(_) => harmony::start(prompt),
        })
    }
}

/// Splits one choice's tokens, from the first on. Replaces a [`Detokenizer`].
#[derive(Debug, Clone)]
pub struct ReasoningParser {
    detokenizer: Detokenizer,
    machine: Machine,
}

#[derive(Debug, Clone)]
enum Machine {
    Sections(Sections),
    Harmony(Harmony),
}

impl ReasoningParser {
    /// A parser of output that follows a prompt; `detokenizer` has seen that prompt's end.
    #[must_use]
    pub fn new(format: &ReasoningFormat, start: ReasoningStart, detokenizer: Detokenizer) -> Self {
        let machine = match &format.rules {
            Rules::Sections(spec) => Machine::Sections(Sections::new(spec.clone(), start.0)),
            Rules::Harmony(ids) => Machine::Harmony(Harmony::new(*ids, start.0)),
        };
        Self { detokenizer, machine }
    }

    /// Adds a token, and hands on what it completes, in order. An id outside the vocabulary has no text.
    pub fn push(&mut self, id: TokenId, mut emit: impl FnMut(Part, &str)) {
        let emit: Emit<'_> = &mut emit;
        match &mut self.machine {
            Machine::Sections(machine) => machine.push(id, &mut self.detokenizer, emit),
            Machine::Harmony(machine) => machine.push(id, &mut self.detokenizer, emit),
        }
    }

    /// Ends the output: what was held back is text after all.
    pub fn finish(&mut self, mut emit: impl FnMut(Part, &str)) {
        let emit: Emit<'_> = &mut emit;
        match &mut self.machine {
            Machine::Sections(machine) => machine.finish(&mut self.detokenizer, emit),
            Machine::Harmony(machine) => machine.finish(&mut self.detokenizer, emit),
        }
    }

    /// Tokens so far of which some text is reasoning. Markers, labels and headers count as neither part; a token
    /// that completes no character counts to the part that is open.
    #[must_use]
    pub fn reasoning_tokens(&self) -> u32 {
        match &self.machine {
            Machine::Sections(machine) => machine.reasoning_tokens(),
            Machine::Harmony(machine) => machine.reasoning_tokens(),
        }
    }
}

/// Where text goes.
type Emit<'a> = &'a mut dyn FnMut(Part, &str);
