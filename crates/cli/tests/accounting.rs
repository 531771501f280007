//! What an operator does with applications: makes keys, sets limits and prices, serves, and reads what was used.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};
use support::{PATIENCE, Reply, Server, mirai, run, run_command};

/// A folder with what a deployment mounts.
struct Mounted {
    folder: tempfile::TempDir,
    key: String,
}

impl Mounted {
    /// One application that may ask `requests` times a minute, with a key that `mirai keys new` has made.
    fn with_limit(requests: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("pepper"), format!("1 {}\n", "pepper".repeat(6))).unwrap();
        std::fs::write(path("chain"), format!("1 {}\n", "chain!".repeat(6))).unwrap();
        std::fs::write(
            path("prices.toml"),
            "currency = \"EUR\"\n[[list]]\nversion = \"p1\"\nvalid_from = 2020-01-01\n\
             [[list.model]]\nname = \"*\"\ninput = 2\noutput = 10\n",
        )
        .unwrap();
        let pepper = path("pepper");
        let made = run(&["keys", "new", "--id", "notes-1", "--pepper-file", pepper.to_str().unwrap()]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let text = String::from_utf8(made.stdout).unwrap();
        let key = text.lines().find(|line| line.starts_with("mirai-")).expect("a key").to_owned();
        let stanza = text.split_once("[[application.key]]").expect("a stanza").1;
        assert!(!stanza.contains(&key), "what is committed has no key");
        let head = "[[application]]\nname = \"notes\"\nscopes = [\"infer\", \"read-usage\"]\n";
        let limit = format!("[application.quota]\nrequests_per_minute = {requests}\n");
        std::fs::write(path("apps.toml"), format!("{head}{limit}[[application.key]]{stanza}")).unwrap();
        Self { folder, key }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn store(&self) -> String {
        format!("sqlite://{}", self.text("ledger.db"))
    }

    /// A server for the application.
    fn serve(&self, args: &[&str], environment: &[(&str, &str)]) -> Server {
        let mut command = mirai(&["serve", "--port", "0"]);
        command.args(["--applications", &self.text("apps.toml"), "--pepper-file", &self.text("pepper")]);
        command.args(args).envs(environment.iter().copied());
        Server::start_command(command)
    }

    fn ask(&self, server: &Server) -> Reply {
        let body =
            json!({"model": "mirai-demo", "prompt": "Il", "max_tokens": 5, "ignore_eos": true}).to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Authorization: Bearer {}\r\nContent-Length: {}\r\n\r\n",
            self.key,
            body.len()
        );
        support::request(server.address, &(head + &body))
    }

    /// What `mirai usage` prints about the ledger.
    fn usage(&self, args: &[&str]) -> String {
        let mut command = mirai(&["usage"]);
        command.args(args).args(["--ledger", &self.store()]);
        let output = run_command(command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Takes events, and says what came.
struct EventSink {
    address: SocketAddr,
    events: Receiver<Event>,
}

struct Event {
    subject: String,
    token: bool,
    row: Value,
}

impl EventSink {
    fn start(token: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let sender = sender.clone();
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(stream.unwrap());
                    while let Some(event) = read_event(&mut stream, token) {
                        let _ = sender.send(event);
                        stream.get_mut().write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
                    }
                });
            }
        });
        Self { address, events }
    }

    fn next(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("an event")
    }
}

fn read_event(stream: &mut BufReader<TcpStream>, token: &str) -> Option<Event> {
    let (mut length, mut event) = (0, Event { subject: String::new(), token: false, row: Value::Null });
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(": ") else { continue };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "ce-subject" => event.subject = value.to_owned(),
            "authorization" => event.token = value == format!("Bearer {token}"),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    event.row = serde_json::from_slice(&body).unwrap();
    Some(event)
}

/// The second line of a table in CSV, by the names in its first.
fn csv_row(text: &str) -> impl Fn(&str) -> String + use<> {
    let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    assert_eq!(lines.next(), None, "one bucket, application and model: {text}");
    move |name| values[names.iter().position(|n| n == name).unwrap_or_else(|| panic!("no {name}"))].clone()
}

