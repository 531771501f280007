//! The options of a benchmark: one plain struct, which the command line flattens. Owns their meaning and
//! their checks.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};

use crate::BenchError;

/// Most requests of one run: their samples are held in memory.
const MAX_PROMPTS: usize = 10_000_000;
/// Longest prompt or answer in tokens that a random dataset may ask for.
const MAX_LEN: u32 = 4_000_000;

/// Which API is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`; prompts are text, their length is what the server counts.
    Chat,
    /// `POST /v1/completions`; random and trace prompts are token ids of exactly the length asked for.
    Completions,
}

/// Where the requests come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dataset {
    /// Random prompts of the lengths given.
    Random,
    /// Replay of a recorded trace (Azure CSV or Mooncake JSONL), at its own pace unless a rate is given.
    Trace,
    /// Prompts from a file: JSONL with `prompt` (and `output_len`), or plain text, one prompt a line.
    Prompts,
}

impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Trace => "trace",
            Self::Prompts => "prompts",
        })
    }
}

/// A latency metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Metric {
    /// Time to first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// Gap between chunks.
    Itl,
    /// Whole request.
    E2el,
}

impl Metric {
    /// The name in keys of the JSON report.
    pub fn key(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    /// The heading in the table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ttft => "Time to first token",
            Self::Tpot => "Time per output token (excl. first)",
            Self::Itl => "Inter-token latency",
            Self::E2el => "End-to-end latency",
        }
    }
}

/// Requests per second, or `inf` for all at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RequestRate {
    /// As fast as `--concurrency` allows.
    Infinite,
    /// Mean rate of the arrival process, in requests per second.
    PerSecond(f64),
}

impl FromStr for RequestRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.eq_ignore_ascii_case("inf") {
            return Ok(Self::Infinite);
        }
        match text.parse::<f64>() {
            Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Self::PerSecond(rate)),
            _ => Err(format!("{text:?} is neither `inf` nor a positive number of requests per second")),
        }
    }
}

/// One service level objective: a request is good if the metric is at most the limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slo {
    /// `ttft`, `tpot` or `e2el`.
    pub metric: Metric,
    /// Limit in milliseconds.
    pub limit_ms: f64,
}

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, limit) =
            text.split_once(':').ok_or("expected METRIC:MILLISECONDS, for example ttft:500")?;
        let metric = match name {
            "ttft" => Metric::Ttft,
            "tpot" => Metric::Tpot,
            "e2el" => Metric::E2el,
            other => return Err(format!("unknown metric {other:?}: ttft, tpot or e2el")),
        };
        match limit.parse::<f64>() {
            Ok(limit_ms) if limit_ms.is_finite() && limit_ms > 0.0 => Ok(Self { metric, limit_ms }),
            _ => Err(format!("{limit:?} is not a positive number of milliseconds")),
        }
    }
}

/// Range of token ids for random prompts, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenIdRange {
    /// Smallest id.
    pub low: u32,
    /// Largest id.
    pub high: u32,
}

