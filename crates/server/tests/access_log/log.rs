//! One line for each request, with everything that an operator needs and nothing that a client wrote.

use std::io::Write;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::client::{get, post, request};
use crate::support::*;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn each_request_is_one_line_without_its_text() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let server = TestServer::plain().await;
    let canary = "k4n4ry-0123456789abcdef";
    let body = chat(canary, &json!({"stop": [canary], "user": canary, "stream": true})).to_string();
    let headers = [("X-Request-Id", "from-the-caller"), ("User-Agent", canary), ("Authorization", canary)];
    let answer =
        request(server.address, "POST", "/v1/chat/completions", &headers, Some(body.as_bytes())).await;
    assert_eq!(answer.status, 200);
    post(server.address, "/v1/completions", &json!({"prompt": canary, "temperature": canary})).await;
    get(server.address, &format!("/{canary}")).await;
    server.stop().await;
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(!text.contains(canary), "{text}");
    let all: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let requests: Vec<&Value> =
        all.iter().filter(|line| line["target"] == "mirai::access").map(|line| &line["fields"]).collect();
    assert_eq!(requests.len(), 3, "{text}");
    let chat = requests[0];
    assert_eq!((&chat["route"], &chat["status"]), (&json!("/v1/chat/completions"), &json!(200)));
    assert_eq!((&chat["outcome"], &chat["completion_tokens"]), (&json!("ok"), &json!(16)));
    assert_eq!(chat["caller_id"], "from-the-caller");
    assert!(chat["request_id"].as_str().unwrap().starts_with("req-"));
    assert!(chat["prompt_tokens"].as_u64().unwrap() > 20 && chat["ttft_ms"].as_f64().unwrap() > 0.0);
    assert_eq!((&requests[1]["status"], &requests[1]["error"]), (&json!(400), &json!("invalid_value")));
    assert_eq!((&requests[2]["route"], &requests[2]["status"]), (&json!("none"), &json!(404)));
}
