//! What is refused before it is queued.
//!
//! Owns the limits and the arithmetic of what a sequence can need at most; it never looks at what is running,
//! so it can be asked from any thread.

use crate::config::EngineConfig;
use crate::ids::{BLOCK_TOKENS, TokenId};
use crate::params::Task;
use crate::request::EngineRequest;
use crate::step::{Geometry, GroupKind};

/// Most choices of one request: what is kept for a choice is allocated when the request arrives.
pub const MAX_CHOICES: u32 = 1024;

/// Why a request is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// Too many requests wait already.
    #[error("{queued} requests are queued, the limit is {limit}")]
    QueueFull {
        /// Requests in the queue.
        queued: usize,
        /// Most requests in the queue.
        limit: usize,
    },
    /// Too many prompt tokens wait already.
    #[error("{queued} prompt tokens are queued and the request has {request}, the limit is {limit}")]
    QueueTokensFull {
        /// Prompt tokens in the queue.
        queued: usize,
        /// Prompt tokens of the request.
        request: usize,
        /// Most prompt tokens in the queue.
        limit: usize,
    },
    /// Prompt and output together are longer than the context.
    #[error("{prompt} prompt tokens and {max_tokens} output tokens exceed the context of {limit}")]
    TooLong {
        /// Prompt length.
        prompt: usize,
        /// Most output tokens of the request.
        max_tokens: u32,
        /// Most tokens of a sequence.
        limit: u32,
    },
    /// Alone in an empty pool, one of its sequences would still run out of memory.
    #[error("a sequence needs {needed} blocks of KV memory, there are {have}")]
    NeverFits {
        /// Blocks that one sequence holds at most.
        needed: u32,
        /// Blocks of the pool.
        have: u32,
    },
    /// The model sees a prompt only as a whole, and a step has no room for it.
    #[error(
        "{prompt} prompt tokens do not fit into one step of {limit}, and this model computes prompts whole"
    )]
    PromptTooLong {
        /// Prompt length.
        prompt: usize,
        /// Most tokens of a step.
        limit: u32,
    },
    /// The model can do only the other.
    #[error("the model cannot {}", match .0 { Task::Generate => "generate", Task::Pool => "pool" })]
    WrongTask(Task),
    /// Pooling draws nothing and has one answer.
    #[error("a pooling request with {max_tokens} output tokens and {choices} choices, not 0 and 1")]
    PoolingShape {
        /// Output tokens asked for.
        max_tokens: u32,
        /// Choices asked for.
        choices: u32,
    },
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// No choice, or more than anybody can mean.
    #[error("{choices} choices, the limit is {limit}")]
    Choices {
        /// Choices asked for.
        choices: u32,
        /// Most choices of a request.
        limit: u32,
    },
    /// A prompt token that the model does not have.
    #[error("prompt token {token} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: u32,
    },
    /// A request with this id is being served.
    #[error("request {0} is being served already")]
    DuplicateId(crate::ids::RequestId),
    /// The engine shuts down.
    #[error("the engine is stopping")]
    Stopping,
    /// The engine has ended by a fault.
    #[error("the engine is dead: {0}")]
    Dead(String),
}

/// Blocks that hold `tokens` tokens.
pub(crate) fn blocks_for(tokens: u32) -> u32 {
    tokens.div_ceil(BLOCK_TOKENS as u32)
}

/// Most blocks that a window of `window` tokens holds at once while two chunks of `chunk` tokens are under way:
/// a block is released only when the step that moved the window past it is collected.
fn window_blocks(window: u32, chunk: u32) -> u32 {
    let span = u64::from(window) - 1 + 2 * u64::from(chunk);
    u32::try_from((span + 14) / BLOCK_TOKENS as u64 + 1).unwrap_or(u32::MAX)
}

/// Most blocks that one sequence holds at once on its way to `tokens` tokens with KV, over all groups.
pub(crate) fn peak_blocks(groups: &[GroupKind], tokens: u32, chunk: u32) -> u32 {
    let all = blocks_for(tokens);
    groups.iter().fold(0, |sum: u32, group| {
        sum.saturating_add(match *group {
            GroupKind::Full => all,
            GroupKind::Window(n) => all.min(window_blocks(n, chunk)),
            GroupKind::Recurrent => 0,
        })
    })
}

/// Tokens whose KV a sequence ever needs: its last output token is never computed.
pub(crate) fn final_tokens(prompt: usize, max_tokens: u32) -> u32 {
    u32::try_from(prompt).unwrap_or(u32::MAX).saturating_add(max_tokens.saturating_sub(1))
}

