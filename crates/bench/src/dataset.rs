//! Turns options into the list of requests to send: lengths, seeds and, for a trace, times. Owns sampling of
//! lengths and clipping; prompts themselves are built late, by [`crate::prompt`], because a trace of long
//! prompts does not fit in memory.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Deserialize;

use crate::trace::{self, BLOCK_TOKENS};
use crate::{BenchError, BenchOptions, Dataset};

/// Most prompts that are read from a file.
const MAX_TEXTS: usize = 1_000_000;

/// What a prompt is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// The shared prefix, then `len` random tokens.
    Random { len: u32, seed: u64 },
    /// `len` tokens of the blocks whose hashes are `blocks` of [`Workload::hashes`].
    Blocks { len: u32, blocks: Range<usize> },
    /// An entry of [`Workload::texts`].
    Text(usize),
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) input: Input,
    /// Tokens to generate.
    pub(crate) output_len: u32,
    /// When the trace sends it, at the trace's own speed.
    pub(crate) at: Option<Duration>,
}

/// All requests of a run.
#[derive(Debug, Default)]
pub(crate) struct Workload {
    pub(crate) specs: Vec<Spec>,
    pub(crate) hashes: Vec<u64>,
    pub(crate) texts: Vec<String>,
    pub(crate) clipped_inputs: usize,
    pub(crate) clipped_outputs: usize,
}

impl Workload {
    /// The measured requests.
    pub(crate) fn build(options: &BenchOptions) -> Result<Self, BenchError> {
        match (options.dataset, &options.dataset_path) {
            (Dataset::Trace, Some(path)) => Self::from_trace(options, path),
            (Dataset::Prompts, Some(path)) => Self::from_prompts(options, path),
            _ => Ok(Self { specs: random_specs(options, options.num_prompts, 1), ..Self::default() }),
        }
    }

    /// The warm-up's requests: random ones of the same size, so that they put none of the measured prompts
    /// into the server's prefix cache.
    pub(crate) fn warmup(options: &BenchOptions) -> Self {
        Self { specs: random_specs(options, options.warmup, 2), ..Self::default() }
    }

    fn from_trace(options: &BenchOptions, path: &Path) -> Result<Self, BenchError> {
        let mut workload = Self::default();
        for row in trace::read(path, options.num_prompts)? {
            let input_len = row.input_len.min(options.max_input_len.unwrap_or(u32::MAX));
            let output_len = row.output_len.min(options.max_output_len.unwrap_or(u32::MAX));
            workload.clipped_inputs += usize::from(input_len < row.input_len);
            workload.clipped_outputs += usize::from(output_len < row.output_len);
            let input = if row.blocks.is_empty() {
                Input::Random { len: input_len, seed: prompt_seed(options, 1, workload.specs.len()) }
            } else {
                let start = workload.hashes.len();
                // Only the blocks that the clipped prompt still reaches.
                let count = input_len.div_ceil(BLOCK_TOKENS) as usize;
                workload.hashes.extend(row.blocks.iter().take(count));
                Input::Blocks { len: input_len, blocks: start..workload.hashes.len() }
            };
            let at = Some(row.at.div_f64(options.trace_speed));
            workload.specs.push(Spec { input, output_len, at });
        }
        Ok(workload)
    }

    /// Prompts of the file in order, from the start again where there are fewer than requests.
    fn from_prompts(options: &BenchOptions, path: &Path) -> Result<Self, BenchError> {
        #[derive(Deserialize)]
        struct Line {
            prompt: String,
            output_len: Option<u32>,
        }
        let is_json = path.extension().is_some_and(|ext| ext == "jsonl" || ext == "json");
        let lines = trace::read_lines(path, options.num_prompts.min(MAX_TEXTS), |line| {
            if !is_json {
                return Ok(Some(Line { prompt: line.to_owned(), output_len: None }));
            }
            let line: Line = serde_json::from_str(line).map_err(|error| error.to_string())?;
            if line.prompt.is_empty() || line.output_len == Some(0) {
                return Err("prompt and output_len may not be empty or 0".into());
            }
            Ok(Some(line))
        })?;
        if lines.is_empty() {
            let path = path.to_owned();
            return Err(BenchError::BadData { path, line: 1, reason: "holds no prompt".into() });
        }
        let specs = (0..options.num_prompts)
            .map(|i| {
                let text = i % lines.len();
                let output_len = lines[text].output_len.unwrap_or(options.output_len);
                Spec { input: Input::Text(text), output_len, at: None }
            })
            .collect();
        Ok(Self { specs, texts: lines.into_iter().map(|line| line.prompt).collect(), ..Self::default() })
    }
}

fn random_specs(options: &BenchOptions, count: usize, stream: u64) -> Vec<Spec> {
    let mut rng = StdRng::seed_from_u64(mix(options.seed, stream));
    (0..count)
        .map(|i| Spec {
            input: Input::Random {
                len: random_len(
                    &mut rng,
                    options.input_len,
                    options.range_ratio,
                    u32::from(options.prefix_len == 0),
                ),
                seed: prompt_seed(options, stream, i),
            },
            output_len: random_len(&mut rng, options.output_len, options.range_ratio, 1),
            at: None,
        })
        .collect()
}

