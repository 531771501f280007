//! Who gets in: every route, method and credential, from the document that the server itself publishes.

use serde_json::{Value, json};

use crate::client::{head, raw, request};
use crate::support::*;

const KEYS: [&str; 2] = ["alpha-key", "beta-key"];

async fn guarded() -> TestServer {
    let mut options = Options::default();
    options.config.api_keys = KEYS.iter().map(|k| (*k).to_owned()).collect();
    TestServer::start(options).await
}

/// (method, path, whether a key is needed) of every route.
fn routes() -> Vec<(String, String, bool)> {
    let document: Value = serde_json::from_str(mirai_server::openapi::COMMITTED).unwrap();
    let mut list = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let path = path.replace("{model}", ALIAS);
            let key = operation.get("security").is_some();
            let short = path.strip_prefix("/v1").filter(|_| key).map(str::to_owned);
            for path in [Some(path.clone()), short].into_iter().flatten() {
                list.push((method.to_uppercase(), path, key));
            }
        }
    }
    assert!(list.len() >= 16, "{list:?}");
    list
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_method_and_credential() {
    let server = guarded().await;
    let long = format!("Bearer {}", "x".repeat(8000));
    let credentials: [(Option<&str>, bool); 12] = [
        (None, false),
        (Some("Bearer alpha-key"), true),
        (Some("bearer beta-key"), true),
        (Some("Bearer wrong"), false),
        (Some("Bearer"), false),
        (Some("Bearer "), false),
        (Some("Bearer alpha-ke"), false),
        (Some("Bearer alpha-keyy"), false),
        (Some("Bearer ' OR 1=1"), false),
        (Some("Basic alpha-key"), false),
        (Some("alpha-key"), false),
        (Some(&long), false),
    ];
    let mut cells = 0;
    for (method, path, needs_key) in routes() {
        for (credential, valid) in credentials {
            for tried in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"] {
                let headers: Vec<_> = credential.iter().map(|c| ("Authorization", *c)).collect();
                let body = (tried == "POST").then_some(b"{}".as_slice());
                let answer = request(server.address, tried, &path, &headers, body).await;
                let open = !needs_key && tried == method;
                let expected: &[u16] = match (valid || open, tried == method) {
                    (false, _) => &[401],
                    (true, true) => &[200, 400],
                    (true, false) => &[405],
                };
                assert!(
                    expected.contains(&answer.status),
                    "{tried} {path} {credential:?}: {}",
                    answer.status
                );
                if answer.status == 401 {
                    assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
                    assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
                }
                if answer.status == 405 {
                    assert!(
                        answer.header("allow").is_some_and(|allow| allow.contains(&method)),
                        "{tried} {path}"
                    );
                }
                cells += 1;
            }
        }
    }
    println!("{cells} cells");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_spellings_do_not_open_a_door() {
    let server = guarded().await;
    let tries = [
        "//v1/models",
        "/v1/./models",
        "/v1/../v1/models",
        "/v1/%6dodels",
        "/V1/MODELS",
        "/v1/models/",
        "/health/../v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/metrics/../v1/models",
        "/health?/v1/models",
        "http://evil/v1/models",
        "/v1/models?x=/health",
        "/v1/models#/health",
    ];
    for path in tries {
        let answer = request(server.address, "GET", path, &[], None).await;
        let health = path.starts_with("/health?");
        assert!(matches!(answer.status, 400 | 401 | 404) || health, "{path}: {}", answer.status);
        let text = answer.text();
        assert!(!text.contains("max_model_len"), "{path}: {text}");
    }
    for extra in [
        "Authorization: Bearer alpha-key\r\nAuthorization: Bearer wrong\r\n",
        "Authorization: Bearer wrong\r\nAuthorization: Bearer alpha-key\r\n",
        "Authorization: Bearer alpha-key\0\r\n",
    ] {
        let bytes = format!("GET /v1/models HTTP/1.1\r\nHost: x\r\n{extra}\r\n");
        let answer = raw(server.address, bytes.as_bytes()).await.unwrap();
        assert!(matches!(answer.status, 400 | 401), "{extra}: {}", answer.status);
    }
    for host in ["x/?", "x/#", "/v1/health"] {
        let bytes = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n");
        assert!(matches!(raw(server.address, bytes.as_bytes()).await.unwrap().status, 400 | 401));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_file_changes_the_keys_and_an_unusable_one_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys");
    std::fs::write(&path, "old\n").unwrap();
    let mut options = Options::default();
    options.config.api_keys = vec!["fixed".to_owned()];
    options.config.api_key_file = Some(path.clone());
    options.config.timeouts.reload_seconds = 0.02;
    let server = TestServer::start(options).await;
    let statuses = async || {
        let mut all = Vec::new();
        for key in ["Bearer fixed", "Bearer old", "Bearer new"] {
            all.push(
                request(server.address, "GET", "/v1/models", &[("Authorization", key)], None).await.status,
            );
        }
        all
    };
    let reloads = async |result: &str, least: f64| {
        let name = format!("mirai_file_reloads_total{{files=\"api_keys\",result=\"{result}\"}}");
        server.until("the file to be read", PATIENCE, async |s| s.metric(&name).await >= least).await;
    };
    assert_eq!(statuses().await, [200, 200, 401]);
    std::fs::write(&path, "new\n").unwrap();
    reloads("taken", 1.0).await;
    assert_eq!(statuses().await, [200, 401, 200]);
    for (bad, least) in [("", 1.0), ("with space\n", 2.0)] {
        std::fs::write(&path, bad).unwrap();
        reloads("refused", least).await;
        assert_eq!(statuses().await, [200, 401, 200], "{bad:?}");
    }
    std::fs::write(&path, "old\nnew\n").unwrap();
    reloads("taken", 2.0).await;
    assert_eq!(statuses().await, [200, 200, 200]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_do_not_share_prefixes() {
    let server = guarded().await;
    let body = chat(&"a secret beginning ".repeat(20), &json!({})).to_string();
    let cached = async |key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("Authorization", bearer.as_str())];
        let answer =
            request(server.address, "POST", "/v1/chat/completions", &headers, Some(body.as_bytes())).await;
        answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached("alpha-key").await, 0);
    assert!(cached("alpha-key").await > 0);
    assert_eq!(cached("beta-key").await, 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_may_have_a_door_of_their_own() {
    let mut options = Options::default();
    options.config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    let server = TestServer::start(options).await;
    let own = server.metrics_address.unwrap();
    assert_eq!(crate::client::get(own, "/metrics").await.status, 200);
    assert_eq!(crate::client::get(own, "/health/live").await.status, 200);
    assert_eq!(crate::client::get(own, "/v1/models").await.status, 404);
    assert_eq!(crate::client::get(server.address, "/metrics").await.status, 404);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_looked_up_never_opened() {
    let server = TestServer::plain().await;
    for name in ["../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%00b", "%ff", &"x".repeat(4096)] {
        let bytes = head("GET", &format!("/v1/models/{name}"), &[], None);
        let answer = raw(server.address, &bytes).await.unwrap();
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (404, &json!("model_not_found")),
            "{name}"
        );
        let body = completion(&json!("x"), &json!({"model": name}));
        assert_eq!(crate::client::post(server.address, "/v1/completions", &body).await.status, 404);
    }
    server.stop().await;
}
