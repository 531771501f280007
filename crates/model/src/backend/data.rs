//! Plain data that crosses the boundary between the model and a device: tensors, steps, and the cache's shape.

use std::borrow::Cow;

use half::bf16;
use mirai_engine::{BLOCK_TOKENS, SlotId};

use super::ops::{Activation, AttentionSpec, DeltaShape, Stored};

/// How the numbers of a weight lie in the file, and in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF blocks of 32: scale, 4-bit values.
    Q4_0,
    /// GGUF blocks of 32: scale, minimum, 4-bit values.
    Q4_1,
    /// GGUF blocks of 32: scale, 5-bit values.
    Q5_0,
    /// GGUF blocks of 32: scale, minimum, 5-bit values.
    Q5_1,
    /// GGUF blocks of 32: scale, 8-bit values.
    Q8_0,
    /// GGUF super-blocks of 256, 2 bits.
    Q2K,
    /// GGUF super-blocks of 256, 3 bits.
    Q3K,
    /// GGUF super-blocks of 256, 4 bits.
    Q4K,
    /// GGUF super-blocks of 256, 5 bits.
    Q5K,
    /// GGUF super-blocks of 256, 6 bits.
    Q6K,
    /// 8 bits with 4 of exponent, finite only; with [`Scales`].
    F8E4M3,
    /// 4 bits with 2 of exponent (MXFP4), two a byte, low half first; with [`Scales`].
    F4E2M1,
    /// Whole numbers 0 to 15, two a byte, low half first; with [`Scales`], whose zeros are subtracted first.
    U4,
}

/// A tensor on its way from a file to a device: still the file's bytes, checked against its shape.
#[derive(Clone, Debug)]
pub struct HostTensor<'a> {
    /// Name in the file, for errors.
    pub name: String,
    /// Outermost first; a linear's weight is `[out, in]`.
    pub shape: Vec<usize>,
    /// How `bytes` are to be read. Quantized storages block the last dimension.
    pub storage: Storage,
    /// Exactly as many as shape and storage need, little-endian.
    pub bytes: Cow<'a, [u8]>,
    /// What multiplies the numbers, in storages that need it.
    pub scales: Option<Scales<'a>>,
}

/// Scales of a quantized matrix `[rows, columns]`: one for each block of it, row-major
/// `[ceil(rows / block.0), ceil(columns / block.1)]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales<'a> {
    /// Rows and columns that share a scale.
    pub block: (usize, usize),
    /// The factors.
    pub values: ScaleValues<'a>,
    /// For each scale, what is subtracted from a stored number before it is multiplied; 0 where there are none.
    pub zeros: Option<Vec<u8>>,
}

/// Factors.
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleValues<'a> {
    /// Single precision.
    F32(Vec<f32>),
    /// Powers of two: `2^(byte - 127)`; 255 is not a number.
    E8M0(Cow<'a, [u8]>),
}

/// What the product with a linear weight is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearUse {
    /// Rows of activations.
    Activations,
    /// Nothing: its rows are looked up.
    Table,
    /// Logits of the vocabulary; its rows may be looked up too.
    Logits,
    /// Logits from which experts are chosen.
    Router,
}

/// What the rows of a buffer stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One for each token of the step.
    Tokens,
    /// One for each position of the step whose logits are wanted, in order of [`Batch::outputs`].
    Outputs,
}

/// Shape of a step: all that recorded operations may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Tokens.
    pub tokens: usize,
    /// Positions with logits.
    pub outputs: usize,
    /// Whether every row has exactly one token.
    pub decode_only: bool,
}

/// Largest step that will be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens, which also bounds the outputs.
    pub tokens: usize,
    /// Rows: sequences at once.
    pub rows: usize,
}

/// What a device may want to know of a model before its cache is allocated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outline {
    /// Attention of all layers, in their order.
    pub attentions: Vec<AttentionSpec>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the logits; 0 in models that do not generate.
    pub vocab: usize,
    /// Experts of all layers that have any.
    pub experts: Vec<ExpertOutline>,
}

