//! Embedders and rerankers through the real binary: what HF transformers computed, over HTTP.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{Server, on_gpu, run};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/golden").join(case)
}

/// A folder with a golden case's model and a vocabulary of one word a token: `w5` is token 5.
fn folder(case: &str, vocab: usize, words: &[(&str, usize)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"] {
        let from = golden(case).join(name);
        if from.exists() {
            let to = folder.path().join(name);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(from, to).unwrap();
        }
    }
    let mut ids: serde_json::Map<String, Value> =
        (0..vocab).map(|id| (format!("w{id}"), json!(id))).collect();
    for (word, id) in words {
        ids.remove(&format!("w{id}"));
        ids.insert((*word).to_owned(), json!(id));
    }
    let special = |content: &str, id: usize| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": [special("<s>", 0), special("</s>", 2)],
        // Nothing but these words becomes a token: no template's text does.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "w[0-9]+"}, "behavior": "Removed", "invert": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "w3"},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn prompts(case: &str) -> Vec<(Vec<u64>, Vec<f64>)> {
    let text = std::fs::read_to_string(golden(case).join("golden.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let numbers = |v: &Value| v.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>();
    let prompt = |p: &Value| (numbers(&p["ids"]).iter().map(|n| *n as u64).collect(), numbers(&p["vector"]));
    json["prompts"].as_array().unwrap().iter().map(prompt).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn an_encoder_and_a_causal_model_embed_as_transformers_says() {
    for (case, vocab) in [("xlmr-embed", 71), ("qwen3-embed", 61)] {
        let folder = folder(case, vocab, &[("<s>", 0), ("</s>", 2)]);
        let server = Server::start(&["--model", folder.path().to_str().unwrap(), "--served-model-name", "e"]);
        let prompts = prompts(case);
        let input: Vec<&[u64]> = prompts.iter().map(|(ids, _)| ids.as_slice()).collect();
        let reply = server.post("/v1/embeddings", &json!({"model": "e", "input": input}));
        assert_eq!(reply.status, 200, "{case}: {}", reply.body);
        let body = reply.json();
        let total: usize = prompts.iter().map(|(ids, _)| ids.len()).sum();
        assert_eq!(body["usage"]["prompt_tokens"], total, "{case}");
        for (item, (_, expected)) in body["data"].as_array().unwrap().iter().zip(&prompts) {
            let got: Vec<f64> =
                item["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            // KV memory of a causal model is in bf16 here.
            let least = if case == "xlmr-embed" && !on_gpu() { 0.99999 } else { 0.999 };
            assert!(cosine(&got, expected) > least, "{case}: {}", cosine(&got, expected));
            let length: f64 = got.iter().map(|v| v * v).sum();
            assert!((length - 1.0).abs() < 1e-5, "{case}: length {length}");
        }
        let chat = json!({"model": "e", "messages": [{"role": "user", "content": "w5"}]});
        let refused = server.post("/v1/chat/completions", &chat);
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains("/v1/embeddings"), "{}", refused.body);
    }
}

#[test]
fn a_cross_encoder_scores_the_pair_that_transformers_scored() {
    let folder = folder("xlmr-rerank", 71, &[("<s>", 0), ("</s>", 2)]);
    let server = Server::start(&["--model", folder.path().to_str().unwrap(), "--served-model-name", "r"]);
    let words = |ids: &[u64]| ids.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ");
    let mut tried = 0;
    for (ids, logits) in prompts("xlmr-rerank") {
        // `<s> query </s></s> document </s>`, where the case has that form.
        let Some(middle) = ids.windows(2).position(|pair| pair == [2, 2]) else { continue };
        let (query, document) = (words(&ids[1..middle]), words(&ids[middle + 2..ids.len() - 1]));
        let body = json!({"model": "r", "query": query, "documents": ["w9 w8 w7", document]});
        let reply = server.post("/v1/rerank", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let json = reply.json();
        let results = json["results"].as_array().unwrap();
        let ours = results.iter().find(|r| r["index"] == 1).unwrap()["relevance_score"].as_f64().unwrap();
        let expected = 1.0 / (1.0 + (-logits[0]).exp());
        let most = if on_gpu() { 0.02 } else { 1e-4 };
        assert!((ours - expected).abs() < most, "{ours}, transformers says {expected}");
        tried += 1;
    }
    assert!(tried > 0, "no golden prompt has the form of a pair");
}

/// Which of the two words speaks for the document is what transformers says: with both swapped, the score would be
/// that of the opposite.
#[test]
fn a_causal_model_reranks_by_two_of_its_words_as_transformers_says() {
    const NO: u64 = 17;
    const YES: u64 = 44;
    let words = [("<s>", 0), ("</s>", 2), ("no", NO as usize), ("yes", YES as usize)];
    let folder = folder("qwen3-rerank", 61, &words);
    let path = folder.path().to_str().unwrap();
    let server = Server::start(&["--model", path, "--served-model-name", "r", "--task", "score"]);
    let text = |ids: &[u64]| ids.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ");
    let mut tried = 0;
    for (ids, logits) in prompts("qwen3-rerank") {
        if ids.iter().any(|id| [0, 2, NO, YES].contains(id)) {
            // Not all of it can be written.
            continue;
        }
        let (query, document) = ids.split_at(ids.len() / 2);
        // The golden case has the logits of "no" and "yes", in this order.
        let raw = logits[1] - logits[0];
        for (use_activation, expected, most) in [(true, 1.0 / (1.0 + (-raw).exp()), 0.02), (false, raw, 0.08)]
        {
            let body = json!({"model": "r", "text_1": text(query), "text_2": [text(document), "w9"],
                "use_activation": use_activation});
            let reply = server.post("/v1/score", &body);
            assert_eq!(reply.status, 200, "{}", reply.body);
            let json = reply.json();
            assert_eq!(json["usage"]["prompt_tokens"], ids.len() + query.len() + 1);
            let ours = json["data"][0]["score"].as_f64().unwrap();
            assert!((ours - expected).abs() < most, "{ours}, transformers says {expected}");
            assert!((expected - if use_activation { 0.5 } else { 0.0 }).abs() > 2.0 * most, "tells nothing");
        }
        tried += 1;
    }
    assert!(tried > 0, "no golden prompt can be written");
    assert_eq!(server.post("/v1/embeddings", &json!({"model": "r", "input": "w5"})).status, 400);
}

#[test]
fn tasks_that_a_model_cannot_do_are_refused_at_start() {
    let folder = folder("xlmr-embed", 71, &[("<s>", 0), ("</s>", 2)]);
    for task in ["generate", "score"] {
        let out = run(&["serve", "--port", "0", "--model", folder.path().to_str().unwrap(), "--task", task]);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("--task {task}")) && said.contains("XLMRobertaModel"), "{said}");
    }
}
