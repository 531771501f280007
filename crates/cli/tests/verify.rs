//! `mirai verify` on whole, broken and foreign folders.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn verify(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mirai")).arg("verify").args(arguments).output().unwrap()
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

/// A folder with the demo model's files.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn a_whole_model_is_described() {
    let out = verify(&[demo().to_str().unwrap()]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{text}");
    for words in [
        "LlamaForCausalLM, to generate",
        "4.0 million",
        "1024 tokens",
        "bf16",
        "grouped heads",
        "tokenizer.json",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
    let out = verify(&[demo().to_str().unwrap(), "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["parameters"], 4_000_512);
    // 5 layers, keys and values, 2 heads of 64, 2 bytes.
    assert_eq!(report["kv_bytes_per_token"], 5 * 2 * 2 * 64 * 2);
    assert_eq!(report["faults"], serde_json::json!([]));
}

#[test]
fn what_would_be_refused_is_said_and_exits_4() {
    let folder = copy();
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["intermediate_size"] = 513.into();
    std::fs::write(&config, json.to_string()).unwrap();
    let out = verify(&[folder.path().to_str().unwrap(), "--json"]);
    assert_eq!(out.status.code(), Some(4));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let faults = report["faults"].as_array().unwrap();
    assert!(faults.len() == 15 && faults[0].as_str().unwrap().contains("expected [513, 256]"), "{faults:?}");
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("cannot be loaded: 15 faults"), "{said}");

    json["architectures"] = serde_json::json!(["TurtleForCausalLM"]);
    std::fs::write(&config, json.to_string()).unwrap();
    let out = verify(&[folder.path().to_str().unwrap()]);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(4));
    assert!(said.contains("TurtleForCausalLM") && said.contains("GptOssForCausalLM"), "{said}");
}

#[test]
fn a_truncated_file_is_seen_without_reading_it() {
    let folder = copy();
    let file = folder.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let out = verify(&[folder.path().to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(4));
    assert!(String::from_utf8(out.stderr).unwrap().contains("model.safetensors"));
}

#[test]
fn a_configuration_alone_is_priced() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/configs");
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(configs.join("qwen3-coder-30b-a3b.json"), folder.path().join("config.json")).unwrap();
    let out = verify(&[folder.path().to_str().unwrap(), "--json"]);
    assert_eq!(out.status.code(), Some(4), "without weights it cannot be loaded");
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["parameters"], 30_532_122_624_u64);
    assert_eq!(report["kv_bytes_per_token"], 96 << 10);
    let faults: Vec<&str> = report["faults"].as_array().unwrap().iter().filter_map(|f| f.as_str()).collect();
    assert!(faults.len() == 2 && faults[1].contains("neither tokenizer.json nor tekken.json"), "{faults:?}");
}

/// `serve` refuses each of these once the weights are there, so `verify` must not call them whole.
#[test]
fn texts_that_serve_refuses_are_faults() {
    let cases: [(&str, &str, &str); 5] = [
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", r#"{"bos_token": 3}"#, "tokenizer_config.json"),
        ("chat_template.jinja", "{% for m in messages %}", "chat template"),
        ("generation_config.json", r#"{"temperature": "warm"}"#, "generation_config.json"),
        ("generation_config.json", r#"{"eos_token_id": 4000000}"#, "generation_config.json"),
    ];
    for (file, content, words) in cases {
        let folder = copy();
        std::fs::write(folder.path().join(file), content).unwrap();
        let path = folder.path().to_str().unwrap();
        let out = verify(&[path, "--json"]);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(4), "{file} {content}: {said}");
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let faults = report["faults"].as_array().unwrap();
        assert_eq!(faults.len(), 1, "{faults:?}");
        let fault = faults[0].as_str().unwrap();
        assert!(fault.contains(words) && said.contains(fault), "{fault} {said}");
        let serve = support::run(&["serve", "--port", "0", "--model", path]);
        assert_eq!(serve.status.code(), Some(4));
        assert!(String::from_utf8(serve.stderr).unwrap().contains(fault), "the same words: {fault}");
    }
}

/// A classifier of three labels is a fine encoder, but no pair can be scored by it.
#[test]
fn labels_that_score_nothing_are_faults() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden/xlmr-rerank");
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), folder.path().join(name)).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo().join(name), folder.path().join(name)).unwrap();
    }
    let config = folder.path().join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    json["id2label"] = serde_json::json!({"0": "a", "1": "b", "2": "c"});
    json["label2id"] = serde_json::json!({"a": 0, "b": 1, "c": 2});
    std::fs::write(&config, json.to_string()).unwrap();
    let out = verify(&[folder.path().to_str().unwrap(), "--json"]);
    assert_eq!(out.status.code(), Some(4));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let faults = report["faults"].to_string();
    assert!(faults.contains("a classifier with 3 labels scores no pairs"), "{faults}");
}

#[test]
fn gguf_files_are_described() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/data/models/stories260K/gguf/stories260K-Q8_0.gguf");
    if !file.exists() {
        return;
    }
    let out = verify(&[file.to_str().unwrap()]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("q8_0") && text.contains("in the file"), "{text}");
}
