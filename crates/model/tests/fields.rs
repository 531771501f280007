//! Every field of a configuration that changes the numbers is read, and the goldens would notice if it were not: with the
//! field changed, a golden case must fail. Small models, so that a fault in one frequency or factor shows.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use mirai_model::backend::CacheDtype;
use mirai_model::reference::Reference;
use mirai_model::testing::{Driver, GoldenCase};
use mirai_model::{CacheBudget, FileSource, LoadOptions, ModelSource, load};
use serde_json::{Value, json};

/// Least difference that a changed field must make: the gate of all backends is 1e-3.
const NOTICED: f32 = 5e-3;
/// Largest difference of a case as it is.
const TOLERANCE: f32 = 2e-5;

/// A case, a field of its configuration as a JSON pointer, and another value.
fn table() -> Vec<(&'static str, &'static str, Value)> {
    let rope = |field: &'static str| match field {
        "full" => "/rope_parameters/full_attention/rope_theta",
        _ => "/rope_parameters/sliding_attention/rope_theta",
    };
    vec![
        ("gptoss", "/rope_scaling/truncate", json!(true)),
        ("gptoss", "/rope_scaling/factor", json!(5.0)),
        ("gptoss", "/rope_scaling/beta_fast", json!(8.0)),
        ("gptoss", "/rope_scaling/original_max_position_embeddings", json!(48)),
        ("gptoss", "/swiglu_limit", json!(7.0)),
        ("gptoss", "/sliding_window", json!(8)),
        ("gptoss", "/layer_types", json!(["full_attention", "sliding_attention", "full_attention"])),
        ("gptoss", "/num_experts_per_tok", json!(2)),
        ("gptoss", "/rope_theta", json!(10_000.0)),
        ("gptoss-mqa", "/swiglu_alpha", json!(1.0)),
        ("gemma2", "/query_pre_attn_scalar", json!(10)),
        ("gemma2", "/attn_logit_softcapping", json!(null)),
        ("gemma2", "/final_logit_softcapping", json!(null)),
        ("gemma2", "/hidden_activation", json!("silu")),
        ("gemma2-embed", "/attn_logit_softcapping", json!(5.0)),
        ("gemma3", "/query_pre_attn_scalar", json!(10)),
        ("gemma3", rope("full"), json!(1e4)),
        ("gemma3", rope("sliding"), json!(1e5)),
        ("gemma3", "/rope_parameters/full_attention/factor", json!(2.0)),
        ("gemma3-wrapper", "/text_config/rope_local_base_freq", json!(1e5)),
        ("gemma3-wrapper", "/text_config/sliding_window_pattern", json!(3)),
        ("gemma4", rope("full"), json!(1e4)),
        ("gemma4", rope("sliding"), json!(1e5)),
        ("gemma4", "/rope_parameters/full_attention/partial_rotary_factor", json!(0.5)),
        ("gemma4", "/rope_parameters/full_attention/factor", json!(2.0)),
        ("gemma4", "/top_k_experts", json!(2)),
        ("gemma4", "/final_logit_softcapping", json!(null)),
        ("qwen3next", "/norm_topk_prob", json!(false)),
        ("qwen3next", "/num_experts_per_tok", json!(2)),
        ("qwen3next", "/rope_parameters/rope_theta", json!(1e5)),
        ("qwen3next-dense-layer", "/norm_topk_prob", json!(true)),
        ("qwen3_5", "/rope_parameters/partial_rotary_factor", json!(0.25)),
        ("deepseek", "/rope_scaling/mscale", json!(1.0)),
        ("deepseek", "/rope_scaling/mscale_all_dim", json!(0.5)),
        ("deepseek", "/rope_interleave", json!(false)),
        ("deepseek", "/routed_scaling_factor", json!(1.0)),
        ("deepseek", "/norm_topk_prob", json!(false)),
        ("deepseek", "/topk_group", json!(3)),
        ("deepseek", "/rope_scaling/beta_fast", json!(1.0)),
        ("deepseek", "/rope_scaling/beta_slow", json!(2.0)),
        ("deepseek", "/n_group", json!(2)),
        ("deepseek-plain-query", "/rope_interleave", json!(true)),
        ("deepseek-plain-query", "/norm_topk_prob", json!(true)),
        ("xlmr-embed", "/pad_token_id", json!(0)),
        ("xlmr-embed", "/hidden_act", json!("silu")),
        ("phi3", "/sliding_window", json!(16)),
        ("phi3-longrope-short", "/rope_scaling/attention_factor", json!(1.0)),
        ("phi3-longrope-long", "/original_max_position_embeddings", json!(96)),
        ("ministral3", "/rope_parameters/llama_4_scaling_beta", json!(0.2)),
        ("ministral3", "/rope_parameters/beta_fast", json!(0.5)),
        ("llama-yarn", "/rope_parameters/factor", json!(5.0)),
        ("llama-yarn", "/rope_parameters/truncate", json!(false)),
        ("granite", "/attention_multiplier", json!(0.25)),
        ("smollm3", "/no_rope_layers", json!([1, 1, 1, 1])),
        ("cohere2", "/logit_scale", json!(0.5)),
        ("glm4-partial", "/partial_rotary_factor", json!(0.5)),
        ("mixtral", "/num_experts_per_tok", json!(1)),
        ("qwen3moe", "/norm_topk_prob", json!(false)),
        ("qwen3moe-fused", "/norm_topk_prob", json!(true)),
    ]
}

/// The case with this configuration; none where it is refused.
fn difference(case: &GoldenCase, config: &Value) -> Option<f32> {
    let mut source = ModelSource::directory(&case.dir).unwrap();
    let bytes: &'static [u8] = Box::leak(serde_json::to_vec(config).unwrap().into_boxed_slice());
    if let ModelSource::Files { files, .. } = &mut source {
        files.insert("config.json".to_owned(), FileSource::Static(bytes));
    }
    let options = LoadOptions {
        task: case.load_task(),
        cache: CacheBudget::Tokens(512),
        cache_dtype: CacheDtype::F32,
        max_slots: 8,
        max_step_tokens: 128,
        ..LoadOptions::default()
    };
    let loaded = load(&source, &options, Reference::default(), &mut |_, _| {}).ok()?;
    Some(case.mixed(&mut Driver::new(loaded.executor), &[usize::MAX; 3]))
}

#[test]
fn goldens_notice_every_field() {
    let mut missed = Vec::new();
    for (name, field, value) in table() {
        let case = GoldenCase::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name));
        let text = std::fs::read_to_string(case.dir.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        let same = difference(&case, &config).unwrap();
        assert!(same < TOLERANCE, "{name}: {same:e}");
        let mut changed = config.clone();
        let (parent, key) = field.rsplit_once('/').unwrap();
        let parent = changed.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        let old = parent.insert(key.to_owned(), value.clone());
        assert_ne!(old.as_ref(), Some(&value), "{name}: {field} is not changed");
        match difference(&case, &changed) {
            Some(d) if d > NOTICED => {}
            Some(d) => missed.push(format!("{name}: {field} = {value} makes {d:e}")),
            None => missed.push(format!("{name}: {field} = {value} is refused")),
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
