//! The report of a run: metrics from samples, as a table and as JSON with the key names of
//! `vllm bench serve`. Owns the metrics' definitions (see the crate's documentation).

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::request::Sample;
use crate::stats::{Summary, peak_overlap};
use crate::{BenchOptions, Endpoint, FailureKind, Metric, RequestRate, Slo};

/// Most seconds of a run for which throughput is tracked second by second.
const MAX_SECONDS: usize = 1_000_000;

/// Where the token ids of random prompts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenIdSource {
    /// The dataset has texts, or the endpoint takes words.
    Text,
    /// `--token-ids`.
    Given,
    /// The server's `/tokenize`.
    Tokenize,
    /// A range that byte-level and byte-fallback vocabularies have: the server has no `/tokenize`.
    SafeRange,
}

impl TokenIdSource {
    fn key(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Given => "given",
            Self::Tokenize => "tokenize",
            Self::SafeRange => "safe_range",
        }
    }
}

/// Facts about a run that its samples do not hold.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) model: String,
    pub(crate) is_open_loop: bool,
    pub(crate) clipped_inputs: usize,
    pub(crate) clipped_outputs: usize,
    pub(crate) token_ids: TokenIdSource,
    pub(crate) connections: u64,
    pub(crate) started: SystemTime,
}

/// Failures of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failures {
    /// How many requests.
    pub count: usize,
    /// Message of the first.
    pub example: String,
}

/// Result of a run.
#[derive(Debug, Clone)]
pub struct Report {
    options: BenchOptions,
    facts: Facts,
    /// Requests sent.
    pub num_prompts: usize,
    /// Requests that succeeded.
    pub completed: usize,
    /// From the first send to the end of the last request, in seconds.
    pub duration_s: f64,
    /// Prompt tokens of successful requests, as the server counts them.
    pub total_input_tokens: u64,
    /// Those of them that came from the server's prefix cache.
    pub cached_input_tokens: u64,
    /// Generated tokens of successful requests, as the server counts them.
    pub total_output_tokens: u64,
    /// Output tokens of the busiest second.
    pub max_output_tokens_per_s: f64,
    /// Most requests in flight at one moment.
    pub max_concurrent_requests: usize,
    /// Successful requests whose number of generated tokens is not what was asked for, although the end of
    /// the text was to be ignored.
    pub output_len_mismatches: usize,
    /// Requests that met every objective; `None` without objectives.
    pub good: Option<usize>,
    /// Milliseconds, of successful requests.
    pub metrics: BTreeMap<Metric, Summary>,
    /// How much later than scheduled requests were sent, in milliseconds; all requests of an open loop.
    pub lag: Option<Summary>,
    /// TTFT and E2EL from the scheduled time (free of coordinated omission), in milliseconds; open loop.
    pub from_intended: BTreeMap<Metric, Summary>,
    /// Failed requests by kind; never left out.
    pub failures: BTreeMap<FailureKind, Failures>,
    details: Option<Value>,
}

/// Per-request latencies in milliseconds.
struct Latencies {
    ttft: f64,
    /// 0 where there is no second token, as in vLLM.
    tpot: f64,
    e2el: f64,
}

fn latencies(sample: &Sample, completion_tokens: u64) -> Latencies {
    let ttft = sample.timeline.ttft.unwrap_or_default().as_secs_f64() * 1e3;
    let e2el = sample.timeline.last.as_secs_f64() * 1e3;
    let tpot = if completion_tokens > 1 { (e2el - ttft) / (completion_tokens - 1) as f64 } else { 0.0 };
    Latencies { ttft, tpot, e2el }
}

