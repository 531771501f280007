//! Blocks, promises of blocks, and snapshots of one sequence.
//!
//! Owns every call to the pool and the upkeep of [`Scheduler::reserved`]; the invariant
//! `reserved <= pool.obtainable()` holds between any two calls.

use super::{Save, Scheduler};
use crate::ids::{BLOCK_TOKENS, BlockId, SnapshotId};
use crate::pool::Owner;
use crate::prefix::ROOT;
use crate::sequence::Sequence;
use crate::step::{BlockAppend, SnapshotSave, StepPlan};

impl Scheduler {
    /// Pages that nobody holds and nobody was promised.
    pub(super) fn spare_pages(&self) -> u32 {
        self.pool.obtainable() - self.reserved
    }

    /// Pages that this sequence could take now.
    pub(super) fn takeable(&self, seq: &Sequence) -> u32 {
        seq.outstanding + self.spare_pages()
    }

    /// Entries of the sequence's block tables.
    pub(super) fn table_len(&self, seq: &Sequence) -> u32 {
        self.paged.first().map_or(0, |&group| seq.tables[group].len() as u32)
    }

    /// Makes the outstanding promise follow quota and holdings.
    pub(super) fn rebalance(&mut self, s: u32) {
        let seq = &mut self.seqs[s];
        let outstanding = seq.quota.saturating_sub(seq.held);
        self.reserved = self.reserved - seq.outstanding + outstanding;
        seq.outstanding = outstanding;
    }

    /// Gives the sequence blocks for all positions before `end`; the caller has checked [`Self::takeable`].
    pub(super) fn grow(&mut self, s: u32, end: u32, plan: &mut StepPlan) {
        let from = self.table_len(&self.seqs[s]);
        let to = end.div_ceil(BLOCK_TOKENS as u32);
        if self.paged.is_empty() || to <= from {
            return;
        }
        for index in from..to {
            for at in 0..self.paged.len() {
                let group = self.paged[at];
                let block = self.take_page();
                let seq = &mut self.seqs[s];
                seq.tables[group].push(block);
                seq.held += 1;
                plan.appends.push(BlockAppend { slot: seq.slot, group: group as u16, index, block });
            }
        }
        self.fair.tenant_mut(self.seqs[s].tenant).blocks += u64::from(to - from) * self.paged.len() as u64;
        self.rebalance(s);
    }

    fn take_page(&mut self) -> BlockId {
        let (page, evicted) = self.pool.alloc().expect("what is taken was promised or spare");
        if let Some(owner) = evicted {
            self.counters.evictions += 1;
            self.index.detach(owner.node, owner.group as usize);
        }
        BlockId(page)
    }

    /// Releases the blocks that no query from position `committed` on can see.
    pub(super) fn pass_windows(&mut self, s: u32) {
        let mut passed = 0;
        for at in 0..self.windows.len() {
            let (group, window) = self.windows[at];
            let seq = &mut self.seqs[s];
            let first = (seq.committed + 1).saturating_sub(window) / BLOCK_TOKENS as u32;
            let first = first.min(seq.tables[group].len() as u32);
            for index in seq.released[group]..first {
                let entry = &mut seq.tables[group][index as usize];
                let block = std::mem::replace(entry, BlockId::NULL);
                let last = self.pool.release(block.0);
                seq.held -= 1;
                passed += 1;
                if !last {
                    // Somebody else still holds the page, so that the promise to get one back cannot be kept.
                    // The sequence furthest behind always gets its pages back, which is why this cannot
                    // end in a deadlock.
                    seq.quota = seq.quota.saturating_sub(1);
                }
            }
            seq.released[group] = seq.released[group].max(first);
        }
        if passed > 0 {
            self.fair.tenant_mut(self.seqs[s].tenant).blocks -= passed;
            self.rebalance(s);
        }
    }

    /// Lets go of all blocks, the promise and the place in the index. Last blocks go first: a prefix is worth
    /// more than what follows it, so it must be evicted later.
    pub(super) fn release_memory(&mut self, s: u32) {
        let seq = &mut self.seqs[s];
        for (table, released) in seq.tables.iter_mut().zip(&mut seq.released) {
            for block in table.drain(..).rev() {
                if block != BlockId::NULL {
                    self.pool.release(block.0);
                }
            }
            *released = 0;
        }
        self.fair.tenant_mut(seq.tenant).blocks -= u64::from(seq.held);
        seq.held = 0;
        seq.quota = 0;
        let cursor = std::mem::replace(&mut seq.cursor, ROOT);
        seq.cursor_blocks = 0;
        self.index.unpin(cursor);
        self.rebalance(s);
    }

