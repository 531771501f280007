//! XLM-RoBERTa: an encoder with learned positions, as embedder and as classifier of pairs.

use crate::backend::{Activation, NormKind, Pooling};
use crate::config::Config;
use crate::error::Result;
use crate::names::{Naming, Stored};
use crate::spec::{
    AttentionLayer, Ffn, Head, KvSource, LayerSpec, LearnedPositions, Mixer, MlpLayer, ModelSpec, NormSpec,
    Placement, PoolHead, PoolOutput, bounds,
};
use crate::weights::{MlpPart, Part, TensorId, shape};

/// Token types that a configuration may have; the models use the first alone.
const MAX_TOKEN_TYPES: u64 = 1_024;
/// Labels of a classifier.
const MAX_LABELS: usize = 4_096;

/// Names of the family, with and without the base model's prefix.
pub(super) const NAMING: Naming =
    Naming { prefixes: &["roberta.", ""], layers: "encoder.layer.", model: model_names, layer: layer_names };

fn model_names(spec: &ModelSpec, id: TensorId) -> Vec<Stored> {
    let (name, top) = match id {
        TensorId::Embedding => ("embeddings.word_embeddings.weight", false),
        TensorId::Positions => ("embeddings.position_embeddings.weight", false),
        TensorId::TokenTypes => ("embeddings.token_type_embeddings.weight", false),
        TensorId::EmbedNorm => ("embeddings.LayerNorm.weight", false),
        TensorId::EmbedNormBias => ("embeddings.LayerNorm.bias", false),
        TensorId::Dense => ("classifier.dense.weight", true),
        TensorId::DenseBias => ("classifier.dense.bias", true),
        TensorId::Labels => ("classifier.out_proj.weight", true),
        TensorId::LabelsBias => ("classifier.out_proj.bias", true),
        _ => return Vec::new(),
    };
    vec![Stored { top, ..Stored::whole(name, shape(spec, id)) }]
}

fn layer_names(spec: &ModelSpec, layer: usize, part: Part) -> Vec<Stored> {
    let name = match part {
        Part::Q => "attention.self.query.weight",
        Part::QBias => "attention.self.query.bias",
        Part::K => "attention.self.key.weight",
        Part::KBias => "attention.self.key.bias",
        Part::V => "attention.self.value.weight",
        Part::VBias => "attention.self.value.bias",
        Part::O => "attention.output.dense.weight",
        Part::OBias => "attention.output.dense.bias",
        Part::AttentionPostNorm => "attention.output.LayerNorm.weight",
        Part::AttentionPostNormBias => "attention.output.LayerNorm.bias",
        Part::Mlp(MlpPart::Up) => "intermediate.dense.weight",
        Part::Mlp(MlpPart::UpBias) => "intermediate.dense.bias",
        Part::Mlp(MlpPart::Down) => "output.dense.weight",
        Part::Mlp(MlpPart::DownBias) => "output.dense.bias",
        Part::MlpPostNorm => "output.LayerNorm.weight",
        Part::MlpPostNormBias => "output.LayerNorm.bias",
        _ => return Vec::new(),
    };
    vec![Stored::whole(name, shape(spec, TensorId::Layer(layer, part)))]
}

/// The encoder as embedder: the first token's row.
pub(super) fn xlm_roberta(config: &Config<'_>) -> Result<ModelSpec> {
    encoder(config, PoolOutput::Embedding)
}

/// With a classifier on the first token's row.
pub(super) fn xlm_roberta_classifier(config: &Config<'_>) -> Result<ModelSpec> {
    let named = config.object("id2label")?.map(|labels| labels.unasked().len());
    let labels = match (config.opt_count("num_labels", MAX_LABELS as u64)?, named) {
        (Some(a), Some(b)) if a != b => {
            return Err(config.error("num_labels", format!("is {a}, but `id2label` has {b}")));
        }
        (Some(n), _) | (None, Some(n)) => n,
        // transformers' default.
        (None, None) => 2,
    };
    if labels == 0 || labels > MAX_LABELS {
        return Err(config.error("id2label", format!("has {labels} labels, expected 1 to {MAX_LABELS}")));
    }
    encoder(config, PoolOutput::Classifier { labels })
}

