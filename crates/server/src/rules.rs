//! A body, and what it is judged by.

use crate::api::chat::ChatRequest;
use crate::api::completions::CompletionRequest;
use crate::config::Limits;
use crate::model::ModelInfo;

/// A generation body, as parsed.
#[derive(Debug)]
pub(crate) enum Body {
    Chat(Box<ChatRequest>),
    Completion(Box<CompletionRequest>),
}

/// What requests are judged by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    pub(crate) model: &'a ModelInfo,
    pub(crate) limits: &'a Limits,
}
