//! Tensors that do not fit where a family stores them fused, or one for each expert.

use serde_json::{Value, json};

use crate::files::{HIDDEN, INTERMEDIATE, config, directory, header, safetensors};
use crate::{Case, check, try_load};
use mirai_model::ModelSource;

/// Names and shapes of a file under construction.
type Tensors = Vec<(String, Vec<usize>)>;

const EXPERTS: usize = 2;

/// A small model of one layer, and its tensors but those of the feed-forward block.
fn base(architecture: &str, extra: &Value) -> (Value, Tensors) {
    let mut config = config();
    config["architectures"] = json!([architecture]);
    for (key, value) in extra.as_object().expect("an object") {
        config[key] = value.clone();
    }
    let names = crate::files::tensors().into_iter().filter(|(name, _)| !name.contains(".mlp."));
    (config, names.map(|(name, shape)| (name.to_owned(), shape)).collect())
}

fn layer(tensors: &mut Tensors, all: &[(&str, &[usize])]) {
    tensors.extend(all.iter().map(|(name, shape)| (format!("model.layers.0.{name}"), shape.to_vec())));
}

/// One tensor for each projection of each expert.
fn mixtral() -> (Value, Tensors) {
    let (config, mut tensors) =
        base("MixtralForCausalLM", &json!({"num_local_experts": EXPERTS, "num_experts_per_tok": 1}));
    layer(&mut tensors, &[("block_sparse_moe.gate.weight", &[EXPERTS, HIDDEN])]);
    for expert in 0..EXPERTS {
        for (name, shape) in
            [("w1", [INTERMEDIATE, HIDDEN]), ("w2", [HIDDEN, INTERMEDIATE]), ("w3", [INTERMEDIATE, HIDDEN])]
        {
            layer(&mut tensors, &[(&format!("block_sparse_moe.experts.{expert}.{name}.weight"), &shape)]);
        }
    }
    (config, tensors)
}

/// All experts in one tensor.
fn fused() -> (Value, Tensors) {
    let (config, mut tensors) = base(
        "Qwen3MoeForCausalLM",
        &json!({"num_experts": EXPERTS, "num_experts_per_tok": 1, "moe_intermediate_size": INTERMEDIATE}),
    );
    layer(
        &mut tensors,
        &[
            ("mlp.gate.weight", &[EXPERTS, HIDDEN]),
            ("mlp.experts.gate_up_proj", &[EXPERTS, 2 * INTERMEDIATE, HIDDEN]),
            ("mlp.experts.down_proj", &[EXPERTS, HIDDEN, INTERMEDIATE]),
            ("self_attn.q_norm.weight", &[4]),
            ("self_attn.k_norm.weight", &[4]),
        ],
    );
    (config, tensors)
}

