//! The memory of the cache: one pool of equal pages for all paged layer groups, and states for the recurrent ones.
//!
//! Owns the allocation and where a layer's part of a page begins. Which page belongs to whom is the engine's
//! business; the pages' inner layout is the kernels'.

use half::bf16;
use half::vec::HalfBitsVecExt;
use mirai_engine::{BLOCK_TOKENS, SlotId, SnapshotId};
use mirai_model::backend::{AttentionSpec, CacheDtype, CacheLayout, GroupLayout, PageLayout, Result, Stored};

use crate::linear::device;
use crate::memory;
use crate::simd::{KvData, KvDataMut, KvLayout, KvView, KvViewMut};
use crate::states::States;

const WHAT: &str = "the KV cache";

/// Elements of all pages.
pub(crate) enum Pages {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Pages and states.
pub(crate) struct Cache {
    layout: CacheLayout,
    pages: Pages,
    /// Elements from one page to the next: as many as the largest group needs.
    page_elements: usize,
    /// One for each group; none for paged ones.
    states: Vec<Option<States>>,
}

fn paged(layout: &CacheLayout) -> impl Iterator<Item = (usize, PageLayout)> {
    layout.groups.iter().enumerate().filter_map(|(index, group)| match group {
        GroupLayout::Paged(pages) => Some((index, *pages)),
        GroupLayout::Recurrent(_) => None,
    })
}

impl Cache {
    /// Allocates; the system gives the memory page by page when it is first written, unless `poison` fills it with NaN
    /// at once.
    pub(crate) fn new(layout: &CacheLayout, poison: bool) -> Result<Self> {
        let dtype = paged(layout).next().map_or(CacheDtype::F32, |(_, pages)| pages.dtype);
        if let Some((index, pages)) = paged(layout).find(|(_, pages)| pages.dtype != dtype) {
            let message =
                format!("group {index} is {:?}, an earlier one is {dtype:?}; all must be equal", pages.dtype);
            return Err(device("allocate_cache", message));
        }
        if dtype == CacheDtype::F8E4M3 {
            return Err(device("allocate_cache", "keys and values in 8 bits are for GPUs".to_owned()));
        }
        let elements = |pages: PageLayout| pages.layers * pages.layer_elements();
        let page_elements = paged(layout).map(|(_, pages)| elements(pages)).max().unwrap_or(0);
        let len = page_elements.saturating_mul(layout.blocks);
        let size = match dtype {
            CacheDtype::F32 => size_of::<f32>(),
            CacheDtype::Bf16 | CacheDtype::F8E4M3 => size_of::<bf16>(),
        };
        check_room(layout, len, size)?;
        let states = layout.groups.iter().map(|group| match group {
            GroupLayout::Paged(_) => Ok(None),
            GroupLayout::Recurrent(state) => {
                States::new(*state, layout.slots, layout.snapshots, poison).map(Some)
            }
        });
        let states = states.collect::<Result<Vec<_>>>()?;
        let pages = match dtype {
            CacheDtype::F32 => {
                memory::reserve::<f32>(WHAT, &mut Vec::new(), len)?;
                Pages::F32(vec![if poison { f32::NAN } else { 0.0 }; len])
            }
            // As whole numbers, because only those are known to the library as zero.
            CacheDtype::Bf16 | CacheDtype::F8E4M3 => {
                memory::reserve::<u16>(WHAT, &mut Vec::new(), len)?;
                Pages::Bf16(vec![if poison { bf16::NAN.to_bits() } else { 0 }; len].reinterpret_into())
            }
        };
        Ok(Self { layout: layout.clone(), pages, page_elements, states })
    }

    /// Tokens that a slot has room for.
    pub(crate) fn room(&self) -> usize {
        // Nothing is kept of a sequence that lies whole in its step.
        if self.layout.groups.is_empty() {
            return usize::MAX;
        }
        self.layout.table_len * BLOCK_TOKENS
    }

