//! The tensors that a model consists of, under names of our own, and where they come from.
//!
//! Owns the list of a specification's tensors with their shapes, the sums over it, and the trait [`WeightSource`].
//! Knows no spelling of a file, and reads none.

use crate::backend::Activation;
use crate::backend::HostTensor;
use crate::error::{ModelError, Result};
use crate::spec::{
    AttentionLayer, DeltaLayer, Ffn, Head, KvSource, LatentLayer, LayerSpec, Mixer, MlpLayer, ModelSpec,
    MoeLayer, Placement, PoolOutput,
};

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

/// Every tensor of the model, in the order of use. Where the head is tied, its table is listed once.
#[must_use]
pub fn tensors(spec: &ModelSpec) -> Vec<TensorId> {
    let mut ids = vec![TensorId::Embedding];
    if let Some(positions) = &spec.learned_positions {
        ids.push(TensorId::Positions);
        if positions.token_types > 0 {
            ids.push(TensorId::TokenTypes);
        }
    }
    if let Some(norm) = &spec.embed_norm {
        ids.push(TensorId::EmbedNorm);
        if norm.bias {
            ids.push(TensorId::EmbedNormBias);
        }
    }
    for layer in 0..spec.layers.len() {
        ids.extend(layer_parts(spec, layer).into_iter().map(|part| TensorId::Layer(layer, part)));
    }
    if let Some(norm) = &spec.final_norm {
        ids.push(TensorId::FinalNorm);
        if norm.bias {
            ids.push(TensorId::FinalNormBias);
        }
    }
    match head_of(spec) {
        HeadKind::Logits { tied: false } => ids.push(TensorId::Head),
        HeadKind::Classifier => {
            ids.extend([TensorId::Dense, TensorId::DenseBias, TensorId::Labels, TensorId::LabelsBias]);
        }
        HeadKind::Logits { tied: true } | HeadKind::None => {}
    }
    ids
}

/// Weights that a head has.
enum HeadKind {
    Logits { tied: bool },
    Classifier,
    None,
}

fn head_of(spec: &ModelSpec) -> HeadKind {
    match &spec.head {
        Head::Logits { tied, .. } => HeadKind::Logits { tied: *tied },
        Head::Pool(pool) => match &pool.output {
            PoolOutput::Embedding => HeadKind::None,
            PoolOutput::Classifier { .. } => HeadKind::Classifier,
            PoolOutput::Tokens { tied, .. } => HeadKind::Logits { tied: *tied },
        },
    }
}

/// Parts of a layer, in the order in which they are used.
#[must_use]
pub fn layer_parts(spec: &ModelSpec, layer: usize) -> Vec<Part> {
    let layer = &spec.layers[layer];
    let mut parts = Parts(Vec::new());
    let before = matches!(layer.placement, Placement::Before | Placement::Around);
    let after = !matches!(layer.placement, Placement::Before);
    parts.norm(before, layer, Part::AttentionNorm, Part::AttentionNormBias);
    match &layer.mixer {
        Mixer::Attention(a) => parts.attention(a),
        Mixer::Latent(l) => parts.latent(l),
        Mixer::Delta(_) => parts.0.extend([
            Part::DeltaQkv,
            Part::DeltaZ,
            Part::DeltaB,
            Part::DeltaA,
            Part::DeltaConv,
            Part::DeltaALog,
            Part::DeltaDtBias,
            Part::DeltaNorm,
            Part::DeltaOut,
        ]),
    }
    parts.norm(after, layer, Part::AttentionPostNorm, Part::AttentionPostNormBias);
    parts.norm(before && !layer.parallel, layer, Part::MlpNorm, Part::MlpNormBias);
    match &layer.ffn {
        Ffn::Dense(mlp) => parts.dense(mlp),
        Ffn::Moe(moe) => parts.moe(moe),
        Ffn::DenseAndMoe(mlp, moe) => {
            parts.dense(mlp);
            parts.0.extend([Part::DensePostNorm, Part::ExpertsNorm, Part::RouterNorm]);
            parts.moe(moe);
            parts.0.push(Part::ExpertsPostNorm);
        }
    }
    parts.norm(after && !layer.parallel, layer, Part::MlpPostNorm, Part::MlpPostNormBias);
    parts.push_if(layer.output_scale, &[Part::OutputScale]);
    parts.0
}

/// A layer's parts, being listed.
struct Parts(Vec<Part>);

impl Parts {
    fn push_if(&mut self, wanted: bool, parts: &[Part]) {
        if wanted {
            self.0.extend(parts);
        }
    }

    fn norm(&mut self, wanted: bool, layer: &LayerSpec, weight: Part, bias: Part) {
        self.push_if(wanted, &[weight]);
        self.push_if(wanted && layer.norm.bias, &[bias]);
    }

