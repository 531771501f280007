//! What the models that the platform runs cost, from their configurations, beside the published figures.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use mirai_model::ModelSpec;
use mirai_model::arch::spec_from_config;
use mirai_model::backend::CacheDtype;
use mirai_model::cache::Grouping;

/// Largest relative difference from a published figure.
const TOLERANCE: f64 = 0.01;
/// The same for KV memory where keys are values: the rotated part of the key is stored beside the value (ADR 6), which
/// is 212.5 instead of 210 KiB.
const KEYS_THAT_ARE_VALUES: f64 = 0.012;

struct Model {
    name: &'static str,
    config: &'static str,
    /// Published numbers of parameters, in billions: all, and those that a token meets.
    parameters: f64,
    active: Option<f64>,
    /// Published KV memory, all layers counted, in bf16: bytes a token.
    kv_bytes: u64,
    /// Where the figures are from.
    source: &'static str,
}

macro_rules! config {
    ($name:literal) => {
        include_str!(concat!("configs/", $name, ".json"))
    };
}

const MODELS: [Model; 8] = [
    Model {
        name: "gpt-oss-120b",
        config: config!("gpt-oss-120b"),
        parameters: 116.83,
        active: Some(5.13),
        kv_bytes: 72 << 10,
        source: "model card, table 1; 36 layers of 8 heads of 64, keys and values, 2 bytes",
    },
    Model {
        name: "gemma-4-26b-a4b",
        config: config!("gemma-4-26b-a4b"),
        parameters: 25.2,
        active: Some(3.8),
        kv_bytes: 210 << 10,
        source: "model card (parameters without the vision encoder); 25 layers of 8 heads of 256 and 5 of 2 of 512, \
                 whose keys are values and count once",
    },
    Model {
        name: "qwen3.6-35b-a3b",
        config: config!("qwen3.6-35b-a3b"),
        parameters: 35.0,
        active: None,
        kv_bytes: 20 << 10,
        source: "model card; 10 attention layers of 2 heads of 256",
    },
    Model {
        name: "mistral-small-3.2-24b",
        config: config!("mistral-small-3.2-24b"),
        parameters: 23.57,
        active: None,
        kv_bytes: 160 << 10,
        source: "23.57 B without the vision encoder; 160 KiB: 40 layers of 8 heads of 128",
    },
    Model {
        name: "qwen3-coder-30b-a3b",
        config: config!("qwen3-coder-30b-a3b"),
        parameters: 30.5,
        active: Some(3.3),
        kv_bytes: 96 << 10,
        source: "model card; 48 layers of 4 heads of 128",
    },
    Model {
        name: "bge-m3",
        config: config!("bge-m3"),
        parameters: 0.568,
        active: None,
        kv_bytes: 0,
        source: "model card: 568 M",
    },
    Model {
        name: "bge-reranker-v2-m3",
        config: config!("bge-reranker-v2-m3"),
        parameters: 0.568,
        active: None,
        kv_bytes: 0,
        source: "model card: 568 M",
    },
    Model {
        name: "bge-multilingual-gemma2",
        config: config!("bge-multilingual-gemma2"),
        parameters: 9.24,
        active: None,
        kv_bytes: 336 << 10,
        source: "model card: 9.24 B; 42 layers of 8 heads of 256",
    },
];

fn spec(model: &Model) -> ModelSpec {
    let config: serde_json::Value = serde_json::from_str(model.config).unwrap();
    spec_from_config("config.json", config.as_object().unwrap()).unwrap()
}

fn near(name: &str, what: &str, got: f64, published: f64, tolerance: f64) {
    let difference = got / published - 1.0;
    println!("{name}: {what} {got:.4}, published {published}: {:+.2} %", difference * 100.0);
    assert!(difference.abs() <= tolerance, "{name}: {what} {got}, published {published}");
}

#[test]
fn parameters_and_kv_memory_are_the_published_ones() {
    for model in &MODELS {
        let spec = spec(model);
        println!("{}: {}", model.name, model.source);
        near(model.name, "parameters, billions", spec.parameters() as f64 / 1e9, model.parameters, TOLERANCE);
        if let Some(active) = model.active {
            // Cards round to one or two digits.
            let got = spec.active_parameters() as f64 / 1e9;
            println!("{}: active parameters {got:.3} billions, published {active}", model.name);
        }
        let kv = Grouping::new(&spec, CacheDtype::Bf16, spec.context).token_bytes();
        if model.kv_bytes == 0 {
            assert_eq!(kv, 0, "{}: an encoder keeps nothing", model.name);
        } else {
            let tolerance = if model.name.starts_with("gemma-4") { KEYS_THAT_ARE_VALUES } else { TOLERANCE };
            near(model.name, "KV bytes a token", kv as f64, model.kv_bytes as f64, tolerance);
        }
    }
}
