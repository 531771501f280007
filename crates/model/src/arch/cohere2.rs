//! Command R7B and A: both blocks beside each other under one norm, which subtracts the mean; positions only where there
//! is a window.

use super::rope::{RopeDefaults, rope};
use super::shared::{
    Common, HeadDefaults, Kind, attention_with_biases, decoder, layer, layer_kinds, mlp, scale_logits,
    sliding_window, windows,
};
use crate::backend::{NormKind, Pairing};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{AttentionLayer, Ffn, LayerSpec, Mixer, ModelSpec, NormSpec, bounds};

pub(super) fn cohere2(config: &Config<'_>) -> Result<ModelSpec> {
    let eps = config.positive_or("layer_norm_eps", 1e-5)? as f32;
    let norm = NormSpec { kind: NormKind::Layer, eps, offset: 0.0, bias: false };
    let c = Common { norm, ..Common::read(config, 1e-5)? };
    let a = attention_with_biases(config, c.hidden, HeadDefaults::default())?;
    let pattern = config.count_or("sliding_window_pattern", bounds::LAYERS, 4)?;
    let absent = |i: usize| if (i + 1).is_multiple_of(pattern) { Kind::Full } else { Kind::Sliding };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let windows = windows(config, &kinds, sliding_window(config, Some(4_096))?)?;
    let adjacent = RopeDefaults { pairing: Pairing::Adjacent, ..RopeDefaults::USUAL };
    let rope = rope(config, a.head_dim, c.context, adjacent)?;
    let ffn = Ffn::Dense(mlp(config)?);
    let layer = |window: Option<u32>| {
        let a = AttentionLayer { rope: window.map(|_| 0), window, ..a.clone() };
        LayerSpec { parallel: true, ..layer(c.norm, Mixer::Attention(a), ffn.clone()) }
    };
    let layers = windows.into_iter().map(layer).collect();
    let mut spec = decoder(config, &c, layers, vec![rope], true)?;
    scale_logits(&mut spec, config.positive_or("logit_scale", 0.0625)?);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{attention, is_tied, refusal, spec, windows};
    use super::*;
    use crate::spec::Head;
    use crate::weights::{Part, layer_parts};

    const NAME: &str = "Cohere2ForCausalLM";

    #[test]
    fn positions_where_there_is_a_window() {
        let s = spec(NAME, &json!({"sliding_window": 7}));
        assert_eq!(windows(&s), [Some(7), Some(7), Some(7), None]);
        assert!(attention(&s, 0).rope.is_some() && attention(&s, 3).rope.is_none());
        assert_eq!(s.ropes[0].pairing, Pairing::Adjacent);
        assert!(matches!(s.head, Head::Logits { scale: 0.0625, .. }) && is_tied(&s));
        let parts = layer_parts(&s, 0);
        assert!(parts.contains(&Part::AttentionNorm) && !parts.contains(&Part::MlpNorm), "one norm");
        assert!(!parts.contains(&Part::AttentionNormBias));
        let s = spec(NAME, &json!({"sliding_window_pattern": 2, "logit_scale": 0.25}));
        assert_eq!(windows(&s), [Some(4_096), None, Some(4_096), None]);
        assert!(refusal(NAME, &json!({"use_qk_norm": true})).contains("`use_qk_norm`"));
        assert!(refusal(NAME, &json!({"layer_norm_eps": -1})).contains("`layer_norm_eps`"));
    }
}
