//! The long forms of `tests/ledger`, and what the ledger costs.
//!
//! Owns their sizes and the two reports; what is checked belongs to the programs there.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

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

/// Runs all of them, then the cost.
pub(super) fn run(report: &mut Report) -> Result<()> {
    let binary = hooked_binary()?;
    let how = "`cargo xtask full ledger`; `tests/ledger/README.md` tells what each program does.";
    let mut faults = Report::titled("The ledger under faults", how)?;
    for (check, bar, program, args) in ROWS {
        let began = Instant::now();
        let said = drive(&binary, program, args)?;
        let seen = format!("held, in {:.0} s: {said}", began.elapsed().as_secs_f64());
        faults.row(check, bar, &seen);
        report.row(check, bar, "held");
    }
    faults.write_to(FAULTS)?;
    let how = "`tests/ledger/cost.py`; paced simulated executor, 256 streams, client on the same cores.";
    let mut cost = Report::titled("What the ledger costs", how)?;
    let bar = "<= 1 % tokens/s; p99 TTFT <= max(0, sync p99 - prefill) + 1 ms";
    let said = drive(&binary, "cost.py", &["--simulate-step-us", "10000"])?;
    cost.row("ledger on against off, 20 interleaved pairs", bar, &said);
    cost.write_to(COST)
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
