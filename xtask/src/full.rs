//! The long versions: more simulated steps, the release binary's promises, the speeds that have a bar.
//!
//! Owns the list and the report `benches/results/full.md`; each check is a command that can be run alone.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

mod ledger;

use crate::shell::{self, root};

const REPORT: &str = "benches/results/full.md";
/// Simulated steps of the long run.
const STEPS: &str = "10000000";
/// Largest release binary with the demo model inside, in bytes.
const MAX_BINARY: u64 = 60_000_000;
/// Longest time from process start to ready with the demo model.
const MAX_START: Duration = Duration::from_secs(2);
/// Least tokens a second through HTTP with the simulated executor and 256 streams.
const MIN_HTTP: f64 = 60_000.0;

/// One of the long checks.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Check {
    /// Simulated engine steps under all invariants.
    Simulation,
    /// The demo model's questions and held-out paraphrases.
    Demo,
    /// A frozen engine, seen with the default limit.
    Frozen,
    /// What a thousand hang-ups leave after a second.
    Storm,
    /// Whether the time of an answer tells how much of a key was right.
    Timing,
    /// Tokens a second through HTTP.
    Http,
    /// The release binary: size, start, no test hooks.
    Binary,
    /// The ledger under kills, power losses and failing stores; writes `benches/results/ledger-faults.md`.
    Ledger,
}

const ALL: [Check; 8] = [
    Check::Simulation,
    Check::Demo,
    Check::Frozen,
    Check::Storm,
    Check::Timing,
    Check::Http,
    Check::Binary,
    Check::Ledger,
];

impl Check {
    fn run(self, report: &mut Report) -> Result<()> {
        match self {
            Self::Simulation => simulate(report),
            Self::Demo => demo_model(report),
            Self::Frozen => frozen(report),
            Self::Storm => storm(report),
            Self::Timing => timing(report),
            Self::Http => http_throughput(report),
            Self::Binary => release_binary(report),
            Self::Ledger => ledger::run(report),
        }
    }
}

