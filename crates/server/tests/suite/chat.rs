//! Chat: shapes, streams, and that a stream says what the whole answer says.

use mirai_server::api::chat::{ChatChunk, ChatResponse};
use serde_json::{Value, json};

use crate::client::{get, post, request};
use crate::support::*;

/// Text, finish reason and token ids of each choice of a stream.
pub fn assemble(events: &[Value]) -> Vec<(String, Option<String>, Vec<u64>)> {
    let mut choices: Vec<(String, Option<String>, Vec<u64>)> = Vec::new();
    for event in events {
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            if choices.len() <= index {
                choices.resize(index + 1, (String::new(), None, Vec::new()));
            }
            let piece = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or("");
            assert!(choices[index].1.is_none() || piece.is_empty(), "text after the end");
            choices[index].0.push_str(piece);
            if let Some(reason) = choice["finish_reason"].as_str() {
                choices[index].1 = Some(reason.to_owned());
            }
            if let Some(ids) = choice["token_ids"].as_array() {
                choices[index].2.extend(ids.iter().map(|id| id.as_u64().unwrap()));
            }
        }
    }
    choices
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_has_the_documented_shape() {
    let server = TestServer::plain().await;
    let answer = post(server.address, "/v1/chat/completions", &chat("hi", &json!({"max_tokens": 12}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let typed: ChatResponse = serde_json::from_slice(&answer.body).unwrap();
    assert!(typed.id.starts_with("chatcmpl-"));
    assert_eq!((typed.object.as_str(), typed.model.as_str()), ("chat.completion", MODEL));
    assert_eq!(typed.choices[0].message.role, "assistant");
    assert_eq!(typed.choices[0].finish_reason.as_deref(), Some("length"));
    assert_eq!(typed.usage.completion_tokens, 12);
    // "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" in tokens of one byte.
    assert_eq!(typed.usage.prompt_tokens, 1 + 5 + 2 + 1 + 1 + 1 + 10);
    assert_eq!(typed.usage.total_tokens, typed.usage.prompt_tokens + 12);
    assert_eq!(typed.usage.completion_tokens_details.reasoning_tokens, 0);
    assert_eq!(server.stop().await, mirai_server::ExitReason::Drained);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_the_whole_answer_says() {
    let server = TestServer::plain().await;
    for more in [
        json!({}),
        json!({"n": 3}),
        json!({"stop": ["a", "e b"]}),
        json!({"max_tokens": 200, "stop": "\n"}),
        json!({"temperature": 0, "max_tokens": 1}),
        json!({"stop": "z", "include_stop_str_in_output": true}),
    ] {
        let mut body = chat("the same question", &more);
        body["return_token_ids"] = json!(true);
        let whole = post(server.address, "/v1/chat/completions", &body).await.json();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let answer = post(server.address, "/v1/chat/completions", &body).await;
        assert_eq!(answer.header("content-type"), Some("text/event-stream"));
        assert_eq!(answer.header("x-accel-buffering"), Some("no"));
        let events = answer.events();
        for event in &events {
            serde_json::from_value::<ChatChunk>(event.clone()).unwrap_or_else(|e| panic!("{e}: {event}"));
        }
        let last = events.last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"], "{more}");
        assert_eq!(last["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
        assert!(events[..events.len() - 1].iter().all(|e| e["usage"].is_null()));
        let choices = assemble(&events);
        assert_eq!(choices.len(), whole["choices"].as_array().unwrap().len());
        for (i, (text, reason, ids)) in choices.iter().enumerate() {
            let other = &whole["choices"][i];
            assert_eq!(other["message"]["content"], *text, "{more}");
            assert_eq!(other["finish_reason"].as_str(), reason.as_deref());
            assert_eq!(other["token_ids"], json!(ids));
        }
        let roles = events.iter().filter(|e| e["choices"][0]["delta"]["role"] == "assistant").count();
        assert_eq!(roles, choices.len(), "one role chunk for each choice");
    }
    let texts = post(server.address, "/v1/chat/completions", &chat("x", &json!({"n": 3}))).await.json();
    assert_ne!(texts["choices"][0]["message"]["content"], texts["choices"][1]["message"]["content"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_end_before_themselves_and_count_exactly() {
    let server = TestServer::plain().await;
    let free =
        post(server.address, "/v1/chat/completions", &chat("q", &json!({"max_tokens": 300}))).await.json();
    let text = free["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let stop: String = text.chars().skip(20).take(4).collect();
    let at = text.find(&stop).unwrap();
    let body = chat("q", &json!({"max_tokens": 300, "stop": [stop], "return_token_ids": true}));
    let cut = post(server.address, "/v1/chat/completions", &body).await.json();
    let choice = &cut["choices"][0];
    assert_eq!(choice["message"]["content"], text[..at]);
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], stop);
    // One token is one byte: the answer, and the stop string.
    assert_eq!(cut["usage"]["completion_tokens"], (at + stop.len()) as u64);
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), at + stop.len());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_models_end_and_named_ends() {
    let server = TestServer::plain().await;
    let end = |more: Value| chat("q", &more);
    let answer =
        post(server.address, "/chat/completions", &end(json!({"allowed_token_ids": [EOS]}))).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["message"]["content"], "");
    assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    let body = end(json!({"allowed_token_ids": [120], "stop_token_ids": [120], "logprobs": true}));
    let answer = post(server.address, "/chat/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["stop_reason"], 120);
    assert_eq!(answer["choices"][0]["message"]["content"], "", "a stop token has no text");
    let body = end(json!({"allowed_token_ids": [EOS], "ignore_eos": true, "max_tokens": 5}));
    let answer = post(server.address, "/chat/completions", &body).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let body = end(
        json!({"allowed_token_ids": [EOS], "ignore_eos": true, "max_tokens": 2, "skip_special_tokens": false}),
    );
    let answer = post(server.address, "/chat/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "<|im_end|><|im_end|>");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_in_whole_and_stream() {
    let server = TestServer::plain().await;
    for as_ids in [false, true] {
        let more = json!({"logprobs": true, "top_logprobs": 2, "return_tokens_as_token_ids": as_ids});
        let mut body = chat("q", &more);
        let whole: ChatResponse =
            serde_json::from_slice(&post(server.address, "/v1/chat/completions", &body).await.body).unwrap();
        let list = whole.choices[0].logprobs.clone().unwrap().content;
        assert_eq!(list.len(), 16);
        assert_eq!(list[0].top_logprobs.len(), 2);
        assert!(list.iter().all(|entry| entry.logprob == -1.0));
        if as_ids {
            assert!(list[0].token.starts_with("token_id:"));
        } else {
            let bytes: Vec<u8> = list.iter().flat_map(|entry| entry.bytes.clone().unwrap()).collect();
            let text = whole.choices[0].message.content.clone().unwrap();
            assert_eq!(String::from_utf8_lossy(&bytes), text);
        }
        body["stream"] = json!(true);
        let events = post(server.address, "/v1/chat/completions", &body).await.events();
        let mut streamed = Vec::new();
        for event in events {
            let chunk: ChatChunk = serde_json::from_value(event).unwrap();
            streamed.extend(chunk.choices[0].logprobs.clone().map(|l| l.content).unwrap_or_default());
        }
        assert_eq!(streamed, list);
    }
    let body = chat("q", &json!({"prompt_logprobs": 1}));
    let whole = post(server.address, "/v1/chat/completions", &body).await;
    let typed: ChatResponse = serde_json::from_slice(&whole.body).unwrap();
    let list = typed.prompt_logprobs.unwrap();
    assert_eq!(list.len() as u64, typed.usage.prompt_tokens);
    assert!(list[0].is_none() && list[1].is_some());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_in_every_chunk_and_token_ids() {
    let server = TestServer::plain().await;
    let more = json!({"stream": true, "return_token_ids": true,
                      "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let events = post(server.address, "/v1/chat/completions", &chat("q", &more)).await.events();
    let counts: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.windows(2).all(|pair| pair[0] <= pair[1]) && counts.last() == Some(&16), "{counts:?}");
    assert!(events[0]["prompt_token_ids"].as_array().unwrap().len() > 10);
    assert_eq!(assemble(&events)[0].2.len(), 16);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefixes_are_cached_within_a_salt_only() {
    let server = TestServer::plain().await;
    let long = "a long shared beginning ".repeat(20);
    let cached = async |more: Value| {
        let answer = post(server.address, "/v1/chat/completions", &chat(&long, &more)).await.json();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(json!({})).await, 0);
    assert!(cached(json!({})).await > 400);
    assert_eq!(cached(json!({"cache_salt": "other"})).await, 0);
    assert!(cached(json!({"cache_salt": "other"})).await > 400);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_of_every_role_and_part() {
    let server = TestServer::plain().await;
    let messages = json!([
        {"role": "system", "content": "be kind"},
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": "hello", "name": "ada"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "thanks"},
    ]);
    let body = json!({"messages": messages, "max_tokens": 3, "tools": [{"type": "function"}], "tool_choice": "none",
                      "user": "someone", "metadata": {"a": 1}, "response_format": {"type": "text"},
                      "modalities": ["text"], "max_completion_tokens": 2});
    let answer = post(server.address, "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["usage"]["completion_tokens"], 2, "the newer name wins");
    let tokens = json!({"messages": messages});
    let tokens = post(server.address, "/tokenize", &tokens).await.json();
    assert_eq!(tokens["count"], answer.json()["usage"]["prompt_tokens"]);
    let open = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}],
                      "continue_final_message": true, "add_generation_prompt": false});
    let tokens = post(server.address, "/tokenize", &open).await.json();
    let text = post(server.address, "/detokenize", &json!({"tokens": tokens["tokens"]})).await.json();
    assert!(text["prompt"].as_str().unwrap().ends_with("b c"), "{text}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_tokens_version_and_document() {
    let server = TestServer::plain().await;
    let list = get(server.address, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, [MODEL, ALIAS]);
    assert_eq!(list["data"][0]["max_model_len"], CONTEXT);
    assert_eq!(list["data"][0]["owned_by"], "mirai");
    for path in ["/v1/models/org/tiny", "/models/org%2Ftiny", "/v1/models/tiny"] {
        assert_eq!(get(server.address, path).await.status, 200, "{path}");
    }
    assert_eq!(get(server.address, "/v1/models/other").await.json()["error"]["code"], "model_not_found");
    let tokens =
        post(server.address, "/tokenize", &json!({"prompt": "hé", "return_token_strs": true})).await.json();
    assert_eq!(tokens["tokens"], json!([104, 0xc3, 0xa9]));
    assert_eq!(tokens["token_strs"][0], "h");
    assert_eq!(get(server.address, "/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
    let document = get(server.address, "/openapi.json").await;
    assert_eq!(document.header("content-type"), Some("application/json"));
    assert_eq!(document.text(), mirai_server::openapi::COMMITTED);
    let head = request(server.address, "HEAD", "/health", &[("Connection", "close")], None);
    // The answer to HEAD has a length and no body: read by hand.
    drop(head);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_ours_and_the_callers_is_echoed() {
    let server = TestServer::plain().await;
    let body = chat("q", &json!({})).to_string();
    let send = async |id: &str| {
        request(
            server.address,
            "POST",
            "/v1/chat/completions",
            &[("X-Request-Id", id)],
            Some(body.as_bytes()),
        )
        .await
    };
    let (first, second) = tokio::join!(send("same-id"), send("same-id"));
    assert_eq!(first.header("x-request-id"), Some("same-id"));
    assert_ne!(first.json()["id"], second.json()["id"]);
    assert_eq!(first.json()["choices"], second.json()["choices"]);
    let strange = send("<script>").await;
    assert!(strange.header("x-request-id").unwrap().starts_with("req-"));
    server.stop().await;
}
