//! Readers of recorded traces. Owns the two formats; never clips, scales or sends anything.
//!
//! * Azure LLM inference trace (CSV): `TIMESTAMP,ContextTokens,GeneratedTokens`.
//! * Mooncake (JSON lines): `timestamp` in milliseconds, `input_length`, `output_length`, and `hash_ids`, one
//!   for each block of 512 prompt tokens; equal hashes are equal blocks behind equal prefixes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::BenchError;

/// Tokens of one block of a Mooncake trace.
pub(crate) const BLOCK_TOKENS: u32 = 512;
/// Longest line in bytes.
const MAX_LINE: u64 = 16 << 20;
/// Longest prompt or answer that a row may have, in tokens.
const MAX_TOKENS: u64 = 16_000_000;

/// One recorded request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    /// Time since the first request.
    pub(crate) at: Duration,
    /// Prompt tokens, at least 1.
    pub(crate) input_len: u32,
    /// Generated tokens, at least 1.
    pub(crate) output_len: u32,
    /// Hashes of the prompt's blocks; empty where the trace has none.
    pub(crate) blocks: Vec<u64>,
}

/// Reads the first `limit` requests, in order of time. The format follows from the file's name (`.csv`,
/// `.jsonl`).
pub(crate) fn read(path: &Path, limit: usize) -> Result<Vec<Row>, BenchError> {
    let extension = path.extension().map(|ext| ext.to_string_lossy().to_ascii_lowercase());
    let mut rows = match extension.as_deref() {
        Some("csv") => {
            let mut is_header = true;
            let mut first = None;
            read_lines(path, limit, |line| {
                if std::mem::take(&mut is_header) {
                    return azure_header(line).map(|()| None);
                }
                let mut row = azure_row(line)?;
                let first = *first.get_or_insert(row.at);
                row.at = row.at.checked_sub(first).ok_or("TIMESTAMP: before that of the first row")?;
                Ok(Some(row))
            })?
        }
        Some("jsonl" | "json") => read_lines(path, limit, |line| mooncake_row(line).map(Some))?,
        _ => {
            return Err(BenchError::BadOption {
                flag: "dataset-path",
                reason: format!("{}: a trace is a .csv (Azure) or .jsonl (Mooncake) file", path.display()),
            });
        }
    };
    if rows.is_empty() {
        return Err(BenchError::BadData {
            path: path.to_owned(),
            line: 1,
            reason: "holds no request".into(),
        });
    }
    rows.sort_by_key(|row| row.at);
    let first = rows[0].at;
    for row in &mut rows {
        row.at -= first;
    }
    Ok(rows)
}

/// Calls `parse` for each line that is not blank until `limit` values are there.
pub(crate) fn read_lines<T>(
    path: &Path,
    limit: usize,
    mut parse: impl FnMut(&str) -> Result<Option<T>, String>,
) -> Result<Vec<T>, BenchError> {
    let io = |source| BenchError::Io { path: path.to_owned(), action: "read", source };
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let mut values = Vec::new();
    let mut line = String::new();
    let mut number = 0;
    while values.len() < limit {
        line.clear();
        number += 1;
        let bad = |reason: String| BenchError::BadData { path: path.to_owned(), line: number, reason };
        let count = (&mut reader).take(MAX_LINE).read_line(&mut line).map_err(io)?;
        if count == 0 {
            break;
        }
        if count as u64 == MAX_LINE {
            return Err(bad(format!("longer than {MAX_LINE} bytes")));
        }
        let text = line.trim_end_matches(['\n', '\r']);
        if !text.trim().is_empty() {
            values.extend(parse(text).map_err(bad)?);
        }
    }
    Ok(values)
}

fn tokens(field: &str, value: u64) -> Result<u32, String> {
    if value > MAX_TOKENS {
        return Err(format!("{field}: {value} is more than {MAX_TOKENS}"));
    }
    // A request of no tokens cannot be sent; the traces have a few.
    u32::try_from(value.max(1)).map_err(|error| format!("{field}: {error}"))
}

