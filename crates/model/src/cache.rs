//! How much KV memory there is, and how layers share it.
//!
//! Owns the grouping of layers and the arithmetic from a budget to pages and snapshots. All paged groups take pages of
//! equal size from one pool, so a page is as large as the largest group needs; the grouping is chosen to waste least.
//! Layers that read another layer's keys share its place; layers that see whole prompts keep nothing.

use mirai_engine::{BLOCK_TOKENS, GroupKind};

use crate::backend::{
    AttentionSpec, CacheDtype, CacheLayout, DeltaShape, ExpertOutline, GroupLayout, Outline, PageLayout,
    StateLayout, Stored, Visibility,
};
use crate::budget::CacheBudget;
use crate::error::{ModelError, Result};
use crate::spec::{AttentionLayer, Ffn, Head, KvSource, Mixer, ModelSpec};

/// Most groups. Each costs the scheduler a block table for every sequence.
const MAX_GROUPS: usize = 16;
/// Most pages: ids are 32 bits wide, and some room is left below.
const MAX_BLOCKS: u64 = 1 << 31;
/// Most snapshots, likewise.
const MAX_SNAPSHOTS: u64 = 1 << 20;
/// Snapshots may take this part of a budget in bytes, unless the user says otherwise.
const SNAPSHOT_SHARE: u64 = 8;

/// What the cache has room for, for the log and for `/metrics`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheReport {
    /// Groups of layers.
    pub groups: usize,
    /// Bytes of one page.
    pub page_bytes: u64,
    /// Pages, the reserved one included.
    pub blocks: u64,
    /// Bytes of all pages, states and snapshots.
    pub bytes: u64,
    /// Tokens that all groups can hold at once.
    pub tokens: u64,
    /// Bytes that one token takes in the pages of all layers, windows not counted off.
    pub token_bytes: u64,
    /// Bytes of one sequence's recurrent state.
    pub state_bytes: u64,
    /// Snapshots of such states that can be kept.
    pub snapshots: u64,
    /// Most tokens of one sequence.
    pub max_context: usize,
}

/// Groups of a model's layers, and where each layer went.
#[derive(Clone, Debug, PartialEq)]
pub struct Grouping {
    /// What each group keeps.
    pub kinds: Vec<GroupKind>,
    /// Its pages or states.
    pub layouts: Vec<GroupLayout>,
    /// For each layer its group, and its number in it; none where nothing is kept.
    pub places: Vec<Option<(usize, usize)>>,
}

/// Layers that could share a group: equal heads and equal reach, or equal states.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Paged(PagedClass),
    Recurrent(DeltaShape),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct PagedClass {
    window: Option<u32>,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    stored: Stored,
}

impl PagedClass {
    fn layout(self, layers: usize, dtype: CacheDtype) -> PageLayout {
        let Self { kv_heads, key_dim, value_dim, stored, .. } = self;
        PageLayout { layers, kv_heads, key_dim, value_dim, stored, dtype }
    }

    fn layer_bytes(self, dtype: CacheDtype) -> usize {
        self.layout(1, dtype).page_bytes()
    }
}

/// What a layer keeps of a sequence in a place of its own.
fn class(spec: &ModelSpec, mixer: &Mixer, max_context: usize) -> Option<Class> {
    match mixer {
        Mixer::Attention(a) if a.bidirectional || matches!(a.kv, KvSource::Layer(_)) => None,
        Mixer::Attention(a) => {
            let (key_dim, stored) = spec.stored(a);
            let window = a.window.filter(|&w| (w as usize) < max_context);
            let (kv_heads, value_dim) = (a.kv_heads, a.head_dim);
            Some(Class::Paged(PagedClass { window, kv_heads, key_dim, value_dim, stored }))
        }
        Mixer::Latent(l) => Some(Class::Paged(PagedClass {
            window: None,
            kv_heads: 1,
            key_dim: l.shape.latent + l.shape.rope,
            value_dim: l.shape.latent,
            stored: Stored::ValueInKey,
        })),
        Mixer::Delta(d) => Some(Class::Recurrent(d.shape)),
    }
}

