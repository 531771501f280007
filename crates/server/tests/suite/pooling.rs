//! Embeddings, rerank and score: shapes, sizes, faults, over encoders and causal models.

use std::sync::Arc;
use std::time::Duration;

use mirai_engine::sim::default_pool;
use mirai_engine::{EngineConfig, Geometry};
use mirai_server::{EmbedSpec, PairFormat, ScoreRule, ScoreSpec, Task};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::client::{Answer, post};
use crate::support::*;

pub const WIDTH: u32 = 8;
/// What an encoder's step holds.
const STEP: u32 = 512;

fn encoder(geometry: &mut Geometry) {
    geometry.groups.clear();
    (geometry.blocks, geometry.max_step_tokens) = (0, STEP);
    (geometry.generates, geometry.pools, geometry.whole_prompts) = (false, true, true);
}

fn causal(geometry: &mut Geometry) {
    (geometry.generates, geometry.pools) = (false, true);
}

/// Prompts with the byte `~` have a number that is not finite.
fn embed(prompt: &[u32]) -> Box<[f32]> {
    let mut values = default_pool(prompt, WIDTH as usize);
    if prompt.contains(&u32::from(b'~')) {
        values[3] = f32::NAN;
    }
    values
}

/// How many letters `x` the document has: more than one is relevant.
fn relevance(prompt: &[u32]) -> Box<[f32]> {
    let document = prompt.rsplit(|&id| id == 256).find(|part| !part.is_empty()).unwrap_or_default();
    Box::new([document.iter().filter(|&&id| id == u32::from(b'x')).count() as f32 - 1.0])
}

pub fn embedder() -> Options {
    let spec = EmbedSpec { width: WIDTH, matryoshka: true, normalize: true };
    Options { shape: encoder, pool: Some(Arc::new(embed)), task: Task::Embed(spec), ..Options::default() }
}

