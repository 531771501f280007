//! What a device must be able to do, so that the forward pass is written once.
//!
//! Owns the trait and the plain data its operations take. It never looks at an architecture's name: a model
//! is a list of layers with specifications, and an operation sees only the specification of its own layer.
//!
//! Activations are matrices `[rows, width]`, row-major, one row a token of the step (or one row an output of the
//! step, see [`Rows`]). How many rows are live is a property of the step, announced by [`Backend::begin`];
//! buffers are allocated once, for the largest step. No operation takes a value of the step as an argument, so
//! that a device may record the operations once for each shape and replay them.

use std::borrow::Cow;

use half::bf16;
use mirai_engine::{BLOCK_TOKENS, SlotId, StepOutcome, StepPlan};

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
    /// Its outputs: a range of [`Batch::outputs`], the sampled one last.
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
    /// `[outputs]`: tokens of the step whose logits are wanted, ascending: the last token of each sampling row,
    /// and all tokens of a row whose slot wants prompt log-probabilities.
    pub outputs: Vec<u32>,
}

/// Element of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheDtype {
    /// Exact; for tests and small models.
    F32,
    /// Half the memory.
    Bf16,
}

/// One layer group's pages: `layers` layers, each `[K|V][kv_heads][16][head_dim]`, back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLayout {
    /// Layers that share a page.
    pub layers: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: CacheDtype,
}

impl GroupLayout {
    /// Elements of one layer's part of a page, keys and values together.
    #[must_use]
    pub const fn layer_elements(&self) -> usize {
        2 * self.kv_heads * BLOCK_TOKENS * self.head_dim
    }

    /// Bytes of one page.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        let element = match self.dtype {
            CacheDtype::F32 => size_of::<f32>(),
            CacheDtype::Bf16 => size_of::<bf16>(),
        };
        self.layers * self.layer_elements() * element
    }
}

/// The whole cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    /// In the order of the engine's groups.
    pub groups: Vec<GroupLayout>,
    /// Pages in the pool that the groups share, page 0 included; a page is as large as the largest group needs.
    pub blocks: usize,
    /// Sequences at once.
    pub slots: usize,
    /// Entries of one slot's block table: the context length over 16, rounded up.
    pub table_len: usize,
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Index of its layer group.
    pub group: usize,
    /// Which of the group's layers it is.
    pub layer_in_group: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplies the scores; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A query at `p` sees `p - n + 1 ..= p`.
    pub window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Rotary position embedding tables: `[max_context, rotary_dim / 2]` cosines and sines, scaling already applied.
/// The first `rotary_dim` elements of a head are rotated as two halves (element `i` with `i + rotary_dim / 2`).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Elements of a head that are rotated.
    pub rotary_dim: usize,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// Gate of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
}

/// A device operation failed, or a tensor cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This backend has no kernel for that.
    #[error("tensor `{name}`: {storage:?} with shape {shape:?} is not supported by this backend: {why}")]
    Unsupported {
        /// Tensor.
        name: String,
        /// Its storage.
        storage: Storage,
        /// Its shape.
        shape: Vec<usize>,
        /// What is missing.
        why: String,
    },
    /// Not enough memory.
    #[error("{what} needs {need} bytes, {have} are left")]
    OutOfMemory {
        /// For what.
        what: String,
        /// Bytes.
        need: u64,
        /// Bytes.
        have: u64,
    },
    /// The device said no.
    #[error("{operation}: {message}")]
    Device {
        /// While doing what.
        operation: &'static str,
        /// Its words.
        message: String,
    },
}

/// What [`Backend`] methods return.
pub type Result<T> = std::result::Result<T, BackendError>;

/// A device. All methods are called on one thread.
pub trait Backend {
    /// Activations, `[rows, width]`.
    type Buffer;
    /// Weight of a linear layer or an embedding, `[out, in]`, in any storage.
    type Linear;
    /// A vector of parameters: norm weight or bias.
    type Vector;
    /// A [`RopeTable`] on the device.
    type Rope;

