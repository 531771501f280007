//! What the device keeps from step to step: pages, tables, states, counts, logits, and the upload's place.
//!
//! Owns where all of it lies, and what of it is set when a sequence gets a slot. Never: which page belongs to whom.

use std::ops::Range;

use mirai_engine::{SlotId, SnapshotId};
use mirai_model::backend::{
    AttentionSpec, CacheDtype, CacheLayout, DeltaRule, GroupLayout, PageLayout, Result, StateLayout,
};

use crate::args::KvLayer;
use crate::buffer::CudaVector;
use crate::driver::{DevicePtr, Gpu, Part};
use crate::error::{device, driver};
use crate::memory::Memory;
use crate::products::{lt_rows, lt_rows_within};

/// Bytes of `ChunkSums`, what the first sampling kernel leaves of 4,096 logits.
const CHUNK_BYTES: usize = 24;
/// Ids of such a piece.
pub(crate) const CHUNK_IDS: usize = 4096;
/// Logits take at most so many bytes, copies for log-probabilities as many again.
const LOGIT_BYTES: usize = 256 << 20;
/// Rows of logits that exist at once, at least and at most.
const LOGIT_ROWS: (usize, usize) = (64, 1024);

/// Sizes that a device's tables follow from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Slots, without the reserved one.
    pub(crate) slots: usize,
    /// Entries of a block table.
    pub(crate) table_len: usize,
    /// Layer groups.
    pub(crate) groups: usize,
    /// Width of the logits; 0 in models that do not generate.
    pub(crate) vocab: usize,
    /// Outputs of a step.
    pub(crate) outputs: usize,
    /// Bytes of a step's upload.
    pub(crate) upload: usize,
    /// Bytes of a step's read-back.
    pub(crate) results: usize,
}

impl Sizes {
    /// Rows of logits that exist at once: a number of rows that products compute as it is, so that none is rounded up beyond
    /// the logits' end.
    pub(crate) fn logit_rows(&self) -> usize {
        let fit = (LOGIT_BYTES / (self.vocab.max(1) * 4)).clamp(LOGIT_ROWS.0, LOGIT_ROWS.1);
        lt_rows_within(fit).min(lt_rows(self.outputs.max(LOGIT_ROWS.0)))
    }

    /// Logits from a row to the next.
    pub(crate) const fn logit_stride(&self) -> usize {
        crate::weights::padded(self.vocab)
    }

    /// Tokens of the longest sequence.
    pub(crate) const fn longest(&self) -> usize {
        self.table_len * mirai_engine::BLOCK_TOKENS
    }

    /// Tokens of new sequences that are sent together to be counted: as many prompts as a step computes, and one that it only
    /// begins.
    pub(crate) const fn count_tokens(&self) -> usize {
        self.longest() + self.outputs
    }

    /// Regions of slots in bytes: tables and upload as one, then last drawn tokens, counts, and tokens to count.
    fn slots(&self) -> [u64; 4] {
        let tables = self.groups * (self.slots + 1) * self.table_len * 4;
        let counts = if self.vocab == 0 { (0, 0) } else { (self.slots * self.vocab, self.count_tokens()) };
        [
            (tables.next_multiple_of(256) + self.upload) as u64,
            (self.slots + 1) as u64 * 4,
            counts.0 as u64 * 4,
            counts.1 as u64 * 4,
        ]
    }

    /// Regions of sampling in bytes: logits, copies, sums of pieces, results.
    fn sampling(&self) -> [u64; 4] {
        let rows = if self.vocab == 0 { 0 } else { self.logit_rows() };
        let pieces = self.vocab.div_ceil(CHUNK_IDS);
        let words = |n: usize| n as u64 * 4;
        [
            words(rows * self.logit_stride()),
            words(rows * self.vocab),
            (rows * pieces * CHUNK_BYTES) as u64,
            self.results as u64,
        ]
    }