/// Longest chunk of one row: short enough that the windows of one sequence, which cannot let go of blocks
/// while two chunks are under way, take at most half of the pool. A prompt that is computed whole has one chunk.
pub(crate) fn chunk_limit(geometry: &Geometry, budget: u32) -> u32 {
    if geometry.whole_prompts {
        return budget;
    }
    let usable = geometry.blocks.saturating_sub(1);
    let windows: Vec<GroupKind> =
        geometry.groups.iter().copied().filter(|group| matches!(group, GroupKind::Window(_))).collect();
    let mut chunk = budget.max(1);
    while chunk > BLOCK_TOKENS as u32 && peak_blocks(&windows, u32::MAX / 2, chunk) > usable / 2 {
        chunk = (chunk / 2).max(BLOCK_TOKENS as u32);
    }
    chunk
}

/// The limits that do not depend on what is running.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    /// Longest chunk of one row.
    chunk: u32,
    geometry: Geometry,
}

impl Door {
    pub(crate) fn new(config: &EngineConfig, geometry: &Geometry) -> Self {
        let budget = config.max_step_tokens.min(geometry.max_step_tokens);
        Self { chunk: chunk_limit(geometry, budget), geometry: geometry.clone() }
    }

    /// Longest prompt that could be served.
    pub(crate) fn max_prompt(&self) -> u32 {
        let context = self.geometry.max_context;
        if self.geometry.whole_prompts { context.min(self.chunk) } else { context }
    }

    /// Whether the request could be served by this engine if nothing else ran.
    pub(crate) fn check(&self, request: &EngineRequest) -> Result<(), AdmissionError> {
        let prompt = request.prompt.len();
        let geometry = &self.geometry;
        if !geometry.serves(request.task) {
            return Err(AdmissionError::WrongTask(request.task));
        }
        if prompt == 0 {
            return Err(AdmissionError::EmptyPrompt);
        }
        if request.task == Task::Pool && (request.max_tokens, request.choices) != (0, 1) {
            let (max_tokens, choices) = (request.max_tokens, request.choices);
            return Err(AdmissionError::PoolingShape { max_tokens, choices });
        }
        if request.choices == 0 || request.choices > MAX_CHOICES {
            return Err(AdmissionError::Choices { choices: request.choices, limit: MAX_CHOICES });
        }
        if prompt as u64 + u64::from(request.max_tokens) > u64::from(geometry.max_context) {
            let (max_tokens, limit) = (request.max_tokens, geometry.max_context);
            return Err(AdmissionError::TooLong { prompt, max_tokens, limit });
        }
        if geometry.whole_prompts && prompt > self.chunk as usize {
            return Err(AdmissionError::PromptTooLong { prompt, limit: self.chunk });
        }
        if let Some(&token) = request.prompt.iter().find(|&&token| token >= geometry.vocab) {
            return Err(AdmissionError::UnknownToken { token, vocab: geometry.vocab });
        }
        let needed = peak_blocks(&geometry.groups, final_tokens(prompt, request.max_tokens), self.chunk);
        let have = geometry.blocks.saturating_sub(1);
        if needed > have {
            return Err(AdmissionError::NeverFits { needed, have });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_never_needs_more_than_the_whole_sequence() {
        let groups = [GroupKind::Full, GroupKind::Window(32), GroupKind::Recurrent];
        assert_eq!(peak_blocks(&groups, 1, 64), 2);
        assert_eq!(peak_blocks(&groups, 33, 64), 6);
        // 31 tokens behind, 128 under way: 159 tokens touch at most 11 blocks.
        assert_eq!(peak_blocks(&groups, 1600, 64), 100 + 11);
    }

    #[test]
    fn window_blocks_is_the_true_maximum() {
        for window in 1..70u32 {
            for chunk in 1..40u32 {
                let span = window - 1 + 2 * chunk;
                let most = (0..16u32).map(|start| (start + span - 1) / 16 + 1).max();
                assert_eq!(most, Some(window_blocks(window, chunk)), "window {window}, chunk {chunk}");
            }
        }
    }

    #[test]
    fn the_chunk_shrinks_until_windows_fit_half_the_pool() {
        let geometry = Geometry {
            groups: vec![GroupKind::Window(32)],
            blocks: 21,
            slots: 4,
            snapshots: 0,
            max_step_tokens: 512,
            max_context: 4096,
            vocab: 10,
            generates: true,
            pools: false,
            whole_prompts: false,
        };
        let chunk = chunk_limit(&geometry, 512);
        assert!(window_blocks(32, chunk) <= 10, "chunk {chunk}");
        assert!(window_blocks(32, 2 * chunk) > 10, "chunk {chunk} could be longer");
        let full = Geometry { groups: vec![GroupKind::Full], ..geometry };
        assert_eq!(chunk_limit(&full, 512), 512);
    }

    #[test]
    fn the_last_output_token_needs_no_block() {
        assert_eq!(final_tokens(16, 1), 16);
        assert_eq!(final_tokens(16, 0), 16);
        assert_eq!(final_tokens(16, 2), 17);
    }
}