    // ---- loading ----

    /// Says how large steps get. Called once, before everything else; a device whose buffers grow has no use
    /// for it.
    /// # Errors
    /// Larger than the device can run.
    fn limits(&mut self, limits: StepLimits) -> Result<()> {
        let _ = limits;
        Ok(())
    }
    /// Takes a weight; several tensors are stacked along the output dimension and multiplied in one call. They
    /// have equal input widths, and may differ in storage (GGUF mixes them). The same tensor may be taken as a
    /// linear and as the table of [`Backend::embed`]. Bytes are copied or repacked: files are unmapped after
    /// loading.
    /// # Errors
    /// Storage or shape without a kernel, or no memory.
    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Self::Linear>;
    /// Takes a vector; several tensors are concatenated.
    /// # Errors
    /// As [`Backend::load_linear`].
    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Self::Vector>;
    /// Takes rotary tables.
    /// # Errors
    /// No memory.
    fn load_rope(&mut self, table: &RopeTable) -> Result<Self::Rope>;
    /// Allocates a buffer for the largest step.
    /// # Errors
    /// No memory.
    fn buffer(&mut self, rows: Rows, width: usize) -> Result<Self::Buffer>;
    /// Allocates pages, slot tables and sampling state. Called once, after the weights.
    /// # Errors
    /// No memory.
    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()>;

    // ---- a step ----

