//! The error types of the crate. Messages name the field or the number that was wrong and never
//! contain prompt text.

use crate::TokenId;

/// Why a tokenizer could not be loaded, or a text or a list of ids could not be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The path as given by the caller.
        path: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The file is larger than any real vocabulary.
    #[error("tokenizer file has {bytes} bytes, the limit is {limit}")]
    FileTooLarge {
        /// Size of the file.
        bytes: u64,
        /// Largest size accepted.
        limit: u64,
    },
    /// `tokenizer.json` or `tokenizer_config.json` is malformed.
    #[error("{file} is invalid: {reason}")]
    Invalid {
        /// Which of the two files.
        file: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// A component is well formed, but this crate cannot reproduce it exactly.
    #[error("unsupported {component} in tokenizer.json: {detail}")]
    Unsupported {
        /// Name of the field (`decoder`, `post_processor`, ...).
        component: &'static str,
        /// The offending value.
        detail: String,
    },
    /// A GGUF vocabulary is contradictory.
    #[error("GGUF vocabulary field `{field}` is invalid: {reason}")]
    Gguf {
        /// GGUF metadata key, without the `tokenizer.ggml.` prefix.
        field: &'static str,
        /// What is wrong, with the numbers.
        reason: String,
    },
    /// The GGUF vocabulary names a pre-tokenizer that is not in the table.
    #[error("unknown GGUF pre-tokenizer `{name}`; known: {known}")]
    UnknownPreTokenizer {
        /// The value of `tokenizer.ggml.pre`.
        name: String,
        /// All accepted names, separated by commas.
        known: String,
    },
    /// The text is longer than the limit of this tokenizer.
    #[error("input of {bytes} bytes is longer than the limit of {limit} bytes")]
    InputTooLong {
        /// Length of the text.
        bytes: usize,
        /// Limit set by [`crate::Tokenizer::with_max_input_bytes`].
        limit: usize,
    },
    /// An id has no entry in the vocabulary.
    #[error("token id {id} is not in the vocabulary (ids end at {vocab_size})")]
    UnknownId {
        /// The id.
        id: TokenId,
        /// One more than the largest id of the vocabulary.
        vocab_size: usize,
    },
    /// The tokenizer's own code failed on this text.
    #[error("tokenization failed: {0}")]
    Encode(String),
}

/// Why a format of reasoning cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReasoningError {
    /// No format has this name.
    #[error("unknown reasoning format `{name}`; known: {known}")]
    UnknownFormat {
        /// The name.
        name: String,
        /// All names, separated by commas.
        known: String,
    },
    /// The format is made of tokens, and the vocabulary has not all of them.
    #[error("reasoning format `{format}` needs the token `{token}`, which the tokenizer has not")]
    MissingToken {
        /// The format.
        format: &'static str,
        /// The token.
        token: &'static str,
    },
}

/// Why a chat template could not be compiled or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template's source is longer than the limit.
    #[error("chat template has {bytes} bytes, the limit is {limit}")]
    SourceTooLarge {
        /// Length of the source.
        bytes: usize,
        /// Limit of [`crate::TemplateLimits::max_source_bytes`].
        limit: usize,
    },
    /// The template is not valid Jinja, or is nested too deeply.
    #[error("chat template does not compile: {0}")]
    Syntax(String),
    /// The template called `raise_exception`.
    #[error("the chat template refuses this conversation: {0}")]
    Raised(String),
    /// The template used up its fuel.
    #[error("chat template ran out of fuel ({fuel} units)")]
    OutOfFuel {
        /// Fuel given to this rendering.
        fuel: u64,
    },
    /// The template wrote more than it may.
    #[error("chat template wrote more than {limit} bytes")]
    OutputTooLarge {
        /// Limit of [`crate::TemplateLimits::max_output_bytes`].
        limit: usize,
    },
    /// Any other failure while rendering (a missing attribute, recursion too deep, ...).
    #[error("chat template failed: {0}")]
    Render(String),
    /// A template variable that requests may not set.
    #[error("chat_template_kwargs: `{name}` is not allowed; allowed: {allowed}")]
    KwargNotAllowed {
        /// The refused key.
        name: String,
        /// All accepted keys, separated by commas.
        allowed: String,
    },
    /// The messages are not a list of objects with a `role`.
    #[error("messages[{index}]: {reason}")]
    BadMessage {
        /// Position in the list.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// `continue_final_message` cannot be honoured for this conversation.
    #[error("continue_final_message: {0}")]
    CannotContinue(&'static str),
    /// `tokenizer_config.json` lists several templates and none has the wanted name.
    #[error("no chat template named `{name}`; available: {available}")]
    NoSuchTemplate {
        /// The wanted name.
        name: String,
        /// Names in the file, separated by commas.
        available: String,
    },
    /// The rendering thread could not be started or panicked.
    #[error("chat template thread: {0}")]
    Thread(String),
}
