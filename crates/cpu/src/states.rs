//! Recurrent states of the slots, and snapshots of them.
//!
//! Owns their memory and the copying. Never: when a snapshot is taken or used, which is the engine's.

use mirai_engine::{SlotId, SnapshotId};
use mirai_model::backend::{DeltaRule, Result, StateLayout};

use crate::buffer::CpuVector;
use crate::linear::device;
use crate::memory;

const WHAT: &str = "recurrent states";

/// States of one layer group.
pub(crate) struct States {
    layout: StateLayout,
    /// `[slots][layers][convolution's state | recurrent state]`.
    slots: Vec<f32>,
    /// `[snapshots]`, each as a slot.
    snapshots: Vec<f32>,
}

impl States {
    /// Allocates; the system gives the memory page by page when it is first written, unless `poison` fills it with NaN
    /// at once.
    pub(crate) fn new(layout: StateLayout, slots: usize, snapshots: usize, poison: bool) -> Result<Self> {
        let elements = layout.elements();
        let fill = if poison { f32::NAN } else { 0.0 };
        let allocate = |count: usize| {
            let len = elements.saturating_mul(count);
            memory::reserve::<f32>(WHAT, &mut Vec::new(), len)?;
            Ok(vec![fill; len])
        };
        Ok(Self { layout, slots: allocate(slots)?, snapshots: allocate(snapshots)? })
    }

    /// Copies a slot's state into a snapshot.
    pub(crate) fn save(&mut self, slot: SlotId, snapshot: SnapshotId) -> Result<()> {
        let from = self.slot(slot)?;
        let to = self.snapshot(snapshot)?;
        self.snapshots[to].copy_from_slice(&self.slots[from]);
        Ok(())
    }

    /// Sets a slot's state to a snapshot, or to zero.
    pub(crate) fn open(&mut self, slot: SlotId, restore: Option<SnapshotId>) -> Result<()> {
        let to = self.slot(slot)?;
        match restore {
            Some(snapshot) => {
                let from = self.snapshot(snapshot)?;
                self.slots[to].copy_from_slice(&self.snapshots[from]);
            }
            None => self.slots[to].fill(0.0),
        }
        Ok(())
    }

    /// All states, and where in them that of a layer in a slot begins.
    pub(crate) fn layer(
        &mut self,
        rule: &DeltaRule<'_, CpuVector>,
        slots: impl Iterator<Item = SlotId>,
    ) -> Result<(&mut [f32], Vec<usize>)> {
        if rule.shape != self.layout.shape || rule.layer_in_group >= self.layout.layers {
            let message = format!("layer {} of {:?}: {:?}", rule.layer_in_group, self.layout, rule.shape);
            return Err(device("delta_rule", message));
        }
        let first = rule.layer_in_group * (self.layout.elements() / self.layout.layers);
        let starts = slots.map(|slot| Ok(self.slot(slot)?.start + first)).collect::<Result<Vec<_>>>()?;
        Ok((&mut self.slots, starts))
    }

    fn slot(&self, slot: SlotId) -> Result<std::ops::Range<usize>> {
        piece("slot", slot.0, self.slots.len(), self.layout.elements())
    }

    fn snapshot(&self, snapshot: SnapshotId) -> Result<std::ops::Range<usize>> {
        piece("snapshot", snapshot.0, self.snapshots.len(), self.layout.elements())
    }
}

fn piece(what: &str, index: u32, len: usize, elements: usize) -> Result<std::ops::Range<usize>> {
    let start = index as usize * elements;
    if start + elements <= len {
        return Ok(start..start + elements);
    }
    let count = len.checked_div(elements).unwrap_or(0);
    Err(device("begin", format!("{what} {index} of {count} with recurrent state")))
}
