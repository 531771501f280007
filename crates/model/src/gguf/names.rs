//! How GGUF files spell tensors.

use crate::weights::{MlpPart, Part, TensorId};

/// Name in GGUF files; none of tensors that no family we read has.
#[must_use]
pub fn name_of(id: TensorId) -> Option<String> {
    let name = match id {
        TensorId::Embedding => "token_embd.weight",
        TensorId::FinalNorm => "output_norm.weight",
        TensorId::Head => "output.weight",
        TensorId::Layer(i, part) => return part_name(part).map(|name| format!("blk.{i}.{name}")),
        _ => return None,
    };
    Some(name.to_owned())
}

const fn part_name(part: Part) -> Option<&'static str> {
    Some(match part {
        Part::AttentionNorm => "attn_norm.weight",
        Part::Q => "attn_q.weight",
        Part::K => "attn_k.weight",
        Part::V => "attn_v.weight",
        Part::O => "attn_output.weight",
        Part::QBias => "attn_q.bias",
        Part::KBias => "attn_k.bias",
        Part::VBias => "attn_v.bias",
        Part::OBias => "attn_output.bias",
        Part::QNorm => "attn_q_norm.weight",
        Part::KNorm => "attn_k_norm.weight",
        Part::MlpNorm => "ffn_norm.weight",
        Part::Mlp(MlpPart::Gate) => "ffn_gate.weight",
        Part::Mlp(MlpPart::Up) => "ffn_up.weight",
        Part::Mlp(MlpPart::Down) => "ffn_down.weight",
        Part::Mlp(MlpPart::GateBias) => "ffn_gate.bias",
        Part::Mlp(MlpPart::UpBias) => "ffn_up.bias",
        Part::Mlp(MlpPart::DownBias) => "ffn_down.bias",
        _ => return None,
    })
}
