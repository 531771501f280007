//! Gemma 2 and 3: norms around both blocks whose weights are added to 1, soft caps, windows by turns, two rotations.
//!
//! The multimodal wrappers' text parts are the same models. Variants whose text tokens see later ones are refused.

use super::rope::{RopeDefaults, rope, rope_of_kind};
use super::shared::{Common, Kind, check_head_dim, layer, layer_kinds, sliding_window, windows};
use crate::backend::{Activation, Pooling};
use crate::config::Config;
use crate::error::Result;
use crate::rope::RopeSpec;
use crate::spec::{
    AttentionLayer, Ffn, Head, KvSource, LayerSpec, Mixer, MlpLayer, ModelSpec, NormSpec, Placement,
    PoolHead, PoolOutput, QkNorm, bounds,
};

/// Sizes where a configuration does not say: published text parts of wrappers leave many out.
#[derive(Clone, Copy, Debug)]
pub(super) struct GemmaDefaults {
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Most positions.
    pub context: usize,
    /// Layers.
    pub layers: usize,
    /// Window.
    pub window: u32,
}

const GEMMA2: GemmaDefaults = GemmaDefaults { vocab: 256_000, context: 8_192, layers: 26, window: 4_096 };
const GEMMA3: GemmaDefaults = GemmaDefaults { vocab: 262_208, context: 131_072, layers: 26, window: 4_096 };

/// The sizes of all generations.
pub(super) fn common(config: &Config<'_>, absent: GemmaDefaults) -> Result<Common> {
    let eps = config.positive_or("rms_norm_eps", 1e-6)?;
    Ok(Common {
        hidden: config.count_or("hidden_size", bounds::HIDDEN, 2_304)?,
        vocab: config.count_or("vocab_size", bounds::VOCAB, absent.vocab)?,
        context: config.count_or("max_position_embeddings", bounds::CONTEXT, absent.context)?,
        layers: config.count_or("num_hidden_layers", bounds::LAYERS, absent.layers)?,
        norm: NormSpec::rms(eps as f32),
    })
}

/// Heads under the usual names.
pub(super) fn attention(config: &Config<'_>) -> Result<AttentionLayer> {
    let q_heads = config.count_or("num_attention_heads", bounds::HEADS, 8)?;
    let kv_heads = config.count_or("num_key_value_heads", bounds::HEADS, 4)?;
    check_kv_heads(config, "num_key_value_heads", kv_heads, q_heads)?;
    let head_dim = config.count_or("head_dim", bounds::HEAD_DIM, 256)?;
    check_head_dim(config, "head_dim", head_dim)?;
    let bias = config.flag("attention_bias", false)?;
    Ok(AttentionLayer {
        q_heads,
        kv_heads,
        head_dim,
        scale: 1.0,
        bidirectional: false,
        window: None,
        soft_cap: None,
        rope: Some(0),
        qk_norm: None,
        v_norm: None,
        qkv_bias: bias,
        output_bias: bias,
        sinks: false,
        gated: false,
        kv: KvSource::Own,
    })
}

pub(super) fn check_kv_heads(
    config: &Config<'_>,
    field: &str,
    kv_heads: usize,
    q_heads: usize,
) -> Result<()> {
    if !q_heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide `num_attention_heads` {q_heads}");
        return Err(config.error(field, why));
    }
    Ok(())
}

pub(super) fn mlp(config: &Config<'_>) -> Result<MlpLayer> {
    Ok(MlpLayer {
        intermediate: config.count_or("intermediate_size", bounds::INTERMEDIATE, 9_216)?,
        activation: match config.get("hidden_activation") {
            // `hidden_act` is written too, and not used by transformers.
            None => Activation::GeluTanh,
            Some(_) => config.activation("hidden_activation")?,
        },
        gated: true,
        bias: false,
    })
}

/// Text whose tokens see later ones needs other windows, which no published model of these architectures has.
fn refuse_bidirectional(config: &Config<'_>) -> Result<()> {
    if config.flag("use_bidirectional_attention", false)? {
        let why = "is true; text tokens that see later ones are not supported";
        return Err(config.error("use_bidirectional_attention", why));
    }
    Ok(())
}

