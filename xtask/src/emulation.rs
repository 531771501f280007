//! `cargo xtask cuda-emu`: kernels, driver, cublasLt and NVML on the host, without a GPU.
//!
//! Owns where the emulation is built and in which order its tests run. How is in the two Makefiles of
//! `tests/cuda-emu`.

use anyhow::{Context, Result};

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

/// Proves that the kernels' tests notice faults.
pub(crate) fn faults() -> Result<()> {
    shell::run("python3", &["tests/cuda-emu/faults.py"])
}

#[cfg(test)]
mod tests {
    use super::*;

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
