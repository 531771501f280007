//! From a specification and a source of tensors to a model's weights on a device.
//!
//! Owns which tensors become which weight of an operation, and what is computed from them on the way (sums of tables,
//! parameters of activations). It runs nothing.

use std::borrow::Cow;

use crate::backend::{
    Activation, AttentionBlock, AttentionSpec, Backend, DeltaBlock, DeltaRule, DeltaShape, Experts,
    HeadNorms, HostTensor, LatentBlock, LatentShape, MlpBlock, MoeBlock, Norm, RouteSpec, Storage,
};
use crate::cache::Grouping;
use crate::convert::{Conversion, float_bytes, to_f32};
use crate::error::{ModelError, Result};
use crate::spec::{
    AttentionLayer, DeltaLayer, Ffn, Head, KvSource, LatentLayer, LayerSpec, Mixer, MlpLayer, ModelSpec,
    MoeLayer, NormSpec, Placement, PoolOutput,
};
use crate::weights::{MlpPart, Part, TensorId, WeightSource, embedding_id};

/// One layer on the device.
pub(crate) struct Layer<B: Backend> {
    pub placement: Placement,
    pub norms: LayerNorms<B::Vector>,
    pub mixer: MixerWeights<B>,
    pub ffn: FfnWeights<B>,
    pub parallel: bool,
    pub residual_scale: f32,
    /// Multiplies the residual stream after the layer.
    pub output_scale: Option<f32>,
}

/// Norms of the hidden width, as far as the layer's placement has them.
pub(crate) struct LayerNorms<V> {
    pub mixer: Option<Norm<V>>,
    pub mixer_post: Option<Norm<V>>,
    pub ffn: Option<Norm<V>>,
    pub ffn_post: Option<Norm<V>>,
}

/// What mixes tokens.
pub(crate) enum MixerWeights<B: Backend> {
    Attention(Box<AttentionWeights<B>>),
    Latent(Box<LatentWeights<B>>),
    Delta(Box<DeltaWeights<B>>),
}

/// Norms of each query, key and value head.
struct OwnedHeadNorms<V> {
    q: Norm<V>,
    k: Option<Norm<V>>,
    v: Option<Norm<V>>,
    across_heads: bool,
}

pub(crate) struct AttentionWeights<B: Backend> {
    spec: AttentionSpec,
    rope: Option<usize>,
    qkv: B::Linear,
    qkv_bias: Option<B::Vector>,
    norms: Option<OwnedHeadNorms<B::Vector>>,
    sinks: Option<B::Vector>,
    gated: bool,
    shared_dim: Option<usize>,
    output: B::Linear,
    output_bias: Option<B::Vector>,
}

impl<B: Backend> AttentionWeights<B> {
    pub(crate) fn block<'a>(&'a self, ropes: &'a [B::Rope]) -> AttentionBlock<'a, B> {
        AttentionBlock {
            spec: &self.spec,
            qkv: &self.qkv,
            qkv_bias: self.qkv_bias.as_ref(),
            norms: self.norms.as_ref().map(|n| HeadNorms {
                q: &n.q,
                k: n.k.as_ref(),
                v: n.v.as_ref(),
                across_heads: n.across_heads,
            }),
            rope: self.rope.map(|r| &ropes[r]),
            sinks: self.sinks.as_ref(),
            gated: self.gated,
            shared_dim: self.shared_dim,
            output: &self.output,
            output_bias: self.output_bias.as_ref(),
        }
    }
}

pub(crate) struct LatentWeights<B: Backend> {
    spec: AttentionSpec,
    shape: LatentShape,
    rope: usize,
    q_down: Option<(B::Linear, Norm<B::Vector>)>,
    q_down_bias: Option<B::Vector>,
    q_up: B::Linear,
    kv_down: B::Linear,
    kv_down_bias: Option<B::Vector>,
    kv_norm: Norm<B::Vector>,
    absorb: B::Stack,
    expand: B::Stack,
    output: B::Linear,
    output_bias: Option<B::Vector>,
}

