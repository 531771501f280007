//! Whole benchmarks against a small server: exact counts, every kind of failure, both loops.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::Ordering;

use clap::Parser;
use mirai_bench::{BenchError, BenchOptions, FailureKind, Metric, Progress, Report, TokenIdSource, run};
use serde_json::Value;
use support::Server;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: BenchOptions,
}

fn options(url: &str, args: &[&str]) -> BenchOptions {
    let all = ["bench", "--url", url].into_iter().chain(args.iter().copied());
    Cli::try_parse_from(all).unwrap().options
}

async fn bench(url: &str, args: &[&str]) -> Result<Report, BenchError> {
    run(options(url, args), Progress::hidden()).await
}

/// The one kind of failure of a run in which everything fails.
async fn only_failure(server: &Server, fault: &str, more: &[&str]) -> (FailureKind, String) {
    let mut args = vec!["--num-prompts", "3", "--concurrency", "2", "--output-len", "4", "--input-len", "5"];
    args.extend(more);
    let report = bench(&server.fault(fault), &args).await.unwrap();
    assert_eq!((report.completed, report.failed()), (0, 3), "{fault}");
    assert_eq!(report.failures.len(), 1, "{fault}: {:?}", report.failures);
    let (kind, failures) = report.failures.into_iter().next().unwrap();
    assert_eq!(failures.count, 3);
    (kind, failures.example)
}

#[tokio::test]
async fn a_closed_loop_counts_exactly() {
    let server = support::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("report.json");
    let args = [
        "--num-prompts",
        "20",
        "--concurrency",
        "4",
        "--input-len",
        "30",
        "--prefix-len",
        "6",
        "--output-len",
        "7",
        "--warmup",
        "3",
        "--goodput",
        "ttft:60000",
        "--api-key",
        "sk-test",
        "--json",
        file.to_str().unwrap(),
    ];
    let report = bench(&server.url, &args).await.unwrap();
    assert_eq!((report.completed, report.failed()), (20, 0));
    assert_eq!(report.total_input_tokens, 20 * 36);
    assert_eq!(report.total_output_tokens, 20 * 7);
    assert_eq!(report.cached_input_tokens, 40);
    assert_eq!(report.output_len_mismatches, 0);
    assert_eq!(report.good, Some(20));
    assert!(report.max_concurrent_requests <= 4);
    assert_eq!(report.metrics[&Metric::Itl].count, 20 * 6);
    assert_eq!(report.metrics[&Metric::Tpot].count, 20);
    assert!(report.metrics[&Metric::Ttft].min > 0.0);
    assert!(report.metrics[&Metric::E2el].mean >= report.metrics[&Metric::Ttft].mean);
    assert!(report.lag.is_none());

    let json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(json["model_id"], "test-model");
    assert_eq!(json["completed"], 20);
    assert_eq!(json["token_id_source"], "tokenize");
    assert!(json["connections_opened"].as_u64().unwrap() <= 4);

    let prompts = server.seen.prompts();
    assert_eq!(prompts.len(), 23);
    assert!(
        prompts.iter().all(|prompt| prompt.as_array().unwrap()[..6] == prompts[0].as_array().unwrap()[..6])
    );
    let ids = prompts.iter().flat_map(|prompt| prompt.as_array().unwrap());
    assert!(ids.map(|id| id.as_u64().unwrap()).all(|id| (500..600).contains(&id)));
    assert!(server.seen.keys.lock().unwrap().iter().all(|key| key == "Bearer sk-test"));
    // One connection to ask and warm up, and at most four at once.
    assert!(server.seen.connections.load(Ordering::SeqCst) <= 5);
}

#[tokio::test]
async fn chat_sends_text_and_takes_the_servers_count() {
    let server = support::start().await;
    let args = [
        "--endpoint",
        "chat",
        "--num-prompts",
        "3",
        "--input-len",
        "11",
        "--output-len",
        "5",
        "--model",
        "given",
    ];
    let report = bench(&format!("{}/v1", server.url), &args).await.unwrap();
    assert_eq!((report.completed, report.total_input_tokens, report.total_output_tokens), (3, 33, 15));
    // The chunk that announces the role is no token.
    assert_eq!(report.metrics[&Metric::Itl].count, 3 * 4);
    let requests = server.seen.requests.lock().unwrap();
    assert!(requests.iter().all(|(path, body)| path == "/v1/chat/completions" && body["model"] == "given"));
}

