//! What a device must be able to do, so that the forward pass is written once.
//!
//! Owns the trait and the plain data its operations take. It never looks at an architecture's name: a model
//! is a list of layers with specifications, and an operation sees only the specification of its own layer.
//!
//! Activations are matrices `[rows, width]`, row-major, one row a token of the step (or one row an output of the
//! step, see [`Rows`]). How many rows are live is a property of the step, announced by [`Backend::begin`]; how wide
//! they are is said by the operation that writes them. Buffers are allocated once, for the largest step and the
//! widest rows. No operation takes a value of the step as an argument, so that a device may record the operations
//! once for each shape and replay them.

mod blocks;
mod data;
mod ops;

use mirai_engine::{StepOutcome, StepPlan};

pub use blocks::{AttentionBlock, BlockIo, DeltaBlock, LatentBlock, MlpBlock, MoeBlock, PostNormed};
pub use data::{
    Batch, BatchRow, CacheDtype, CacheLayout, ExpertOutline, GroupLayout, HostTensor, LinearUse, Outline,
    PageLayout, Rows, ScaleValues, Scales, StateLayout, StepLimits, StepShape, Storage,
};
pub use ops::{
    Activation, AttentionSpec, DeltaRule, DeltaShape, Experts, HeadNorms, HeadView, LatentShape, LogitsHead,
    Norm, NormKind, Pairing, Pooling, RopeTable, RouteGroups, RouteSpec, Scoring, Stored, Visibility,
};

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