impl<B: Backend> LatentWeights<B> {
    pub(crate) fn block<'a>(&'a self, ropes: &'a [B::Rope]) -> LatentBlock<'a, B> {
        LatentBlock {
            spec: &self.spec,
            shape: self.shape,
            q_down: self.q_down.as_ref().map(|(w, norm)| (w, norm)),
            q_down_bias: self.q_down_bias.as_ref(),
            q_up: &self.q_up,
            kv_down: &self.kv_down,
            kv_down_bias: self.kv_down_bias.as_ref(),
            kv_norm: &self.kv_norm,
            rope: &ropes[self.rope],
            absorb: &self.absorb,
            expand: &self.expand,
            output: &self.output,
            output_bias: self.output_bias.as_ref(),
        }
    }
}

pub(crate) struct DeltaWeights<B: Backend> {
    place: (usize, usize),
    shape: DeltaShape,
    input: B::Linear,
    conv: B::Vector,
    a_log: B::Vector,
    dt_bias: B::Vector,
    norm: Norm<B::Vector>,
    output: B::Linear,
}

impl<B: Backend> DeltaWeights<B> {
    pub(crate) fn block(&self) -> DeltaBlock<'_, B> {
        let rule = DeltaRule {
            group: self.place.0,
            layer_in_group: self.place.1,
            shape: self.shape,
            conv: &self.conv,
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            norm: &self.norm,
        };
        DeltaBlock { input: &self.input, rule, output: &self.output }
    }
}

/// What works on each token.
pub(crate) enum FfnWeights<B: Backend> {
    Dense(Box<MlpWeights<B>>),
    Moe(Box<MoeWeights<B>>),
    DenseAndMoe(Box<BothWeights<B>>),
}

/// A dense block and experts beside each other, and the norms between them.
pub(crate) struct BothWeights<B: Backend> {
    pub mlp: MlpWeights<B>,
    pub mlp_post: Norm<B::Vector>,
    pub experts_norm: Norm<B::Vector>,
    pub router_norm: Norm<B::Vector>,
    pub moe: MoeWeights<B>,
    pub experts_post: Norm<B::Vector>,
}

pub(crate) struct MlpWeights<B: Backend> {
    gate_up: B::Linear,
    gate_up_bias: Option<B::Vector>,
    activation: Activation,
    gated: bool,
    down: B::Linear,
    down_bias: Option<B::Vector>,
}

impl<B: Backend> MlpWeights<B> {
    pub(crate) fn block(&self) -> MlpBlock<'_, B> {
        MlpBlock {
            gate_up: &self.gate_up,
            gate_up_bias: self.gate_up_bias.as_ref(),
            activation: self.activation,
            gated: self.gated,
            down: &self.down,
            down_bias: self.down_bias.as_ref(),
        }
    }
}

pub(crate) struct MoeWeights<B: Backend> {
    router: B::Linear,
    router_bias: Option<B::Vector>,
    route: RouteSpec,
    correction: Option<B::Vector>,
    expert_scale: Option<B::Vector>,
    gate_up: B::Stack,
    gate_up_bias: Option<B::Vector>,
    activation: Activation,
    intermediate: usize,
    down: B::Stack,
    down_bias: Option<B::Vector>,
    shared: Option<MlpWeights<B>>,
    shared_gate: Option<B::Linear>,
}

impl<B: Backend> MoeWeights<B> {
    pub(crate) fn block(&self) -> MoeBlock<'_, B> {
        MoeBlock {
            router: &self.router,
            router_bias: self.router_bias.as_ref(),
            route: &self.route,
            correction: self.correction.as_ref(),
            expert_scale: self.expert_scale.as_ref(),
            experts: Experts {
                gate_up: &self.gate_up,
                gate_up_bias: self.gate_up_bias.as_ref(),
                activation: self.activation,
                intermediate: self.intermediate,
                down: &self.down,
                down_bias: self.down_bias.as_ref(),
            },
            shared: self.shared.as_ref().map(MlpWeights::block),
            shared_gate: self.shared_gate.as_ref(),
        }
    }
}

