//! The spelling that most decoders share, which is Llama's with additions, and gpt-oss's experts.

use super::{Cut, Run, Stored};
use crate::spec::{Ffn, KvSource, Mixer, ModelSpec, Placement};
use crate::weights::{MlpPart, Part, TensorId, shape};

/// Tensors of decoders that are not of a layer.
#[must_use]
pub fn decoder(spec: &ModelSpec, id: TensorId) -> Vec<Stored> {
    let whole = |name: &str| vec![Stored::whole(name, shape(spec, id))];
    match id {
        TensorId::Embedding => whole("embed_tokens.weight"),
        TensorId::FinalNorm => whole("norm.weight"),
        TensorId::FinalNormBias => whole("norm.bias"),
        TensorId::Head => {
            let names = ["lm_head.weight", "language_model.lm_head.weight"];
            names.map(|name| Stored::whole(name, shape(spec, id)).at_top()).into()
        }
        _ => Vec::new(),
    }
}

/// A layer's tensors in the spelling that most decoders share. Families that differ match their own parts first.
#[must_use]
pub fn decoder_layer(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let of = &spec.layers[layer];
    let around = of.placement != Placement::Before;
    let wanted = shape(spec, TensorId::Layer(layer, part));
    let whole = |name: &str| vec![Stored::whole(name, wanted.clone())];
    match part {
        Part::AttentionNorm => whole("input_layernorm.weight"),
        Part::AttentionNormBias => whole("input_layernorm.bias"),
        Part::AttentionPostNorm => whole("post_attention_layernorm.weight"),
        Part::MlpNorm if around => whole("pre_feedforward_layernorm.weight"),
        Part::MlpNorm => whole("post_attention_layernorm.weight"),
        Part::MlpNormBias => whole("post_attention_layernorm.bias"),
        Part::MlpPostNorm => whole("post_feedforward_layernorm.weight"),
        Part::DensePostNorm => whole("post_feedforward_layernorm_1.weight"),
        Part::ExpertsNorm => whole("pre_feedforward_layernorm_2.weight"),
        Part::ExpertsPostNorm => whole("post_feedforward_layernorm_2.weight"),
        Part::OutputScale => whole("layer_scalar"),
        Part::Mlp(_) | Part::XieluP | Part::XieluN => dense(spec, layer, part),
        Part::Expert(expert, part) => expert_names(spec, layer, expert, part),
        Part::Shared(part) => ["mlp.shared_expert", "mlp.shared_experts"]
            .map(|block| Stored::whole(format!("{block}.{}", mlp_name(part)), wanted.clone()))
            .into(),
        Part::SharedGate => whole("mlp.shared_expert_gate.weight"),
        Part::Router => {
            ["mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight", "router.proj.weight"]
                .map(|name| Stored::whole(name, wanted.clone()))
                .into()
        }
        Part::RouterBias => whole("mlp.router.bias"),
        Part::RouterNorm => whole("router.scale"),
        Part::ExpertScale => whole("router.per_expert_scale"),
        Part::Correction => whole("mlp.gate.e_score_correction_bias"),
        mixer => mixer_names(spec, layer, mixer),
    }
}

const fn mlp_name(part: MlpPart) -> &'static str {
    match part {
        MlpPart::Gate => "gate_proj.weight",
        MlpPart::Up => "up_proj.weight",
        MlpPart::Down => "down_proj.weight",
        MlpPart::GateBias => "gate_proj.bias",
        MlpPart::UpBias => "up_proj.bias",
        MlpPart::DownBias => "down_proj.bias",
    }
}

/// The dense block: each projection its own, or gate and up fused, gate first.
fn dense(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let wanted = shape(spec, TensorId::Layer(layer, part));
    let part = match part {
        Part::Mlp(part) => part,
        Part::XieluP => return vec![Stored::whole("mlp.act_fn.alpha_p", wanted)],
        _ => return vec![Stored::whole("mlp.act_fn.alpha_n", wanted)],
    };
    let mut all = vec![Stored::whole(format!("mlp.{}", mlp_name(part)), wanted.clone())];
    let second = match part {
        MlpPart::Gate | MlpPart::GateBias => 0,
        MlpPart::Up | MlpPart::UpBias => 1,
        MlpPart::Down | MlpPart::DownBias => return all,
    };
    let name = if part.is_linear() { "mlp.gate_up_proj.weight" } else { "mlp.gate_up_proj.bias" };
    let rows = wanted[0];
    let mut fused = wanted;
    fused[0] *= 2;
    all.push(Stored::rows(name, fused, vec![Run::span(second * rows, rows)]));
    all
}

