//! A layer's weights on a device, and the views of them that composite operations take.
//!
//! Reads no tensor.

use crate::backend::{
    Activation, AttentionBlock, AttentionSpec, Backend, DeltaBlock, DeltaRule, DeltaShape, Experts,
    HeadNorms, LatentBlock, LatentShape, MlpBlock, MoeBlock, Norm, RouteSpec,
};
use crate::spec::Placement;

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
pub(super) struct OwnedHeadNorms<V> {
    pub(super) q: Norm<V>,
    pub(super) k: Option<Norm<V>>,
    pub(super) v: Option<Norm<V>>,
    pub(super) across_heads: bool,
}

pub(crate) struct AttentionWeights<B: Backend> {
    pub(super) spec: AttentionSpec,
    pub(super) rope: Option<usize>,
    pub(super) qkv: B::Linear,
    pub(super) qkv_bias: Option<B::Vector>,
    pub(super) norms: Option<OwnedHeadNorms<B::Vector>>,
    pub(super) sinks: Option<B::Vector>,
    pub(super) gated: bool,
    pub(super) shared_dim: Option<usize>,
    pub(super) output: B::Linear,
    pub(super) output_bias: Option<B::Vector>,
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
    pub(super) spec: AttentionSpec,
    pub(super) shape: LatentShape,
    pub(super) rope: usize,
    pub(super) q_down: Option<(B::Linear, Norm<B::Vector>)>,
    pub(super) q_down_bias: Option<B::Vector>,
    pub(super) q_up: B::Linear,
    pub(super) kv_down: B::Linear,
    pub(super) kv_down_bias: Option<B::Vector>,
    pub(super) kv_norm: Norm<B::Vector>,
    pub(super) absorb: B::Stack,
    pub(super) expand: B::Stack,
    pub(super) output: B::Linear,
    pub(super) output_bias: Option<B::Vector>,
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
    pub(super) place: (usize, usize),
    pub(super) shape: DeltaShape,
    pub(super) input: B::Linear,
    pub(super) conv: B::Vector,
    pub(super) a_log: B::Vector,
    pub(super) dt_bias: B::Vector,
    pub(super) norm: Norm<B::Vector>,
    pub(super) output: B::Linear,
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
    pub(super) gate_up: B::Linear,
    pub(super) gate_up_bias: Option<B::Vector>,
    pub(super) activation: Activation,
    pub(super) gated: bool,
    pub(super) down: B::Linear,
    pub(super) down_bias: Option<B::Vector>,
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
    pub(super) router: B::Linear,
    pub(super) router_bias: Option<B::Vector>,
    pub(super) route: RouteSpec,
    pub(super) correction: Option<B::Vector>,
    pub(super) expert_scale: Option<B::Vector>,
    pub(super) gate_up: B::Stack,
    pub(super) gate_up_bias: Option<B::Vector>,
    pub(super) activation: Activation,
    pub(super) intermediate: usize,
    pub(super) down: B::Stack,
    pub(super) down_bias: Option<B::Vector>,
    pub(super) shared: Option<MlpWeights<B>>,
    pub(super) shared_gate: Option<B::Linear>,
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