/// Runs the named checks, or all; all of them together write the report. Fails if one has failed.
pub(crate) fn run(named: &[Check]) -> Result<()> {
    let mut report = Report::new()?;
    let checks = if named.is_empty() { &ALL } else { named };
    let failures = run_each(checks, &mut report, Check::run);
    if named.is_empty() {
        report.write()?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

/// Every check runs, whatever another finds. Failures are rows of the report too.
fn run_each(
    checks: &[Check],
    report: &mut Report,
    mut run: impl FnMut(Check, &mut Report) -> Result<()>,
) -> Vec<String> {
    let mut failures = Vec::new();
    for &check in checks {
        if let Err(error) = run(check, report) {
            let error = format!("{error:#}").replace('|', "/").replace('\n', " ");
            report.row("**failed**", "", &error);
            failures.push(error);
        }
    }
    failures
}

struct Report(String);

impl Report {
    fn new() -> Result<Self> {
        Self::titled("Long checks", "`cargo xtask full`, or `cargo xtask ci --full` after the other checks.")
    }

    /// A report with the commit and the machine in its head.
    fn titled(title: &str, how: &str) -> Result<Self> {
        let commit = shell::output("git", &["rev-parse", "HEAD"])?;
        let dirty = !shell::output("git", &["status", "--porcelain"])?.trim().is_empty();
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        // Beside other work every time and speed below is a worse one.
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let mut text = format!("# {title}\n\n{how}\n\n");
        let state = if dirty { " with uncommitted changes" } else { "" };
        writeln!(
            text,
            "Commit `{}`{state}. {} cores, {}; load average at the start {}.\n",
            commit.trim(),
            cores,
            model.trim_matches([' ', '\t', ':']),
            load.split(' ').next().unwrap_or("unknown")
        )?;
        text.push_str("| check | bar | seen |\n|---|---|---|\n");
        Ok(Self(text))
    }

    fn row(&mut self, check: &str, bar: &str, seen: &str) {
        println!("{check}: {seen} (bar: {bar})");
        self.0.push_str(&format!("| {check} | {bar} | {seen} |\n"));
    }

    fn write(self) -> Result<()> {
        self.write_to(REPORT)
    }

    fn write_to(self, path: &'static str) -> Result<()> {
        std::fs::write(root().join(path), self.0).context(path)
    }
}

/// A test of the workspace in a release build, with an environment that makes it long.
fn release_test(package: &str, args: &[&str], variables: &[(&str, &str)]) -> Result<f64> {
    let start = Instant::now();
    let mut command = shell::command("cargo", &["test", "--release", "--package", package]);
    command.args(args).envs(variables.iter().copied());
    shell::run_command(command)?;
    Ok(start.elapsed().as_secs_f64())
}

fn simulate(report: &mut Report) -> Result<()> {
    let variables = [("MIRAI_SIM_STEPS", STEPS)];
    let seconds = release_test("mirai-engine", &["--test", "simulation"], &variables)?;
    let seen = format!("{STEPS}, with the build in {seconds:.0} s");
    report.row("simulated engine steps, all invariants", STEPS, &seen);
    Ok(())
}

/// Every question and every held-out paraphrase.
fn demo_model(report: &mut Report) -> Result<()> {
    release_test("mirai-cli", &["--test", "demo_model"], &[])?;
    report.row("demo model, all questions and held-out paraphrases", ">= 95 % and >= 80 %", "held");
    Ok(())
}

fn frozen(report: &mut Report) -> Result<()> {
    let name = "faults::a_frozen_engine_is_seen_within_fifteen_seconds_by_default";
    release_test("mirai-server", &["--test", "suite", "--", "--exact", name, "--ignored"], &[])?;
    report.row("frozen engine, default limit, to 503 of `/health` and `/health/live`", "<= 15 s", "held");
    Ok(())
}

fn storm(report: &mut Report) -> Result<()> {
    let variables = [("MIRAI_STRICT_TIMES", "1")];
    release_test("mirai-server", &["--test", "alone", "storm::"], &variables)?;
    report.row("blocks, slots, tasks, descriptors after 1,000 hang-ups", "none after 1 s", "held");
    Ok(())
}

fn timing(report: &mut Report) -> Result<()> {
    let name = "auth::timing_tests::time_does_not_tell_a_key_in_a_million_tries";
    release_test("mirai-server", &["--lib", "--", "--exact", name, "--ignored", "--nocapture"], &[])?;
    report.row("time of a wrong key by how much of it is right, 1,000,000 tries, Welch's t", "< 4.5", "held");
    Ok(())
}

/// A release build with test hooks, under a name that no other build takes.
fn hooked_binary() -> Result<PathBuf> {
    shell::run("cargo", &["build", "--release", "--features", "test-hooks"])?;
    let binary = root().join("target/release/mirai-hooks");
    std::fs::copy(root().join("target/release/mirai"), &binary).context("copy of the hooked binary")?;
    Ok(binary)
}

/// The server with a simulated executor, and the benchmark client, on this machine.
fn http_throughput(report: &mut Report) -> Result<()> {
    let binary = hooked_binary()?;
    let server = Server::start(&binary, &["--simulate", "--max-num-seqs", "256", "--log-level", "warn"])?;
    let mut best: f64 = 0.0;
    for _ in 0..3 {
        let out = root().join("target/http-bench.json");
        let mut command = Command::new(&binary);
        command.args(["bench", "--url", &server.url, "--endpoint", "completions", "--dataset", "random"]);
        command.args([
            "--input-len",
            "16",
            "--output-len",
            "500",
            "--num-prompts",
            "1024",
            "--concurrency",
            "256",
        ]);
        command.arg("--json").arg(&out);
        shell::run_command(command)?;
        let json: Value = serde_json::from_str(&std::fs::read_to_string(&out)?)?;
        ensure!(json["failed"] == 0, "requests failed: {}", json["failed"]);
        best = best.max(json["output_throughput"].as_f64().context("output_throughput")?);
    }
    report.row(
        "HTTP, simulated executor, 256 streams, an event for each token with text, client on the same cores",
        ">= 60,000 tokens/s",
        &format!("{best:.0} tokens/s (best of 3)"),
    );
    ensure!(best >= MIN_HTTP, "{best:.0} tokens/s");
    Ok(())
}

/// What people get: size, start, and nothing that only tests need.
fn release_binary(report: &mut Report) -> Result<()> {
    shell::run("cargo", &["build", "--release"])?;
    let binary = root().join("target/release/mirai");
    let size = std::fs::metadata(&binary)?.len();
    report.row("release binary with the demo model", "< 60 MB", &format!("{:.1} MB", size as f64 / 1e6));
    ensure!(size < MAX_BINARY, "{size} bytes");
    let hooked = Command::new(&binary).args(["serve", "--simulate"]).output()?;
    let refused = hooked.status.code() == Some(2);
    report.row("test hooks in it", "none", if refused { "`--simulate` is refused" } else { "present" });
    ensure!(refused, "the release binary has test hooks");
    let mut starts = Vec::new();
    for _ in 0..5 {
        let server = Server::start(&binary, &[])?;
        starts.push(server.started);
        server.stop()?;
    }
    starts.sort();
    let median = starts[starts.len() / 2];
    report.row(
        "process start to ready, demo model",
        "< 2 s",
        &format!("{:.2} s (median of 5, slowest {:.2} s)", median.as_secs_f64(), starts[4].as_secs_f64()),
    );
    ensure!(median < MAX_START, "{median:?}");
    Ok(())
}

/// A running `mirai serve`, killed when dropped.
struct Server {
    child: Child,
    url: String,
    started: Duration,
}

impl Server {
    fn start(binary: &PathBuf, args: &[&str]) -> Result<Self> {
        let start = Instant::now();
        let mut command = Command::new(binary);
        command.args(["serve", "--port", "0"]).args(args).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| binary.display().to_string())?;
        let mut lines = BufReader::new(child.stdout.take().context("standard output")?).lines();
        let mut next = || lines.next().context("the server ended")?.context("standard output");
        let first = next()?;
        let url = first.strip_prefix("listening on ").with_context(|| first.clone())?.to_owned();
        let second = next()?;
        if !second.starts_with("ready in ") {
            bail!("second line is `{second}`");
        }
        Ok(Self { child, url, started: start.elapsed() })
    }

    fn stop(mut self) -> Result<()> {
        shell::output("kill", &["-s", "TERM", &self.child.id().to_string()])?;
        let status = self.child.wait()?;
        ensure!(status.success(), "after SIGTERM the server ended with {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_all() {
        let named: Vec<Check> = clap::ValueEnum::value_variants().to_vec();
        assert!(named == ALL);
    }

    #[test]
    fn a_failure_is_a_row_and_the_others_still_run() {
        let mut report = Report::new().unwrap();
        let mut ran = 0;
        let failures = run_each(&ALL, &mut report, |check, report| {
            ran += 1;
            ensure!(check != Check::Demo, "wrong | twice\nover");
            report.row("one", "1", "2");
            Ok(())
        });
        assert_eq!((ran, failures.as_slice()), (ALL.len(), &["wrong / twice over".to_owned()][..]));
        let rows: Vec<&str> = report.0.lines().filter(|line| line.starts_with("| ")).collect();
        assert_eq!(rows.len(), 1 + ALL.len(), "{rows:?}");
        assert_eq!(rows[2], "| **failed** |  | wrong / twice over |");
        let head = report.0.lines().nth(4).unwrap();
        assert!(
            head.starts_with("Commit `") && head.contains(" cores, ") && head.contains("load average"),
            "{head}"
        );
    }

    #[test]
    fn a_program_that_is_no_server_is_not_waited_for() {
        let error = Server::start(&PathBuf::from("true"), &[]).err().unwrap().to_string();
        assert!(error.contains("the server ended"), "{error}");
        let error = Server::start(&PathBuf::from("echo"), &[]).err().unwrap().to_string();
        assert!(error.contains("serve --port 0"), "{error}");
    }
}
