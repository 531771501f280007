//! Broken and contradictory configurations.

use serde_json::{Value, json};

use crate::files::directory;
use crate::{check, with_config, with_fields};

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
pub(crate) fn configurations() {
    const FILE: &str = "config.json";
    let f = |fields: Value| with_fields(&fields);
    let rope = |r: Value| with_fields(&json!({"rope_theta": null, "rope_parameters": r}));
    check(vec![
        ("heads 0", f(json!({"num_attention_heads": 0})), &[FILE, "`num_attention_heads`", "is 0"]),
        ("kv heads 0", f(json!({"num_key_value_heads": 0})), &[FILE, "`num_key_value_heads`"]),
        (
            "kv heads do not divide",
            f(json!({"num_attention_heads": 4, "num_key_value_heads": 3})),
            &["3", "4"],
        ),
        (
            "heads do not divide",
            f(json!({"num_attention_heads": 3})),
            &["`num_attention_heads`", "hidden_size"],
        ),
        ("odd head", f(json!({"head_dim": 7})), &["`head_dim`", "is 7", "even"]),
        ("huge head", f(json!({"head_dim": 1 << 20})), &["`head_dim`", "1048576"]),
        (
            "layers 1e9",
            f(json!({"num_hidden_layers": 1_000_000_000})),
            &["`num_hidden_layers`", "1000000000"],
        ),
        ("more layers than tensors", f(json!({"num_hidden_layers": 2})), &["model.layers.1.", "missing"]),
        ("context 2^63", f(json!({"max_position_embeddings": 1u64 << 63})), &["`max_position_embeddings`"]),
        ("context 0", f(json!({"max_position_embeddings": 0})), &["`max_position_embeddings`", "is 0"]),
        ("context missing", f(json!({"max_position_embeddings": null})), &["missing"]),
        ("hidden negative", f(json!({"hidden_size": -8})), &["`hidden_size`", "-8"]),
        ("hidden 1e12", f(json!({"hidden_size": 1e12})), &["`hidden_size`"]),
        ("hidden is a text", f(json!({"hidden_size": "8"})), &["`hidden_size`", "whole number"]),
        ("hidden is a fraction", f(json!({"hidden_size": 8.5})), &["`hidden_size`", "8.5"]),
        ("vocab 2^32", f(json!({"vocab_size": 1u64 << 32})), &["`vocab_size`"]),
        ("vocab differs", f(json!({"vocab_size": 17})), &["model.embed_tokens.weight", "[16, 8]", "[17, 8]"]),
        ("intermediate differs", f(json!({"intermediate_size": 13})), &["gate_proj", "[12, 8]", "[13, 8]"]),
        ("epsilon 0", f(json!({"rms_norm_eps": 0.0})), &["`rms_norm_eps`", "more than 0"]),
        ("epsilon 1e39", f(json!({"rms_norm_eps": 1e39})), &["`rms_norm_eps`", "finite"]),
        ("theta negative", f(json!({"rope_theta": -1.0})), &["`rope_theta`", "-1"]),
        ("theta 1", f(json!({"rope_theta": 1.0})), &["`rope_theta`", "more than 1"]),
        ("theta is a list", f(json!({"rope_theta": [1]})), &["`rope_theta`", "number"]),
        ("two thetas", f(json!({"rope_parameters": {"rope_theta": 5e5}})), &["`rope_theta`", "500000"]),
        (
            "two scalings",
            f(json!({"rope_scaling": {"type": "linear", "factor": 2.0},
                     "rope_parameters": {"rope_type": "linear", "factor": 4.0}})),
            &["`rope_scaling`", "differs"],
        ),
        (
            "two types",
            rope(json!({"rope_type": "linear", "type": "yarn", "factor": 2.0})),
            &["`rope_parameters.rope_type`", "yarn"],
        ),
        (
            "dynamic",
            rope(json!({"rope_type": "dynamic", "factor": 2.0})),
            &["rope_type`", "dynamic", "supported"],
        ),
        ("type is a number", rope(json!({"rope_type": 3})), &["`rope_parameters.rope_type`", "text"]),
        ("no factor", rope(json!({"rope_type": "linear"})), &["`rope_parameters.factor`", "missing"]),
        ("factor below 1", rope(json!({"rope_type": "linear", "factor": 0.5})), &["factor`", "0.5"]),
        ("factor is a text", rope(json!({"rope_type": "linear", "factor": "4"})), &["factor`", "number"]),
        (
            "llama3 without bounds",
            rope(json!({"rope_type": "llama3", "factor": 8.0})),
            &["`rope_parameters.low_freq_factor`", "missing"],
        ),
        (
            "llama3 bounds reversed",
            rope(
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
            ),
            &["high_freq_factor`", "is 1"],
        ),
        (
            "yarn betas reversed",
            rope(json!({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 32.0})),
            &["beta_fast`", "below"],
        ),
        (
            "rope for layer types",
            rope(json!({"full_attention": {"rope_theta": 1e4}})),
            &["full_attention", "layer"],
        ),
        ("rope is a list", f(json!({"rope_parameters": []})), &["`rope_parameters`", "object"]),
        (
            "partial rotation",
            f(json!({"partial_rotary_factor": 0.3})),
            &["`partial_rotary_factor`", "0.3", "1 of 4"],
        ),
        ("more than a head rotates", f(json!({"partial_rotary_factor": 2.0})), &["`partial_rotary_factor`"]),
        ("two dtypes", f(json!({"dtype": "bfloat16"})), &["`dtype`", "torch_dtype"]),
        ("dtype int8", f(json!({"torch_dtype": "int8"})), &["`torch_dtype`", "int8", "bfloat16"]),
        ("activation", f(json!({"hidden_act": "relu"})), &["`hidden_act`", "relu", "silu"]),
        (
            "tie is a text",
            f(json!({"tie_word_embeddings": "yes"})),
            &["`tie_word_embeddings`", "true or false"],
        ),
        ("bias is a number", f(json!({"attention_bias": 1})), &["`attention_bias`"]),
        ("bias without tensor", f(json!({"mlp_bias": true})), &["gate_proj.bias", "missing"]),
        ("eos beyond", f(json!({"eos_token_id": [2, 16]})), &["`eos_token_id`", "below 16"]),
        ("bos is a text", f(json!({"bos_token_id": "1"})), &["`bos_token_id`"]),
        ("no architectures", f(json!({"architectures": null})), &["`architectures`"]),
        ("two architectures", f(json!({"architectures": ["A", "B"]})), &["`architectures`", "exactly one"]),
        (
            "unknown architecture",
            f(json!({"architectures": ["MambaForCausalLM"]})),
            &["MambaForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"],
        ),
        (
            "quantized",
            f(json!({"quantization_config": {"bits": 4}})),
            &["`quantization_config.quant_method`"],
        ),
        ("experts", f(json!({"num_local_experts": 8})), &["`num_local_experts`", "8"]),
        ("layer types too few", f(json!({"layer_types": []})), &["`layer_types`", "0 entries"]),
        (
            "layer type unknown",
            f(json!({"layer_types": ["chunked_attention"]})),
            &["`layer_types`", "chunked"],
        ),
        (
            "window 0",
            f(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 0})),
            &["`sliding_window`"],
        ),
        ("untied without head", f(json!({"tie_word_embeddings": false})), &["lm_head.weight", "missing"]),
        ("NaN", with_config(b"{\"rope_theta\": NaN}".to_vec()), &[FILE, "not valid JSON"]),
        ("empty", with_config(vec![]), &[FILE, "not valid JSON"]),
        ("a list", with_config(b"[]".to_vec()), &[FILE, "object"]),
        ("deep", with_config(b"[".repeat(100_000)), &[FILE, "JSON"]),
        ("5 MB", with_config(vec![b' '; 5 << 20]), &[FILE, "5242880 bytes"]),
        ("no config", directory(vec![]), &["dir", "config.json"]),
    ]);
}
