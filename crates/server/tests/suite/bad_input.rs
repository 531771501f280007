//! Every field of every endpoint with wrong values, while healthy streams run that must not notice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::client::{head, post, raw, request};
use crate::support::*;

/// Values that a numeric field must refuse, as JSON text, with those that some field may accept left out there.
const NUMBERS: &[&str] = &[
    "-1",
    "-0.5",
    "1e39",
    "-1e39",
    "1e308",
    "1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775808",
    "18446744073709551616",
    "\"5\"",
    "[]",
    "{}",
    "true",
    "[1]",
];
const NOT_NUMBERS: &[&str] = &["\"5\"", "[]", "{}", "true", "NaN", "1e400", "[1]"];
const NOT_INTEGERS: &[&str] =
    &["1.5", "1.0", "\"5\"", "[]", "{}", "true", "NaN", "1e400", "1e39", "9223372036854775808"];
const NOT_BOOLEANS: &[&str] = &["1", "0", "\"true\"", "[]", "{}", "1.5"];
const NOT_IDS: &[&str] =
    &["[-1]", "[264]", "[4294967296]", "[1.5]", "[\"1\"]", "7", "\"7\"", "{}", "[null]", "[[1]]"];
const PRESENT: &[&str] = &["true", "[1]", "{\"a\":1}", "\"x\"", "3"];

/// (field, JSON text) pairs that every generation endpoint must refuse.
fn common() -> Vec<(&'static str, String)> {
    let mut list: Vec<(&'static str, String)> = Vec::new();
    let mut add = |field: &'static str, values: &[&str]| {
        list.extend(values.iter().map(|value| (field, (*value).to_owned())));
    };
    add("temperature", NUMBERS);
    add("temperature", &["2.01"]);
    add("top_p", NUMBERS);
    add("top_p", &["0", "1.01", "1e-60"]);
    add("min_p", NUMBERS);
    add("min_p", &["1.01"]);
    add("presence_penalty", &["2.1", "-2.1", "1e39", "-1e39", "1e308"]);
    add("presence_penalty", NOT_NUMBERS);
    add("frequency_penalty", &["2.1", "-2.1", "1e39", "-1e39", "1e308"]);
    add("frequency_penalty", NOT_NUMBERS);
    add("repetition_penalty", NUMBERS);
    add("repetition_penalty", &["0", "10.1", "1e-60"]);
    add("top_k", &["-2", "-9223372036854775808"]);
    add("top_k", NOT_INTEGERS);
    add("seed", NOT_INTEGERS);
    for field in ["n", "max_tokens", "min_tokens", "prompt_logprobs"] {
        add(field, NOT_INTEGERS);
        add(field, &["-1", "4294967296", "4294967295", "2147483648"]);
    }
    add("n", &["0", "129"]);
    add("max_tokens", &["0", "2048"]);
    add("prompt_logprobs", &["21"]);
    for field in [
        "stream",
        "ignore_eos",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "spaces_between_special_tokens",
    ] {
        add(field, NOT_BOOLEANS);
    }
    add("spaces_between_special_tokens", &["false"]);
    add("stop", &["1", "true", "{}", "[1]", "[null]", "\"\"", "[\"\"]"]);
    add("stop_token_ids", NOT_IDS);
    add("allowed_token_ids", NOT_IDS);
    add("allowed_token_ids", &["[]"]);
    add("bad_words", &["1", "\"x\"", "[1]", "[\"\"]", "[\" \"]", "{}"]);
    add(
        "logit_bias",
        &[
            "1",
            "\"x\"",
            "[1]",
            "{\"x\":1}",
            "{\"-1\":1}",
            "{\"1\":\"x\"}",
            "{\"1\":1e39}",
            "{\"1\":101}",
            "{\"1\":-101}",
            "{\"264\":1}",
            "{\"4294967296\":1}",
            "{\"1\":null}",
            "{\"1\":1,\"1\":2}",
        ],
    );
    add("model", &["1", "[]", "{}", "true"]);
    add(
        "stream_options",
        &[
            "1",
            "[]",
            "\"x\"",
            "{\"include_usage\":1}",
            "{\"include_usage\":true}",
            "{\"continuous_usage_stats\":true}",
        ],
    );
    add("cache_salt", &["1", "\"\"", "[]"]);
    add(
        "response_format",
        &[
            "1",
            "\"x\"",
            "{}",
            "{\"type\":\"json_object\"}",
            "{\"type\":1}",
            "{\"type\":\"json_schema\",\"json_schema\":{}}",
            "{\"type\":\"text\",\"json_schema\":{\"a\":1}}",
        ],
    );
    for field in [
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "use_beam_search",
        "logits_processors",
        "lora_request",
        "prompt_embeds",
        "truncate_prompt_tokens",
        "kv_transfer_params",
        "vllm_xargs",
        "repetition_detection",
        "logprob_token_ids",
    ] {
        add(field, PRESENT);
    }
    add("priority", &["1", "-1", "true", "\"x\""]);
    add("length_penalty", &["0.5", "\"x\""]);
    list.push(("stop", format!("{:?}", "x".repeat(1025))));
    list.push(("stop", json!(vec!["x"; 17]).to_string()));
    list.push(("stop", json!(vec!["x"; 10_000]).to_string()));
    list.push(("bad_words", json!(vec!["x"; 129]).to_string()));
    list.push(("cache_salt", format!("{:?}", "x".repeat(129))));
    list.push(("stop_token_ids", json!(vec![1; 1025]).to_string()));
    let bias: BTreeMap<String, f32> = (0..1_000_000).map(|i| (i.to_string(), 1.0)).collect();
    list.push(("logit_bias", json!(bias).to_string()));
    list
}

