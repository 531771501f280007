//! Metrics agree with what clients got, and their number does not grow.

use std::collections::BTreeSet;

use serde_json::json;

use crate::client::{get, post, request};
use crate::support::*;

fn series(page: &str) -> BTreeSet<String> {
    page.lines().filter(|l| !l.starts_with('#')).map(|l| l.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_clients_are_tokens_of_metrics() {
    let server = TestServer::plain().await;
    let (mut prompt, mut completion_tokens, mut cached) = (0, 0, 0);
    for i in 0..20 {
        let more = json!({"n": i % 3 + 1, "max_tokens": 5 + i, "stop": if i % 4 == 0 { json!("a") } else { json!(null) }});
        let mut body = chat("the same question every time, long enough to share blocks of tokens", &more);
        let usage = if i % 2 == 0 {
            post(server.address, "/v1/chat/completions", &body).await.json()["usage"].clone()
        } else {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            post(server.address, "/v1/chat/completions", &body).await.events().last().unwrap()["usage"]
                .clone()
        };
        prompt += usage["prompt_tokens"].as_u64().unwrap();
        completion_tokens += usage["completion_tokens"].as_u64().unwrap();
        cached += usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    }
    assert_eq!(server.metric("mirai_prompt_tokens_total").await, prompt as f64);
    assert_eq!(server.metric("mirai_generation_tokens_total").await, completion_tokens as f64);
    assert_eq!(server.metric("mirai_cached_tokens_total").await, cached as f64);
    assert!(cached > 0);
    assert_eq!(server.metric("vllm:generation_tokens_total").await, completion_tokens as f64);
    assert_eq!(server.metric("mirai_request_generation_tokens_sum").await, completion_tokens as f64);
    assert_eq!(server.metric("mirai_request_seconds_count").await, 20.0);
    assert_eq!(
        server.metric("mirai_choices_finished_total").await,
        server.metric("mirai_request_generation_tokens_count").await
    );
    let label = format!("{{engine=\"0\",model_name=\"{MODEL}\"}}");
    let page = get(server.address, "/metrics").await;
    assert_eq!(page.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for name in ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"] {
        assert!(page.text().contains(&format!("{name}{label} ")), "{name}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_can_add_a_series() {
    let server = TestServer::plain().await;
    post(server.address, "/v1/chat/completions", &chat("q", &json!({}))).await;
    let before = series(&get(server.address, "/metrics").await.text());
    for i in 0..100 {
        let path = format!("/random/{i}");
        let agent = format!("agent-{i}");
        let method = ["GET", "POST", "PURGE", "FOO"][i % 4];
        request(server.address, method, &path, &[("User-Agent", &agent), ("X-Request-Id", &path)], None)
            .await;
        post(server.address, "/v1/chat/completions", &chat("q", &json!({"model": path, "user": agent})))
            .await;
        post(server.address, "/v1/completions", &completion(&json!("x"), &json!({"max_tokens": 1, path: 1})))
            .await;
    }
    let page = get(server.address, "/metrics").await.text();
    assert_eq!(series(&page), before);
    assert_eq!(sum(&page, "mirai_unknown_fields_total"), 100.0);
    server.stop().await;
}
