//! What a caller asks of the engine, and what it is told in return.
//!
//! Owns the request and event types; it never validates an API field (the server did) and never sees text.

use std::sync::Arc;

use crate::energy::EnergyMethod;
use crate::ids::{RequestId, TenantId, TokenId};
use crate::params::{SamplingParams, Task};
use crate::step::{RowFault, TokenLogprobs};
use crate::time::Time;

/// One request: a prompt, and `choices` continuations of it or what the model's pooling head makes of it.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    /// Unique among the requests of this engine.
    pub id: RequestId,
    /// What is wanted.
    pub task: Task,
    /// Who is charged in the fair share.
    pub tenant: TenantId,
    /// The tenant's share relative to others; at least 1.
    pub weight: u32,
    /// Separates prefix caches: blocks are shared only between equal salts.
    pub cache_salt: u64,
    /// Higher goes first among the requests of one tenant.
    pub priority: i32,
    /// When the request is ended whatever its state.
    pub deadline: Option<Time>,
    /// At least one token, each below the model's vocabulary size.
    pub prompt: Arc<[TokenId]>,
    /// Most output tokens of each choice; `prompt.len() + max_tokens` is at most the context length.
    pub max_tokens: u32,
    /// Continuations (`n`); the first computes the prompt and the others share its full blocks.
    pub choices: u32,
    /// How each choice draws.
    pub sampling: Arc<SamplingParams>,
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub enum FinishReason {
    /// One of `stop_token_ids` was drawn; it is the last token of the sequence.
    StopToken(TokenId),
    /// The caller found a stop condition of its own (`EngineHandle::stop`).
    Stopped,
    /// `max_tokens` were drawn.
    Length,
    /// The prompt was computed and its [`Event::Pooled`] sent.
    Pooled,
    /// The caller cancelled it.
    Cancelled,
    /// Its deadline passed.
    Deadline,
    /// Its own computation failed; no other sequence is touched.
    Fault(RowFault),
    /// The device failed, or the engine stopped; every sequence ends like this.
    EngineStopped,
}

/// What one sequence cost, whatever ended it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeqUsage {
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Of these, tokens whose KV came from the prefix index at first admission.
    pub cached_tokens: u32,
    /// Output tokens that belong to the answer (a stop token included).
    pub completion_tokens: u32,
    /// Tokens computed and thrown away: recomputed after preemption, drawn after a stop or a cancel.
    pub wasted_tokens: u32,
    /// Times the sequence was preempted.
    pub preemptions: u32,
    /// Its share of the steps' time, times the number of devices, microseconds. Waste included; rows that are still
    /// under way are counted at the time of the last step of their step's size.
    pub device_micros: u64,
    /// Its share of the devices' energy, microjoules, idle time left out; 0 with [`EnergyMethod::None`].
    pub energy_microjoules: u64,
    /// Where the energy comes from.
    pub energy_method: EnergyMethod,
}

/// What happened to a sequence in a step. Sent in step order; within a step, in row order.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt's last chunk was computed. Sent once for each choice, before its first token.
    Prefilled {
        /// The request.
        request: RequestId,
        /// Which of its choices.
        choice: u32,
        /// Prompt tokens taken from the prefix index.
        cached_tokens: u32,
        /// When the sequence was first given a slot.
        scheduled: Time,
        /// One entry for each prompt token but the first, if they were asked for.
        prompt_logprobs: Vec<TokenLogprobs>,
    },
    /// One more output token.
    Token {
        /// The request.
        request: RequestId,
        /// Which of its choices.
        choice: u32,
        /// Number of output tokens before this one.
        index: u32,
        /// The token.
        token: TokenId,
        /// If they were asked for.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// What the pooling head gave for the prompt of a [`Task::Pool`]. Comes once, after [`Event::Prefilled`] and
    /// before [`Event::Finished`]; every number is finite.
    Pooled {
        /// The request.
        request: RequestId,
        /// See [`crate::RowOutcome::pooled`].
        values: Box<[f32]>,
    },
    /// The sequence is over. Sent exactly once for each choice of each accepted request, after all its tokens.
    Finished {
        /// The request.
        request: RequestId,
        /// Which of its choices.
        choice: u32,
        /// Why.
        reason: FinishReason,
        /// What it cost.
        usage: SeqUsage,
    },
}
