//! Readers of what several families have in common.
//!
//! Owns the usual field names and their bounds; each family says its defaults.

use crate::config::Config;
use crate::error::Result;
use crate::rope::RopeSpec;
use crate::spec::{
    AttentionLayer, Ffn, Head, KvSource, LayerSpec, Mixer, MlpLayer, ModelSpec, NormSpec, Placement, bounds,
};

/// Sizes that every model has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Common {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Most positions.
    pub context: usize,
    /// Layers.
    pub layers: usize,
    /// The usual norm.
    pub norm: NormSpec,
}

impl Common {
    /// Reads them; sizes must be there, the epsilon of `rms_norm_eps` may be absent.
    pub(super) fn read(config: &Config<'_>, eps: f64) -> Result<Self> {
        Ok(Self {
            hidden: config.count("hidden_size", bounds::HIDDEN)?,
            vocab: config.count("vocab_size", bounds::VOCAB)?,
            layers: config.count("num_hidden_layers", bounds::LAYERS)?,
            context: config.count("max_position_embeddings", bounds::CONTEXT)?,
            norm: NormSpec::rms(config.positive_or("rms_norm_eps", eps)? as f32),
        })
    }
}

/// What a family's heads are where the configuration does not say.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HeadDefaults {
    /// Elements of a head; else `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Key and value heads; else as many as query heads.
    pub kv_heads: Option<usize>,
}

/// Plain attention under the usual names: scores over the root of the head size, rotated by the first rope, without
/// biases, norms or window.
pub(super) fn attention(config: &Config<'_>, hidden: usize, absent: HeadDefaults) -> Result<AttentionLayer> {
    let q_heads = config.count("num_attention_heads", bounds::HEADS)?;
    let kv_heads = config.opt_count("num_key_value_heads", bounds::HEADS)?;
    // `null` means the query heads, whatever the family.
    let kv_absent = absent.kv_heads.filter(|_| !config.has("num_key_value_heads"));
    let kv_heads = kv_heads.or(kv_absent).unwrap_or(q_heads);
    if !q_heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide `num_attention_heads` {q_heads}");
        return Err(config.error("num_key_value_heads", why));
    }
    let dim_absent = absent.head_dim.filter(|_| !config.has("head_dim"));
    let head_dim = match config.opt_count("head_dim", bounds::HEAD_DIM)?.or(dim_absent) {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
        None => {
            let why = format!("{q_heads} does not divide `hidden_size` {hidden}, and `head_dim` is absent");
            return Err(config.error("num_attention_heads", why));
        }
    };
    check_head_dim(config, "head_dim", head_dim)?;
    Ok(AttentionLayer {
        q_heads,
        kv_heads,
        head_dim,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        bidirectional: false,
        window: None,
        soft_cap: None,
        rope: Some(0),
        qk_norm: None,
        v_norm: None,
        qkv_bias: false,
        output_bias: false,
        sinks: false,
        gated: false,
        kv: KvSource::Own,
    })
}

/// A head's size is even, because pairs of its elements are rotated, and bounded.
pub(super) fn check_head_dim(config: &Config<'_>, field: &str, head_dim: usize) -> Result<()> {
    if !head_dim.is_multiple_of(2) || head_dim as u64 > bounds::HEAD_DIM {
        let why = format!("is {head_dim}, expected an even number of at most {}", bounds::HEAD_DIM);
        return Err(config.error(field, why));
    }
    Ok(())
}

/// Plain attention with biases of all four projections, if `attention_bias` says so.
pub(super) fn attention_with_biases(
    config: &Config<'_>,
    hidden: usize,
    absent: HeadDefaults,
) -> Result<AttentionLayer> {
    let bias = config.flag("attention_bias", false)?;
    Ok(AttentionLayer { qkv_bias: bias, output_bias: bias, ..attention(config, hidden, absent)? })
}

/// The usual gated block: `intermediate_size`, `hidden_act`, no biases.
pub(super) fn mlp(config: &Config<'_>) -> Result<MlpLayer> {
    Ok(MlpLayer {
        intermediate: config.count("intermediate_size", bounds::INTERMEDIATE)?,
        activation: config.activation("hidden_act")?,
        gated: true,
        bias: false,
    })
}

