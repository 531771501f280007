//! Accounting of the real binary under kills, power losses and failing stores: the short forms of `tests/ledger`,
//! whose README tells what each program does. `cargo xtask full ledger` runs the long ones.
//!
//! Needs `python3`, and `cc` where a disk fails; without them these tests say so and do nothing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use std::path::Path;
use std::process::Command;

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("skipped: no {program}");
    }
    found
}

fn python(args: &[&str]) -> Command {
    let mut command = Command::new("python3");
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/ledger");
    command.args(args).current_dir(tests).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// Runs one of the programs on the binary, in a folder that stays if it fails.
fn drive(program: &str, args: &[&str]) {
    let mut folder = tempfile::tempdir().unwrap();
    folder.disable_cleanup(true);
    let mut command = python(&[program, "--binary", env!("CARGO_BIN_EXE_mirai"), "--folder"]);
    let output = command.arg(folder.path()).args(args).output().unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{program}: {said}");
    assert!(output.status.success(), "{program} in {}: {said}{wrong}", folder.path().display());
    folder.disable_cleanup(false);
}

#[test]
fn the_checker_finds_each_kind_of_lie() {
    if has("python3") {
        let output = python(&["-m", "unittest"]).output().unwrap();
        let report = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && report.contains("\nOK"), "{report}");
    }
}

#[test]
fn tapes_rows_and_counters_agree_to_the_token() {
    if has("python3") {
        drive("mixed.py", &["--requests", "1000", "--longest", "12"]);
    }
}

#[test]
fn killed_at_random_moments_nothing_is_lost_or_doubled() {
    if has("python3") {
        drive("kills.py", &["--kills", "50", "--tokens", "500"]);
    }
}

#[test]
fn what_power_loss_leaves_is_recovered() {
    if has("python3") && has("cc") {
        drive("power.py", &["--cuts", "6"]);
    }
}

#[test]
fn a_store_that_fails_loses_and_doubles_nothing() {
    if has("python3") && has("cc") {
        let faults = ["failed_sync", "full_disk", "stalled_disk", "postgres_killed", "both_killed"];
        drive("faults.py", &[&["--streams", "16", "--requests", "30", "--only"], &faults[..]].concat());
    }
}