/// Scores, soft-capped where the configuration says so.
fn scores(config: &Config<'_>, a: &AttentionLayer) -> Result<AttentionLayer> {
    let scalar = config.positive_or("query_pre_attn_scalar", 256.0)?;
    let soft_cap = config.opt_positive("attn_logit_softcapping")?.map(|cap| cap as f32);
    Ok(AttentionLayer { scale: (1.0 / scalar.sqrt()) as f32, soft_cap, ..a.clone() })
}

/// A decoder with embeddings scaled by the root of the width, and capped logits.
pub(super) fn decoder(
    config: &Config<'_>,
    common: &Common,
    layers: Vec<LayerSpec>,
    ropes: Vec<RopeSpec>,
    soft_cap: Option<f64>,
) -> Result<ModelSpec> {
    let mut spec = super::shared::decoder(config, common, layers, ropes, true)?;
    spec.embed_scale = (common.hidden as f64).sqrt() as f32;
    if let Head::Logits { soft_cap: cap, .. } = &mut spec.head {
        *cap = soft_cap.map(|cap| cap as f32);
    }
    Ok(spec)
}

/// Where a field of Gemma 2 is written as `null`, it has no cap; where it is absent, this one.
fn cap_or(config: &Config<'_>, field: &str, absent: f64) -> Result<Option<f64>> {
    let given = config.opt_positive(field)?;
    Ok(if config.has(field) { given } else { Some(absent) })
}

pub(super) fn gemma2(config: &Config<'_>) -> Result<ModelSpec> {
    let c = common(config, GEMMA2)?;
    let norm = NormSpec { offset: 1.0, ..c.norm };
    refuse_bidirectional(config)?;
    let a = scores(config, &attention(config)?)?;
    let cap = cap_or(config, "attn_logit_softcapping", 50.0)?;
    let a = AttentionLayer { soft_cap: cap.map(|cap| cap as f32), ..a };
    let absent = |i: usize| if i.is_multiple_of(2) { Kind::Sliding } else { Kind::Full };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let windows = windows(config, &kinds, sliding_window(config, Some(GEMMA2.window))?)?;
    let rope = rope(config, a.head_dim, c.context, RopeDefaults::USUAL)?;
    let ffn = Ffn::Dense(mlp(config)?);
    let of = |window| {
        let mixer = Mixer::Attention(AttentionLayer { window, ..a.clone() });
        LayerSpec { placement: Placement::Around, ..layer(norm, mixer, ffn.clone()) }
    };
    let layers = windows.into_iter().map(of).collect();
    let cap = cap_or(config, "final_logit_softcapping", 30.0)?;
    decoder(config, &Common { norm, ..c }, layers, vec![rope], cap)
}

/// The model without a head, as embedder: the last token's row.
pub(super) fn gemma2_embedder(config: &Config<'_>) -> Result<ModelSpec> {
    let pool = PoolHead { pooling: Pooling::Last, output: PoolOutput::Embedding };
    Ok(ModelSpec { head: Head::Pool(pool), ..gemma2(config)? })
}

pub(super) fn gemma3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = common(config, GEMMA3)?;
    let norm = NormSpec { offset: 1.0, ..c.norm };
    refuse_bidirectional(config)?;
    let a = scores(config, &attention(config)?)?;
    let a = AttentionLayer { qk_norm: Some(QkNorm { norm, across_heads: false }), ..a };
    let pattern = config.count_or("sliding_window_pattern", bounds::LAYERS, 6)?;
    let absent = |i: usize| if (i + 1).is_multiple_of(pattern) { Kind::Full } else { Kind::Sliding };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let windows = windows(config, &kinds, sliding_window(config, Some(GEMMA3.window))?)?;
    let ropes = gemma3_ropes(config, a.head_dim, c.context)?;
    let ffn = Ffn::Dense(mlp(config)?);
    let of = |window: Option<u32>| {
        let rope = Some(usize::from(window.is_some()));
        let mixer = Mixer::Attention(AttentionLayer { window, rope, ..a.clone() });
        LayerSpec { placement: Placement::Around, ..layer(norm, mixer, ffn.clone()) }
    };
    let layers = windows.into_iter().map(of).collect();
    let cap = config.opt_positive("final_logit_softcapping")?;
    decoder(config, &Common { norm, ..c }, layers, ropes, cap)
}

