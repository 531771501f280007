//! Many at once: each as if alone. (How fast is measured by `cargo xtask ci --full`.)

use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::client::post;
use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_at_once_are_each_as_if_alone() {
    let server = TestServer::start(Options { step: Duration::from_micros(200), ..Options::default() }).await;
    let address = server.address;
    let body = |i: u64| {
        let more =
            json!({"max_tokens": 100 + i, "temperature": i % 2, "seed": i, "stream": true, "logprobs": true});
        chat(&format!("question {i}"), &more)
    };
    let events = |answer: crate::client::Answer| -> Vec<Value> {
        let mut events = answer.events();
        for event in &mut events {
            event["id"] = Value::Null;
            event["created"] = Value::Null;
        }
        events
    };
    let mut alone = Vec::new();
    for i in 0..32 {
        alone.push(events(post(address, "/v1/chat/completions", &body(i)).await));
    }
    let mut crowd = JoinSet::new();
    for i in 0..32 {
        let body = body(i);
        crowd.spawn(async move { (i, post(address, "/v1/chat/completions", &body).await) });
    }
    while let Some(result) = crowd.join_next().await {
        let (i, answer) = result.unwrap();
        assert!(events(answer) == alone[i as usize], "request {i} differs");
    }
    server.stop().await;
}