/// q, k and v in one tensor, gate and up in another.
fn phi3() -> (Value, Tensors) {
    let (config, mut tensors) = base("Phi3ForCausalLM", &json!({}));
    tensors.retain(|(name, _)| !["q_proj", "k_proj", "v_proj"].iter().any(|part| name.contains(part)));
    layer(
        &mut tensors,
        &[
            ("self_attn.qkv_proj.weight", &[8 + 2 * 4, HIDDEN]),
            ("mlp.gate_up_proj.weight", &[2 * INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj.weight", &[HIDDEN, INTERMEDIATE]),
        ],
    );
    (config, tensors)
}

fn source((config, tensors): &(Value, Tensors)) -> ModelSource {
    let tensors: Vec<_> = tensors.iter().map(|(name, shape)| (name.as_str(), shape.clone())).collect();
    let (header, len) = header(&tensors);
    directory(vec![
        ("config.json", config.to_string().into_bytes()),
        ("model.safetensors", safetensors(&header.to_string(), len)),
    ])
}

/// The model without the tensors whose names end so.
fn without(mut model: (Value, Tensors), end: &str) -> ModelSource {
    let before = model.1.len();
    model.1.retain(|(name, _)| !name.ends_with(end));
    assert!(model.1.len() < before, "nothing ends with {end}");
    source(&model)
}

/// The model with another shape of the tensor whose name ends so.
fn reshaped(mut model: (Value, Tensors), end: &str, shape: &[usize]) -> ModelSource {
    let found = model.1.iter_mut().find(|(name, _)| name.ends_with(end));
    found.expect("the tensor is there").1 = shape.to_vec();
    source(&model)
}

fn with_field(mut model: (Value, Tensors), field: &str, value: Value) -> ModelSource {
    model.0[field] = value;
    source(&model)
}

#[test]
fn the_valid_families_load() {
    for model in [mixtral(), fused(), phi3()] {
        try_load(&source(&model)).expect("a valid model");
    }
}

#[test]
pub(crate) fn shapes() {
    const FILE: &str = "model.safetensors";
    let cases: Vec<Case> = vec![
        (
            "an expert is missing",
            without(mixtral(), "experts.1.w2.weight"),
            &[FILE, "experts.1.down_proj.weight", "missing"],
        ),
        (
            "an expert is of another shape",
            reshaped(mixtral(), "experts.1.w3.weight", &[INTERMEDIATE + 1, HIDDEN]),
            &[FILE, "experts.1.w3.weight", "[13, 8]", "[12, 8]"],
        ),
        (
            "an expert is turned",
            reshaped(mixtral(), "experts.0.w2.weight", &[INTERMEDIATE, HIDDEN]),
            &["experts.0.w2.weight", "[12, 8]", "[8, 12]"],
        ),
        ("no router", without(mixtral(), "gate.weight"), &["mlp.gate.weight", "missing"]),
        (
            "more experts than tensors",
            with_field(mixtral(), "num_local_experts", json!(3)),
            &[FILE, "block_sparse_moe.gate.weight", "[2, 8]", "[3, 8]"],
        ),
        (
            "more chosen than there are",
            with_field(mixtral(), "num_experts_per_tok", json!(3)),
            &["config.json", "`num_experts_per_tok`", "1 to 2"],
        ),
        (
            "experts 2^20",
            with_field(fused(), "num_experts", json!(1 << 20)),
            &["config.json", "`num_experts`", "1048576"],
        ),
        (
            "fused experts, one too few",
            reshaped(fused(), "experts.down_proj", &[1, HIDDEN, INTERMEDIATE]),
            &[FILE, "mlp.experts.down_proj", "[1, 8, 12]", "[2, 8, 12]"],
        ),
        (
            "fused experts without their gate",
            reshaped(fused(), "experts.gate_up_proj", &[EXPERTS, INTERMEDIATE, HIDDEN]),
            &[FILE, "mlp.experts.gate_up_proj", "[2, 12, 8]", "[2, 24, 8]"],
        ),
        (
            "fused experts, flattened",
            reshaped(fused(), "experts.gate_up_proj", &[EXPERTS * 2 * INTERMEDIATE, HIDDEN]),
            &["mlp.experts.gate_up_proj", "[48, 8]"],
        ),
        (
            "norm of a head is of the width of all",
            reshaped(fused(), "q_norm.weight", &[8]),
            &["q_norm.weight", "[8]", "[4]"],
        ),
        (
            "fused projection without v",
            reshaped(phi3(), "qkv_proj.weight", &[8 + 4, HIDDEN]),
            &[FILE, "self_attn.qkv_proj.weight", "[12, 8]", "[16, 8]"],
        ),
        (
            "fused feed-forward without up",
            reshaped(phi3(), "gate_up_proj.weight", &[INTERMEDIATE, HIDDEN]),
            &[FILE, "mlp.gate_up_proj.weight", "[12, 8]", "[24, 8]"],
        ),
        ("no projection at all", without(phi3(), "qkv_proj.weight"), &["self_attn.q_proj.weight", "missing"]),
    ];
    check(cases);
}