#[tokio::test]
async fn an_open_loop_keeps_its_schedule() {
    let server = support::start().await;
    let args = ["--num-prompts", "30", "--request-rate", "500", "--output-len", "3", "--input-len", "4"];
    let report = bench(&server.url, &args).await.unwrap();
    assert_eq!(report.completed, 30);
    let lag = report.lag.as_ref().unwrap();
    assert_eq!(lag.count, 30);
    assert!(lag.min >= 0.0);
    let from_intended = report.from_intended[&Metric::E2el].mean;
    assert!(from_intended >= report.metrics[&Metric::E2el].mean);
    // Thirty arrivals at 500 a second are spread over time, not sent at once.
    assert!(report.duration_s > 0.01, "{}", report.duration_s);
    assert_eq!(report.to_json()["request_rate"], 500.0);
}

#[tokio::test]
async fn a_late_client_is_seen() {
    // One slot for many arrivals at once: what waits for the slot is behind its schedule.
    let server = support::start().await;
    let args = ["--num-prompts", "40", "--request-rate", "1000000", "--concurrency", "1", "--input-len", "4"];
    let report = bench(&server.url, &args).await.unwrap();
    assert_eq!(report.max_concurrent_requests, 1);
    let lag = report.lag.clone().unwrap();
    let service = report.metrics[&Metric::E2el].mean;
    // The last of 40 waits for 39 others, the mean one for about 20.
    assert!(lag.max > 20.0 * service && lag.mean > 5.0 * service, "{lag:?} {service}");
    assert!(report.from_intended[&Metric::Ttft].mean > lag.mean);
}

#[tokio::test]
async fn traces_replay_with_shared_prefixes() {
    let server = support::start().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.jsonl");
    let rows = [
        r#"{"timestamp":0,"input_length":600,"output_length":3,"hash_ids":[1,2]}"#,
        r#"{"timestamp":1000,"input_length":700,"output_length":400,"hash_ids":[1,3]}"#,
    ];
    std::fs::write(&path, rows.join("\n")).unwrap();
    let args = [
        "--dataset",
        "trace",
        "--dataset-path",
        path.to_str().unwrap(),
        "--trace-speed",
        "1000",
        "--max-output-len",
        "5",
    ];
    let report = bench(&server.url, &args).await.unwrap();
    assert_eq!((report.num_prompts, report.total_input_tokens, report.total_output_tokens), (2, 1300, 8));
    let json = report.to_json();
    assert_eq!((&json["request_rate"], &json["clipped_outputs"]), (&"trace".into(), &1.into()));
    let prompts = server.seen.prompts();
    let (a, b) = (prompts[0].as_array().unwrap(), prompts[1].as_array().unwrap());
    assert_eq!(a[..512], b[..512]);
    assert_ne!(a[512..600], b[512..600]);
}

#[tokio::test]
async fn prompts_from_a_file() {
    let server = support::start().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.txt");
    std::fs::write(&path, "un deux trois\nquatre\n").unwrap();
    let args = ["--dataset", "prompts", "--dataset-path", path.to_str().unwrap(), "--num-prompts", "4"];
    let report = bench(&server.url, &args).await.unwrap();
    assert_eq!((report.completed, report.total_input_tokens), (4, 8));
    let requests = server.seen.requests.lock().unwrap();
    assert!(requests.iter().all(|(_, body)| body.get("ignore_eos").is_none()));
}

#[tokio::test]
async fn every_failure_has_its_kind() {
    let server = support::start().await;
    for (fault, kind, words) in [
        ("busy", FailureKind::Http(503), "queue full"),
        ("hangup", FailureKind::Transport, "closed"),
        ("cut", FailureKind::Transport, ""),
        ("early", FailureKind::CutStream, "before [DONE] after 1 chunks"),
        ("garbage", FailureKind::Malformed, ""),
        ("nonsense", FailureKind::Malformed, "not a JSON object"),
        ("event", FailureKind::ServerError, "device lost"),
        ("json", FailureKind::Malformed, "application/json"),
        ("nousage", FailureKind::NoUsage, "include_usage"),
        ("empty", FailureKind::NoTokens, "0 completion tokens"),
    ] {
        let (found, message) = only_failure(&server, fault, &[]).await;
        assert_eq!(found, kind, "{fault}: {message}");
        assert!(message.contains(words), "{fault}: {message}");
    }
    let (found, message) = only_failure(&server, "headers", &["--timeout", "1"]).await;
    assert_eq!(found, FailureKind::Timeout, "{message}");
}