/// The rotation of full layers, and that of windowed ones, whose base has a field of its own in the old spelling.
fn gemma3_ropes(config: &Config<'_>, head_dim: usize, context: usize) -> Result<Vec<RopeSpec>> {
    let absent = |theta| RopeDefaults { theta, ..RopeDefaults::USUAL };
    let local = config.positive_or("rope_local_base_freq", 10_000.0)?;
    if config.get("rope_parameters").is_none() {
        let full = rope(config, head_dim, context, absent(1_000_000.0))?;
        return Ok(vec![full, RopeSpec::plain(local, head_dim)]);
    }
    Ok(vec![
        rope_of_kind(config, "full_attention", head_dim, context, absent(1_000_000.0))?,
        rope_of_kind(config, "sliding_attention", head_dim, context, absent(local))?,
    ])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::super::spec_from_config;
    use super::*;
    use crate::rope::RopeScaling;

    fn spec(name: &str, fields: &Value) -> Result<ModelSpec> {
        let mut config = json!({"architectures": [name], "hidden_size": 64, "num_hidden_layers": 7});
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config("config.json", config.as_object().unwrap())
    }

    fn heads(layer: &LayerSpec) -> &AttentionLayer {
        match &layer.mixer {
            Mixer::Attention(a) => a,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn gemma2_has_the_values_of_transformers() {
        let s = spec("Gemma2ForCausalLM", &json!({})).unwrap();
        assert_eq!((s.vocab, s.context, s.embed_scale), (256_000, 8_192, 8.0));
        assert_eq!(s.head, Head::Logits { tied: true, scale: 1.0, soft_cap: Some(30.0) });
        let a = heads(&s.layers[0]);
        assert_eq!((a.q_heads, a.kv_heads, a.head_dim, a.scale), (8, 4, 256, 1.0 / 16.0));
        assert_eq!((a.window, heads(&s.layers[1]).window, a.soft_cap), (Some(4_096), None, Some(50.0)));
        assert_eq!((s.layers[0].placement, s.layers[0].norm.offset), (Placement::Around, 1.0));
        assert_eq!(s.final_norm.unwrap().offset, 1.0);
        let free = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
        let s = spec("Gemma2ForCausalLM", &free).unwrap();
        assert_eq!(
            (heads(&s.layers[0]).soft_cap, s.head),
            (None, Head::Logits { tied: true, scale: 1.0, soft_cap: None })
        );
        let s = spec("Gemma2Model", &json!({})).unwrap();
        assert_eq!(s.head, Head::Pool(PoolHead { pooling: Pooling::Last, output: PoolOutput::Embedding }));
    }

    #[test]
    fn gemma3_has_the_values_of_transformers() {
        let text = json!({"text_config": {"hidden_size": 64, "num_hidden_layers": 7, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}});
        let s = spec("Gemma3ForConditionalGeneration", &text).unwrap();
        assert_eq!((s.vocab, s.context), (262_208, 131_072));
        let windows: Vec<_> = s.layers.iter().map(|l| heads(l).window.is_some()).collect();
        assert_eq!(windows, [true, true, true, true, true, false, true]);
        assert_eq!((heads(&s.layers[0]).rope, heads(&s.layers[5]).rope), (Some(1), Some(0)));
        assert_eq!((s.ropes[0].theta, s.ropes[1].theta), (1e6, 1e4));
        assert_eq!(s.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(s.ropes[1].scaling, RopeScaling::None);
        assert_eq!(heads(&s.layers[0]).qk_norm.unwrap().norm.offset, 1.0);
        let new = json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3}}, "sliding_window_pattern": 2});
        let s = spec("Gemma3ForCausalLM", &new).unwrap();
        assert_eq!((s.ropes[0].theta, s.ropes[1].theta), (5e5, 7e3));
        assert_eq!(heads(&s.layers[1]).window, None);
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        for name in ["Gemma2ForCausalLM", "Gemma3ForCausalLM"] {
            let table = [
                (json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention`"),
                (json!({"num_key_value_heads": 3}), "`num_key_value_heads`"),
                (json!({"head_dim": 7}), "`head_dim`"),
                (json!({"hidden_activation": "relu"}), "`hidden_activation`"),
            ];
            for (fields, words) in table {
                let e = spec(name, &fields).unwrap_err();
                assert!(e.to_string().contains(words), "{name} {fields}: {e}");
            }
        }
    }
}
