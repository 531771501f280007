//! Running other programs. Never decides what to run.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The workspace's root, wherever xtask is called from.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// A command that runs in the workspace's root.
pub(crate) fn command(program: &str, args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// Runs to the end with inherited output; fails with the command's own words.
pub(crate) fn run(program: &str, args: &[impl AsRef<OsStr>]) -> Result<()> {
    run_command(command(program, args))
}

/// As [`run`], for a command with an environment of its own.
pub(crate) fn run_command(mut command: Command) -> Result<()> {
    let shown = show(&command);
    println!("==> {shown}");
    let start = Instant::now();
    let status = command.status().with_context(|| format!("cannot start `{shown}`"))?;
    println!("<== {:.1} s: {shown}", start.elapsed().as_secs_f64());
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs to the end and returns what it printed on standard output.
pub(crate) fn output(program: &str, args: &[impl AsRef<OsStr>]) -> Result<String> {
    output_of(command(program, args))
}

/// As [`output`], for a command with an environment of its own.
pub(crate) fn output_of(mut command: Command) -> Result<String> {
    let shown = show(&command);
    let output = command.output().with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of `{shown}`"))
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
