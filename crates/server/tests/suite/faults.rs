//! One request's fault is its own; a frozen or dead engine is not hidden.

use std::time::{Duration, Instant};

use mirai_engine::RowFault;
use mirai_engine::hooks::{Injection, Victim};
use mirai_server::ExitReason;
use serde_json::{Value, json};

use crate::client::{Answer, get, post, request};
use crate::support::*;

fn without_id(mut value: Value) -> Value {
    value["id"] = Value::Null;
    value["created"] = Value::Null;
    value
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_one_request_is_its_own() {
    let server = TestServer::start(Options { step: Duration::from_micros(200), ..Options::default() }).await;
    let body = |seed: u64, stream: bool| {
        chat("q", &json!({"seed": seed, "max_tokens": 200, "stream": stream, "n": 2}))
    };
    let mut alone = Vec::new();
    for seed in 0..6 {
        alone.push(without_id(post(server.address, "/v1/chat/completions", &body(seed, false)).await.json()));
    }
    let hooks = server.engine.hooks();
    hooks.inject(Victim::Seed(1001), 50, Injection::Fault(RowFault::NonFinite));
    hooks.inject(Victim::Seed(1002), 60, Injection::Panic);
    hooks.inject(Victim::Seed(1003), 0, Injection::Fault(RowFault::NonFinite));
    let neighbours = async {
        let mut results = Vec::new();
        for seed in 0..6 {
            results.push(without_id(
                post(server.address, "/v1/chat/completions", &body(seed, false)).await.json(),
            ));
        }
        results
    };
    let [one, two, three] = [body(1001, true), body(1002, false), body(1003, false)];
    let (beside, nan, panic, early) = tokio::join!(
        neighbours,
        post(server.address, "/v1/chat/completions", &one),
        post(server.address, "/v1/chat/completions", &two),
        post(server.address, "/v1/chat/completions", &three),
    );
    for (mut a, mut b) in alone.into_iter().zip(beside) {
        // The second time the prompt is in the prefix cache.
        a["usage"]["prompt_tokens_details"] = Value::Null;
        b["usage"]["prompt_tokens_details"] = Value::Null;
        assert_eq!(a, b);
    }
    let events = nan.events();
    assert_eq!(events.last().unwrap()["error"]["code"], "numerical_fault");
    assert!(events.iter().filter(|e| e["choices"][0]["delta"]["content"].is_string()).count() > 20);
    assert_eq!((panic.status, &panic.json()["error"]["code"]), (500, &json!("internal_error")));
    assert_eq!((early.status, &early.json()["error"]["code"]), (500, &json!("numerical_fault")));
    assert_eq!(get(server.address, "/health").await.status, 200);
    server.until("streams released", PATIENCE, async |s| s.metric("mirai_streams").await == 0.0).await;
    assert!(server.metric("mirai_corrupted_choices_total").await >= 2.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_engine_is_not_alive_and_streams_are_kept_open() {
    let mut options = Options::default();
    // An idle engine beats once a second: a late beat of a busy machine must not look like a freeze.
    options.config.timeouts.engine_progress_seconds = 2.5;
    options.config.timeouts.ping_seconds = 0.2;
    options.config.timeouts.shutdown_seconds = 0.2;
    // Before the first beat, and so at most the limit before the earliest moment at which liveness may fail.
    let started = Instant::now();
    let server = TestServer::start(options).await;
    assert_eq!(get(server.address, "/health").await.json(), json!({"status": "ok"}));
    server.engine.hooks().freeze();
    let body = chat("q", &json!({"stream": true}));
    let (address, waiting) = (server.address, body.clone());
    let stream = tokio::spawn(async move { post(address, "/v1/chat/completions", &waiting).await });
    server
        .until("liveness to fail", PATIENCE, async |s| get(s.address, "/health/live").await.status == 503)
        .await;
    assert!(started.elapsed() >= Duration::from_millis(2500), "not before the limit");
    for path in ["/health", "/health/live", "/health/ready"] {
        let answer = get(server.address, path).await;
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (503, Some("application/problem+json")),
            "{path}"
        );
        assert_eq!(answer.json()["status"], 503);
    }
    assert_eq!(get(server.address, "/health/startup").await.status, 200);
    server.engine.hooks().thaw();
    server
        .until("liveness to return", PATIENCE, async |s| get(s.address, "/health").await.status == 200)
        .await;
    let answer = stream.await.unwrap();
    assert!(answer.text().matches(": ping\n\n").count() >= 2, "silence was filled");
    assert_eq!(answer.events().last().unwrap()["choices"][0]["finish_reason"], "length");
    server.stop().await;
}

/// With the limit that people get. Takes 10 s, so only the long checks run it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "10 s of silence: cargo xtask full frozen"]
async fn a_frozen_engine_is_seen_within_fifteen_seconds_by_default() {
    let server = TestServer::plain().await;
    server.engine.hooks().freeze();
    let frozen = Instant::now();
    for path in ["/health/live", "/health"] {
        server
            .until(path, Duration::from_secs(15).saturating_sub(frozen.elapsed()), async |s| {
                get(s.address, path).await.status == 503
            })
            .await;
    }
    println!("503 after {:?}", frozen.elapsed());
    server.engine.hooks().thaw();
    server.until("liveness", PATIENCE, async |s| get(s.address, "/health").await.status == 200).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_engine_ends_every_stream_and_the_server() {
    let server = TestServer::start(Options { step: Duration::from_millis(5), ..Options::default() }).await;
    let address = server.address;
    let body = chat("q", &json!({"stream": true, "max_tokens": 1900}));
    let streams: Vec<_> = (0..4)
        .map(|_| {
            let body = body.clone();
            tokio::spawn(async move { post(address, "/v1/chat/completions", &body).await })
        })
        .collect();
    let whole = {
        let body = chat("q", &json!({"max_tokens": 1900}));
        tokio::spawn(async move { post(address, "/v1/chat/completions", &body).await })
    };
    server
        .until("all five to run", PATIENCE, async |s| s.metric("mirai_sequences_running").await == 5.0)
        .await;
    let start = Instant::now();
    server.engine.hooks().fail_device();
    for stream in streams {
        let events = stream.await.unwrap().events();
        assert_eq!(events.last().unwrap()["error"]["code"], "engine_stopped");
    }
    let whole = whole.await.unwrap();
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("engine_stopped")));
    let reason = server.run.await.unwrap();
    assert!(matches!(reason, ExitReason::EngineDied(_)), "{reason:?}");
    assert!(start.elapsed() < PATIENCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    let mut options = Options { slots: 1, ..Options::default() };
    options.engine.max_running = 1;
    options.engine.max_queued_requests = 2;
    let server = TestServer::start(options).await;
    server.engine.hooks().freeze();
    let address = server.address;
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            tokio::spawn(async move { post(address, "/v1/chat/completions", &chat("q", &json!({}))).await })
        })
        .collect();
    server
        .until("the queue to fill", PATIENCE, async |s| s.metric("mirai_queued_requests").await == 2.0)
        .await;
    // The engine is frozen: an answer that waited for it would never come.
    let refused = post(address, "/v1/chat/completions", &chat("q", &json!({}))).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("overloaded")));
    let after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&after));
    // Of three prompts two do not fit either: what was accepted is taken back.
    let many = completion(&json!(["a", "b", "c"]), &json!({"stream": true}));
    assert_eq!(post(address, "/v1/completions", &many).await.status, 503);
    assert!(server.metric("mirai_requests_refused_total{reason=\"max_num_queued_reqs\"}").await >= 2.0);
    server.engine.hooks().thaw();
    for answer in waiting {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    server.until("nothing held", PATIENCE, async |s| s.metric("mirai_streams").await == 0.0).await;
    assert_eq!(server.metric("mirai_disconnects_total").await, 0.0, "who was refused has not left");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_its_time() {
    let mut options = Options { step: Duration::from_millis(20), ..Options::default() };
    options.config.timeouts.request_seconds = 1.0;
    let server = TestServer::start(options).await;
    let answer = post(server.address, "/v1/chat/completions", &chat("q", &json!({"max_tokens": 1500}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "length");
    let tokens = answer.json()["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..1500).contains(&tokens), "{tokens}");
    server.engine.hooks().freeze();
    let address = server.address;
    let late =
        tokio::spawn(async move { post(address, "/v1/chat/completions", &chat("q", &json!({}))).await });
    server.until("it to wait", PATIENCE, async |s| s.metric("mirai_queued_requests").await == 1.0).await;
    // Its whole time passes while nothing moves.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    server.engine.hooks().thaw();
    let late = late.await.unwrap();
    assert_eq!((late.status, &late.json()["error"]["code"]), (503, &json!("deadline_exceeded")));
    server.stop().await;
}

/// What the caller says it will wait for ends its request, and never later than the server's own limit would.
#[tokio::test(flavor = "multi_thread")]
async fn a_callers_patience_ends_its_request() {
    let mut options = Options { step: Duration::from_millis(5), ..Options::default() };
    options.config.timeouts.request_seconds = 1.0;
    let server = TestServer::start(options).await;
    let body = chat("q", &json!({"max_tokens": 1900})).to_string();
    let ask = async |seconds: &str| {
        let headers = [("X-Request-Timeout", seconds)];
        request(server.address, "POST", "/v1/chat/completions", &headers, Some(body.as_bytes())).await
    };
    let tokens = |answer: &Answer| answer.json()["usage"]["completion_tokens"].as_u64().unwrap();
    let (short, long) = (ask("0.25").await, ask("100").await);
    assert_eq!((short.status, long.status), (200, 200));
    assert_eq!(short.json()["choices"][0]["finish_reason"], "length");
    // A step takes at least 5 ms: that many fit, and not all that were asked for.
    assert!(tokens(&short) <= 50, "{}", tokens(&short));
    assert!(tokens(&long) <= 200, "{}", tokens(&long));
    for wrong in ["", "0", "-1", "soon", "inf", "NaN", "1e300"] {
        let answer = ask(wrong).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]["param"]),
            (400, &json!("X-Request-Timeout")),
            "{wrong}"
        );
    }
    server.stop().await;
}
