//! What the host remembers of running sequences: a mirror of the device's block tables, and sampling histories.
//!
//! Owns both, and the list of what changed in the tables since the last upload. It trusts the engine's lifetimes but
//! checks every index: a plan that does not fit the layout is an error with numbers, not a write into somebody else's
//! pages. Never: device memory.

use std::ops::Range;

use mirai_engine::{BlockAppend, SlotId, SlotOpen, SnapshotId, StepPlan, TokenId};
use mirai_model::backend::{BackendError, CacheLayout, GroupLayout, Result};

use crate::error::device;
use crate::history::History;

/// Entries of a table that are uploaded together: 16 bytes.
pub(crate) const GRANULE: usize = 4;

/// A running sequence.
#[derive(Default)]
struct Slot {
    /// None before the first sequence.
    history: Option<History>,
    /// Counts sequences, so that a token of the one before is not taken for one of this.
    epoch: u64,
    /// The last token before a preemption, until the device has drawn one.
    resumed: Option<TokenId>,
}

/// Names a sequence in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tenancy {
    slot: SlotId,
    epoch: u64,
}

/// What the device must do for a slot's new sequence, beside its tables.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    /// The slot.
    pub(crate) slot: SlotId,
    /// Where recurrent states start from; none: from zero.
    pub(crate) restore: Option<SnapshotId>,
    /// Whether penalties need its tokens counted.
    pub(crate) counts: bool,
}

/// All slots, and one more whose tables name page 0 alone: that of padding rows.
#[derive(Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// `[groups][slots + 1][table_len]`.
    tables: Vec<u32>,
    /// Whether a group has tables.
    paged: Vec<bool>,
    table_len: usize,
    blocks: usize,
    /// Granules that differ from the device's.
    changed: Vec<u32>,
    /// Entries that the sequence before left behind those of a new one: zero here, and to be zeroed on the device before the
    /// changes go up. They are cleared there, because uploading so many zeros would take the room of what is new.
    pub(crate) stale: Vec<Range<usize>>,
}

impl Slots {
    pub(crate) fn new(layout: &CacheLayout) -> Self {
        let table_len = layout.table_len.next_multiple_of(GRANULE);
        Self {
            slots: (0..layout.slots).map(|_| Slot::default()).collect(),
            tables: vec![0; layout.groups.len() * (layout.slots + 1) * table_len],
            paged: layout.groups.iter().map(|group| matches!(group, GroupLayout::Paged(_))).collect(),
            table_len,
            blocks: layout.blocks,
            changed: Vec::new(),
            stale: Vec::new(),
        }
    }

    /// Entries of all tables of one group.
    fn group_entries(&self) -> usize {
        (self.slots.len() + 1) * self.table_len
    }

    /// The slot of padding rows.
    pub(crate) fn reserved(&self) -> u32 {
        self.slots.len() as u32
    }

    fn get(&self, id: SlotId) -> Result<&Slot> {
        self.slots.get(id.0 as usize).ok_or_else(|| no_slot(id, self.slots.len()))
    }

    fn get_mut(&mut self, id: SlotId) -> Result<&mut Slot> {
        let count = self.slots.len();
        self.slots.get_mut(id.0 as usize).ok_or_else(|| no_slot(id, count))
    }

    /// How the sequence in a slot draws.
    pub(crate) fn history(&self, id: SlotId) -> Result<&History> {
        let history = self.get(id)?.history.as_ref();
        history.ok_or_else(|| device("begin", format!("slot {id} was never opened")))
    }

    /// The sequence in a slot.
    pub(crate) fn tenancy(&self, slot: SlotId) -> Result<Tenancy> {
        Ok(Tenancy { slot, epoch: self.get(slot)?.epoch })
    }

    /// The last token of a sequence that goes on after a preemption, unless the device has drawn one since.
    pub(crate) fn resumed(&self, id: SlotId) -> Result<Option<TokenId>> {
        Ok(self.get(id)?.resumed)
    }