/// `<|im_start|> query <|im_start|><|im_start|> document <|im_end|>`.
pub fn scorer() -> Options {
    let pair = PairFormat::Tokens { before: vec![256], between: vec![256, 256], after: vec![257] };
    let spec = ScoreSpec { pair, rule: ScoreRule::Sigmoid };
    Options { shape: encoder, pool: Some(Arc::new(relevance)), task: Task::Score(spec), ..Options::default() }
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// What the model gives for these tokens, scaled to length 1.
fn expected(prompt: &[u32], dimensions: usize) -> Vec<f64> {
    let values: Vec<f64> = embed(prompt)[..dimensions].iter().map(|&v| f64::from(v)).collect();
    let length = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    values.iter().map(|v| v / length).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn close(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
}

async fn fine(server: &TestServer, path: &str, body: &Value) -> Value {
    let answer = post(server.address, path, body).await;
    assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    answer.json()
}

fn refused(answer: &Answer, code: &str, param: &str) {
    let error = &answer.json()["error"];
    assert_eq!(
        (answer.status, &error["code"], &error["param"]),
        (400, &json!(code), &json!(param)),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_of_every_kind_are_embedded() {
    let server = TestServer::start(embedder()).await;
    for path in ["/v1/embeddings", "/embeddings"] {
        for (input, prompts) in [
            (json!("salut"), vec![bytes("salut")]),
            (json!(["a", "bc"]), vec![bytes("a"), bytes("bc")]),
            (json!([7, 8, 9]), vec![vec![7, 8, 9]]),
            (json!([[7], [8, 9]]), vec![vec![7], vec![8, 9]]),
        ] {
            let answer = fine(&server, path, &json!({"model": MODEL, "input": input, "user": "u"})).await;
            let tokens: usize = prompts.iter().map(Vec::len).sum();
            assert_eq!(answer["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
            assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(MODEL)));
            let data = answer["data"].as_array().unwrap();
            assert_eq!(data.len(), prompts.len());
            for (index, (entry, prompt)) in data.iter().zip(&prompts).enumerate() {
                assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
                assert!(close(&numbers(&entry["embedding"]), &expected(prompt, 8)), "{entry}");
            }
            assert_eq!(answer.as_object().unwrap().len(), 4, "exactly as OpenAI's");
        }
    }
    // Clients put all kinds of things there.
    for user in [json!(1), json!([]), json!({}), Value::Null] {
        fine(&server, "/v1/embeddings", &json!({"input": "a", "user": user})).await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dimensions_scaling_and_encodings() {
    let server = TestServer::start(embedder()).await;
    let ask = async |more: Value| {
        let mut body = json!({"input": "texte"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fine(&server, "/v1/embeddings", &body).await["data"][0]["embedding"].clone()
    };
    let prompt = bytes("texte");
    assert!(close(&numbers(&ask(json!({"dimensions": 3})).await), &expected(&prompt, 3)));
    assert!(close(&numbers(&ask(json!({"dimensions": 8})).await), &expected(&prompt, 8)));
    let raw: Vec<f64> = embed(&prompt).iter().map(|&v| f64::from(v)).collect();
    assert!(close(&numbers(&ask(json!({"normalize": false})).await), &raw));
    assert!(close(&numbers(&ask(json!({"normalize": false, "dimensions": 2})).await), &raw[..2]));
    let (floats, coded) =
        (ask(json!({"encoding_format": "float"})).await, ask(json!({"encoding_format": "base64"})).await);
    let symbols = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = coded
        .as_str()
        .unwrap()
        .bytes()
        .filter_map(|c| symbols.iter().position(|s| *s == c))
        .flat_map(|value| (0..6).rev().map(move |bit| (value >> bit & 1) as u8))
        .collect();
    let raw: Vec<u8> = bits.chunks_exact(8).map(|b| b.iter().fold(0, |byte, bit| byte << 1 | bit)).collect();
    let back: Vec<f64> =
        raw.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect();
    assert!(close(&back, &numbers(&floats)));
    server.stop().await;
    let spec = EmbedSpec { width: WIDTH, matryoshka: false, normalize: false };
    let fixed = TestServer::start(Options { task: Task::Embed(spec), ..embedder() }).await;
    let answer = post(fixed.address, "/v1/embeddings", &json!({"input": "a", "dimensions": 3})).await;
    refused(&answer, "invalid_value", "dimensions");
    let answer = fine(&fixed, "/v1/embeddings", &json!({"input": "a", "dimensions": 8})).await;
    let raw: Vec<f64> = embed(&bytes("a")).iter().map(|&v| f64::from(v)).collect();
    assert!(close(&numbers(&answer["data"][0]["embedding"]), &raw));
    fixed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_items_are_refused_or_cut() {
    let server = TestServer::start(embedder()).await;
    let card = crate::client::get(server.address, "/v1/models").await.json();
    assert_eq!(card["data"][0]["max_model_len"], STEP, "what one step holds is what is published");
    let long = "a".repeat(STEP as usize + 1);
    let refusal = post(server.address, "/v1/embeddings", &json!({"input": ["a", long]})).await;
    refused(&refusal, "context_length_exceeded", "input[1]");
    let ids = json!({"input": vec![5; STEP as usize + 1]});
    refused(&post(server.address, "/v1/embeddings", &ids).await, "context_length_exceeded", "input[0]");
    for (more, left) in [
        (json!({"truncate": true}), STEP),
        (json!({"truncate": "END"}), STEP),
        (json!({"truncate_prompt_tokens": -1}), STEP),
        (json!({"truncate_prompt_tokens": 17, "truncate": true}), 17),
    ] {
        for input in [json!(long), json!(vec![97; STEP as usize + 1])] {
            let mut body = json!({"input": input});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let answer = fine(&server, "/v1/embeddings", &body).await;
            assert_eq!(answer["usage"]["prompt_tokens"], left);
            let cut = vec![97; left as usize];
            assert!(close(&numbers(&answer["data"][0]["embedding"]), &expected(&cut, 8)));
        }
    }
    let whole = fine(&server, "/v1/embeddings", &json!({"input": "a".repeat(STEP as usize)})).await;
    assert_eq!(whole["usage"]["prompt_tokens"], STEP);
    server.stop().await;
}

/// The tokenizer's limit of bytes is no other limit for whoever wants long texts cut.
#[tokio::test(flavor = "multi_thread")]
async fn texts_beyond_the_limit_of_bytes_are_cut_too() {
    // 64 bytes for each token of the context; its last byte is in the middle of a character.
    let long = format!("a{}", "é".repeat(CONTEXT as usize * 33));
    let limit = CONTEXT as usize * 64;
    assert!(long.len() > limit && !long.is_char_boundary(limit));
    let server = TestServer::start(embedder()).await;
    let answer = post(server.address, "/v1/embeddings", &json!({"input": [long]})).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("input[0]")));
    let answer = fine(&server, "/v1/embeddings", &json!({"input": [long], "truncate": true})).await;
    assert_eq!(answer["usage"]["prompt_tokens"], STEP);
    let cut = &bytes(&long)[..STEP as usize];
    assert!(close(&numbers(&answer["data"][0]["embedding"]), &expected(cut, 8)));
    server.stop().await;

    let texts = PairFormat::Text {
        before: "<|im_start|>".to_owned(),
        query: "Q".to_owned(),
        document: "D".to_owned(),
        after: "<|im_end|>".to_owned(),
    };
    let judge = Task::Score(ScoreSpec { pair: texts, rule: ScoreRule::Sigmoid });
    for options in [scorer(), Options { task: judge, ..scorer() }] {
        let server = TestServer::start(options).await;
        let body = json!({"query": "q", "documents": [long], "truncate": true});
        assert_eq!(fine(&server, "/v1/rerank", &body).await["usage"]["total_tokens"], STEP);
        let body = json!({"query": long, "documents": ["x"], "truncate": true});
        let answer = post(server.address, "/v1/rerank", &body).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("query[0]")), "never cut");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_ranked() {
    let server = TestServer::start(scorer()).await;
    let documents = json!(["o", "xxx", {"text": "xx", "title": "t"}, "x"]);
    for path in ["/v1/rerank", "/v2/rerank", "/rerank"] {
        let body = json!({"model": MODEL, "query": "q", "documents": documents});
        let answer = fine(&server, path, &body).await;
        let results = answer["results"].as_array().unwrap();
        let order: Vec<u64> = results.iter().map(|r| r["index"].as_u64().unwrap()).collect();
        assert_eq!(order, [1, 2, 3, 0]);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (result, logit) in results.iter().zip([2.0, 1.0, 0.0, -1.0]) {
            assert!((result["relevance_score"].as_f64().unwrap() - sigmoid(logit)).abs() < 1e-12);
        }
        assert_eq!(results[1]["document"], json!({"text": "xx"}));
        // Query, document and four special tokens.
        let tokens = 4 * (1 + 4) + 1 + 3 + 2 + 1;
        assert_eq!(answer["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
        assert!(answer["id"].as_str().unwrap().starts_with("rerank-"));
    }
    let ask = async |more: Value| {
        let mut body = json!({"query": "q", "documents": documents});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fine(&server, "/v2/rerank", &body).await["results"].clone()
    };
    assert_eq!(ask(json!({"top_n": 2})).await.as_array().unwrap().len(), 2);
    assert_eq!(ask(json!({"top_n": 0})).await.as_array().unwrap().len(), 4);
    assert_eq!(ask(json!({"top_n": 99})).await.as_array().unwrap().len(), 4);
    assert!(ask(json!({"return_documents": false})).await[0].get("document").is_none());
    for raw in [json!({"use_activation": false}), json!({"raw_scores": true})] {
        assert_eq!(ask(raw).await[0]["relevance_score"], 2.0);
    }
    server.stop().await;
    let mut options = scorer();
    options.config.rerank_documents_as_text = true;
    let server = TestServer::start(options).await;
    let answer = fine(&server, "/v1/rerank", &json!({"query": "q", "documents": ["x"]})).await;
    assert_eq!(answer["results"][0]["document"], "x");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_are_scored() {
    let server = TestServer::start(scorer()).await;
    for (names, first, second, scores) in [
        (["text_1", "text_2"], json!("q"), json!("x"), vec![0.5]),
        (["text_1", "text_2"], json!("q"), json!(["x", "x"]), vec![0.5, 0.5]),
        (["queries", "documents"], json!(["q"]), json!(["x", "x"]), vec![0.5, 0.5]),
        (["queries", "items"], json!(["q", "r"]), json!(["x", "x"]), vec![0.5, 0.5]),
    ] {
        for path in ["/v1/score", "/score"] {
            let answer = fine(&server, path, &json!({names[0]: first, names[1]: second})).await;
            let data = answer["data"].as_array().unwrap();
            let got: Vec<f64> = data.iter().map(|entry| entry["score"].as_f64().unwrap()).collect();
            assert_eq!(got, scores);
            assert!(data.iter().all(|entry| entry["object"] == "score"));
            assert_eq!(answer["usage"]["prompt_tokens"], 6 * scores.len());
            assert!(answer["created"].as_u64().unwrap() > 0);
        }
    }
    // The end of a document is cut, its query never.
    let body =
        json!({"text_1": "q", "text_2": "x".repeat(600), "truncate_prompt_tokens": 8, "raw_scores": true});
    let answer = fine(&server, "/v1/score", &body).await;
    assert_eq!((&answer["data"][0]["score"], &answer["usage"]["total_tokens"]), (&json!(2.0), &json!(8)));
    let body = json!({"text_1": "q", "text_2": "x".repeat(600)});
    refused(&post(server.address, "/v1/score", &body).await, "context_length_exceeded", "text_2[0]");
    let body = json!({"text_1": "q".repeat(600), "text_2": "x", "truncate": true});
    refused(&post(server.address, "/v1/score", &body).await, "context_length_exceeded", "text_1[0]");
    server.stop().await;
}

/// The way of models that were taught with a template: two logits, of which one says yes.
#[tokio::test(flavor = "multi_thread")]
async fn templates_and_two_logits() {
    let pair = PairFormat::Text {
        before: "<|im_start|>judge ".to_owned(),
        query: "Q:".to_owned(),
        document: " D:".to_owned(),
        after: "<|im_end|>".to_owned(),
    };
    let pool = |prompt: &[u32]| -> Box<[f32]> {
        let expected: Vec<u32> = [vec![256], bytes("judge Q:q D:<|im_end|>x"), vec![257]].concat();
        Box::new([0.0, if prompt == expected { 3f32.ln() } else { 0.0 }])
    };
    let spec = ScoreSpec { pair, rule: ScoreRule::Softmax { index: 1 } };
    let options =
        Options { shape: causal, pool: Some(Arc::new(pool)), task: Task::Score(spec), ..Options::default() };
    let server = TestServer::start(options).await;
    // What a client writes is never a special token.
    let body = json!({"query": "q", "documents": ["<|im_end|>x", "other"]});
    let answer = fine(&server, "/v1/rerank", &body).await;
    assert!((answer["results"][0]["relevance_score"].as_f64().unwrap() - 0.75).abs() < 1e-6, "{answer}");
    assert_eq!(answer["results"][1]["relevance_score"], 0.5);
    let body = json!({"query": "q", "documents": ["y".repeat(5000)], "truncate_prompt_tokens": 30});
    assert_eq!(fine(&server, "/v1/rerank", &body).await["usage"]["total_tokens"], 30);
    // Pairs of one query share its blocks in a causal model's prefix cache, whatever their documents are.
    let cached = async || server.metric("mirai_cached_tokens_total").await;
    let pair = |document: &str| json!({"query": "q".repeat(64), "documents": [document]});
    let before = cached().await;
    fine(&server, "/v1/rerank", &pair("y")).await;
    assert_eq!(cached().await, before, "nobody has asked this before");
    fine(&server, "/v1/rerank", &pair("z")).await;
    // 76 tokens come before the document: four whole blocks of 16.
    assert_eq!(cached().await, before + 64.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_endpoint_says_which_is_right() {
    let calls = [
        ("/v1/embeddings", json!({"input": "a"})),
        ("/v1/rerank", json!({"query": "q", "documents": ["a"]})),
        ("/v1/score", json!({"text_1": "q", "text_2": "a"})),
        ("/v1/chat/completions", chat("q", &json!({}))),
        ("/v1/completions", completion(&json!("q"), &json!({}))),
    ];
    for (options, own, hint) in [
        (Options::default(), vec![3, 4], "chat/completions"),
        (embedder(), vec![0], "/v1/embeddings"),
        (scorer(), vec![1, 2], "/v1/rerank"),
    ] {
        let server = TestServer::start(options).await;
        for (at, (path, body)) in calls.iter().enumerate() {
            let answer = post(server.address, path, body).await;
            if own.contains(&at) {
                assert_eq!(answer.status, 200, "{path}: {}", answer.text());
                continue;
            }
            refused(&answer, "wrong_task", "model");
            assert!(answer.text().contains(hint), "{}", answer.text());
            let mut other = body.clone();
            other["model"] = json!("nothing");
            assert_eq!(post(server.address, path, &other).await.status, 404);
        }
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_are_each_alone() {
    for options in [embedder(), Options { shape: causal, ..embedder() }] {
        let server = Arc::new(TestServer::start(options).await);
        let text = |i: usize| format!("{}{i}", "texte commun ".repeat(i % 7));
        let mut alone = Vec::new();
        for i in 0..32 {
            alone.push(fine(&server, "/v1/embeddings", &json!({"input": text(i)})).await);
        }
        let mut calls = JoinSet::new();
        for i in 0..32 {
            let server = server.clone();
            let body = json!({"input": text(i)});
            calls.spawn(async move { (i, fine(&server, "/v1/embeddings", &body).await) });
        }
        while let Some(result) = calls.join_next().await {
            let (i, answer) = result.unwrap();
            assert_eq!(answer, alone[i]);
        }
        // The same in one call.
        let batch =
            fine(&server, "/v1/embeddings", &json!({"input": (0..32).map(text).collect::<Vec<_>>()})).await;
        for (i, entry) in batch["data"].as_array().unwrap().iter().enumerate() {
            assert_eq!(entry["embedding"], alone[i]["data"][0]["embedding"]);
        }
    }
}

/// A call has more items than the engine's queue and slots: it waits for its own, and is not refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_may_be_longer_than_the_queue() {
    let engine = EngineConfig { max_queued_requests: 3, ..EngineConfig::default() };
    let server = TestServer::start(Options { engine, slots: 2, ..embedder() }).await;
    let texts: Vec<String> = (0..600).map(|i| format!("t{i}")).collect();
    let answer = fine(&server, "/v1/embeddings", &json!({"input": texts})).await;
    let data = answer["data"].as_array().unwrap();
    assert_eq!(data.len(), 600);
    for (i, entry) in data.iter().enumerate() {
        assert!(close(&numbers(&entry["embedding"]), &expected(&bytes(&texts[i]), 8)), "{i}");
    }
    let tokens: usize = texts.iter().map(String::len).sum();
    assert_eq!(server.metric("mirai_prompt_tokens_total").await, tokens as f64);
    assert_eq!(server.metric("mirai_request_prompt_tokens_count").await, 600.0);
    assert_eq!(server.metric("mirai_request_prompt_tokens_sum").await, tokens as f64);
    assert_eq!(server.metric("mirai_streams").await, 0.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_item_fails_its_call_and_nothing_else() {
    let server = TestServer::start(Options { step: Duration::from_micros(500), ..embedder() }).await;
    let texts: Vec<String> =
        (0..200).map(|i| if i == 60 { "~".to_owned() } else { format!("t{i}") }).collect();
    let bodies = [json!({"input": texts}), json!({"input": "ok"})];
    let (bad, good) = tokio::join!(
        post(server.address, "/v1/embeddings", &bodies[0]),
        fine(&server, "/v1/embeddings", &bodies[1]),
    );
    let error = &bad.json()["error"];
    assert_eq!((bad.status, &error["code"]), (500, &json!("numerical_fault")));
    assert!(error["message"].as_str().unwrap().starts_with("item 60: "), "{error}");
    assert!(close(&numbers(&good["data"][0]["embedding"]), &expected(&bytes("ok"), 8)));
    server
        .until("streams released", Duration::from_secs(5), async |s| s.metric("mirai_streams").await == 0.0)
        .await;
    assert!(server.metric("mirai_corrupted_choices_total").await >= 1.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_items_along() {
    let server = TestServer::start(Options { step: Duration::from_millis(20), slots: 1, ..embedder() }).await;
    let body = json!({"input": (0..400).map(|i| format!("t{i}")).collect::<Vec<_>>()}).to_string();
    let mut bytes = crate::client::head("POST", "/v1/embeddings", &[], Some(body.len()));
    bytes.extend_from_slice(body.as_bytes());
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, &bytes).await.unwrap();
    server
        .until("items with the engine", PATIENCE, async |s| {
            s.metric("mirai_streams").await == 1.0 && s.engine.counters().running > 0
        })
        .await;
    drop(stream);
    server
        .until("nothing left", Duration::from_secs(5), async |s| {
            let counters = s.engine.counters();
            s.metric("mirai_streams").await == 0.0 && counters.running + counters.waiting == 0
        })
        .await;
    // 400 steps would be 8 s.
    assert_eq!(server.metric("mirai_disconnects_total").await, 1.0);
    server.stop().await;
}

/// Documents outlive their body where the answer repeats them: they stay within the budget of bodies.
#[tokio::test(flavor = "multi_thread")]
async fn documents_that_an_answer_repeats_are_held_within_the_budget() {
    let mut options = Options { slots: 1, ..scorer() };
    (options.config.limits.max_body_bytes, options.config.limits.max_inflight_body_bytes) = (4096, 4096);
    let server = TestServer::start(options).await;
    let document = "x".repeat(300);
    let body = |repeated: bool| json!({"query": "q", "documents": vec![&document; 10], "return_documents": repeated});
    for (repeated, held, status) in [(false, 0.0, 200), (true, 3000.0, 503)] {
        server.engine.hooks().freeze();
        server.until("a standstill", PATIENCE, async |s| s.engine.hooks().is_frozen()).await;
        let call = {
            let (address, body) = (server.address, body(repeated));
            tokio::spawn(async move { post(address, "/v1/rerank", &body).await })
        };
        server
            .until("items with the engine", PATIENCE, async |s| {
                s.metric("mirai_queued_requests").await == 10.0
            })
            .await;
        assert_eq!(server.metric("mirai_http_body_bytes").await, held);
        let beside = {
            let (address, body) = (server.address, body(false));
            tokio::spawn(async move { post(address, "/v1/rerank", &body).await })
        };
        if status == 503 {
            // The engine stands still: only a refusal comes.
            let answer = beside.await.unwrap();
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("overloaded")));
            server.engine.hooks().thaw();
        } else {
            server.engine.hooks().thaw();
            assert_eq!(beside.await.unwrap().status, 200);
        }
        let answer = call.await.unwrap().json();
        assert_eq!(answer["results"][0].get("document").is_some(), repeated);
        server
            .until("the budget given back", PATIENCE, async |s| {
                s.metric("mirai_http_body_bytes").await == 0.0
            })
            .await;
    }
    server.stop().await;
}

/// The queue counts items, so its rate must: a call of many items is not one request.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_of_items_is_not_said_to_drain_as_slowly_as_calls() {
    let engine = EngineConfig { max_queued_requests: 200, ..EngineConfig::default() };
    let server = TestServer::start(Options { engine, ..embedder() }).await;
    let items = |count: usize| json!({"input": vec!["a"; count]});
    fine(&server, "/v1/embeddings", &items(200)).await;
    server.engine.hooks().freeze();
    server.until("a standstill", PATIENCE, async |s| s.engine.hooks().is_frozen()).await;
    let (address, body) = (server.address, items(200));
    let waiting = tokio::spawn(async move { post(address, "/v1/embeddings", &body).await });
    server
        .until("the queue to fill", PATIENCE, async |s| s.metric("mirai_queued_requests").await == 200.0)
        .await;
    let refused = post(server.address, "/v1/embeddings", &items(1)).await;
    let after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    // 200 items ended within the last ten seconds, and a tenth of 200 has to. As calls: twenty seconds or more.
    assert!(refused.status == 503 && after <= 2, "{after}");
    server.engine.hooks().thaw();
    assert_eq!(waiting.await.unwrap().status, 200);
    server.stop().await;
}

/// It was the server that ended it: no client has left.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_call_is_no_disconnect() {
    let engine = EngineConfig { max_queued_requests: 1, ..EngineConfig::default() };
    let server = TestServer::start(Options { engine, slots: 1, ..embedder() }).await;
    server.engine.hooks().freeze();
    let address = server.address;
    let first = tokio::spawn(async move { post(address, "/v1/embeddings", &json!({"input": "a"})).await });
    server
        .until("the queue to fill", PATIENCE, async |s| s.metric("mirai_queued_requests").await == 1.0)
        .await;
    for _ in 0..5 {
        let answer = post(address, "/v1/embeddings", &json!({"input": ["b", "c"]})).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("overloaded")));
    }
    server.engine.hooks().thaw();
    assert_eq!(first.await.unwrap().status, 200);
    server.until("streams released", PATIENCE, async |s| s.metric("mirai_streams").await == 0.0).await;
    assert_eq!(server.metric("mirai_disconnects_total").await, 0.0);
    assert_eq!(server.metric("mirai_prompt_tokens_total").await, 1.0, "refused items are none");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drains_and_dead_engines_end_calls() {
    let mut options = Options { step: Duration::from_millis(50), slots: 1, ..embedder() };
    options.config.timeouts.shutdown_seconds = 0.1;
    let server = TestServer::start(options).await;
    let (address, body) =
        (server.address, json!({"input": (0..300).map(|i| format!("t{i}")).collect::<Vec<_>>()}));
    let call = tokio::spawn(async move { post(address, "/v1/embeddings", &body).await });
    server
        .until("items with the engine", Duration::from_secs(5), async |s| {
            s.metric("mirai_prompt_tokens_total").await > 10.0
        })
        .await;
    server.handle.shutdown();
    let answer = call.await.unwrap();
    assert_eq!(answer.status, 503, "{}", answer.text());
    server.run.await.unwrap();
    let server = TestServer::start(embedder()).await;
    server.engine.hooks().fail_device();
    let answer = post(server.address, "/v1/embeddings", &json!({"input": ["a", "b"]})).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("engine_stopped")));
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_of_calls_are_limited() {
    let mut options = embedder();
    (options.config.limits.max_items, options.config.limits.max_item_tokens) = (3, 20);
    let server = TestServer::start(options).await;
    fine(&server, "/v1/embeddings", &json!({"input": ["a", "b", "c"]})).await;
    let answer = post(server.address, "/v1/embeddings", &json!({"input": ["a", "b", "c", "d"]})).await;
    refused(&answer, "invalid_value", "input");
    let answer =
        post(server.address, "/v1/embeddings", &json!({"input": ["a".repeat(10), "b".repeat(11)]})).await;
    refused(&answer, "invalid_value", "input");
    // One item is limited by the model alone.
    fine(&server, "/v1/embeddings", &json!({"input": "a".repeat(30)})).await;
    server.stop().await;
}

/// What is beyond the limit is not even tokenized: the fault of a later item is never seen.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_counted_while_items_are_made() {
    let limited = |mut options: Options| {
        options.config.limits.max_item_tokens = 20;
        options
    };
    let server = TestServer::start(limited(embedder())).await;
    let long = "a".repeat(STEP as usize + 1);
    for input in [json!(["a".repeat(21), "b", long]), json!([vec![5; 21], [5], vec![5; STEP as usize + 1]])] {
        let answer = post(server.address, "/v1/embeddings", &json!({"input": input})).await;
        refused(&answer, "invalid_value", "input");
        assert!(
            answer.text().contains("3 items") && answer.text().contains("20 tokens"),
            "{}",
            answer.text()
        );
    }
    // Cut before they are counted.
    let body = json!({"input": [long, "a".repeat(10)], "truncate_prompt_tokens": 10});
    assert_eq!(fine(&server, "/v1/embeddings", &body).await["usage"]["total_tokens"], 20);
    server.stop().await;

    let server = TestServer::start(limited(scorer())).await;
    // Four special tokens and the query's three: three times that is too much, whatever the documents are.
    let body = json!({"query": "qqq", "documents": [long, "", ""]});
    refused(&post(server.address, "/v1/rerank", &body).await, "invalid_value", "documents");
    let body = json!({"text_1": "qqq", "text_2": [long, "", ""]});
    refused(&post(server.address, "/v1/score", &body).await, "invalid_value", "text_2");
    // Twice that leaves six.
    let body = json!({"query": "qqq", "documents": ["xxx", "xxx"]});
    fine(&server, "/v1/rerank", &body).await;
    let body = json!({"query": "qqq", "documents": ["x".repeat(14), long]});
    refused(&post(server.address, "/v1/rerank", &body).await, "invalid_value", "documents");
    let body = json!({"queries": ["q", "q", "q".repeat(600)], "documents": ["x".repeat(16), "x", "x"]});
    refused(&post(server.address, "/v1/score", &body).await, "invalid_value", "documents");
    server.stop().await;
}

/// (path, field, JSON text) that must be a 400.
fn bad() -> Vec<(&'static str, &'static str, String)> {
    let mut list = Vec::new();
    let mut add = |paths: &[&'static str], field: &'static str, values: &[&str]| {
        for &path in paths {
            list.extend(values.iter().map(|value| (path, field, (*value).to_owned())));
        }
    };
    let (embed, rank, score) = ("/v1/embeddings", "/v2/rerank", "/v1/score");
    let all = [embed, rank, score];
    add(&all, "model", &["1", "[]", "{}", "true"]);
    add(
        &all,
        "truncate_prompt_tokens",
        &["0", "-2", "513", "1.5", "\"5\"", "[]", "true", "9223372036854775808"],
    );
    add(&all, "truncate", &["1", "\"START\"", "\"end\"", "[]", "{}"]);
    add(
        &[embed],
        "input",
        &[
            "null",
            "[]",
            "1",
            "true",
            "{}",
            "\"\"",
            "[\"\"]",
            "[[]]",
            "[1.5]",
            "[-1]",
            "[264]",
            "[4294967296]",
            "[\"a\",1]",
            "[1,\"a\"]",
            "[[1],\"a\"]",
            "[[264]]",
            "[null]",
            "[[null]]",
            "[[[1]]]",
        ],
    );
    add(&[embed], "encoding_format", &["1", "\"\"", "\"int8\"", "[]"]);
    add(&[embed], "dimensions", &["0", "9", "-1", "1.5", "\"5\"", "4294967296", "[]", "true"]);
    add(&[embed], "normalize", &["1", "\"true\"", "[]"]);
    add(&[embed], "add_special_tokens", &["1", "\"true\"", "[]"]);
    add(&[rank], "query", &["null", "\"\"", "1", "[]", "[\"q\"]", "{}"]);
    add(
        &[rank],
        "documents",
        &["null", "[]", "\"x\"", "1", "[1]", "[null]", "[{}]", "[{\"text\":1}]", "[[\"x\"]]"],
    );
    add(&[rank], "top_n", &["-1", "1.5", "\"5\"", "4294967296", "[]", "true"]);
    add(&[rank], "return_documents", &["1", "\"true\"", "[]"]);
    add(&[rank, score], "use_activation", &["1", "\"true\"", "[]"]);
    add(&[rank, score], "raw_scores", &["1", "\"true\"", "[]"]);
    add(&[score], "text_1", &["null", "[]", "1", "{}", "[1]", "[null]", "[\"a\",\"b\"]"]);
    add(&[score], "text_2", &["null", "[]", "1", "{}", "[1]", "[null]", "[[\"a\"]]"]);
    add(&[score], "items", &["\"x\""]);
    add(&[score], "queries", &["\"x\""]);
    list.push((embed, "input", json!(vec!["x"; 2049]).to_string()));
    list.push((rank, "documents", json!(vec!["x"; 2049]).to_string()));
    list.push((score, "text_2", json!(vec!["x"; 2049]).to_string()));
    list
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_refuses_what_it_cannot_mean() {
    let (embedder, scorer) = (TestServer::start(embedder()).await, TestServer::start(scorer()).await);
    for (path, field, value) in bad() {
        let (server, base) = match path {
            "/v1/embeddings" => (&embedder, json!({"input": "a"})),
            "/v2/rerank" => (&scorer, json!({"query": "q", "documents": ["a"]})),
            _ => (&scorer, json!({"text_1": "q", "text_2": ["a", "b", "c"]})),
        };
        let mut map = base.as_object().unwrap().clone();
        map.remove(field);
        let rest = Value::Object(map).to_string();
        let comma = if rest == "{}" { "" } else { "," };
        let body = format!("{{{field:?}:{value}{comma}{}", &rest[1..]);
        let answer = crate::client::request(server.address, "POST", path, &[], Some(body.as_bytes())).await;
        let shown = &body[..body.len().min(200)];
        assert_eq!(answer.status, 400, "{path} {shown}: {}", answer.text());
        let error = &answer.json()["error"];
        let param = error["param"].as_str().unwrap_or_default();
        assert!(param.starts_with(field), "{path} {shown}: {error}");
    }
    for server in [embedder, scorer] {
        assert_eq!(server.metric("mirai_panics_total").await, 0.0);
        server.stop().await;
    }
}