fn chat_only() -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    let mut add = |field: &'static str, values: &[&str]| {
        list.extend(values.iter().map(|value| (field, (*value).to_owned())));
    };
    add(
        "messages",
        &[
            "null",
            "[]",
            "1",
            "\"x\"",
            "{}",
            "[1]",
            "[{}]",
            "[{\"role\":\"user\"}]",
            "[{\"content\":\"x\"}]",
            "[{\"role\":\"king\",\"content\":\"x\"}]",
            "[{\"role\":1,\"content\":\"x\"}]",
            "[{\"role\":\"user\",\"content\":1}]",
            "[{\"role\":\"user\",\"content\":{}}]",
            "[{\"role\":\"user\",\"content\":[1]}]",
            "[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]",
            "[{\"role\":\"user\",\"content\":[{\"text\":\"x\"}]}]",
            "[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"http://127.0.0.1/\"}}]}]",
            "[{\"role\":\"user\",\"content\":[{\"type\":\"input_audio\",\"input_audio\":{}}]}]",
            "[{\"role\":\"assistant\",\"tool_calls\":[{}]}]",
            "[{\"role\":\"assistant\",\"tool_calls\":1}]",
        ],
    );
    add("max_completion_tokens", &["0", "-1", "1.5", "\"5\"", "4294967296", "2048", "true", "[]"]);
    add("logprobs", NOT_BOOLEANS);
    add("top_logprobs", &["5", "21", "-1", "1.5", "\"1\"", "true", "[]", "4294967296"]);
    add("tools", &["[{\"type\":\"function\"}]", "{\"a\":1}"]);
    add("tool_choice", &["\"required\"", "{\"type\":\"function\"}"]);
    add("functions", &["[{}]"]);
    add("function_call", &["{\"name\":\"f\"}"]);
    add("chat_template", &["\"{{ messages }}\"", "{\"a\":1}", "true"]);
    add(
        "chat_template_kwargs",
        &[
            "1",
            "[]",
            "{\"chat_template\":\"x\"}",
            "{\"tokenize\":true}",
            "{\"conversation\":\"x\"}",
            "{\"messages\":\"x\"}",
            "{\"enable_thinking\":[]}",
            "{\"documents\":{}}",
        ],
    );
    add("reasoning_effort", &["1", "\"\"", "\"a b\"", "{}"]);
    add("echo", &["true"]);
    add("modalities", &["[\"audio\"]", "\"text\"", "[1]"]);
    for field in [
        "audio",
        "prediction",
        "web_search_options",
        "documents",
        "mm_processor_kwargs",
        "thinking_token_budget",
    ] {
        add(field, PRESENT);
    }
    add("continue_final_message", &["1", "\"x\""]);
    add("add_generation_prompt", &["1", "\"x\""]);
    list.push(("messages", json!(vec![json!({"role": "user", "content": "x"}); 2049]).to_string()));
    let many = vec![json!({"role": "user", "content": "x"}); 1_000_000];
    list.push(("messages", json!(many).to_string()));
    list.push(("messages", json!([{"role": "user", "content": "long ".repeat(40_000)}]).to_string()));
    list
}

