//! The wire: what bodies may contain and what answers look like.
//!
//! Owns types, their OpenAPI schemas and the hard bounds of what is ever parsed; it never judges a value
//! (`validate` does).

pub mod chat;
pub mod common;
pub mod completions;
pub mod models;
pub mod pooling;
pub mod tokenize;
pub mod usage;
pub mod wire;

/// Hard bounds of lists. The configuration may lower, never raise them: parsing stops right there, before a
/// list costs memory.
pub mod bounds {
    /// Stop strings.
    pub const STOP: usize = 16;
    /// Stop token ids.
    pub const STOP_TOKEN_IDS: usize = 1024;
    /// Entries of `logit_bias`.
    pub const LOGIT_BIAS: usize = 1024;
    /// Entries of `allowed_token_ids`.
    pub const ALLOWED_TOKEN_IDS: usize = 262_144;
    /// Entries of `bad_words`.
    pub const BAD_WORDS: usize = 128;
    /// Log-probabilities for each token.
    pub const LOGPROBS: u32 = 20;
    /// Prompts of one request.
    pub const PROMPTS: usize = 128;
    /// Texts of one embedding call; documents or pairs of one rerank or score call.
    pub const ITEMS: usize = 2048;
    /// Messages of one chat.
    pub const MESSAGES: usize = 2048;
    /// Parts of one message.
    pub const PARTS: usize = 256;
    /// Tool calls of one message.
    pub const TOOL_CALLS: usize = 128;
    /// Entries of `chat_template_kwargs`.
    pub const KWARGS: usize = 32;
    /// Texts of `metadata`; further ones are skipped.
    pub const METADATA: usize = 16;
    /// Bytes of a user's name and of the texts of `metadata`; longer ones are skipped.
    pub const NAME: usize = 512;
    /// Ids of one prompt.
    pub const PROMPT_TOKENS: usize = 4 << 20;
}