/// Weights after the last layer, apart from its norm.
pub(crate) enum HeadWeights<B: Backend> {
    /// Logits; none: tied to the embedding.
    Logits(Option<B::Linear>),
    /// The row itself.
    Embedding,
    /// A classifier's two layers.
    Classifier { dense: B::Linear, dense_bias: B::Vector, labels: B::Linear, labels_bias: B::Vector },
    /// Rows of a head for logits.
    Tokens(B::Linear),
}

/// All weights of a model.
pub(crate) struct Weights<B: Backend> {
    pub embedding: B::Linear,
    /// Learned positions, with the row of the only token type added to each.
    pub positions: Option<B::Linear>,
    pub embed_norm: Option<Norm<B::Vector>>,
    pub layers: Vec<Layer<B>>,
    pub final_norm: Option<Norm<B::Vector>>,
    pub head: HeadWeights<B>,
    /// Bytes as they were handed to the device.
    pub bytes: u64,
}

/// Takes tensors from the source, converts them, and hands them to the backend.
pub(crate) struct Uploader<'a, B: Backend> {
    spec: &'a ModelSpec,
    grouping: &'a Grouping,
    source: &'a dyn WeightSource,
    conversion: Conversion,
    backend: &'a mut B,
    embedding: TensorId,
    bytes: u64,
}

impl<'a, B: Backend> Uploader<'a, B> {
    /// # Errors
    /// The source has no embedding table.
    pub(crate) fn new(
        spec: &'a ModelSpec,
        grouping: &'a Grouping,
        source: &'a dyn WeightSource,
        conversion: Conversion,
        backend: &'a mut B,
    ) -> Result<Self> {
        let embedding = embedding_id(spec, source)?;
        Ok(Self { spec, grouping, source, conversion, backend, embedding, bytes: 0 })
    }

    /// Loads everything; `progress` is told the share that is done.
    pub(crate) fn load(mut self, progress: &mut dyn FnMut(f32)) -> Result<Weights<B>> {
        let spec = self.spec;
        let steps = (spec.layers.len() + 2) as f32;
        let embedding = self.linear(&[self.embedding])?;
        let positions = self.positions()?;
        let embed_norm = self.norm_if(
            spec.embed_norm.is_some(),
            spec.embed_norm,
            TensorId::EmbedNorm,
            TensorId::EmbedNormBias,
        )?;
        progress(1.0 / steps);
        let mut layers = Vec::with_capacity(spec.layers.len());
        for index in 0..spec.layers.len() {
            layers.push(self.layer(index)?);
            progress((index + 2) as f32 / steps);
        }
        let final_norm = self.norm_if(
            spec.final_norm.is_some(),
            spec.final_norm,
            TensorId::FinalNorm,
            TensorId::FinalNormBias,
        )?;
        let head = self.head()?;
        let bytes = self.bytes;
        Ok(Weights { embedding, positions, embed_norm, layers, final_norm, head, bytes })
    }

