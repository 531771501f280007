//! The binary with a GPU, without one, and with one that fails: on the emulated driver.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod support;

use std::fs::File;
use std::process::Command;

use serde_json::json;
use support::{Server, emulated_driver, mirai, mirai_without_gpu, run_command};

/// `mirai` where the emulated driver is found; none if it was not built.
fn emulated(test: &str, args: &[&str]) -> Option<Command> {
    let folder = emulated_driver(test)?;
    let mut command = mirai(args);
    command.env("LD_LIBRARY_PATH", folder).env_remove("CUDA_VISIBLE_DEVICES");
    // The emulated cublasLt computes on the CPU: nothing is timed there.
    command.env("MIRAI__ENGINE__MATMUL_CANDIDATES", "1");
    command.env("MIRAI__ENGINE__PLAN_FOLDER", concat!(env!("CARGO_TARGET_TMPDIR"), "/plans"));
    Some(command)
}

/// A small server on the emulated GPU.
const SERVE: [&str; 8] =
    ["serve", "--port", "0", "--device", "cuda", "--max-num-seqs", "2", "--max-num-batched-tokens=64"];

fn error(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code(), text)
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    let output = run_command(mirai_without_gpu(&["serve", "--port", "0", "--device", "cuda"]));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    // A machine with a driver of its own has its GPUs hidden from this test.
    let named = ["--device cuda:0: no CUDA driver: libcuda.so.1 could not be loaded", "no CUDA device"];
    assert!(named.iter().any(|words| text.contains(words)), "{text}");
    assert_eq!(text.trim().lines().count(), 1, "{text}");
}

#[test]
fn without_a_gpu_auto_serves_on_the_cpu_and_says_so_in_one_line() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = mirai_without_gpu(&["serve", "--port", "0", "--device", "auto"]);
    command.stderr(File::create(log.path()).unwrap());
    let server = Server::start_command(command);
    assert!(!server.ask("Bonjour", 2).is_empty());
    let text = std::fs::read_to_string(log.path()).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("CUDA")).collect();
    assert!(matches!(lines[..], [line] if line.contains("device: cpu (no CUDA ")), "{text}");
    assert!(!server.get("/metrics").body.contains("mirai_gpu_"));
}

#[test]
fn a_gpu_answers_as_the_cpu_does() {
    let Some(command) = emulated("a_gpu_answers_as_the_cpu_does", &SERVE) else { return };
    let server = Server::start_command(command);
    let cpu = Server::start(&["--device", "cpu"]);
    let question = "How do I load a GGUF file?";
    assert_eq!(server.ask(question, 8), cpu.ask(question, 8));
    let metrics = server.get("/metrics").body;
    for name in ["mirai_gpu_energy_joules_total ", "mirai_gpu_memory_used_bytes ", "mirai_gpu_last_xid 0"] {
        assert!(metrics.contains(name), "{name} is missing");
    }
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn eight_bits_are_served() {
    let Some(mut command) = emulated("eight_bits_are_served", &SERVE) else { return };
    command.args(["--quantization", "fp8", "--kv-cache-dtype", "fp8"]);
    let server = Server::start_command(command);
    assert!(!server.ask("How do I load a GGUF file?", 4).is_empty());
}

#[test]
fn too_little_memory_shows_the_table_and_what_would_fit() {
    let name = "too_little_memory_shows_the_table_and_what_would_fit";
    let cases: [(&[&str], &[&str]); 3] = [
        (&["--gpu-memory-utilization", "0.033"], &["for weights", "would be enough"]),
        (&["--kv-cache-memory", "300000", "--max-model-len", "1024"], &["use --max-model-len 96"]),
        (&["--kv-cache-memory", "9000000000000"], &["--kv-cache-memory 9000000000000 is more than"]),
    ];
    for (args, words) in cases {
        let Some(mut command) = emulated(name, &SERVE) else { return };
        command.args(args);
        let (code, text) = error(command);
        assert_eq!(code, Some(3), "{args:?}: {text}");
        for word in words.iter().chain(&["\n  KV cache ", "\n  workspace ", "\n  left "]) {
            assert!(text.contains(word), "{args:?}: `{word}` is missing in: {text}");
        }
    }
}

#[test]
fn a_driver_that_is_too_old_is_as_good_as_none() {
    let name = "a_driver_that_is_too_old_is_as_good_as_none";
    let Some(mut command) = emulated(name, &SERVE) else { return };
    command.env("MIRAI_EMU_DRIVER_VERSION", "12080");
    let (code, text) = error(command);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("supports CUDA 12.8, but 13.0 is needed"), "{text}");
    let Some(mut command) = emulated(name, &["serve", "--port", "0"]) else { return };
    command.env("MIRAI_EMU_DRIVER_VERSION", "12080");
    let log = tempfile::NamedTempFile::new().unwrap();
    command.stderr(File::create(log.path()).unwrap());
    let server = Server::start_command(command);
    assert!(!server.ask("Bonjour", 2).is_empty());
    let text = std::fs::read_to_string(log.path()).unwrap();
    assert!(text.contains("device: cpu (the CUDA driver supports CUDA 12.8"), "{text}");
}

/// What the server lets a request ask for, and what a row has room for on the device, are in different crates.
#[test]
fn a_row_has_room_for_all_edits_that_a_request_may_ask_for() {
    use mirai_server::api::bounds;
    // A word is forbidden in two spellings; 32 tokens of the model that end a text are more than any has.
    let most = bounds::LOGIT_BIAS + bounds::STOP_TOKEN_IDS + 2 * bounds::BAD_WORDS + 32;
    assert!(most <= mirai_cuda::EDITS_A_ROW, "{most} edits, room for {}", mirai_cuda::EDITS_A_ROW);
}

#[test]
fn a_gpu_that_dies_ends_the_stream_and_the_process() {
    let name = "a_gpu_that_dies_ends_the_stream_and_the_process";
    let Some(mut command) = emulated(name, &SERVE) else { return };
    command.env("MIRAI_EMU_FAIL", "cuGraphLaunch:7:700");
    let server = Server::start_command(command);
    let body = json!({
        "model": "mirai-demo", "prompt": "Il", "max_tokens": 200, "ignore_eos": true, "stream": true,
    });
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.status, 200, "it began well: {}", reply.body);
    assert!(reply.body.contains("engine_stopped") && !reply.body.contains("\"length\""), "{}", reply.body);
    assert_eq!(server.wait().code(), Some(1));
}
