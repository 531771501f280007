//! Loading, readiness, drain and end.

use std::time::{Duration, Instant};

use mirai_server::{BindError, ExitReason, Server, ServerConfig};
use serde_json::json;

use crate::client::{get, post};
use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn until_it_is_loaded_it_says_how_far_it_is() {
    let server = Server::bind(Options::default().config).await.unwrap();
    let (address, handle) = (server.local_addr(), server.handle());
    let run = tokio::spawn(server.run());
    handle.loading("weights", 40);
    for path in ["/health", "/health/live", "/health/ready", "/health/startup"] {
        let answer = get(address, path).await;
        assert_eq!((answer.status, answer.header("content-type")), (503, Some("application/problem+json")));
        assert_eq!((&answer.json()["phase"], &answer.json()["percent"]), (&json!("weights"), &json!(40)));
    }
    for answer in [get(address, "/v1/models").await, post(address, "/v1/chat/completions", &json!({})).await]
    {
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("model_loading")));
        assert!(answer.header("retry-after").is_some());
    }
    assert_eq!(get(address, "/metrics").await.status, 200);
    handle.ready(model(&Options::default())).unwrap();
    for path in ["/health", "/health/live", "/health/ready", "/health/startup", "/v1/models"] {
        assert_eq!(get(address, path).await.status, 200, "{path}");
    }
    assert!(handle.ready(model(&Options::default())).is_err());
    handle.shutdown();
    assert_eq!(run.await.unwrap(), ExitReason::Drained);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_load_stays_visible() {
    let server = Server::bind(Options::default().config).await.unwrap();
    let (address, handle) = (server.local_addr(), server.handle());
    let run = tokio::spawn(server.run());
    handle.failed("weights are truncated");
    assert_eq!(get(address, "/health/startup").await.status, 503);
    let answer = post(address, "/v1/completions", &json!({})).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("model_failed")));
    handle.shutdown();
    assert_eq!(run.await.unwrap(), ExitReason::Drained);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_and_an_open_door_are_errors() {
    let first = Server::bind(Options::default().config).await.unwrap();
    let config = ServerConfig { port: first.local_addr().port(), ..ServerConfig::default() };
    let error = Server::bind(config).await.unwrap_err();
    assert!(matches!(error, BindError::Listen { .. }), "{error}");
    assert!(error.to_string().contains(&first.local_addr().to_string()));
    let config = ServerConfig { host: "0.0.0.0".parse().unwrap(), port: 0, ..ServerConfig::default() };
    assert!(matches!(Server::bind(config).await.unwrap_err(), BindError::Config(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_lets_streams_end_and_refuses_new_work() {
    let mut options = Options { step: Duration::from_millis(4), ..Options::default() };
    // Long beside what the requests of this phase take, short beside the stream's 5 s.
    options.config.timeouts.drain_delay_seconds = 2.0;
    options.config.timeouts.shutdown_seconds = 60.0;
    let server = TestServer::start(options).await;
    let address = server.address;
    let body = chat("q", &json!({"stream": true, "max_tokens": 1250}));
    let stream = tokio::spawn(async move { post(address, "/v1/chat/completions", &body).await });
    server
        .until("the stream to run", PATIENCE, async |s| s.metric("mirai_generation_tokens_total").await > 5.0)
        .await;
    server.handle.shutdown();
    server.until("not ready", PATIENCE, async |s| get(s.address, "/health/ready").await.status == 503).await;
    assert_eq!(get(address, "/health/live").await.status, 200, "draining is alive");
    assert_eq!(
        post(address, "/v1/chat/completions", &chat("q", &json!({"max_tokens": 1}))).await.status,
        200
    );
    let refused = loop {
        let answer = post(address, "/v1/chat/completions", &chat("q", &json!({"max_tokens": 1}))).await;
        if answer.status != 200 {
            break answer;
        }
    };
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("draining")));
    assert_eq!(refused.header("connection"), Some("close"));
    assert!(refused.header("retry-after").is_some());
    assert_eq!(get(address, "/health/live").await.status, 200);
    let events = stream.await.unwrap().events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(server.run.await.unwrap(), ExitReason::Drained);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_end_in_time_is_told_so() {
    let mut options = Options { step: Duration::from_millis(20), ..Options::default() };
    options.config.timeouts.shutdown_seconds = 0.3;
    let server = TestServer::start(options).await;
    let address = server.address;
    let body = chat("q", &json!({"stream": true, "max_tokens": 1900}));
    let stream = tokio::spawn(async move { post(address, "/v1/chat/completions", &body).await });
    let whole = tokio::spawn(async move {
        post(address, "/v1/chat/completions", &chat("q", &json!({"max_tokens": 1900}))).await
    });
    server.until("both to run", PATIENCE, async |s| s.engine.counters().running == 2).await;
    server.handle.shutdown();
    let events = stream.await.unwrap().events();
    assert_eq!(events.last().unwrap()["error"]["code"], "draining");
    let whole = whole.await.unwrap();
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("draining")));
    assert_eq!(server.run.await.unwrap(), ExitReason::Cut(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_signal_ends_at_once() {
    let mut options = Options { step: Duration::from_millis(20), ..Options::default() };
    options.config.timeouts.drain_delay_seconds = 60.0;
    let server = TestServer::start(options).await;
    let address = server.address;
    let body = chat("q", &json!({"stream": true, "max_tokens": 1900}));
    tokio::spawn(async move { post(address, "/v1/chat/completions", &body).await });
    server.until("it to run", PATIENCE, async |s| s.engine.counters().running == 1).await;
    server.handle.shutdown();
    let start = Instant::now();
    server.handle.shutdown();
    assert_eq!(server.run.await.unwrap(), ExitReason::Forced);
    assert!(start.elapsed() < Duration::from_secs(30), "the drain delay is 60 s");
}