    /// The device is about to draw for a slot.
    pub(crate) fn draws(&mut self, id: SlotId) -> Result<()> {
        self.get_mut(id)?.resumed = None;
        Ok(())
    }

    /// Records a token that the device drew, unless the slot has another sequence by now.
    pub(crate) fn drawn(&mut self, tenancy: Tenancy, token: TokenId) {
        if let Some(slot) = self.slots.get_mut(tenancy.slot.0 as usize)
            && slot.epoch == tenancy.epoch
            && let Some(history) = &mut slot.history
        {
            history.push(token);
        }
    }

    /// Applies a plan's opens and appends to tables and histories, and lists what else is to be done for the opened.
    pub(crate) fn apply(&mut self, plan: &StepPlan, opened: &mut Vec<Opened>) -> Result<()> {
        opened.clear();
        for open in &plan.opens {
            self.open(open)?;
            let counts = self.history(open.slot)?.counts();
            opened.push(Opened { slot: open.slot, restore: open.restore, counts });
        }
        plan.appends.iter().try_for_each(|append| self.append(append))
    }

    fn open(&mut self, open: &SlotOpen) -> Result<()> {
        if open.blocks.len() != self.paged.len() {
            let (given, groups) = (open.blocks.len(), self.paged.len());
            return Err(device("begin", format!("{given} block tables for {groups} layer groups")));
        }
        self.get(open.slot)?;
        for (group, given) in open.blocks.iter().enumerate() {
            if !self.paged[group] {
                continue;
            }
            if given.len() > self.table_len {
                let (len, slot, most) = (given.len(), open.slot, self.table_len);
                return Err(device("begin", format!("a table of {len} blocks in slot {slot} of {most}")));
            }
            for (index, block) in given.iter().enumerate() {
                self.set(group, open.slot, index, block.0)?;
            }
            self.clear_behind(group, open.slot, given.len());
        }
        let history = History::new(open.sampling.clone(), open.prompt.clone(), open.choice, &open.output);
        let slot = self.get_mut(open.slot)?;
        slot.history = Some(history);
        slot.epoch += 1;
        slot.resumed = Some(open.output.last().copied().unwrap_or(0));
        Ok(())
    }

    /// Entries of the sequence that was in a slot before must not stay reachable.
    fn clear_behind(&mut self, group: usize, slot: SlotId, kept: usize) {
        let first = self.entry(group, slot, kept);
        let behind = &mut self.tables[first..first + self.table_len - kept];
        if let Some(last) = behind.iter().rposition(|block| *block != 0) {
            behind[..=last].fill(0);
            self.stale.push(first..first + last + 1);
        }
    }

    fn append(&mut self, append: &BlockAppend) -> Result<()> {
        let (group, index) = (usize::from(append.group), append.index as usize);
        self.get(append.slot)?;
        match self.paged.get(group) {
            Some(true) if index < self.table_len => self.set(group, append.slot, index, append.block.0),
            Some(true) => {
                let len = self.table_len;
                Err(device("begin", format!("entry {index} of a block table of {len}")))
            }
            _ => {
                let groups = self.paged.len();
                Err(device("begin", format!("layer group {group} of {groups} has no block tables")))
            }
        }
    }

    /// Where in all tables an entry is.
    fn entry(&self, group: usize, slot: SlotId, index: usize) -> usize {
        group * self.group_entries() + slot.0 as usize * self.table_len + index
    }

    fn set(&mut self, group: usize, slot: SlotId, index: usize, block: u32) -> Result<()> {
        if block as usize >= self.blocks.max(1) {
            return Err(device("begin", format!("block {block} of {}", self.blocks)));
        }
        let at = self.entry(group, slot, index);
        if self.tables[at] != block {
            self.tables[at] = block;
            let granule = (at / GRANULE) as u32;
            if self.changed.last() != Some(&granule) {
                self.changed.push(granule);
            }
        }
        Ok(())
    }

