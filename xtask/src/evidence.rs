//! `cargo xtask evidence`: one dated folder with what an audit asks for. What was not made says why: `not run`.
//!
//! Owns the list of pieces and the index. Each piece comes from the tool that knows it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::shell::{self, root};
use crate::{deploy, lint, sbom};

/// What to leave out, and what is given.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the dated folder is made.
    #[arg(long, default_value = "target/evidence")]
    folder: PathBuf,
    /// A local copy of the RustSec advisory database; without one advisories are not judged.
    #[arg(long)]
    advisories: Option<PathBuf>,
    /// Leave the tests out, which take longest.
    #[arg(long)]
    skip_tests: bool,
}

/// One piece: its title, and its files, or why there are none.
struct Piece {
    title: &'static str,
    files: Result<Vec<PathBuf>>,
}

/// Makes the folder; fails if a piece failed, after all others were made.
pub(crate) fn run(options: &Options) -> Result<()> {
    let date = shell::output("date", &["-u", "+%Y-%m-%d"])?;
    let folder = root().join(&options.folder).join(date.trim());
    std::fs::create_dir_all(&folder)?;
    let pieces = [
        ("Test report", tests(&folder, options.skip_tests)),
        ("Coverage", copy(&folder, "target/coverage.json", "`cargo xtask ci` makes it")),
        ("Lint report (SARIF)", clippy(&folder)),
        ("Licences, sources, bans", licences(&folder)),
        ("Advisories", advisories(&folder, options.advisories.as_deref())),
        ("Bill of materials (CycloneDX)", bill(&folder)),
        ("Unsafe code", unsafe_code(&folder)),
        ("Manifests and their judgement by the clusters' rules", manifests(&folder)),
        ("Deployment tests", copy(&folder, deploy::report(), "`cargo xtask deploy` makes it")),
        ("Benchmark results", benches(&folder)),
        ("Conformity matrix", copy(&folder, "docs/conformity.md", "it is missing")),
    ]
    .map(|(title, files)| Piece { title, files });
    let index = index(date.trim(), &folder, &pieces)?;
    std::fs::write(folder.join("index.md"), index)?;
    println!("{}", folder.join("index.md").display());
    let failed: Vec<&str> = pieces
        .iter()
        .filter(|p| p.files.as_ref().is_err_and(|e| !e.is::<NotRun>()))
        .map(|p| p.title)
        .collect();
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// A piece that nobody asked for, or whose source is not here: no failure.
#[derive(Debug)]
struct NotRun(String);

impl std::fmt::Display for NotRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not run: {}", self.0)
    }
}

impl std::error::Error for NotRun {}

fn not_run<T>(why: impl Into<String>) -> Result<T> {
    Err(NotRun(why.into()).into())
}

/// The command's whole output in a file; an error if it failed, but the file stands.
fn log(folder: &Path, name: &str, mut command: Command) -> Result<Vec<PathBuf>> {
    let shown = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot start {shown}"))?;
    let file = folder.join(name);
    std::fs::write(&file, [output.stdout, output.stderr].concat())?;
    if !output.status.success() {
        bail!("{shown} ended with {}; see {name}", output.status);
    }
    Ok(vec![file])
}

fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> Result<Vec<PathBuf>> {
    let file = folder.join(name);
    std::fs::write(&file, text)?;
    Ok(vec![file])
}

fn copy(folder: &Path, from: impl AsRef<Path>, otherwise: &str) -> Result<Vec<PathBuf>> {
    let from = root().join(from);
    let Ok(text) = std::fs::read(&from) else {
        return not_run(otherwise);
    };
    let name = from.file_name().context("a file has a name")?.to_string_lossy().into_owned();
    write(folder, &name, text)
}

fn tests(folder: &Path, skip: bool) -> Result<Vec<PathBuf>> {
    if skip {
        return not_run("left out by --skip-tests");
    }
    log(folder, "tests.txt", shell::command("cargo", &["test", "--workspace", "--no-fail-fast"]))
}

fn clippy(folder: &Path) -> Result<Vec<PathBuf>> {
    write(folder, "clippy.sarif", serde_json::to_string_pretty(&lint::clippy()?)?)
}

fn licences(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut table = String::from("| licence | components |\n|---|---|\n");
    for (licence, count) in sbom::licences(&sbom::document(None)?) {
        writeln!(table, "| {licence} | {count} |")?;
    }
    let mut files = write(folder, "licences.md", table)?;
    let check = ["deny", "--log-level", "warn", "check", "bans", "licenses", "sources"];
    files.extend(log(folder, "deny.txt", shell::command("cargo", &check))?);
    Ok(files)
}

fn advisories(folder: &Path, database: Option<&Path>) -> Result<Vec<PathBuf>> {
    let Some(database) = database else {
        return not_run("no advisory database was given (--advisories)");
    };
    ensure!(database.is_dir(), "{} is no folder", database.display());
    let mut command = shell::command("cargo", &["audit", "--no-fetch", "--json", "--db"]);
    command.arg(database);
    log(folder, "advisories.json", command)
}