    /// Puts the full blocks that a commit completed into the index.
    pub(super) fn index_blocks(&mut self, s: u32) {
        loop {
            let seq = &self.seqs[s];
            let block = seq.cursor_blocks;
            if !seq.indexed || (block + 1) * BLOCK_TOKENS as u32 > seq.committed {
                return;
            }
            let (key, room, parent) = (seq.block_key(block), self.requests[seq.request].room, seq.cursor);
            self.thin_index();
            let node = self.index.insert(room, parent, &key);
            if let Some(node) = node {
                self.index.pin(node);
                for &group in &self.paged {
                    let page = self.seqs[s].tables[group][block as usize];
                    if page != BlockId::NULL && self.index.attach(node, group, page) {
                        self.pool.set_owner(page.0, Owner { node, group: group as u16 });
                    }
                }
            }
            self.index.unpin(parent);
            let seq = &mut self.seqs[s];
            seq.indexed = node.is_some();
            seq.cursor = node.unwrap_or(ROOT);
            seq.cursor_blocks = if node.is_some() { block + 1 } else { 0 };
        }
    }

    /// Gives cached pages and snapshots up until the index has room for another node, if that helps.
    fn thin_index(&mut self) {
        while self.index.is_full() {
            if let Some(owner) = self.pool.evict() {
                self.index.detach(owner.node, owner.group as usize);
            } else if let Some(owner) = self.snapshots.evict() {
                self.index.detach_snapshot(owner.node);
            } else {
                return;
            }
            self.counters.evictions += 1;
        }
    }

    /// First position after `position` at which a snapshot is worth having: regularly, and at the end of the
    /// prompt's full blocks, where the next turn of a conversation continues.
    pub(super) fn next_snapshot_point(&self, seq: &Sequence, position: u32) -> Option<u32> {
        if self.snapshot_interval == 0 || !seq.indexed {
            return None;
        }
        let regular = (position / self.snapshot_interval + 1) * self.snapshot_interval;
        let prompt = last_full_block(seq.prompt_len());
        Some(if prompt > position { regular.min(prompt) } else { regular })
    }

    /// Saves the slot's state if the previous row ended on a snapshot point.
    pub(super) fn save_snapshot(&mut self, s: u32, plan: &mut StepPlan, saves: &mut Vec<Save>) {
        let seq = &self.seqs[s];
        let here = seq.planned;
        if here == 0 || seq.saved_at == here || self.next_snapshot_point(seq, here - 1) != Some(here) {
            return;
        }
        let (slot, id) = (seq.slot, seq.id);
        self.seqs[s].saved_at = here;
        // None where every snapshot is being saved this very moment.
        let Some((page, evicted)) = self.snapshots.alloc() else { return };
        if let Some(owner) = evicted {
            self.index.detach_snapshot(owner.node);
        }
        plan.saves.push(SnapshotSave { slot, snapshot: SnapshotId(page) });
        saves.push(Save { seq: s, id, position: here, snapshot: SnapshotId(page) });
    }

    /// A step that saved a snapshot was collected: the index may find it, unless the sequence has moved or the
    /// index has one already. Rows are committed after saves, so the sequence still stands where it was saved.
    pub(super) fn settle_snapshot(&mut self, save: Save) {
        let Save { id, position, snapshot, .. } = save;
        let here = self.seqs.get(save.seq).filter(|seq| {
            let indexed = seq.cursor_blocks * BLOCK_TOKENS as u32;
            seq.id == id && seq.indexed && seq.committed == position && indexed == position
        });
        if let Some(node) = here.map(|seq| seq.cursor)
            && self.index.attach_snapshot(node, snapshot)
        {
            self.snapshots.set_owner(snapshot.0, Owner { node, group: 0 });
        }
        self.snapshots.release(snapshot.0);
    }
}

/// Tokens of a prompt that full blocks hold while its last token is still to be computed.
pub(super) fn last_full_block(tokens: u32) -> u32 {
    tokens.saturating_sub(1) / BLOCK_TOKENS as u32 * BLOCK_TOKENS as u32
}
