//! A thousand clients that hang up at random moments: nothing of them stays.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::client::{head, post};
use crate::support::*;

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Open file descriptors of this process.
fn descriptors() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count())
}

/// Connects, does a part of a request, and is gone.
async fn hang_up(address: std::net::SocketAddr, mut seed: u64) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let streams = random(&mut seed).is_multiple_of(2);
    let prompt = "x".repeat((random(&mut seed) % 900) as usize + 1);
    let n = random(&mut seed) % 3 + 1;
    let body =
        chat(&prompt, &json!({"stream": streams, "max_tokens": 900, "n": n, "seed": seed})).to_string();
    let mut bytes = head("POST", "/v1/chat/completions", &[], Some(body.len()));
    bytes.extend_from_slice(body.as_bytes());
    // In the head, in the body, before the answer, or in it.
    let phase = random(&mut seed) % 4;
    let length = match phase {
        0 => random(&mut seed) as usize % 60,
        1 => bytes.len() - 1 - random(&mut seed) as usize % body.len(),
        _ => bytes.len(),
    };
    stream.write_all(&bytes[..length]).await?;
    if phase == 3 {
        let mut wanted = random(&mut seed) % 20_000;
        let mut buffer = [0; 4096];
        while wanted > 0 {
            let read = tokio::time::timeout(Duration::from_millis(200), stream.read(&mut buffer)).await;
            match read {
                Ok(Ok(n)) if n > 0 => wanted = wanted.saturating_sub(n as u64),
                _ => break,
            }
        }
    } else {
        tokio::time::sleep(Duration::from_micros(random(&mut seed) % 5_000)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_stays_of_a_thousand_hang_ups() {
    let _alone = crate::ALONE.lock().await;
    let seed: u64 = std::env::var("MIRAI_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(42);
    println!("MIRAI_SEED={seed}");
    let mut options = Options { step: Duration::from_micros(500), ..Options::default() };
    options.engine.prefix_caching = false;
    let server = TestServer::start(options).await;
    let address = server.address;
    post(address, "/v1/chat/completions", &chat("warm", &json!({}))).await;
    let tasks = server.metric("mirai_tasks").await;
    let files = descriptors();
    let mut crowd = JoinSet::new();
    let places = Arc::new(Semaphore::new(200));
    for i in 0..1000u64 {
        let place = places.clone().acquire_owned().await.unwrap();
        crowd.spawn(async move {
            let result = hang_up(address, seed.wrapping_mul(1_000_003) + i).await;
            drop(place);
            result
        });
    }
    while let Some(result) = crowd.join_next().await {
        // A reset while writing is one more way to hang up.
        let _ = result.unwrap();
    }
    // The bar is 1 s. A busy machine that also measures coverage gets more; what leaks stays for ever.
    let limit = Duration::from_secs(if std::env::var_os("MIRAI_STRICT_TIMES").is_some() { 1 } else { 20 });
    let gone = Instant::now();
    loop {
        let counters = server.engine.counters();
        let http = [
            server.metric("mirai_streams").await,
            server.metric("mirai_http_body_bytes").await,
            // The scrape itself is one.
            server.metric("mirai_http_active_requests").await - 1.0,
            (server.metric("mirai_http_connections").await - 1.0).max(0.0),
            (server.metric("mirai_tasks").await - tasks).max(0.0),
        ];
        let engine = [counters.running, counters.waiting, counters.queued_requests, counters.blocks_used];
        let files = descriptors().zip(files).map_or(0, |(now, before)| now.saturating_sub(before));
        if http.iter().all(|v| *v == 0.0) && engine.iter().all(|v| *v == 0) && files <= 1 {
            break;
        }
        let late = gone.elapsed() > limit;
        assert!(!late, "after {limit:?} still held: http {http:?}, engine {engine:?}, files {files}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("all released after {:?}", gone.elapsed());
    assert_eq!(server.metric("mirai_panics_total").await, 0.0);
    assert_eq!(post(address, "/v1/chat/completions", &chat("after", &json!({}))).await.status, 200);
    server.stop().await;
}
