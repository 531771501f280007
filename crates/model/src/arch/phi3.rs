//! Phi 3 and Phi 4: Llama with fused projections, a rotation of a part of each head, and LongRoPE.

use super::rope::{RopeDefaults, rope};
use super::shared::{Common, HeadDefaults, attention, decoder, layer, mlp, sliding_window};
use crate::config::Config;
use crate::error::Result;
use crate::rope::RopeScaling;
use crate::spec::{AttentionLayer, Ffn, Mixer, ModelSpec};

pub(super) fn phi3(config: &Config<'_>) -> Result<ModelSpec> {
    let c = Common::read(config, 1e-5)?;
    let a = attention(config, c.hidden, HeadDefaults::default())?;
    let a = AttentionLayer { window: sliding_window(config, None)?, ..a };
    let absent = RopeDefaults { original_context: Some(4_096), ..RopeDefaults::USUAL };
    let rope = rope(config, a.head_dim, c.context, absent)?;
    if !matches!(rope.scaling, RopeScaling::None | RopeScaling::LongRope(_)) {
        let field = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        return Err(config.error(field, "this architecture knows the types default and longrope"));
    }
    let layer = layer(c.norm, Mixer::Attention(a), Ffn::Dense(mlp(config)?));
    decoder(config, &c, vec![layer; c.layers], vec![rope], false)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{refusal, spec, windows};

    const NAME: &str = "Phi3ForCausalLM";

    #[test]
    fn long_and_short_factors() {
        let longrope = json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [4.0, 5.0, 6.0]}, "partial_rotary_factor": 0.75, "sliding_window": 33,
            "max_position_embeddings": 16_384});
        let s = spec(NAME, &longrope);
        let crate::rope::RopeScaling::LongRope(long) = &s.ropes[0].scaling else { panic!("not long") };
        assert_eq!(
            (long.original_context, s.ropes[0].rotary_dim),
            (4_096, 6),
            "4096 is the family's default"
        );
        assert_eq!((&long.short[..], &long.long[..]), (&[1.0, 1.5, 2.0][..], &[4.0, 5.0, 6.0][..]));
        let expected = (1.0 + 4f64.ln() / 4_096f64.ln()).sqrt();
        assert!((long.attention_factor - expected).abs() < 1e-12);
        assert_eq!(windows(&s), [Some(33); 4]);
        let mut wrong = longrope.clone();
        wrong["rope_scaling"]["long_factor"] = json!([1.0, 2.0]);
        assert!(refusal(NAME, &wrong).contains("`rope_scaling.long_factor`: expected a list of 3 numbers"));
        wrong["rope_scaling"]["long_factor"] = json!([1.0, 2.0, -1.0]);
        assert!(refusal(NAME, &wrong).contains("above 0"));
        wrong["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        assert!(refusal(NAME, &wrong).contains("`rope_scaling`"));
        wrong["partial_rotary_factor"] = json!(0.4);
        assert!(refusal(NAME, &wrong).contains("3 of 8 elements rotate"));
    }
}
