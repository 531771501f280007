//! The simulated model: which token follows which prefix, and which numbers a prompt has.

use std::sync::Arc;

use crate::ids::TokenId;
use crate::params::SamplingParams;
use crate::request::{EngineRequest, FinishReason};
use crate::step::TokenLogprobs;

/// Everything that a drawn token may depend on.
#[derive(Debug)]
pub struct Draw<'a> {
    /// The prompt.
    pub prompt: &'a [TokenId],
    /// Output tokens so far.
    pub output: &'a [TokenId],
    /// Hash of prompt and output.
    pub context: u64,
    /// Which choice of its request.
    pub choice: u32,
    /// The drawn token's position.
    pub position: u32,
    /// How the sequence draws.
    pub sampling: &'a SamplingParams,
    /// Tokens there are.
    pub vocab: u32,
}

/// A rule that draws tokens. Must give the same token for the same arguments.
pub type DrawFn = Arc<dyn Fn(&Draw<'_>) -> TokenId + Send + Sync>;

/// A rule that pools a prompt. Must give the same numbers for the same prompt.
pub type PoolFn = Arc<dyn Fn(&[TokenId]) -> Box<[f32]> + Send + Sync>;

/// The finaliser of splitmix64: every bit of the result depends on every bit of `value`.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Running hash of a sequence's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Context(u64);

impl Context {
    pub(super) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(super) fn from_value(value: u64) -> Self {
        Self(value)
    }

    pub(super) fn of(tokens: &[TokenId]) -> Self {
        let mut context = Self::new();
        tokens.iter().for_each(|&token| context.add(token));
        context
    }

    pub(super) fn add(&mut self, token: TokenId) {
        self.0 = mix(self.0 ^ u64::from(token).wrapping_add(0x1234_5678_9abc_def1));
    }

    pub(super) fn value(self) -> u64 {
        self.0
    }
}

/// A token that depends on the whole prefix, the seed, the choice and the position; never one that ends the
/// sequence before `min_tokens`.
#[must_use]
pub fn default_draw(draw: &Draw<'_>) -> TokenId {
    let key = draw.context ^ draw.sampling.seed.rotate_left(17) ^ u64::from(draw.choice) << 40;
    let early = draw.output.len() < draw.sampling.min_tokens as usize;
    let first = (mix(key ^ u64::from(draw.position)) % u64::from(draw.vocab)) as TokenId;
    (0..draw.vocab)
        .map(|step| (first + step) % draw.vocab)
        .find(|token| !early || draw.sampling.stop_token_ids.binary_search(token).is_err())
        .unwrap_or(first)
}

/// `width` numbers in [-1, 1) that depend on every token and on their order.
#[must_use]
pub fn default_pool(prompt: &[TokenId], width: usize) -> Box<[f32]> {
    let context = Context::of(prompt).value();
    // The upper 24 bits: a float holds them exactly.
    (0..width as u64).map(|at| (mix(context ^ at) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// Every token is as likely as any other, and the lowest ids are called the most likely.
pub(super) fn logprobs_of(token: TokenId, count: u32) -> TokenLogprobs {
    TokenLogprobs { token, logprob: -1.0, rank: 1, top: (0..count).map(|id| (id, -1.0)).collect() }
}

/// What one choice of a request must give: the request alone, one token at a time.
#[must_use]
pub fn reference(
    request: &EngineRequest,
    choice: u32,
    vocab: u32,
    draw: impl Fn(&Draw<'_>) -> TokenId,
) -> (Vec<TokenId>, FinishReason) {
    let mut output = Vec::new();
    let mut context = Context::of(&request.prompt);
    for index in 0..request.max_tokens {
        let token = draw(&Draw {
            prompt: &request.prompt,
            output: &output,
            context: context.value(),
            choice,
            position: request.prompt.len() as u32 + index,
            sampling: &request.sampling,
            vocab,
        });
        output.push(token);
        context.add(token);
        if index >= request.sampling.min_tokens && request.sampling.stop_token_ids.contains(&token) {
            return (output, FinishReason::StopToken(token));
        }
    }
    (output, FinishReason::Length)
}
