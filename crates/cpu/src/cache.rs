//! The KV cache's memory: one pool of equal pages for all layer groups.
//!
//! Owns the allocation and where a layer's part of a page begins. Which page belongs to whom is the engine's
//! business; the pages' inner layout `[K|V][kv_head][16][head_dim]` is the kernels'.

use half::bf16;
use half::vec::HalfBitsVecExt;
use mirai_model::backend::{AttentionSpec, CacheDtype, CacheLayout, GroupLayout, Result};

use crate::linear::device;
use crate::memory;
use crate::simd::{KvData, KvDataMut, KvLayout, KvView, KvViewMut};

const WHAT: &str = "the KV cache";

/// Elements of all pages.
pub(crate) enum Pages {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// The pool.
pub(crate) struct Cache {
    pub(crate) layout: CacheLayout,
    pub(crate) pages: Pages,
    /// Elements from one page to the next: as many as the largest group needs.
    pub(crate) page_elements: usize,
}

impl Cache {
    /// Allocates the pool; the system gives the memory page by page when it is first written, unless `poison` fills
    /// it with NaN at once.
    pub(crate) fn new(layout: &CacheLayout, poison: bool) -> Result<Self> {
        let Some(first) = layout.groups.first() else {
            return Err(device("allocate_cache", "no layer group".to_owned()));
        };
        if let Some((index, group)) = layout.groups.iter().enumerate().find(|(_, g)| g.dtype != first.dtype) {
            let message = format!(
                "group {index} is {:?}, group 0 is {:?}; all must be equal",
                group.dtype, first.dtype
            );
            return Err(device("allocate_cache", message));
        }
        let elements = |g: &GroupLayout| g.layers * g.layer_elements();
        let page_elements = layout.groups.iter().map(elements).max().unwrap_or(0);
        let len = page_elements.saturating_mul(layout.blocks);
        let size = match first.dtype {
            CacheDtype::F32 => size_of::<f32>(),
            CacheDtype::Bf16 => size_of::<bf16>(),
        };
        if let Some(have) = memory::available()
            && have < (len as u64).saturating_mul(size as u64)
        {
            return Err(memory::out_of_memory(WHAT, len, size));
        }
        let pages = match first.dtype {
            CacheDtype::F32 => {
                memory::reserve::<f32>(WHAT, &mut Vec::new(), len)?;
                Pages::F32(vec![if poison { f32::NAN } else { 0.0 }; len])
            }
            // As whole numbers, because only those are known to the library as zero.
            CacheDtype::Bf16 => {
                memory::reserve::<u16>(WHAT, &mut Vec::new(), len)?;
                Pages::Bf16(vec![if poison { bf16::NAN.to_bits() } else { 0 }; len].reinterpret_into())
            }
        };
        Ok(Self { layout: layout.clone(), pages, page_elements })
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
        let group = self.layout.groups.get(spec.group);
        let fits = group.is_some_and(|g| {
            (g.kv_heads, g.head_dim) == (spec.kv_heads, spec.head_dim) && spec.layer_in_group < g.layers
        });
        let Some(group) = group.filter(|_| fits) else {
            let message = format!(
                "layer {} of group {} with {} kv heads of {}: the cache has {:?}",
                spec.layer_in_group, spec.group, spec.kv_heads, spec.head_dim, self.layout.groups
            );
            return Err(device("attention", message));
        };
        Ok(KvLayout {
            kv_heads: group.kv_heads,
            head_dim: group.head_dim,
            v_head_dim: group.head_dim,
            first: spec.layer_in_group * group.layer_elements(),
            page_stride: self.page_elements,
        })
    }
}