/// An expert's projections: each a tensor, as published; or all experts' in one, gate above up.
fn expert_names(spec: &ModelSpec, layer: usize, expert: usize, part: MlpPart) -> Vec<Stored> {
    let wanted = shape(spec, TensorId::Layer(layer, Part::Expert(expert, part)));
    let experts = match &spec.layers[layer].ffn {
        Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe) => moe.route.experts,
        Ffn::Dense(_) => return Vec::new(),
    };
    let mut all = vec![Stored::whole(format!("mlp.experts.{expert}.{}", mlp_name(part)), wanted.clone())];
    let mixtral = match part {
        MlpPart::Gate => "w1",
        MlpPart::Up => "w3",
        MlpPart::Down => "w2",
        _ => return all,
    };
    let name = format!("block_sparse_moe.experts.{expert}.{mixtral}.weight");
    all.push(Stored::whole(name, wanted.clone()));
    let (rows, width) = (wanted[0], wanted[1]);
    let (name, per_expert, first) = match part {
        MlpPart::Down => ("down_proj", rows, 0),
        MlpPart::Gate => ("gate_up_proj", 2 * rows, 0),
        _ => ("gate_up_proj", 2 * rows, rows),
    };
    for block in ["mlp.experts", "experts"] {
        let fused = vec![experts, per_expert, width];
        let run = Run::span(expert * per_expert + first, rows);
        all.push(Stored::rows(format!("{block}.{name}"), fused, vec![run]));
    }
    all
}

fn mixer_names(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let wanted = shape(spec, TensorId::Layer(layer, part));
    match &spec.layers[layer].mixer {
        Mixer::Attention(_) => attention(spec, layer, part, wanted),
        Mixer::Latent(l) => {
            let s = &l.shape;
            let fused = vec![l.heads * (s.nope + s.value), s.latent];
            let head = |head| head * (s.nope + s.value);
            let name = match part {
                Part::QDown => "self_attn.q_a_proj.weight",
                Part::QDownBias => "self_attn.q_a_proj.bias",
                Part::QDownNorm => "self_attn.q_a_layernorm.weight",
                Part::QUp if l.q_rank.is_some() => "self_attn.q_b_proj.weight",
                Part::QUp => "self_attn.q_proj.weight",
                Part::KvDown => "self_attn.kv_a_proj_with_mqa.weight",
                Part::KvDownBias => "self_attn.kv_a_proj_with_mqa.bias",
                Part::KvNorm => "self_attn.kv_a_layernorm.weight",
                Part::O => "self_attn.o_proj.weight",
                Part::OBias => "self_attn.o_proj.bias",
                Part::Absorb(h) => {
                    let (rows, columns) = (Run::span(head(h), s.nope), Run::span(0, s.latent));
                    let whole = Stored::whole("self_attn.kv_b_proj.weight", fused);
                    return vec![Stored { cut: Cut::Turned { rows, columns }, ..whole }];
                }
                Part::Expand(h) => {
                    let rows = vec![Run::span(head(h) + s.nope, s.value)];
                    return vec![Stored::rows("self_attn.kv_b_proj.weight", fused, rows)];
                }
                _ => return Vec::new(),
            };
            vec![Stored::whole(name, wanted)]
        }
        Mixer::Delta(_) => delta(spec, layer, part, &wanted),
    }
}

/// Grouped attention: each projection its own, or `[q | k | v]` fused. With a gate, the stored projection of queries
/// has a gate's rows after each head's.
fn attention(spec: &ModelSpec, layer: usize, part: Part, wanted: Vec<usize>) -> Vec<Stored> {
    let Mixer::Attention(a) = &spec.layers[layer].mixer else { return Vec::new() };
    let whole = |name: &str| vec![Stored::whole(name, wanted.clone())];
    let (letter, first, bias) = match part {
        Part::Q | Part::AttentionGate if a.gated => {
            let first = if part == Part::Q { 0 } else { a.head_dim };
            let run = Run { first, len: a.head_dim, stride: 2 * a.head_dim, times: a.q_heads };
            let fused = vec![2 * a.q_width(), spec.hidden];
            return vec![Stored::rows("self_attn.q_proj.weight", fused, vec![run])];
        }
        Part::Q => ('q', 0, false),
        Part::QBias => ('q', 0, true),
        Part::K => ('k', a.q_width(), false),
        Part::KBias => ('k', a.q_width(), true),
        Part::V => ('v', a.q_width() + a.kv_width(), false),
        Part::VBias => ('v', a.q_width() + a.kv_width(), true),
        Part::O => return whole("self_attn.o_proj.weight"),
        Part::OBias => return whole("self_attn.o_proj.bias"),
        Part::QNorm => return whole("self_attn.q_norm.weight"),
        Part::KNorm => return whole("self_attn.k_norm.weight"),
        Part::Sinks => return whole("self_attn.sinks"),
        _ => return Vec::new(),
    };
    let kind = if bias { "bias" } else { "weight" };
    let mut all = whole(&format!("self_attn.{letter}_proj.{kind}"));
    if a.kv == KvSource::Own && !a.gated {
        let rows = wanted[0];
        let mut fused = wanted;
        fused[0] = a.q_width() + 2 * a.kv_width();
        all.push(Stored::rows(format!("self_attn.qkv_proj.{kind}"), fused, vec![Run::span(first, rows)]));
    }
    all
}

