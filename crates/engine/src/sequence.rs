//! What the scheduler knows of one sequence and of the request it belongs to.
//!
//! Owns positions and counts; it never touches the pool or the index.

use std::sync::Arc;

use crate::ids::{BLOCK_TOKENS, BlockId, RequestId, SeqId, SlotId, TokenId};
use crate::params::{SamplingParams, Task};
use crate::prefix::{BlockKey, NodeId, ROOT, Room};
use crate::request::{EngineRequest, SeqUsage};
use crate::step::{RowOutput, TokenLogprobs};
use crate::time::Time;

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A choice that waits for the first choice's prompt, in no queue.
    Held,
    /// In its tenant's queue.
    Waiting,
    /// Has a slot.
    Running,
    /// Ended, but a submitted step still names its slot and blocks.
    Draining,
}

/// One choice of one request.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// Index of the request.
    pub(crate) request: u32,
    /// The request's id, and how it draws: here for the inner loops.
    pub(crate) request_id: RequestId,
    pub(crate) sampling: Arc<SamplingParams>,
    pub(crate) task: Task,
    /// Index of the tenant.
    pub(crate) tenant: u32,
    pub(crate) choice: u32,
    pub(crate) stage: Stage,
    pub(crate) slot: SlotId,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) max_tokens: u32,
    /// Drawn and collected.
    pub(crate) output: Vec<TokenId>,
    /// Tokens that submitted rows compute: where the next row starts.
    pub(crate) planned: u32,
    /// Tokens that collected rows computed.
    pub(crate) committed: u32,
    /// Submitted steps, not yet collected, that name this sequence.
    pub(crate) inflight: u8,
    /// Of these, rows that draw a token.
    pub(crate) drawing: u8,
    /// The slot drew the last known token, so that the next row may say [`crate::RowInput::LastDrawn`].
    pub(crate) slot_drew: bool,
    /// Blocks for each group; [`BlockId::NULL`] where a window has passed. Positions are the same for all paged
    /// groups, so all tables have equal length; a recurrent group's stays empty.
    pub(crate) tables: Vec<Vec<BlockId>>,
    /// For each group, entries before this one are released.
    pub(crate) released: Vec<u32>,
    /// References that the tables hold.
    pub(crate) held: u32,
    /// Blocks that were promised to this sequence, held ones included.
    pub(crate) quota: u32,
    /// Of the promise, what is not held yet: `quota - held`, or 0. Nobody else may take these.
    pub(crate) outstanding: u32,
    /// Was promised all blocks it can ever need, and is never preempted.
    pub(crate) secured: bool,
    /// Should be preempted as soon as nothing in flight names it.
    pub(crate) marked: bool,
    /// Whether full blocks enter the prefix index.
    pub(crate) indexed: bool,
    /// The index's node of the last indexed block (pinned), or [`ROOT`].
    pub(crate) cursor: NodeId,
    /// Blocks up to the cursor.
    pub(crate) cursor_blocks: u32,
    /// Position of the last snapshot that was asked for.
    pub(crate) saved_at: u32,
    /// When it was first given a slot.
    pub(crate) scheduled: Option<Time>,
    /// [`crate::Event::Prefilled`] was sent.
    pub(crate) prefilled: bool,
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    /// Positions computed before the last preemption, for the count of waste.
    pub(crate) lost: u32,
    /// Blocks that the last vain attempt to admit would have needed.
    pub(crate) needs_obtainable: u32,
    /// Plan at which to try again whatever is obtainable.
    pub(crate) retry_at: u64,
    /// Admissions that went past it while it did not fit.
    pub(crate) bypassed: u32,
    pub(crate) usage: SeqUsage,
}

