//! Usage over HTTP: what it says is what clients were told.

use mirai_ledger::location::Location;
use mirai_ledger::{Ledger, LedgerConfig};
use serde_json::{Value, json};

use crate::client::{get, post};
use crate::support::*;

struct Bed {
    folder: tempfile::TempDir,
    server: TestServer,
}

async fn start() -> Bed {
    let folder = tempfile::tempdir().unwrap();
    let location: Location = format!("sqlite://{}/ledger.db", folder.path().display()).parse().unwrap();
    let config =
        LedgerConfig { writer: "w".into(), takeover: true, applications: 4, ..LedgerConfig::default() };
    let ledger = Ledger::start(location.open(None).unwrap(), None, config).unwrap();
    let server = TestServer::start(Options { ledger: Some(ledger), ..Options::default() }).await;
    server.handle.read_usage(location.clone()).unwrap();
    assert!(server.handle.read_usage(location).is_err(), "there is one reader");
    Bed { folder, server }
}

fn results(page: &Value) -> Vec<Value> {
    let buckets = page["data"].as_array().unwrap();
    buckets.iter().flat_map(|bucket| bucket["results"].as_array().unwrap().clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_are_what_clients_were_told() {
    let bed = start().await;
    let address = bed.server.address;
    let (mut input, mut output) = (0, 0);
    for n in 1..4 {
        let body = chat("count", &json!({"max_tokens": 5 * n, "n": n}));
        let usage = post(address, "/v1/chat/completions", &body).await.json()["usage"].clone();
        input += usage["prompt_tokens"].as_u64().unwrap();
        output += usage["completion_tokens"].as_u64().unwrap();
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let path = format!(
        "/v1/organization/usage/completions?start_time={}&bucket_width=1h&group_by=model&group_by=project_id",
        now - 7200
    );
    let answer = get(address, &path).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    let page = answer.json();
    assert_eq!((page["object"].as_str(), page["has_more"].as_bool()), (Some("page"), Some(false)));
    let results = results(&page);
    let sum = |name: &str| results.iter().map(|result| result[name].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("input_tokens"), sum("output_tokens"), sum("num_model_requests")), (input, output, 3));
    assert_eq!((results[0]["model"].as_str(), results[0]["project_id"].as_str()), (Some(MODEL), Some("")));
    // The same without /v1, and nothing of another application.
    assert_eq!(get(address, path.strip_prefix("/v1").unwrap()).await.status, 200);
    let other = get(address, &format!("{path}&project_ids=other")).await.json();
    assert_eq!(other["data"], json!([]));
    let wrong = get(address, "/v1/organization/usage/completions?start_time=soon").await;
    assert_eq!((wrong.status, wrong.json()["error"]["param"].as_str()), (400, Some("start_time")));
    for (metric, value) in [
        ("mirai_ledger_rows_closed_total", 3.0),
        ("mirai_ledger_closed_tokens_total", output as f64),
        ("mirai_ledger_application_completion_tokens_total{application=\"\"}", output as f64),
        ("mirai_ledger_application_requests_total", 3.0),
        ("mirai_ledger_health", 0.0),
        ("mirai_ledger_open_rows", 0.0),
    ] {
        assert!((bed.server.metric(metric).await - value).abs() < 1e-9, "{metric}");
    }
    assert!(bed.server.metric("mirai_ledger_commit_seconds_count").await >= 3.0);
    bed.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_ledger_there_is_nothing_to_read() {
    let server = TestServer::plain().await;
    let answer = get(server.address, "/v1/organization/usage/completions?start_time=1").await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (404, Some("not_found")));
    assert!(server.metric("mirai_ledger_rows_closed_total").await.abs() < 1e-9);
    server.stop().await;
}

/// What a client says of people and what it asks and hears: none of it is on the disk, in metrics or in sums.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_request_but_its_counts_is_kept() {
    const CANARY: &str = "canary-4c1e";
    let bed = start().await;
    let address = bed.server.address;
    let body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": format!("{CANARY} asks")}],
        "max_tokens": 400,
        "user": format!("{CANARY} user"),
        "safety_identifier": format!("{CANARY} identifier"),
        "metadata": {"name": format!("{CANARY} metadata")},
    });
    let answer = post(address, "/v1/chat/completions", &body).await.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let heard: String = text.chars().filter(char::is_ascii_alphanumeric).take(24).collect();
    let wrong = post(address, "/v1/chat/completions", &json!({"model": CANARY, "messages": []})).await;
    assert_eq!(wrong.status / 100, 4);
    let metrics = get(address, "/metrics").await.text();
    let usage = get(address, "/v1/organization/usage/completions?start_time=1&group_by=model").await.text();
    bed.server.stop().await;
    let mut disk = Vec::new();
    for file in std::fs::read_dir(bed.folder.path()).unwrap() {
        disk.extend(std::fs::read(file.unwrap().path()).unwrap());
    }
    let disk = String::from_utf8_lossy(&disk).into_owned();
    assert!(disk.contains(MODEL), "the row is there");
    for (place, text) in [("disk", &disk), ("metrics", &metrics), ("usage", &usage)] {
        for word in [CANARY, heard.as_str()] {
            assert!(!text.contains(word), "{word} is in {place}");
        }
    }
}