    /// Granules of the tables that differ from the device's, each once: its number and its entries. They count as uploaded.
    pub(crate) fn take_changes(&mut self, out: &mut Vec<(u32, [u32; GRANULE])>) {
        self.changed.sort_unstable();
        self.changed.dedup();
        out.clear();
        let tables = self.tables.as_chunks::<GRANULE>().0;
        out.extend(self.changed.drain(..).map(|granule| (granule, tables[granule as usize])));
    }
}

fn no_slot(id: SlotId, count: usize) -> BackendError {
    device("begin", format!("slot {id} of {count}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use mirai_engine::{BlockId, SamplingParams, SeqId};
    use mirai_model::backend::{CacheDtype, DeltaShape, PageLayout, StateLayout, Stored};

    use super::*;
    use crate::upload::Counts;

    fn slots() -> Slots {
        let pages = PageLayout {
            layers: 1,
            kv_heads: 1,
            key_dim: 8,
            value_dim: 8,
            stored: Stored::KeysAndValues,
            dtype: CacheDtype::Bf16,
        };
        let shape = DeltaShape { k_heads: 1, v_heads: 1, k_dim: 4, v_dim: 4, taps: 2 };
        let state = StateLayout { layers: 1, shape };
        Slots::new(&CacheLayout {
            groups: vec![GroupLayout::Paged(pages), GroupLayout::Recurrent(state)],
            blocks: 10,
            slots: 2,
            snapshots: 0,
            table_len: 6,
        })
    }

    fn open(slot: u32, blocks: &[u32]) -> SlotOpen {
        SlotOpen {
            slot: SlotId(slot),
            seq: SeqId(0),
            choice: 0,
            sampling: Arc::new(SamplingParams { bad_words: vec![vec![1, 2]], ..Default::default() }),
            prompt: Arc::from([1, 2]),
            output: vec![5],
            computed: 0,
            blocks: vec![blocks.iter().map(|b| BlockId(*b)).collect(), vec![]],
            restore: None,
        }
    }

    fn append(slot: u32, group: u16, index: u32, block: u32) -> BlockAppend {
        BlockAppend { slot: SlotId(slot), group, index, block: BlockId(block) }
    }

    fn apply(slots: &mut Slots, opens: Vec<SlotOpen>, appends: Vec<BlockAppend>) -> Result<Vec<Opened>> {
        let mut opened = Vec::new();
        let plan = StepPlan { opens, appends, ..StepPlan::default() };
        slots.apply(&plan, &mut opened).map(|()| opened)
    }

    #[test]
    fn changes_are_whole_granules_once() {
        let mut s = slots();
        let mut changes = Vec::new();
        assert_eq!((s.table_len, s.group_entries(), s.reserved(), s.tables.len()), (8, 24, 2, 48));
        let opened = apply(&mut s, vec![open(1, &[3, 4])], vec![append(1, 0, 2, 7), append(1, 0, 4, 9)]);
        assert_eq!(opened.unwrap().len(), 1);
        s.take_changes(&mut changes);
        assert_eq!(changes, [(2, [3, 4, 7, 0]), (3, [9, 0, 0, 0])]);
        s.take_changes(&mut changes);
        assert_eq!(changes, []);
        // Only what differs is uploaded, and nothing of the sequence before stays.
        apply(&mut s, vec![open(1, &[3, 5])], vec![]).unwrap();
        s.take_changes(&mut changes);
        assert_eq!(changes, [(2, [3, 5, 0, 0])]);
        assert_eq!(std::mem::take(&mut s.stale).pop(), Some(10..13));
        apply(&mut s, vec![open(1, &[3, 5])], vec![]).unwrap();
        s.take_changes(&mut changes);
        assert_eq!((changes.len(), s.stale.len()), (0, 0));
    }

    /// A slot that had a long sequence gets a short one beside a prompt in several groups: one upload has room for all.
    #[test]
    fn a_prefill_of_several_groups_has_room_for_its_pages() {
        let pages = PageLayout {
            layers: 1,
            kv_heads: 1,
            key_dim: 8,
            value_dim: 8,
            stored: Stored::KeysAndValues,
            dtype: CacheDtype::Bf16,
        };
        let (groups, tokens, table_len) = (6, 8192, 4096);
        let mut s = Slots::new(&CacheLayout {
            groups: vec![GroupLayout::Paged(pages); groups],
            blocks: 1 << 20,
            slots: 2,
            snapshots: 0,
            table_len,
        });
        let mut changes = Vec::new();
        let sequence = |slot, blocks: std::ops::Range<u32>| SlotOpen {
            blocks: vec![blocks.map(BlockId).collect(); groups],
            ..open(slot, &[])
        };
        apply(&mut s, vec![sequence(0, 1..4097)], vec![]).unwrap();
        s.take_changes(&mut changes);
        // One whole prompt, and the unaligned end of another: 2,048 tokens and 6,144.
        let opens = vec![sequence(0, 5000..5128)];
        let appends = (0..groups as u16)
            .flat_map(|group| (3..387).map(move |index| append(1, group, index, 6000 + index)));
        apply(&mut s, opens, appends.collect()).unwrap();
        s.take_changes(&mut changes);
        let counts = Counts { tokens, rows: 2, groups, ..Counts::default() };
        let room = counts.granules();
        assert!(changes.len() > 64 + 2 * groups && changes.len() <= room, "{} of {room}", changes.len());
        assert_eq!(s.stale.len(), groups);
    }

    #[test]
    fn plans_that_do_not_fit_are_errors_with_numbers() {
        let table = [
            (vec![open(2, &[])], vec![], "slot 2 of 2"),
            (vec![open(0, &[10])], vec![], "block 10 of 10"),
            (vec![open(0, &[1; 9])], vec![], "a table of 9 blocks in slot 0 of 8"),
            (vec![], vec![append(5, 0, 0, 1)], "slot 5 of 2"),
            (vec![], vec![append(0, 0, 8, 1)], "entry 8 of a block table of 8"),
            (vec![], vec![append(0, 1, 0, 1)], "layer group 1 of 2 has no"),
            (vec![], vec![append(0, 2, 0, 1)], "layer group 2 of 2 has no"),
            (vec![], vec![append(0, 0, 0, 11)], "block 11 of 10"),
        ];
        for (opens, appends, words) in table {
            let error = apply(&mut slots(), opens, appends).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let mut few = open(0, &[]);
        few.blocks.pop();
        let error = apply(&mut slots(), vec![few], vec![]).unwrap_err().to_string();
        assert!(error.contains("1 block tables for 2"), "{error}");
        assert!(slots().history(SlotId(0)).unwrap_err().to_string().contains("never opened"));
    }

    #[test]
    fn tokens_go_to_the_sequence_that_drew_them() {
        let mut s = slots();
        apply(&mut s, vec![open(0, &[])], vec![]).unwrap();
        assert_eq!(s.resumed(SlotId(0)).unwrap(), Some(5));
        let before = s.tenancy(SlotId(0)).unwrap();
        s.draws(SlotId(0)).unwrap();
        assert_eq!(s.resumed(SlotId(0)).unwrap(), None);
        apply(&mut s, vec![open(0, &[])], vec![]).unwrap();
        let now = s.tenancy(SlotId(0)).unwrap();
        assert_ne!(before, now);
        let seen = |s: &Slots| format!("{:?}", s.history(SlotId(0)).unwrap());
        let fresh = seen(&s);
        s.drawn(before, 1);
        assert_eq!(seen(&s), fresh);
        s.drawn(now, 1);
        assert_ne!(seen(&s), fresh);
    }
}
