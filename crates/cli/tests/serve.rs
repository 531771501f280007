//! The binary as a newcomer and an orchestrator meet it: two commands, signals, wrong inputs, exit codes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::process::Output;

use serde_json::json;
use support::{Server, mirai_without_gpu, on_gpu, run, run_command};

#[test]
fn the_demo_model_is_served_and_both_signals_end_with_zero() {
    for signal in ["TERM", "INT"] {
        let server = Server::start(&[]);
        assert_eq!(server.get("/health/startup").status, 200);
        assert_eq!(server.get("/health/ready").status, 200);
        let models = server.get("/v1/models").json();
        assert_eq!(models["data"][0]["id"], "mirai-demo");
        assert!(!server.ask("Bonjour", 20).is_empty());
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0), "SIG{signal}");
    }
}

#[test]
fn a_running_stream_ends_before_the_server_does() {
    use std::io::{BufRead, BufReader, Read, Write};

    let server = Server::start(&["--shutdown-timeout", "60"]);
    // Long enough to be running when the signal comes; an emulated GPU takes a tenth of a second for each.
    let tokens = if on_gpu() { 40 } else { 200 };
    let body = json!({
        "model": "mirai-demo", "prompt": "Il", "max_tokens": tokens, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut stream = std::net::TcpStream::connect(server.address).unwrap();
    stream.write_all(support::post("/v1/completions", &body).as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data:") {
        line.clear();
        assert_ne!(reader.read_line(&mut line).unwrap(), 0, "the stream ended before its first event");
    }
    server.signal("TERM");
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    let all = format!("\"completion_tokens\":{tokens}");
    assert!(rest.contains("data: [DONE]") && rest.contains(&all), "{rest}");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let server = Server::start(&["--drain-delay", "600"]);
    server.signal("TERM");
    // Draining has begun once readiness says so.
    while server.get("/health/ready").status == 200 {}
    assert_eq!(server.get("/health/live").status, 200);
    assert!(!server.ask("Bonjour", 4).is_empty(), "still serving during the delay");
    server.signal("TERM");
    assert!(server.wait().code().is_some());
}

fn fails(args: &[&str], code: i32, words: &[&str]) {
    said(args, &run(args), code, words);
}

/// Holds what a command said to an exit code and to words.
fn said(args: &[&str], output: &Output, code: i32, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{args:?}: `{word}` is missing in: {error}");
    }
    assert!(!error.contains("panicked"), "{args:?}: {error}");
}

#[test]
fn wrong_usage_ends_with_two() {
    fails(&["serve", "--no-such-flag"], 2, &["--no-such-flag"]);
    fails(&["serve", "--port", "70000"], 2, &["--port", "70000"]);
    fails(&["serve", "--host", "0.0.0.0"], 2, &["0.0.0.0", "--insecure-no-auth"]);
    fails(&["serve", "--config", "/nonexistent.toml"], 2, &["/nonexistent.toml"]);
    fails(&["serve", "--log-level", "mirai=loud"], 2, &["log.level"]);
    fails(&["serve", "--max-num-seqs", "0"], 2, &["max_num_seqs"]);
    fails(&["serve", "--port", "0", "--api-key-file", "/nonexistent/keys"], 2, &["/nonexistent/keys"]);
    fails(&["check-config", "--api-key-file", "/dev/null"], 2, &["/dev/null: not a regular file"]);
    fails(&["pull", "/tmp"], 2, &["/tmp"]);
}

#[test]
fn what_the_machine_lacks_ends_with_three() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(&["serve", "--port", &port], 3, &[&port]);
    let cuda = ["serve", "--port", "0", "--device", "cuda"];
    said(&cuda, &run_command(mirai_without_gpu(&cuda)), 3, &["--device cuda:0", "no CUDA d"]);
}

#[test]
fn bad_model_files_end_with_four_and_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let model = dir.path().to_str().unwrap();
    let serve = ["serve", "--port", "0", "--model", model];
    fails(&["serve", "--port", "0", "--model", "/nonexistent/model"], 4, &["/nonexistent/model"]);
    fails(&serve, 4, &[model]);
    std::fs::write(path("pytorch_model.bin"), "x").unwrap();
    fails(&serve, 4, &["safetensors"]);
    std::fs::write(path("model.safetensors"), [0; 4]).unwrap();
    fails(&serve, 4, &["config.json"]);
    for (config, word) in [
        ("{", "config.json"),
        (r#"{"architectures": ["Nothing"]}"#, "Nothing"),
        (r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 0}"#, "hidden_size"),
    ] {
        std::fs::write(path("config.json"), config).unwrap();
        fails(&serve, 4, &[word]);
    }
    std::fs::write(path("x.gguf"), "GGUFxxxx").unwrap();
    let gguf = path("x.gguf");
    fails(&["serve", "--port", "0", "--model", gguf.to_str().unwrap()], 4, &["x.gguf"]);
}

#[test]
fn check_config_prints_what_is_in_force_and_no_secret() {
    let output = support::mirai(&["check-config", "--port", "4711", "--api-key", "geheim"])
        .env("MIRAI__ENGINE__MAX_NUM_SEQS", "17")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("port = 4711") && text.contains("max_num_seqs = 17"), "{text}");
    assert!(!text.contains("geheim") && text.contains("1 API key"), "{text}");
    let parsed: toml::Table = toml::from_str(&text).expect("what is printed is a configuration file");
    assert_eq!(parsed["server"]["port"].as_integer(), Some(4711));
    fails(&["check-config", "--host", "0.0.0.0"], 2, &["0.0.0.0"]);
}

#[test]
fn a_key_is_asked_for_everywhere_but_on_health_and_metrics() {
    let server = Server::start(&["--api-key", "k1"]);
    for (path, status) in [("/health", 200), ("/metrics", 200), ("/v1/models", 401), ("/openapi.json", 401)] {
        assert_eq!(server.get(path).status, status, "{path}");
    }
    let head = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer k1\r\n\r\n";
    assert_eq!(support::request(server.address, head).status, 200);
}