fn completion_only() -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    let mut add = |field: &'static str, values: &[&str]| {
        list.extend(values.iter().map(|value| (field, (*value).to_owned())));
    };
    add(
        "prompt",
        &[
            "null",
            "[]",
            "1",
            "true",
            "{}",
            "[1.5]",
            "[-1]",
            "[264]",
            "[4294967295]",
            "[4294967296]",
            "[\"a\",1]",
            "[1,\"a\"]",
            "[[1],\"a\"]",
            "[[264]]",
            "[[-1]]",
            "[null]",
            "[[null]]",
            "[[[1]]]",
        ],
    );
    add("logprobs", &["21", "-1", "1.5", "\"1\"", "true", "[]", "4294967296"]);
    add("best_of", &["2", "-1", "1.5", "\"1\"", "true"]);
    add("echo", NOT_BOOLEANS);
    add("suffix", &["\"x\"", "1", "[]"]);
    for field in ["chat_template", "tools"] {
        add(field, PRESENT);
    }
    add("chat_template_kwargs", &["{\"enable_thinking\":true}"]);
    list.push(("prompt", json!(vec!["x"; 129]).to_string()));
    list.push(("prompt", json!("x".repeat(1_000_000)).to_string()));
    list.push(("prompt", json!(vec![1; 1_000_000]).to_string()));
    list
}

fn other() -> Vec<(&'static str, &'static str, String)> {
    let mut list = Vec::new();
    let tokenize = [
        "{}",
        "{\"prompt\":1}",
        "{\"prompt\":\"a\",\"messages\":[]}",
        "{\"messages\":[]}",
        "{\"messages\":1}",
        "{\"prompt\":\"a\",\"model\":7}",
        "{\"prompt\":\"a\",\"chat_template\":\"x\"}",
        "{\"prompt\":\"a\",\"tools\":[1]}",
        "{\"prompt\":\"a\",\"add_special_tokens\":1}",
        "{\"prompt\":\"a\",\"return_token_strs\":\"x\"}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"chat_template_kwargs\":{\"messages\":1}}",
        "[]",
        "",
    ];
    let detokenize = [
        "{}",
        "{\"tokens\":1}",
        "{\"tokens\":[-1]}",
        "{\"tokens\":[1.5]}",
        "{\"tokens\":[4294967295]}",
        "{\"tokens\":[\"1\"]}",
        "{\"tokens\":null}",
        "{\"tokens\":[259000]}",
        "{\"tokens\":[],\"model\":[]}",
        "7",
    ];
    list.extend(tokenize.iter().map(|body| ("/tokenize", "", (*body).to_owned())));
    list.extend(detokenize.iter().map(|body| ("/detokenize", "", (*body).to_owned())));
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        for body in [
            "",
            " ",
            "{",
            "}",
            "[",
            "null",
            "[]",
            "\"x\"",
            "7",
            "{\"a\"}",
            "{\"a\":1,}",
            "{'a':1}",
            "{}x",
            "\u{0}",
            "{\"a\":\"\\ud800\"}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\u{1}\"}",
        ] {
            list.push((path, "", body.to_owned()));
        }
        list.push((path, "", "[".repeat(100_000)));
        list.push((path, "", format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000))));
        list.push((path, "", "{\"a\":".repeat(70_000)));
        list.push((path, "", format!("{}{}", " ".repeat(1 << 20), "[")));
    }
    list
}

