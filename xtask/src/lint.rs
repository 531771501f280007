//! Lints in SARIF 2.1.0, the format that quality platforms read, and the inventory of unsafe code.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::shell::{self, root};

/// Runs clippy over the workspace; its warnings and errors as one SARIF document. An error is a result like others:
/// only a clippy that said nothing of the kind has failed.
pub(crate) fn clippy() -> Result<Value> {
    let words = ["clippy", "--workspace", "--all-targets", "--quiet", "--message-format=json"];
    let output = shell::command("cargo", &words).output().context("cannot start cargo clippy")?;
    let document = sarif(&String::from_utf8_lossy(&output.stdout));
    let errors =
        document["runs"][0]["results"].as_array().is_some_and(|r| r.iter().any(|r| r["level"] == "error"));
    ensure!(
        output.status.success() || errors,
        "cargo clippy ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(document)
}

/// Converts cargo's JSON lines.
fn sarif(lines: &str) -> Value {
    let messages = lines.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let results: Vec<Value> = messages
        .filter(|m| m["reason"] == "compiler-message")
        .filter_map(|m| result(&m["message"]))
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{ "tool": { "driver": { "name": "clippy", "informationUri": "https://doc.rust-lang.org/clippy" } },
                   "results": results }],
    })
}

/// A message with a place; summaries have none.
fn result(message: &Value) -> Option<Value> {
    let span = message["spans"].as_array()?.iter().find(|s| s["is_primary"] == true)?;
    let level = match message["level"].as_str()? {
        "error" => "error",
        "warning" => "warning",
        _ => "note",
    };
    Some(json!({
        "ruleId": message["code"]["code"].as_str().unwrap_or("rustc"),
        "level": level,
        "message": { "text": message["message"] },
        "locations": [{ "physicalLocation": {
            "artifactLocation": { "uri": span["file_name"] },
            "region": { "startLine": span["line_start"], "startColumn": span["column_start"],
                        "endLine": span["line_end"], "endColumn": span["column_end"] },
        } }],
    }))
}

/// A table of files with unsafe code: how many places, and on which lines.
pub(crate) fn unsafe_inventory() -> Result<String> {
    let files = shell::output("git", &["ls-files", "*.rs"])?;
    let mut table = String::from("| file | places | lines |\n|---|---|---|\n");
    let mut total = 0;
    for file in files.lines() {
        let text = std::fs::read_to_string(root().join(Path::new(file))).context(file.to_owned())?;
        let lines = unsafe_lines(&text);
        if !lines.is_empty() {
            total += lines.len();
            let list: Vec<String> = lines.iter().map(usize::to_string).collect();
            writeln!(table, "| {file} | {} | {} |", lines.len(), list.join(", "))?;
        }
    }
    writeln!(
        table,
        "\n{total} places. The lint table denies `unsafe_code`; each of these files allows it by itself."
    )?;
    Ok(table)
}

/// Lines, from 1, on which the keyword opens a block, a function, an implementation, a trait or an attribute.
fn unsafe_lines(text: &str) -> Vec<usize> {
    let opens = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern", "unsafe("]
            .iter()
            .any(|word| code.contains(word))
    };
    text.lines().zip(1..).filter(|(line, _)| opens(line)).map(|(_, n)| n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_results() {
        let span = json!({ "is_primary": true, "file_name": "a.rs", "line_start": 3, "column_start": 5,
                           "line_end": 3, "column_end": 9 });
        let message = |level: &str, spans: Value| {
            json!({ "reason": "compiler-message", "message": { "level": level, "message": "text",
                    "code": { "code": "clippy::x" }, "spans": spans } })
            .to_string()
        };
        let lines = [
            message("warning", json!([span])),
            message("warning", json!([])),
            json!({ "reason": "build-finished" }).to_string(),
            "not JSON".to_owned(),
        ]
        .join("\n");
        let results = &sarif(&lines)["runs"][0]["results"];
        assert_eq!(results.as_array().unwrap().len(), 1);
        assert_eq!(results[0]["ruleId"], "clippy::x");
        assert_eq!(results[0]["locations"][0]["physicalLocation"]["region"]["startLine"], 3);
    }

    #[test]
    fn the_keyword_counts_where_it_opens_something() {
        let text = "// unsafe {\nlet x = unsafe { f() };\nunsafe impl Send for A {}\nlet unsafe_name = 1;\n";
        assert_eq!(unsafe_lines(text), [2, 3]);
    }

    #[test]
    fn the_inventory_names_known_files() {
        let inventory = unsafe_inventory().unwrap();
        assert!(inventory.contains("crates/cuda/src/driver/"));
        assert!(!inventory.contains("crates/server/src/"), "the server has none");
    }
}
