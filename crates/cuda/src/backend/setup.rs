//! From a device to a backend that is ready for steps: memory, tables, rings, plans.
//!
//! Owns the sizes of everything that a step needs beside weights and activations.

use std::rc::Rc;

use mirai_model::backend::{CacheDtype, CacheLayout, GroupLayout, Outline, Result, Visibility};

use super::attend::class_of;
use super::begin::Rings;
use super::experts::fused_gate;
use super::{CudaBackend, MAX_PENDING, Workspace};
use crate::budget::CacheNeed;
use crate::device::{Device, Sizes, page_bytes, state_bytes};
use crate::driver::{CudaError, DevicePtr, Event, Gpu, Kernels, Lt, LtOptions, Part, ReadBack, UploadRing};
use crate::error::{device, driver};
use crate::kernels_table::head_kernels;
use crate::memory::Memory;
use crate::options::CudaOptions;
use crate::products::{Products, SKINNY_ROWS, lt_rows};
use crate::records::SampleResult;
use crate::sampling::MAX_TOP;
use crate::slots::{GRANULE, Slots};
use crate::steps::{StepBuilder, buckets};
use crate::weights::padded;
use crate::work::{HEAD_TILE, WorkClass};

/// Scratch of cublasLt.
const LT_WORKSPACE: u64 = 32 << 20;
/// Counters that kernels share.
const COUNTERS: usize = 8192;
/// Shared memory that a block takes beside what it asks for.
const SHARED_A_BLOCK: u32 = 1 << 10;
/// Most blocks of the decode kernel on a multiprocessor.
const MOST_DECODE_BLOCKS: u32 = 4;

impl CudaBackend {
    /// Loads the kernels and takes the memory.
    ///
    /// # Errors
    /// The device cannot run the kernels, or has too little memory.
    pub fn new(gpu: Gpu, options: CudaOptions) -> Result<Self> {
        let kernels = Kernels::load(&gpu).map_err(driver("load kernels"))?;
        let memory = Memory::new(&gpu, &options)?;
        let none = DevicePtr::NULL;
        Ok(Self {
            recorded: Vec::new(),
            rings: None,
            lt: None,
            kernels,
            device: None,
            memory,
            gpu,
            options,
            limits: mirai_model::backend::StepLimits { tokens: 1, rows: 1 },
            outline: Outline::default(),
            workspace: Workspace { partial: none, attention: none, counters: none },
            builder: StepBuilder::default(),
            slots: Slots::default(),
            step: crate::steps::Step::default(),
            mode: super::Mode::default(),
            batch: mirai_model::backend::Batch::default(),
            late: false,
            pending: std::collections::VecDeque::new(),
            spare: None,
            rope_positions: usize::MAX,
            widened: Vec::new(),
            products: Products::default(),
            most_experts: 0,
            widest_output: 0,
        })
    }

    /// Rows that buffers have: those of the largest step, as cublasLt computes them.
    pub(super) fn capacity(&self) -> usize {
        if self.limits.tokens > SKINNY_ROWS { lt_rows(self.limits.tokens) } else { self.limits.tokens }
    }

    pub(super) fn take_outline(&mut self, outline: &Outline) {
        self.outline = outline.clone();
        self.builder = StepBuilder::default();
        self.builder.batch_invariant = self.options.batch_invariant;
        for spec in &outline.attentions {
            let class = class_of(spec);
            if !self.builder.classes.iter().any(|(other, _)| *other == class) {
                let grid = self.decode_grid(spec.key_dim, spec.value_dim);
                self.builder.classes.push((class, grid));
            }
        }
    }

    /// Elements of rows between and behind the products of experts: gates and ups, where a product does not apply the gate
    /// itself; what comes of them; and the experts' output.
    pub(super) fn expert_widths(&self) -> [usize; 3] {
        let mut widths = [0; 3];
        for expert in &self.outline.experts {
            let inner = expert.intermediate;
            if fused_gate(expert.gated, expert.activation, inner).is_none() {
                widths[0] = widths[0].max(padded(if expert.gated { 2 * inner } else { inner }));
            }
            widths[1] = widths[1].max(padded(inner));
            widths[2] = padded(self.outline.hidden);
        }
        widths
    }

    /// Blocks of a decode kernel that run at once.
    fn decode_grid(&self, key: usize, value: usize) -> usize {
        let there = self.gpu.facts().multiprocessor_shared_memory;
        let blocks = head_kernels(key, value, false).map_or(1, |k| decode_blocks(there, k.decode_shared));
        self.multiprocessors() * blocks as usize
    }