impl Grouping {
    /// Groups the layers of a model. A window that is not shorter than the context is none.
    #[must_use]
    pub fn new(spec: &ModelSpec, dtype: CacheDtype, max_context: usize) -> Self {
        let mut classes: Vec<(Class, Vec<usize>)> = Vec::new();
        for (index, layer) in spec.layers.iter().enumerate() {
            let Some(class) = class(spec, &layer.mixer, max_context) else { continue };
            match classes.iter_mut().find(|(c, _)| *c == class) {
                Some((_, members)) => members.push(index),
                None => classes.push((class, vec![index])),
            }
        }
        let page = page_bytes(&classes, dtype);
        let mut out = Self { kinds: vec![], layouts: vec![], places: vec![None; spec.layers.len()] };
        for (class, members) in &classes {
            match class {
                Class::Paged(class) => {
                    // Members are spread evenly, so that no group of a class is a lone rest.
                    let groups = members.len().div_ceil((page / class.layer_bytes(dtype)).max(1));
                    for run in members.chunks(members.len().div_ceil(groups)) {
                        let kind = class.window.map_or(GroupKind::Full, GroupKind::Window);
                        out.push(kind, GroupLayout::Paged(class.layout(run.len(), dtype)), run);
                    }
                }
                Class::Recurrent(shape) => {
                    let layout = StateLayout { layers: members.len(), shape: *shape };
                    out.push(GroupKind::Recurrent, GroupLayout::Recurrent(layout), members);
                }
            }
        }
        for (index, layer) in spec.layers.iter().enumerate() {
            if let Mixer::Attention(AttentionLayer { kv: KvSource::Layer(source), .. }) = layer.mixer {
                out.places[index] = out.places[source];
            }
        }
        out
    }

    fn push(&mut self, kind: GroupKind, layout: GroupLayout, layers: &[usize]) {
        for (place, &layer) in layers.iter().enumerate() {
            self.places[layer] = Some((self.kinds.len(), place));
        }
        self.kinds.push(kind);
        self.layouts.push(layout);
    }

    /// Bytes of a page of the pool.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.layouts.iter().map(GroupLayout::page_bytes).max().unwrap_or(0)
    }

    /// Bytes that one token takes in the pages of all layers, windows not counted off.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.layouts.iter().map(GroupLayout::page_bytes).sum::<usize>() / BLOCK_TOKENS
    }

    /// Bytes of one sequence's recurrent state.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let elements = self.layouts.iter().map(|layout| match layout {
            GroupLayout::Paged(_) => 0,
            GroupLayout::Recurrent(state) => state.elements(),
        });
        elements.sum::<usize>() * size_of::<f32>()
    }

    /// Groups that take pages.
    fn paged(&self) -> u64 {
        self.kinds.iter().filter(|k| **k != GroupKind::Recurrent).count() as u64
    }

    /// A layer's group, and its number in it; zeros where nothing is kept.
    #[must_use]
    pub fn place(&self, layer: usize) -> (usize, usize) {
        self.places[layer].unwrap_or_default()
    }

    /// What the backend needs to know of a layer's attention.
    ///
    /// # Panics
    /// The layer is a delta net.
    #[must_use]
    pub fn attention(&self, spec: &ModelSpec, layer: usize) -> AttentionSpec {
        let (group, layer_in_group) = self.place(layer);
        match &spec.layers[layer].mixer {
            Mixer::Attention(a) => {
                let (key_dim, stored) = spec.stored(a);
                let window = match (a.bidirectional, self.kinds.get(group)) {
                    (true, _) => a.window,
                    (false, Some(GroupKind::Window(n))) => Some(*n),
                    (false, _) => None,
                };
                AttentionSpec {
                    group,
                    layer_in_group,
                    appends: !a.bidirectional && !matches!(a.kv, KvSource::Layer(_)),
                    q_heads: a.q_heads,
                    kv_heads: a.kv_heads,
                    key_dim,
                    value_dim: a.head_dim,
                    stored,
                    scale: a.scale,
                    visibility: if a.bidirectional { Visibility::Whole } else { Visibility::Causal },
                    window,
                    soft_cap: a.soft_cap,
                }
            }
            Mixer::Latent(l) => AttentionSpec {
                group,
                layer_in_group,
                appends: true,
                q_heads: l.heads,
                kv_heads: 1,
                key_dim: l.shape.latent + l.shape.rope,
                value_dim: l.shape.latent,
                stored: Stored::ValueInKey,
                scale: l.scale,
                visibility: Visibility::Causal,
                window: None,
                soft_cap: None,
            },
            Mixer::Delta(_) => unreachable!("a delta net has no attention"),
        }
    }

    /// What a device is told of the model.
    #[must_use]
    pub fn outline(&self, spec: &ModelSpec) -> Outline {
        let layers = spec.layers.iter().enumerate();
        let attends = layers.filter(|(_, layer)| !matches!(layer.mixer, Mixer::Delta(_)));
        let experts = spec.layers.iter().filter_map(|layer| match &layer.ffn {
            Ffn::Dense(_) => None,
            Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe) => Some(ExpertOutline {
                intermediate: moe.expert.intermediate,
                gated: moe.expert.gated,
                activation: moe.expert.activation,
            }),
        });
        Outline {
            attentions: attends.map(|(index, _)| self.attention(spec, index)).collect(),
            hidden: spec.hidden,
            vocab: if matches!(spec.head, Head::Logits { .. }) { spec.vocab } else { 0 },
            experts: experts.collect(),
        }
    }
}