    fn tensor(&self, id: TensorId) -> Result<HostTensor<'a>> {
        let tensor = self.source.tensor(self.spec, id)?;
        let tied = matches!(self.spec.head, Head::Logits { tied: true, .. });
        let is_head = id == TensorId::Head || (tied && id == self.embedding);
        self.conversion.apply(id, is_head, tensor)
    }

    fn tensors(&mut self, ids: &[TensorId]) -> Result<Vec<HostTensor<'a>>> {
        let parts: Vec<_> = ids.iter().map(|&id| self.tensor(id)).collect::<Result<_>>()?;
        self.bytes += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
        Ok(parts)
    }

    fn upload_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<B::Linear> {
        let what = names(&parts);
        self.backend.load_linear(parts).map_err(|source| ModelError::Backend { what, source })
    }

    fn linear(&mut self, ids: &[TensorId]) -> Result<B::Linear> {
        let parts = self.tensors(ids)?;
        self.upload_linear(parts)
    }

    fn upload_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<B::Vector> {
        let what = names(&parts);
        self.backend.load_vector(parts).map_err(|source| ModelError::Backend { what, source })
    }

    fn vector(&mut self, ids: &[TensorId]) -> Result<B::Vector> {
        let parts = self.tensors(ids)?;
        self.upload_vector(parts)
    }

    fn vector_if(&mut self, wanted: bool, ids: &[TensorId]) -> Result<Option<B::Vector>> {
        if wanted { self.vector(ids).map(Some) } else { Ok(None) }
    }

    fn stack(&mut self, weights: impl Iterator<Item = Vec<TensorId>>) -> Result<B::Stack> {
        let weights = weights.map(|ids| self.tensors(&ids)).collect::<Result<Vec<_>>>()?;
        let what = weights.first().map(|parts| names(parts) + " and those like it").unwrap_or_default();
        self.backend.load_stack(weights).map_err(|source| ModelError::Backend { what, source })
    }

    /// The only number of a tensor, for operations that take it as a parameter.
    fn number(&mut self, id: TensorId) -> Result<f32> {
        let tensor = self.source.tensor(self.spec, id)?;
        let values = to_f32(&tensor)?;
        self.bytes += tensor.bytes.len() as u64;
        values.first().copied().ok_or_else(|| {
            ModelError::corrupt(self.source.label(), format!("tensor `{}`", tensor.name), "has no number")
        })
    }

    fn norm(&mut self, norm: NormSpec, weight: TensorId, bias: Option<TensorId>) -> Result<Norm<B::Vector>> {
        Ok(Norm {
            kind: norm.kind,
            weight: Some(self.vector(&[weight])?),
            bias: match bias.filter(|_| norm.bias) {
                Some(id) => Some(self.vector(&[id])?),
                None => None,
            },
            offset: norm.offset,
            eps: norm.eps,
        })
    }

    fn norm_if(
        &mut self,
        wanted: bool,
        norm: Option<NormSpec>,
        weight: TensorId,
        bias: TensorId,
    ) -> Result<Option<Norm<B::Vector>>> {
        norm.filter(|_| wanted).map(|norm| self.norm(norm, weight, Some(bias))).transpose()
    }

    /// Every token has type 0, so that table's first row goes into all positions.
    fn positions(&mut self) -> Result<Option<B::Linear>> {
        let Some(learned) = self.spec.learned_positions else { return Ok(None) };
        let mut tensor = self.tensors(&[TensorId::Positions])?.remove(0);
        if learned.token_types > 0 {
            let types = to_f32(&self.tensors(&[TensorId::TokenTypes])?[0])?;
            let mut values = to_f32(&tensor)?;
            for row in values.chunks_mut(self.spec.hidden) {
                row.iter_mut().zip(&types).for_each(|(v, t)| *v += t);
            }
            tensor = host(tensor.name, tensor.shape, &values);
        }
        self.upload_linear(vec![tensor]).map(Some)
    }

    fn head(&mut self) -> Result<HeadWeights<B>> {
        let pool = match &self.spec.head {
            Head::Logits { tied: true, .. } => return Ok(HeadWeights::Logits(None)),
            Head::Logits { .. } => return Ok(HeadWeights::Logits(Some(self.linear(&[TensorId::Head])?))),
            Head::Pool(pool) => pool,
        };
        Ok(match &pool.output {
            PoolOutput::Embedding => HeadWeights::Embedding,
            PoolOutput::Classifier { .. } => HeadWeights::Classifier {
                dense: self.linear(&[TensorId::Dense])?,
                dense_bias: self.vector(&[TensorId::DenseBias])?,
                labels: self.linear(&[TensorId::Labels])?,
                labels_bias: self.vector(&[TensorId::LabelsBias])?,
            },
            PoolOutput::Tokens { ids, tied } => {
                let id = if *tied { self.embedding } else { TensorId::Head };
                let rows = rows(&self.source.tensor(self.spec, id)?, ids)?;
                self.bytes += rows.bytes.len() as u64;
                HeadWeights::Tokens(self.upload_linear(vec![rows])?)
            }
        })
    }

    fn layer(&mut self, index: usize) -> Result<Layer<B>> {
        let spec = &self.spec.layers[index];
        let id = |part| TensorId::Layer(index, part);
        let before = matches!(spec.placement, Placement::Before | Placement::Around);
        let after = spec.placement != Placement::Before;
        let norm = Some(spec.norm);
        let norms = LayerNorms {
            mixer: self.norm_if(before, norm, id(Part::AttentionNorm), id(Part::AttentionNormBias))?,
            mixer_post: self.norm_if(
                after,
                norm,
                id(Part::AttentionPostNorm),
                id(Part::AttentionPostNormBias),
            )?,
            ffn: self.norm_if(before && !spec.parallel, norm, id(Part::MlpNorm), id(Part::MlpNormBias))?,
            ffn_post: self.norm_if(
                after && !spec.parallel,
                norm,
                id(Part::MlpPostNorm),
                id(Part::MlpPostNormBias),
            )?,
        };
        let mixer = match &spec.mixer {
            Mixer::Attention(a) => MixerWeights::Attention(Box::new(self.attention(index, a)?)),
            Mixer::Latent(l) => MixerWeights::Latent(Box::new(self.latent(index, l)?)),
            Mixer::Delta(d) => MixerWeights::Delta(Box::new(self.delta(index, d)?)),
        };
        let ffn = match &spec.ffn {
            Ffn::Dense(mlp) => FfnWeights::Dense(Box::new(self.mlp(mlp, |part| id(Part::Mlp(part)))?)),
            Ffn::Moe(moe) => FfnWeights::Moe(Box::new(self.moe(index, moe)?)),
            Ffn::DenseAndMoe(mlp, moe) => {
                FfnWeights::DenseAndMoe(Box::new(self.both(index, spec, mlp, moe)?))
            }
        };
        let output_scale = if spec.output_scale { Some(self.number(id(Part::OutputScale))?) } else { None };
        Ok(Layer {
            placement: spec.placement,
            norms,
            mixer,
            ffn,
            parallel: spec.parallel,
            residual_scale: spec.residual_scale,
            output_scale,
        })
    }

    fn attention(&mut self, index: usize, a: &AttentionLayer) -> Result<AttentionWeights<B>> {
        let id = |part| TensorId::Layer(index, part);
        let (own_keys, own_values) = match a.kv {
            KvSource::Own => (true, true),
            KvSource::KeysAreValues => (true, false),
            KvSource::Layer(_) => (false, false),
        };
        let pick = |parts: [(bool, Part); 4]| -> Vec<TensorId> {
            parts.into_iter().filter(|(wanted, _)| *wanted).map(|(_, part)| id(part)).collect()
        };
        let parts =
            [(true, Part::Q), (own_keys, Part::K), (own_values, Part::V), (a.gated, Part::AttentionGate)];
        let qkv = self.linear(&pick(parts))?;
        let biases = [
            (true, Part::QBias),
            (own_keys, Part::KBias),
            (own_values, Part::VBias),
            (false, Part::AttentionGate),
        ];
        let norms = match a.qk_norm {
            None => None,
            Some(qk) => Some(OwnedHeadNorms {
                q: self.norm(qk.norm, id(Part::QNorm), None)?,
                k: if own_keys { Some(self.norm(qk.norm, id(Part::KNorm), None)?) } else { None },
                v: a.v_norm.filter(|_| own_keys).map(|v| Norm {
                    kind: v.kind,
                    weight: None,
                    bias: None,
                    offset: v.offset,
                    eps: v.eps,
                }),
                across_heads: qk.across_heads,
            }),
        };
        Ok(AttentionWeights {
            spec: self.grouping.attention(self.spec, index),
            rope: a.rope,
            qkv,
            qkv_bias: self.vector_if(a.qkv_bias, &pick(biases))?,
            norms,
            sinks: self.vector_if(a.sinks, &[id(Part::Sinks)])?,
            gated: a.gated,
            shared_dim: (a.kv == KvSource::KeysAreValues).then_some(a.head_dim),
            output: self.linear(&[id(Part::O)])?,
            output_bias: self.vector_if(a.output_bias, &[id(Part::OBias)])?,
        })
    }

    fn latent(&mut self, index: usize, l: &LatentLayer) -> Result<LatentWeights<B>> {
        let id = |part| TensorId::Layer(index, part);
        let q_down = match l.q_rank {
            None => None,
            Some(_) => {
                Some((self.linear(&[id(Part::QDown)])?, self.norm(l.norm, id(Part::QDownNorm), None)?))
            }
        };
        Ok(LatentWeights {
            spec: self.grouping.attention(self.spec, index),
            shape: l.shape,
            rope: l.rope,
            q_down_bias: self.vector_if(l.bias && q_down.is_some(), &[id(Part::QDownBias)])?,
            q_down,
            q_up: self.linear(&[id(Part::QUp)])?,
            kv_down: self.linear(&[id(Part::KvDown)])?,
            kv_down_bias: self.vector_if(l.bias, &[id(Part::KvDownBias)])?,
            kv_norm: self.norm(l.norm, id(Part::KvNorm), None)?,
            absorb: self.stack((0..l.heads).map(|h| vec![id(Part::Absorb(h))]))?,
            expand: self.stack((0..l.heads).map(|h| vec![id(Part::Expand(h))]))?,
            output: self.linear(&[id(Part::O)])?,
            output_bias: self.vector_if(l.bias, &[id(Part::OBias)])?,
        })
    }

    fn delta(&mut self, index: usize, d: &DeltaLayer) -> Result<DeltaWeights<B>> {
        let id = |part| TensorId::Layer(index, part);
        let parts = [Part::DeltaQkv, Part::DeltaZ, Part::DeltaB, Part::DeltaA];
        Ok(DeltaWeights {
            place: self.grouping.place(index),
            shape: d.shape,
            input: self.linear(&parts.map(id))?,
            conv: self.vector(&[id(Part::DeltaConv)])?,
            a_log: self.vector(&[id(Part::DeltaALog)])?,
            dt_bias: self.vector(&[id(Part::DeltaDtBias)])?,
            norm: self.norm(d.norm, id(Part::DeltaNorm), None)?,
            output: self.linear(&[id(Part::DeltaOut)])?,
        })
    }

    fn mlp(&mut self, mlp: &MlpLayer, id: impl Fn(MlpPart) -> TensorId) -> Result<MlpWeights<B>> {
        let mut activation = mlp.activation;
        if let (Activation::Xielu { alpha_p, alpha_n, beta, .. }, TensorId::Layer(index, _)) =
            (&mut activation, id(MlpPart::Up))
        {
            *alpha_p = softplus(self.number(TensorId::Layer(index, Part::XieluP))?);
            *alpha_n = *beta + softplus(self.number(TensorId::Layer(index, Part::XieluN))?);
        }
        Ok(MlpWeights {
            gate_up: self.linear(&gate_up(mlp, &id, MlpPart::Gate, MlpPart::Up))?,
            gate_up_bias: self.vector_if(mlp.bias, &gate_up(mlp, &id, MlpPart::GateBias, MlpPart::UpBias))?,
            activation,
            gated: mlp.gated,
            down: self.linear(&[id(MlpPart::Down)])?,
            down_bias: self.vector_if(mlp.bias, &[id(MlpPart::DownBias)])?,
        })
    }

    fn moe(&mut self, index: usize, moe: &MoeLayer) -> Result<MoeWeights<B>> {
        let id = |part| TensorId::Layer(index, part);
        let of = |expert| move |part| TensorId::Layer(index, Part::Expert(expert, part));
        let experts = 0..moe.route.experts;
        let biases = |gate, up| experts.clone().flat_map(move |e| gate_up(&moe.expert, &of(e), gate, up));
        let shared = match &moe.shared {
            None => None,
            Some(mlp) => Some(self.mlp(mlp, |part| id(Part::Shared(part)))?),
        };
        let gated_share = shared.is_some() && moe.shared_gate;
        Ok(MoeWeights {
            router: self.linear(&[id(Part::Router)])?,
            router_bias: self.vector_if(moe.router_bias, &[id(Part::RouterBias)])?,
            route: moe.route.clone(),
            correction: self.vector_if(moe.correction, &[id(Part::Correction)])?,
            expert_scale: self.vector_if(moe.expert_scale, &[id(Part::ExpertScale)])?,
            gate_up: self
                .stack(experts.clone().map(|e| gate_up(&moe.expert, &of(e), MlpPart::Gate, MlpPart::Up)))?,
            gate_up_bias: self.vector_if(
                moe.expert.bias,
                &biases(MlpPart::GateBias, MlpPart::UpBias).collect::<Vec<_>>(),
            )?,
            activation: moe.expert.activation,
            intermediate: moe.expert.intermediate,
            down: self.stack(experts.clone().map(|e| vec![of(e)(MlpPart::Down)]))?,
            down_bias: self.vector_if(
                moe.expert.bias,
                &experts.clone().map(|e| of(e)(MlpPart::DownBias)).collect::<Vec<_>>(),
            )?,
            shared,
            shared_gate: if gated_share { Some(self.linear(&[id(Part::SharedGate)])?) } else { None },
        })
    }

    fn both(
        &mut self,
        index: usize,
        layer: &LayerSpec,
        mlp: &MlpLayer,
        moe: &MoeLayer,
    ) -> Result<BothWeights<B>> {
        let id = |part| TensorId::Layer(index, part);
        let norm = NormSpec { bias: false, ..layer.norm };
        Ok(BothWeights {
            mlp: self.mlp(mlp, |part| id(Part::Mlp(part)))?,
            mlp_post: self.norm(norm, id(Part::DensePostNorm), None)?,
            experts_norm: self.norm(norm, id(Part::ExpertsNorm), None)?,
            router_norm: self.router_norm(norm, id(Part::RouterNorm))?,
            moe: self.moe(index, moe)?,
            experts_post: self.norm(norm, id(Part::ExpertsPostNorm), None)?,
        })
    }

    /// The router's logits are also divided by the root of the hidden size, here in the weights of its norm.
    fn router_norm(&mut self, norm: NormSpec, id: TensorId) -> Result<Norm<B::Vector>> {
        let tensor = self.tensors(&[id])?.remove(0);
        let factor = (self.spec.hidden as f64).powf(-0.5);
        let scaled = |v: f32| (f64::from(v + norm.offset) * factor) as f32;
        let values: Vec<f32> = to_f32(&tensor)?.into_iter().map(scaled).collect();
        let weight = self.upload_vector(vec![host(tensor.name, tensor.shape, &values)])?;
        Ok(Norm { kind: norm.kind, weight: Some(weight), bias: None, offset: 0.0, eps: norm.eps })
    }
}

