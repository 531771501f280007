//! OpenAI's harmony format: messages with a header, of which the channel says what the text is.
//!
//! `<|start|>assistant<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`
//!
//! Owns the state of one choice. Structure is read from token ids alone: a text that spells `<|end|>` is text.
//!
//! * `analysis` is reasoning. `final` and `commentary` are the answer: what a model says there before a tool
//!   call is meant for the reader, as OpenAI's description and vLLM have it.
//! * A call of a tool (a recipient in the header) cannot be served: tools are refused at the door. A model that
//!   makes one anyway is not silenced: its text goes where its channel goes.
//! * Two messages of one part are kept apart by a line feed.
//! * A header that is none (text where a channel should be named) becomes the answer as soon as it is too long for
//!   a header, or at the end: a model that forgets the format is still heard.

use super::{Emit, Part, Start};
use crate::{Detokenizer, ReasoningError, TokenId, Tokenizer};

/// Tokens without which nothing can be read.
pub(super) const NEEDED: [&str; 5] = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"];
/// Longest header, in bytes of text. Real ones name a role, a recipient, a channel and a type of content.
const MAX_HEADER: usize = 256;

/// The format's tokens in one vocabulary.
#[derive(Debug, Clone, Copy)]
pub(super) struct HarmonyIds {
    start: TokenId,
    end: TokenId,
    message: TokenId,
    channel: TokenId,
    ret: TokenId,
    call: Option<TokenId>,
    constrain: Option<TokenId>,
}

impl HarmonyIds {
    pub(super) fn find(format: &'static str, tokenizer: &Tokenizer) -> Result<Self, ReasoningError> {
        let id = |token: &'static str| {
            tokenizer.token_to_id(token).ok_or(ReasoningError::MissingToken { format, token })
        };
        let [start, end, message, channel, ret] = NEEDED;
        Ok(Self {
            start: id(start)?,
            end: id(end)?,
            message: id(message)?,
            channel: id(channel)?,
            ret: id(ret)?,
            call: id("<|call|>").ok(),
            constrain: id("<|constrain|>").ok(),
        })
    }

    /// `<|return|>`, and `<|call|>` where the vocabulary has it.
    pub(super) fn ends_of_turn(&self) -> Vec<TokenId> {
        [Some(self.ret), self.call].into_iter().flatten().collect()
    }
}

/// Where a rendered conversation leaves the model: in a message of the assistant (which is to be continued), or
/// in a header.
pub(super) fn start(prompt: &str) -> Start {
    let last = prompt.rfind("<|start|>").map_or("", |at| &prompt[at..]);
    let Some((header, text)) = last.split_once("<|message|>") else { return Start::Header };
    let closed = ["<|end|>", "<|return|>", "<|call|>"].iter().any(|end| text.ends_with(end));
    let channel = header.split_once("<|channel|>").map_or("", |(_, channel)| channel);
    if closed { Start::Header } else { Start::Open(part_of(channel)) }
}

/// The part that a channel belongs to, by the first word behind `<|channel|>`.
fn part_of(channel: &str) -> Part {
    match channel.split_whitespace().next() {
        Some("analysis") => Part::Reasoning,
        _ => Part::Content,
    }
}

#[derive(Debug, Clone)]
enum State {
    /// Before `<|message|>`.
    Header {
        /// Text of the header: behind `<|channel|>` if there was one.
        text: String,
        /// `<|channel|>` has come.
        channel: bool,
        /// `<|start|>` has come in the output itself, so that the text is a role.
        started: bool,
    },
    /// The text of a message.
    Body(Part),
}

/// The machine.
#[derive(Debug, Clone)]
pub(super) struct Harmony {
    ids: HarmonyIds,
    state: State,
    /// Parts that have some text already, and so need a line feed before the next message.
    spoken: [bool; 2],
    /// No text of this message yet.
    fresh: bool,
    reasoning_tokens: u32,
}

impl Harmony {
    pub(super) fn new(ids: HarmonyIds, start: Start) -> Self {
        let state = match start {
            Start::Open(part) => State::Body(part),
            Start::Header | Start::Fresh => header(false, false),
        };
        Self { ids, state, spoken: [false; 2], fresh: false, reasoning_tokens: 0 }
    }

    pub(super) fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    pub(super) fn push(&mut self, id: TokenId, detokenizer: &mut Detokenizer, emit: Emit<'_>) {
        if self.is_markup(id) {
            self.text(&detokenizer.finish(), emit);
            return self.markup(id);
        }
        if let State::Body(Part::Reasoning) = self.state {
            self.reasoning_tokens += 1;
        }
        let text = detokenizer.push(id).unwrap_or_default();
        self.text(text, emit);
    }

    pub(super) fn finish(&mut self, detokenizer: &mut Detokenizer, emit: Emit<'_>) {
        self.text(&detokenizer.finish(), emit);
        if let State::Header { text, channel: false, started: false } = &mut self.state {
            let text = std::mem::take(text);
            self.begin(Part::Content);
            self.text(&text, emit);
        }
    }

    fn is_markup(&self, id: TokenId) -> bool {
        let ids = &self.ids;
        [ids.start, ids.end, ids.message, ids.channel, ids.ret].contains(&id)
            || ids.call == Some(id)
            || ids.constrain == Some(id)
    }

    fn markup(&mut self, id: TokenId) {
        let ids = &self.ids;
        if id == ids.start {
            self.state = header(false, true);
        } else if id == ids.channel {
            self.state = header(true, true);
        } else if id == ids.message {
            if let State::Header { text, channel, .. } = &self.state {
                let part = if *channel { part_of(text) } else { Part::Content };
                self.begin(part);
            }
        } else if ids.constrain == Some(id) {
            // Between the channel and the type of content, which are words of their own.
            if let State::Header { text, .. } = &mut self.state {
                text.push(' ');
            }
        } else {
            self.state = header(false, false);
        }
    }

    fn begin(&mut self, part: Part) {
        self.state = State::Body(part);
        self.fresh = true;
    }

    fn text(&mut self, text: &str, emit: Emit<'_>) {
        if text.is_empty() {
            return;
        }
        match &mut self.state {
            State::Body(part) => {
                let spoken = &mut self.spoken[usize::from(*part == Part::Content)];
                if self.fresh && *spoken {
                    emit(*part, "\n");
                }
                self.fresh = false;
                *spoken = true;
                emit(*part, text);
            }
            State::Header { text: header, .. } => {
                header.push_str(text);
                if header.len() > MAX_HEADER {
                    let text = std::mem::take(header);
                    self.begin(Part::Content);
                    self.text(&text, emit);
                }
            }
        }
    }
}

fn header(channel: bool, started: bool) -> State {
    State::Header { text: String::new(), channel, started }
}