/// Every case: (path, field, body).
fn cases() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut cases = Vec::new();
    for (path, base, own) in [
        ("/v1/chat/completions", chat("q", &json!({"max_tokens": 4})), chat_only()),
        ("/v1/completions", completion(&json!("q"), &json!({"max_tokens": 4})), completion_only()),
    ] {
        for (field, value) in common().into_iter().chain(own) {
            let mut map = base.as_object().unwrap().clone();
            map.remove(field);
            let rest = Value::Object(map).to_string();
            let body = format!("{{{field:?}:{value},{}", &rest[1..]);
            cases.push((path, field.to_owned(), body.into_bytes()));
        }
        for (a, b) in [("\"min_tokens\":9", "\"max_tokens\":3"), ("\"temperature\":1", "\"temperature\":1")] {
            let body = format!(
                "{{\"prompt\":\"q\",\"messages\":[{{\"role\":\"user\",\"content\":\"q\"}}],{a},{b}}}"
            );
            cases.push((path, a.to_owned(), body.into_bytes()));
        }
        cases.push((path, "utf-8".to_owned(), b"{\"prompt\":\"\xff\",\"messages\":[]}".to_vec()));
    }
    cases.extend(other().into_iter().map(|(path, field, body)| (path, field.to_owned(), body.into_bytes())));
    cases
}

