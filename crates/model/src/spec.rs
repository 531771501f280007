//! What a model is made of: plain data, derived once from a configuration and never changed.
//!
//! Owns the specification and the checks that hold for every architecture. Knows no file format and no name of
//! a tensor or an architecture's field.

use crate::backend::{Activation, Storage};
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
    /// Positions.
    pub const CONTEXT: u64 = 1 << 24;
}

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The architecture's name, as the registry has it.
    pub architecture: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding table, and logits.
    pub vocab: usize,
    /// Most positions.
    pub context: usize,
    /// From first to last.
    pub layers: Vec<LayerSpec>,
    /// Rotary embeddings; layers name them by index.
    pub ropes: Vec<RopeSpec>,
    /// Multiplies embedded rows.
    pub embed_scale: f32,
    /// After the last layer.
    pub final_norm: NormSpec,
    /// Whether the embedding table is also the logits' weight.
    pub tied: bool,
    /// Multiplies the logits.
    pub logits_scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logits_soft_cap: Option<f32>,
    /// Type that the configuration declares for the weights; files may differ.
    pub dtype: Option<Storage>,
    /// First token of a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Fields of the configuration that mean nothing to us, for the log.
    pub ignored_fields: Vec<String>,
}

/// One layer: attention, then feed-forward, each with a norm before it.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Before attention.
    pub attention_norm: NormSpec,
    /// Attention.
    pub attention: AttentionLayer,
    /// Before the feed-forward block.
    pub mlp_norm: NormSpec,
    /// Feed-forward block.
    pub mlp: MlpLayer,
}

/// Root-mean-square norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to each weight.
    pub offset: f32,
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
    /// A query at `p` sees `p - n + 1 ..= p`.
    pub window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Index into [`ModelSpec::ropes`].
    pub rope: Option<usize>,
    /// Norm of each query and key head, before the rotation.
    pub qk_norm: Option<NormSpec>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub output_bias: bool,
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

    /// Width of `[q | k | v]`.
    #[must_use]
    pub const fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// Gated feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpLayer {
    /// Width of gate and of up.
    pub intermediate: usize,
    /// Of the gate.
    pub activation: Activation,
    /// Whether all three projections have biases.
    pub bias: bool,
}

impl ModelSpec {
    /// Numbers in the weights, embedding and head included.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let layers: usize = self
            .layers
            .iter()
            .map(|layer| {
                let a = &layer.attention;
                let heads = self.hidden * (a.qkv_width() + a.q_width());
                let norms = 2 * self.hidden + if a.qk_norm.is_some() { 2 * a.head_dim } else { 0 };
                let biases = if a.qkv_bias { a.qkv_width() } else { 0 }
                    + if a.output_bias { self.hidden } else { 0 }
                    + if layer.mlp.bias { 2 * layer.mlp.intermediate + self.hidden } else { 0 };
                heads + norms + biases + 3 * self.hidden * layer.mlp.intermediate
            })
            .sum();
        let tables = if self.tied { 1 } else { 2 };
        (layers + tables * self.vocab * self.hidden + self.hidden) as u64
    }
}