impl FromStr for TokenIdRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ends = text.split_once(':').and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
        match ends {
            Some((low, high)) if low < high => Ok(Self { low, high }),
            _ => Err(format!("{text:?} is not LOW:HIGH with LOW < HIGH")),
        }
    }
}

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Options of one benchmark.
#[derive(Debug, Clone, Args)]
pub struct BenchOptions {
    /// Base URL of the server, with or without /v1
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// API to measure
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    pub endpoint: Endpoint,
    /// Model name (default: the first that /v1/models lists)
    #[arg(long)]
    pub model: Option<String>,
    /// API key (also OPENAI_API_KEY)
    #[arg(long, env = "MIRAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<Secret>,
    /// Certificate authorities for https, PEM (default: SSL_CERT_FILE, then the system's bundle)
    #[arg(long, value_name = "FILE")]
    pub ca_bundle: Option<PathBuf>,
    /// Where the requests come from
    #[arg(long, value_enum, default_value_t = Dataset::Random)]
    pub dataset: Dataset,
    /// File of the trace or of the prompts
    #[arg(long, value_name = "FILE")]
    pub dataset_path: Option<PathBuf>,
    /// random: tokens of the prompt after the shared prefix (chat: words)
    #[arg(long, default_value_t = 512)]
    pub input_len: u32,
    /// random, prompts: tokens to generate
    #[arg(long, default_value_t = 128)]
    pub output_len: u32,
    /// random: lengths are uniform in [len * (1 - R), len * (1 + R)], 0 <= R < 1
    #[arg(long, default_value_t = 0.0)]
    pub range_ratio: f64,
    /// random: tokens that all prompts share at their start
    #[arg(long, default_value_t = 0)]
    pub prefix_len: u32,
    /// trace: longest prompt in tokens; longer ones are clipped and counted
    #[arg(long)]
    pub max_input_len: Option<u32>,
    /// trace: longest answer in tokens; longer ones are clipped and counted
    #[arg(long)]
    pub max_output_len: Option<u32>,
    /// Token ids of random prompts (default: learnt from /tokenize)
    #[arg(long, value_name = "LOW:HIGH")]
    pub token_ids: Option<TokenIdRange>,
    /// Number of requests
    #[arg(long, default_value_t = 100)]
    pub num_prompts: usize,
    /// Most requests in flight; with no request rate this is a closed loop
    #[arg(long)]
    pub concurrency: Option<usize>,
    /// Requests per second, open loop, or inf (default: inf; trace: the trace's own times)
    #[arg(long)]
    pub request_rate: Option<RequestRate>,
    /// Shape of the gamma distribution between arrivals: 1 is Poisson, less is burstier
    #[arg(long, default_value_t = 1.0)]
    pub burstiness: f64,
    /// trace: play this many times faster than recorded
    #[arg(long, default_value_t = 1.0)]
    pub trace_speed: f64,
    /// Seed of prompts and arrivals
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Requests sent first and not counted
    #[arg(long, default_value_t = 0)]
    pub warmup: usize,
    /// Longest duration of a request, in seconds
    #[arg(long, default_value_t = 600.0)]
    pub timeout: f64,
    /// Generate to the full length (default: on for random and trace)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub ignore_eos: Option<bool>,
    /// Sampling temperature
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Objectives, METRIC:MILLISECONDS: requests that meet them all are the goodput
    #[arg(long, num_args = 1.., value_name = "METRIC:MS")]
    pub goodput: Vec<Slo>,
    /// Metrics to report
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ttft,tpot,itl,e2el")]
    pub percentile_metrics: Vec<Metric>,
    /// Percentiles to report
    #[arg(long, value_delimiter = ',', default_value = "50,90,95,99")]
    pub percentiles: Vec<f64>,
    /// Write the report to a file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Add every request's lengths, times and errors to the file
    #[arg(long)]
    pub save_detailed: bool,
}

impl BenchOptions {
    /// Whether answers are generated to their full length.
    pub fn effective_ignore_eos(&self) -> bool {
        self.ignore_eos.unwrap_or(self.dataset != Dataset::Prompts)
    }

    /// The key to send, from the option or the environment; an empty one counts as none.
    pub(crate) fn effective_api_key(&self) -> Option<String> {
        let given = self.api_key.as_ref().map(|secret| secret.0.clone());
        given.or_else(|| std::env::var("OPENAI_API_KEY").ok()).filter(|key| !key.is_empty())
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`BenchError::BadOption`] naming the flag.
    pub fn validate(&self) -> Result<(), BenchError> {
        let check = |ok: bool, flag: &'static str, reason: &str| {
            if ok { Ok(()) } else { Err(BenchError::BadOption { flag, reason: reason.to_owned() }) }
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        check(self.num_prompts > 0, "num-prompts", "must be at least 1")?;
        check(self.num_prompts <= MAX_PROMPTS, "num-prompts", "must be at most 10000000")?;
        check(self.warmup <= self.num_prompts.max(10_000), "warmup", "is larger than the measurement")?;
        check(self.concurrency != Some(0), "concurrency", "must be at least 1")?;
        check(self.input_len > 0 || self.prefix_len > 0, "input-len", "must be at least 1")?;
        check(self.input_len <= MAX_LEN, "input-len", "must be at most 4000000")?;
        check(self.prefix_len <= MAX_LEN, "prefix-len", "must be at most 4000000")?;
        check((1..=MAX_LEN).contains(&self.output_len), "output-len", "must be from 1 to 4000000")?;
        check((0.0..1.0).contains(&self.range_ratio), "range-ratio", "must be at least 0 and below 1")?;
        check(self.max_input_len != Some(0), "max-input-len", "must be at least 1")?;
        check(self.max_output_len != Some(0), "max-output-len", "must be at least 1")?;
        check(positive(self.burstiness), "burstiness", "must be positive")?;
        check(positive(self.trace_speed), "trace-speed", "must be positive")?;
        check(positive(self.timeout) && self.timeout <= 1e6, "timeout", "must be from 0 to 1000000 seconds")?;
        let temperature = self.temperature.is_finite() && self.temperature >= 0.0;
        check(temperature, "temperature", "must be at least 0")?;
        check(!self.percentile_metrics.is_empty(), "percentile-metrics", "names no metric")?;
        let percent = |p: &f64| (0.0..=100.0).contains(p);
        check(self.percentiles.iter().all(percent), "percentiles", "must be from 0 to 100")?;
        let needs_file = self.dataset != Dataset::Random;
        check(!needs_file || self.dataset_path.is_some(), "dataset-path", "is needed for this dataset")?;
        check(needs_file || self.dataset_path.is_none(), "dataset-path", "means nothing for --dataset random")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: BenchOptions,
    }