    /// Bytes of everything, each region rounded up.
    pub(crate) fn bytes(&self) -> u64 {
        self.slots().iter().chain(&self.sampling()).map(|b| b.next_multiple_of(crate::ALIGNMENT)).sum()
    }
}

/// Where a group's pages or states lie.
#[derive(Clone, Copy, Debug)]
enum Group {
    Paged(PageLayout),
    /// `[slots + 1][layers][state]`, then `[snapshots]` likewise.
    Recurrent {
        layout: StateLayout,
        states: DevicePtr,
        snapshots: DevicePtr,
    },
}

/// The device's memory from step to step.
pub(crate) struct Device {
    gpu: Gpu,
    pub(crate) sizes: Sizes,
    groups: Vec<Group>,
    pages: DevicePtr,
    page_bytes: u64,
    slots: usize,
    snapshots: usize,
    /// `[groups][slots + 1][table_len]`.
    pub(crate) tables: DevicePtr,
    /// Behind the tables, so that granules can be copied by number.
    pub(crate) upload: DevicePtr,
    pub(crate) last_drawn: DevicePtr,
    pub(crate) counts: DevicePtr,
    pub(crate) count_tokens: DevicePtr,
    pub(crate) logits: DevicePtr,
    pub(crate) raw: DevicePtr,
    pub(crate) chunks: DevicePtr,
    pub(crate) results: DevicePtr,
}

/// Bytes from a page to the next: as many as the largest group needs, in whole pieces of 16.
pub(crate) fn page_bytes(layout: &CacheLayout) -> u64 {
    let largest = layout.groups.iter().map(GroupLayout::page_bytes).max().unwrap_or(0);
    largest.next_multiple_of(16) as u64
}

/// Bytes of recurrent states and snapshots.
pub(crate) fn state_bytes(layout: &CacheLayout) -> u64 {
    let elements = layout.groups.iter().map(|group| match group {
        GroupLayout::Paged(_) => 0,
        GroupLayout::Recurrent(state) => state.elements() as u64,
    });
    elements.sum::<u64>() * 4 * (layout.slots + 1 + layout.snapshots) as u64
}

impl Device {
    /// Takes everything, and sets to zero what a step reads before it writes.
    pub(crate) fn new(gpu: &Gpu, memory: &mut Memory, layout: &CacheLayout, sizes: Sizes) -> Result<Self> {
        let [tables, last_drawn, counts, count_tokens] = sizes.slots();
        let [logits, raw, chunks, results] = sizes.sampling();
        let table_bytes = (sizes.groups * (sizes.slots + 1) * sizes.table_len * 4).next_multiple_of(256);
        let tables_at = memory.take(Part::Slots, tables)?;
        let mut slots = |bytes| memory.take(Part::Slots, bytes);
        let (last_drawn, counts, count_tokens) = (slots(last_drawn)?, slots(counts)?, slots(count_tokens)?);
        let mut take = |bytes| memory.take(Part::Workspace, bytes);
        let (logits, raw, chunks, results) = (take(logits)?, take(raw)?, take(chunks)?, take(results)?);
        let mut groups = Vec::with_capacity(layout.groups.len());
        for group in &layout.groups {
            groups.push(match *group {
                GroupLayout::Paged(pages) if pages.dtype == CacheDtype::F32 => {
                    return Err(device("allocate_cache", "keys and values are kept in bf16 or 8 bits"));
                }
                GroupLayout::Paged(pages) => Group::Paged(pages),
                GroupLayout::Recurrent(state) => {
                    let bytes = |count: usize| (state.elements() * 4 * count) as u64;
                    let states = memory.take(Part::Cache, bytes(layout.slots + 1))?;
                    let snapshots = memory.take(Part::Cache, bytes(layout.snapshots))?;
                    gpu.fill(states, 0, bytes(layout.slots + 1)).map_err(driver("allocate_cache"))?;
                    Group::Recurrent { layout: state, states, snapshots }
                }
            });
        }
        let page_bytes = page_bytes(layout);
        let pages = memory.take(Part::Cache, page_bytes * layout.blocks as u64)?;
        gpu.fill(tables_at, 0, table_bytes as u64).map_err(driver("allocate_cache"))?;
        // Padding rows write to page 0 and read it back: it holds numbers from the start.
        gpu.fill(pages, 0, page_bytes.min(page_bytes * layout.blocks as u64))
            .map_err(driver("allocate_cache"))?;
        gpu.fill(last_drawn, 0, (sizes.slots + 1) as u64 * 4).map_err(driver("allocate_cache"))?;
        Ok(Self {
            gpu: gpu.clone(),
            sizes,
            groups,
            pages,
            page_bytes,
            slots: layout.slots,
            snapshots: layout.snapshots,
            tables: tables_at,
            upload: tables_at.add(table_bytes as u64),
            last_drawn,
            counts,
            count_tokens,
            logits,
            raw,
            chunks,
            results,
        })
    }