    /// Bytes of partial sums of split attention.
    fn attention_bytes(&self) -> usize {
        let part = |dim: usize| HEAD_TILE * (dim + 2) * 4;
        let grids = self.builder.classes.iter().map(|(_, grid)| WorkClass::most_parts(*grid)).max();
        let dims = self.outline.attentions.iter().map(|spec| part(spec.value_dim)).max();
        grids.unwrap_or(0) * dims.unwrap_or(0)
    }

    /// Bytes of partial sums of split matmuls: they are split where tiles leave multiprocessors idle.
    fn partial_bytes(&self) -> usize {
        self.multiprocessors() * SKINNY_ROWS * 128 * 4
    }

    fn sizes(&self, layout: &CacheLayout) -> Sizes {
        let table_len = layout.table_len.next_multiple_of(GRANULE);
        let (tokens, rows) = (self.limits.tokens, self.limits.rows.min(self.limits.tokens));
        let upload = self.builder.layout(tokens, rows, tokens);
        let drawn = tokens * (SampleResult::BYTES + MAX_TOP * crate::records::TOP_BYTES);
        let pooled = self.limits.rows * (self.widest_output + 1) * 4;
        Sizes {
            slots: layout.slots,
            table_len,
            groups: layout.groups.len(),
            vocab: self.outline.vocab,
            outputs: tokens,
            upload: upload.bytes,
            results: if self.outline.vocab == 0 { pooled } else { drawn.max(16) },
        }
    }

    /// Bytes that [`Self::allocate`] takes beside the cache, and a little for what is rounded up.
    fn fixed_bytes(&self, layout: &CacheLayout) -> u64 {
        let workspace = self.attention_bytes() + self.partial_bytes() + COUNTERS * 4;
        let lt = if self.options.cublaslt { LT_WORKSPACE } else { 0 };
        self.sizes(layout).bytes() + workspace as u64 + lt + 16 * self.memory.rounding()
    }

    pub(super) fn room_for_cache(&mut self, draft: &CacheLayout) -> Result<u64> {
        self.prepare(draft);
        let fixed = self.fixed_bytes(draft);
        let paged = draft.groups.iter().filter(|group| matches!(group, GroupLayout::Paged(_))).count();
        let need = CacheNeed { fixed: state_bytes(draft), page: page_bytes(draft), groups: paged as u64 };
        let bytes = self.memory.cache_room(fixed, need)?;
        // The reserved slot has states too. Regions are rounded up: all pages are one, states and snapshots of a group two.
        let reserved = state_bytes(&CacheLayout { slots: 0, snapshots: 0, ..draft.clone() });
        let regions = 1 + 2 * (draft.groups.len() - paged) as u64;
        Ok(bytes.saturating_sub(reserved + regions * self.memory.rounding()))
    }

    /// What layouts of the upload depend on.
    fn prepare(&mut self, layout: &CacheLayout) {
        self.builder.mask_words = self.outline.vocab.div_ceil(32);
        self.builder.groups = layout.groups.len();
    }

    pub(super) fn allocate(&mut self, layout: &CacheLayout) -> Result<()> {
        self.prepare(layout);
        self.builder.classes.iter().try_for_each(|(_, grid)| check_counters(*grid))?;
        let take = |bytes: usize| bytes as u64;
        let attention = self.memory.take(Part::Workspace, take(self.attention_bytes()))?;
        let partial = self.memory.take(Part::Workspace, take(self.partial_bytes()))?;
        let counters = self.memory.take(Part::Workspace, take(COUNTERS * 4))?;
        self.zero(counters, take(COUNTERS * 4))?;
        self.workspace = Workspace { partial, attention, counters };
        let sizes = self.sizes(layout);
        self.lt = self.open_lt(&sizes)?;
        self.device = Some(Device::new(&self.gpu, &mut self.memory, layout, sizes)?);
        self.slots = Slots::new(layout);
        self.rings = Some(self.open_rings(&sizes)?);
        let most = self.limits.rows.min(self.limits.tokens);
        let rows = if self.outline.vocab == 0 { Vec::new() } else { buckets(most) };
        self.builder.buckets = rows.into_iter().map(|n| (n, Rc::new(self.builder.layout(n, n, n)))).collect();
        self.report(layout);
        Ok(())
    }