/// The page size that wastes least in a token's pages, and among equals needs the fewest groups.
fn page_bytes(classes: &[(Class, Vec<usize>)], dtype: CacheDtype) -> usize {
    let paged = classes.iter().filter_map(|(class, members)| match class {
        Class::Paged(class) => Some((class.layer_bytes(dtype), members.len())),
        Class::Recurrent(_) => None,
    });
    let paged: Vec<(usize, usize)> = paged.collect();
    let candidates = paged.iter().flat_map(|&(bytes, members)| (1..=members).map(move |n| n * bytes));
    let cost = |page: usize| {
        let groups = paged.iter().map(|&(bytes, members)| match page / bytes {
            0 => usize::MAX / 2,
            fit => members.div_ceil(fit),
        });
        let groups = groups.fold(0usize, usize::saturating_add);
        (groups > MAX_GROUPS.max(paged.len()), groups.saturating_mul(page), groups)
    };
    candidates.min_by_key(|&page| cost(page)).unwrap_or(0)
}

/// Pages that one sequence of `tokens` needs.
fn sequence_pages(grouping: &Grouping, tokens: usize, max_step_tokens: usize) -> u64 {
    let pages = |kind: &GroupKind| match kind {
        GroupKind::Full => tokens.div_ceil(BLOCK_TOKENS),
        // The window, the step that is being computed, and a page that both only touch.
        GroupKind::Window(n) => {
            let reach = tokens.min(*n as usize + max_step_tokens);
            (reach.div_ceil(BLOCK_TOKENS) + 1).min(tokens.div_ceil(BLOCK_TOKENS))
        }
        GroupKind::Recurrent => 0,
    };
    grouping.kinds.iter().map(|k| pages(k) as u64).sum()
}

