//! A small OpenAI-like server on a free port, by hand over TCP, so that it can also misbehave below HTTP.
//! The first part of the path (`http://host/FAULT`) chooses how.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

/// What the server has seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// Bodies of the generation requests, with their paths.
    pub(crate) requests: Mutex<Vec<(String, Value)>>,
    /// Values of the `authorization` header.
    pub(crate) keys: Mutex<Vec<String>>,
    pub(crate) connections: AtomicUsize,
}

impl Seen {
    pub(crate) fn prompts(&self) -> Vec<Value> {
        self.requests.lock().unwrap().iter().map(|(_, body)| body["prompt"].clone()).collect()
    }
}

pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) seen: Arc<Seen>,
}

impl Server {
    pub(crate) fn fault(&self, name: &str) -> String {
        format!("{}/{name}", self.url)
    }
}

pub(crate) async fn start() -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Seen::default());
    let shared = seen.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            shared.connections.fetch_add(1, Ordering::SeqCst);
            stream.set_nodelay(true).unwrap();
            let seen = shared.clone();
            // A client that hangs up is an error here and none of the test's.
            tokio::spawn(async move { serve(stream, seen).await });
        }
    });
    Server { url, seen }
}

/// Serves one connection until it closes.
pub(crate) async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    seen: Arc<Seen>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            head.push(line.trim().to_owned());
        }
        let header = |name: &str| {
            head.iter().skip(1).find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        let length = header("content-length").map_or(0, |text| text.parse().unwrap());
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if let Some(key) = header("authorization") {
            seen.keys.lock().unwrap().push(key);
        }
        let path = head[0].split(' ').nth(1).unwrap().to_owned();
        let fault = path.trim_start_matches('/').split('/').next().unwrap().to_owned();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        if !answer(&mut stream, &path, &fault, &body, &seen).await? {
            return Ok(());
        }
    }
}

/// Answers one request; says whether the connection goes on.
async fn answer(
    out: &mut (impl AsyncWrite + AsyncRead + Unpin),
    path: &str,
    fault: &str,
    body: &Value,
    seen: &Seen,
) -> std::io::Result<bool> {
    if path.ends_with("/v1/models") {
        let list = match fault {
            "nomodels" => json!({"data": []}),
            "notjson" => return plain(out, "200 OK", "<html>").await.map(|()| true),
            "locked" => return plain(out, "401 Unauthorized", "{}").await.map(|()| true),
            _ => json!({"object": "list", "data": [{"id": "test-model"}]}),
        };
        return plain(out, "200 OK", &list.to_string()).await.map(|()| true);
    }
    if path.ends_with("/tokenize") {
        let tokens: Vec<u32> = if fault == "fewids" { vec![1, 2, 3] } else { (500..600).collect() };
        let (status, text) = match fault {
            "notokenize" => ("404 Not Found", "{}".to_owned()),
            _ => ("200 OK", json!({"tokens": tokens}).to_string()),
        };
        return plain(out, status, &text).await.map(|()| true);
    }
    seen.requests.lock().unwrap().push((path.to_owned(), body.clone()));
    match fault {
        "busy" => {
            let text = json!({"error": {"message": "queue full", "type": "overloaded"}}).to_string();
            return plain(out, "503 Service Unavailable", &text).await.map(|()| true);
        }
        "hangup" => return Ok(false),
        "garbage" => out.write_all(b"\x00\x01\x02 this is not HTTP\r\n\r\n").await.map(|()| false)?,
        "headers" => return endless_headers(out).await.map(|()| false),
        "json" => return plain(out, "200 OK", "{\"choices\":[]}").await.map(|()| true),
        _ => return stream_answer(out, path, fault, body).await,
    };
    Ok(false)
}

/// Headers that never end: one more each time the client has had a chance to give up.
async fn endless_headers(out: &mut (impl AsyncWrite + AsyncRead + Unpin)) -> std::io::Result<()> {
    out.write_all(b"HTTP/1.1 200 OK\r\nX-Wait: 1").await?;
    out.flush().await?;
    // Ends when the client closes.
    let mut byte = [0];
    out.read_exact(&mut byte).await.map(|_| ())
}

async fn plain(out: &mut (impl AsyncWrite + Unpin), status: &str, text: &str) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        text.len()
    );
    out.write_all(format!("{head}{text}").as_bytes()).await?;
    out.flush().await
}

async fn chunk(out: &mut (impl AsyncWrite + Unpin), text: &str) -> std::io::Result<()> {
    out.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await?;
    out.flush().await
}

/// Length of a prompt in tokens: the ids, or the words.
fn prompt_tokens(body: &Value) -> usize {
    let text = |value: &Value| value.as_str().map(|text| text.split(' ').count());
    let content = &body["messages"][0]["content"];
    body["prompt"]
        .as_array()
        .map(Vec::len)
        .or_else(|| text(&body["prompt"]))
        .or_else(|| text(content))
        .unwrap_or(0)
}

async fn stream_answer(
    out: &mut (impl AsyncWrite + Unpin),
    path: &str,
    fault: &str,
    body: &Value,
) -> std::io::Result<bool> {
    let is_chat = path.ends_with("/chat/completions");
    let limit = if is_chat { &body["max_completion_tokens"] } else { &body["max_tokens"] };
    let count = limit.as_u64().unwrap_or(0) - u64::from(fault == "short");
    let connection = if fault == "close" { "close" } else { "keep-alive" };
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: {connection}\r\n\
         transfer-encoding: chunked\r\n\r\n"
    );
    out.write_all(head.as_bytes()).await?;
    if is_chat {
        chunk(out, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n").await?;
    }
    for number in 0..count {
        let piece = format!("w{number} ");
        let choice = if is_chat { json!({"delta": {"content": piece}}) } else { json!({"text": piece}) };
        let event = format!("data: {}\n\n", json!({"choices": [choice], "usage": null}));
        // Cut within an event, so that reads do not end with events.
        let (first, second) = event.split_at(event.len() / 2);
        chunk(out, first).await?;
        chunk(out, second).await?;
        match fault {
            "cut" => return Ok(false),
            "early" => {
                out.write_all(b"0\r\n\r\n").await?;
                return Ok(true);
            }
            "nonsense" => chunk(out, "data: {\"choices\":[\n\n").await?,
            "event" => chunk(out, "data: {\"error\":{\"message\":\"device lost\"}}\n\n").await?,
            _ => {}
        }
    }
    let tokens = if fault == "empty" { 0 } else { count };
    let usage = json!({"prompt_tokens": prompt_tokens(body), "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 2}});
    if fault != "nousage" {
        chunk(out, &format!("data: {}\n\n", json!({"choices": [], "usage": usage}))).await?;
    }
    chunk(out, "data: [DONE]\n\n").await?;
    if fault == "linger" {
        // The response never ends after [DONE]: the connection is of no further use.
        std::future::pending::<()>().await;
    }
    out.write_all(b"0\r\n\r\n").await?;
    out.flush().await?;
    Ok(fault != "close")
}
