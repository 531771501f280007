//! Rows of the ledger: one for each request that the engine took, with what its client was told.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mirai_engine::EngineConfig;
use mirai_ledger::price::PriceBook;
use mirai_ledger::store::SqlStore;
use mirai_ledger::store::{
    Store,
    sqlite::{Sqlite, SqliteOptions},
};
use mirai_ledger::{Finish, Ledger, LedgerConfig, Row, State};
use rusqlite::Connection;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{Answer, get, head, post, read_answer};
use crate::support::*;

pub fn ledger(file: &Path, config: &LedgerConfig) -> Ledger {
    // Another process that writes is waited for in small portions.
    let options = SqliteOptions { busy_timeout: Duration::from_millis(100), ..SqliteOptions::default() };
    let store = SqlStore::<Sqlite>::open(file, None, &options);
    let config = LedgerConfig { writer: "w".into(), takeover: true, ..config.clone() };
    Ledger::start(Box::new(store.unwrap()), None, config).unwrap()
}

fn rows(file: &Path) -> Vec<Row> {
    SqlStore::open_reading(file).unwrap().rows("", 1000).unwrap()
}

pub fn row_of(file: &Path, id: &str) -> Row {
    let id = id.split_once('-').unwrap().1;
    SqlStore::open_reading(file).unwrap().row(id).unwrap().unwrap()
}

struct Bed {
    folder: tempfile::TempDir,
    server: TestServer,
}

impl Bed {
    async fn start(options: Options) -> Self {
        Self::with(options, LedgerConfig::default()).await
    }

    async fn with(options: Options, config: LedgerConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Some(ledger(&folder.path().join("ledger.db"), &config));
        let server = TestServer::start(Options { ledger, ..options }).await;
        Self { folder, server }
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("ledger.db")
    }

    async fn chat(&self, more: &Value) -> Answer {
        post(self.server.address, "/v1/chat/completions", &chat("count", more)).await
    }

    /// The rows, once all are closed.
    async fn closed_rows(&self) -> Vec<Row> {
        let file = self.file();
        self.server
            .until("all rows closed", PATIENCE, async |_| {
                rows(&file).iter().all(|row| row.state == State::Closed)
            })
            .await;
        rows(&file)
    }
}

