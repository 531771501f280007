//! From tensors to a layer's weights: which tensor goes where, for every kind of layer.

use super::layers::{
    AttentionWeights, BothWeights, DeltaWeights, FfnWeights, LatentWeights, Layer, LayerNorms, MixerWeights,
    MlpWeights, MoeWeights, OwnedHeadNorms,
};
use super::{Uploader, host};
use crate::backend::{Activation, Backend, LinearUse, Norm};
use crate::convert::to_f32;
use crate::error::Result;
use crate::spec::{
    AttentionLayer, DeltaLayer, Ffn, KvSource, LatentLayer, LayerSpec, Mixer, MlpLayer, MoeLayer, NormSpec,
    Placement,
};
use crate::weights::{MlpPart, Part, TensorId};

impl<B: Backend> Uploader<'_, B> {
    pub(super) fn layer(&mut self, index: usize) -> Result<Layer<B>> {
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
            router: self.linear_for(&[id(Part::Router)], LinearUse::Router)?,
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

fn softplus(x: f32) -> f32 {
    let x = f64::from(x);
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) as f32
}

#[cfg(test)]
mod tests {
    use super::softplus;

    #[test]
    fn softplus_is_stable_at_both_ends() {
        assert_eq!((softplus(0.0), softplus(200.0)), (2f32.ln(), 200.0));
        assert!(softplus(-30.0) > 0.0 && softplus(-30.0) < 1e-12);
    }
}