#[test]
fn an_application_is_limited_priced_and_accounted_for() {
    let mounted = Mounted::with_limit(3);
    let receiver = EventSink::start("t0ken");
    std::fs::write(mounted.path("token"), "t0ken\n").unwrap();
    let server = mounted.serve(
        &["--ledger", &mounted.store()],
        &[
            ("MIRAI__USAGE__PRICE_FILE", &mounted.text("prices.toml")),
            ("MIRAI__USAGE__EVENTS_URL", &format!("http://{}/usage", receiver.address)),
            ("MIRAI__USAGE__EVENTS_TOKEN_FILE", &mounted.text("token")),
            ("MIRAI__LEDGER__CHAIN_KEY_FILE", &mounted.text("chain")),
        ],
    );
    assert_eq!(server.get("/v1/models").status, 401);
    let (mut prompt, mut cost) = (0, 0.0);
    for _ in 0..3 {
        let reply = mounted.ask(&server);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let answer = reply.json();
        assert_eq!(answer["usage"]["completion_tokens"], 5);
        prompt += answer["usage"]["prompt_tokens"].as_u64().unwrap();
        cost += answer["usage"]["cost"].as_f64().unwrap();
        let event = receiver.next();
        assert!(event.token && !event.subject.is_empty());
        assert_eq!(
            (&event.row["completion_tokens"], &event.row["application"]),
            (&json!(5), &json!("notes"))
        );
    }
    let refused = mounted.ask(&server);
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.head.contains("\r\nretry-after: "), "{}", refused.head);

    let beside_the_server =
        csv_row(&mounted.usage(&["--format", "csv", "--prices", &mounted.text("prices.toml")]));
    assert_eq!(beside_the_server("requests"), "3", "one that is refused is not used");
    assert_eq!(beside_the_server("completion_tokens"), "15");
    assert_eq!(beside_the_server("prompt_tokens"), prompt.to_string());
    let total: f64 = beside_the_server("cost").parse().unwrap();
    assert!(total > 0.0 && (total - cost).abs() < 1e-9, "{total} {cost}");
    drop(server);

    assert_eq!(mounted.usage(&["rows"]).lines().count(), 3);
    mounted.usage(&["verify", "--chain-key-file", &mounted.text("chain")]);
    mounted.usage(&["anonymize", "--before", "2026-01-01"]);
    mounted.usage(&["purge", "--before", "2026-01-01", "--chain-key-file", &mounted.text("chain")]);
    assert_eq!(csv_row(&mounted.usage(&["--format", "csv"]))("requests"), "3", "nothing is that old");
    let output = run(&["usage", "registry"]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("completion_tokens"));
}

#[test]
fn limits_hold_without_a_ledger_too_and_can_be_switched_off() {
    let mounted = Mounted::with_limit(1);
    for (enforce, second) in [("true", 429), ("false", 200)] {
        let server = mounted.serve(&[], &[("MIRAI__QUOTAS__ENFORCE", enforce)]);
        assert_eq!(mounted.ask(&server).status, 200);
        assert_eq!(mounted.ask(&server).status, second, "enforce = {enforce}");
    }
}

#[test]
fn settings_that_cannot_be_meant_are_named() {
    for (name, value) in [
        ("quotas.lease_seconds", "1"),
        ("quotas.wait_seconds", "0"),
        ("quotas.zone", "Europe/Atlantis"),
        ("ledger.spool_bytes", "1"),
        ("ledger.writer", "two words"),
        ("ledger.lease_seconds", "0"),
        ("usage.events_source", "two words"),
    ] {
        let mut command = mirai(&["check-config", "--ledger", "sqlite:///tmp/never-opened.db"]);
        command.env(format!("MIRAI__{}", name.replace('.', "__").to_uppercase()), value);
        let output = run_command(command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name} = {value}: {error}");
        assert!(error.contains(name), "{name} = {value}: {error}");
    }
    assert!(!Path::new("/tmp/never-opened.db").exists());
    let output = run(&["usage", "--ledger", "sqlite:///nonexistent/ledger.db"]);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_benchmark_of_the_server_prints_its_table() {
    let server = Server::start(&[]);
    let url = server.url();
    let common = ["bench", "--url", &url, "--model", "mirai-demo"];
    let sizes = ["--num-prompts", "4", "--input-len", "8", "--output-len", "4"];
    let output = run(&[&common[..], &sizes[..]].concat());
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("Time to first token"), "{said}{error}");
    drop(server);
    let output = run(&[&common[..], &sizes[..]].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains("4 requests failed"), "{error}");
}