/// Delta nets: `[q | k | v]`, z, b and a apart; or grouped by key heads, `[q | k | v | z]` and `[b | a]` of each.
fn delta(spec: &ModelSpec, layer: usize, part: Part, wanted: &[usize]) -> Vec<Stored> {
    let Mixer::Delta(d) = &spec.layers[layer].mixer else { return Vec::new() };
    let s = &d.shape;
    let per_key = s.v_heads / s.k_heads.max(1);
    let values = per_key * s.v_dim;
    let group = 2 * s.k_dim + 2 * values;
    let run = |first, len| Run { first, len, stride: group, times: s.k_heads };
    let qkvz = |runs| {
        let fused = vec![s.k_heads * group, spec.hidden];
        Stored::rows("linear_attn.in_proj_qkvz.weight", fused, runs)
    };
    let ba = |first| {
        let run = Run { first, len: per_key, stride: 2 * per_key, times: s.k_heads };
        Stored::rows("linear_attn.in_proj_ba.weight", vec![2 * s.v_heads, spec.hidden], vec![run])
    };
    let whole = |name: &str| Stored::whole(format!("linear_attn.{name}"), wanted.to_vec());
    match part {
        Part::DeltaQkv => {
            let runs = vec![run(0, s.k_dim), run(s.k_dim, s.k_dim), run(2 * s.k_dim, values)];
            vec![whole("in_proj_qkv.weight"), qkvz(runs)]
        }
        Part::DeltaZ => vec![whole("in_proj_z.weight"), qkvz(vec![run(2 * s.k_dim + values, values)])],
        Part::DeltaB => vec![whole("in_proj_b.weight"), ba(0)],
        Part::DeltaA => vec![whole("in_proj_a.weight"), ba(per_key)],
        Part::DeltaConv => {
            let conv = Stored::whole("linear_attn.conv1d.weight", vec![s.conv_width(), 1, s.taps]);
            vec![conv]
        }
        Part::DeltaALog => vec![whole("A_log")],
        Part::DeltaDtBias => vec![whole("dt_bias")],
        Part::DeltaNorm => vec![whole("norm.weight")],
        Part::DeltaOut => vec![whole("out_proj.weight")],
        _ => Vec::new(),
    }
}

/// gpt-oss: experts' matrices are stored `[in, out]` where they are plain numbers, and `[out, in]` in few bits; gate and
/// up alternate, gate first.
#[must_use]
pub fn gpt_oss_layer(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let Part::Expert(expert, part) = part else { return decoder_layer(spec, layer, part) };
    let wanted = shape(spec, TensorId::Layer(layer, Part::Expert(expert, part)));
    let Ffn::Moe(moe) = &spec.layers[layer].ffn else { return Vec::new() };
    let experts = moe.route.experts;
    let out = wanted[0];
    let (name, first, step) = match part {
        MlpPart::Gate | MlpPart::GateBias => ("mlp.experts.gate_up_proj", 0, 2),
        MlpPart::Up | MlpPart::UpBias => ("mlp.experts.gate_up_proj", 1, 2),
        MlpPart::Down | MlpPart::DownBias => ("mlp.experts.down_proj", 0, 1),
    };
    let every = |first| Run { first, len: 1, stride: step, times: out };
    let rows = vec![every(expert * step * out + first)];
    if !part.is_linear() {
        return vec![Stored::rows(format!("{name}_bias"), vec![experts, step * out], rows)];
    }
    let inputs = wanted[1];
    let packed = Stored { packed: true, ..Stored::rows(name, vec![experts, step * out, inputs], rows) };
    let cut = Cut::Turned { rows: Run::span(expert * inputs, inputs), columns: every(first) };
    let plain = Stored { cut, ..Stored::whole(name, vec![experts, inputs, step * out]) };
    vec![packed, plain]
}
