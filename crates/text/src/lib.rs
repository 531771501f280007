//! Everything between text and token ids, and nothing else: tokenizers (`tokenizer.json`, `tekken.json` and
//! GGUF vocabularies), incremental detokenization, stop strings, reasoning, and chat templates.
//!
//! This crate knows no tensor, no HTTP and no scheduler. All of it is synchronous and takes its
//! limits as values, so that a caller may run it on any worker thread. Model files and requests
//! are both untrusted: bad input ends in a typed error, never in a panic or in unbounded work.

mod byte_table;
mod decode_rule;
mod detokenizer;
mod error;
mod gguf;
mod hf;
mod parts;
mod reasoning;
mod special;
mod stop;
mod tekken;
mod template;
mod tokenizer;
mod utf8_stream;

pub use detokenizer::Detokenizer;
pub use error::{ReasoningError, TemplateError, TokenizerError};
pub use gguf::{GgufVocab, KNOWN_PRE_TOKENIZERS};
pub use reasoning::{Part, REASONING_NAMES, ReasoningFormat, ReasoningParser, ReasoningStart};
pub use special::{SpecialTokens, TokenizerConfig};
pub use stop::{StopMatcher, StopOutput};
pub use tekken::tekken_special_tokens;
pub use template::{
    ALLOWED_KWARGS, ArgumentStyle, ChatTemplate, ContentStyle, ReasoningStyle, RenderInput, TemplateCaps,
    TemplateLimits,
};
pub use tokenizer::{DEFAULT_MAX_INPUT_BYTES, Tokenizer};

/// Index into a model's vocabulary.
pub type TokenId = u32;