/// Gate and up, or up alone.
fn gate_up(mlp: &MlpLayer, id: &impl Fn(MlpPart) -> TensorId, gate: MlpPart, up: MlpPart) -> Vec<TensorId> {
    if mlp.gated { vec![id(gate), id(up)] } else { vec![id(up)] }
}

fn names(parts: &[HostTensor<'_>]) -> String {
    parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(" + ")
}

fn softplus(x: f32) -> f32 {
    let x = f64::from(x);
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) as f32
}

/// A tensor of computed values.
fn host(name: String, shape: Vec<usize>, values: &[f32]) -> HostTensor<'static> {
    let bytes = Cow::Owned(float_bytes(values, Storage::F32));
    HostTensor { name, shape, storage: Storage::F32, bytes, scales: None }
}

/// Some rows of a matrix, in this order.
fn rows(tensor: &HostTensor<'_>, ids: &[u32]) -> Result<HostTensor<'static>> {
    let width = tensor.shape.last().copied().unwrap_or_default();
    let values = to_f32(tensor)?;
    let mut chosen = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        let from = id as usize * width;
        let row = values.get(from..from + width).ok_or_else(|| {
            let why = format!("has no row {id}, its shape is {:?}", tensor.shape);
            ModelError::corrupt("weights", format!("tensor `{}`", tensor.name), why)
        })?;
        chosen.extend_from_slice(row);
    }
    Ok(host(tensor.name.clone(), vec![ids.len(), width], &chosen))
}
