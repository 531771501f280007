//! GGUF metadata to a [`ModelSpec`].
//!
//! Owns the meaning of keys. What the metadata leaves open (biases, a tied head) is read off the tensor table.

use super::parse::{GgufHeader, Value};
use super::{Dialect, architecture, name_of};
use crate::backend::Activation;
use crate::error::{ModelError, Result};
use crate::rope::{RopeScaling, RopeSpec, YarnSpec};
use crate::spec::{
    AttentionLayer, Ffn, Head, KvSource, LayerSpec, Mixer, MlpLayer, ModelSpec, NormSpec, Placement, QkNorm,
    bounds,
};
use crate::weights::{MlpPart, Part, TensorId};

/// Access to the keys of one architecture: `{arch}.{key}`.
struct Keys<'a> {
    file: &'a str,
    arch: &'a str,
    header: &'a GgufHeader,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn error(&self, key: &str, why: impl Into<String>) -> ModelError {
        ModelError::field(self.file, self.name(key), why)
    }

    fn opt_count(&self, key: &str, max: u64) -> Result<Option<usize>> {
        match self.header.whole(self.file, &self.name(key))? {
            None => Ok(None),
            Some(n) if (1..=max).contains(&n) => Ok(Some(n as usize)),
            Some(n) => Err(self.error(key, format!("is {n}, expected 1 to {max}"))),
        }
    }

    fn count(&self, key: &str, max: u64) -> Result<usize> {
        self.opt_count(key, max)?.ok_or_else(|| self.error(key, "is missing"))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.header.number(self.file, &self.name(key))? {
            Some(n) if n <= 0.0 => Err(self.error(key, format!("is {n}, expected more than 0"))),
            n => Ok(n),
        }
    }

    fn has(&self, id: TensorId) -> bool {
        name_of(id).is_some_and(|name| self.header.tensors.contains_key(&name))
    }

    fn has_part(&self, part: Part) -> bool {
        self.has(TensorId::Layer(0, part))
    }
}

/// Derives the specification. `divisors` is the content of `rope_freqs.weight`, if the file has it.
///
/// # Errors
/// Unknown architecture; a key that is missing, of the wrong type, out of bounds, or contradicts another.
pub fn spec_from_gguf(file: &str, header: &GgufHeader, divisors: Option<Vec<f32>>) -> Result<ModelSpec> {
    let (name, dialect) = architecture(file, header)?;
    let keys = Keys { file, arch: dialect.name, header };
    refuse_foreign(&keys)?;
    let hidden = keys.count("embedding_length", bounds::HIDDEN)?;
    let layers = keys.count("block_count", bounds::LAYERS)?;
    let context = keys.count("context_length", bounds::CONTEXT)?;
    let vocab = vocab(&keys, hidden)?;
    let eps = keys.positive("attention.layer_norm_rms_epsilon")?;
    let eps = eps.ok_or_else(|| keys.error("attention.layer_norm_rms_epsilon", "is missing"))?;
    let norm = NormSpec::rms(eps as f32);
    let attention = attention(&keys, dialect, hidden, norm)?;
    let mlp = MlpLayer {
        intermediate: keys.count("feed_forward_length", bounds::INTERMEDIATE)?,
        activation: Activation::Silu,
        gated: true,
        bias: keys.has_part(Part::Mlp(MlpPart::GateBias)),
    };
    let rope = rope(&keys, attention.head_dim, context, divisors)?;
    let layer = LayerSpec {
        placement: Placement::Before,
        norm,
        mixer: Mixer::Attention(attention),
        ffn: Ffn::Dense(mlp),
        parallel: false,
        residual_scale: 1.0,
        output_scale: false,
    };
    let ids = |key: &str| -> Result<Option<u32>> {
        let name = format!("tokenizer.ggml.{key}");
        match header.whole(file, &name)? {
            Some(id) if id >= vocab as u64 => {
                Err(ModelError::field(file, name, format!("is {id}, the vocabulary has {vocab} entries")))
            }
            id => Ok(id.map(|id| id as u32)),
        }
    };
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos.extend(ids(key)?.filter(|id| !eos.contains(id)));
    }
    Ok(ModelSpec {
        architecture: name,
        hidden,
        vocab,
        context,
        layers: vec![layer; layers],
        ropes: vec![rope],
        embed_scale: 1.0,
        learned_positions: None,
        embed_norm: None,
        final_norm: Some(norm),
        head: Head::Logits { tied: !keys.has(TensorId::Head), scale: 1.0, soft_cap: None },
        dtype: None,
        bos: ids("bos_token_id")?,
        eos,
        ignored_fields: Vec::new(),
    })
}

/// Keys that change the computation in a way that is not built, and parts of split files.
fn refuse_foreign(keys: &Keys<'_>) -> Result<()> {
    if let Some(n) = keys.header.whole(keys.file, "split.count")?
        && n > 1
    {
        let why = format!("the file is one part of {n}; split files are not supported, merge them first");
        return Err(ModelError::field(keys.file, "split.count", why));
    }
    for key in ["expert_count", "attention.kv_lora_rank"] {
        if let Some(n) = keys.header.whole(keys.file, &keys.name(key))?
            && n > 0
        {
            return Err(keys.error(key, format!("is {n}, which {} does not support", keys.arch)));
        }
    }
    for key in ["logit_scale", "attn_logit_softcapping", "final_logit_softcapping", "residual_scale"] {
        if let Some(n) = keys.header.number(keys.file, &keys.name(key))?
            && n != 0.0
        {
            return Err(keys.error(key, format!("is {n}, which {} does not support", keys.arch)));
        }
    }
    Ok(())
}

