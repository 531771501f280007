//! The tensors that a model consists of, under names of our own, and where they come from.
//!
//! Owns the names and the trait [`WeightSource`]; `list` has which of them a specification has, and their shapes.
//! Knows no spelling of a file, and reads none.

mod list;

pub use list::{layer_parts, shape, tensors};

use crate::backend::{HostTensor, Storage};
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;
use list::{HeadKind, head_of};

/// A tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorId {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[rows, hidden]`: learned positions.
    Positions,
    /// `[token_types, hidden]`.
    TokenTypes,
    /// `[hidden]`: norm of embedded rows.
    EmbedNorm,
    /// `[hidden]`.
    EmbedNormBias,
    /// `[hidden]`.
    FinalNorm,
    /// `[hidden]`.
    FinalNormBias,
    /// `[vocab, hidden]`, where the model is not tied.
    Head,
    /// `[hidden, hidden]`: a classifier's first layer.
    Dense,
    /// `[hidden]`.
    DenseBias,
    /// `[labels, hidden]`: a classifier's second layer.
    Labels,
    /// `[labels]`.
    LabelsBias,
    /// Of a layer.
    Layer(usize, Part),
}

/// A tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// `[hidden]`: norm of the mixer's input.
    AttentionNorm,
    /// `[hidden]`.
    AttentionNormBias,
    /// `[hidden]`: norm of the mixer's output.
    AttentionPostNorm,
    /// `[hidden]`.
    AttentionPostNormBias,
    /// `[hidden]`: norm of the feed-forward block's input.
    MlpNorm,
    /// `[hidden]`.
    MlpNormBias,
    /// `[hidden]`: norm of the feed-forward block's output.
    MlpPostNorm,
    /// `[hidden]`.
    MlpPostNormBias,

    /// `[q_width, hidden]`.
    Q,
    /// `[kv_width, hidden]`.
    K,
    /// `[kv_width, hidden]`.
    V,
    /// `[q_width, hidden]`: the gate of the attention's output.
    AttentionGate,
    /// `[hidden, q_width]`; of latent attention `[hidden, heads * value]`.
    O,
    /// `[q_width]`.
    QBias,
    /// `[kv_width]`.
    KBias,
    /// `[kv_width]`.
    VBias,
    /// `[hidden]`.
    OBias,
    /// `[head_dim]`, or `[q_width]` where the norm is across heads.
    QNorm,
    /// `[head_dim]`, or `[kv_width]` where the norm is across heads.
    KNorm,
    /// `[q_heads]`: a logit of the softmax without a value.
    Sinks,

    /// `[q_rank, hidden]`: compression of queries.
    QDown,
    /// `[q_rank]`.
    QDownBias,
    /// `[q_rank]`: norm of compressed queries.
    QDownNorm,
    /// `[heads * (nope + rope), q_rank]`, or `[.., hidden]` where queries are not compressed.
    QUp,
    /// `[latent + rope, hidden]`: compression of keys and values.
    KvDown,
    /// `[latent + rope]`.
    KvDownBias,
    /// `[latent]`: norm of the latent.
    KvNorm,
    /// `[latent, nope]` of a head: takes its query into the latent's space.
    Absorb(usize),
    /// `[value, latent]` of a head: takes a mean of latents to its value.
    Expand(usize),

    /// `[conv_width, hidden]`: q, k and v of a delta net.
    DeltaQkv,
    /// `[v_heads * v_dim, hidden]`: gate of its output.
    DeltaZ,
    /// `[v_heads, hidden]`: strength of its updates.
    DeltaB,
    /// `[v_heads, hidden]`: its decay.
    DeltaA,
    /// `[conv_width, taps]`.
    DeltaConv,
    /// `[v_heads]`.
    DeltaALog,
    /// `[v_heads]`.
    DeltaDtBias,
    /// `[v_dim]`.
    DeltaNorm,
    /// `[hidden, v_heads * v_dim]`.
    DeltaOut,

    /// Of the dense block.
    Mlp(MlpPart),
    /// `[1]`: the activation's parameter for positive values, before its softplus.
    XieluP,
    /// `[1]`: the same for negative values.
    XieluN,
    /// `[experts, hidden]`.
    Router,
    /// `[experts]`.
    RouterBias,
    /// `[hidden]`: weight of the norm of the router's own input, where a dense block lies beside the experts.
    RouterNorm,
    /// `[experts]`: added to the scores for the choice.
    Correction,
    /// `[experts]`: multiplies the weights of the chosen.
    ExpertScale,
    /// Of one expert.
    Expert(usize, MlpPart),
    /// Of the expert that every token has.
    Shared(MlpPart),
    /// `[1, hidden]`.
    SharedGate,
    /// `[hidden]`: norm of the experts' input, where a dense block lies beside them.
    ExpertsNorm,
    /// `[hidden]`: norm of the experts' output, likewise.
    ExpertsPostNorm,
    /// `[hidden]`: norm of that dense block's output.
    DensePostNorm,

    /// `[1]`: multiplies the residual stream after the layer.
    OutputScale,
}

