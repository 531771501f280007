//! One step, as the scheduler plans it and the executor answers it.
//!
//! Owns the plain data that crosses that boundary. A plan carries only what changed: block tables and sampling
//! state live in the executor's slots, so the cost of a step does not grow with the length of its sequences.
//! It never holds a tensor.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::ids::{BlockId, SeqId, SlotId, SnapshotId, TokenId};
use crate::params::{SamplingParams, Task};

/// What a group of layers keeps of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Keys and values of every token.
    Full,
    /// Keys and values of the last `n` tokens, the current one included: a query at position `p` sees
    /// `p - n + 1 ..= p`.
    Window(u32),
    /// One state of fixed size in the slot; no blocks. Snapshots make prefixes reusable.
    Recurrent,
}

/// What the executor has room for. Fixed once it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Layer groups; an index into this list names a group everywhere. A paged group takes one page of the
    /// shared pool for each 16 tokens.
    pub groups: Vec<GroupKind>,
    /// Pages in the pool, the reserved page 0 included.
    pub blocks: u32,
    /// Sequences that can run at once.
    pub slots: u32,
    /// Snapshots of recurrent state that can be kept; 0 without recurrent groups.
    pub snapshots: u32,
    /// Most tokens in one step.
    pub max_step_tokens: u32,
    /// Most tokens, prompt and output together, of one sequence.
    pub max_context: u32,
    /// Width of the logits; token ids are below it.
    pub vocab: u32,
    /// Whether the model can continue a prompt ([`RowOutput::Sample`]).
    pub generates: bool,
    /// Whether it can answer with numbers about the prompt ([`RowOutput::Pool`]).
    pub pools: bool,
    /// Every token of a prompt sees every other, as in a bidirectional encoder: a prompt is computed as one row
    /// or not at all, takes nothing from the prefix index and enters nothing. Only then may `groups` be empty
    /// and `blocks` 0. Excludes `generates`.
    pub whole_prompts: bool,
}

impl Geometry {
    /// Whether requests with this task can be served.
    #[must_use]
    pub fn serves(&self, task: Task) -> bool {
        match task {
            Task::Generate => self.generates,
            Task::Pool => self.pools,
        }
    }
}

/// Everything the executor needs for one step. Executed in the order of the fields.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Counts up by one.
    pub step: u64,
    /// Snapshots taken of slots as the previous step left them.
    pub saves: Vec<SnapshotSave>,
    /// Slots given to sequences. Replaces whatever the slot held.
    pub opens: Vec<SlotOpen>,
    /// Blocks added to the tables of open slots.
    pub appends: Vec<BlockAppend>,
    /// Token ids of the rows with [`RowInput::Tokens`], back to back.
    pub tokens: Vec<TokenId>,
    /// The batch: decoding rows first, then prefill chunks. Every slot occurs at most once.
    pub rows: Vec<Row>,
}

/// Copies a slot's recurrent state into a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotSave {
    /// Where from.
    pub slot: SlotId,
    /// Where to.
    pub snapshot: SnapshotId,
}

/// Gives a slot to a sequence: a fresh one, or one that was preempted and is computed again.
#[derive(Clone, Debug)]
pub struct SlotOpen {
    /// The slot.
    pub slot: SlotId,
    /// The sequence.
    pub seq: SeqId,
    /// Which choice of its request: part of the RNG key.
    pub choice: u32,
    /// How it draws.
    pub sampling: Arc<SamplingParams>,
    /// The request's prompt (for penalties, bad words and prompt log-probabilities).
    pub prompt: Arc<[TokenId]>,
    /// Tokens drawn before a preemption; they are recomputed as if they were prompt.
    pub output: Vec<TokenId>,
    /// Tokens whose KV is already there: the rows of this sequence start at this position.
    pub computed: u32,
    /// For each group, the table of the blocks that hold them ([`BlockId::NULL`] where a window has passed).
    pub blocks: Vec<Vec<BlockId>>,
    /// The snapshot that recurrent groups start from; without one they start from zero.
    pub restore: Option<SnapshotId>,
}

/// One more block for a slot: position `p` of the sequence lives in entry `p / 16` of its group's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockAppend {
    /// The slot.
    pub slot: SlotId,
    /// Index into [`Geometry::groups`].
    pub group: u16,
    /// Entry of the table that this block becomes.
    pub index: u32,
    /// The block.
    pub block: BlockId,
}

/// Consecutive tokens of one sequence in this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The sequence.
    pub seq: SeqId,
    /// Its slot.
    pub slot: SlotId,
    /// Position of the first token.
    pub start: u32,
    /// Tokens; at least 1.
    pub len: u32,
    /// Where their ids come from.
    pub input: RowInput,
    /// What comes out after the last of them.
    pub output: RowOutput,
}

/// Where the ids of a row's tokens come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowInput {
    /// `len` ids of [`StepPlan::tokens`] from this offset.
    Tokens(u32),
    /// The token that the slot drew last, which the host may not know yet; `len` is 1.
    LastDrawn,
}

/// What a row yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOutput {
    /// Nothing: a prefill chunk with more to come.
    Nothing,
    /// A token, drawn for position `start + len`. The RNG key is (seed, choice, that position).
    Sample,
    /// What the model's pooling head makes of the sequence, whose last token this row computes.
    Pool,
}

/// What the executor answers to one plan.
#[derive(Clone, Debug, Default)]
pub struct StepOutcome {
    /// The plan's number.
    pub step: u64,
    /// Drawn tokens of all rows, in row order.
    pub tokens: Vec<TokenId>,
    /// One for each row of the plan, in its order.
    pub rows: Vec<RowOutcome>,
    /// How long the device worked on the step.
    pub device_time: Duration,
}

/// What became of one row.
#[derive(Clone, Debug, Default)]
pub struct RowOutcome {
    /// Its tokens in [`StepOutcome::tokens`]: empty, or one (several once drafts are verified).
    pub tokens: Range<u32>,
    /// What the pooling head gave, for rows with [`RowOutput::Pool`], which have no tokens: an embedding, before
    /// any normalisation, or a classifier's logits. All of one model have the same length.
    pub pooled: Option<Box<[f32]>>,
    /// Set if the row failed. It then has no tokens, and the sequence ends.
    pub fault: Option<RowFault>,
    /// Only where they were asked for.
    pub logprobs: Option<Box<RowLogprobs>>,
}

/// Log-probabilities of one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowLogprobs {
    /// One for each drawn token.
    pub drawn: Vec<TokenLogprobs>,
    /// For the row's positions `start + 1 ..= start + len` that are still prompt: one entry for each.
    pub prompt: Vec<TokenLogprobs>,
}

/// Log-probability (natural logarithm) of one token, before temperature and truncation, after nothing else:
/// the model's own distribution.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// Its place in the order of probability, from 1.
    pub rank: u32,
    /// The most likely tokens, most likely first; equal ones by id.
    pub top: Vec<(TokenId, f32)>,
}

/// Why one row failed while the device is fine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowFault {
    /// A logit was NaN or infinite where no mask put it, or a pooled number was.
    #[error("a number that the model computed is not finite")]
    NonFinite,
    /// Every token was made impossible by bias, allowed ids, bad words or min_tokens.
    #[error("no token is possible")]
    NothingAllowed,
    /// Code that works on this row alone panicked.
    #[error("panic: {0}")]
    Panic(String),
}