    fn attention(&mut self, a: &AttentionLayer) {
        let (k, v) = match a.kv {
            KvSource::Own => (true, true),
            KvSource::KeysAreValues => (true, false),
            KvSource::Layer(_) => (false, false),
        };
        self.0.push(Part::Q);
        self.push_if(k, &[Part::K]);
        self.push_if(v, &[Part::V]);
        self.push_if(a.gated, &[Part::AttentionGate]);
        self.push_if(a.qkv_bias, &[Part::QBias]);
        self.push_if(a.qkv_bias && k, &[Part::KBias]);
        self.push_if(a.qkv_bias && v, &[Part::VBias]);
        self.push_if(a.qk_norm.is_some(), &[Part::QNorm]);
        self.push_if(a.qk_norm.is_some() && k, &[Part::KNorm]);
        self.push_if(a.sinks, &[Part::Sinks]);
        self.0.push(Part::O);
        self.push_if(a.output_bias, &[Part::OBias]);
    }

    fn latent(&mut self, l: &LatentLayer) {
        self.push_if(l.q_rank.is_some(), &[Part::QDown, Part::QDownNorm]);
        self.push_if(l.q_rank.is_some() && l.bias, &[Part::QDownBias]);
        self.0.extend([Part::QUp, Part::KvDown, Part::KvNorm]);
        self.push_if(l.bias, &[Part::KvDownBias]);
        self.0.extend((0..l.heads).map(Part::Absorb));
        self.0.extend((0..l.heads).map(Part::Expand));
        self.0.push(Part::O);
        self.push_if(l.bias, &[Part::OBias]);
    }

    fn mlp(&mut self, mlp: &MlpLayer, part: impl Fn(MlpPart) -> Part) {
        let gate = |gate, up| if mlp.gated { vec![gate, up] } else { vec![up] };
        self.0.extend(gate(MlpPart::Gate, MlpPart::Up).into_iter().chain([MlpPart::Down]).map(&part));
        if mlp.bias {
            let biases = gate(MlpPart::GateBias, MlpPart::UpBias);
            self.0.extend(biases.into_iter().chain([MlpPart::DownBias]).map(&part));
        }
    }

    fn dense(&mut self, mlp: &MlpLayer) {
        self.mlp(mlp, Part::Mlp);
        self.push_if(matches!(mlp.activation, Activation::Xielu { .. }), &[Part::XieluP, Part::XieluN]);
    }

    fn moe(&mut self, moe: &MoeLayer) {
        self.0.push(Part::Router);
        self.push_if(moe.router_bias, &[Part::RouterBias]);
        self.push_if(moe.correction, &[Part::Correction]);
        self.push_if(moe.expert_scale, &[Part::ExpertScale]);
        for expert in 0..moe.route.experts {
            self.mlp(&moe.expert, |part| Part::Expert(expert, part));
        }
        if let Some(shared) = &moe.shared {
            self.mlp(shared, Part::Shared);
            self.push_if(moe.shared_gate, &[Part::SharedGate]);
        }
    }
}

/// Shape that the specification gives a tensor; a linear's is `[out, in]`. Of a tensor that the specification does not
/// have it is empty.
#[must_use]
pub fn shape(spec: &ModelSpec, id: TensorId) -> Vec<usize> {
    let hidden = spec.hidden;
    match id {
        TensorId::Embedding | TensorId::Head => vec![spec.vocab, hidden],
        TensorId::Positions => spec.learned_positions.map_or_else(Vec::new, |p| vec![p.rows, hidden]),
        TensorId::TokenTypes => spec.learned_positions.map_or_else(Vec::new, |p| vec![p.token_types, hidden]),
        TensorId::EmbedNorm
        | TensorId::EmbedNormBias
        | TensorId::FinalNorm
        | TensorId::FinalNormBias
        | TensorId::DenseBias => vec![hidden],
        TensorId::Dense => vec![hidden, hidden],
        TensorId::Labels => labels(spec).map_or_else(Vec::new, |n| vec![n, hidden]),
        TensorId::LabelsBias => labels(spec).map_or_else(Vec::new, |n| vec![n]),
        TensorId::Layer(i, part) => part_shape(spec, &spec.layers[i], part),
    }
}

fn labels(spec: &ModelSpec) -> Option<usize> {
    match &spec.head {
        Head::Pool(pool) => match pool.output {
            PoolOutput::Classifier { labels } => Some(labels),
            _ => None,
        },
        Head::Logits { .. } => None,
    }
}

