//! The simulated device's memory: pages of cells that remember their prefix, and snapshots.

use std::sync::Arc;

use crate::ids::{BLOCK_TOKENS, BlockId, SeqId, SnapshotId, TokenId};
use crate::params::SamplingParams;
use crate::sim::draw::Context;
use crate::step::{BlockAppend, Geometry, GroupKind, SlotOpen};

/// A running sequence on the device.
pub(super) struct Slot {
    pub(super) seq: SeqId,
    pub(super) choice: u32,
    pub(super) sampling: Arc<SamplingParams>,
    pub(super) prompt_len: usize,
    /// Prompt and output.
    pub(super) tokens: Vec<TokenId>,
    /// Hash of `tokens`.
    pub(super) context: Context,
    /// Hash after each of `tokens`.
    prefixes: Vec<u64>,
    pub(super) computed: u32,
    pub(super) drew: bool,
    tables: Vec<Vec<BlockId>>,
    /// Recurrent state: the hash of the tokens that it has seen.
    state: u64,
}

impl Slot {
    pub(super) fn new(open: &SlotOpen, state: u64) -> Self {
        let tokens: Vec<TokenId> = open.prompt.iter().chain(&open.output).copied().collect();
        assert!((open.computed as usize) < tokens.len(), "one token of {} is always computed", open.seq);
        Self {
            seq: open.seq,
            choice: open.choice,
            sampling: Arc::clone(&open.sampling),
            prompt_len: open.prompt.len(),
            context: Context::of(&tokens),
            tokens,
            prefixes: Vec::new(),
            computed: open.computed,
            drew: false,
            tables: open.blocks.clone(),
            state,
        }
    }

    pub(super) fn append(&mut self, append: &BlockAppend) {
        let table = &mut self.tables[append.group as usize];
        assert_eq!(table.len(), append.index as usize, "a block of {} is left out", self.seq);
        assert_ne!(append.block, BlockId::NULL, "the reserved block is given out");
        table.push(append.block);
    }

    /// Hash of the tokens before `position`.
    fn prefix(&mut self, position: usize) -> u64 {
        if self.prefixes.is_empty() {
            self.prefixes.push(Context::new().value());
        }
        while self.prefixes.len() <= position {
            let done = self.prefixes.len() - 1;
            let mut context = Context::from_value(self.prefixes[done]);
            context.add(self.tokens[done]);
            self.prefixes.push(context.value());
        }
        self.prefixes[position]
    }
}

/// All pages and snapshots.
pub(super) struct Memory {
    /// For each page, for each of its tokens: (hash of the prefix up to and with the token) mixed with the group.
    cells: Vec<u64>,
    snapshots: Vec<Option<u64>>,
}

fn cell(prefix: u64, group: usize) -> u64 {
    prefix.rotate_left(group as u32) ^ group as u64
}

impl Memory {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self {
            cells: vec![0; geometry.blocks as usize * BLOCK_TOKENS],
            snapshots: vec![None; geometry.snapshots as usize],
        }
    }

    pub(super) fn save(&mut self, snapshot: SnapshotId, slot: &Slot) {
        self.snapshots[snapshot.0 as usize] = Some(slot.state);
    }

    /// The recurrent state that a slot starts from.
    pub(super) fn restore(&self, geometry: &Geometry, open: &SlotOpen) -> u64 {
        if let Some(snapshot) = open.restore {
            return self.snapshots[snapshot.0 as usize].expect("a snapshot is saved before it is restored");
        }
        let recurrent = geometry.groups.contains(&GroupKind::Recurrent);
        assert!(!recurrent || open.computed == 0, "{} starts in the middle without a state", open.seq);
        Context::new().value()
    }

    /// Computes the tokens `start..end`: writes their cells and moves the state.
    pub(super) fn write(&mut self, geometry: &Geometry, slot: &mut Slot, start: u32, end: u32) {
        for (group, kind) in geometry.groups.iter().enumerate() {
            if *kind == GroupKind::Recurrent {
                let own = slot.prefix(start as usize);
                assert_eq!(slot.state, own, "{} has another's recurrent state", slot.seq);
                continue;
            }
            for position in start as usize..end as usize {
                let block = slot.tables[group].get(position / BLOCK_TOKENS).copied().unwrap_or_default();
                assert_ne!(block, BlockId::NULL, "{} has no block for position {position}", slot.seq);
                let value = cell(slot.prefix(position + 1), group);
                self.cells[block.0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS] = value;
            }
        }
        slot.state = slot.prefix(end as usize);
    }

    /// Reads what the query at `start` attends to: all of it, or the ends and one cell between.
    pub(super) fn read(&self, geometry: &Geometry, slot: &mut Slot, start: u32, all: bool) {
        for (group, kind) in geometry.groups.iter().enumerate() {
            let first = match *kind {
                GroupKind::Full => 0,
                GroupKind::Window(window) => (start + 1).saturating_sub(window),
                GroupKind::Recurrent => continue,
            };
            if all {
                (first..start).for_each(|position| self.read_one(slot, group, position));
            } else if first < start {
                for position in [first, first + (start - first) / 2, start - 1] {
                    self.read_one(slot, group, position);
                }
            }
        }
    }

    fn read_one(&self, slot: &mut Slot, group: usize, position: u32) {
        let position = position as usize;
        let block = slot.tables[group][position / BLOCK_TOKENS];
        assert_ne!(block, BlockId::NULL, "{} lost the block of position {position} too early", slot.seq);
        let found = self.cells[block.0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS];
        let own = cell(slot.prefix(position + 1), group);
        assert_eq!(found, own, "{} reads another prefix at position {position} in block {block}", slot.seq);
    }
}