/// Longest sequence, of at most `wanted` tokens, that fits in `pages`.
fn longest(grouping: &Grouping, wanted: usize, max_step_tokens: usize, pages: u64) -> usize {
    let (mut low, mut high) = (0, wanted);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if sequence_pages(grouping, middle, max_step_tokens) <= pages {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct CacheRequest {
    /// Memory.
    pub budget: CacheBudget,
    /// Bytes that snapshots of recurrent state may take of it. By default an eighth of a budget in bytes; of a budget
    /// in tokens, a snapshot for each slot.
    pub snapshot_bytes: Option<u64>,
    /// Element type.
    pub dtype: CacheDtype,
    /// Longest sequence, if the user named one; else the model's context, or what fits.
    pub max_model_len: Option<usize>,
    /// Sequences at once.
    pub slots: usize,
    /// Most tokens in a step.
    pub max_step_tokens: usize,
}

impl CacheRequest {
    /// Longest sequence that is wanted, whether or not it fits.
    ///
    /// # Errors
    /// Longer than the model's context.
    pub fn context(&self, spec: &ModelSpec) -> Result<usize> {
        let wanted = self.max_model_len.unwrap_or(spec.context);
        if wanted == 0 || wanted > spec.context {
            let why = format!("is {wanted}, the model's context is {}", spec.context);
            return Err(ModelError::Option { option: "max-model-len", why });
        }
        Ok(wanted)
    }

    /// Snapshots, of states of so many bytes.
    fn snapshots(&self, state: u64) -> u64 {
        if state == 0 {
            return 0;
        }
        let count = match (self.snapshot_bytes, self.budget) {
            (Some(bytes), _) => bytes / state,
            (None, CacheBudget::Bytes(bytes)) => bytes / SNAPSHOT_SHARE / state,
            (None, CacheBudget::Device) => 0,
            (None, CacheBudget::Tokens(_)) => self.slots as u64,
        };
        count.min(MAX_SNAPSHOTS)
    }

    /// Bytes that are left for pages; none of a budget in tokens.
    fn page_budget(&self, state: u64, snapshots: u64) -> Result<Option<u64>> {
        let CacheBudget::Bytes(bytes) = self.budget else { return Ok(None) };
        let states = state.saturating_mul(self.slots as u64 + snapshots);
        let left = bytes.checked_sub(states).ok_or_else(|| ModelError::Option {
            option: "max-num-seqs",
            why: format!(
                "is {}: with {snapshots} snapshots, recurrent states of {state} bytes take {states} bytes, \
                 the cache's budget is {bytes}",
                self.slots
            ),
        })?;
        Ok(Some(left))
    }
}

/// Turns a budget into a layout.
///
/// # Errors
/// The context that was asked for is beyond the model's, or does not fit in the budget; or nothing fits.
pub fn plan_cache(spec: &ModelSpec, request: &CacheRequest) -> Result<(Grouping, CacheLayout, CacheReport)> {
    let wanted = request.context(spec)?;
    let grouping = Grouping::new(spec, request.dtype, wanted);
    let (page, groups) = (grouping.page_bytes() as u64, grouping.paged());
    let state = grouping.state_bytes() as u64;
    let snapshots = request.snapshots(state);
    let pages = match (request.page_budget(state, snapshots)?, request.budget) {
        (Some(bytes), _) => (bytes / page.max(1)).saturating_sub(1),
        (None, CacheBudget::Tokens(tokens)) => tokens.div_ceil(BLOCK_TOKENS as u64).saturating_mul(groups),
        (None, CacheBudget::Bytes(_) | CacheBudget::Device) => 0,
    };
    // More pages than all running sequences can fill would only make memory grow without an end.
    let useful =
        (request.slots as u64).saturating_mul(wanted.div_ceil(BLOCK_TOKENS) as u64).saturating_mul(groups);
    let pages = pages.min(useful).min(MAX_BLOCKS);
    let fits = longest(&grouping, wanted, request.max_step_tokens, pages);
    if fits == 0 || (request.max_model_len.is_some() && fits < wanted) {
        return Err(ModelError::CacheTooSmall {
            budget: request.budget,
            pages,
            page_bytes: page,
            groups,
            fits,
            wanted,
            memory: None,
        });
    }
    // Page 0 is nobody's; without groups there is no pool at all.
    let blocks = if groups == 0 { 0 } else { pages + 1 };
    let layout = CacheLayout {
        groups: grouping.layouts.clone(),
        blocks: blocks as usize,
        slots: request.slots,
        snapshots: snapshots as usize,
        table_len: fits.div_ceil(BLOCK_TOKENS),
    };
    let states = state.saturating_mul(request.slots as u64 + snapshots);
    let report = CacheReport {
        groups: grouping.kinds.len(),
        page_bytes: page,
        blocks,
        bytes: blocks.saturating_mul(page).saturating_add(states),
        tokens: pages / groups.max(1) * BLOCK_TOKENS as u64,
        token_bytes: grouping.token_bytes() as u64,
        state_bytes: state,
        snapshots,
        max_context: fits,
    };
    Ok((grouping, layout, report))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
