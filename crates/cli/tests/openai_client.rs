//! The official Python client against the real binary: `tests/python/test_openai_client.py`.
//!
//! `MIRAI_TEST_PYTHON` names a Python that has the package `openai` (`.ci/run` makes one); without it this test
//! says so and does nothing.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod support;

use std::path::Path;
use std::process::Command;

#[test]
fn the_official_client_finds_what_it_expects() {
    let Some(python) = std::env::var_os("MIRAI_TEST_PYTHON") else {
        eprintln!("skipped: MIRAI_TEST_PYTHON names no Python with the package openai");
        return;
    };
    let server = support::Server::start(&["--api-key", "k1", "--batch-invariant"]);
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/python");
    let output = Command::new(python)
        .args(["-m", "unittest", "-v"])
        .current_dir(tests)
        .envs([("MIRAI_URL", server.url().as_str()), ("MIRAI_KEY", "k1"), ("PYTHONDONTWRITEBYTECODE", "1")])
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report}");
    assert!(report.contains("\nOK"), "{report}");
}
