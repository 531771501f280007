//! The integrity check: everything that is counted, counted again from scratch.
//!
//! Run after every step of the simulator, and when the engine is idle in production.

use std::collections::HashMap;
use std::fmt::{Debug, Display};

use super::Scheduler;
use crate::ids::BlockId;
use crate::sequence::Stage;

/// An invariant does not hold; the text says which, with both numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct IntegrityError(String);

fn equal<T: PartialEq + Debug + Copy>(
    what: impl Display,
    counted: T,
    found: T,
) -> Result<(), IntegrityError> {
    if counted == found {
        return Ok(());
    }
    Err(IntegrityError(format!("{what}: {counted:?} counted, {found:?} found")))
}

impl Scheduler {
    /// Checks that no block, slot, snapshot or promise is lost or shared by mistake.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn audit(&self) -> Result<(), IntegrityError> {
        self.pool.check().map_err(IntegrityError)?;
        self.snapshots.check().map_err(IntegrityError)?;
        self.index.check().map_err(IntegrityError)?;
        self.audit_blocks()?;
        self.audit_snapshots()?;
        if self.geometry.whole_prompts {
            self.audit_whole_prompts()?;
        }
        self.audit_sequences()
    }

    /// Counts a failed check among the counters.
    pub(crate) fn count_integrity_failure(&mut self) {
        self.counters.integrity_failures += 1;
    }

    /// When nothing is left, nothing may be held.
    ///
    /// # Errors
    /// What is still held.
    pub fn audit_idle(&self) -> Result<(), IntegrityError> {
        self.audit()?;
        equal("blocks held while idle", self.pool.used(), 0)?;
        equal("snapshots held while idle", self.snapshots.used(), 0)?;
        equal("sequences while idle", self.seqs.len(), 0)?;
        equal("slots free while idle", self.slots.len(), self.geometry.slots as usize)
    }

    /// References of blocks are exactly the entries of the tables, and no block serves two rooms.
    fn audit_blocks(&self) -> Result<(), IntegrityError> {
        let mut refs: HashMap<BlockId, u32> = HashMap::new();
        let mut rooms = HashMap::new();
        for (s, seq) in self.seqs.iter() {
            let room = self.requests[seq.request].room;
            let blocks = seq.tables.iter().flatten().filter(|block| **block != BlockId::NULL);
            let mut held = 0;
            for &block in blocks {
                held += 1;
                *refs.entry(block).or_default() += 1;
                equal(format_args!("room of block {block}"), *rooms.entry(block).or_insert(room), room)?;
                if let Some(owner) = self.pool.owner(block.0) {
                    equal(format_args!("room of cached block {block}"), self.index.room(owner.node), room)?;
                }
            }
            equal(format_args!("blocks of sequence {s}"), seq.held, held)?;
            equal(format_args!("promise to sequence {s}"), seq.outstanding, seq.quota.saturating_sub(held))?;
        }
        for page in 1..self.geometry.blocks {
            let found = refs.get(&BlockId(page)).copied().unwrap_or(0);
            equal(format_args!("references of block {page}"), self.pool.refs(page), found)?;
            if let Some(owner) = self.pool.owner(page) {
                let found = self.index.block(owner.node, owner.group as usize);
                equal(format_args!("owner of block {page}"), BlockId(page), found)?;
            }
        }
        let promised: u32 = self.seqs.iter().map(|(_, seq)| seq.outstanding).sum();
        equal("promised blocks", self.reserved, promised)?;
        if promised > self.pool.obtainable() {
            let have = self.pool.obtainable();
            return Err(IntegrityError(format!("{promised} blocks are promised, {have} obtainable")));
        }
        Ok(())
    }

    /// Every snapshot is free, cached, or being saved by exactly one submitted step.
    fn audit_snapshots(&self) -> Result<(), IntegrityError> {
        let saving = self.inflight.iter().map(|flight| flight.saves.len() as u32).sum();
        equal("snapshots being saved", self.snapshots.used(), saving)
    }

    /// A sequence runs only while the one row that computes it is under way, and leaves nothing behind.
    fn audit_whole_prompts(&self) -> Result<(), IntegrityError> {
        equal("nodes of the index", self.index.len(), 0)?;
        let running = self.seqs.iter().filter(|(_, seq)| seq.stage == Stage::Running);
        for (s, seq) in running {
            equal(format_args!("planned tokens of sequence {s}"), seq.planned, seq.known())?;
            equal(format_args!("rows of sequence {s}"), seq.inflight, 1)?;
        }
        Ok(())
    }

    fn audit_sequences(&self) -> Result<(), IntegrityError> {
        let mut with_slot = Vec::new();
        let mut waiting = 0;
        let mut draining = 0;
        let mut tenants: HashMap<u32, (u64, u32)> = HashMap::new();
        let mut preemptible: HashMap<u32, u32> = HashMap::new();
        for (s, seq) in self.seqs.iter() {
            let tenant = tenants.entry(seq.tenant).or_default();
            tenant.0 += u64::from(seq.held);
            let named =
                self.inflight.iter().flat_map(|flight| &flight.rows).filter(|row| row.seq == s).count();
            equal(format_args!("steps that name sequence {s}"), usize::from(seq.inflight), named)?;
            match seq.stage {
                Stage::Held => equal("blocks of a held choice", seq.held, 0)?,
                Stage::Waiting => {
                    waiting += 1;
                    equal("blocks of a waiting sequence", seq.held, 0)?;
                }
                Stage::Running => {
                    with_slot.push(seq.slot);
                    if !seq.secured {
                        tenant.1 += 1;
                        *preemptible.entry(seq.request).or_default() += 1;
                    }
                }
                Stage::Draining => {
                    draining += 1;
                    with_slot.push(seq.slot);
                }
            }
        }
        equal("waiting sequences", self.fair.waiting(), waiting)?;
        equal("draining sequences", self.draining, draining)?;
        for (index, tenant) in self.fair.iter() {
            let (blocks, running) = tenants.get(&index).copied().unwrap_or_default();
            equal(format_args!("blocks of tenant {index}"), tenant.blocks, blocks)?;
            equal(format_args!("preemptible sequences of tenant {index}"), tenant.preemptible, running)?;
        }
        for (r, request) in self.requests.iter() {
            let found = preemptible.get(&r).copied().unwrap_or(0);
            equal(format_args!("preemptible sequences of request {r}"), request.preemptible, found)?;
            if request.preemptions + request.preemptible > super::MAX_PREEMPTIONS {
                return Err(IntegrityError(format!("request {r} may be preempted too often")));
            }
        }
        with_slot.extend(&self.slots);
        with_slot.sort_unstable();
        let all: Vec<_> = (0..self.geometry.slots).map(crate::ids::SlotId).collect();
        equal("slots", &all[..], &with_slot[..])
    }
}
