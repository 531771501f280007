//! `docs/models.md`: which architecture uses what, from the golden cases that prove it.
//!
//! `MIRAI_BLESS=1` writes the file; otherwise the test fails where the file is not what the cases say.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use mirai_model::arch::{REGISTRY, spec_from_config};
use mirai_model::inspect::{FEATURES, features};
use mirai_model::spec::{Head, PoolOutput};

/// What the golden cases of one architecture show.
#[derive(Default)]
struct Row {
    cases: usize,
    tasks: BTreeSet<&'static str>,
    features: BTreeSet<&'static str>,
    bidirectional: bool,
}

fn rows() -> BTreeMap<&'static str, Row> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut rows: BTreeMap<&'static str, Row> = REGISTRY.iter().map(|a| (a.name, Row::default())).collect();
    for entry in std::fs::read_dir(golden).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(text) = std::fs::read_to_string(folder.join("config.json")) else { continue };
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let spec = spec_from_config("config.json", json.as_object().unwrap()).unwrap();
        let expected: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let row = rows.get_mut(spec.architecture).unwrap();
        row.cases += 1;
        row.features.extend(features(&spec, None));
        row.bidirectional |= spec.is_bidirectional();
        row.tasks.insert(match (&spec.head, expected["task"].as_str()) {
            (_, Some("embed")) => "embed",
            (_, Some(task)) if task.starts_with("rerank") => "score",
            (Head::Logits { .. }, _) => "generate",
            (Head::Pool(pool), _) if pool.output == PoolOutput::Embedding => "embed",
            (Head::Pool(_), _) => "score",
        });
    }
    rows
}

fn page(rows: &BTreeMap<&'static str, Row>) -> String {
    let mut out = String::from(
        "# Models\n\nWritten by `MIRAI_BLESS=1 cargo test --workspace --test table` from the golden cases \
         (`crates/model/tests/golden`), each of which\nholds its architecture to HF transformers: whole and in chunks \
         of 1, 7 and 16 tokens, beside other sequences, after a hit\nof the prefix cache at every block boundary, and \
         after a preemption. Encoders see a prompt only as a whole.\n\n",
    );
    out.push_str("| architecture | cases | tasks | prompts | uses |\n|---|---|---|---|---|\n");
    for (name, row) in rows {
        let tasks: Vec<&str> = row.tasks.iter().copied().collect();
        let used: Vec<&str> = FEATURES.into_iter().filter(|f| row.features.contains(f)).collect();
        let prompts = if row.bidirectional { "whole" } else { "in chunks, cached" };
        writeln!(
            out,
            "| `{name}` | {} | {} | {prompts} | {} |",
            row.cases,
            tasks.join(", "),
            used.join(", ")
        )
        .unwrap();
    }
    out.push_str(
        "\nCausal models are embedders where sentence-transformers' files lie beside them, and rerankers by the logits \
         of two tokens.\nOf models for several modalities the text part is run.\n\n## Weights\n\n\
         | form | stored as | proved by |\n|---|---|---|\n\
         | plain | f32, f16, bf16 | goldens |\n\
         | GGUF (Llama, Mistral, Qwen2, Qwen3) | f32, f16, bf16, q4_0 to q8_0, q2_k to q6_k | goldens, files of `../shared/data` |\n\
         | fp8 | e4m3, a scale for a tensor, row or block; `fp8` and `compressed-tensors` | plain twins |\n\
         | mxfp4 | e2m1, a power of two for 32 numbers; experts of gpt-oss | plain twins |\n\
         | packed int4 | `compressed-tensors`' `pack-quantized` | plain twins |\n\
         | GPTQ | 4 bits, with and without order of activation | plain twins |\n\
         | AWQ | 4 bits | plain twins |\n\n\
         The CPU widens forms with scales at load. A plain twin is the same model with the numbers that the quantized \
         ones stand for\n(`crates/model/tests/quant.rs`): the largest relative difference is below 1e-5.\n",
    );
    out
}

#[test]
fn the_page_says_what_the_cases_show() {
    let rows = rows();
    let lacking: Vec<_> = rows.iter().filter(|(_, row)| row.cases == 0).map(|(name, _)| name).collect();
    assert!(lacking.is_empty(), "no golden case proves {lacking:?}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/models.md");
    let page = page(&rows);
    if std::env::var_os("MIRAI_BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == page, "docs/models.md is out of date: run with MIRAI_BLESS=1");
}