    pub(crate) fn parse(args: &[&str]) -> BenchOptions {
        Cli::try_parse_from(std::iter::once("bench").chain(args.iter().copied())).unwrap().options
    }

    fn refused(args: &[&str]) -> String {
        match Cli::try_parse_from(std::iter::once("bench").chain(args.iter().copied())) {
            Err(error) => error.to_string(),
            Ok(cli) => cli.options.validate().unwrap_err().to_string(),
        }
    }

    #[test]
    fn defaults_are_valid() {
        let options = parse(&[]);
        options.validate().unwrap();
        assert!(options.effective_ignore_eos());
        assert_eq!(options.percentiles, [50.0, 90.0, 95.0, 99.0]);
        assert_eq!(options.percentile_metrics, [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el]);
        assert!(options.request_rate.is_none() && options.goodput.is_empty());
    }

    #[test]
    fn everything_parses() {
        let options = parse(&[
            "--url",
            "http://h:1/v1",
            "--endpoint",
            "chat",
            "--api-key",
            "sk-1",
            "--dataset",
            "prompts",
            "--dataset-path",
            "x",
            "--request-rate",
            "2.5",
            "--goodput",
            "ttft:500",
            "tpot:50",
            "e2el:9000",
            "--percentiles",
            "50,99.9",
            "--percentile-metrics",
            "ttft,e2el",
            "--token-ids",
            "3:250",
            "--ignore-eos",
            "--concurrency",
            "4",
        ]);
        options.validate().unwrap();
        assert_eq!(options.request_rate, Some(RequestRate::PerSecond(2.5)));
        assert_eq!(options.goodput[1], Slo { metric: Metric::Tpot, limit_ms: 50.0 });
        assert_eq!(options.token_ids, Some(TokenIdRange { low: 3, high: 250 }));
        assert!(options.effective_ignore_eos());
        assert_eq!(options.effective_api_key().as_deref(), Some("sk-1"));
        assert!(!format!("{options:?}").contains("sk-1"));
        assert_eq!(parse(&["--request-rate", "inf"]).request_rate, Some(RequestRate::Infinite));
        assert!(!parse(&["--ignore-eos", "false"]).effective_ignore_eos());
        let prompts = parse(&["--dataset", "prompts", "--dataset-path", "x"]);
        assert!(!prompts.effective_ignore_eos());
    }

    #[test]
    fn refusals_name_the_flag() {
        for (args, words) in [
            (&["--num-prompts", "0"][..], "--num-prompts: must be at least 1"),
            (&["--num-prompts", "99999999"], "--num-prompts"),
            (&["--concurrency", "0"], "--concurrency"),
            (&["--input-len", "0"], "--input-len"),
            (&["--output-len", "0"], "--output-len"),
            (&["--range-ratio", "1"], "--range-ratio"),
            (&["--range-ratio", "NaN"], "--range-ratio"),
            (&["--burstiness", "0"], "--burstiness"),
            (&["--trace-speed", "inf"], "--trace-speed"),
            (&["--timeout", "0"], "--timeout"),
            (&["--temperature", "NaN"], "--temperature"),
            (&["--percentiles", "101"], "--percentiles"),
            (&["--dataset", "trace"], "--dataset-path"),
            (&["--dataset-path", "x"], "--dataset-path"),
            (&["--warmup", "99999"], "--warmup"),
            (&["--max-input-len", "0"], "--max-input-len"),
            (&["--request-rate", "0"], "positive number of requests"),
            (&["--request-rate", "x"], "positive number of requests"),
            (&["--goodput", "ttft"], "expected METRIC"),
            (&["--goodput", "itl:5"], "unknown metric"),
            (&["--goodput", "ttft:-1"], "positive number of milliseconds"),
            (&["--token-ids", "9:3"], "LOW:HIGH"),
            (&["--token-ids", "x"], "LOW:HIGH"),
        ] {
            let error = refused(args);
            assert!(error.contains(words), "{args:?}: {error}");
        }
    }

    #[test]
    fn names() {
        let keys: Vec<_> = parse(&[]).percentile_metrics.iter().map(|metric| metric.key()).collect();
        assert_eq!(keys, ["ttft", "tpot", "itl", "e2el"]);
        let names = [Dataset::Random, Dataset::Trace, Dataset::Prompts].map(|dataset| dataset.to_string());
        assert_eq!(names, ["random", "trace", "prompts"]);
    }
}
