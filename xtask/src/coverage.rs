//! Line coverage of each crate, and the ratchet that keeps it from falling.
//!
//! Reads the export of `cargo llvm-cov report --json --summary-only` and `.ci/coverage.toml`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::shell::root;

const RATCHET: &str = ".ci/coverage.toml";

#[derive(Deserialize)]
struct Export {
    data: Vec<ExportData>,
}

#[derive(Deserialize)]
struct ExportData {
    files: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    filename: String,
    summary: Summary,
}

#[derive(Deserialize)]
struct Summary {
    lines: Lines,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Lines {
    count: u64,
    covered: u64,
}

impl Lines {
    fn percent(self) -> f64 {
        if self.count == 0 { 100.0 } else { 100.0 * self.covered as f64 / self.count as f64 }
    }
}

/// Prints the coverage of each crate; fails if one is below its ratchet, or has none.
pub(crate) fn check(report: &Path, raise: bool) -> Result<()> {
    let text = std::fs::read_to_string(report).with_context(|| format!("{}", report.display()))?;
    let measured = by_crate(&text)?;
    let path = root().join(RATCHET);
    let ratchet = read_ratchet(&std::fs::read_to_string(&path).with_context(|| RATCHET)?)?;
    let (table, failures) = compare(&measured, &ratchet);
    print!("{table}");
    if raise {
        std::fs::write(&path, raised(&measured, &ratchet)).context(RATCHET)?;
    }
    ensure!(failures.is_empty(), "line coverage fell below {RATCHET}: {}", failures.join(", "));
    Ok(())
}

fn by_crate(report: &str) -> Result<BTreeMap<String, Lines>> {
    let export: Export = serde_json::from_str(report).context("coverage report")?;
    let mut crates: BTreeMap<String, Lines> = BTreeMap::new();
    for file in export.data.iter().flat_map(|d| &d.files) {
        let Some(name) = crate_of(&file.filename) else { continue };
        let sum = crates.entry(name.to_owned()).or_default();
        sum.count += file.summary.lines.count;
        sum.covered += file.summary.lines.covered;
    }
    if crates.is_empty() {
        bail!("the coverage report names no file of this workspace");
    }
    Ok(crates)
}

/// `…/crates/NAME/src/…` is crate NAME; tests and benches do not count.
fn crate_of(path: &str) -> Option<&str> {
    let relative = path.strip_prefix(root().to_str()?)?.trim_start_matches('/');
    let mut parts = relative.split('/');
    match parts.next()? {
        "crates" => {
            let name = parts.next()?;
            (parts.next()? == "src").then_some(name)
        }
        "xtask" => Some("xtask"),
        _ => None,
    }
}

fn read_ratchet(text: &str) -> Result<BTreeMap<String, f64>> {
    toml::from_str(text).context(RATCHET)
}

fn compare(measured: &BTreeMap<String, Lines>, ratchet: &BTreeMap<String, f64>) -> (String, Vec<String>) {
    let mut table = String::from("line coverage      lines   covered   percent   at least\n");
    let mut failures = Vec::new();
    for (name, lines) in measured {
        let least = ratchet.get(name).copied();
        let shown = least.map_or_else(|| "none".to_owned(), |l| format!("{l:.1}"));
        let _ = writeln!(
            table,
            "  {name:<12} {:>9} {:>9} {:>9.2} {shown:>10}",
            lines.count,
            lines.covered,
            lines.percent()
        );
        match least {
            None => failures.push(format!("{name} has no entry")),
            Some(least) if lines.percent() < least => {
                failures.push(format!("{name} {:.2} < {least:.1}", lines.percent()));
            }
            Some(_) => {}
        }
    }
    for name in ratchet.keys().filter(|n| !measured.contains_key(*n)) {
        failures.push(format!("{name} was not measured"));
    }
    (table, failures)
}

/// The ratchet with every measured value that is higher, rounded down to a tenth.
fn raised(measured: &BTreeMap<String, Lines>, ratchet: &BTreeMap<String, f64>) -> String {
    let mut text = String::from(
        "# Least line coverage of each crate in percent. It only rises: cargo xtask coverage --raise\n",
    );
    for (name, lines) in measured {
        let now = (lines.percent() * 10.0).floor() / 10.0;
        let least = ratchet.get(name).copied().unwrap_or(0.0).max(now);
        let _ = writeln!(text, "{name} = {least:.1}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(files: &[(&str, u64, u64)]) -> String {
        let files: Vec<String> = files
            .iter()
            .map(|(f, count, covered)| {
                format!(
                    r#"{{"filename":"{}/{f}","summary":{{"lines":{{"count":{count},"covered":{covered}}}}}}}"#,
                    root().display()
                )
            })
            .collect();
        format!(r#"{{"data":[{{"files":[{}]}}]}}"#, files.join(","))
    }

    #[test]
    fn files_are_summed_by_crate_and_tests_do_not_count() {
        let text = report(&[
            ("crates/engine/src/a.rs", 10, 9),
            ("crates/engine/src/sim/b.rs", 10, 7),
            ("crates/engine/tests/t.rs", 100, 0),
        ]);
        let crates = by_crate(&text).unwrap();
        assert_eq!(crates.len(), 1);
        assert!((crates["engine"].percent() - 80.0).abs() < 1e-9);
    }

    #[test]
    fn a_crate_below_its_ratchet_or_without_one_or_unmeasured_fails() {
        let crates =
            by_crate(&report(&[("crates/engine/src/a.rs", 10, 8), ("crates/text/src/a.rs", 1, 1)])).unwrap();
        let (_, failures) = compare(&crates, &read_ratchet("engine = 80.1\nserver = 90.0").unwrap());
        assert_eq!(failures.len(), 3, "{failures:?}");
        let (_, failures) = compare(&crates, &read_ratchet("engine = 80.0\ntext = 99.0").unwrap());
        assert!(failures.is_empty(), "{failures:?}");
    }

    #[test]
    fn the_ratchet_rises_and_never_falls() {
        let crates =
            by_crate(&report(&[("crates/engine/src/a.rs", 1000, 957), ("crates/text/src/a.rs", 10, 9)]))
                .unwrap();
        let text = raised(&crates, &read_ratchet("engine = 90.0\ntext = 95.0").unwrap());
        let ratchet = read_ratchet(&text).unwrap();
        assert!((ratchet["engine"] - 95.7).abs() < 1e-9);
        assert!((ratchet["text"] - 95.0).abs() < 1e-9);
    }

    #[test]
    fn a_report_without_our_files_is_an_error() {
        assert!(by_crate(r#"{"data":[{"files":[]}]}"#).is_err());
    }
}
