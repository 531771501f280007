//! The long forms of `tests/ledger`, and what the ledger costs.
//!
//! Owns their sizes and the two reports; what is checked belongs to the programs there.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{Report, hooked_binary};
use crate::shell::{self, root};

const FAULTS: &str = "benches/results/ledger-faults.md";
const COST: &str = "benches/results/ledger-cost.md";

/// Name, bar, program and its arguments.
type Row = (&'static str, &'static str, &'static str, &'static [&'static str]);

/// On the demo model, except where hundreds of streams must run at once on few cores: those are simulated, with
/// steps that take their time.
const ROWS: [Row; 5] = [
    (
        "10,000 mixed requests, 30 % disconnects, stop strings, n > 1",
        "tape = ledger = metrics, to the token",
        "mixed.py",
        &["--requests", "10000"],
    ),
    (
        "1,000 `kill -9` under 200 streams",
        "I1 to I8 each time",
        "kills.py",
        &["--kills", "1000", "--streams", "200", "--simulate-step-us", "20000", "--tokens", "6000"],
    ),
    ("failing stores", "nothing lost, nothing doubled, health and answers as documented", "faults.py", &[]),
    (
        "power loss at each write and sync: dropped, reordered, torn",
        "I1 to I8 at every index",
        "power.py",
        &["--simulate-step-us", "1000"],
    ),
    (
        "two applications of equal weight, one with 100 times the load of the other",
        "the other's share moves by < 5 %, its p95 TTFT by < 30 %",
        "fair.py",
        &[],
    ),
];

/// Runs all of them, whatever another finds, then the cost.
pub(super) fn run(report: &mut Report) -> Result<()> {
    let binary = hooked_binary()?;
    let how = "`cargo xtask full ledger`; `tests/ledger/README.md` tells what each program does.";
    let mut faults = Report::titled("The ledger under faults", how)?;
    let mut failures = Vec::new();
    for (check, bar, program, args) in ROWS {
        let began = Instant::now();
        let seen = drive(&binary, program, args);
        let seconds = began.elapsed().as_secs_f64();
        let seen = match seen {
            Ok(said) => format!("held, in {seconds:.0} s: {said}"),
            Err(error) => {
                failures.push(format!("{program}: {error:#}"));
                format!("**failed** after {seconds:.0} s")
            }
        };
        println!("{check}: {seen}");
        faults.row(check, bar, &seen);
        report.row(check, bar, &seen);
    }
    faults.write_to(FAULTS)?;
    let how = "`tests/ledger/cost.py`; paced simulated executor, 256 streams, client on the same cores.";
    let mut cost = Report::titled("What the ledger costs", how)?;
    let bar = "<= 1 % tokens/s; p99 TTFT <= max(0, sync p99 - prefill) + 1 ms";
    match drive(&binary, "cost.py", &["--simulate-step-us", "10000"]) {
        Ok(said) => cost.row("ledger on against off, 20 interleaved pairs", bar, &said),
        Err(error) => failures.push(format!("cost.py: {error:#}")),
    }
    cost.write_to(COST)?;
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

/// Runs a program of `tests/ledger` in a folder of its own. Returns what it said, on one line.
fn drive(binary: &Path, program: &str, args: &[&str]) -> Result<String> {
    let folder = root().join("target/ledger").join(program);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let mut command = shell::command("python3", &[root().join("tests/ledger").join(program)]);
    command.arg("--binary").arg(binary).arg("--folder").arg(&folder).args(args);
    let said = shell::output_of(command).with_context(|| format!("its folder is {}", folder.display()))?;
    std::fs::remove_dir_all(&folder)?;
    let lines: Vec<&str> = said.lines().collect();
    Ok(lines.join("; ").replace('|', "/"))
}