/// Rows of the embedding table, which the vocabulary may not exceed.
fn vocab(keys: &Keys<'_>, hidden: usize) -> Result<usize> {
    let (file, name) = (keys.file, "token_embd.weight".to_owned());
    let table = keys.header.tensors.get(&name);
    let table =
        table.ok_or_else(|| ModelError::MissingTensor { file: file.to_owned(), tensor: name.clone() })?;
    let [rows, _] = table.shape[..] else {
        let (expected, got) = (vec![0, hidden], table.shape.clone());
        return Err(ModelError::WrongShape { file: file.to_owned(), tensor: name, expected, got });
    };
    if rows as u64 > bounds::VOCAB {
        let why = format!("has {rows} rows, at most {}", bounds::VOCAB);
        return Err(ModelError::corrupt(file, format!("tensor `{name}`"), why));
    }
    if let Some(said) = keys.opt_count("vocab_size", bounds::VOCAB)?
        && said != rows
    {
        return Err(keys.error("vocab_size", format!("is {said}, but `{name}` has {rows} rows")));
    }
    if let Some(Value::Texts(tokens)) = keys.header.keys.get("tokenizer.ggml.tokens")
        && tokens.len() > rows
    {
        let why = format!("has {} entries, but `{name}` has {rows} rows", tokens.len());
        return Err(ModelError::field(file, "tokenizer.ggml.tokens", why));
    }
    Ok(rows)
}

fn attention(keys: &Keys<'_>, dialect: Dialect, hidden: usize, norm: NormSpec) -> Result<AttentionLayer> {
    let q_heads = keys.count("attention.head_count", bounds::HEADS)?;
    let kv_heads = keys.opt_count("attention.head_count_kv", bounds::HEADS)?.unwrap_or(q_heads);
    if !q_heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide `attention.head_count` {q_heads}");
        return Err(keys.error("attention.head_count_kv", why));
    }
    let head_dim = match keys.opt_count("attention.key_length", bounds::HEAD_DIM)? {
        Some(n) => n,
        None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
        None => {
            let why = format!("{q_heads} does not divide `embedding_length` {hidden}");
            return Err(keys.error("attention.head_count", why));
        }
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(n) = keys.opt_count(key, bounds::HEAD_DIM)?
            && n != head_dim
        {
            return Err(keys.error(key, format!("is {n}, expected the head size {head_dim}")));
        }
    }
    if !head_dim.is_multiple_of(2) || head_dim as u64 > bounds::HEAD_DIM {
        let why = format!("is {head_dim}, expected an even number of at most {}", bounds::HEAD_DIM);
        return Err(keys.error("attention.key_length", why));
    }
    let window = keys.header.whole(keys.file, &keys.name("attention.sliding_window"))?.filter(|&n| n > 0);
    let window = window.map(|n| n.min(bounds::CONTEXT) as u32);
    Ok(AttentionLayer {
        q_heads,
        kv_heads,
        head_dim,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        bidirectional: false,
        window,
        soft_cap: None,
        rope: Some(0),
        qk_norm: dialect.qk_norm.then_some(QkNorm { norm, across_heads: false }),
        v_norm: None,
        qkv_bias: dialect.qkv_bias || keys.has_part(Part::QBias),
        output_bias: keys.has_part(Part::OBias),
        sinks: false,
        gated: false,
        kv: KvSource::Own,
    })
}

fn rope(keys: &Keys<'_>, head_dim: usize, context: usize, divisors: Option<Vec<f32>>) -> Result<RopeSpec> {
    let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    if theta <= 1.0 {
        return Err(keys.error("rope.freq_base", format!("is {theta}, expected more than 1")));
    }
    let kind = keys.header.text(keys.file, &keys.name("rope.scaling.type"))?.unwrap_or("none");
    let factor = || match keys.positive("rope.scaling.factor")? {
        None => Err(keys.error("rope.scaling.factor", "is missing")),
        Some(f) if f < 1.0 => Err(keys.error("rope.scaling.factor", format!("is {f}, expected at least 1"))),
        Some(f) => Ok(f),
    };
    let scaling = match (kind, divisors) {
        ("none", None) => RopeScaling::None,
        ("none", Some(d)) if d.len() == head_dim / 2 => RopeScaling::Divisors(d),
        ("none", Some(d)) => {
            let (file, tensor) = (keys.file.to_owned(), super::ROPE_FREQS.to_owned());
            let (expected, got) = (vec![head_dim / 2], vec![d.len()]);
            return Err(ModelError::WrongShape { file, tensor, expected, got });
        }
        (_, Some(_)) => {
            let why =
                format!("is `{}`, but the file also has `{}`", kind.escape_default(), super::ROPE_FREQS);
            return Err(keys.error("rope.scaling.type", why));
        }
        ("linear", None) => RopeScaling::Linear { factor: factor()? },
        ("yarn", None) => {
            let original = keys.opt_count("rope.scaling.original_context_length", bounds::CONTEXT)?;
            let factor = factor()?;
            let amplitude = keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
            RopeScaling::Yarn(YarnSpec {
                factor,
                original_context: original.unwrap_or(context) as f64,
                beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: amplitude * YarnSpec::default_attention_factor(factor, None, None),
                truncate: true,
            })
        }
        (other, None) => {
            let why = format!("`{}` is not supported; supported: none, linear, yarn", other.escape_default());
            return Err(keys.error("rope.scaling.type", why));
        }
    };
    Ok(RopeSpec { scaling, ..RopeSpec::plain(theta, head_dim) })
}
