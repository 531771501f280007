//! What a model is made of: plain data, derived once from a configuration and never changed.
//!
//! Owns the specification and the checks that hold for every architecture. Knows no file format and no name of
//! a tensor or an architecture's field.

use crate::backend::{Activation, DeltaShape, LatentShape, NormKind, Pooling, RouteSpec, Storage, Stored};
use crate::rope::RopeSpec;

/// Largest values that a specification may have. They bound what a hostile configuration can make us allocate,
/// and lie well above every published model.
pub mod bounds {
    /// Layers.
    pub const LAYERS: u64 = 1_024;
    /// Width of the residual stream.
    pub const HIDDEN: u64 = 1 << 17;
    /// Width of a feed-forward layer.
    pub const INTERMEDIATE: u64 = 1 << 20;
    /// Heads of a layer.
    pub const HEADS: u64 = 4_096;
    /// Elements of a head.
    pub const HEAD_DIM: u64 = 1_024;
    /// Entries of the vocabulary.
    pub const VOCAB: u64 = 1 << 22;
    /// Experts of a layer.
    pub const EXPERTS: u64 = 4_096;
    /// Width of a compressed query or latent.
    pub const RANK: u64 = 1 << 16;
    /// Taps of a convolution.
    pub const TAPS: u64 = 64;
    /// Positions.
    pub const CONTEXT: u64 = 1 << 24;
}

/// A transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The architecture's name, as the registry has it.
    pub architecture: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Most positions.
    pub context: usize,
    /// From first to last.
    pub layers: Vec<LayerSpec>,
    /// Rotary embeddings; layers name them by index.
    pub ropes: Vec<RopeSpec>,
    /// Multiplies embedded rows.
    pub embed_scale: f32,
    /// Learned positions and token types, in encoders that have them.
    pub learned_positions: Option<LearnedPositions>,
    /// Norm of embedded rows, in encoders.
    pub embed_norm: Option<NormSpec>,
    /// After the last layer; none where layers end with a norm.
    pub final_norm: Option<NormSpec>,
    /// What comes after it.
    pub head: Head,
    /// Type that the configuration declares for the weights; files may differ.
    pub dtype: Option<Storage>,
    /// First token of a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Fields of the configuration that mean nothing to us, for the log.
    pub ignored_fields: Vec<String>,
}

/// Positions as rows of a table. Row `position + offset`, and row 0 of the table of token types, are added to each
/// embedded token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Rows of the table.
    pub rows: usize,
    /// Row of position 0.
    pub offset: usize,
    /// Rows of the table of token types; 0 if there is none.
    pub token_types: usize,
}

/// What a model makes of its last rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Head {
    /// Logits, to draw tokens from.
    Logits {
        /// Whether the embedding table is also the logits' weight.
        tied: bool,
        /// Multiplies the logits.
        scale: f32,
        /// Logits become `cap * tanh(logit / cap)`.
        soft_cap: Option<f32>,
    },
    /// Numbers about a text.
    Pool(PoolHead),
}

/// A pooling head.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolHead {
    /// Which row stands for the sequence.
    pub pooling: Pooling,
    /// What is computed from it.
    pub output: PoolOutput,
}

/// What a pooling head gives.
#[derive(Clone, Debug, PartialEq)]
pub enum PoolOutput {
    /// The row itself: an embedding of `hidden` numbers.
    Embedding,
    /// `labels` logits of a classifier: `out_proj(tanh(dense(x)))`, both with biases.
    Classifier {
        /// Logits.
        labels: usize,
    },
    /// The logits of these tokens alone, in this order, from the weights of a head for logits.
    Tokens {
        /// Their ids.
        ids: Vec<u32>,
        /// Whether the embedding table is the logits' weight.
        tied: bool,
    },
}

/// One layer: a mixer of tokens, then feed-forward.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Where the norms are.
    pub placement: Placement,
    /// All norms of the layer that have the hidden width.
    pub norm: NormSpec,
    /// Mixes tokens.
    pub mixer: Mixer,
    /// Works on each token.
    pub ffn: Ffn,
    /// Both see the same normed rows and are added together; the layer then has one norm. Only with
    /// [`Placement::Before`].
    pub parallel: bool,
    /// Multiplies what each block adds to the residual stream.
    pub residual_scale: f32,
    /// Whether a learned number multiplies the residual stream after the layer.
    pub output_scale: bool,
}

/// Where a block's norms are; `x` is the residual stream, `f` the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// `x + f(norm(x))`.
    Before,
    /// `x + norm(f(norm(x)))`.
    Around,
    /// `x + norm(f(x))`.
    After,
    /// `norm(x + f(x))`.
    Outside,
}

/// A norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// What it divides by.
    pub kind: NormKind,
    /// Added to the mean square.
    pub eps: f32,
    /// Added to each weight.
    pub offset: f32,
    /// Whether it has a bias.
    pub bias: bool,
}

impl NormSpec {
    /// A root-mean-square norm as most families have it.
    #[must_use]
    pub const fn rms(eps: f32) -> Self {
        Self { kind: NormKind::Rms, eps, offset: 0.0, bias: false }
    }
}