    /// Tokens that a slot has room for.
    pub(crate) fn room(&self) -> usize {
        // Nothing is kept of a sequence that lies whole in its step.
        if self.groups.is_empty() { usize::MAX } else { self.sizes.longest() }
    }

    /// Where a layer's keys and values lie, and whether they have 8 bits.
    pub(crate) fn layer(&self, spec: &AttentionSpec) -> Result<(KvLayer, bool)> {
        let wanted = (spec.kv_heads, spec.key_dim, spec.value_dim, spec.stored);
        let fits = |p: &PageLayout| {
            (p.kv_heads, p.key_dim, p.value_dim, p.stored) == wanted && spec.layer_in_group < p.layers
        };
        let pages = match self.groups.get(spec.group) {
            Some(Group::Paged(pages)) if fits(pages) => pages,
            found => {
                let (layer, group) = (spec.layer_in_group, spec.group);
                let message =
                    format!("layer {layer} of group {group} with heads {wanted:?}: the cache has {found:?}");
                return Err(device("attention", message));
            }
        };
        let entries = (self.sizes.slots + 1) * self.sizes.table_len;
        let layer_bytes = (pages.page_bytes() / pages.layers) as u64;
        let layer = KvLayer {
            pages: self.pages.add(spec.layer_in_group as u64 * layer_bytes),
            tables: self.tables.add((spec.group * entries * 4) as u64),
            scales: DevicePtr::NULL,
            page_bytes: self.page_bytes,
            table_len: self.sizes.table_len as u32,
            kv_heads: pages.kv_heads as u32,
        };
        Ok((layer, pages.dtype == CacheDtype::F8E4M3))
    }

    /// A delta net's states in slot 0, and singles from a slot to the next.
    pub(crate) fn states(&self, rule: &DeltaRule<'_, CudaVector>) -> Result<(DevicePtr, u64)> {
        match self.groups.get(rule.group) {
            Some(Group::Recurrent { layout, states, .. })
                if layout.shape == rule.shape && rule.layer_in_group < layout.layers =>
            {
                let first = rule.layer_in_group * (layout.elements() / layout.layers);
                Ok((states.add(first as u64 * 4), layout.elements() as u64))
            }
            found => {
                let (layer, shape) = (rule.layer_in_group, rule.shape);
                Err(device("delta_rule", format!("layer {layer} of {shape:?}: the cache has {found:?}")))
            }
        }
    }

    fn snapshot(&self, snapshot: SnapshotId) -> Result<u64> {
        if (snapshot.0 as usize) < self.snapshots {
            return Ok(u64::from(snapshot.0));
        }
        Err(device("begin", format!("snapshot {} of {}", snapshot.0, self.snapshots)))
    }

    fn slot(&self, slot: SlotId) -> Result<u64> {
        if (slot.0 as usize) < self.slots {
            return Ok(u64::from(slot.0));
        }
        Err(device("begin", format!("slot {slot} of {}", self.slots)))
    }