fn azure_header(line: &str) -> Result<(), String> {
    const HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";
    if line.trim_start_matches('\u{feff}') == HEADER {
        Ok(())
    } else {
        Err(format!("expected the header {HEADER}"))
    }
}

fn azure_row(line: &str) -> Result<Row, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let [time, input, output] = fields.as_slice() else {
        return Err(format!("expected 3 fields, got {}", fields.len()));
    };
    let number = |field: &str, text: &str| {
        let value = text.trim().parse::<u64>().map_err(|error| format!("{field}: {text:?}: {error}"))?;
        tokens(field, value)
    };
    Ok(Row {
        at: timestamp(time)
            .ok_or_else(|| format!("TIMESTAMP: {time:?} is not YYYY-MM-DD HH:MM:SS.fraction"))?,
        input_len: number("ContextTokens", input)?,
        output_len: number("GeneratedTokens", output)?,
        blocks: Vec::new(),
    })
}

/// Time since 1970 of `YYYY-MM-DD HH:MM:SS[.fraction][+00:00]`.
fn timestamp(text: &str) -> Option<Duration> {
    let text = text.trim().trim_end_matches("+00:00").trim_end_matches('Z');
    let (date, time) = text.split_once([' ', 'T'])?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u32>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let mut time = time.splitn(3, ':').map(|part| part.parse::<u32>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    let valid = (1970..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second < 61
        && fraction.len() <= 9
        && fraction.bytes().all(|byte| byte.is_ascii_digit());
    if !valid {
        return None;
    }
    let nanos = format!("{fraction:0<9}").parse::<u32>().ok()?;
    let seconds = days_since_1970(year, month, day) * 86_400 + u64::from(hour * 3600 + minute * 60 + second);
    Some(Duration::new(seconds, nanos))
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, from 1970 on.
fn days_since_1970(year: u32, month: u32, day: u32) -> u64 {
    // Years begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (year, month, day) = (u64::from(year), u64::from(month), u64::from(day));
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    // 1970-01-01 counted the same way.
    days - 719_468
}

#[derive(Deserialize)]
struct MooncakeRow {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
}

fn mooncake_row(line: &str) -> Result<Row, String> {
    let row: MooncakeRow = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if !(0.0..1e15).contains(&row.timestamp) {
        return Err(format!("timestamp: {} is not a number of milliseconds", row.timestamp));
    }
    let input_len = tokens("input_length", row.input_length)?;
    let blocks = input_len.div_ceil(BLOCK_TOKENS) as usize;
    if row.hash_ids.len() != blocks {
        return Err(format!(
            "hash_ids: {} blocks, but {input_len} tokens are {blocks} blocks of {BLOCK_TOKENS}",
            row.hash_ids.len()
        ));
    }
    Ok(Row {
        at: crate::arrival::seconds(row.timestamp / 1e3),
        input_len,
        output_len: tokens("output_length", row.output_length)?,
        blocks: row.hash_ids,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stderr)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn shared(name: &str) -> Option<PathBuf> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/traces").join(name);
        if path.is_file() {
            return Some(path);
        }
        eprintln!("skipped: no {}", path.display());
        None
    }

    const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

    #[test]
    fn azure() {
        let text = format!(
            "{AZURE}2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,0\n\n2024-02-29 00:00:00+00:00,1,2\n"
        );
        let (_dir, path) = file("t.csv", &text);
        let rows = read(&path, 10).unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0], Row { at: Duration::ZERO, input_len: 374, output_len: 44, blocks: vec![] });
        assert_eq!(rows[1].at, Duration::from_nanos(4_314_579_000));
        assert_eq!(rows[1].output_len, 1);
        assert_eq!(read(&path, 1).unwrap().len(), 1);
    }

    #[test]
    fn dates() {
        for (text, seconds) in [
            ("1970-01-01 00:00:00", 0),
            ("2000-03-01 00:00:00", 951_868_800),
            ("2023-11-16 18:15:46", 1_700_158_546),
            ("2024-02-29T23:59:59Z", 1_709_251_199),
        ] {
            assert_eq!(timestamp(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["", "2023-11-16", "2023-13-01 00:00:00", "2023-01-01 24:00:00", "2023-01-01 00:00:00.x", "1-1 0"]
        {
            assert_eq!(timestamp(text), None, "{text}");
        }
    }

    #[test]
    fn mooncake() {
        let text = concat!(
            r#"{"timestamp": 3000, "input_length": 513, "output_length": 7, "hash_ids": [0, 9]}"#,
            "\n",
            r#"{"timestamp": 1500, "input_length": 512, "output_length": 5, "hash_ids": [0]}"#,
            "\n"
        );
        let (_dir, path) = file("t.jsonl", text);
        let rows = read(&path, 10).unwrap();
        assert_eq!(rows[0], Row { at: Duration::ZERO, input_len: 512, output_len: 5, blocks: vec![0] });
        assert_eq!(
            rows[1],
            Row { at: Duration::from_millis(1500), input_len: 513, output_len: 7, blocks: vec![0, 9] }
        );
    }

    #[test]
    fn bad_files_name_line_and_field() {
        let row = |timestamp: &str, input: &str, hashes: &str| {
            format!(
                "{{\"timestamp\":{timestamp},\"input_length\":{input},\"output_length\":1,\"hash_ids\":{hashes}}}"
            )
        };
        for (name, text, words) in [
            ("t.csv", "a,b,c\n".to_owned(), "line 1: expected the header"),
            ("t.csv", format!("{AZURE}x,1,1\n"), "line 2: TIMESTAMP"),
            ("t.csv", format!("{AZURE}2023-11-16 18:15:46,-1,1\n"), "line 2: ContextTokens"),
            ("t.csv", format!("{AZURE}2023-11-16 18:15:46,1\n"), "expected 3 fields"),
            ("t.csv", format!("{AZURE}2023-11-16 18:15:46,1,99999999999\n"), "GeneratedTokens"),
            ("t.csv", format!("{AZURE}2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45,1,1\n"), "before"),
            ("t.csv", AZURE.to_owned(), "holds no request"),
            ("t.jsonl", "{".to_owned(), "line 1: EOF"),
            ("t.jsonl", row("-1", "1", "[1]"), "timestamp"),
            ("t.jsonl", row("0", "1024", "[1]"), "hash_ids: 1 blocks"),
            ("t.txt", String::new(), "--dataset-path"),
        ] {
            let (_dir, path) = file(name, &text);
            let error = read(&path, 10).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(name), "{text}: {error}");
        }
        assert!(matches!(read(Path::new("/nowhere/t.csv"), 1), Err(BenchError::Io { .. })));
    }

    #[test]
    fn whole_azure_trace() {
        let Some(path) = shared("AzureLLMInferenceTrace_conv.csv") else { return };
        let rows = read(&path, usize::MAX).unwrap();
        assert_eq!(rows.len(), 19_366);
        let mean = |value: fn(&Row) -> u32| {
            rows.iter().map(|row| f64::from(value(row))).sum::<f64>() / rows.len() as f64
        };
        assert!((mean(|row| row.input_len) - 1155.0).abs() < 1.0);
        assert!((mean(|row| row.output_len) - 211.0).abs() < 1.0);
        assert!(rows.windows(2).all(|pair| pair[0].at <= pair[1].at));
    }

    #[test]
    fn whole_mooncake_trace() {
        let Some(path) = shared("conversation_trace.jsonl") else { return };
        let rows = read(&path, usize::MAX).unwrap();
        assert_eq!(rows.len(), 12_031);
        // About 40 % of the blocks repeat: that is what the trace is for.
        let mut seen = std::collections::HashSet::new();
        let total: usize = rows.iter().map(|row| row.blocks.len()).sum();
        let repeated = rows.iter().flat_map(|row| &row.blocks).filter(|&&hash| !seen.insert(hash)).count();
        let share = repeated as f64 / total as f64;
        assert!((0.3..0.5).contains(&share), "{share}");
    }
}
