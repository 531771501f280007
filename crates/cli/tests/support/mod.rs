//! The real binary as a child process, and the smallest HTTP client that can talk to it.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test, of which each file uses its part"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Names AddressSanitizer's run-time library: then the emulated driver is the one that was built with it.
const SANITIZER: &str = "MIRAI_TEST_ADDRESS_SANITIZER";

/// Longest that a test waits for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// `mirai` with arguments, without anything that this machine's environment says about it.
pub(crate) fn mirai(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mirai"));
    command.args(args);
    for name in ["PORT", "HTTP_PORT", "MODEL_DIR", "MODEL_NAME", "MIRAI_API_KEY", "MIRAI_API_KEY_FILE"] {
        command.env_remove(name);
    }
    // A machine's own GPU is for tests that are made for one.
    command.env("CUDA_VISIBLE_DEVICES", "");
    if let Some(runtime) = std::env::var_os(SANITIZER) {
        // A program that is not built with it cannot be searched for leaks.
        command.env("LD_PRELOAD", runtime).env("ASAN_OPTIONS", "detect_leaks=0");
    }
    command
}

/// `mirai` where no CUDA driver is found, whatever this process finds: an emulated one is hidden with its folder, and a
/// machine's own has no devices to show.
pub(crate) fn mirai_without_gpu(args: &[&str]) -> Command {
    let mut command = mirai(args);
    command.env_remove("LD_LIBRARY_PATH");
    command
}

/// Whether the servers of these tests compute on a GPU: in bf16, and slowly, because it is an emulated one.
pub(crate) fn on_gpu() -> bool {
    std::env::var("MIRAI__MODEL__DEVICE").is_ok_and(|device| device.starts_with("cuda"))
}

/// Where it is set, a test that finds no emulated driver fails: whoever runs all tests has built it.
const REQUIRED: &str = "MIRAI_TEST_REQUIRES_EMULATED_DRIVER";

/// Where `cargo xtask cuda-emu --driver` puts the emulated driver; none, and a line, if it was not built.
pub(crate) fn emulated_driver(test: &str) -> Option<std::path::PathBuf> {
    let name = if std::env::var_os(SANITIZER).is_some() { "driver-address" } else { "driver" };
    let folder =
        std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/cuda-emu")).join(name);
    let libraries = ["libcuda.so.1", "libcublasLt.so.13", "libnvidia-ml.so.1"];
    if libraries.iter().all(|library| folder.join(library).exists()) {
        return Some(folder);
    }
    assert!(std::env::var_os(REQUIRED).is_none(), "{test}: no emulated driver, which {REQUIRED} asks for");
    println!("{test}: skipped: `cargo xtask cuda-emu --driver` was not run");
    None
}

/// Runs `mirai` to the end.
pub(crate) fn run(args: &[&str]) -> Output {
    run_command(mirai(args))
}

/// Runs to the end.
pub(crate) fn run_command(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let _watch = Watch::over(&child);
    child.wait_with_output().unwrap()
}

/// Kills a process that a test waits for longer than it has patience. Ends when dropped.
struct Watch(Option<(Sender<()>, JoinHandle<()>)>);

impl Watch {
    fn over(child: &Child) -> Self {
        let (end, ended) = channel();
        let id = child.id().to_string();
        let thread = std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("process {id} is killed: nothing for {PATIENCE:?}");
                let _ = Command::new("kill").args(["-s", "KILL", &id]).status();
            }
        });
        Self(Some((end, thread)))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.0.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}

/// A server that is asked to end when the test ends, and killed where the test failed.
pub(crate) struct Server {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    pub(crate) address: SocketAddr,
    pub(crate) ready_line: String,
}

impl Server {
    /// Starts `mirai serve` on a free port and waits until it is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut command = mirai(&["serve", "--port", "0"]);
        command.args(args);
        Self::start_command(command)
    }

    /// Starts a `mirai serve` with an environment of its own and waits until it is ready.
    pub(crate) fn start_command(command: Command) -> Self {
        let mut server = Self::spawn(command);
        server.ready_line = server.line();
        assert!(server.ready_line.starts_with("ready in "), "{:?}", server.ready_line);
        server
    }

    /// Starts it and waits until it listens.
    pub(crate) fn start_loading(args: &[&str]) -> Self {
        let mut command = mirai(&["serve", "--port", "0"]);
        command.args(args);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on http://")
            .unwrap_or_else(|| panic!("first line is {line:?}"))
            .parse()
            .unwrap();
        Self { child, stdout, address, ready_line: String::new() }
    }

    /// The next line of standard output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// Waits for the process to end.
    pub(crate) fn wait(mut self) -> ExitStatus {
        let _watch = Watch::over(&self.child);
        // Reading to the end of its output blocks until it is gone, without polling.
        let mut rest = Vec::new();
        self.stdout.read_to_end(&mut rest).unwrap();
        self.child.wait().unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        request(self.address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }

    pub(crate) fn post(&self, path: &str, body: &serde_json::Value) -> Reply {
        request(self.address, &post(path, body))
    }

    /// The text of a greedy chat answer to one question.
    pub(crate) fn ask(&self, question: &str, max_tokens: u32) -> String {
        let body = serde_json::json!({
            "model": "mirai-demo", "temperature": 0, "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": question}],
        });
        let reply = self.post("/v1/chat/completions", &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if std::thread::panicking() {
            let _ = self.child.kill();
        } else {
            // As an orchestrator does, so that every test also sees the server end in order.
            let _watch = Watch::over(&self.child);
            self.signal("TERM");
            let _ = self.stdout.read_to_end(&mut Vec::new());
        }
        let _ = self.child.wait();
    }
}

/// Status and body of an answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

pub(crate) fn post(path: &str, body: &serde_json::Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends one request and reads to the end of the connection. Bodies with a length are read as they are; chunked
/// ones have their chunk lines removed.
pub(crate) fn request(address: SocketAddr, text: &str) -> Reply {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("an answer has a head");
    let head = String::from_utf8(bytes[..split].to_vec()).unwrap().to_lowercase();
    let body = &bytes[split + 4..];
    let body = if head.contains("transfer-encoding: chunked") { dechunk(body) } else { body.to_vec() };
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head, body: String::from_utf8(body).unwrap() }
}

fn dechunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap().trim(), 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest = &rest[end + 2 + size + 2..];
    }
    body
}