impl Sequence {
    pub(crate) fn new(
        id: SeqId,
        request: u32,
        tenant: u32,
        choice: u32,
        body: &EngineRequest,
        groups: usize,
    ) -> Self {
        Self {
            id,
            request,
            request_id: body.id,
            sampling: Arc::clone(&body.sampling),
            task: body.task,
            tenant,
            choice,
            stage: Stage::Held,
            slot: SlotId::default(),
            prompt: Arc::clone(&body.prompt),
            max_tokens: body.max_tokens,
            output: Vec::new(),
            planned: 0,
            committed: 0,
            inflight: 0,
            drawing: 0,
            slot_drew: false,
            tables: vec![Vec::new(); groups],
            released: vec![0; groups],
            held: 0,
            quota: 0,
            outstanding: 0,
            secured: false,
            marked: false,
            indexed: false,
            cursor: ROOT,
            cursor_blocks: 0,
            saved_at: 0,
            scheduled: None,
            prefilled: false,
            prompt_logprobs: Vec::new(),
            lost: 0,
            needs_obtainable: 0,
            retry_at: 0,
            bypassed: 0,
            usage: SeqUsage { prompt_tokens: body.prompt.len() as u32, ..SeqUsage::default() },
        }
    }

    pub(crate) fn prompt_len(&self) -> u32 {
        self.prompt.len() as u32
    }

    /// Tokens whose ids the host knows.
    pub(crate) fn known(&self) -> u32 {
        (self.prompt.len() + self.output.len()) as u32
    }

    /// Tokens drawn, those in flight included.
    pub(crate) fn drawn(&self) -> u32 {
        self.output.len() as u32 + u32::from(self.drawing)
    }

    /// Whether another row makes sense: some known token is not computed, or a drawn one has a successor to draw.
    pub(crate) fn wants_row(&self) -> bool {
        self.planned < self.prompt_len() || self.drawn() < self.max_tokens
    }

    /// Whether the next row computes the token drawn last, and only that.
    pub(crate) fn decodes(&self) -> bool {
        self.slot_drew
    }

    /// What comes out of a row that computes known tokens up to `end`.
    pub(crate) fn output_at(&self, end: u32) -> RowOutput {
        match self.task {
            _ if end < self.known() => RowOutput::Nothing,
            Task::Pool => RowOutput::Pool,
            Task::Generate if self.drawn() < self.max_tokens => RowOutput::Sample,
            Task::Generate => RowOutput::Nothing,
        }
    }

    /// A known token by position.
    pub(crate) fn token(&self, position: u32) -> TokenId {
        let position = position as usize;
        if position < self.prompt.len() {
            self.prompt[position]
        } else {
            self.output[position - self.prompt.len()]
        }
    }

    /// Tokens of a block that is wholly known.
    pub(crate) fn block_key(&self, block: u32) -> BlockKey {
        let start = block as usize * BLOCK_TOKENS;
        if let Some(slice) = self.prompt.get(start..start + BLOCK_TOKENS) {
            return slice.try_into().expect("the slice has this length");
        }
        std::array::from_fn(|i| self.token((start + i) as u32))
    }

    /// Appends the known tokens `start..end` to `out`.
    pub(crate) fn copy_tokens(&self, start: u32, end: u32, out: &mut Vec<TokenId>) {
        let (start, end, prompt) = (start as usize, end as usize, self.prompt.len());
        if start < prompt {
            out.extend_from_slice(&self.prompt[start..end.min(prompt)]);
        }
        if end > prompt {
            out.extend_from_slice(&self.output[start.max(prompt) - prompt..end - prompt]);
        }
    }
}

/// One request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) body: EngineRequest,
    pub(crate) room: Room,
    /// Order of arrival.
    pub(crate) arrival: u64,
    /// Sequences that have not ended, in order of their choice.
    pub(crate) alive: Vec<u32>,
    /// Sequences that are not removed yet.
    pub(crate) remaining: u32,
    /// The sequence whose prompt the held ones wait for.
    pub(crate) leader: Option<u32>,
    /// No sequence has had a slot yet.
    pub(crate) queued: bool,
    /// Preemptions of all its sequences, and its running sequences that could still be preempted. The sum never
    /// exceeds [`crate::scheduler::MAX_PREEMPTIONS`].
    pub(crate) preemptions: u32,
    pub(crate) preemptible: u32,
}

impl Request {
    /// Whether full blocks of this request are looked up in the index.
    pub(crate) fn looks_up(&self, caching: bool) -> bool {
        (caching || self.body.choices > 1) && self.body.sampling.prompt_logprobs.is_none()
    }
}