impl Report {
    pub(crate) fn new(options: &BenchOptions, facts: Facts, samples: &mut [Sample]) -> Self {
        samples.sort_by_key(|sample| sample.start);
        let mut tally = Tally::default();
        for sample in samples.iter() {
            tally.add(options, sample);
        }
        let percentiles = &options.percentiles;
        let summary = |values: &mut Vec<f64>| Summary::of(values, percentiles);
        let first = samples.iter().map(|sample| sample.start).min().unwrap_or_default();
        let last = samples.iter().map(|sample| sample.end).max().unwrap_or_default();
        let spans = samples.iter().map(|sample| (sample.start.as_secs_f64(), sample.end.as_secs_f64()));
        let mut metrics = BTreeMap::new();
        for &metric in &options.percentile_metrics {
            metrics.insert(metric, summary(tally.values.entry(metric).or_default()));
        }
        let is_open = facts.is_open_loop;
        let intended = |metric, values: &mut Vec<f64>| (metric, Summary::of(values, percentiles));
        Self {
            num_prompts: samples.len(),
            completed: tally.completed,
            duration_s: last.saturating_sub(first).as_secs_f64(),
            total_input_tokens: tally.input_tokens,
            cached_input_tokens: tally.cached_tokens,
            total_output_tokens: tally.output_tokens,
            max_output_tokens_per_s: tally.per_second.iter().copied().fold(0.0, f64::max),
            max_concurrent_requests: peak_overlap(spans),
            output_len_mismatches: tally.mismatches,
            good: (!options.goodput.is_empty()).then_some(tally.good),
            metrics,
            lag: is_open.then(|| summary(&mut tally.lag)),
            from_intended: if is_open {
                [
                    intended(Metric::Ttft, &mut tally.intended_ttft),
                    intended(Metric::E2el, &mut tally.intended_e2el),
                ]
                .into()
            } else {
                BTreeMap::new()
            },
            failures: tally.failures,
            details: options.save_detailed.then(|| details(samples)),
            options: options.clone(),
            facts,
        }
    }

    /// Requests that failed.
    pub fn failed(&self) -> usize {
        self.num_prompts - self.completed
    }

    fn per_second(&self, count: f64) -> f64 {
        if self.duration_s > 0.0 { count / self.duration_s } else { 0.0 }
    }

    /// Successful requests per second.
    pub fn request_throughput(&self) -> f64 {
        self.per_second(self.completed as f64)
    }

    /// Generated tokens per second.
    pub fn output_throughput(&self) -> f64 {
        self.per_second(self.total_output_tokens as f64)
    }

    /// Prompt and generated tokens per second.
    pub fn total_token_throughput(&self) -> f64 {
        self.per_second((self.total_input_tokens + self.total_output_tokens) as f64)
    }

    /// Requests per second that met every objective; `None` without objectives.
    pub fn request_goodput(&self) -> Option<f64> {
        self.good.map(|good| self.per_second(good as f64))
    }

