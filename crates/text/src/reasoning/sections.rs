//! Reasoning between a start and an end marker.
//!
//! Owns the state of one choice: which part is open, and text that may still become a marker. A marker is one
//! token, or where the vocabulary has none, a text; never both.

use std::sync::Arc;

use super::families::Markers;
use super::tally::Tally;
use super::{Emit, Part, Start};
use crate::{Detokenizer, TokenId, Tokenizer};

/// What marks a section, for one vocabulary.
#[derive(Debug)]
pub(super) struct SectionSpec {
    start: &'static [&'static str],
    end: &'static [&'static str],
    label: &'static str,
    repeats: bool,
    /// Start and end as tokens. Without them they are looked for in the text.
    tokens: Option<(TokenId, TokenId)>,
}

impl SectionSpec {
    pub(super) fn new(markers: &Markers, label: &'static str, repeats: bool, tokenizer: &Tokenizer) -> Self {
        let token = |texts: &[&str]| tokenizer.token_to_id(texts[0]);
        let tokens = token(markers.start).zip(token(markers.end));
        Self { start: markers.start, end: markers.end, label, repeats, tokens }
    }

    /// See [`super::ReasoningFormat::start`].
    pub(super) fn start(&self, prompt: &str, continued: Option<&str>) -> Start {
        if let Some(message) = continued {
            let last = |texts: &[&str]| texts.iter().filter_map(|text| message.rfind(text)).max();
            return match (last(self.start), last(self.end)) {
                (Some(start), end) if end.is_none_or(|end| end < start) => Start::Open(Part::Reasoning),
                (None, None) if message.trim().is_empty() => Start::Fresh,
                _ => Start::Open(Part::Content),
            };
        }
        let tail = prompt.trim_end();
        let ends_with = |texts: &[&str], tail: &str| texts.iter().any(|text| tail.ends_with(text));
        let unlabelled = tail.strip_suffix(self.label.trim_end()).unwrap_or(tail);
        if ends_with(self.start, tail) || ends_with(self.start, unlabelled) {
            Start::Open(Part::Reasoning)
        } else if ends_with(self.end, tail) {
            Start::Open(Part::Content)
        } else {
            Start::Fresh
        }
    }