    /// Applies the plan's changes to slots (saves, opens, appends) and uploads the step.
    /// # Errors
    /// The device failed.
    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()>;
    /// Runs a closure of operations; a device may record them once for each shape and replay them.
    /// # Errors
    /// An operation failed.
    fn run(&mut self, shape: StepShape, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()>;

    /// `out[t] = table[id[t]] * scale` for the step's tokens.
    /// # Errors
    /// The device failed.
    fn embed(&mut self, table: &Self::Linear, scale: f32, out: &mut Self::Buffer) -> Result<()>;
    /// `out = x / rms(x) * (w + offset)`, for each row.
    /// # Errors
    /// The device failed.
    fn rms_norm(&mut self, x: &Self::Buffer, norm: &Norm<Self::Vector>, out: &mut Self::Buffer)
    -> Result<()>;
    /// `residual += x`, then `out` is the norm of `residual`.
    /// # Errors
    /// The device failed.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Buffer,
        x: &Self::Buffer,
        norm: &Norm<Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = x w^T + bias`.
    /// # Errors
    /// The device failed.
    fn linear(
        &mut self,
        w: &Self::Linear,
        bias: Option<&Self::Vector>,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// On rows `[q | k | v]` of all heads: norms each head of q and k if asked, rotates q and k, and writes k and v
    /// into the pages of the row's slot. q stays in `qkv`.
    /// # Errors
    /// The device failed.
    fn rope_append(
        &mut self,
        spec: &AttentionSpec,
        qk_norm: Option<HeadNorms<'_, Self::Vector>>,
        rope: Option<&Self::Rope>,
        qkv: &mut Self::Buffer,
    ) -> Result<()>;
    /// Causal attention of the step's queries (the first `q_heads * head_dim` columns of `qkv`) over the pages.
    /// # Errors
    /// The device failed.
    fn attention(&mut self, spec: &AttentionSpec, qkv: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// On rows `[gate | up]`: `out = activation(gate) * up`.
    /// # Errors
    /// The device failed.
    fn glu(&mut self, activation: Activation, gate_up: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// `residual += x`.
    /// # Errors
    /// The device failed.
    fn add(&mut self, residual: &mut Self::Buffer, x: &Self::Buffer) -> Result<()>;
    /// Copies the step's output rows: `out[o] = x[outputs[o]]`.
    /// # Errors
    /// The device failed.
    fn gather_outputs(&mut self, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Logits of the gathered rows, then for each row of the batch: prompt log-probabilities, penalties, masks,
    /// the draw, and its token into the slot. Logits are `hidden head^T`, soft-capped and scaled if asked, and need
    /// not exist for all rows at once.
    /// # Errors
    /// The device failed. What is wrong with one row is a fault of that row, reported by [`Backend::collect`].
    fn sample(&mut self, head: &LogitsHead<'_, Self::Linear>, hidden: &Self::Buffer) -> Result<()>;

    /// Waits for the oldest step that is not yet collected.
    /// # Errors
    /// The device failed.
    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<()>;
    /// Whether a step still runs after its last call returned.
    fn is_asynchronous(&self) -> bool;

    // ---- composites: a device with fused kernels overrides them ----

    /// From normed rows to the attention block's output, before the residual.
    /// # Errors
    /// The device failed.
    fn attention_block(
        &mut self,
        block: &AttentionBlock<'_, Self>,
        io: BlockIo<'_, Self::Buffer>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        self.linear(block.qkv, block.qkv_bias, io.x, io.wide)?;
        self.rope_append(block.spec, block.qk_norm, block.rope, io.wide)?;
        self.attention(block.spec, io.wide, io.inner)?;
        self.linear(block.output, block.output_bias, io.inner, io.out)
    }

    /// From normed rows to the feed-forward block's output, before the residual.
    /// # Errors
    /// The device failed.
    fn mlp_block(&mut self, block: &MlpBlock<'_, Self>, io: BlockIo<'_, Self::Buffer>) -> Result<()>
    where
        Self: Sized,
    {
        self.linear(block.gate_up, block.gate_up_bias, io.x, io.wide)?;
        self.glu(block.activation, io.wide, io.inner)?;
        self.linear(block.down, block.down_bias, io.inner, io.out)
    }
}

/// Root-mean-square norm: weight, what is added to it (1 in some families), epsilon.
#[derive(Clone, Debug)]
pub struct Norm<V> {
    /// `[width]`.
    pub weight: V,
    /// Added to each weight.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Norms of each query head and of each key head.
pub type HeadNorms<'a, V> = (&'a Norm<V>, &'a Norm<V>);

/// How hidden rows become logits.
#[derive(Clone, Copy, Debug)]
pub struct LogitsHead<'a, L> {
    /// `[vocab, hidden]`.
    pub weight: &'a L,
    /// Multiplies the logits.
    pub scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub soft_cap: Option<f32>,
    /// Logits that count; the weight may have padding rows beyond them.
    pub vocab: usize,
}

/// Weights of an attention block.
pub struct AttentionBlock<'a, B: Backend> {
    /// Shape.
    pub spec: &'a AttentionSpec,
    /// `[q | k | v]` of all heads.
    pub qkv: &'a B::Linear,
    /// Its bias.
    pub qkv_bias: Option<&'a B::Vector>,
    /// Norms of each query and key head.
    pub qk_norm: Option<HeadNorms<'a, B::Vector>>,
    /// Rotation; none in layers without positions.
    pub rope: Option<&'a B::Rope>,
    /// Projection back to the hidden size.
    pub output: &'a B::Linear,
    /// Its bias.
    pub output_bias: Option<&'a B::Vector>,
}

/// Weights of a gated feed-forward block.
pub struct MlpBlock<'a, B: Backend> {
    /// `[gate | up]`.
    pub gate_up: &'a B::Linear,
    /// Its bias.
    pub gate_up_bias: Option<&'a B::Vector>,
    /// Gate.
    pub activation: Activation,
    /// Projection back to the hidden size.
    pub down: &'a B::Linear,
    /// Its bias.
    pub down_bias: Option<&'a B::Vector>,
}

/// Buffers of a block: input, two of its own, output.
pub struct BlockIo<'a, T> {
    /// Normed rows, `[tokens, hidden]`.
    pub x: &'a T,
    /// `[tokens, q + k + v]` or `[tokens, gate + up]`.
    pub wide: &'a mut T,
    /// `[tokens, q_heads * head_dim]` or `[tokens, intermediate]`.
    pub inner: &'a mut T,
    /// `[tokens, hidden]`.
    pub out: &'a mut T,
}