    /// The report as JSON. Keys that `vllm bench serve` has carry its meaning; the others are ours.
    pub fn to_json(&self) -> Value {
        let options = &self.options;
        let endpoint_type = match options.endpoint {
            Endpoint::Chat => "openai-chat",
            Endpoint::Completions => "openai",
        };
        let value = json!({
            "date": compact_date(self.facts.started),
            "endpoint_type": endpoint_type,
            "backend": endpoint_type,
            "model_id": self.facts.model,
            "tokenizer_id": self.facts.model,
            "num_prompts": self.num_prompts,
            "request_rate": self.rate_json(),
            "burstiness": options.burstiness,
            "max_concurrency": options.concurrency,
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed(),
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput(),
            "request_goodput": self.request_goodput(),
            "output_throughput": self.output_throughput(),
            "total_token_throughput": self.total_token_throughput(),
            "max_output_tokens_per_s": self.max_output_tokens_per_s,
            "max_concurrent_requests": self.max_concurrent_requests,
            "client": concat!("mirai-bench/", env!("CARGO_PKG_VERSION")),
            "dataset": options.dataset.to_string(),
            "seed": options.seed,
            "warmup": options.warmup,
            "ignore_eos": options.effective_ignore_eos(),
            "trace_speed": options.trace_speed,
            "total_cached_tokens": self.cached_input_tokens,
            "clipped_inputs": self.facts.clipped_inputs,
            "clipped_outputs": self.facts.clipped_outputs,
            "output_len_mismatches": self.output_len_mismatches,
            "token_id_source": self.facts.token_ids.key(),
            "connections_opened": self.facts.connections,
            "goodput_slo_ms": options.goodput.iter().map(|slo| (slo.metric.key().to_owned(), json!(slo.limit_ms)))
                .collect::<Map<_, _>>(),
            "failures": self.failures.iter()
                .map(|(kind, f)| (kind.to_string(), json!({"count": f.count, "example": f.example})))
                .collect::<Map<_, _>>(),
        });
        let mut map = match value {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        for (metric, summary) in &self.metrics {
            insert_summary(&mut map, metric.key(), summary);
        }
        for (metric, summary) in &self.from_intended {
            insert_summary(&mut map, &format!("{}_from_intended", metric.key()), summary);
        }
        if let Some(lag) = &self.lag {
            insert_summary(&mut map, "lag", lag);
            map.insert("max_lag_ms".into(), json!(lag.max));
        }
        if let Some(Value::Object(details)) = &self.details {
            map.extend(details.clone());
        }
        Value::Object(map)
    }

    fn rate_json(&self) -> Value {
        match self.options.request_rate {
            Some(RequestRate::PerSecond(rate)) => json!(rate),
            None if self.facts.is_open_loop => json!("trace"),
            _ => json!("inf"),
        }
    }

    /// Writes the report as a table for people.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let mut row = |name: &str, value: String| writeln!(out, "{name:<44} {value:>14}");
        row("Model", self.facts.model.clone())?;
        row("Successful requests", self.completed.to_string())?;
        row("Failed requests", self.failed().to_string())?;
        for (kind, failures) in &self.failures {
            row(&format!("  {kind}"), failures.count.to_string())?;
        }
        row("Duration (s)", format!("{:.2}", self.duration_s))?;
        row("Input tokens", self.total_input_tokens.to_string())?;
        row("  from the prefix cache", self.cached_input_tokens.to_string())?;
        row("Output tokens", self.total_output_tokens.to_string())?;
        if self.output_len_mismatches > 0 {
            row("Answers of another length than asked for", self.output_len_mismatches.to_string())?;
        }
        if self.facts.clipped_inputs + self.facts.clipped_outputs > 0 {
            row("Clipped prompts", self.facts.clipped_inputs.to_string())?;
            row("Clipped answers", self.facts.clipped_outputs.to_string())?;
        }
        row("Requests per second", format!("{:.2}", self.request_throughput()))?;
        if let Some(goodput) = self.request_goodput() {
            row("Good requests per second", format!("{goodput:.2}"))?;
        }
        row("Output tokens per second", format!("{:.2}", self.output_throughput()))?;
        row("  in the busiest second", format!("{:.2}", self.max_output_tokens_per_s))?;
        row("Total tokens per second", format!("{:.2}", self.total_token_throughput()))?;
        row("Most concurrent requests", self.max_concurrent_requests.to_string())?;
        for (metric, summary) in &self.metrics {
            write_summary(out, metric.title(), summary)?;
        }
        for (metric, summary) in &self.from_intended {
            write_summary(out, &format!("{}, from the scheduled time", metric.title()), summary)?;
        }
        if let Some(lag) = &self.lag {
            write_summary(out, "Lag of the client behind the schedule", lag)?;
        }
        for (kind, failures) in &self.failures {
            writeln!(out, "{kind}, for example: {}", failures.example)?;
        }
        Ok(())
    }
}

/// Sums over samples.
#[derive(Default)]
struct Tally {
    completed: usize,
    input_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    mismatches: usize,
    good: usize,
    values: BTreeMap<Metric, Vec<f64>>,
    lag: Vec<f64>,
    intended_ttft: Vec<f64>,
    intended_e2el: Vec<f64>,
    per_second: Vec<f64>,
    failures: BTreeMap<FailureKind, Failures>,
}

impl Tally {
    fn add(&mut self, options: &BenchOptions, sample: &Sample) {
        let lag = sample.start.saturating_sub(sample.intended).as_secs_f64() * 1e3;
        self.lag.push(lag);
        let usage = match &sample.outcome {
            Ok(usage) => usage,
            Err(failure) => {
                let entry = self
                    .failures
                    .entry(failure.kind)
                    .or_insert_with(|| Failures { count: 0, example: failure.message.clone() });
                entry.count += 1;
                return;
            }
        };
        self.completed += 1;
        self.input_tokens += usage.prompt_tokens;
        self.cached_tokens += usage.cached_tokens;
        self.output_tokens += usage.completion_tokens;
        let is_exact = usage.completion_tokens == u64::from(sample.requested);
        self.mismatches += usize::from(options.effective_ignore_eos() && !is_exact);
        let times = latencies(sample, usage.completion_tokens);
        self.good += usize::from(options.goodput.iter().all(|slo| meets(slo, &times)));
        let itl = sample.timeline.itl_us.iter().map(|&us| f64::from(us) / 1e3);
        self.values.entry(Metric::Itl).or_default().extend(itl);
        self.values.entry(Metric::Ttft).or_default().push(times.ttft);
        self.values.entry(Metric::E2el).or_default().push(times.e2el);
        if usage.completion_tokens > 1 {
            self.values.entry(Metric::Tpot).or_default().push(times.tpot);
        }
        self.intended_ttft.push(times.ttft + lag);
        self.intended_e2el.push(times.e2el + lag);
        self.spread(sample, usage.completion_tokens);
    }

