//! Peers that take their time.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{head, post, read_answer};
use crate::support::*;

/// Reads to the end; the time that took.
async fn closed_after(stream: TcpStream) -> Duration {
    closed_since(Instant::now(), stream).await
}

/// Reads to the end; the time since `start`.
async fn closed_since(start: Instant, mut stream: TcpStream) -> Duration {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_bodies_and_idle_connections_have_deadlines() {
    let mut options = Options::default();
    let timeouts = &mut options.config.timeouts;
    timeouts.header_seconds = 0.4;
    timeouts.body_seconds = 0.5;
    timeouts.idle_seconds = 0.8;
    let server = TestServer::start(options).await;
    let address = server.address;
    // Below every default, so that only these deadlines can have ended a connection, and far above them.
    let limit = Duration::from_secs(8);
    // Nothing at all.
    assert!(closed_after(TcpStream::connect(address).await.unwrap()).await < limit);
    // A head, byte by byte.
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ").await.unwrap();
        slow.push(tokio::spawn(closed_after(stream)));
    }
    assert_eq!(
        post(address, "/v1/chat/completions", &chat("q", &json!({}))).await.status,
        200,
        "others are served"
    );
    for stream in slow {
        assert!(stream.await.unwrap() < limit);
    }
    // A body that never comes.
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&head("POST", "/v1/completions", &[], Some(100))).await.unwrap();
    let answer = read_answer(&mut stream).await.unwrap();
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (408, &json!("body_timeout")));
    drop(stream);
    // Between two requests.
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut start = Instant::now();
    for _ in 0..2 {
        start = Instant::now();
        stream.write_all(&head("GET", "/health", &[], None)).await.unwrap();
        assert_eq!(read_answer(&mut stream).await.unwrap().status, 200);
    }
    let idle = closed_since(start, stream).await;
    assert!(idle >= Duration::from_millis(800) && idle < limit, "{idle:?}");
    assert!(server.metric("mirai_http_read_timeouts_total").await >= 201.0);
    server
        .until("connections closed", PATIENCE, async |s| s.metric("mirai_http_connections").await <= 1.0)
        .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_do_not_read_are_let_go() {
    let mut options = Options { step: Duration::from_micros(100), ..Options::default() };
    options.config.timeouts.write_stall_seconds = 0.5;
    // What the kernel has taken counts as written: then the connection is idle, with the idle deadline.
    options.config.timeouts.idle_seconds = 0.5;
    options.config.limits.max_stream_buffer_bytes = 64 << 10;
    let server = TestServer::start(options).await;
    let body = chat(
        "q",
        &json!({"stream": true, "max_tokens": 1900, "n": 32, "logprobs": true, "top_logprobs": 20}),
    )
    .to_string();
    let mut held = Vec::new();
    for _ in 0..2 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(server.address).await.unwrap();
        let mut bytes = head("POST", "/v1/chat/completions", &[], Some(body.len()));
        bytes.extend_from_slice(body.as_bytes());
        stream.write_all(&bytes).await.unwrap();
        held.push(stream);
    }
    server
        .until("both to be let go", PATIENCE, async |s| {
            s.metric("mirai_slow_readers_total").await + s.metric("mirai_http_write_stalls_total").await
                >= 2.0
                && s.metric("mirai_streams").await == 0.0
                && s.metric("mirai_http_connections").await <= 1.0
        })
        .await;
    assert_eq!(server.engine.counters().blocks_used, 0);
    drop(held);
    assert_eq!(post(server.address, "/v1/chat/completions", &chat("q", &json!({}))).await.status, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait() {
    let mut options = Options::default();
    options.config.limits.max_connections = 2;
    let server = TestServer::start(options).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(&head("GET", "/health", &[], None)).await.unwrap();
        assert_eq!(read_answer(&mut stream).await.unwrap().status, 200);
        held.push(stream);
    }
    let mut third = TcpStream::connect(server.address).await.unwrap();
    third.write_all(&head("GET", "/health", &[], None)).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), third.readable()).await.is_err(), "it waits");
    drop(held);
    assert_eq!(read_answer(&mut third).await.unwrap().status, 200);
    drop(third);
    server.stop().await;
}