/// An expert's rows between its two products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertOutline {
    /// Their width.
    pub intermediate: usize,
    /// Whether they are a gate's and an up's.
    pub gated: bool,
    /// How.
    pub activation: Activation,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRow {
    /// Whose tables, state and sampling parameters apply.
    pub slot: SlotId,
    /// Index of its first token in the step.
    pub first: usize,
    /// Its tokens.
    pub len: usize,
    /// Position of its first token in the sequence; its last token sees `start + len` keys.
    pub start: usize,
    /// Whether the id of its single token is the one that the slot drew last ([`Batch::ids`] has no value then).
    pub last_drawn: bool,
    /// Whether a token is drawn after its last token.
    pub sample: bool,
    /// Whether the model's pooling head answers for the sequence, whose last token this row has.
    pub pool: bool,
    /// Its outputs: a range of [`Batch::outputs`], the sampled one last. A pooling row has exactly one.
    pub outputs: (usize, usize),
}

/// A step, flattened from the engine's plan.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[tokens]`; meaningless where the row is `last_drawn`.
    pub ids: Vec<u32>,
    /// `[tokens]`: position in its sequence.
    pub positions: Vec<u32>,
    /// Sequences, in the plan's order.
    pub rows: Vec<BatchRow>,
    /// `[outputs]`: tokens of the step that go on after the last layer, ascending: the last token of each sampling
    /// row, all tokens of a row whose slot wants prompt log-probabilities, and the token that stands for the
    /// sequence of each pooling row.
    pub outputs: Vec<u32>,
}

/// Element of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheDtype {
    /// Exact; for tests and small models.
    F32,
    /// Half the memory.
    Bf16,
    /// 8-bit floats (e4m3): a quarter.
    F8E4M3,
}

/// Pages of one layer group: `layers` layers, back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Layers that share a page.
    pub layers: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a stored key.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Where values are.
    pub stored: Stored,
    /// Element type.
    pub dtype: CacheDtype,
}

impl PageLayout {
    /// Elements that one token takes in one kv head of one layer.
    #[must_use]
    pub const fn token_elements(&self) -> usize {
        match self.stored {
            Stored::KeysAndValues => self.key_dim + self.value_dim,
            Stored::ValueInKey => self.key_dim,
        }
    }

    /// Elements of one layer's part of a page.
    #[must_use]
    pub const fn layer_elements(&self) -> usize {
        self.kv_heads * BLOCK_TOKENS * self.token_elements()
    }

    /// Bytes of one page.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        let element = match self.dtype {
            CacheDtype::F32 => size_of::<f32>(),
            CacheDtype::Bf16 => size_of::<bf16>(),
            CacheDtype::F8E4M3 => 1,
        };
        self.layers * self.layer_elements() * element
    }
}

/// State of one recurrent layer group in a slot: `layers` layers, in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateLayout {
    /// Layers of the group.
    pub layers: usize,
    /// Of each layer.
    pub shape: DeltaShape,
}

impl StateLayout {
    /// Elements of a slot's state, or of a snapshot of it.
    #[must_use]
    pub const fn elements(&self) -> usize {
        self.layers * (self.shape.conv_elements() + self.shape.state_elements())
    }
}

/// What a layer group keeps of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupLayout {
    /// Pages of the shared pool.
    Paged(PageLayout),
    /// A state in the slot.
    Recurrent(StateLayout),
}

impl GroupLayout {
    /// Bytes of one page; 0 where there are none.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        match self {
            Self::Paged(pages) => pages.page_bytes(),
            Self::Recurrent(_) => 0,
        }
    }
}

/// The whole cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    /// In the order of the engine's groups; none where no layer keeps anything (an encoder).
    pub groups: Vec<GroupLayout>,
    /// Pages in the pool that the groups share, page 0 included; a page is as large as the largest group needs.
    pub blocks: usize,
    /// Sequences at once.
    pub slots: usize,
    /// Snapshots of recurrent state that can be kept.
    pub snapshots: usize,
    /// Entries of one slot's block table: the context length over 16, rounded up.
    pub table_len: usize,
}