/// What mixes tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Attention.
    Attention(AttentionLayer),
    /// Attention over compressed keys and values.
    Latent(LatentLayer),
    /// A gated delta net.
    Delta(DeltaLayer),
}

/// Attention with grouped heads.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionLayer {
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// A query sees later tokens too.
    pub bidirectional: bool,
    /// A query at `p` sees `p - n + 1 ..= p`.
    pub window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Index into [`ModelSpec::ropes`].
    pub rope: Option<usize>,
    /// Norm of queries and keys, before the rotation.
    pub qk_norm: Option<QkNorm>,
    /// Norm of each value head, without weights; only beside a norm of queries and keys.
    pub v_norm: Option<NormSpec>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub output_bias: bool,
    /// Each query head has a logit that takes part in the softmax and has no value.
    pub sinks: bool,
    /// The output is multiplied with the sigmoid of a projection of the input.
    pub gated: bool,
    /// Where keys and values come from.
    pub kv: KvSource,
}

/// Norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// The norm.
    pub norm: NormSpec,
    /// All heads of a token are one vector, instead of each its own.
    pub across_heads: bool,
}

/// Where keys and values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSource {
    /// A projection each.
    Own,
    /// One projection is both: see `Backend::append_shared`.
    KeysAreValues,
    /// Those of an earlier layer with equal heads, window and rotation, which has two projections of its own.
    Layer(usize),
}

impl AttentionLayer {
    /// Width of all query heads.
    #[must_use]
    pub const fn q_width(&self) -> usize {
        self.q_heads * self.head_dim
    }

    /// Width of all key heads, or of all value heads.
    #[must_use]
    pub const fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of the input projection, `[q | k | v | gate]` as far as there are such.
    #[must_use]
    pub const fn input_width(&self) -> usize {
        let kv = match self.kv {
            KvSource::Own => 2,
            KvSource::KeysAreValues => 1,
            KvSource::Layer(_) => 0,
        };
        (if self.gated { 2 } else { 1 }) * self.q_width() + kv * self.kv_width()
    }
}

/// Latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentLayer {
    /// Heads.
    pub heads: usize,
    /// Sizes.
    pub shape: LatentShape,
    /// Width of the compressed query, where queries are compressed.
    pub q_rank: Option<usize>,
    /// Norm of the compressed query and of the latent.
    pub norm: NormSpec,
    /// Multiplies the scores.
    pub scale: f32,
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
    /// Whether the two compressions and the output projection have biases.
    pub bias: bool,
}

/// Gated delta net.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaLayer {
    /// Sizes.
    pub shape: DeltaShape,
    /// Norm of each output head.
    pub norm: NormSpec,
}

/// What works on each token.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One block for all.
    Dense(MlpLayer),
    /// A mixture of experts.
    Moe(MoeLayer),
    /// Gemma 4: both beside each other. The dense block's and the experts' outputs are normed apart and added; the
    /// experts see the residual stream under a norm of their own, the router under a third.
    DenseAndMoe(MlpLayer, MoeLayer),
}

/// Feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpLayer {
    /// Width of gate and of up.
    pub intermediate: usize,
    /// Of the gate, or of up where there is no gate. The alphas of [`Activation::Xielu`] are read from the weights.
    pub activation: Activation,
    /// Whether there is a gate.
    pub gated: bool,
    /// Whether all projections have biases.
    pub bias: bool,
}

/// Mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeLayer {
    /// How experts are chosen.
    pub route: RouteSpec,
    /// Whether the router has a bias.
    pub router_bias: bool,
    /// Whether a correction is added to the scores for the choice.
    pub correction: bool,
    /// Whether each expert's weight is multiplied with a learned number.
    pub expert_scale: bool,
    /// One expert.
    pub expert: MlpLayer,
    /// An expert that every token has.
    pub shared: Option<MlpLayer>,
    /// Whether the shared expert is gated by the sigmoid of one projection.
    pub shared_gate: bool,
}

impl ModelSpec {
    /// What is stored of a key of this layer: its elements, and where the value is.
    #[must_use]
    pub fn stored(&self, a: &AttentionLayer) -> (usize, Stored) {
        match a.kv {
            KvSource::Own => (a.head_dim, Stored::KeysAndValues),
            KvSource::KeysAreValues => {
                let rotated = a.rope.map_or(0, |r| self.ropes[r].rotary_dim);
                (a.head_dim + rotated, Stored::ValueInKey)
            }
            KvSource::Layer(source) => match &self.layers[source].mixer {
                Mixer::Attention(source) => self.stored(source),
                _ => (a.head_dim, Stored::KeysAndValues),
            },
        }
    }

    /// Whether a prompt must be computed at once: every token sees every other, or the row that stands for the sequence
    /// is not its last.
    #[must_use]
    pub fn whole_prompts(&self) -> bool {
        self.is_bidirectional() || matches!(&self.head, Head::Pool(pool) if pool.pooling != Pooling::Last)
    }

    /// Whether every token sees every other.
    #[must_use]
    pub fn is_bidirectional(&self) -> bool {
        self.layers.iter().any(|l| matches!(&l.mixer, Mixer::Attention(a) if a.bidirectional))
    }
}
