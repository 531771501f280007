//! Reports of samples made by hand.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use super::*;
use crate::error::Failure;
use crate::options::tests::parse;
use crate::request::Timeline;
use crate::sse::Usage;

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// First token after `ttft`, then `gaps` chunks every 10 ms; usage with the last.
fn good(intended: u64, start: u64, ttft: u64, gaps: usize, tokens: u64) -> Sample {
    let last = ms(ttft + 10 * gaps as u64);
    let timeline = Timeline { ttft: Some(ms(ttft)), last, last_token: last, itl_us: vec![10_000; gaps] };
    let outcome = Ok(Usage { prompt_tokens: 100, completion_tokens: tokens, cached_tokens: 16 });
    Sample {
        intended: ms(intended),
        start: ms(start),
        end: ms(start) + timeline.last,
        requested: 5,
        timeline,
        outcome,
    }
}

fn bad(start: u64, kind: FailureKind) -> Sample {
    let outcome = Err(Failure::new(kind, format!("broken at {start}")));
    let timeline = Timeline::default();
    Sample { intended: ms(start), start: ms(start), end: ms(start + 1), requested: 5, timeline, outcome }
}

fn report(args: &[&str], is_open_loop: bool, mut samples: Vec<Sample>) -> Report {
    let facts = Facts {
        model: "org/model".into(),
        is_open_loop,
        clipped_inputs: 2,
        clipped_outputs: 1,
        token_ids: TokenIdSource::Tokenize,
        connections: 3,
        started: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_158_546),
    };
    Report::new(&parse(args), facts, &mut samples)
}

fn near(value: &Value, expected: f64) -> bool {
    (value.as_f64().unwrap() - expected).abs() < 1e-9 * (1.0 + expected)
}

#[test]
fn numbers_by_hand() {
    let samples = vec![good(0, 0, 100, 4, 5), good(0, 50, 200, 4, 5), good(0, 1000, 300, 4, 9)];
    let json = report(&["--concurrency", "2", "--percentiles", "50,99.9"], false, samples).to_json();
    for (key, expected) in [
        ("duration", 1.34),
        ("completed", 3.0),
        ("failed", 0.0),
        ("total_input_tokens", 300.0),
        ("total_cached_tokens", 48.0),
        ("total_output_tokens", 19.0),
        ("request_throughput", 3.0 / 1.34),
        ("output_throughput", 19.0 / 1.34),
        ("total_token_throughput", 319.0 / 1.34),
        ("max_concurrent_requests", 2.0),
        ("max_output_tokens_per_s", 10.0),
        ("output_len_mismatches", 1.0),
        ("mean_ttft_ms", 200.0),
        ("median_ttft_ms", 200.0),
        ("std_ttft_ms", (20_000.0_f64 / 3.0).sqrt()),
        ("p50_ttft_ms", 200.0),
        ("p99.9_ttft_ms", 299.8),
        ("mean_itl_ms", 10.0),
        ("std_itl_ms", 0.0),
        ("mean_tpot_ms", (10.0 + 10.0 + 5.0) / 3.0),
        ("mean_e2el_ms", 240.0),
        ("max_concurrency", 2.0),
        ("num_prompts", 3.0),
        ("burstiness", 1.0),
    ] {
        assert!(near(&json[key], expected), "{key}: {} instead of {expected}", json[key]);
    }
    assert_eq!(json["date"], "20231116-181546");
    assert_eq!(json["endpoint_type"], "openai");
    assert_eq!(json["model_id"], "org/model");
    assert_eq!(json["request_rate"], "inf");
    assert_eq!(json["request_goodput"], Value::Null);
    assert_eq!(json["token_id_source"], "tokenize");
    assert!(json.get("mean_lag_ms").is_none() && json.get("ttfts").is_none());
}