    /// Copies a slot's states into a snapshot.
    pub(crate) fn save(&self, slot: SlotId, snapshot: SnapshotId) -> Result<()> {
        let (slot, snapshot) = (self.slot(slot)?, self.snapshot(snapshot)?);
        self.recurrent().try_for_each(|(bytes, states, snapshots)| {
            self.gpu
                .copy(snapshots.add(snapshot * bytes), states.add(slot * bytes), bytes)
                .map_err(driver("save"))
        })
    }

    /// Sets a slot's states to a snapshot, or to zero.
    pub(crate) fn open(&self, slot: SlotId, restore: Option<SnapshotId>) -> Result<()> {
        let slot = self.slot(slot)?;
        let restore = restore.map(|snapshot| self.snapshot(snapshot)).transpose()?;
        self.recurrent().try_for_each(|(bytes, states, snapshots)| {
            let to = states.add(slot * bytes);
            match restore {
                Some(from) => self.gpu.copy(to, snapshots.add(from * bytes), bytes),
                None => self.gpu.fill(to, 0, bytes),
            }
            .map_err(driver("open"))
        })
    }

    /// Sets entries of block tables to page 0, counted from the start of all tables.
    pub(crate) fn clear_entries(&self, entries: Range<usize>) -> Result<()> {
        let at = self.tables.add(entries.start as u64 * 4);
        self.gpu.fill(at, 0, entries.len() as u64 * 4).map_err(driver("open"))
    }

    /// Bytes of a slot, states and snapshots of each recurrent group.
    fn recurrent(&self) -> impl Iterator<Item = (u64, DevicePtr, DevicePtr)> {
        self.groups.iter().filter_map(|group| match group {
            Group::Paged(_) => None,
            Group::Recurrent { layout, states, snapshots } => {
                Some((layout.elements() as u64 * 4, *states, *snapshots))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::products::SKINNY_ROWS;

    #[test]
    fn logits_exist_for_as_many_rows_as_memory_allows() {
        let sizes = |vocab, outputs| Sizes {
            slots: 8,
            table_len: 64,
            groups: 1,
            vocab,
            outputs,
            upload: 4096,
            results: 4096,
        };
        assert_eq!(sizes(151_936, 8192).logit_rows(), 384);
        assert_eq!(sizes(32_000, 8192).logit_rows(), 1024);
        assert_eq!(sizes(2_000_000, 8192).logit_rows(), 64);
        assert_eq!(sizes(100, 70).logit_rows(), 80);
        let s = sizes(1000, 100);
        assert!(s.bytes() >= (112 * 1000 * 8 + 8 * 1000 * 4 + 64 * 16 * 4) as u64);
        assert_eq!((s.logit_stride(), s.longest(), s.count_tokens()), (1000, 1024, 1124));
    }

    /// What is computed of a chunk of outputs lies in the logits, and what is read for it in the rows that buffers have.
    #[test]
    fn products_of_logits_are_not_rounded_up_beyond_their_region() {
        for vocab in [100, 32_000, 65_536, 100_000, 116_500, 128_256, 151_936, 262_144, 1_000_000] {
            for outputs in (1..2000).chain([4096, 8192]) {
                let (slots, table_len, groups, upload, results) = (8, 64, 1, 0, 0);
                let rows = Sizes { slots, table_len, groups, vocab, outputs, upload, results }.logit_rows();
                for first in (0..outputs).step_by(rows) {
                    let wanted = (outputs - first).min(rows);
                    if wanted <= SKINNY_ROWS {
                        continue;
                    }
                    let computed = lt_rows(wanted);
                    assert!(
                        computed <= rows,
                        "{vocab} logits of {outputs} outputs: {computed} rows of {rows}"
                    );
                    let read = first + computed;
                    assert!(
                        read <= lt_rows(outputs),
                        "{vocab} logits of {outputs} outputs: {read} rows read"
                    );
                }
            }
        }
    }
}
