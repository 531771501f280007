//! Weights of the composite operations, as a layer hands them to the device.

use super::Backend;
use super::ops::{Activation, AttentionSpec, DeltaRule, Experts, HeadNorms, LatentShape, Norm, RouteSpec};

/// Input, scratch and output of a block. Scratch buffers are as many and as wide as the block's `SCRATCH` says; their
/// contents mean nothing before and after.
pub struct BlockIo<'a, T> {
    /// Normed rows, `[tokens, hidden]`.
    pub x: &'a T,
    /// The block's own.
    pub scratch: &'a mut [T],
    /// `[tokens, hidden]`.
    pub out: &'a mut T,
}

/// What a block gave, on its way to the residual stream through a norm of its own.
pub struct PostNormed<'a, T, V> {
    /// `[tokens, hidden]`: the block's output.
    pub x: &'a T,
    /// Its norm.
    pub norm: &'a Norm<V>,
    /// Multiplies what the norm gives.
    pub scale: f32,
    /// `[tokens, hidden]`; its contents mean nothing before and after.
    pub scratch: &'a mut T,
}

/// Weights of an attention block.
pub struct AttentionBlock<'a, B: Backend> {
    /// Shape.
    pub spec: &'a AttentionSpec,
    /// `[q | k | v | gate]` of all heads: no k and v where the layer appends nothing, no v where it is k, and a gate
    /// only if [`AttentionBlock::gated`].
    pub qkv: &'a B::Linear,
    /// Its bias.
    pub qkv_bias: Option<&'a B::Vector>,
    /// Norms of queries, keys and values.
    pub norms: Option<HeadNorms<'a, B::Vector>>,
    /// Rotation; none in layers without positions.
    pub rope: Option<&'a B::Rope>,
    /// One logit a query head that takes part in the softmax and has no value, `[q_heads]`.
    pub sinks: Option<&'a B::Vector>,
    /// Whether each output element is multiplied with the sigmoid of its gate.
    pub gated: bool,
    /// Where keys and values are one projection: elements of a head as projected (`spec.key_dim` is what is stored of
    /// it). See [`Backend::append_shared`].
    pub shared_dim: Option<usize>,
    /// Projection back to the hidden size.
    pub output: &'a B::Linear,
    /// Its bias.
    pub output_bias: Option<&'a B::Vector>,
}

/// Weights of a latent attention block.
pub struct LatentBlock<'a, B: Backend> {
    /// Attention over the stored vectors: `key_dim` is latent + rope, `value_dim` the latent, one kv head.
    pub spec: &'a AttentionSpec,
    /// Shape.
    pub shape: LatentShape,
    /// The query's own compression and its norm, in models that have one.
    pub q_down: Option<(&'a B::Linear, &'a Norm<B::Vector>)>,
    /// Bias of `q_down`.
    pub q_down_bias: Option<&'a B::Vector>,
    /// To `[q_heads * (nope + rope)]`.
    pub q_up: &'a B::Linear,
    /// To `[latent | rope]`.
    pub kv_down: &'a B::Linear,
    /// Its bias.
    pub kv_down_bias: Option<&'a B::Vector>,
    /// Norm of the latent.
    pub kv_norm: &'a Norm<B::Vector>,
    /// Rotation of the rope parts.
    pub rope: &'a B::Rope,
    /// `[q_heads][latent, nope]`: takes a query into the latent's space.
    pub absorb: &'a B::Stack,
    /// `[q_heads][value, latent]`: takes a mean of latents to the head's value.
    pub expand: &'a B::Stack,
    /// Projection back to the hidden size.
    pub output: &'a B::Linear,
    /// Its bias.
    pub output_bias: Option<&'a B::Vector>,
}

/// Weights of a gated delta net block.
pub struct DeltaBlock<'a, B: Backend> {
    /// To `[q | k | v | z | b | a]`.
    pub input: &'a B::Linear,
    /// What happens there.
    pub rule: DeltaRule<'a, B::Vector>,
    /// From `[v_heads * v_dim]` back to the hidden size.
    pub output: &'a B::Linear,
}

/// Weights of a feed-forward block.
pub struct MlpBlock<'a, B: Backend> {
    /// `[gate | up]`, or up alone.
    pub gate_up: &'a B::Linear,
    /// Its bias.
    pub gate_up_bias: Option<&'a B::Vector>,
    /// Between the two.
    pub activation: Activation,
    /// Whether there is a gate.
    pub gated: bool,
    /// Projection back to the hidden size.
    pub down: &'a B::Linear,
    /// Its bias.
    pub down_bias: Option<&'a B::Vector>,
}

/// Weights of a mixture of experts.
pub struct MoeBlock<'a, B: Backend> {
    /// `[experts, hidden]`.
    pub router: &'a B::Linear,
    /// Its bias.
    pub router_bias: Option<&'a B::Vector>,
    /// The choice.
    pub route: &'a RouteSpec,
    /// `[experts]`: added to the scores for the choice alone.
    pub correction: Option<&'a B::Vector>,
    /// `[experts]`: multiplies the weights of the chosen.
    pub expert_scale: Option<&'a B::Vector>,
    /// The experts.
    pub experts: Experts<'a, B::Stack, B::Vector>,
    /// An expert that every token has.
    pub shared: Option<MlpBlock<'a, B>>,
    /// `[1, hidden]`: the sigmoid of its product multiplies the shared expert's rows.
    pub shared_gate: Option<&'a B::Linear>,
}
