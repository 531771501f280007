//! What loading hands out besides the executor, and what its options do.
#![allow(clippy::unwrap_used)]

use mirai_engine::Executor;
use mirai_model::backend::{BackendError, Storage};
use mirai_model::loader::{Phase, read_spec};
use mirai_model::reference::Reference;
use mirai_model::testing::{Driver, Script};
use mirai_model::texts::TokenizerData;
use mirai_model::{CacheBudget, LoadOptions, LoadedModel, ModelError, ModelSource, Quantization, load};

const CONFIG: &[u8] = br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 128,
    "eos_token_id": [3, 2], "dtype": "float16"}"#;

fn options() -> LoadOptions {
    LoadOptions { dummy: Some(1), cache: CacheBudget::Tokens(256), max_slots: 2, ..LoadOptions::default() }
}

fn open(
    files: &[(&str, &'static [u8])],
    options: &LoadOptions,
) -> Result<LoadedModel<Reference>, ModelError> {
    let files = [&[("config.json", CONFIG)], files].concat();
    load(&ModelSource::memory("m", &files), options, Reference::default(), &mut |_, _| {})
}

fn template(files: &[(&str, &'static [u8])]) -> Option<String> {
    open(files, &options()).unwrap().texts.chat_template
}

#[test]
fn templates_come_from_the_first_place_that_has_one() {
    let named = br#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    assert_eq!(template(&[]), None);
    assert_eq!(template(&[("tokenizer_config.json", br#"{"chat_template": "A"}"#)]).unwrap(), "A");
    assert_eq!(template(&[("tokenizer_config.json", br#"{"chat_template": null}"#)]), None);
    assert_eq!(template(&[("tokenizer_config.json", named)]).unwrap(), "D");
    let json = ("chat_template.json", &br#"{"chat_template": "J"}"#[..]);
    assert_eq!(template(&[json, ("tokenizer_config.json", named)]).unwrap(), "J");
    assert_eq!(template(&[("chat_template.jinja", b"X"), json]).unwrap(), "X");
    for bad in [&br#"{"chat_template": 3}"#[..], br#"{"chat_template": [{"name": "x", "template": "y"}]}"#] {
        let e = open(&[("chat_template.json", bad)], &options()).err().unwrap();
        assert!(e.to_string().starts_with("chat_template.json: field `chat_template`"), "{e}");
    }
    let e = open(&[("chat_template.jinja", b"\xff")], &options()).err().unwrap();
    assert!(e.to_string().contains("UTF-8"), "{e}");
}

#[test]
fn tokenizer_files_and_generation_defaults_are_handed_out() {
    let files: &[(&str, &'static [u8])] = &[
        ("tokenizer.json", b"{}"),
        ("merges.txt", b"a b"),
        ("README.md", b"no"),
        ("generation_config.json", br#"{"eos_token_id": [2, 7], "temperature": 0.6}"#),
    ];
    let model = open(files, &options()).unwrap();
    let TokenizerData::Files(tokenizer) = &model.texts.tokenizer else { panic!("files were given") };
    assert_eq!(tokenizer.keys().collect::<Vec<_>>(), ["merges.txt", "tokenizer.json"]);
    assert_eq!(model.eos_ids, [2, 3, 7]);
    assert_eq!(model.texts.generation_config.unwrap()["temperature"], 0.6);
    let bad = [("generation_config.json", &br#"{"eos_token_id": 50}"#[..])];
    let e = open(&bad, &options()).err().unwrap();
    assert!(e.to_string().starts_with("generation_config.json: field `eos_token_id`"), "{e}");
}

#[test]
fn progress_goes_through_the_phases() {
    let mut seen = Vec::new();
    let source = ModelSource::memory("m", &[("config.json", CONFIG)]);
    load(&source, &options(), Reference::default(), &mut |phase, share| seen.push((phase, share))).unwrap();
    assert_eq!(seen.first(), Some(&(Phase::Opening, 0.0)));
    assert!(seen.contains(&(Phase::Cache, 1.0)));
    assert_eq!(seen.last(), Some(&(Phase::WarmUp, 1.0)));
    let weights: Vec<f32> = seen.iter().filter(|(p, _)| *p == Phase::Weights).map(|(_, s)| *s).collect();
    assert!(weights.is_sorted() && weights.last() == Some(&1.0), "{weights:?}");
}

#[test]
fn dummy_weights_depend_on_the_seed_alone() {
    let logprobs = |seed, dtype, quantization| {
        let options = LoadOptions { dummy: Some(seed), dtype, quantization, ..options() };
        let model = open(&[], &options).unwrap();
        assert_eq!(model.executor.geometry().max_context, 128);
        Driver::new(model.executor).play(&[Script::teacher_forced(&[1, 9, 4, 7], 4)])[0].prompt_logprobs()
    };
    assert_eq!(logprobs(1, None, None), logprobs(1, Some(Storage::F16), None), "the configuration's type");
    assert_ne!(logprobs(1, None, None), logprobs(2, None, None));
    assert_ne!(logprobs(1, None, None), logprobs(1, Some(Storage::F32), None), "rounding");
    assert_ne!(logprobs(1, None, None), logprobs(1, None, Some(Quantization::Q8_0)), "blocks");
}

#[test]
fn options_out_of_bounds_are_named() {
    let table = [
        (LoadOptions { max_slots: 0, ..options() }, "max-num-seqs"),
        (LoadOptions { max_step_tokens: 0, ..options() }, "max-num-batched-tokens"),
        (LoadOptions { max_model_len: Some(129), ..options() }, "max-model-len"),
        (LoadOptions { cache: CacheBudget::Bytes(10), ..options() }, "kv-cache"),
        (LoadOptions { dtype: Some(Storage::Q4K), ..options() }, "dtype"),
    ];
    for (options, word) in table {
        let e = open(&[], &options).err().unwrap();
        assert!(e.to_string().contains(word) && e.exit_code() == 2, "{e}");
    }
}

#[test]
fn directories_are_listed_and_specifications_read_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    let source = ModelSource::directory(dir.path()).unwrap();
    let spec = read_spec(&source).unwrap();
    assert_eq!((spec.hidden, spec.layers.len()), (32, 2));
    let e = load(&source, &LoadOptions { dummy: None, ..options() }, Reference::default(), &mut |_, _| {});
    let e = e.err().unwrap();
    assert!(e.to_string().contains("has neither `model.safetensors`"), "a directory is no file: {e}");
    let e = ModelSource::directory(&dir.path().join("nothing")).unwrap_err();
    assert!(matches!(e, ModelError::Io { .. }) && e.exit_code() == 4, "{e}");
    let e = read_spec(&ModelSource::gguf(&dir.path().join("nothing.gguf"))).unwrap_err();
    assert!(e.to_string().contains("nothing.gguf"), "{e}");
}

#[test]
fn the_devices_refusal_names_the_tensor() {
    let source = BackendError::Unsupported {
        name: "t".into(),
        storage: Storage::Q2K,
        shape: vec![1],
        why: "no kernel".into(),
    };
    let e = ModelError::Backend { what: "a + b".into(), source };
    assert_eq!(e.exit_code(), 4);
    assert!(e.to_string().starts_with("a + b: tensor `t`: Q2K"), "{e}");
}