impl BackendError {
    /// A block was handed fewer scratch buffers than it needs.
    fn scratch(operation: &'static str) -> Self {
        Self::Device { operation, message: "too few scratch buffers".to_owned() }
    }
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
    /// Several weights of one shape, `[n][out, in]`: experts, or heads.
    type Stack;
    /// For each token of the step, its experts and their weights.
    type Routing;

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
    /// Takes a weight whose product is for something else than rows of activations, or which is only looked up.
    /// # Errors
    /// As [`Backend::load_linear`].
    fn load_linear_for(&mut self, parts: Vec<HostTensor<'_>>, purpose: LinearUse) -> Result<Self::Linear> {
        let _ = purpose;
        self.load_linear(parts)
    }
    /// Takes a vector; several tensors are concatenated.
    /// # Errors
    /// As [`Backend::load_linear`].
    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Self::Vector>;
    /// Takes weights of one shape, each perhaps stacked of several tensors as in [`Backend::load_linear`].
    /// # Errors
    /// As [`Backend::load_linear`].
    fn load_stack(&mut self, weights: Vec<Vec<HostTensor<'_>>>) -> Result<Self::Stack>;
    /// Takes rotary tables.
    /// # Errors
    /// No memory.
    fn load_rope(&mut self, table: &RopeTable) -> Result<Self::Rope>;
    /// Allocates a buffer for the largest step, with rows of at most `width`.
    /// # Errors
    /// No memory.
    fn buffer(&mut self, rows: Rows, width: usize) -> Result<Self::Buffer>;
    /// Allocates room for the choice of `top_k` experts for each token of the largest step.
    /// # Errors
    /// No memory.
    fn routing(&mut self, top_k: usize) -> Result<Self::Routing>;
    /// Says what the model looks like. Called once, after [`Backend::limits`]; a device that allocates as it goes has no
    /// use for it.
    /// # Errors
    /// Something in it that the device cannot run.
    fn outline(&mut self, outline: &Outline) -> Result<()> {
        let _ = outline;
        Ok(())
    }
    /// Bytes that the cache may take, now that weights and buffers are there: for
    /// [`CacheBudget::Device`](crate::budget::CacheBudget::Device). `draft` is the cache without its pages, with tables as
    /// long as the context that was asked for, or the model's. None: the device does not manage its memory.
    /// # Errors
    /// No memory for what the layout needs beside the pages, or for a page of each group.
    fn cache_room(&mut self, draft: &CacheLayout) -> Result<Option<u64>> {
        let _ = draft;
        Ok(None)
    }
    /// How the device's memory is divided, in lines for people; none where it is not.
    fn memory_table(&self) -> Option<String> {
        None
    }
    /// Allocates pages, slot tables and sampling state. Called once, after the weights.
    /// # Errors
    /// No memory.
    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()>;

    /// Shapes of steps that the device wants to [`record`](Backend::record) before the first step.
    fn buckets(&self) -> Vec<StepShape> {
        Vec::new()
    }
    /// Records both halves of a step of one of its [`buckets`](Backend::buckets): up to the outputs' rows, and from there to
    /// drawn tokens.
    /// # Errors
    /// The device failed.
    fn record(
        &mut self,
        shape: StepShape,
        forward: &mut dyn FnMut(&mut Self) -> Result<()>,
        finish: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let _ = (shape, forward, finish);
        Ok(())
    }

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
    /// `x[t] += table[position[t] + offset]`: learned positions.
    /// # Errors
    /// The device failed.
    fn add_positions(&mut self, table: &Self::Linear, offset: usize, x: &mut Self::Buffer) -> Result<()>;
    /// `out = norm(x)`, for each row.
    /// # Errors
    /// The device failed.
    fn norm(&mut self, x: &Self::Buffer, norm: &Norm<Self::Vector>, out: &mut Self::Buffer) -> Result<()>;
    /// `residual += scale * x`, then `out = norm(residual)`.
    /// # Errors
    /// The device failed.
    fn add_norm(
        &mut self,
        residual: &mut Self::Buffer,
        x: &Self::Buffer,
        scale: f32,
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
    /// On rows `[q | k | v | ...]` of all heads: norms q, k and v where asked, rotates q and k, and writes k and v
    /// into the pages of the row's slot where the layer appends (with [`Visibility::Whole`] they stay in `qkv`
    /// alone). q stays in `qkv`.
    /// # Errors
    /// The device failed.
    fn append(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, Self::Vector>>,
        rope: Option<&Self::Rope>,
        qkv: &mut Self::Buffer,
    ) -> Result<()>;
    /// The same where keys and values are one projection, on rows `[q | k]` of heads of `dim`. With r rotated
    /// elements in a head, what is stored of a token is its value `norms.v(k)`, followed by the r rotated elements of
    /// its key `rope(norms.k(k))` in their order: `spec.key_dim = dim + r`, `spec.value_dim = dim`. The other elements of a key
    /// are those of the value times the weight of `norms.k`, so that weight goes into the queries: `q_out` gets
    /// `[q_heads, dim + r]`, 0 where the value's place holds an element that is rotated. Both norms divide by the
    /// same size, so `norms.k` and `norms.v` have equal kind and epsilon.
    /// # Errors
    /// The device failed.
    fn append_shared(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, Self::Vector>,
        rope: &Self::Rope,
        qk: &Self::Buffer,
        q_out: &mut Self::Buffer,
    ) -> Result<()>;
    /// On rows `[latent | rope]`: norms the latent, rotates the rest, and writes both into the pages. Rotates the rope
    /// part of each query head in `q` (`[q_heads, nope + rope]`) into its place in `q_out` (`[q_heads, latent + rope]`),
    /// whose other elements [`Backend::head_linear`] wrote before; [`RopeTable::q_scale`] multiplies all. `io` is
    /// `(q, latent and rope, q_out)`.
    /// # Errors
    /// The device failed.
    fn append_latent(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<Self::Vector>,
        rope: &Self::Rope,
        io: (&Self::Buffer, &Self::Buffer, &mut Self::Buffer),
    ) -> Result<()>;
    /// For each head h: `out[h] = x[h] w[h]^T`, where the views say. Elements of `out` outside the view stay; `width` is
    /// that of `out`'s rows.
    /// # Errors
    /// The device failed.
    fn head_linear(
        &mut self,
        w: &Self::Stack,
        x: (&Self::Buffer, HeadView),
        out: (&mut Self::Buffer, HeadView),
        width: usize,
    ) -> Result<()>;
    /// Attention of the step's queries (the first `q_heads * key_dim` columns of `q`) over the pages, or over the
    /// keys and values beside them in rows `[q | k | v]` with [`Visibility::Whole`]. `sinks` has one logit a head
    /// that takes part in the softmax and has no value.
    /// # Errors
    /// The device failed.
    fn attention(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&Self::Vector>,
        q: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `x *= sigmoid(gates[.., at .. at + width])`, where `width` is x's, or 1 for one gate a row.
    /// # Errors
    /// The device failed.
    fn gate(&mut self, gates: &Self::Buffer, at: usize, width: usize, x: &mut Self::Buffer) -> Result<()>;
    /// The convolution, the recurrence and the gated norm of a delta net on rows `[q | k | v | z | b | a]`, token by
    /// token in order of position, reading and writing the state in the row's slot. Queries and keys are divided by
    /// their length (epsilon 1e-6 in the square root), queries also by the root of `k_dim`;
    /// decay `exp(-exp(a_log) softplus(a + dt_bias))`, strength `sigmoid(b)`. `out` is `[v_heads * v_dim]`.
    /// # Errors
    /// The device failed.
    fn delta_rule(
        &mut self,
        rule: &DeltaRule<'_, Self::Vector>,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// On rows `[gate | up]`: `out = activation(gate) * up`, or what the activation says.
    /// # Errors
    /// The device failed.
    fn glu(&mut self, activation: Activation, gate_up: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// `out = activation(x)`.
    /// # Errors
    /// The device failed.
    fn activate(&mut self, activation: Activation, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Chooses experts from the router's logits `[tokens, experts]`.
    /// # Errors
    /// The device failed.
    fn route(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&Self::Vector>,
        expert_scale: Option<&Self::Vector>,
        logits: &Self::Buffer,
        routing: &mut Self::Routing,
    ) -> Result<()>;
    /// `out` is the weighted sum of what the chosen experts make of `x`, added up in the order of the choice.
    /// # Errors
    /// The device failed.
    fn experts(
        &mut self,
        experts: &Experts<'_, Self::Stack, Self::Vector>,
        routing: &Self::Routing,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `residual += scale * x`.
    /// # Errors
    /// The device failed.
    fn add(&mut self, residual: &mut Self::Buffer, x: &Self::Buffer, scale: f32) -> Result<()>;
    /// `x *= factor`.
    /// # Errors
    /// The device failed.
    fn scale(&mut self, x: &mut Self::Buffer, factor: f32) -> Result<()>;
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

    /// For each pooling row, the mean of its tokens' rows: `out` has the step's outputs.
    /// # Errors
    /// The device failed.
    fn mean_outputs(&mut self, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Hands the step's outputs, `[outputs, width]`, to the outcome as what the pooling head made of its rows. Takes the
    /// place of [`Backend::sample`] in models that do not generate.
    /// # Errors
    /// The device failed.
    fn emit(&mut self, pooled: &Self::Buffer) -> Result<()>;

    /// Waits for the oldest step that is not yet collected.
    /// # Errors
    /// The device failed.
    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<()>;
    /// Whether a step still runs after its last call returned.
    fn is_asynchronous(&self) -> bool;

    // ---- composites: a device with fused kernels overrides them ----

    /// `residual += add.scale * add.norm(add.x)`, then `out = norm(residual)`.
    /// # Errors
    /// The device failed.
    fn add_post_norm(
        &mut self,
        residual: &mut Self::Buffer,
        add: PostNormed<'_, Self::Buffer, Self::Vector>,
        norm: &Norm<Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.norm(add.x, add.norm, add.scratch)?;
        self.add_norm(residual, add.scratch, add.scale, norm, out)
    }

    /// From normed rows to the attention block's output, before the residual. Uses three scratch buffers:
    /// `[q + k + v + gate]`, `[q_heads * value_dim]`, and `[q_heads * key_dim]` where keys are values.
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
        let spec = block.spec;
        let [qkv, inner, shared_q, ..] = io.scratch else {
            return Err(BackendError::scratch("attention_block"));
        };
        self.linear(block.qkv, block.qkv_bias, io.x, qkv)?;
        match (block.shared_dim, block.norms, block.rope) {
            (None, norms, rope) => {
                self.append(spec, norms, rope, qkv)?;
                self.attention(spec, block.sinks, qkv, inner)?;
            }
            (Some(dim), Some(norms), Some(rope)) => {
                self.append_shared(spec, dim, norms, rope, qkv, shared_q)?;
                self.attention(spec, block.sinks, shared_q, inner)?;
            }
            _ => {
                let message = "keys that are values have norms and a rotation".to_owned();
                return Err(BackendError::Device { operation: "attention_block", message });
            }
        }
        if block.gated {
            let width = spec.q_heads * spec.value_dim;
            let at = match block.shared_dim {
                Some(dim) => (spec.q_heads + spec.kv_heads) * dim,
                None if spec.appends => {
                    spec.q_heads * spec.key_dim + spec.kv_heads * (spec.key_dim + spec.value_dim)
                }
                None => spec.q_heads * spec.key_dim,
            };
            self.gate(qkv, at, width, inner)?;
        }
        self.linear(block.output, block.output_bias, inner, io.out)
    }

    /// Latent attention. Uses seven scratch buffers: the compressed query and its norm, `[q_heads * (nope +
    /// rope)]`, `[latent + rope]`, `[q_heads * (latent + rope)]`, `[q_heads * latent]` and `[q_heads * value]`.
    /// # Errors
    /// The device failed.
    fn latent_block(&mut self, block: &LatentBlock<'_, Self>, io: BlockIo<'_, Self::Buffer>) -> Result<()>
    where
        Self: Sized,
    {
        let (spec, s) = (block.spec, block.shape);
        let [down, normed, q, kv, wide, latents, values, ..] = io.scratch else {
            return Err(BackendError::scratch("latent_block"));
        };
        match block.q_down {
            Some((w, norm)) => {
                self.linear(w, block.q_down_bias, io.x, down)?;
                self.norm(down, norm, normed)?;
                self.linear(block.q_up, None, normed, q)?;
            }
            None => self.linear(block.q_up, None, io.x, q)?,
        }
        self.linear(block.kv_down, block.kv_down_bias, io.x, kv)?;
        let row = s.latent + s.rope;
        let from = HeadView { first: 0, stride: s.nope + s.rope, width: s.nope };
        let to = HeadView { first: 0, stride: row, width: s.latent };
        self.head_linear(block.absorb, (q, from), (wide, to), spec.q_heads * row)?;
        self.append_latent(spec, s, block.kv_norm, block.rope, (q, kv, wide))?;
        self.attention(spec, None, wide, latents)?;
        let from = HeadView { first: 0, stride: s.latent, width: s.latent };
        let to = HeadView { first: 0, stride: s.value, width: s.value };
        self.head_linear(block.expand, (latents, from), (values, to), spec.q_heads * s.value)?;
        self.linear(block.output, block.output_bias, values, io.out)
    }

    /// A gated delta net. Uses two scratch buffers: its input's width, and `[v_heads * v_dim]`.
    /// # Errors
    /// The device failed.
    fn delta_block(&mut self, block: &DeltaBlock<'_, Self>, io: BlockIo<'_, Self::Buffer>) -> Result<()>
    where
        Self: Sized,
    {
        let [wide, inner, ..] = io.scratch else { return Err(BackendError::scratch("delta_block")) };
        self.linear(block.input, None, io.x, wide)?;
        self.delta_rule(&block.rule, wide, inner)?;
        self.linear(block.output, None, inner, io.out)
    }

    /// From normed rows to the feed-forward block's output, before the residual. Uses two scratch buffers: the first
    /// projection's width, and the second's.
    /// # Errors
    /// The device failed.
    fn mlp_block(&mut self, block: &MlpBlock<'_, Self>, io: BlockIo<'_, Self::Buffer>) -> Result<()>
    where
        Self: Sized,
    {
        let [wide, inner, ..] = io.scratch else { return Err(BackendError::scratch("mlp_block")) };
        self.linear(block.gate_up, block.gate_up_bias, io.x, wide)?;
        if block.gated {
            self.glu(block.activation, wide, inner)?;
        } else {
            self.activate(block.activation, wide, inner)?;
        }
        self.linear(block.down, block.down_bias, inner, io.out)
    }

    /// A mixture of experts; the router sees `router_x` if there is one, else the block's input. Uses four scratch
    /// buffers: two for the shared expert as [`Backend::mlp_block`], its output `[hidden]`, and `[experts]`.
    /// # Errors
    /// The device failed.
    fn moe_block(
        &mut self,
        block: &MoeBlock<'_, Self>,
        router_x: Option<&Self::Buffer>,
        routing: &mut Self::Routing,
        io: BlockIo<'_, Self::Buffer>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        let BlockIo { x, scratch, out } = io;
        let [wide_and_inner @ .., shared, logits] = scratch else {
            return Err(BackendError::scratch("moe_block"));
        };
        self.linear(block.router, block.router_bias, router_x.unwrap_or(x), logits)?;
        self.route(block.route, block.correction, block.expert_scale, logits, routing)?;
        self.experts(&block.experts, routing, x, out)?;
        if let Some(mlp) = &block.shared {
            self.mlp_block(mlp, BlockIo { x, scratch: wide_and_inner, out: shared })?;
            if let Some(gate) = block.shared_gate {
                self.linear(gate, None, x, logits)?;
                self.gate(logits, 0, 1, shared)?;
            }
            self.add(out, shared, 1.0)?;
        }
        Ok(())
    }
}
