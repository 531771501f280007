//! One line for each request, with everything that an operator needs and nothing that a client wrote; and lines
//! for what an operator must mend.
//!
//! `tracing` remembers for the whole process whether anybody wants an event, and asks the thread that reaches
//! the event first. Among tests that run without a subscriber that answer may be "nobody", whatever a test has
//! set for its own thread. So these tests have one subscriber for their process, set before anything else.

use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{get, post, request};
use crate::support::*;
use crate::world::World;

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

impl Lines {
    /// What the process logs from now on.
    fn record() -> Self {
        static ALL: OnceLock<Lines> = OnceLock::new();
        let lines = ALL.get_or_init(|| {
            let lines = Self::default();
            let writer = lines.clone();
            let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
            tracing::subscriber::set_global_default(subscriber).unwrap();
            lines
        });
        lines.0.lock().unwrap().clear();
        lines.clone()
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn parsed(&self) -> Vec<Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

#[tokio::test]
async fn each_request_is_one_line_without_its_text() {
    let _alone = crate::ALONE.lock().await;
    let lines = Lines::record();
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
    let text = lines.text();
    assert!(!text.contains(canary), "{text}");
    let all = lines.parsed();
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

#[tokio::test]
async fn a_key_file_that_cannot_be_used_is_an_error_without_its_keys() {
    let _alone = crate::ALONE.lock().await;
    let lines = Lines::record();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys");
    std::fs::write(&path, "good\n").unwrap();
    let mut options = Options::default();
    options.config.api_key_file = Some(path.clone());
    options.config.timeouts.reload_seconds = 0.02;
    let server = TestServer::start(options).await;
    std::fs::write(&path, "n0t good\n").unwrap();
    let start = Instant::now();
    let line = loop {
        let found = lines.parsed().into_iter().find(|line| line["level"] == "ERROR");
        if let Some(line) = found {
            break line;
        }
        assert!(start.elapsed() < PATIENCE, "{}", lines.text());
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let (message, error) = (line["fields"]["message"].as_str(), line["fields"]["error"].as_str());
    assert!(message.unwrap().contains("API keys not reloaded; the old ones stay"), "{line}");
    assert!(error.unwrap().contains(path.to_str().unwrap()) && error.unwrap().contains("line 1"), "{line}");
    assert!(!lines.text().contains("n0t"), "{}", lines.text());
    server.stop().await;
}

/// Keys, tokens, users and names that nobody knows: in no log line, no metric, no error.
#[tokio::test]
async fn no_credential_and_no_person_reaches_log_metric_or_error() {
    let _alone = crate::ALONE.lock().await;
    let lines = Lines::record();
    let canary = "k4n4ry";
    let world = World::start().await;
    let personal = json!({"sub": format!("{canary}-sub"), "email": format!("{canary}@example.org")});
    let mut active = world.active("4711@chat");
    active["sub"] = json!(format!("{canary}-opaque-sub"));
    active["username"] = json!(format!("{canary}-name"));
    let stranger = crate::signer::Signer::new("ES256");
    let tokens = [
        world.keys[0].clone(),
        world.keys[1].clone(),
        world.keys[4].clone(),
        world.signed("chat-app", &personal),
        world.signed(&format!("{canary}-client"), &personal),
        world.signed("chat-app", &json!({"exp": 1, "jti": canary})),
        stranger.token(canary, &world.provider.claims("chat-app")),
        world.opaque(&format!("{canary}-opaque"), active),
        world.opaque(&format!("{canary}-odd"), json!({"active": canary})),
        format!("{canary}-wrong"),
        format!("mirai-{canary}"),
        format!("{}{canary}", world.keys[1]),
    ];
    let mut pages = String::new();
    for token in &tokens {
        for consumer in [None, Some("chat"), Some("k4n4ry-consumer"), Some("k4n4ry,consumer")] {
            let bearer = format!("Bearer {token}");
            let mut headers = vec![("Authorization", bearer.as_str()), ("X-End-User", "k4n4ry-end-user")];
            headers.extend(consumer.map(|consumer| ("X-Consumer-Username", consumer)));
            let body = chat(
                "hello",
                &json!({"user": "k4n4ry-user", "safety_identifier": "k4n4ry-safety",
                "metadata": {"application": "k4n4ry-application", "user": "k4n4ry-meta"}}),
            );
            let body = body.to_string();
            let answer = request(
                world.server.address,
                "POST",
                "/v1/chat/completions",
                &headers,
                Some(body.as_bytes()),
            )
            .await;
            pages.push_str(&answer.text());
            let admin = world.server.admin_address.unwrap();
            pages.push_str(&request(admin, "GET", "/admin/applications", &headers, None).await.text());
        }
    }
    world.provider.change(|behaviour| behaviour.broken = Some((500, "k4n4ry-broken".into())));
    pages.push_str(&world.models("k4n4ry-unavailable").await.text());
    pages.push_str(&get(world.server.address, "/metrics").await.text());
    let secrets = world.path().join("pepper");
    std::fs::write(&secrets, "1 k4n4ry-short\n").unwrap();
    let refused = "mirai_file_reloads_total{files=\"identity\",result=\"refused\"}";
    world.server.until("the file to be refused", PATIENCE, async |s| s.metric(refused).await >= 1.0).await;
    world.server.stop().await;
    let log = lines.text();
    assert!(log.contains("not reloaded") && log.contains("could not be looked up"), "{log}");
    for (place, text) in [("log", &log), ("answers and metrics", &pages)] {
        assert!(!text.contains(canary), "{place}: {text}");
        for token in &tokens {
            assert!(!text.contains(token.as_str()), "{place}: {text}");
        }
    }
}
