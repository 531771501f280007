//! What the binary that people get is made of.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

/// The packages of the binary, each with its features, as `cargo build --release` resolves them.
fn tree(extra: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "--package", "mirai-cli", "--edges", "normal"])
        .args(["--prefix", "none", "--format", "{p} {f}"])
        .args(extra)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_binary_has_no_test_hooks() {
    let plain = tree(&[]);
    assert!(plain.contains("mirai-engine"), "{plain}");
    assert!(!plain.contains("test-hooks"), "a default build has test hooks");
    let asked = tree(&["--features", "test-hooks"]);
    assert!(asked.contains("test-hooks"), "this test would not see the feature");
}

#[test]
fn the_binary_has_one_tls_stack_and_no_foreign_one() {
    let plain = tree(&[]);
    for foreign in ["openssl-sys ", "aws-lc-sys ", "native-tls ", "onig ", "hf-hub ", "candle-kernels "] {
        assert!(!plain.lines().any(|l| l.starts_with(foreign)), "{foreign} is in the default tree");
    }
    assert!(plain.lines().any(|l| l.starts_with("rustls ")));
}