fn check(row: &Row, usage: &Value) {
    let told = |name: &str| usage.pointer(name).and_then(Value::as_u64).unwrap();
    assert_eq!(row.prompt_tokens, told("/prompt_tokens"), "{row:?}");
    assert_eq!(row.completion_tokens, told("/completion_tokens"), "{row:?}");
    assert_eq!(row.cached_tokens, told("/prompt_tokens_details/cached_tokens"), "{row:?}");
    assert_eq!(row.reasoning_tokens, told("/completion_tokens_details/reasoning_tokens"), "{row:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_is_told_is_what_its_row_says() {
    let bed = Bed::start(Options::default()).await;
    let whole = bed.chat(&json!({"n": 3, "max_tokens": 40})).await.json();
    // Durable before the answer: no waiting here.
    let row = row_of(&bed.file(), whole["id"].as_str().unwrap());
    check(&row, &whole["usage"]);
    assert_eq!((row.state, row.finish, row.status), (State::Closed, Finish::Length, 200));
    assert_eq!((row.model.as_str(), row.replica.as_str()), (MODEL, "pod-0"));
    assert!(row.first_token_after.is_some_and(|first| first > 0 && first <= row.duration));
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let stop: String = text.chars().skip(5).take(2).collect();
    let more =
        json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 40, "stop": stop});
    let events = bed.chat(&more).await.events();
    let last = events.last().unwrap();
    let row = row_of(&bed.file(), last["id"].as_str().unwrap());
    check(&row, &last["usage"]);
    assert_eq!((row.finish, row.status), (Finish::Stop, 200));
    assert!(row.completion_tokens < 40);
    let body = completion(&json!(["one", "two", "three"]), &json!({"max_tokens": 7, "n": 2}));
    let whole = post(bed.server.address, "/v1/completions", &body).await.json();
    let row = row_of(&bed.file(), whole["id"].as_str().unwrap());
    check(&row, &whole["usage"]);
    assert_eq!(row.endpoint.as_str(), "completion");
    let rows = bed.closed_rows().await;
    assert_eq!(rows.len(), 3);
    for (metric, sum) in [
        ("mirai_prompt_tokens_total", rows.iter().map(|row| row.prompt_tokens).sum::<u64>()),
        ("mirai_cached_tokens_total", rows.iter().map(|row| row.cached_tokens).sum()),
        ("mirai_generation_tokens_total", rows.iter().map(|row| row.completion_tokens).sum()),
        ("mirai_ledger_closed_tokens_total", rows.iter().map(|row| row.completion_tokens).sum()),
        ("mirai_ledger_rows_opened_total", 3),
        ("mirai_ledger_rows_closed_total", 3),
        ("mirai_ledger_open_rows", 0),
        ("mirai_ledger_health", 0),
        ("mirai_wasted_tokens_total", rows.iter().map(|row| row.wasted_tokens).sum()),
    ] {
        assert_eq!(bed.server.metric(metric).await, sum as f64, "{metric}");
    }
    bed.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_leaves_no_row() {
    let engine = EngineConfig { max_queued_requests: 2, ..EngineConfig::default() };
    let bed = Bed::start(Options { engine, ..Options::default() }).await;
    assert_eq!(bed.chat(&json!({"n": 0})).await.status, 400);
    assert_eq!(bed.chat(&json!({"model": "other"})).await.status, 404);
    // Three prompts do not fit into a queue of two: none of them is taken.
    let three = completion(&json!(["one", "two", "three"]), &json!({}));
    assert_eq!(post(bed.server.address, "/v1/completions", &three).await.status, 503);
    assert_eq!(rows(&bed.file()).len(), 0);
    assert_eq!(bed.chat(&json!({})).await.status, 200);
    assert_eq!(rows(&bed.file()).len(), 1);
    bed.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_pays_for_what_was_written_for_it() {
    let bed = Bed::start(Options { step: Duration::from_millis(1), ..Options::default() }).await;
    let body = chat("count", &json!({"stream": true, "max_tokens": 1900})).to_string();
    let mut stream = TcpStream::connect(bed.server.address).await.unwrap();
    stream.write_all(&head("POST", "/v1/chat/completions", &[], Some(body.len()))).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    while seen.windows(6).filter(|window| window == b"\ndata:").count() < 30 {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
    }
    drop(stream);
    let rows = bed.closed_rows().await;
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert_eq!((&row.finish, row.status), (&Finish::Abort, 499));
    // Thirty events, of which the first has no token, and what was on its way.
    assert!((28..1900).contains(&row.completion_tokens), "{row:?}");
    let metric = bed.server.metric("mirai_generation_tokens_total").await;
    assert_eq!(metric, row.completion_tokens as f64);
    bed.server.stop().await;
}

/// Events of tokens in what a stream has sent so far.
fn tokens(bytes: &[u8]) -> usize {
    let text = String::from_utf8_lossy(bytes);
    text.lines().filter(|line| line.contains("\"token_ids\":[") && !line.contains("\"token_ids\":[]")).count()
}

/// Reads until nothing has come for a while that is long beside a step.
async fn until_still(stream: &mut TcpStream, into: &mut Vec<u8>) {
    while let Ok(read) = tokio::time::timeout(Duration::from_millis(400), stream.read_buf(into)).await {
        assert!(read.unwrap() > 0, "{}", String::from_utf8_lossy(into));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leaves_that_a_stalled_store_does_not_know() {
    let bed = Bed::start(Options { step: Duration::from_millis(2), ..Options::default() }).await;
    // Another process writes, and takes its time: the ledger's commits wait.
    let other = Connection::open(bed.file()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let more = json!({"stream": true, "max_tokens": 1500, "return_token_ids": true,
                      "stream_options": {"include_usage": true}});
    let body = chat("count", &more).to_string();
    let mut stream = TcpStream::connect(bed.server.address).await.unwrap();
    stream.write_all(&head("POST", "/v1/chat/completions", &[], Some(body.len()))).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    until_still(&mut stream, &mut seen).await;
    assert_eq!(String::from_utf8_lossy(&seen), "", "the head of a 200 says that there is a row");
    other.execute_batch("COMMIT").unwrap();
    while tokens(&seen) < 20 {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
    }
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let durable = rows(&bed.file())[0].completion_tokens;
    until_still(&mut stream, &mut seen).await;
    let left = tokens(&seen) as u64;
    // The engine has gone on to the end meanwhile.
    bed.server
        .until("all tokens", PATIENCE, async |server| {
            server.metric("mirai_generation_tokens_total").await == 1500.0
        })
        .await;
    assert!(left <= durable + 16 && left < 1500, "{left} tokens have left, {durable} are durable");
    other.execute_batch("COMMIT").unwrap();
    let mut rest = seen;
    let answer = loop {
        if let Ok(answer) = read_answer(&mut rest.as_slice()).await {
            break answer;
        }
        assert!(stream.read_buf(&mut rest).await.unwrap() > 0);
    };
    let events = answer.events();
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 1500);
    assert_eq!(rows(&bed.file())[0].completion_tokens, 1500);
    bed.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_told_of_a_failure_has_a_row_that_says_so() {
    let config = LedgerConfig { stall: Duration::from_millis(300), ..LedgerConfig::default() };
    let bed = Bed::with(Options { step: Duration::from_millis(4), ..Options::default() }, config).await;
    let address = bed.server.address;
    for (stream, status) in [(false, 503), (true, 200)] {
        let known = rows(&bed.file()).len();
        let body = chat("count", &json!({"stream": stream, "max_tokens": 500}));
        let client = tokio::spawn(async move { post(address, "/v1/chat/completions", &body).await });
        let file = bed.file();
        let opened = async |_: &TestServer| rows(&file).len() > known;
        bed.server.until("a durable opening", PATIENCE, opened).await;
        // Another process writes while the answer comes to its end, which is computed and cannot be written.
        let other = Connection::open(bed.file()).unwrap();
        other.busy_timeout(PATIENCE).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let answer = client.await.unwrap();
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(answer.text().contains("ledger_unavailable"), "{}", answer.text());
        let done = async |server: &TestServer| server.metric("mirai_streams").await == 0.0;
        bed.server.until("the engine's end", PATIENCE, done).await;
        other.execute_batch("COMMIT").unwrap();
        let closed = bed.closed_rows().await;
        let row = closed.last().unwrap();
        assert_eq!((closed.len(), &row.finish, row.status), (known + 1, &Finish::Error, status), "{row:?}");
        let ready = async |_: &TestServer| get(address, "/health/ready").await.status == 200;
        bed.server.until("a ledger that takes more", PATIENCE, ready).await;
    }
    bed.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_closes_every_row() {
    let mut options = Options { step: Duration::from_millis(2), ..Options::default() };
    options.config.timeouts.shutdown_seconds = 0.2;
    let bed = Bed::start(options).await;
    let address = bed.server.address;
    let body = chat("count", &json!({"stream": true, "max_tokens": 1900}));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            tokio::spawn({
                let body = body.clone();
                async move { post(address, "/v1/chat/completions", &body).await }
            })
        })
        .collect();
    bed.server
        .until("eight streams", PATIENCE, async |server| {
            server.metric("vllm:num_requests_running").await >= 8.0
        })
        .await;
    let file = bed.file();
    bed.server.stop().await;
    for client in clients {
        let answer = client.await.unwrap();
        assert!(answer.text().contains("draining"), "{}", answer.text());
    }
    let rows = rows(&file);
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert_eq!((&row.state, &row.finish, row.status), (&State::Closed, &Finish::Error, 200), "{row:?}");
        assert!(row.completion_tokens > 0);
    }
}

fn prices() -> Arc<PriceBook> {
    let book = "currency = 'EUR'\n[[list]]\nversion = 'p1'\nvalid_from = 2026-01-01\n\
                [[list.model]]\nname = '*'\ninput = 0.15\ncached_input = 0.075\noutput = 0.6\n";
    Arc::new(PriceBook::parse(book).unwrap())
}

/// Prices of millions of tokens: an answer's cost is its row's by the list that the row names, to the last digit.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_says_what_it_costs() {
    let book = prices();
    let bed = Bed::start(Options { prices: Some(book.clone()), ..Options::default() }).await;
    // The second finds its prompt in the cache.
    for _ in 0..2 {
        let long = "a prompt of more than one block of tokens, so that some of it can be cached";
        let body = chat(long, &json!({"n": 2, "max_tokens": 40}));
        let whole = post(bed.server.address, "/v1/chat/completions", &body).await.json();
        let row = row_of(&bed.file(), whole["id"].as_str().unwrap());
        assert_eq!(row.price_version.as_deref(), Some("p1"));
        let cost = book.cost(&row).unwrap().to_f64();
        assert!(cost > 0.0);
        assert_eq!(whole["usage"]["cost"].as_f64(), Some(cost));
        let usage = |name: &str| whole["usage"].pointer(name).and_then(Value::as_f64).unwrap();
        let (cached, answer) = (usage("/prompt_tokens_details/cached_tokens"), usage("/completion_tokens"));
        let expected = (usage("/prompt_tokens") - cached) * 0.15 + cached * 0.075 + answer * 0.6;
        assert!((cost * 1e6 - expected).abs() < 1e-6, "{cost} {expected}");
    }
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    assert!(bed.chat(&more).await.events().last().unwrap()["usage"]["cost"].as_f64().unwrap() > 0.0);
    bed.server.stop().await;
}

#[tokio::test]
async fn embeddings_say_what_they_cost_too() {
    let bed = Bed::start(Options { prices: Some(prices()), ..super::pooling::embedder() }).await;
    let body = json!({"input": ["one text", "and another one"]});
    let answer = post(bed.server.address, "/v1/embeddings", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let usage = answer.json()["usage"].clone();
    let [row] = &bed.closed_rows().await[..] else { panic!("one call, one row") };
    assert_eq!(usage["cost"].as_f64(), Some(prices().cost(row).unwrap().to_f64()));
    let tokens = usage["prompt_tokens"].as_f64().unwrap();
    assert!((usage["cost"].as_f64().unwrap() * 1e6 - tokens * 0.15).abs() < 1e-9, "{usage}");
    bed.server.stop().await;
}
