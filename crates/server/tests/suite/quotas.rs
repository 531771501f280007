//! What applications may use: refused with the right numbers, given back to the token, counted over replicas.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mirai_ledger::identity::{NewKey, Pepper};
use mirai_ledger::location::Location;
use mirai_ledger::quota::{QuotaConfig, Quotas};
use mirai_server::IdentityConfig;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{Answer, head, request};
use crate::support::*;

const PEPPER: &str = "a-secret-of-32-bytes-or-more-without-spaces";

/// Applications and their keys, in files as an operator has them.
struct Applications {
    folder: tempfile::TempDir,
    keys: Vec<String>,
}

impl Applications {
    /// One application for each text of limits, called `a`, `b` and so on.
    fn new(quotas: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pepper = Pepper::new(1, PEPPER.as_bytes()).unwrap();
        let (mut file, mut keys) = (String::new(), Vec::new());
        for (name, quota) in ('a'..).zip(quotas) {
            let key = NewKey::new(&format!("{name}-1"), &pepper).unwrap();
            file.push_str(&format!(
                "[[application]]\nname = \"{name}\"\n[application.quota]\n{quota}\n{}",
                key.stanza
            ));
            keys.push(key.key);
        }
        std::fs::write(folder.path().join("applications.toml"), file).unwrap();
        std::fs::write(folder.path().join("pepper"), format!("1 {PEPPER}\n")).unwrap();
        Self { folder, keys }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self, quotas: Quotas) -> Options {
        let mut options = Options { quotas: Some(quotas), ..Options::default() };
        options.config.identity = IdentityConfig {
            applications_file: Some(self.path("applications.toml")),
            pepper_file: Some(self.path("pepper")),
            ..IdentityConfig::default()
        };
        options
    }

    async fn start(&self, more: impl FnOnce(&mut Options)) -> TestServer {
        let mut options = self.options(Quotas::start_in_memory(config()).unwrap());
        more(&mut options);
        TestServer::start(options).await
    }

    async fn chat(&self, server: &TestServer, who: usize, more: &Value) -> Answer {
        let bearer = format!("Bearer {}", self.keys[who]);
        let headers = [("Authorization", bearer.as_str())];
        let body = chat("count", more).to_string();
        request(server.address, "POST", "/v1/chat/completions", &headers, Some(body.as_bytes())).await
    }
}

fn config() -> QuotaConfig {
    QuotaConfig { max_wait: PATIENCE, ..QuotaConfig::default() }
}

fn number(answer: &Answer, name: &str) -> u64 {
    answer.header(name).unwrap_or_else(|| panic!("{name}: {:?}", answer.headers)).parse().unwrap()
}