/// Streams whose bytes must not change.
async fn healthy(server: &TestServer, seed: u64) -> Vec<Value> {
    let more = json!({"seed": seed, "max_tokens": 300, "stream": true, "logprobs": true, "n": 2});
    let answer = post(server.address, "/v1/chat/completions", &chat(&format!("healthy {seed}"), &more)).await;
    assert_eq!(answer.status, 200);
    let mut events = answer.events();
    for event in &mut events {
        event["id"] = Value::Null;
        event["created"] = Value::Null;
    }
    // Chunks of two choices may interleave differently; within a choice their order is fixed.
    events.sort_by_key(|event| event["choices"][0]["index"].as_u64());
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_400_and_neighbours_do_not_notice() {
    let server = Arc::new(
        TestServer::start(Options { step: std::time::Duration::from_micros(300), ..Options::default() })
            .await,
    );
    let mut undisturbed = Vec::new();
    for seed in 0..8 {
        undisturbed.push(healthy(&server, seed).await);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut streams = JoinSet::new();
    for seed in 0..8 {
        let (server, stop, expected) = (server.clone(), stop.clone(), undisturbed[seed as usize].clone());
        streams.spawn(async move {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) || rounds == 0 {
                assert!(healthy(&server, seed).await == expected, "stream {seed} changed");
                rounds += 1;
            }
            rounds
        });
    }
    let cases = cases();
    let count = cases.len();
    assert!(count >= 300, "{count} cases");
    let cases = Arc::new(std::sync::Mutex::new(cases));
    let mut attackers = JoinSet::new();
    for _ in 0..4 {
        let (server, cases) = (server.clone(), cases.clone());
        attackers.spawn(async move {
            loop {
                let Some((path, field, body)) = cases.lock().unwrap().pop() else { return };
                let answer = request(server.address, "POST", path, &[], Some(&body)).await;
                let shown = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
                assert!((400..500).contains(&answer.status), "{path} {field}: {} for {shown}", answer.status);
                assert_eq!(answer.header("content-type"), Some("application/json"));
                let error = answer.json();
                let error = &error["error"];
                assert!(error["message"].is_string() && error["code"].is_string(), "{error}");
                let param = error["param"].as_str().unwrap_or_default();
                let syntax = error["code"] == "invalid_json";
                let named = field.is_empty()
                    || field.starts_with('"')
                    || syntax
                    || param.starts_with(&field)
                    || (field == "max_completion_tokens"
                        || field == "max_tokens"
                        || field == "min_tokens"
                        || field == "n")
                    || error["code"] == "model_not_found"
                    || field == "utf-8"
                    || (field == "chat_template_kwargs" && param == "chat_template_kwargs")
                    || (field == "prompt" || field == "seed");
                assert!(named, "{path} {field}: {error} for {shown}");
            }
        });
    }
    while let Some(result) = attackers.join_next().await {
        result.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let mut rounds = 0;
    while let Some(result) = streams.join_next().await {
        rounds += result.unwrap();
    }
    println!("{count} bad requests beside {rounds} healthy streams");
    assert_eq!(server.metric("mirai_panics_total").await, 0.0);
    let page = crate::client::get(server.address, "/metrics").await.text();
    let failures: f64 = page
        .lines()
        .filter(|l| l.contains("status=\"5xx\""))
        .map(|l| l.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum();
    assert_eq!(failures, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_large_bodies_are_refused_early() {
    let mut options = Options::default();
    options.config.limits.max_body_bytes = 1 << 20;
    options.config.limits.max_inflight_body_bytes = 4 << 20;
    let server = TestServer::start(options).await;
    // Announced: refused before a byte of it is read.
    let announced = head("POST", "/v1/completions", &[], Some(100 << 20));
    let answer = raw(server.address, &announced).await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (413, Some("close")));
    assert_eq!(answer.json()["error"]["code"], "request_too_large");
    // Not announced: refused once it is over the limit.
    let mut endless = head(
        "POST",
        "/v1/completions",
        &[("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")],
        None,
    );
    let chunk = [b"10000\r\n".as_slice(), &vec![b' '; 0x10000], b"\r\n"].concat();
    for _ in 0..64 {
        endless.extend_from_slice(&chunk);
    }
    assert_eq!(raw(server.address, &endless).await.unwrap().status, 413);
    let full = vec![b' '; 100 << 20];
    let answer = request(server.address, "POST", "/v1/chat/completions", &[], Some(&full)).await;
    assert_eq!(answer.status, 413);
    server
        .until("bodies given back", PATIENCE, async |s| s.metric("mirai_http_body_bytes").await == 0.0)
        .await;
    let zipped =
        request(server.address, "POST", "/v1/completions", &[("Content-Encoding", "gzip")], Some(b"x")).await;
    assert_eq!(zipped.status, 415);
    let form = raw(server.address, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}").await;
    assert_eq!(form.unwrap().status, 415);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_bounded() {
    let server = TestServer::plain().await;
    let long = "x".repeat(1 << 20);
    let cases: Vec<(Vec<u8>, &[u16])> = vec![
        (head("GET", "/health", &[("X-Long", &long)], None), &[431]),
        (head("GET", &format!("/{}", "x".repeat(20_000)), &[], None), &[414]),
        (head("GET", &format!("/{long}"), &[], None), &[414, 431]),
        (b"GET /health HTTP/1.1\r\n\r\n".to_vec(), &[400]),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_vec(), &[400]),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n".to_vec(), &[400]),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx"
                .to_vec(),
            &[400],
        ),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\nx".to_vec(), &[400]),
        (b"nonsense\r\n\r\n".to_vec(), &[400]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not plain text\r\n\r\n".to_vec(), &[400]),
    ];
    for (bytes, statuses) in cases {
        let answer = raw(server.address, &bytes).await.unwrap();
        assert!(
            statuses.contains(&answer.status),
            "{} for {}",
            answer.status,
            String::from_utf8_lossy(&bytes[..60.min(bytes.len())])
        );
    }
    let many: Vec<(String, &str)> = (0..10_000).map(|i| (format!("x-{i}"), "v")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), *v)).collect();
    assert_eq!(raw(server.address, &head("GET", "/health", &many, None)).await.unwrap().status, 431);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_write_is_not_shown() {
    let server = TestServer::plain().await;
    let canary = "k4n4ry-0123456789abcdef0123456789";
    for body in [
        json!({"messages": [{"role": canary, "content": canary}]}),
        json!({"messages": [{"role": "user", "content": canary}], "temperature": canary}),
        json!({"messages": [{"role": "user", "content": canary}], "model": canary}),
        json!({"messages": [{"role": "user", "content": [{"type": canary, "text": canary}]}]}),
        json!({"messages": [{"role": "user", "content": canary}], "logit_bias": {canary: 1}}),
        json!({"messages": [{"role": "user", "content": canary}], "chat_template_kwargs": {canary: 1}}),
        json!({"messages": [{"role": "user", "content": canary}], "tool_choice": canary, "stop": [canary, ""]}),
        json!({"messages": canary}),
        json!({"prompt": [canary, 1]}),
    ] {
        for path in ["/v1/chat/completions", "/v1/completions", "/tokenize"] {
            let answer = post(server.address, path, &body).await;
            let text = answer.text();
            assert!(answer.status == 200 || !text.contains(canary), "{path}: {text}");
        }
    }
    let page = crate::client::get(server.address, "/metrics").await.text();
    assert!(!page.contains(canary));
    server.stop().await;
}