#[tokio::test]
async fn nobody_listens() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let report = bench(&url, &["--model", "m", "--num-prompts", "2"]).await.unwrap();
    assert_eq!(report.failures[&FailureKind::Connect].count, 2);
    let error = bench(&url, &[]).await.unwrap_err();
    assert!(matches!(error, BenchError::Server { .. }), "{error}");
}

#[tokio::test]
async fn a_connection_that_the_server_closes_is_replaced() {
    let server = support::start().await;
    let args = ["--num-prompts", "3", "--concurrency", "1", "--input-len", "4", "--output-len", "2"];
    let report = bench(&server.fault("close"), &args).await.unwrap();
    assert_eq!(report.completed, 3, "{:?}", report.failures);
    // The first request uses the connection that asked for the model.
    assert_eq!(report.to_json()["connections_opened"], 2);
}

#[tokio::test]
async fn a_body_that_does_not_end_costs_only_its_connection() {
    let server = support::start().await;
    let args = ["--num-prompts", "2", "--concurrency", "1", "--input-len", "4", "--output-len", "2"];
    let report = bench(&server.fault("linger"), &args).await.unwrap();
    assert_eq!(report.completed, 2);
    assert_eq!(report.to_json()["connections_opened"], 1);
}

#[tokio::test]
async fn token_id_sources() {
    let server = support::start().await;
    let small = ["--num-prompts", "1", "--input-len", "8", "--output-len", "2"];
    for fault in ["notokenize", "fewids"] {
        let json = bench(&server.fault(fault), &small).await.unwrap().to_json();
        assert_eq!(json["token_id_source"], "safe_range", "{fault}");
    }
    let given = [&small[..], &["--token-ids", "7:9"]].concat();
    let json = bench(&server.url, &given).await.unwrap().to_json();
    assert_eq!(json["token_id_source"], "given");
    let last = server.seen.prompts().pop().unwrap();
    assert!(last.as_array().unwrap().iter().all(|id| (7..=9).contains(&id.as_u64().unwrap())));
    assert_ne!(TokenIdSource::Given, TokenIdSource::Text);
}

#[tokio::test]
async fn answers_of_another_length_are_counted() {
    let server = support::start().await;
    let args = ["--num-prompts", "2", "--input-len", "4", "--output-len", "6"];
    let report = bench(&server.fault("short"), &args).await.unwrap();
    assert_eq!((report.total_output_tokens, report.output_len_mismatches), (10, 2));
}

#[tokio::test]
async fn what_stops_a_run() {
    let server = support::start().await;
    for (fault, args, words) in [
        ("nomodels", &[][..], "lists no model"),
        ("notjson", &[], "/v1/models"),
        ("locked", &[], "401"),
        ("busy", &["--warmup", "2"], "warm-up: 2 of 2 requests failed; the first: http_503: queue full"),
        ("x", &["--num-prompts", "0"], "--num-prompts"),
        ("x", &["--dataset", "trace", "--dataset-path", "/nowhere.csv"], "/nowhere.csv: cannot read"),
        ("x", &["--num-prompts", "1", "--json", "/nowhere/r.json"], "/nowhere/r.json: cannot write"),
    ] {
        let error = bench(&server.fault(fault), args).await.unwrap_err().to_string();
        assert!(error.contains(words), "{fault}: {error}");
    }
}

/// The certificate is for `localhost` and is its own authority; made with `openssl req -x509 -newkey ec
/// -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=localhost -addext subjectAltName=DNS:localhost`.
#[tokio::test]
async fn https_needs_a_trusted_certificate() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let certificate = data.join("localhost.pem");
    let chain = vec![CertificateDer::from_pem_file(&certificate).unwrap()];
    let key = PrivateKeyDer::from_pem_file(data.join("localhost.key")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that does not trust the certificate ends the handshake.
                let stream = acceptor.accept(stream).await?;
                support::serve(stream, Default::default()).await
            });
        }
    });
    let args = ["--num-prompts", "2", "--input-len", "4", "--output-len", "3"];
    let trusted = [&args[..], &["--ca-bundle", certificate.to_str().unwrap()]].concat();
    let report = bench(&url, &trusted).await.unwrap();
    assert_eq!((report.completed, report.total_output_tokens), (2, 6));

    // An authority that signed nothing here.
    let other = data.join("other.pem");
    let untrusted = [&args[..], &["--ca-bundle", other.to_str().unwrap()]].concat();
    let error = bench(&url, &untrusted).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
}
