//! `cargo xtask cuda-emu`: kernels, driver, cublasLt and NVML on the host, without a GPU.
//!
//! Owns where the emulation is built and in which order its tests run. How is in the two Makefiles of
//! `tests/cuda-emu`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::shell::{self, root};

/// What the emulated libraries are compiled with, besides nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sanitizer {
    /// AddressSanitizer and UndefinedBehaviorSanitizer.
    Address,
}

/// Calls `make` in a folder of `tests/cuda-emu` with as many jobs as there are cores.
fn make(folder: &str, arguments: &[String]) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut all: Vec<String> =
        ["-s", "-k", &format!("-j{jobs}"), "-C", folder].iter().map(|&word| word.to_owned()).collect();
    all.extend_from_slice(arguments);
    shell::run("make", &all)
}

/// `NAME=path` of a folder below `target/`.
fn output(name: &str, folder: &str) -> Result<String> {
    let path = root().join("target").join(folder);
    Ok(format!("{name}={}", path.to_str().context("the workspace's path is not UTF-8")?))
}

/// Builds the libraries that take the place of the driver's.
pub(crate) fn build_driver(sanitizer: Option<Sanitizer>) -> Result<()> {
    let mut arguments = vec![output("BASE", "cuda-emu/driver")?, "libraries".to_owned()];
    if let Some(Sanitizer::Address) = sanitizer {
        arguments.push("SANITIZE=address".to_owned());
    }
    make("tests/cuda-emu/driver", &arguments)
}

/// Builds and runs the tests of kernels and libraries.
pub(crate) fn check() -> Result<()> {
    make("tests/cuda-emu", &[output("OUT", "cuda-emu")?, "check".to_owned()])?;
    let base = output("BASE", "cuda-emu/driver")?;
    make("tests/cuda-emu/driver", &[base.clone(), "check".to_owned()])?;
    make("tests/cuda-emu/driver", &[base, "check".to_owned(), "SANITIZE=address".to_owned()])
}

/// Plays the golden cases beyond those of each kind, which every run of the tests has.
pub(crate) fn goldens() -> Result<()> {
    build_driver(None)?;
    shell::run("cargo", &["test", "--workspace", "--test", "golden", "--", "--ignored"])
}

/// Has tests fail, instead of saying that they are skipped, where the emulated driver is not found.
pub(crate) const REQUIRED: (&str, &str) = ("MIRAI_TEST_REQUIRES_EMULATED_DRIVER", "1");

/// Names AddressSanitizer's run-time library to the tests, which then take the driver that was built with it.
const SANITIZER: &str = "MIRAI_TEST_ADDRESS_SANITIZER";

/// What the server is told of the emulated GPU: it runs there, times no products, which say nothing of a real one, and is
/// small, because every bucket of rows is computed twice before it is ready.
const SERVER: [(&str, &str); 4] = [
    ("MIRAI__MODEL__DEVICE", "cuda"),
    ("MIRAI__ENGINE__MATMUL_CANDIDATES", "1"),
    ("MIRAI__ENGINE__MAX_NUM_SEQS", "8"),
    ("MIRAI__ENGINE__MAX_NUM_BATCHED_TOKENS", "512"),
];

/// Runs the suites that talk to the real binary as clients do, with the server on the emulated GPU.
pub(crate) fn server() -> Result<()> {
    ensure!(
        std::env::var_os("MIRAI_TEST_PYTHON").is_some(),
        "MIRAI_TEST_PYTHON names no Python with the package openai; `.ci/run` makes one in .venv"
    );
    build_driver(None)?;
    let folder = root().join("target/cuda-emu");
    let counts = folder.join("server.jsonl");
    if counts.exists() {
        std::fs::remove_file(&counts).context("counts of the run before")?;
    }
    let suites = ["--test", "openai_client", "--test", "pooling", "--test", "serve"];
    let mut command = shell::command("cargo", &["test", "--workspace"]);
    command.args(suites).envs(SERVER);
    command.env("LD_LIBRARY_PATH", folder.join("driver")).env("MIRAI_EMU_COUNTS", &counts);
    shell::run_command(command)?;
    let text = std::fs::read_to_string(&counts).context("no server ended in order on the emulated GPU")?;
    println!("{}", held(&text)?);
    Ok(())
}

/// What the servers did on the device, a line of JSON each: whether they replayed steps, and allocated nothing behind the
/// first recorded one.
fn held(counts: &str) -> Result<String> {
    let lines = counts.lines().map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>()?;
    let sum = |what: &str| lines.iter().filter_map(|line| line[what].as_u64()).sum::<u64>();
    let (replays, late) = (sum("graph_launches"), sum("allocations_after_graphs"));
    ensure!(replays > 0, "no step was replayed");
    ensure!(late == 0, "{late} allocations behind the first recorded step");
    Ok(format!("{} servers replayed {replays} graphs and allocated nothing after their start", lines.len()))
}

/// Runs the backend's tests, golden cases among them, and the server's on a driver that watches memory.
pub(crate) fn watched() -> Result<()> {
    build_driver(Some(Sanitizer::Address))?;
    let runtime = shell::output("g++", &["-print-file-name=libasan.so"])?;
    let test = |suites: &[&str], ignored: &[&str]| {
        let mut command = shell::command("cargo", &["test", "--workspace"]);
        command.args(suites.iter().flat_map(|suite| ["--test", suite])).args(ignored);
        // The tests hand it to the programs that they start on the driver.
        command.env(SANITIZER, runtime.trim()).env(REQUIRED.0, REQUIRED.1);
        shell::run_command(command)
    };
    test(&["golden", "heads", "operations", "redzones", "runtime", "steps", "cuda"], &[])?;
    test(&["golden"], &["--", "--ignored"])
}

/// Proves that the kernels' tests notice faults.
pub(crate) fn faults() -> Result<()> {
    shell::run("python3", &["tests/cuda-emu/faults.py"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_know_the_variables_that_they_are_given() {
        for support in ["crates/cuda/tests/support/mod.rs", "crates/cli/tests/support/mod.rs"] {
            let text = std::fs::read_to_string(root().join(support)).unwrap();
            for name in [REQUIRED.0, SANITIZER] {
                assert!(text.contains(&format!("\"{name}\"")), "{support}: {name}");
            }
        }
    }

    #[test]
    fn servers_that_replay_nothing_or_allocate_late_are_found_out() {
        let line = |replays: u32, late: u32| {
            format!("{{\"graph_launches\":{replays},\"allocations_after_graphs\":{late}}}\n")
        };
        let good = held(&[line(0, 0), line(40, 0)].concat()).unwrap();
        assert_eq!(good, "2 servers replayed 40 graphs and allocated nothing after their start");
        for (bad, words) in
            [(line(0, 0), "replayed"), (line(9, 0) + &line(4, 1), "1 allocations"), ("x".into(), "expected")]
        {
            let error = held(&bad).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn everything_is_built_below_target() {
        let text = output("BASE", "cuda-emu/driver").unwrap();
        let path = text.strip_prefix("BASE=").unwrap();
        assert!(std::path::Path::new(path).starts_with(root().join("target")), "{path}");
        for folder in ["tests/cuda-emu", "tests/cuda-emu/driver"] {
            assert!(root().join(folder).join("Makefile").exists(), "{folder}");
        }
    }
}