fn total(usage: &Value) -> u64 {
    usage["total_tokens"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_requests_is_refused_with_what_a_client_needs() {
    let all = Applications::new(&["requests_per_minute = 2", "", "requests_per_minute = 1000"]);
    let server = all.start(|_| {}).await;
    for left in [1, 0] {
        let answer = all.chat(&server, 0, &json!({"max_tokens": 3})).await;
        assert_eq!(answer.status, 200);
        assert_eq!(number(&answer, "x-ratelimit-limit-requests"), 2);
        assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), left);
        assert!(answer.header("x-ratelimit-reset-requests").unwrap().ends_with('s'));
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), None);
    }
    let refused = all.chat(&server, 0, &json!({"max_tokens": 3})).await;
    assert_eq!(refused.status, 429);
    let error = &refused.json()["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!("rate_limit_exceeded"), &json!("rate_limit_error")));
    assert!(error["message"].as_str().unwrap().contains("requests per minute: limit 2, 0 left"), "{error}");
    assert!((1..=62).contains(&number(&refused, "retry-after")));
    assert_eq!(number(&refused, "x-ratelimit-remaining-requests"), 0);
    // What is wrong for another reason says how it stands all the same.
    let bad = all.chat(&server, 0, &json!({"n": 0})).await;
    assert_eq!((bad.status, number(&bad, "x-ratelimit-limit-requests")), (400, 2));
    // Others are not concerned.
    let other = all.chat(&server, 1, &json!({"max_tokens": 3})).await;
    assert_eq!((other.status, other.header("x-ratelimit-limit-requests")), (200, None));
    assert_eq!(all.chat(&server, 2, &json!({"max_tokens": 3})).await.status, 200);
    for (name, value) in [
        ("mirai_quota_refused_total{limit=\"requests_per_minute\"}", 1.0),
        ("mirai_quota_refused_total{limit=\"tokens_per_day\"}", 0.0),
        ("mirai_quota_admitted_total", 3.0),
        ("mirai_quota_unsettled_total", 0.0),
        ("mirai_quota_health", 0.0),
    ] {
        assert_eq!(server.metric(name).await, value, "{name}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_were_not_used_come_back() {
    let all = Applications::new(&["tokens_per_day = 3000\nmax_output_tokens = 1000"]);
    let server = all.start(|_| {}).await;
    let mut left = 3000;
    for more in [
        json!({"max_tokens": 40}),
        json!({"max_tokens": 900, "n": 2, "stop": "a"}),
        json!({"max_tokens": 40, "stream": true, "stream_options": {"include_usage": true}}),
    ] {
        let answer = all.chat(&server, 0, &more).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(number(&answer, "x-ratelimit-limit-tokens"), 3000);
        let streams = more.get("stream").is_some();
        let usage = if streams {
            answer.events().pop().unwrap()["usage"].clone()
        } else {
            answer.json()["usage"].clone()
        };
        let told = number(&answer, "x-ratelimit-remaining-tokens");
        // The head of a stream knows what is reserved, an answer's what was used.
        let prompt = usage["prompt_tokens"].as_u64().unwrap();
        let expected = if streams { left - prompt - 40 } else { left - total(&usage) };
        assert_eq!(told, expected, "{more}");
        left -= total(&usage);
    }
    // Without a word about its length, an answer is as long as it may be.
    let answer = all.chat(&server, 0, &json!({"max_tokens": null})).await;
    assert!(total(&answer.json()["usage"]) <= 1000 + 100, "{}", answer.text());
    let large = all.chat(&server, 0, &json!({"n": 4, "max_tokens": null})).await;
    assert_eq!((large.status, large.header("retry-after")), (429, None));
    assert!(large.json()["error"]["message"].as_str().unwrap().contains("too large"), "{}", large.text());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_its_place_and_pays_for_what_was_written() {
    let all = Applications::new(&["concurrent_requests = 1\ntokens_per_day = 100000"]);
    let server = all.start(|options| options.step = Duration::from_millis(1)).await;
    let body = chat("count", &json!({"stream": true, "max_tokens": 1900})).to_string();
    let bearer = format!("Bearer {}", all.keys[0]);
    let headers = [("Authorization", bearer.as_str())];
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&head("POST", "/v1/chat/completions", &headers, Some(body.len()))).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    while seen.windows(6).filter(|window| window == b"\ndata:").count() < 30 {
        assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
    }
    let second = all.chat(&server, 0, &json!({"max_tokens": 1})).await;
    assert_eq!((second.status, number(&second, "retry-after")), (429, 1));
    assert!(second.text().contains("requests at once"), "{}", second.text());
    drop(stream);
    server
        .until("its place is free", PATIENCE, async |server| {
            all.chat(server, 0, &json!({"max_tokens": 1})).await.status == 200
        })
        .await;
    let tokens = server.metric("mirai_generation_tokens_total").await
        + server.metric("mirai_prompt_tokens_total").await;
    let answer = all.chat(&server, 0, &json!({"max_tokens": 1})).await;
    let used = 100_000 - number(&answer, "x-ratelimit-remaining-tokens") - total(&answer.json()["usage"]);
    assert_eq!(used as f64, tokens);
    assert!((28..2100).contains(&used), "{used}");
    assert_eq!(server.metric("mirai_quota_unsettled_total").await, 0.0);
    server.stop().await;
}

/// Two servers on one file, as two replicas on one database: together they stay within the limit.
#[tokio::test(flavor = "multi_thread")]
async fn two_servers_share_a_limit() {
    let all = Applications::new(&["tokens_per_day = 4000"]);
    let file = all.path("ledger.db");
    let quotas = |file: &Path| {
        let place: Location = format!("sqlite://{}", file.display()).parse().unwrap();
        place.start_quotas(config()).unwrap()
    };
    let servers = [
        TestServer::start(all.options(quotas(&file))).await,
        TestServer::start(all.options(quotas(&file))).await,
    ];
    let client = async |server: &TestServer| {
        let mut used = 0;
        loop {
            let answer = all.chat(server, 0, &json!({"max_tokens": 50, "stop": "a"})).await;
            match answer.status {
                200 => used += total(&answer.json()["usage"]),
                429 => return used,
                other => panic!("{other}: {}", answer.text()),
            }
        }
    };
    let [one, two] = &servers;
    let (a, b, c, d) = tokio::join!(client(one), client(two), client(one), client(two));
    let used = a + b + c + d;
    assert!((1000..=4000).contains(&used), "{used}");
    for server in servers {
        server.stop().await;
    }
}