/// A layer with norms before its blocks.
pub(super) const fn layer(norm: NormSpec, mixer: Mixer, ffn: Ffn) -> LayerSpec {
    LayerSpec {
        placement: Placement::Before,
        norm,
        mixer,
        ffn,
        parallel: false,
        residual_scale: 1.0,
        output_scale: false,
    }
}

/// What a layer mixes tokens with, in the words of `layer_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `full_attention`.
    Full,
    /// `sliding_attention`.
    Sliding,
    /// `linear_attention`.
    Linear,
}

/// Each layer's kind: from `layer_types`, else by the family's rule. Only the `known` kinds may occur.
pub(super) fn layer_kinds(
    config: &Config<'_>,
    layers: usize,
    known: &[Kind],
    absent: impl Fn(usize) -> Kind,
) -> Result<Vec<Kind>> {
    let Some(types) = config.opt_texts("layer_types")? else { return Ok((0..layers).map(absent).collect()) };
    if types.len() != layers {
        let why = format!("has {} entries, `num_hidden_layers` is {layers}", types.len());
        return Err(config.error("layer_types", why));
    }
    let kind = |name: &&str| {
        let kind = match *name {
            "full_attention" => Some(Kind::Full),
            "sliding_attention" => Some(Kind::Sliding),
            "linear_attention" => Some(Kind::Linear),
            _ => None,
        };
        let unknown = || {
            let name: String = name.chars().take(40).collect();
            config.error("layer_types", format!("`{}` is not supported", name.escape_default()))
        };
        kind.filter(|k| known.contains(k)).ok_or_else(unknown)
    };
    types.iter().map(kind).collect()
}

/// `sliding_window`: what it says, `null` included; else the family's default.
pub(super) fn sliding_window(config: &Config<'_>, absent: Option<u32>) -> Result<Option<u32>> {
    let given = config.opt_count("sliding_window", bounds::CONTEXT)?.map(|w| w as u32);
    Ok(if config.has("sliding_window") { given } else { absent })
}

/// The window of each layer where kinds decide.
pub(super) fn windows(config: &Config<'_>, kinds: &[Kind], window: Option<u32>) -> Result<Vec<Option<u32>>> {
    let of = |kind: &Kind| match (kind, window) {
        (Kind::Sliding, None) => {
            Err(config.error("layer_types", "names `sliding_attention`, but no `sliding_window` is in force"))
        }
        (Kind::Sliding, window) => Ok(window),
        _ => Ok(None),
    };
    kinds.iter().map(of).collect()
}

/// How many experts a token has: the field, or the family's default; not more than there are.
pub(super) fn top_k(config: &Config<'_>, field: &str, experts: usize, absent: usize) -> Result<usize> {
    match config.count_or(field, bounds::EXPERTS, absent)? {
        n if n > experts => Err(config.error(field, format!("is {n}, expected 1 to {experts}"))),
        n => Ok(n),
    }
}

/// A decoder of these layers, with the usual head: logits, tied where `tie_word_embeddings` says so.
pub(super) fn decoder(
    config: &Config<'_>,
    common: &Common,
    layers: Vec<LayerSpec>,
    ropes: Vec<RopeSpec>,
    tied: bool,
) -> Result<ModelSpec> {
    Ok(ModelSpec {
        architecture: "",
        hidden: common.hidden,
        vocab: common.vocab,
        context: common.context,
        layers,
        ropes,
        embed_scale: 1.0,
        learned_positions: None,
        embed_norm: None,
        final_norm: Some(common.norm),
        head: Head::Logits { tied: config.flag("tie_word_embeddings", tied)?, scale: 1.0, soft_cap: None },
        dtype: config.dtype()?,
        bos: config.token_ids("bos_token_id", common.vocab)?.first().copied(),
        eos: config.token_ids("eos_token_id", common.vocab)?,
        ignored_fields: Vec::new(),
    })
}

/// Sets what multiplies the logits.
pub(super) fn scale_logits(spec: &mut ModelSpec, factor: f64) {
    if let Head::Logits { scale, .. } = &mut spec.head {
        *scale = factor as f32;
    }
}
