//! Many at once: each as if alone, and fast.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::client::{head, post};
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

/// Reads a stream to its end and counts its events, as cheaply as a client can.
async fn count_events(address: std::net::SocketAddr, body: &str) -> usize {
    let mut bytes = head("POST", "/v1/chat/completions", &[], Some(body.len()));
    bytes.extend_from_slice(body.as_bytes());
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut buffer = vec![0; 64 << 10];
    let mut events = 0;
    let mut tail = [0u8; 5];
    loop {
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "the stream broke off");
        events += buffer[..n].windows(2).filter(|pair| pair == b"\n\n").count();
        let keep = n.min(5);
        tail.rotate_left(keep);
        tail[5 - keep..].copy_from_slice(&buffer[n - keep..n]);
        if &tail == b"0\r\n\r\n" {
            return events;
        }
    }
}

/// The speed of the HTTP path, client included. `cargo test -p mirai-server --release -- --ignored --nocapture speed`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: run it alone, in release"]
async fn speed_of_256_streams() {
    let mut options = Options { slots: 256, blocks: 40_000, ..Options::default() };
    options.engine.prefix_caching = false;
    let server = TestServer::start(options).await;
    let (address, streams, tokens) = (server.address, 256, 1000);
    for round in 0..3 {
        let body =
            chat("q", &json!({"stream": true, "max_tokens": tokens, "allowed_token_ids": [97]})).to_string();
        let start = Instant::now();
        let mut crowd = JoinSet::new();
        for _ in 0..streams {
            let body = body.clone();
            crowd.spawn(async move { count_events(address, &body).await });
        }
        let mut events = 0;
        while let Some(result) = crowd.join_next().await {
            events += result.unwrap();
        }
        let seconds = start.elapsed().as_secs_f64();
        assert!(events >= streams * tokens, "one event for each token");
        println!(
            "round {round}: {:.0} tokens/s ({events} events in {seconds:.2} s)",
            (streams * tokens) as f64 / seconds
        );
    }
    server.stop().await;
}