    fn open_rings(&self, sizes: &Sizes) -> Result<Rings> {
        let (tokens, rows) = (self.limits.tokens, self.limits.rows.min(self.limits.tokens));
        let largest = self.builder.layout(tokens, rows, tokens);
        let late = largest.bytes - largest.samples.offset;
        // Masks never go up with the rest.
        let early = largest.lists.offset + self.builder.edit_bytes(rows);
        let open = || -> std::result::Result<Rings, CudaError> {
            let events = (0..MAX_PENDING).map(|_| Ok((Event::timed(&self.gpu)?, Event::timed(&self.gpu)?)));
            Ok(Rings {
                step: UploadRing::new(&self.gpu, early.max(16), MAX_PENDING)?,
                late: UploadRing::new(&self.gpu, late.max(16), MAX_PENDING)?,
                counts: UploadRing::new(&self.gpu, sizes.count_tokens() * 4, MAX_PENDING)?,
                results: ReadBack::new(&self.gpu, sizes.results.max(16), MAX_PENDING)?,
                events: events.collect::<std::result::Result<_, CudaError>>()?,
            })
        };
        open().map_err(driver("allocate_cache"))
    }

    /// cublasLt with a plan for each shape, or none where it is not wanted, not found, or not needed.
    fn open_lt(&mut self, sizes: &Sizes) -> Result<Option<Lt>> {
        let shapes = self.products.shapes(sizes.vocab, sizes.logit_rows(), self.limits.tokens);
        if !self.options.cublaslt || self.options.batch_invariant || shapes.is_empty() {
            return Ok(None);
        }
        let workspace = self.memory.take(Part::Workspace, LT_WORKSPACE)?;
        let options = LtOptions {
            workspace,
            workspace_bytes: LT_WORKSPACE,
            candidates: self.options.matmul_candidates,
            plan_folder: self.options.plan_folder.clone(),
        };
        let mut lt = match Lt::new(&self.gpu, options) {
            Ok(lt) => lt,
            Err(error @ CudaError::NoLibrary { .. }) => {
                tracing::warn!(%error, "products of more than 64 rows run in the crate's own kernel, which is slower");
                return Ok(None);
            }
            Err(error) => return Err(driver("cublasLt")(error)),
        };
        lt.tune(&shapes, self.memory.rest()).map_err(driver("cublasLt"))?;
        Ok(Some(lt))
    }

    /// Says in a line each what was widened, which heads have no tensor-core kernel, and how memory was divided.
    fn report(&mut self, layout: &CacheLayout) {
        self.widened.sort_by_key(|storage| format!("{storage:?}"));
        self.widened.dedup();
        if !self.widened.is_empty() {
            tracing::info!(storages = ?self.widened, "weights widened to bf16: there are no kernels for these");
        }
        let e4m3 = layout
            .groups
            .iter()
            .any(|group| matches!(group, GroupLayout::Paged(pages) if pages.dtype == CacheDtype::F8E4M3));
        let mut general: Vec<(usize, usize)> = Vec::new();
        for spec in &self.outline.attentions {
            let e4m3 = e4m3 && spec.visibility == Visibility::Causal;
            let dims = (spec.key_dim, spec.value_dim);
            if self.fast_heads(spec, e4m3).is_none() && !general.contains(&dims) {
                general.push(dims);
            }
        }
        for (key_dim, value_dim) in general {
            tracing::info!(key_dim, value_dim, "heads without a tensor-core kernel: general attention");
        }
        let budget = self.memory.finish();
        tracing::info!("GPU memory\n{budget}");
    }
}

/// Blocks of the decode kernel, each of which asks for `shared` bytes, on a multiprocessor that has `there`.
fn decode_blocks(there: u32, shared: u32) -> u32 {
    (there / (shared + SHARED_A_BLOCK)).clamp(1, MOST_DECODE_BLOCKS)
}

/// More groups of split rows than there are counters is a mistake in this module.
fn check_counters(grid: usize) -> Result<()> {
    if WorkClass::most_groups(grid) <= COUNTERS {
        return Ok(());
    }
    Err(device("allocate_cache", format!("{grid} blocks of attention, {COUNTERS} counters")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_blocks_decode_as_the_multiprocessor_s_shared_memory_holds() {
        // Heads of 64, 128 and 256 in bf16: of compute capability 9.0, 8.0, and 8.9 and 12.0.
        for (there, blocks) in [(228 << 10, [3, 3, 1]), (164 << 10, [2, 2, 1]), (100 << 10, [1, 1, 1])] {
            assert_eq!(
                [57_600, 73_984, 143_616].map(|shared| decode_blocks(there, shared)),
                blocks,
                "{there}"
            );
        }
        assert_eq!(decode_blocks(228 << 10, 1024), MOST_DECODE_BLOCKS);
    }
}
