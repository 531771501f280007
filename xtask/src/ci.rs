//! The checks of every change, in the order in which they fail fastest.

use std::process::Command;

use anyhow::{Context, Result};

use crate::shell::{self, root};
use crate::{coverage, deploy, emulation, kernels};

/// The README's test command, word for word.
const TEST: [&str; 2] = ["test", "--workspace"];

/// Where instrumented artifacts lie: cargo cannot tell them from plain ones, and either would be taken for the
/// other in one folder. Lints run there too and share what both need: build scripts, procedural macros.
const TARGET: &str = "target/coverage";

pub(crate) fn run() -> Result<()> {
    shell::run("cargo", &["fmt", "--all", "--check"])?;
    shell::run("cargo", &["deny", "--log-level", "error", "check", "bans", "licenses", "sources"])?;
    shell::run_command(cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    // The tests of the CUDA backend run on it.
    emulation::build_driver(None)?;
    test_under_coverage()?;
    // On the server that the tests have just built.
    deploy::run_on(&root().join(TARGET).join("debug/mirai"), &[], true)?;
    emulation::check()?;
    kernels::run(kernels::Mode::Check)
}

/// Cargo as it runs here: apart, and without the bookkeeping that pays only when one builds again and again.
fn cargo(args: &[&str]) -> Command {
    let mut command = shell::command("cargo", args);
    command.env("CARGO_TARGET_DIR", root().join(TARGET)).env("CARGO_INCREMENTAL", "0");
    command
}

/// Runs the test command once, instrumented, and holds the result to the ratchet.
fn test_under_coverage() -> Result<()> {
    let env = shell::output_of(cargo(&["llvm-cov", "show-env"]))?;
    let env: Vec<(String, String)> = env.lines().filter_map(parse_env).collect();
    let with_env = |args: &[&str]| {
        let mut command = cargo(args);
        command.envs(env.iter().map(|(k, v)| (k, v)));
        command
    };
    shell::run_command(with_env(&["llvm-cov", "clean", "--workspace", "--profraw-only"]))?;
    let mut test = with_env(&TEST);
    test.env(emulation::REQUIRED.0, emulation::REQUIRED.1);
    shell::run_command(test)?;
    let report = root().join("target/coverage.json");
    let path = report.to_str().context("the workspace's path is not UTF-8")?;
    shell::run_command(with_env(&["llvm-cov", "report", "--json", "--summary-only", "--output-path", path]))?;
    coverage::check(&report, false)
}

/// `NAME=value` or `NAME='value'`.
fn parse_env(line: &str) -> Option<(String, String)> {
    let (name, value) = line.trim_start_matches("export ").split_once('=')?;
    let value = value.trim_matches(['\'', '"']);
    Some((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn env_lines_lose_their_quotes() {
        assert_eq!(parse_env("A='b c'"), Some(("A".into(), "b c".into())));
        assert_eq!(parse_env("export A=b=c"), Some(("A".into(), "b=c".into())));
        assert_eq!(parse_env("nonsense"), None);
    }

    #[test]
    fn the_readme_names_the_test_command() {
        let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
        assert!(readme.contains(&format!("cargo {}", TEST.join(" "))));
    }
}
