//! Who gets in: every route, method and credential, from the table that the server itself publishes.

use mirai_server::doors::{CREDENTIALS, Credential, Listener, doors};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Answer, head, raw, request};
use crate::provider::now;
use crate::support::*;
use crate::world::World;

const KEYS: [&str; 2] = ["alpha-key", "beta-key"];

async fn guarded() -> TestServer {
    let mut options = Options::default();
    options.config.api_keys = KEYS.iter().map(|k| (*k).to_owned()).collect();
    TestServer::start(options).await
}

/// What to send for a kind of credential: headers, in all the shapes that mean the same.
fn presented(world: &World, credential: Credential) -> Vec<Vec<(&'static str, String)>> {
    let bearer = |token: &str| vec![("Authorization", format!("Bearer {token}"))];
    let expired = json!({"exp": now() - 600});
    match credential {
        Credential::Nothing => vec![Vec::new()],
        Credential::Wrong => {
            let good = &world.keys[3];
            let mut all: Vec<_> =
                ["wrong", "", "mirai-", "' OR 1=1", &"x".repeat(8000), &good[..69], &format!("{good}0")]
                    .map(bearer)
                    .into();
            all.push(vec![("Authorization", "Bearer".to_owned())]);
            all.push(vec![("Authorization", format!("Basic {good}"))]);
            all.push(vec![("Authorization", good.clone())]);
            all.push([bearer(good), bearer(good)].concat());
            all.push([bearer("wrong"), bearer(good)].concat());
            all
        }
        Credential::PlainKey => vec![bearer(&world.keys[0])],
        Credential::ApplicationKey => vec![bearer(&world.keys[1])],
        Credential::UsageKey => vec![bearer(&world.keys[2])],
        Credential::AdminKey => vec![bearer(&world.keys[3])],
        Credential::Signed => vec![bearer(&world.signed("chat-app", &json!({})))],
        Credential::SignedExpired => {
            let stranger = crate::signer::Signer::new("ES256");
            vec![
                bearer(&world.signed("ops-app", &expired)),
                bearer(&stranger.token("k0", &world.provider.claims("ops-app"))),
            ]
        }
        Credential::SignedStranger => vec![bearer(&world.signed("nobody", &json!({})))],
        Credential::Opaque => vec![bearer(&world.opaque("door-opaque", world.active("4711@chat")))],
        Credential::OpaqueInactive => vec![bearer("door-inactive")],
        Credential::Gateway => {
            vec![[bearer(&world.keys[4]), vec![("X-Consumer-Username", "ops".to_owned())]].concat()]
        }
    }
}

/// The table as published, every cell of it, with every method.
#[tokio::test(flavor = "multi_thread")]
async fn every_door_opens_as_published() {
    let world = World::with(|options| {
        options.config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    })
    .await;
    let admin = world.server.admin_address.unwrap();
    let metrics = world.server.metrics_address.unwrap();
    let (mut cells, mut requests) = (0, 0);
    for (credential, name, _, worth) in CREDENTIALS {
        let shapes = presented(&world, credential);
        for door in doors() {
            cells += 1;
            let address = match door.listener {
                Listener::Main => world.server.address,
                Listener::Metrics => metrics,
                Listener::Admin => admin,
            };
            let path = door.path.replace("{model}", ALIAS);
            // One shape with every method, the others with the door's own.
            for (shape, tried) in METHODS
                .iter()
                .map(|tried| (&shapes[0], *tried))
                .chain(shapes[1..].iter().map(|shape| (shape, door.method)))
            {
                let headers: Vec<_> = shape.iter().map(|(name, value)| (*name, value.as_str())).collect();
                let body = (tried == "POST").then_some(b"{}".as_slice());
                let bytes =
                    [head(tried, &path, &headers, body.map(<[u8]>::len)), body.unwrap_or_default().to_vec()]
                        .concat();
                let status = if tried == "HEAD" {
                    status_only(address, &bytes).await
                } else {
                    let answer = raw(address, &bytes).await.unwrap();
                    check_refusal(&answer, &door.path);
                    answer.status
                };
                requests += 1;
                let own = tried == door.method || (tried == "HEAD" && door.method == "GET");
                let expected: &[u16] = match (door.refusal(worth), own) {
                    (None, true) => &[200, 400],
                    (Some(refusal), true) => &[refusal],
                    (_, false) => match worth {
                        Ok(_) => &[405],
                        Err(status) => &[status],
                    },
                };
                assert!(expected.contains(&status), "{tried} {path} with {name}: {status}, not {expected:?}");
            }
        }
    }
    println!("{cells} cells, {requests} requests");
    assert_eq!(cells, doors().len() * CREDENTIALS.len());
    world.server.stop().await;
}

const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"];

fn check_refusal(answer: &Answer, path: &str) {
    match answer.status {
        401 => {
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{path}");
            assert_eq!(answer.json()["error"]["code"], "invalid_api_key", "{path}");
        }
        403 => assert_eq!(answer.json()["error"]["type"], "permission_error", "{path}"),
        405 => assert!(answer.header("allow").is_some(), "{path}"),
        _ => {}
    }
}

/// Of an answer without a body.
async fn status_only(address: std::net::SocketAddr, bytes: &[u8]) -> u16 {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut line = [0; 12];
    stream.read_exact(&mut line).await.unwrap();
    std::str::from_utf8(&line[9..]).unwrap().parse().unwrap()
}

/// `MIRAI_BLESS=1` writes the page anew.
#[test]
fn the_page_of_doors_is_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/doors.md");
    let made = mirai_server::doors::markdown();
    if std::env::var_os("MIRAI_BLESS").is_some() {
        std::fs::write(path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap();
    assert!(made == committed, "docs/doors.md is not what the routes say; see this test's comment");
}

/// What clients read names the same doors.
#[test]
fn the_document_knows_every_door_of_clients() {
    let document: Value = serde_json::from_str(mirai_server::openapi::COMMITTED).unwrap();
    let mut seen = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let door =
                doors().into_iter().find(|door| door.path == *path && door.method == method.to_uppercase());
            let door = door.unwrap_or_else(|| panic!("{method} {path}"));
            assert_eq!(operation.get("security").is_some(), door.needs != "nothing", "{path}");
            assert_ne!(door.listener, Listener::Admin, "{path}");
            seen += 1;
        }
    }
    assert!(seen >= 17, "{seen}");
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
        "http://evil/health/../v1/models",
        "/v1%2Fmodels",
        "/v1/models%00",
        "/v1/models;/health",
        "/v1\\models",
        "/%2e%2e/v1/models",
        "/health/live/../../v1/models",
        "/v1/models%20",
        "*",
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
        "Authorization: Bearer alpha-key, Bearer alpha-key\r\n",
        "Authorization: Bearer\talpha-key\r\n",
        "Authorization : Bearer alpha-key\r\n",
        " Authorization: Bearer alpha-key\r\n",
        "X: y\r\n Authorization: Bearer alpha-key\r\n",
        "X-Api-Key: alpha-key\r\n",
        "X-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n",
        "X-HTTP-Method-Override: HEAD\r\n",
        "X-Forwarded-For: 127.0.0.1\r\n",
        "Host: y\r\nAuthorization: Bearer alpha-key\r\n",
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
