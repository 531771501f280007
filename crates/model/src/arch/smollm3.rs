//! SmolLM 3: Llama with layers that have no positions.

use super::rope::{RopeDefaults, rope};
use super::shared::{
    Common, HeadDefaults, Kind, attention_with_biases, decoder, layer, layer_kinds, mlp, sliding_window,
    windows,
};
use crate::config::Config;
use crate::error::Result;
use crate::spec::{AttentionLayer, Ffn, Mixer, MlpLayer, ModelSpec, bounds};

pub(super) fn smollm3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-6)?;
    let heads = HeadDefaults { kv_heads: Some(4), head_dim: None };
    let a = attention_with_biases(config, c.hidden, heads)?;
    let rotates = rotates(config, c.layers)?;
    let used = config.flag("use_sliding_window", false)?;
    let window = sliding_window(config, None)?.filter(|_| used);
    let absent = |i: usize| if window.is_some() && !rotates[i] { Kind::Sliding } else { Kind::Full };
    let kinds = layer_kinds(config, c.layers, &[Kind::Full, Kind::Sliding], absent)?;
    let windows = windows(config, &kinds, window)?;
    let rope = rope(config, a.head_dim, c.context, RopeDefaults { theta: 2e6, ..RopeDefaults::USUAL })?;
    let ffn = Ffn::Dense(MlpLayer { bias: config.flag("mlp_bias", false)?, ..mlp(config)? });
    let layer = |(rotates, window): (bool, Option<u32>)| {
        let a = AttentionLayer { rope: rotates.then_some(0), window, ..a.clone() };
        layer(c.norm, Mixer::Attention(a), ffn.clone())
    };
    let layers = rotates.into_iter().zip(windows).map(layer).collect();
    decoder(config, &c, layers, vec![rope], true)
}

/// Which layers have positions: `no_rope_layers` has 1 for those that do; else each but every fourth.
fn rotates(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    const FIELD: &str = "no_rope_layers";
    match config.opt_wholes(FIELD, bounds::LAYERS as usize)? {
        Some(list) if list.len() == layers => Ok(list.into_iter().map(|flag| flag != 0).collect()),
        Some(list) => {
            let why = format!("has {} entries, `num_hidden_layers` is {layers}", list.len());
            Err(config.error(FIELD, why))
        }
        None => {
            let interval = config.count_or("no_rope_layer_interval", bounds::LAYERS, 4)?;
            Ok((0..layers).map(|i| !(i + 1).is_multiple_of(interval)).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{attention, is_tied, refusal, spec, windows};

    const NAME: &str = "SmolLM3ForCausalLM";

    #[test]
    fn every_fourth_layer_has_no_positions() {
        let s = spec(NAME, &json!({}));
        let rotates: Vec<_> = (0..4).map(|i| attention(&s, i).rope.is_some()).collect();
        assert_eq!((rotates, is_tied(&s), s.ropes[0].theta), (vec![true, true, true, false], true, 2e6));
        assert_eq!(attention(&s, 0).kv_heads, 4);
        let s = spec(
            NAME,
            &json!({"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": true, "sliding_window": 5}),
        );
        assert_eq!(windows(&s), [Some(5), None, None, Some(5)]);
        assert!(attention(&s, 0).rope.is_none() && attention(&s, 1).rope == Some(0));
        assert!(refusal(NAME, &json!({"no_rope_layers": [1]})).contains("has 1 entries"));
    }
}
