//! What is wanted of a prompt, and how its tokens are drawn: the words that requests and steps share.

use crate::ids::TokenId;

/// How the next token is drawn. Resolved: every default is already filled in by the caller.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy: the highest logit, the lowest id among equals.
    pub temperature: f32,
    /// Nucleus, in (0, 1]; 1 switches it off.
    pub top_p: f32,
    /// Highest-probability tokens kept; 0 switches it off.
    pub top_k: u32,
    /// Smallest probability kept, relative to the most likely token's; 0 switches it off.
    pub min_p: f32,
    /// Key of the random stream, together with the choice's number and the drawn position.
    pub seed: u64,
    /// Added once to every token that already occurred in the output (subtracted from its logit).
    pub presence_penalty: f32,
    /// Times the number of occurrences in the output, subtracted from the logit.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 switches it off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// If set, every other token is impossible. Sorted, without repeats.
    pub allowed_token_ids: Option<Vec<TokenId>>,
    /// Sequences that must not be completed: the last token of each is impossible after the tokens before it.
    pub bad_words: Vec<Vec<TokenId>>,
    /// Tokens that end the sequence (EOS unless ignored, and the request's own); impossible before `min_tokens`.
    /// Sorted, without repeats.
    pub stop_token_ids: Vec<TokenId>,
    /// Output tokens before any of `stop_token_ids` may be drawn.
    pub min_tokens: u32,
    /// Log-probabilities wanted of each drawn token: the token's own, and this many of the most likely.
    pub logprobs: Option<u32>,
    /// The same of each prompt token but the first. Such a request takes nothing from the prefix index.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    /// Greedy, without penalties, limits or log-probabilities.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// What is wanted of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Task {
    /// Continuations.
    #[default]
    Generate,
    /// The numbers that the model's pooling head makes of it ([`crate::Event::Pooled`]). Such a request has
    /// `max_tokens` 0 and `choices` 1, and its sampling parameters are ignored.
    Pool,
}