    /// Adds the tokens of one request to the seconds in which its chunks arrived, each chunk standing for an
    /// equal share: chunks need not hold one token each.
    fn spread(&mut self, sample: &Sample, completion_tokens: u64) {
        let share = completion_tokens as f64 / (sample.timeline.itl_us.len() + 1) as f64;
        let mut at = (sample.start + sample.timeline.ttft.unwrap_or_default()).as_secs_f64();
        let gaps = sample.timeline.itl_us.iter().map(|&us| f64::from(us) / 1e6);
        for gap in std::iter::once(0.0).chain(gaps) {
            at += gap;
            let second = (at as usize).min(MAX_SECONDS);
            if self.per_second.len() <= second {
                self.per_second.resize(second + 1, 0.0);
            }
            self.per_second[second] += share;
        }
    }
}

fn meets(slo: &Slo, times: &Latencies) -> bool {
    let value = match slo.metric {
        Metric::Ttft => times.ttft,
        Metric::Tpot => times.tpot,
        Metric::E2el => times.e2el,
        // Not an objective that can be given: it has no one value for a request.
        Metric::Itl => return true,
    };
    value <= slo.limit_ms
}

/// The lists that `vllm bench serve --save-detailed` writes: one entry for each request, in order of sending;
/// 0 and empty for what failed.
fn details(samples: &[Sample]) -> Value {
    let usage = |sample: &Sample| sample.outcome.as_ref().ok().copied().unwrap_or_default();
    let list = |value: &dyn Fn(&Sample) -> Value| samples.iter().map(value).collect::<Vec<_>>();
    json!({
        "input_lens": list(&|s| json!(usage(s).prompt_tokens)),
        "output_lens": list(&|s| json!(usage(s).completion_tokens)),
        "ttfts": list(&|s| json!(s.timeline.ttft.unwrap_or_default().as_secs_f64())),
        "itls": list(&|s| json!(s.timeline.itl_us.iter().map(|&us| f64::from(us) / 1e6).collect::<Vec<_>>())),
        "latencies": list(&|s| json!((s.end.saturating_sub(s.start)).as_secs_f64())),
        "start_times": list(&|s| json!(s.start.as_secs_f64())),
        "intended_times": list(&|s| json!(s.intended.as_secs_f64())),
        "errors": list(&|s| json!(s.outcome.as_ref().err().map(ToString::to_string).unwrap_or_default())),
    })
}

fn insert_summary(map: &mut Map<String, Value>, name: &str, summary: &Summary) {
    map.insert(format!("mean_{name}_ms"), json!(summary.mean));
    map.insert(format!("median_{name}_ms"), json!(summary.median));
    map.insert(format!("std_{name}_ms"), json!(summary.std));
    for (percentile, value) in &summary.percentiles {
        // `f64` shows 99 without and 99.9 with a fraction, as vLLM's keys do.
        map.insert(format!("p{percentile}_{name}_ms"), json!(value));
    }
}

fn write_summary(out: &mut impl Write, title: &str, summary: &Summary) -> io::Result<()> {
    writeln!(out, "--- {title} (ms, {} samples) ---", summary.count)?;
    let mut cells = vec![("mean".to_owned(), summary.mean), ("std".to_owned(), summary.std)];
    cells.extend(summary.percentiles.iter().map(|(percentile, value)| (format!("p{percentile}"), *value)));
    cells.push(("max".to_owned(), summary.max));
    for (name, value) in cells {
        write!(out, "  {name} {value:.2}")?;
    }
    writeln!(out)
}

/// `YYYYMMDD-HHMMSS` in UTC, the form of vLLM's reports.
fn compact_date(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Gregorian calendar in years that begin in March, counted from 0000-03-01 (719468 days before 1970).
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
