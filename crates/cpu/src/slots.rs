//! What the backend remembers of a running sequence between steps.
//!
//! Owns block tables, the last drawn token and the sampling history of each slot, and applies a plan's changes to
//! them. It trusts the engine's lifetimes but checks every index: a plan that does not fit the layout is an error
//! with numbers, not a write into somebody else's pages.

use mirai_engine::{BlockAppend, SlotId, SlotOpen, StepPlan, TokenId};
use mirai_model::backend::{BackendError, CacheLayout, GroupLayout, Result};

use crate::cache::Cache;
use crate::linear::device;
use crate::sampling::History;

/// A running sequence.
#[derive(Default)]
pub(crate) struct Slot {
    /// For each layer group, the page of each 16 tokens; empty for recurrent ones. As long as the layout allows from
    /// the start, so that a step allocates nothing.
    pub(crate) tables: Vec<Vec<u32>>,
    pub(crate) last_drawn: TokenId,
    /// None before the first sequence.
    pub(crate) history: Option<History>,
}

/// All slots.
#[derive(Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    blocks: usize,
}

impl Slots {
    pub(crate) fn new(layout: &CacheLayout) -> Self {
        let table = |group: &GroupLayout| match group {
            GroupLayout::Paged(_) => vec![0; layout.table_len],
            GroupLayout::Recurrent(_) => Vec::new(),
        };
        let slot = || Slot { tables: layout.groups.iter().map(table).collect(), ..Slot::default() };
        Self { slots: (0..layout.slots).map(|_| slot()).collect(), blocks: layout.blocks }
    }

    pub(crate) fn get(&self, id: SlotId) -> Result<&Slot> {
        self.slots.get(id.0 as usize).ok_or_else(|| no_slot(id, self.slots.len()))
    }

    pub(crate) fn get_mut(&mut self, id: SlotId) -> Result<&mut Slot> {
        let count = self.slots.len();
        self.slots.get_mut(id.0 as usize).ok_or_else(|| no_slot(id, count))
    }

    /// Applies saves, opens and appends, in this order.
    pub(crate) fn apply(&mut self, plan: &StepPlan, cache: &mut Cache) -> Result<()> {
        for save in &plan.saves {
            cache.save(save.slot, save.snapshot)?;
        }
        for open in &plan.opens {
            self.open(open)?;
            cache.open(open.slot, open.restore)?;
        }
        for append in &plan.appends {
            self.append(append)?;
        }
        Ok(())
    }

    fn open(&mut self, open: &SlotOpen) -> Result<()> {
        let blocks = self.blocks;
        let slot = self.get_mut(open.slot)?;
        if open.blocks.len() != slot.tables.len() {
            let message =
                format!("{} block tables for {} layer groups", open.blocks.len(), slot.tables.len());
            return Err(device("begin", message));
        }
        for (table, given) in slot.tables.iter_mut().zip(&open.blocks) {
            if given.len() > table.len() {
                let message =
                    format!("a table of {} blocks in slot {} of {}", given.len(), open.slot, table.len());
                return Err(device("begin", message));
            }
            // Entries of the sequence that was here before must not stay reachable.
            table.fill(0);
            for (entry, block) in table.iter_mut().zip(given) {
                *entry = checked(block.0, blocks)?;
            }
        }
        slot.last_drawn = open.output.last().copied().unwrap_or(0);
        slot.history =
            Some(History::new(open.sampling.clone(), open.prompt.clone(), open.choice, &open.output));
        Ok(())
    }

    fn append(&mut self, append: &BlockAppend) -> Result<()> {
        let blocks = self.blocks;
        let slot = self.get_mut(append.slot)?;
        let groups = slot.tables.len();
        let table = slot
            .tables
            .get_mut(usize::from(append.group))
            .ok_or_else(|| device("begin", format!("layer group {} of {groups}", append.group)))?;
        let len = table.len();
        let entry = table
            .get_mut(append.index as usize)
            .ok_or_else(|| device("begin", format!("entry {} of a block table of {len}", append.index)))?;
        *entry = checked(append.block.0, blocks)?;
        Ok(())
    }
}

fn checked(block: u32, blocks: usize) -> Result<u32> {
    if (block as usize) < blocks {
        Ok(block)
    } else {
        Err(device("begin", format!("block {block} of {blocks}")))
    }
}

fn no_slot(id: SlotId, count: usize) -> BackendError {
    device("begin", format!("slot {id} of {count}"))
}
