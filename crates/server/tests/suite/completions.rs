//! Completions: prompts of every kind, echo, legacy log-probabilities, gaps.

use mirai_server::api::completions::{CompletionChunk, CompletionResponse};
use serde_json::{Value, json};

use crate::chat::assemble;
use crate::client::post;
use crate::support::*;

async fn complete(server: &TestServer, body: &Value) -> CompletionResponse {
    let answer = post(server.address, "/v1/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_slice(&answer.body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_and_ids_are_the_same_prompts() {
    let server = TestServer::plain().await;
    let one = complete(&server, &completion(&json!("ab"), &json!({}))).await;
    assert_eq!(one.object, "text_completion");
    assert_eq!((one.usage.prompt_tokens, one.usage.completion_tokens), (2, 16));
    let ids = complete(&server, &completion(&json!([97, 98]), &json!({}))).await;
    assert_eq!(one.choices, ids.choices);
    let many = complete(&server, &completion(&json!(["ab", "cd"]), &json!({"n": 2}))).await;
    assert_eq!(many.choices.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(many.choices[0].text, one.choices[0].text);
    assert_eq!((many.usage.prompt_tokens, many.usage.completion_tokens), (4, 64));
    let many_ids = complete(&server, &completion(&json!([[97, 98], [99, 100]]), &json!({"n": 2}))).await;
    assert_eq!(many.choices, many_ids.choices);
    let empty = complete(&server, &completion(&json!(""), &json!({}))).await;
    assert_eq!(empty.usage.prompt_tokens, 1, "an empty prompt is the token that begins a text");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_with_and_without_output() {
    let server = TestServer::plain().await;
    let plain = complete(&server, &completion(&json!("héllo"), &json!({}))).await;
    for prompt in [json!("héllo"), json!("héllo".as_bytes())] {
        let body = completion(&prompt, &json!({"echo": true, "logprobs": 1}));
        let echoed = complete(&server, &body).await;
        assert_eq!(echoed.choices[0].text, format!("héllo{}", plain.choices[0].text));
        let logprobs = echoed.choices[0].logprobs.clone().unwrap();
        assert_eq!(logprobs.tokens.len(), 6 + 16);
        assert_eq!(logprobs.token_logprobs[0], None);
        assert_eq!(logprobs.token_logprobs[1], Some(-1.0));
        assert!(logprobs.top_logprobs[0].is_none() && logprobs.top_logprobs[1].is_some());
        assert!(logprobs.text_offset.windows(2).all(|pair| pair[0] < pair[1]));
    }
    let only = complete(
        &server,
        &completion(&json!("héllo"), &json!({"echo": true, "max_tokens": 0, "logprobs": 0})),
    )
    .await;
    assert_eq!(only.choices[0].text, "héllo");
    assert_eq!(only.usage.completion_tokens, 0);
    assert_eq!(only.choices[0].logprobs.clone().unwrap().tokens.len(), 6);
    assert_eq!(only.choices[0].finish_reason.as_deref(), Some("length"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_many_prompts() {
    let server = TestServer::plain().await;
    for more in
        [json!({}), json!({"echo": true, "logprobs": 2}), json!({"logprobs": 1, "return_token_ids": true})]
    {
        let mut body = completion(&json!(["ab", "cd", "ef"]), &more);
        body["n"] = json!(2);
        let whole = complete(&server, &body).await;
        body["stream"] = json!(true);
        let events = post(server.address, "/v1/completions", &body).await.events();
        let mut logprobs: Vec<Vec<String>> = vec![Vec::new(); 6];
        for event in &events {
            let chunk: CompletionChunk = serde_json::from_value(event.clone()).unwrap();
            let choice = &chunk.choices[0];
            logprobs[choice.index as usize].extend(choice.logprobs.clone().unwrap_or_default().tokens);
        }
        for (i, (text, reason, _)) in assemble(&events).iter().enumerate() {
            assert_eq!(whole.choices[i].text, *text);
            assert_eq!(&whole.choices[i].finish_reason, reason);
            assert_eq!(whole.choices[i].logprobs.clone().unwrap_or_default().tokens, logprobs[i]);
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_need_their_tokens() {
    let server = TestServer::plain().await;
    let body = completion(&json!("def f():"), &json!({"suffix": "return x"}));
    let refused = post(server.address, "/v1/completions", &body).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("suffix")));
    server.stop().await;
    let server = TestServer::start(Options { fim: true, ..Options::default() }).await;
    let answer = complete(&server, &body).await;
    assert_eq!(answer.usage.prompt_tokens, 1 + 3 + 8 + 8, "a beginning, three marks, two texts");
    let named = completion(&json!("<|bos|>"), &json!({"suffix": "<|im_end|>"}));
    let answer = complete(&server, &named).await;
    assert_eq!(answer.usage.prompt_tokens, 1 + 3 + 7 + 10, "names of marks around the gap are text");
    let echo = completion(&json!("a"), &json!({"suffix": "b", "echo": true}));
    assert_eq!(post(server.address, "/v1/completions", &echo).await.status, 400);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn caps_and_context() {
    let server = TestServer::plain().await;
    let prompt = "x".repeat(CONTEXT as usize - 5);
    let mut body = json!({"prompt": prompt, "seed": 1});
    assert_eq!(complete(&server, &body).await.usage.completion_tokens, 5, "the rest of the context");
    body["max_tokens"] = json!(5);
    assert_eq!(complete(&server, &body).await.usage.completion_tokens, 5);
    body["max_tokens"] = json!(6);
    let refused = post(server.address, "/v1/completions", &body).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    server.stop().await;
    let mut options = Options::default();
    options.config.limits.max_output_tokens = Some(7);
    let server = TestServer::start(options).await;
    let answer = complete(&server, &json!({"prompt": "x"})).await;
    assert_eq!(answer.usage.completion_tokens, 7);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_template_only_completions() {
    let server = TestServer::start(Options { template: false, ..Options::default() }).await;
    let refused = post(server.address, "/v1/chat/completions", &chat("x", &json!({}))).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("unsupported_parameter")));
    complete(
        &server,
        &completion(&json!("x"), &json!({"bad_words": ["abc", " d"], "logit_bias": {"97": -3.5}})),
    )
    .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_possible_token_is_the_requests_own_error() {
    let server = TestServer::plain().await;
    server.engine.hooks().inject(
        mirai_engine::hooks::Victim::Seed(77),
        3,
        mirai_engine::hooks::Injection::Fault(mirai_engine::RowFault::NothingAllowed),
    );
    let refused =
        post(server.address, "/v1/completions", &completion(&json!("x"), &json!({"seed": 77}))).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("no_token_possible")));
    server.stop().await;
}