fn bill(folder: &Path) -> Result<Vec<PathBuf>> {
    // Of the image, where one was built; of the binary alone otherwise.
    let mut files = write(folder, "mirai.cdx.json", serde_json::to_string_pretty(&sbom::document(None)?)?)?;
    for kind in ["mirai", "mirai-cuda"] {
        if let Ok(text) = std::fs::read(root().join(format!("target/image/{kind}.cdx.json"))) {
            files.extend(write(folder, &format!("image-{kind}.cdx.json"), text)?);
        }
    }
    Ok(files)
}

fn unsafe_code(folder: &Path) -> Result<Vec<PathBuf>> {
    write(folder, "unsafe.md", lint::unsafe_inventory()?)
}

fn manifests(folder: &Path) -> Result<Vec<PathBuf>> {
    let rendered = folder.join("manifests");
    let mut command = shell::command(&deploy::python(), &["tests/deploy/manifests.py"]);
    deploy::with_helm(&mut command);
    command.arg(&rendered);
    let mut files = log(folder, "policies.md", command)?;
    for entry in std::fs::read_dir(&rendered)? {
        files.push(entry?.path());
    }
    files.sort();
    Ok(files)
}

fn benches(folder: &Path) -> Result<Vec<PathBuf>> {
    let place = folder.join("benches");
    std::fs::create_dir_all(&place)?;
    let listed = shell::output("git", &["ls-files", "benches/results"])?;
    let mut files = Vec::new();
    for file in listed.lines() {
        files.extend(copy(&place, file, "it is not in the checkout")?);
    }
    Ok(files)
}

/// The table of contents, with each file's digest, so that a folder that is handed on can be checked.
fn index(date: &str, folder: &Path, pieces: &[Piece]) -> Result<String> {
    let commit = shell::output("git", &["rev-parse", "HEAD"])?;
    let dirty = !shell::output("git", &["status", "--porcelain"])?.trim().is_empty();
    let toolchain = shell::output("rustc", &["--version"])?;
    let mut text = format!(
        "# Evidence of {date}\n\nCommit `{}`{}, {}.\n\n| piece | file | SHA-256 |\n|---|---|---|\n",
        commit.trim(),
        if dirty { " with uncommitted changes" } else { "" },
        toolchain.trim()
    );
    for piece in pieces {
        match &piece.files {
            Ok(files) => {
                for file in files {
                    let name = file.strip_prefix(folder)?.display();
                    writeln!(text, "| {} | {name} | `{}` |", piece.title, digest(file)?)?;
                }
            }
            Err(error) => {
                let said = format!("{error:#}").replace('|', "/").replace('\n', " ");
                let state = if error.is::<NotRun>() { said } else { format!("**failed**: {said}") };
                writeln!(text, "| {} | {state} | |", piece.title)?;
            }
        }
    }
    Ok(text)
}

fn digest(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    Ok(Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("mirai-evidence-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn what_is_not_here_is_not_run_and_what_fails_failed() {
        let folder = folder("index");
        let pieces = [
            Piece { title: "made", files: write(&folder, "a.txt", "abc") },
            Piece { title: "skipped", files: tests(&folder, true) },
            Piece { title: "no database", files: advisories(&folder, None) },
            Piece { title: "no file", files: copy(&folder, "no/such/file", "nobody made it") },
            Piece { title: "broken", files: advisories(&folder, Some(Path::new("/no/such/folder"))) },
        ];
        let index = index("2026-01-02", &folder, &pieces).unwrap();
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(index.contains(&format!("| made | a.txt | `{digest}` |")), "{index}");
        assert!(index.contains("| skipped | not run: left out by --skip-tests | |"), "{index}");
        assert!(index.contains("| no database | not run: no advisory database"), "{index}");
        assert!(index.contains("| no file | not run: nobody made it | |"), "{index}");
        assert!(index.contains("| broken | **failed**: /no/such/folder is no folder | |"), "{index}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_commands_words_are_kept_even_where_it_fails() {
        let folder = folder("log");
        assert_eq!(
            log(&folder, "good", shell::command("sh", &["-c", "echo x; echo y >&2"])).unwrap().len(),
            1
        );
        assert_eq!(std::fs::read_to_string(folder.join("good")).unwrap(), "x\ny\n");
        let error = log(&folder, "bad", shell::command("sh", &["-c", "echo z; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("see bad") && !error.is::<NotRun>());
        assert_eq!(std::fs::read_to_string(folder.join("bad")).unwrap(), "z\n");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn pieces_that_need_no_tool_are_made() {
        let folder = folder("pieces");
        assert!(unsafe_code(&folder).unwrap()[0].exists());
        assert!(bill(&folder).unwrap()[0].exists());
        assert!(benches(&folder).unwrap().len() > 2);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