    /// Texts to look for: none where markers are tokens.
    fn start_texts(&self) -> &'static [&'static str] {
        if self.tokens.is_some() { &[] } else { self.start }
    }

    fn end_texts(&self) -> &'static [&'static str] {
        if self.tokens.is_some() { &[] } else { self.end }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far: reasoning that comes only first may still come.
    Before,
    /// In a section.
    Open,
    /// In the answer.
    After,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marker {
    Start,
    End,
}

/// The machine.
#[derive(Debug, Clone)]
pub(super) struct Sections {
    spec: Arc<SectionSpec>,
    state: State,
    /// Nothing but white space in this section so far: a second start marker is the first one's echo.
    blank: bool,
    /// Nothing at all in this section so far: its label may come.
    label: bool,
    /// Text that may still become a marker or a label: shorter than the longest of them.
    held: String,
    tally: Tally,
}

impl Sections {
    pub(super) fn new(spec: Arc<SectionSpec>, start: Start) -> Self {
        let state = match start {
            Start::Open(Part::Reasoning) => State::Open,
            Start::Fresh if !spec.repeats => State::Before,
            _ => State::After,
        };
        Self { spec, state, blank: true, label: false, held: String::new(), tally: Tally::default() }
    }

    pub(super) fn reasoning_tokens(&self) -> u32 {
        self.tally.reasoning()
    }

    pub(super) fn push(&mut self, id: TokenId, detokenizer: &mut Detokenizer, emit: Emit<'_>) {
        if let Some(marker) = self.marker_of(id) {
            self.finish(detokenizer, emit);
            self.enter(marker);
            return;
        }
        let text = detokenizer.push(id).unwrap_or_default();
        self.tally.token(text.len(), self.part());
        self.held.push_str(text);
        self.resolve(false, emit);
    }

    pub(super) fn finish(&mut self, detokenizer: &mut Detokenizer, emit: Emit<'_>) {
        let rest = detokenizer.finish();
        self.tally.leftover(rest.len());
        self.held.push_str(&rest);
        self.resolve(true, emit);
    }

    fn part(&self) -> Part {
        if self.state == State::Open { Part::Reasoning } else { Part::Content }
    }

    /// The marker that the token is, in this state. Elsewhere it is text like any other (or a control token
    /// without any).
    fn marker_of(&self, id: TokenId) -> Option<Marker> {
        let (start, end) = self.spec.tokens?;
        if id == start {
            let counts = match self.state {
                State::Before => true,
                State::Open => self.blank && self.held.is_empty(),
                State::After => self.spec.repeats,
            };
            return counts.then_some(Marker::Start);
        }
        (id == end && self.state == State::Open).then_some(Marker::End)
    }

    fn enter(&mut self, marker: Marker) {
        match marker {
            Marker::Start => {
                self.state = State::Open;
                self.blank = true;
                self.label = !self.spec.label.is_empty();
            }
            Marker::End => self.state = State::After,
        }
    }

    /// Hands on everything in `held` that is decided; with `last`, everything.
    fn resolve(&mut self, last: bool, emit: Emit<'_>) {
        while !self.held.is_empty() {
            let next = match self.state {
                State::Before => self.before(last),
                State::Open => self.open(last),
                State::After => self.after(last),
            };
            match next {
                Next::Marker { text, skip, marker } => {
                    self.give(text, emit);
                    self.skip(skip);
                    self.enter(marker);
                }
                Next::Label(skip) => self.skip(skip),
                Next::State(state) => self.state = state,
                Next::Text(text) => return self.give(text, emit),
            }
        }
    }

    /// White space is text; then the start marker comes, or never.
    fn before(&self, last: bool) -> Next {
        let white = self.held.len() - self.held.trim_start().len();
        let rest = &self.held[white..];
        let texts = self.spec.start_texts();
        if let Some(skip) = begins_with(rest, texts) {
            return Next::Marker { text: white, skip, marker: Marker::Start };
        }
        if rest.is_empty() || (!last && may_become(rest, texts)) {
            return Next::Text(white);
        }
        Next::State(State::After)
    }

    fn open(&mut self, last: bool) -> Next {
        if self.label {
            if self.held.starts_with(self.spec.label) {
                self.label = false;
                return Next::Label(self.spec.label.len());
            }
            if !last && self.spec.label.starts_with(&self.held) {
                return Next::Text(0);
            }
            self.label = false;
        }
        let white = self.held.len() - self.held.trim_start().len();
        if self.blank {
            let rest = &self.held[white..];
            if let Some(skip) = begins_with(rest, self.spec.start_texts()) {
                return Next::Marker { text: white, skip, marker: Marker::Start };
            }
            if !last && !rest.is_empty() && may_become(rest, self.spec.start_texts()) {
                return Next::Text(white);
            }
        }
        self.search(self.spec.end_texts(), Marker::End, last)
    }

    fn after(&self, last: bool) -> Next {
        let texts = if self.spec.repeats { self.spec.start_texts() } else { &[] };
        self.search(texts, Marker::Start, last)
    }

    /// The first of `texts` in what is held, or what of it cannot become one of them any more.
    fn search(&self, texts: &[&str], marker: Marker, last: bool) -> Next {
        let found = texts.iter().filter_map(|text| Some((self.held.find(text)?, text.len()))).min();
        if let Some((text, skip)) = found {
            return Next::Marker { text, skip, marker };
        }
        let hold =
            if last { 0 } else { texts.iter().map(|text| overlap(&self.held, text)).max().unwrap_or(0) };
        Next::Text(self.held.len() - hold)
    }

    /// Hands on the first `len` bytes.
    fn give(&mut self, len: usize, emit: Emit<'_>) {
        if len == 0 {
            return;
        }
        let part = self.part();
        let text = &self.held[..len];
        self.blank &= text.trim().is_empty();
        emit(part, text);
        self.tally.decide(len, Some(part));
        self.held.drain(..len);
    }

    /// Drops the first `len` bytes, which are markup.
    fn skip(&mut self, len: usize) {
        self.tally.decide(len, None);
        self.held.drain(..len);
    }
}

/// What follows from the text that is held.
enum Next {
    /// So many bytes are text of the open part; the others wait.
    Text(usize),
    /// So many bytes are text, and after them comes a marker of `skip` bytes.
    Marker { text: usize, skip: usize, marker: Marker },
    /// A label of so many bytes.
    Label(usize),
    /// Nothing but a change of state.
    State(State),
}

/// Length of the text that `held` begins with.
fn begins_with(held: &str, texts: &[&str]) -> Option<usize> {
    texts.iter().find(|text| held.starts_with(**text)).map(|text| text.len())
}

/// Whether more text could make `held` begin with one of `texts`.
fn may_become(held: &str, texts: &[&str]) -> bool {
    texts.iter().any(|text| text.starts_with(held))
}

/// Length of the longest end of `held` that is a beginning of `text`, but not all of it.
fn overlap(held: &str, text: &str) -> usize {
    let most = held.len().min(text.len() - 1);
    (1..=most).rev().find(|n| held.as_bytes().ends_with(&text.as_bytes()[..*n])).unwrap_or(0)
}
