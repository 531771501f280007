//! The tensors that a model consists of, under names of our own, and where they come from.
//!
//! Owns the list of a specification's tensors with their shapes, the spellings of their names in files, and the
//! trait [`WeightSource`]. Reads no file itself.

use std::borrow::Cow;

use crate::backend::HostTensor;
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;

/// A tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorId {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[hidden]`.
    FinalNorm,
    /// `[vocab, hidden]`, where the model is not tied.
    Head,
    /// Of a layer.
    Layer(usize, Part),
}

/// A tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Part {
    AttentionNorm,
    Q,
    K,
    V,
    O,
    QBias,
    KBias,
    VBias,
    OBias,
    QNorm,
    KNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
}

impl TensorId {
    /// Whether it is the weight of a linear layer, the head included: what quantization at load applies to.
    #[must_use]
    pub const fn is_linear(self) -> bool {
        matches!(
            self,
            Self::Head
                | Self::Layer(_, Part::Q | Part::K | Part::V | Part::O | Part::Gate | Part::Up | Part::Down)
        )
    }

    /// Name in safetensors files of the families that we support.
    #[must_use]
    pub fn hf_name(self) -> String {
        match self {
            Self::Embedding => "model.embed_tokens.weight".into(),
            Self::FinalNorm => "model.norm.weight".into(),
            Self::Head => "lm_head.weight".into(),
            Self::Layer(i, part) => {
                let part = match part {
                    Part::AttentionNorm => "input_layernorm.weight",
                    Part::Q => "self_attn.q_proj.weight",
                    Part::K => "self_attn.k_proj.weight",
                    Part::V => "self_attn.v_proj.weight",
                    Part::O => "self_attn.o_proj.weight",
                    Part::QBias => "self_attn.q_proj.bias",
                    Part::KBias => "self_attn.k_proj.bias",
                    Part::VBias => "self_attn.v_proj.bias",
                    Part::OBias => "self_attn.o_proj.bias",
                    Part::QNorm => "self_attn.q_norm.weight",
                    Part::KNorm => "self_attn.k_norm.weight",
                    Part::MlpNorm => "post_attention_layernorm.weight",
                    Part::Gate => "mlp.gate_proj.weight",
                    Part::Up => "mlp.up_proj.weight",
                    Part::Down => "mlp.down_proj.weight",
                    Part::GateBias => "mlp.gate_proj.bias",
                    Part::UpBias => "mlp.up_proj.bias",
                    Part::DownBias => "mlp.down_proj.bias",
                };
                format!("model.layers.{i}.{part}")
            }
        }
    }

    /// Name in GGUF files.
    #[must_use]
    pub fn gguf_name(self) -> String {
        match self {
            Self::Embedding => "token_embd.weight".into(),
            Self::FinalNorm => "output_norm.weight".into(),
            Self::Head => "output.weight".into(),
            Self::Layer(i, part) => {
                let part = match part {
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
                    Part::Gate => "ffn_gate.weight",
                    Part::Up => "ffn_up.weight",
                    Part::Down => "ffn_down.weight",
                    Part::GateBias => "ffn_gate.bias",
                    Part::UpBias => "ffn_up.bias",
                    Part::DownBias => "ffn_down.bias",
                };
                format!("blk.{i}.{part}")
            }
        }
    }
}

/// Parts of a layer, in the order in which they are used.
#[must_use]
pub fn layer_parts(spec: &ModelSpec, layer: usize) -> Vec<Part> {
    let layer = &spec.layers[layer];
    let mut parts = vec![Part::AttentionNorm, Part::Q, Part::K, Part::V, Part::O];
    if layer.attention.qkv_bias {
        parts.extend([Part::QBias, Part::KBias, Part::VBias]);
    }
    if layer.attention.output_bias {
        parts.push(Part::OBias);
    }
    if layer.attention.qk_norm.is_some() {
        parts.extend([Part::QNorm, Part::KNorm]);
    }
    parts.extend([Part::MlpNorm, Part::Gate, Part::Up, Part::Down]);
    if layer.mlp.bias {
        parts.extend([Part::GateBias, Part::UpBias, Part::DownBias]);
    }
    parts
}

/// Shape that the specification gives a tensor; a linear's is `[out, in]`.
#[must_use]
pub fn shape(spec: &ModelSpec, id: TensorId) -> Vec<usize> {
    let hidden = spec.hidden;
    match id {
        TensorId::Embedding | TensorId::Head => vec![spec.vocab, hidden],
        TensorId::FinalNorm => vec![hidden],
        TensorId::Layer(i, part) => {
            let (a, mlp) = (&spec.layers[i].attention, &spec.layers[i].mlp);
            match part {
                Part::AttentionNorm | Part::MlpNorm | Part::OBias | Part::DownBias => vec![hidden],
                Part::Q => vec![a.q_width(), hidden],
                Part::K | Part::V => vec![a.kv_width(), hidden],
                Part::O => vec![hidden, a.q_width()],
                Part::QBias => vec![a.q_width()],
                Part::KBias | Part::VBias => vec![a.kv_width()],
                Part::QNorm | Part::KNorm => vec![a.head_dim],
                Part::Gate | Part::Up => vec![mlp.intermediate, hidden],
                Part::Down => vec![hidden, mlp.intermediate],
                Part::GateBias | Part::UpBias => vec![mlp.intermediate],
            }
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

    /// Whether the source has it.
    fn has(&self, id: TensorId) -> bool;

    /// Name of the file or of the source, for errors.
    fn label(&self) -> &str;
}

/// Which tensor embeds: a tied model's file may store only the head.
///
/// # Errors
/// The source has neither.
pub fn embedding_id(spec: &ModelSpec, source: &dyn WeightSource) -> Result<TensorId> {
    if source.has(TensorId::Embedding) || !spec.tied {
        return Ok(TensorId::Embedding);
    }
    if source.has(TensorId::Head) {
        return Ok(TensorId::Head);
    }
    let tensor = TensorId::Embedding.hf_name();
    Err(ModelError::MissingTensor { file: source.label().to_owned(), tensor })
}

/// Turns rows that are stored pairwise (element `i` of the first half beside element `i` of the second) into
/// rows that are stored by halves, within each head. Rows move whole, so blocks of quantized rows stay intact.
///
/// `bytes` has `heads * head_dim` rows.
#[must_use]
pub fn pairs_to_halves(bytes: &[u8], heads: usize, head_dim: usize) -> Cow<'static, [u8]> {
    let row = bytes.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for element in 0..head_dim {
            let (half, i) = (element / (head_dim / 2), element % (head_dim / 2));
            let from = (head * head_dim + 2 * i + half) * row;
            out.extend_from_slice(&bytes[from..from + row]);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_within_each_head() {
        // Two heads of four one-byte rows: stored x0 y0 x1 y1, wanted x0 x1 y0 y1.
        let stored = [0, 2, 1, 3, 10, 12, 11, 13];
        assert_eq!(&pairs_to_halves(&stored, 2, 4)[..], [0, 1, 2, 3, 10, 11, 12, 13]);
    }
}
