//! The GPU suite's program on the emulated driver, at tiny sizes: its rows are complete, and its judgement holds.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../examples/gpu_suite/suite/mod.rs"]
mod suite;
mod support;

use serde_json::{Value, json};
use suite::{Options, run};
use support::on_emulated_driver;

const MEMORY: (&str, &str) = ("MIRAI_EMU_MEMORY", "268435456");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tests/golden");

fn rows(arguments: &str) -> Vec<Value> {
    let options = Options::parse(arguments.split_whitespace().map(str::to_owned)).unwrap();
    let mut rows = Vec::new();
    run(&options, &mut |row| rows.push(row)).unwrap();
    rows
}

fn of<'a>(rows: &'a [Value], kind: &str) -> Vec<&'a Value> {
    rows.iter().filter(|row| row["row"] == kind).collect()
}

#[test]
fn steps_are_held_to_their_floors() {
    on_emulated_driver("steps_are_held_to_their_floors", &[MEMORY], || {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ceilings.json");
        std::fs::write(&file, r#"{"ceilings": {"bytes": 1e12, "bf16": 1e14, "e4m3": 2e14}}"#).unwrap();
        for shape in ["llama-3.1-8b-bf16", "llama-3.1-8b-fp8", "qwen3-30b-a3b-bf16"] {
            let rows = rows(&format!("steps --tiny --shape {shape} --ceilings {}", file.display()));
            assert_eq!(of(&rows, "facts")[0]["multiprocessors"], 132);
            assert_eq!(of(&rows, "rates")[0]["measured"], true);
            let loaded = of(&rows, "loaded")[0];
            assert!(loaded["weight_bytes"].as_u64().unwrap() > 0 && loaded["graphs"].as_u64().unwrap() >= 2);
            let steps = of(&rows, "step");
            let cases: Vec<_> = steps.iter().map(|row| row["case"].as_str().unwrap()).collect();
            assert_eq!(cases, ["decode 1", "decode 2", "decode 3", "mixed 2 + 9", "prefill 40"]);
            for row in steps {
                let number = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
                assert!(number("floor_ms") > 0.0 && number("median_ms") > number("floor_ms"), "{row}");
                let product = number("fraction") * number("times_floor");
                assert!((product - 1.0).abs() < 1e-6 && number("fraction") < 1.0, "{row}");
                assert!(number("p10_ms") <= number("median_ms") && number("median_ms") <= number("p90_ms"));
                assert!(number("joules_per_token") >= 0.0 && number("sm_mhz") > 0.0, "{row}");
                assert_eq!((&row["impossible"], &row["pass"]), (&json!(false), &json!(false)), "{row}");
            }
        }
    });
}

#[test]
fn rates_that_cannot_be_are_faults_of_the_measurement() {
    on_emulated_driver("rates_that_cannot_be_are_faults_of_the_measurement", &[MEMORY], || {
        // With rates so low, an emulated device is faster than possible.
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ceilings.json");
        std::fs::write(&file, r#"{"ceilings": {"bytes": 1.0, "bf16": 1.0, "e4m3": 1.0}}"#).unwrap();
        let rows = rows(&format!("steps --tiny --shape llama-3.1-8b-bf16 --ceilings {}", file.display()));
        assert!(of(&rows, "step").iter().all(|row| row["impossible"] == true));
    });
}

#[test]
fn golden_cases_pass_and_give_the_same_bits_again() {
    on_emulated_driver("golden_cases_pass_and_give_the_same_bits_again", &[MEMORY], || {
        let found = rows(&format!("goldens --golden {GOLDEN} --case llama-linear --case xlmr-embed"));
        let goldens = of(&found, "golden");
        assert_eq!(goldens.len(), 2);
        for row in goldens {
            assert_eq!((&row["pass"], &row["rerun_same_bits"]), (&json!(true), &json!(true)), "{row}");
            assert!(row["mixed"]["mean"].as_f64().unwrap() > 0.0, "{row}");
        }
        let listed = rows(&format!("goldens --list --golden {GOLDEN}"));
        assert!(listed.len() >= 50 && listed.iter().all(|row| row["row"] == "case"));
    });
}

/// Numbers of another model in the file: a gate that passes them is none.
#[test]
fn a_golden_case_with_other_numbers_fails() {
    on_emulated_driver("a_golden_case_with_other_numbers_fails", &[MEMORY], || {
        let folder = tempfile::tempdir().unwrap();
        for name in ["right", "rough", "wrong", "broken"] {
            let to = folder.path().join(name);
            std::fs::create_dir(&to).unwrap();
            for file in std::fs::read_dir(format!("{GOLDEN}/llama-linear")).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
            }
        }
        for name in ["rough", "wrong"] {
            let file = folder.path().join(name).join("golden.json");
            let mut json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            for logprob in json["prompts"][1]["logprobs"].as_array_mut().unwrap() {
                *logprob = json!(logprob.as_f64().unwrap() - 1.0);
            }
            if name == "rough" {
                // Where bf16 itself is as far off, nothing more can be asked for.
                json["bf16"] = json!({"mean": 0.8, "p99": 1.0});
            }
            std::fs::write(&file, json.to_string()).unwrap();
        }
        std::fs::remove_file(folder.path().join("broken/model.safetensors")).unwrap();
        let rows = rows(&format!("goldens --expect file --golden {}", folder.path().display()));
        let passed: Vec<_> = of(&rows, "golden").iter().map(|row| (&row["case"], &row["pass"])).collect();
        let expected = [("broken", false), ("right", true), ("rough", true), ("wrong", false)]
            .map(|(n, p)| (json!(n), json!(p)));
        assert_eq!(passed, expected.iter().map(|(n, p)| (n, p)).collect::<Vec<_>>(), "{rows:?}");
    });
}

#[test]
fn products_are_timed() {
    on_emulated_driver("products_are_timed", &[MEMORY], || {
        let rows = rows("matmuls --tiny");
        let products = of(&rows, "matmul");
        assert_eq!(products.len(), 4);
        for row in products {
            assert!(row["us"].as_f64().unwrap() > 0.0 && row["flops"].as_f64().unwrap() > 0.0, "{row}");
        }
        let rates = of(&rows, "matmul rates")[0];
        assert!(rates["bf16"].as_f64().unwrap() > 0.0 && rates["e4m3"].as_f64().unwrap() > 0.0, "{rates}");
    });
}

/// The published serial bound of this load at these rates is 29,872 tokens/s.
#[test]
fn a_server_s_bound_is_computed_without_a_device() {
    let load = "--shape llama-3.1-8b-fp8 --batch 1024 --prompt 1000 --answer 1000";
    let rows = rows(&format!("bound {load}"));
    let bound = rows[0]["tokens_per_s"].as_f64().unwrap();
    assert_eq!((rows.len(), &rows[0]["measured"]), (1, &json!(false)));
    assert!((28_000.0..33_000.0).contains(&bound), "{bound}");
}

#[test]
fn a_wrong_command_line_is_refused() {
    for (arguments, words) in [
        ("", "no part"),
        ("dance", "no part `dance`"),
        ("steps --shape", "--shape needs a value"),
        ("steps --what", "no option `--what`"),
        ("bound --batch 0", "0: expected 1"),
        ("goldens --expect miracles", "--expect miracles"),
    ] {
        let error = Options::parse(arguments.split_whitespace().map(str::to_owned)).unwrap_err();
        assert!(error.contains(words) && !suite::USAGE.is_empty(), "{error}");
    }
}