/// A tensor of a feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MlpPart {
    /// `[intermediate, hidden]`.
    Gate,
    /// `[intermediate, hidden]`.
    Up,
    /// `[hidden, intermediate]`.
    Down,
    /// `[intermediate]`.
    GateBias,
    /// `[intermediate]`.
    UpBias,
    /// `[hidden]`.
    DownBias,
}

impl MlpPart {
    /// Whether it is a matrix.
    #[must_use]
    pub const fn is_linear(self) -> bool {
        matches!(self, Self::Gate | Self::Up | Self::Down)
    }
}

impl Part {
    /// Whether quantization at load applies to it: the large matrices. Routers, gates of one row and the delta net's
    /// rates keep their storage, being small and decisive.
    #[must_use]
    pub const fn is_linear(self) -> bool {
        match self {
            Self::Q
            | Self::K
            | Self::V
            | Self::AttentionGate
            | Self::O
            | Self::QDown
            | Self::QUp
            | Self::KvDown
            | Self::Absorb(_)
            | Self::Expand(_)
            | Self::DeltaQkv
            | Self::DeltaZ
            | Self::DeltaOut => true,
            Self::Mlp(part) | Self::Expert(_, part) | Self::Shared(part) => part.is_linear(),
            _ => false,
        }
    }

    /// Whether it is the weight of a norm, which is 1 in a model that nobody trained.
    #[must_use]
    pub const fn is_norm(self) -> bool {
        matches!(
            self,
            Self::AttentionNorm
                | Self::AttentionPostNorm
                | Self::MlpNorm
                | Self::MlpPostNorm
                | Self::QNorm
                | Self::KNorm
                | Self::QDownNorm
                | Self::KvNorm
                | Self::DeltaNorm
                | Self::RouterNorm
                | Self::ExpertsNorm
                | Self::ExpertsPostNorm
                | Self::DensePostNorm
                | Self::ExpertScale
                | Self::OutputScale
        )
    }
}

impl TensorId {
    /// Whether it is the weight of a linear layer, the head included: what quantization at load applies to.
    #[must_use]
    pub const fn is_linear(self) -> bool {
        match self {
            Self::Head | Self::Dense => true,
            Self::Layer(_, part) => part.is_linear(),
            _ => false,
        }
    }

    /// As [`Part::is_norm`].
    #[must_use]
    pub const fn is_norm(self) -> bool {
        match self {
            Self::EmbedNorm | Self::FinalNorm => true,
            Self::Layer(_, part) => part.is_norm(),
            _ => false,
        }
    }
}

/// Where tensors come from.
pub trait WeightSource {
    /// The tensor, of the shape that the specification gives it.
    ///
    /// # Errors
    /// Missing, of another shape, or of a type that is not supported.
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>>;

    /// Holds the tensor's type and shape against the specification, without reading its numbers where they lie in a
    /// file, and tells how they are stored.
    ///
    /// # Errors
    /// As [`WeightSource::tensor`].
    fn check(&self, spec: &ModelSpec, id: TensorId) -> Result<Storage> {
        self.tensor(spec, id).map(|tensor| tensor.storage)
    }

    /// Whether the source has it.
    fn has(&self, spec: &ModelSpec, id: TensorId) -> bool;

    /// Name of the file or of the source, for errors.
    fn label(&self) -> &str;
}

/// Which tensor embeds: a tied model's file may store only the head.
///
/// # Errors
/// The source has neither.
pub fn embedding_id(spec: &ModelSpec, source: &dyn WeightSource) -> Result<TensorId> {
    let tied = matches!(head_of(spec), HeadKind::Logits { tied: true });
    if !tied || source.has(spec, TensorId::Embedding) {
        return Ok(TensorId::Embedding);
    }
    if source.has(spec, TensorId::Head) {
        return Ok(TensorId::Head);
    }
    Err(ModelError::MissingTensor { file: source.label().to_owned(), tensor: "the embedding table".into() })
}
