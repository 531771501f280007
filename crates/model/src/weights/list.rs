//! Which tensors a specification has, their shapes, and sums over them.

use super::{MlpPart, Part, TensorId};
use crate::backend::Activation;
use crate::spec::{
    AttentionLayer, DeltaLayer, Ffn, Head, KvSource, LatentLayer, LayerSpec, Mixer, MlpLayer, ModelSpec,
    MoeLayer, Placement, PoolOutput,
};

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
pub(super) enum HeadKind {
    Logits { tied: bool },
    Classifier,
    None,
}

pub(super) fn head_of(spec: &ModelSpec) -> HeadKind {
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::backend::{DeltaShape, LatentShape, NormKind, Pooling, RouteSpec, Scoring, Storage};
    use crate::dummy::DummySource;
    use crate::rope::RopeSpec;
    use crate::spec::{LearnedPositions, NormSpec, PoolHead, QkNorm};
    use crate::weights::WeightSource;

    const HIDDEN: usize = 6;

    fn mlp(intermediate: usize) -> MlpLayer {
        MlpLayer { intermediate, activation: Activation::Silu, gated: true, bias: true }
    }

    fn layer(mixer: Mixer, ffn: Ffn) -> LayerSpec {
        let norm = NormSpec { kind: NormKind::Layer, bias: true, ..NormSpec::rms(1e-6) };
        LayerSpec {
            placement: Placement::Around,
            norm,
            mixer,
            ffn,
            parallel: false,
            residual_scale: 1.0,
            output_scale: true,
        }
    }

    fn attention(kv: KvSource) -> AttentionLayer {
        let norm = NormSpec::rms(1e-6);
        AttentionLayer {
            q_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            scale: 1.0,
            bidirectional: false,
            window: None,
            soft_cap: None,
            rope: Some(0),
            qk_norm: Some(QkNorm { norm, across_heads: true }),
            v_norm: None,
            qkv_bias: true,
            output_bias: true,
            sinks: true,
            gated: true,
            kv,
        }
    }

    fn moe() -> MoeLayer {
        MoeLayer {
            route: RouteSpec {
                experts: 5,
                top_k: 2,
                scoring: Scoring::Sigmoid,
                normalize: true,
                scale: 1.0,
                groups: None,
            },
            router_bias: true,
            correction: true,
            expert_scale: true,
            expert: mlp(3),
            shared: Some(mlp(7)),
            shared_gate: true,
        }
    }

    /// Every kind of layer, with every tensor that it may have.
    fn everything() -> ModelSpec {
        let shape = LatentShape { latent: 10, rope: 2, nope: 4, value: 3 };
        let norm = NormSpec::rms(1e-6);
        let latent = |q_rank| LatentLayer { heads: 3, shape, q_rank, norm, scale: 1.0, rope: 0, bias: true };
        let shape = DeltaShape { k_heads: 2, v_heads: 4, k_dim: 8, v_dim: 5, taps: 4 };
        let xielu = Activation::Xielu { alpha_p: 0.0, alpha_n: 0.0, beta: 0.5, eps: -1e-6 };
        let plain = MlpLayer { activation: xielu, gated: false, ..mlp(9) };
        let norm = NormSpec { bias: true, ..norm };
        ModelSpec {
            architecture: "every kind",
            hidden: HIDDEN,
            vocab: 20,
            context: 32,
            layers: vec![
                layer(Mixer::Attention(attention(KvSource::Own)), Ffn::DenseAndMoe(mlp(9), moe())),
                layer(Mixer::Latent(latent(Some(5))), Ffn::Moe(moe())),
                layer(Mixer::Delta(DeltaLayer { shape, norm }), Ffn::Dense(plain)),
            ],
            ropes: vec![RopeSpec::plain(1e4, 8)],
            embed_scale: 1.0,
            learned_positions: Some(LearnedPositions { rows: 34, offset: 2, token_types: 1 }),
            embed_norm: Some(norm),
            final_norm: Some(norm),
            head: Head::Pool(PoolHead {
                pooling: Pooling::First,
                output: PoolOutput::Classifier { labels: 3 },
            }),
            dtype: None,
            bos: None,
            eos: Vec::new(),
            ignored_fields: Vec::new(),
        }
    }

    #[test]
    fn every_tensor_has_a_shape_and_is_listed_once() {
        let spec = everything();
        let all = tensors(&spec);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len(), "one twice");
        for id in &all {
            let shape = shape(&spec, *id);
            assert!(!shape.is_empty() && shape.iter().all(|&n| n > 0), "{id:?}: {shape:?}");
            assert!(!id.is_linear() || shape.len() == 2, "{id:?}: {shape:?}");
            assert!(!(id.is_linear() && id.is_norm()), "{id:?}");
        }
        let source = DummySource::new(1, Storage::F32).expect("a float type");
        for id in all {
            let tensor = source.tensor(&spec, id).expect("dummies have everything");
            let ones = tensor.bytes.as_chunks::<4>().0.iter().all(|b| f32::from_le_bytes(*b) == 1.0);
            assert_eq!(ones, id.is_norm(), "{id:?}");
        }
    }

    #[test]
    fn sizes_of_each_kind_of_layer() {
        let spec = everything();
        let of = |layer, part| shape(&spec, TensorId::Layer(layer, part));
        assert_eq!(of(0, Part::AttentionGate), [32, HIDDEN]);
        assert_eq!((of(0, Part::QNorm), of(0, Part::KNorm)), (vec![32], vec![16]), "across heads");
        assert_eq!(of(0, Part::Expert(4, MlpPart::Down)), [HIDDEN, 3]);
        assert_eq!(of(0, Part::Shared(MlpPart::UpBias)), [7]);
        assert_eq!((of(1, Part::QUp), of(1, Part::KvDown)), (vec![18, 5], vec![12, HIDDEN]));
        assert_eq!((of(1, Part::Absorb(2)), of(1, Part::Expand(0))), (vec![10, 4], vec![3, 10]));
        assert_eq!((of(2, Part::DeltaQkv), of(2, Part::DeltaConv)), (vec![52, HIDDEN], vec![52, 4]));
        assert_eq!(of(2, Part::Mlp(MlpPart::GateBias)), [9]);
        assert!(!layer_parts(&spec, 2).contains(&Part::Mlp(MlpPart::Gate)), "no gate");
        assert_eq!(shape(&spec, TensorId::Labels), [3, HIDDEN]);
        assert!(of(2, Part::Q).is_empty() && of(1, Part::Sinks).is_empty() && of(2, Part::Router).is_empty());
        let experts = 2 * 5 * (3 * 3 * HIDDEN + 2 * 3 + HIDDEN) as u64;
        assert_eq!(spec.parameters() - spec.active_parameters(), experts * 3 / 5);
    }

    #[test]
    fn layers_that_borrow_keys_have_fewer_tensors() {
        let count = |kv| {
            let mut spec = everything();
            spec.layers = vec![layer(Mixer::Attention(attention(kv)), Ffn::Dense(mlp(9)))];
            layer_parts(&spec, 0)
        };
        let (own, shared, none) =
            (count(KvSource::Own), count(KvSource::KeysAreValues), count(KvSource::Layer(0)));
        assert_eq!((own.len() - shared.len(), shared.len() - none.len()), (2, 3), "v; then k and its norm");
        assert!(
            shared.contains(&Part::KNorm) && !shared.contains(&Part::VBias) && !none.contains(&Part::KBias)
        );
    }

    #[test]
    fn heads_have_their_weights() {
        let mut spec = everything();
        let pool = |output| Head::Pool(PoolHead { pooling: Pooling::Last, output });
        let mut last = |head| {
            spec.head = head;
            tensors(&spec).into_iter().filter(|id| *id == TensorId::Head || *id == TensorId::Dense).count()
        };
        assert_eq!(last(pool(PoolOutput::Embedding)), 0);
        assert_eq!(last(pool(PoolOutput::Tokens { ids: vec![1], tied: false })), 1);
        assert_eq!(last(pool(PoolOutput::Tokens { ids: vec![1], tied: true })), 0);
        assert_eq!(last(Head::Logits { tied: false, scale: 1.0, soft_cap: None }), 1);
        assert_eq!(last(pool(PoolOutput::Classifier { labels: 1 })), 1);
    }
}