    /// Takes a snapshot of a slot.
    pub(crate) fn save(&mut self, slot: SlotId, snapshot: SnapshotId) -> Result<()> {
        self.check_recurrent(slot, snapshot)?;
        self.states.iter_mut().flatten().try_for_each(|states| states.save(slot, snapshot))
    }

    /// Sets the states of a slot to a snapshot, or to zero.
    pub(crate) fn open(&mut self, slot: SlotId, restore: Option<SnapshotId>) -> Result<()> {
        if let Some(snapshot) = restore {
            self.check_recurrent(slot, snapshot)?;
        }
        self.states.iter_mut().flatten().try_for_each(|states| states.open(slot, restore))
    }

    fn check_recurrent(&self, slot: SlotId, snapshot: SnapshotId) -> Result<()> {
        if self.states.iter().any(Option::is_some) {
            return Ok(());
        }
        let message = format!("snapshot {} and slot {slot}: no layer group is recurrent", snapshot.0);
        Err(device("begin", message))
    }

    /// The states of one group.
    pub(crate) fn group_states(&mut self, group: usize) -> Result<&mut States> {
        let states = self.states.get_mut(group).and_then(Option::as_mut);
        states.ok_or_else(|| device("delta_rule", format!("layer group {group} has no recurrent state")))
    }

    /// One layer's keys and values, to read.
    pub(crate) fn view(&self, spec: &AttentionSpec) -> Result<KvView<'_>> {
        let layout = self.layer(spec)?;
        let data = match &self.pages {
            Pages::F32(pages) => KvData::F32(pages),
            Pages::Bf16(pages) => KvData::Bf16(pages),
        };
        Ok(KvView { data, layout })
    }

    /// One layer's keys and values, to write.
    pub(crate) fn view_mut(&mut self, spec: &AttentionSpec) -> Result<KvViewMut<'_>> {
        let layout = self.layer(spec)?;
        let data = match &mut self.pages {
            Pages::F32(pages) => KvDataMut::F32(pages),
            Pages::Bf16(pages) => KvDataMut::Bf16(pages),
        };
        Ok(KvViewMut { data, layout })
    }

    /// Where a layer's part of the pages lies.
    fn layer(&self, spec: &AttentionSpec) -> Result<KvLayout> {
        let wanted = (spec.kv_heads, spec.key_dim, spec.value_dim, spec.stored);
        let fits = |p: &PageLayout| {
            (p.kv_heads, p.key_dim, p.value_dim, p.stored) == wanted && spec.layer_in_group < p.layers
        };
        let pages = match self.layout.groups.get(spec.group) {
            Some(GroupLayout::Paged(pages)) if fits(pages) => pages,
            _ => {
                let message = format!(
                    "layer {} of group {} with heads {wanted:?}: the cache has {:?}",
                    spec.layer_in_group, spec.group, self.layout.groups
                );
                return Err(device("attention", message));
            }
        };
        Ok(KvLayout {
            kv_heads: pages.kv_heads,
            head_dim: pages.key_dim,
            v_head_dim: pages.value_dim,
            value_in_key: pages.stored == Stored::ValueInKey,
            first: spec.layer_in_group * pages.layer_elements(),
            page_stride: self.page_elements,
        })
    }
}

/// Refuses a cache that cannot fit.
fn check_room(layout: &CacheLayout, len: usize, size: usize) -> Result<()> {
    let states: usize = layout
        .groups
        .iter()
        .map(|group| match group {
            GroupLayout::Paged(_) => 0,
            GroupLayout::Recurrent(state) => state
                .elements()
                .saturating_mul(layout.slots + layout.snapshots)
                .saturating_mul(size_of::<f32>()),
        })
        .fold(0, usize::saturating_add);
    let need = len.saturating_mul(size).saturating_add(states);
    match memory::available() {
        Some(have) if have < need as u64 => Err(memory::out_of_memory(WHAT, need, 1)),
        _ => Ok(()),
    }
}
