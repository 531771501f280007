//! Tests on the emulated driver, each in a process of its own.
//!
//! A library is found by a variable that is read when a process starts, and the emulated device's orders and faults are
//! variables too. So a test starts its own binary once more with them, and there runs its body.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Set in the second process.
const INSIDE: &str = "MIRAI_TEST_ON_EMULATED_DRIVER";
/// Longest that one may take, in seconds.
const LIMIT: u64 = 600;

/// Names AddressSanitizer's run-time library: then the emulated driver is the one that was built with it.
const SANITIZER: &str = "MIRAI_TEST_ADDRESS_SANITIZER";

/// Where `cargo xtask cuda-emu --driver` puts the libraries.
pub(crate) fn driver_folder() -> PathBuf {
    let name = if is_sanitized() { "driver-address" } else { "driver" };
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/cuda-emu")).join(name)
}

/// Whether the emulated driver watches memory.
pub(crate) fn is_sanitized() -> bool {
    std::env::var_os(SANITIZER).is_some()
}

/// Where it is set, a test that finds no emulated driver fails: whoever runs all tests has built it.
const REQUIRED: &str = "MIRAI_TEST_REQUIRES_EMULATED_DRIVER";

/// Whether the emulated driver was built; says so if not.
///
/// # Panics
/// It was not, and must have been.
pub(crate) fn is_built(name: &str) -> bool {
    let built = ["libcuda.so.1", "libcublasLt.so.13", "libnvidia-ml.so.1"]
        .iter()
        .all(|library| driver_folder().join(library).exists());
    if !built {
        assert!(
            std::env::var_os(REQUIRED).is_none(),
            "{name}: no emulated driver, which {REQUIRED} asks for"
        );
        println!("{name}: skipped: `cargo xtask cuda-emu --driver` was not run");
    }
    built
}

/// Runs `body` in a process that finds the emulated driver and has these variables too. `name` is the calling test's
/// full name.
pub(crate) fn on_emulated_driver(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    if !is_built(name) {
        return;
    }
    run(name, variables, &driver_folder());
}

/// Runs `body` in a process that finds only some of the emulated libraries.
pub(crate) fn on_libraries(name: &str, libraries: &[&str], body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    if !is_built(name) {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    for library in libraries {
        std::os::unix::fs::symlink(driver_folder().join(library), folder.path().join(library))
            .expect("a link in a folder of our own");
    }
    run(name, &[], folder.path());
}

/// Runs `body` in a process that finds no driver, unless the machine has one of its own.
pub(crate) fn without_driver(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let empty = tempfile::tempdir().expect("a temporary folder");
    run(name, &[], empty.path());
}

/// Runs `body` in a process that the sanitized driver must end; what it said. None in that process, and where the driver
/// watches nothing.
pub(crate) fn ends_on_sanitized_driver(name: &str, body: impl FnOnce()) -> Option<String> {
    if is_inside() {
        body();
        return None;
    }
    if !is_sanitized() || !is_built(name) {
        return None;
    }
    let output = start(name, &[], &driver_folder());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{name}: {said}");
    Some(said)
}

fn run(name: &str, variables: &[(&str, &str)], libraries: &Path) {
    let output = start(name, variables, libraries);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{name} with {variables:?}: {}\n{out}\n{err}", output.status);
    assert!(out.contains("1 passed"), "{name} is not the calling test's name\n{out}");
}

/// The second process, to its end.
fn start(name: &str, variables: &[(&str, &str)], libraries: &Path) -> Output {
    let mut command = Command::new("timeout");
    command
        .arg(LIMIT.to_string())
        .arg(std::env::current_exe().expect("this test has a file"))
        .args(["--exact", name, "--nocapture", "--include-ignored", "--test-threads", "1"])
        .env(INSIDE, "1")
        .env("LD_LIBRARY_PATH", libraries)
        .envs(variables.iter().copied());
    if let Some(runtime) = std::env::var_os(SANITIZER) {
        // A program that is not built with it cannot be searched for leaks.
        command.env("LD_PRELOAD", runtime).env("ASAN_OPTIONS", "detect_leaks=0");
    }
    command.output().expect("the test can be started again")
}

/// Whether this is the second process.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// As [`on_emulated_driver`], and what the driver counted in that process; none within it, and where the emulated driver was
/// not built.
pub(crate) fn counts_on_emulated_driver(
    name: &str,
    variables: &[(&str, &str)],
    body: impl FnOnce(),
) -> Option<serde_json::Value> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let path = file.path().to_str().expect("a path of letters").to_owned();
    let variables: Vec<_> = variables.iter().copied().chain([("MIRAI_EMU_COUNTS", &*path)]).collect();
    on_emulated_driver(name, &variables, body);
    if is_inside() || !is_built(name) {
        return None;
    }
    let text = std::fs::read_to_string(file.path()).expect("the file is there");
    let line = text.lines().next_back().expect("the driver counted");
    Some(serde_json::from_str(line).expect("a line of JSON"))
}