/// Uniform in `[len (1 - ratio), len (1 + ratio)]`, at least `least`.
fn random_len(rng: &mut StdRng, len: u32, ratio: f64, least: u32) -> u32 {
    let low = (f64::from(len) * (1.0 - ratio)).floor() as u32;
    let high = (f64::from(len) * (1.0 + ratio)).ceil() as u32;
    rng.random_range(low..=high).max(least)
}

fn prompt_seed(options: &BenchOptions, stream: u64, number: usize) -> u64 {
    mix(mix(options.seed, stream), number as u64)
}

/// Mixes two numbers into a seed (the finaliser of SplitMix64).
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_add(b.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::options::tests::parse;

    #[test]
    fn random_lengths_cover_their_range() {
        let options = parse(&[
            "--num-prompts",
            "5000",
            "--input-len",
            "100",
            "--output-len",
            "10",
            "--range-ratio",
            "0.5",
        ]);
        let specs = Workload::build(&options).unwrap().specs;
        let inputs: Vec<u32> = specs
            .iter()
            .map(|spec| match spec.input {
                Input::Random { len, .. } => len,
                _ => 0,
            })
            .collect();
        assert_eq!((inputs.iter().min(), inputs.iter().max()), (Some(&50), Some(&150)));
        let mean = inputs.iter().map(|&len| f64::from(len)).sum::<f64>() / 5000.0;
        // Six standard errors of a uniform distribution on 101 values.
        assert!((mean - 100.0).abs() < 6.0 * 29.2 / 5000_f64.sqrt(), "{mean}");
        assert!(specs.iter().all(|spec| (5..=15).contains(&spec.output_len)));
        assert_eq!(specs, Workload::build(&options).unwrap().specs);
        let other = BenchOptions { seed: 1, ..options };
        assert_ne!(specs, Workload::build(&other).unwrap().specs);
    }

    #[test]
    fn warmup_prompts_are_others() {
        let options = parse(&["--num-prompts", "3", "--warmup", "3"]);
        let (warm, real) = (Workload::warmup(&options).specs, Workload::build(&options).unwrap().specs);
        assert_eq!(warm.len(), 3);
        assert!(warm.iter().all(|spec| !real.contains(spec)));
    }

    #[test]
    fn traces_are_clipped_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.jsonl");
        let rows = [
            r#"{"timestamp":0,"input_length":1500,"output_length":50,"hash_ids":[1,2,3]}"#,
            r#"{"timestamp":4000,"input_length":600,"output_length":5,"hash_ids":[1,4]}"#,
        ];
        std::fs::write(&path, rows.join("\n")).unwrap();
        let options = parse(&[
            "--dataset",
            "trace",
            "--dataset-path",
            path.to_str().unwrap(),
            "--max-input-len",
            "1000",
            "--max-output-len",
            "20",
            "--trace-speed",
            "2",
        ]);
        let workload = Workload::build(&options).unwrap();
        assert_eq!((workload.clipped_inputs, workload.clipped_outputs), (1, 1));
        assert_eq!(workload.hashes, [1, 2, 1, 4]);
        assert_eq!(workload.specs[0].input, Input::Blocks { len: 1000, blocks: 0..2 });
        assert_eq!(workload.specs[1].input, Input::Blocks { len: 600, blocks: 2..4 });
        assert_eq!(workload.specs[0].output_len, 20);
        assert_eq!(workload.specs[1].at, Some(Duration::from_secs(2)));
    }

    #[test]
    fn azure_rows_have_distinct_prompts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.csv");
        let text =
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,9,1\n2023-11-16 18:15:46.0,9,1\n";
        std::fs::write(&path, text).unwrap();
        let options = parse(&["--dataset", "trace", "--dataset-path", path.to_str().unwrap()]);
        let specs = Workload::build(&options).unwrap().specs;
        assert_ne!(specs[0].input, specs[1].input);
    }

    #[test]
    fn prompt_files() {
        let dir = tempfile::tempdir().unwrap();
        let build = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let args =
                ["--dataset", "prompts", "--dataset-path", path.to_str().unwrap(), "--num-prompts", "3"];
            Workload::build(&parse(&args))
        };
        let plain = build("p.txt", "one\n\ntwo\n").unwrap();
        assert_eq!(plain.texts, ["one", "two"]);
        assert_eq!(plain.specs[2].input, Input::Text(0));
        assert_eq!(plain.specs[0].output_len, 128);
        let json = build("p.jsonl", "{\"prompt\":\"a\\nb\",\"output_len\":7}\n").unwrap();
        assert_eq!((json.texts[0].as_str(), json.specs[0].output_len), ("a\nb", 7));
        assert!(build("e.txt", "\n").unwrap_err().to_string().contains("no prompt"));
        assert!(build("e.jsonl", "{\"prompt\":\"\"}").unwrap_err().to_string().contains("line 1"));
        assert!(build("f.jsonl", "x").unwrap_err().to_string().contains("line 1"));
    }
}
