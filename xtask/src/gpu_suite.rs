//! `cargo xtask gpu-suite`: one folder that is carried to a machine with a GPU, which has nvcc and Python but no Rust and no
//! network.
//!
//! Owns what is in the folder and how large it may be. What is run there is in `tests/gpu`; how, in `docs/gpu.md`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::shell::{self, root};

/// Where it is made.
const FOLDER: &str = "target/gpu-suite";
/// Most bytes of the folder and of the sources that are checked out, together.
const LIMIT: u64 = 40_000_000;
/// Folders that are carried as they are: from, to, and the endings of the names that are wanted (none means all).
const CARRIED: [(&str, &str, &[&str]); 6] = [
    ("tests/gpu", "", &["py", "sh", "cu"]),
    ("kernels", "kernels", &["cu", "cuh"]),
    ("tests/cuda-emu/harness", "cuda-emu/harness", &["h"]),
    ("tests/cuda-emu/contract", "cuda-emu/contract", &["cu"]),
    ("tests/cuda-emu/kernels", "cuda-emu/kernels", &["cu"]),
    ("crates/model/tests/golden", "golden", &[]),
];
/// What makes a tokenizer of the demo model, for a server whose prompts are ids.
const TOKENIZER: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

/// Builds the programs and fills the folder.
pub(crate) fn run() -> Result<()> {
    let folder = root().join(FOLDER);
    if folder.exists() {
        fs::remove_dir_all(&folder).context(FOLDER)?;
    }
    for (from, to, endings) in CARRIED {
        copy(&root().join(from), &folder.join(to), endings)?;
    }
    for file in TOKENIZER {
        copy_file(&root().join("models/demo").join(file), &folder.join("tokenizer").join(file))?;
    }
    fs::write(folder.join("commit"), commit()?).context("commit")?;
    shell::run("cargo", &["build", "--release", "--workspace", "--example", "gpu_suite"])?;
    // Without the demo model: it is not run there.
    shell::run("cargo", &["build", "--release", "--workspace", "--no-default-features", "--bin", "mirai"])?;
    let built = root().join("target/release");
    for (program, name) in [(built.join("examples/gpu_suite"), "gpu_suite"), (built.join("mirai"), "mirai")] {
        copy_file(&program, &folder.join("bin").join(name))?;
        let packed = folder.join("bin").join(name);
        shell::run("gzip", &[Path::new("-9"), Path::new("-f"), &packed])?;
    }
    let (carried, tree) = (bytes_below(&folder)?, tracked_bytes()?);
    println!("{FOLDER}: {carried} bytes; with the {tree} of the tracked files {}", carried + tree);
    ensure!(carried + tree <= LIMIT, "more than {LIMIT} bytes");
    println!("There: OUT=FOLDER {FOLDER}/run.sh [ceilings] [contract] [goldens] [steps] [server]");
    Ok(())
}

/// The commit, and whether files differ from it.
fn commit() -> Result<String> {
    let commit = shell::output("git", &["rev-parse", "HEAD"])?;
    let changed = shell::output("git", &["status", "--porcelain", "--untracked-files=no"])?;
    Ok(format!("{}{}\n", commit.trim(), if changed.is_empty() { "" } else { " with changes" }))
}

/// Bytes of what git tracks.
fn tracked_bytes() -> Result<u64> {
    let listed = shell::output("git", &["ls-files", "-z"])?;
    let files = listed.split('\0').filter(|name| !name.is_empty());
    // A file that is deleted but still tracked weighs nothing.
    Ok(files.map(|name| fs::metadata(root().join(name)).map_or(0, |found| found.len())).sum())
}

fn bytes_below(folder: &Path) -> Result<u64> {
    Ok(files_below(folder)?.iter().map(|file| fs::metadata(file).map_or(0, |found| found.len())).sum())
}

/// Regular files, at any depth, in order.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry.with_context(|| folder.display().to_string())?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.is_file() {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Copies a folder's files whose names end so; all if no ending is given.
fn copy(from: &Path, to: &Path, endings: &[&str]) -> Result<()> {
    let wanted = |file: &Path| {
        endings.is_empty()
            || file.extension().is_some_and(|found| endings.iter().any(|ending| found == *ending))
    };
    let mut copied = 0;
    for file in files_below(from)?.into_iter().filter(|file| wanted(file)) {
        let inner = file.strip_prefix(from).context("a file below its folder")?;
        copy_file(&file, &to.join(inner))?;
        copied += 1;
    }
    ensure!(copied > 0, "nothing to carry in {}", from.display());
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_carried_is_there() {
        let folder = std::env::temp_dir().join(format!("gpu-suite-{}", std::process::id()));
        for (from, to, endings) in CARRIED {
            copy(&root().join(from), &folder.join(to), endings).unwrap();
        }
        for file in [
            "run.sh",
            "suite.py",
            "make_checkpoints.py",
            "ceilings.cu",
            "kernels/port.cuh",
            "cuda-emu/harness/harness.h",
            "cuda-emu/contract/wrappers_test.cu",
            "cuda-emu/kernels/norm_test.cu",
            "golden/llama-linear/golden.json",
        ] {
            assert!(folder.join(file).is_file(), "{file}");
        }
        let bytes = bytes_below(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        // Programs take the rest.
        assert!(bytes > 1 << 20 && bytes + tracked_bytes().unwrap() < LIMIT - 12_000_000, "{bytes}");
        assert!(copy(&root().join("kernels"), &folder, &["none"]).is_err());
        assert!(commit().unwrap().trim().len() >= 40);
        assert!(TOKENIZER.iter().all(|file| root().join("models/demo").join(file).is_file()));
    }

    #[test]
    fn the_scripts_pass_their_own_tests() {
        shell::run("python3", &["-B", "tests/gpu/test_suite.py"]).unwrap();
        shell::run("sh", &["-n", "tests/gpu/run.sh"]).unwrap();
    }
}