#[test]
fn an_open_loop_shows_its_lag() {
    let samples = vec![good(0, 0, 100, 1, 5), good(20, 50, 100, 1, 5)];
    let value = report(&["--request-rate", "4"], true, samples);
    let json = value.to_json();
    assert_eq!(json["request_rate"], 4.0);
    assert!(near(&json["mean_lag_ms"], 15.0) && near(&json["max_lag_ms"], 30.0));
    assert!(near(&json["mean_ttft_ms"], 100.0));
    assert!(near(&json["mean_ttft_from_intended_ms"], 115.0));
    assert!(near(&json["p50_e2el_from_intended_ms"], 125.0));
    assert_eq!(report(&[], true, vec![]).to_json()["request_rate"], "trace");
}

#[test]
fn goodput_needs_every_objective() {
    let samples = || {
        vec![
            good(0, 0, 100, 4, 5),
            good(0, 0, 200, 4, 5),
            good(0, 0, 960, 4, 5),
            bad(5, FailureKind::Timeout),
        ]
    };
    let rate = |args: &[&str]| report(args, false, samples()).to_json()["request_goodput"].as_f64().unwrap();
    assert!((rate(&["--goodput", "ttft:200"]) - 2.0).abs() < 1e-9);
    assert!((rate(&["--goodput", "ttft:200", "e2el:150"]) - 1.0).abs() < 1e-9);
    assert!((rate(&["--goodput", "tpot:9"])).abs() < 1e-9);
    assert!((rate(&["--goodput", "tpot:10.1", "ttft:1000"]) - 3.0).abs() < 1e-9);
}

#[test]
fn failures_are_counted_by_kind() {
    let samples = vec![
        bad(3, FailureKind::Http(503)),
        bad(1, FailureKind::Http(503)),
        bad(2, FailureKind::Timeout),
        good(0, 0, 5, 0, 1),
    ];
    let value = report(&["--save-detailed"], false, samples);
    assert_eq!((value.completed, value.failed()), (1, 3));
    let json = value.to_json();
    assert_eq!(json["failures"]["http_503"], json!({"count": 2, "example": "broken at 1"}));
    assert_eq!(json["failures"]["timeout"]["count"], 1);
    assert_eq!(
        json["errors"],
        json!(["", "http_503: broken at 1", "timeout: broken at 2", "http_503: broken at 3"])
    );
    assert_eq!(json["ttfts"], json!([0.005, 0.0, 0.0, 0.0]));
    assert_eq!(json["output_lens"], json!([1, 0, 0, 0]));
    // One token has no time per token after the first.
    assert_eq!(value.metrics[&Metric::Tpot].count, 0);
    let mut table = Vec::new();
    value.write_table(&mut table).unwrap();
    let table = String::from_utf8(table).unwrap();
    for words in
        ["Failed requests", "http_503, for example: broken at 1", "Clipped prompts", "another length"]
    {
        assert!(table.contains(words), "{words}: {table}");
    }
}

#[test]
fn the_table_of_an_open_loop() {
    let args = ["--request-rate", "4", "--goodput", "ttft:1", "--percentile-metrics", "ttft"];
    let mut table = Vec::new();
    report(&args, true, vec![good(0, 1, 2, 3, 4)]).write_table(&mut table).unwrap();
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("Lag of the client") && table.contains("scheduled time"), "{table}");
    assert!(table.contains("Good requests per second") && !table.contains("Inter-token"), "{table}");
}

#[test]
fn nothing_was_sent() {
    let value = report(&[], false, vec![]);
    assert_eq!((value.request_throughput(), value.max_concurrent_requests), (0.0, 0));
    assert_eq!(value.to_json()["mean_ttft_ms"], 0.0);
}

#[test]
fn dates() {
    for (seconds, text) in [
        (0, "19700101-000000"),
        (951_782_399, "20000228-235959"),
        (951_782_400, "20000229-000000"),
        (4_102_444_799, "20991231-235959"),
    ] {
        assert_eq!(compact_date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
    }
}

#[test]
fn sources() {
    let keys = [TokenIdSource::Text, TokenIdSource::Given, TokenIdSource::Tokenize, TokenIdSource::SafeRange];
    assert_eq!(keys.map(TokenIdSource::key), ["text", "given", "tokenize", "safe_range"]);
}