fn part_shape(spec: &ModelSpec, layer: &LayerSpec, part: Part) -> Vec<usize> {
    let hidden = spec.hidden;
    let (dense, moe) = match &layer.ffn {
        Ffn::Dense(mlp) => (Some(mlp), None),
        Ffn::Moe(moe) => (None, Some(moe)),
        Ffn::DenseAndMoe(mlp, moe) => (Some(mlp), Some(moe)),
    };
    let of = |mlp: Option<&MlpLayer>, part| mlp.map_or_else(Vec::new, |mlp| mlp_shape(hidden, mlp, part));
    let experts = moe.map(|m| m.route.experts);
    match part {
        Part::Mlp(part) => of(dense, part),
        Part::Expert(_, part) => of(moe.map(|m| &m.expert), part),
        Part::Shared(part) => of(moe.and_then(|m| m.shared.as_ref()), part),
        Part::Router => experts.map_or_else(Vec::new, |n| vec![n, hidden]),
        Part::RouterBias | Part::Correction | Part::ExpertScale => experts.map_or_else(Vec::new, |n| vec![n]),
        Part::SharedGate => vec![1, hidden],
        Part::OutputScale | Part::XieluP | Part::XieluN => vec![1],
        Part::AttentionNorm
        | Part::AttentionNormBias
        | Part::AttentionPostNorm
        | Part::AttentionPostNormBias
        | Part::MlpNorm
        | Part::MlpNormBias
        | Part::MlpPostNorm
        | Part::MlpPostNormBias
        | Part::RouterNorm
        | Part::ExpertsNorm
        | Part::ExpertsPostNorm
        | Part::DensePostNorm
        | Part::OBias => vec![hidden],
        mixer => match &layer.mixer {
            Mixer::Attention(a) => attention_shape(hidden, a, mixer),
            Mixer::Latent(l) => latent_shape(hidden, l, mixer),
            Mixer::Delta(d) => delta_shape(hidden, d, mixer),
        },
    }
}

fn mlp_shape(hidden: usize, mlp: &MlpLayer, part: MlpPart) -> Vec<usize> {
    match part {
        MlpPart::Gate | MlpPart::Up => vec![mlp.intermediate, hidden],
        MlpPart::Down => vec![hidden, mlp.intermediate],
        MlpPart::GateBias | MlpPart::UpBias => vec![mlp.intermediate],
        MlpPart::DownBias => vec![hidden],
    }
}

fn attention_shape(hidden: usize, a: &AttentionLayer, part: Part) -> Vec<usize> {
    let across = a.qk_norm.is_some_and(|n| n.across_heads);
    match part {
        Part::Q | Part::AttentionGate => vec![a.q_width(), hidden],
        Part::K | Part::V => vec![a.kv_width(), hidden],
        Part::O => vec![hidden, a.q_width()],
        Part::QBias => vec![a.q_width()],
        Part::KBias | Part::VBias => vec![a.kv_width()],
        Part::QNorm => vec![if across { a.q_width() } else { a.head_dim }],
        Part::KNorm => vec![if across { a.kv_width() } else { a.head_dim }],
        Part::Sinks => vec![a.q_heads],
        _ => Vec::new(),
    }
}

fn latent_shape(hidden: usize, l: &LatentLayer, part: Part) -> Vec<usize> {
    let s = &l.shape;
    let rank = l.q_rank.unwrap_or(hidden);
    match part {
        Part::QDown => vec![rank, hidden],
        Part::QDownBias | Part::QDownNorm => vec![rank],
        Part::QUp => vec![l.heads * (s.nope + s.rope), rank],
        Part::KvDown => vec![s.latent + s.rope, hidden],
        Part::KvDownBias => vec![s.latent + s.rope],
        Part::KvNorm => vec![s.latent],
        Part::Absorb(_) => vec![s.latent, s.nope],
        Part::Expand(_) => vec![s.value, s.latent],
        Part::O => vec![hidden, l.heads * s.value],
        _ => Vec::new(),
    }
}

fn delta_shape(hidden: usize, d: &DeltaLayer, part: Part) -> Vec<usize> {
    let s = &d.shape;
    let values = s.v_heads * s.v_dim;
    match part {
        Part::DeltaQkv => vec![s.conv_width(), hidden],
        Part::DeltaZ => vec![values, hidden],
        Part::DeltaB | Part::DeltaA => vec![s.v_heads, hidden],
        Part::DeltaConv => vec![s.conv_width(), s.taps],
        Part::DeltaALog | Part::DeltaDtBias => vec![s.v_heads],
        Part::DeltaNorm => vec![s.v_dim],
        Part::DeltaOut => vec![hidden, values],
        _ => Vec::new(),
    }
}

impl ModelSpec {
    /// Numbers in the weights, all experts counted, a tied table once.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.count(|_, _| true)
    }

    /// Numbers in the weights that one token meets: of the experts as many as it chooses.
    #[must_use]
    pub fn active_parameters(&self) -> u64 {
        self.count(|layer, part| match (&layer.ffn, part) {
            (Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe), Part::Expert(expert, _)) => expert < moe.route.top_k,
            _ => true,
        })
    }

    fn count(&self, counts: impl Fn(&LayerSpec, Part) -> bool) -> u64 {
        let counted = tensors(self).into_iter().filter(|id| match id {
            TensorId::Layer(i, part) => counts(&self.layers[*i], *part),
            _ => true,
        });
        counted.map(|id| shape(self, id).iter().map(|&n| n as u64).product::<u64>()).sum()
    }
}

/// Where tensors come from.
pub trait WeightSource {
    /// The tensor, of the shape that the specification gives it.
    ///
    /// # Errors
    /// Missing, of another shape, or of a type that is not supported.
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>>;

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