fn encoder(config: &Config<'_>, output: PoolOutput) -> Result<ModelSpec> {
    let hidden = config.count("hidden_size", bounds::HIDDEN)?;
    let vocab = config.count("vocab_size", bounds::VOCAB)?;
    let rows = config.count("max_position_embeddings", bounds::CONTEXT)?;
    // Positions begin after that of padding.
    let offset = config.opt_whole("pad_token_id")?.unwrap_or(1).saturating_add(1);
    if offset >= rows {
        let why = format!("is {rows}, which leaves no position after `pad_token_id` {}", offset - 1);
        return Err(config.error("max_position_embeddings", why));
    }
    if let Some(kind) = config.opt_text("position_embedding_type")?.filter(|kind| *kind != "absolute") {
        let why = format!("`{}` is not supported; supported: absolute", kind.escape_default());
        return Err(config.error("position_embedding_type", why));
    }
    if config.flag("is_decoder", false)? {
        return Err(config.error("is_decoder", "is true, only encoders are supported"));
    }
    let eps = config.positive_or("layer_norm_eps", 1e-12)? as f32;
    let norm = NormSpec { kind: NormKind::Layer, eps, offset: 0.0, bias: true };
    let activation = match config.get("hidden_act") {
        None => Activation::Gelu,
        Some(_) => config.activation("hidden_act")?,
    };
    let intermediate = config.count("intermediate_size", bounds::INTERMEDIATE)?;
    let layer = LayerSpec {
        placement: Placement::Outside,
        norm,
        mixer: Mixer::Attention(attention(config, hidden)?),
        ffn: Ffn::Dense(MlpLayer { intermediate, activation, gated: false, bias: true }),
        parallel: false,
        residual_scale: 1.0,
        output_scale: false,
    };
    let token_types = match config.opt_whole("type_vocab_size")? {
        Some(0) => 0,
        Some(_) => config.count("type_vocab_size", MAX_TOKEN_TYPES)?,
        None => 2,
    };
    Ok(ModelSpec {
        architecture: "",
        hidden,
        vocab,
        context: rows - offset,
        layers: vec![layer; config.count("num_hidden_layers", bounds::LAYERS)?],
        ropes: Vec::new(),
        embed_scale: 1.0,
        learned_positions: Some(LearnedPositions { rows, offset, token_types }),
        embed_norm: Some(norm),
        final_norm: None,
        head: Head::Pool(PoolHead { pooling: Pooling::First, output }),
        dtype: config.dtype()?,
        bos: config.token_ids("bos_token_id", vocab)?.first().copied(),
        eos: config.token_ids("eos_token_id", vocab)?,
        ignored_fields: Vec::new(),
    })
}

fn attention(config: &Config<'_>, hidden: usize) -> Result<AttentionLayer> {
    let heads = config.count("num_attention_heads", bounds::HEADS)?;
    if !hidden.is_multiple_of(heads) || (hidden / heads) as u64 > bounds::HEAD_DIM {
        let why =
            format!("is {heads}, which does not divide `hidden_size` {hidden} into heads of a usual size");
        return Err(config.error("num_attention_heads", why));
    }
    let head_dim = hidden / heads;
    Ok(AttentionLayer {
        q_heads: heads,
        kv_heads: heads,
        head_dim,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        bidirectional: true,
        window: None,
        soft_cap: None,
        rope: None,
        qk_norm: None,
        v_norm: None,
        qkv_bias: true,
        output_bias: true,
        sinks: false,
        gated: false,
        kv: KvSource::Own,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::spec_from_config;
    use super::*;

    fn spec(name: &str, fields: &serde_json::Value) -> Result<ModelSpec> {
        let mut config = json!({
            "architectures": [name], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 514,
        });
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        spec_from_config("config.json", config.as_object().unwrap())
    }

    #[test]
    fn absent_fields_have_the_values_of_transformers() {
        let s = spec("XLMRobertaModel", &json!({})).unwrap();
        assert_eq!(s.learned_positions, Some(LearnedPositions { rows: 514, offset: 2, token_types: 2 }));
        assert_eq!((s.context, s.is_bidirectional()), (512, true));
        assert_eq!(s.layers[0].norm.eps, 1e-12);
        let Ffn::Dense(mlp) = &s.layers[0].ffn else { panic!("experts") };
        assert_eq!((mlp.activation, mlp.gated, mlp.bias), (Activation::Gelu, false, true));
        assert_eq!(s.head, Head::Pool(PoolHead { pooling: Pooling::First, output: PoolOutput::Embedding }));
        let classifier = "XLMRobertaForSequenceClassification";
        let labels = |fields| match spec(classifier, &fields).unwrap().head {
            Head::Pool(PoolHead { output: PoolOutput::Classifier { labels }, .. }) => labels,
            other => panic!("{other:?}"),
        };
        assert_eq!(labels(json!({})), 2);
        assert_eq!(labels(json!({"id2label": {"0": "LABEL_0"}})), 1);
        assert_eq!(labels(json!({"num_labels": 3})), 3);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let table = [
            (json!({"pad_token_id": 600}), "no position after `pad_token_id` 600"),
            (json!({"position_embedding_type": "relative_key"}), "`position_embedding_type`"),
            (json!({"is_decoder": true}), "`is_decoder`"),
            (json!({"num_attention_heads": 5}), "`num_attention_heads`"),
            (json!({"num_labels": 2, "id2label": {"0": "a"}}), "`id2label` has 1"),
            (json!({"id2label": {}}), "has 0 labels"),
            (json!({"type_vocab_size": 5000}), "`type_vocab_size`"),
        ];
        for (fields, words) in table {
            let e = spec("XLMRobertaForSequenceClassification", &fields).unwrap_err();
            assert!(e.to_string().contains(words), "{fields}: {e}");
        }
        assert_eq!(
            spec("XLMRobertaModel", &json!({"type_vocab_size": 0}))
                .unwrap()
                .learned_positions
                .unwrap()
                .token_types,
            0
        );
    }
}
