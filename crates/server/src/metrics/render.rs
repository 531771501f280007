//! `/metrics` in Prometheus' text format 0.0.4.
//!
//! Owns names, help texts and the aliases that gateways and autoscalers scrape; it never changes a value.

use mirai_engine::{BLOCK_TOKENS, Counters, STEP_TOKEN_BOUNDS};
use mirai_ledger::Ledger;
use mirai_ledger::quota::Quotas;

use super::identity::{Credential, Decision, IdentityMetrics, Lookup};
use super::ledger::ledger;
use super::page::{Page, escape};
use super::quota;
use super::usage::{by_application, events};
use super::{CLASSES, DeviceFigure, Ended, Histogram, Metrics, Refused, Reloaded};
use crate::events::EventCounters;
use crate::routes::ROUTES;

/// What Prometheus expects.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a scrape sees of the engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EngineView<'a> {
    pub(crate) model: &'a str,
    pub(crate) counters: &'a Counters,
    /// Age of the oldest queued request, seconds.
    pub(crate) oldest_queued_seconds: f64,
}

/// What a scrape sees of the rest of the server: what is not there, or not yet, has no metrics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen<'a> {
    pub(crate) engine: Option<EngineView<'a>>,
    pub(crate) rows: Option<&'a Ledger>,
    pub(crate) quotas: Option<&'a Quotas>,
    pub(crate) told: Option<&'a EventCounters>,
}

/// Writes the page. The aliases and the engine's own metrics appear once a model is loaded.
pub(crate) fn render(metrics: &Metrics, seen: Seen<'_>, draining: bool, tasks: usize) -> String {
    let Seen { engine, rows, quotas, told } = seen;
    let mut page = Page::new();
    let version = env!("CARGO_PKG_VERSION");
    page.family("mirai_build_info", "gauge", "Version of the server.");
    page.sample("mirai_build_info", &format!("version=\"{version}\""), 1.0);
    page.single("mirai_ready", "gauge", "1 once a model is served.", f64::from(u8::from(engine.is_some())));
    page.single("mirai_draining", "gauge", "1 while the server drains.", f64::from(u8::from(draining)));
    page.single("mirai_tasks", "gauge", "Asynchronous tasks alive.", tasks as f64);
    http(&mut page, metrics);
    reloads(&mut page, metrics);
    identity(&mut page, &metrics.identity);
    requests(&mut page, metrics);
    device(&mut page, metrics);
    if let Some(rows) = rows {
        ledger(&mut page, rows);
        by_application(&mut page, rows);
    }
    if let Some(counters) = told {
        events(&mut page, counters);
    }
    if let Some(quotas) = quotas {
        quota::quotas(&mut page, quotas);
    }
    for (name, help, histogram) in own_histograms(metrics) {
        page.histogram(name, help, "", histogram);
    }
    if let Some(view) = engine {
        engine_metrics(&mut page, view);
        aliases(&mut page, metrics, view);
    }
    page.into_text()
}

fn http(page: &mut Page, metrics: &Metrics) {
    let name = "mirai_http_requests_total";
    page.family(name, "counter", "Answers by route and class of status.");
    let routes = ROUTES.iter().map(|route| (route.name(), route.method)).chain([("none", "none")]);
    for ((route, method), row) in routes.zip(&metrics.http) {
        for (class, counter) in CLASSES.iter().zip(row) {
            let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{class}\"");
            page.sample(name, &labels, counter.get() as f64);
        }
    }
    for (name, kind, help, value) in [
        ("mirai_http_connections", "gauge", "Open connections.", metrics.connections.get() as f64),
        ("mirai_http_connections_total", "counter", "Connections accepted.", metrics.accepted.get() as f64),
        ("mirai_http_accept_errors_total", "counter", "Failed accepts.", metrics.accept_errors.get() as f64),
        (
            "mirai_http_read_timeouts_total",
            "counter",
            "Connections closed because a head or body came too slowly.",
            metrics.read_timeouts.get() as f64,
        ),
        (
            "mirai_http_write_stalls_total",
            "counter",
            "Connections closed because the client took no byte.",
            metrics.write_stalls.get() as f64,
        ),
        ("mirai_http_active_requests", "gauge", "Requests being answered.", metrics.active.get() as f64),
        ("mirai_http_body_bytes", "gauge", "Bytes of bodies held.", metrics.body_bytes.get() as f64),
    ] {
        page.single(name, kind, help, value);
    }
}

fn reloads(page: &mut Page, metrics: &Metrics) {
    let name = "mirai_file_reloads_total";
    page.family(name, "counter", "Changes of key and certificate files, and whether they were taken.");
    for (what, label) in Reloaded::ALL {
        for (result, value) in ["taken", "refused"].iter().zip(metrics.reloads(what)) {
            page.sample(name, &format!("files=\"{label}\",result=\"{result}\""), value as f64);
        }
    }
}

fn identity(page: &mut Page, metrics: &IdentityMetrics) {
    let name = "mirai_identity_decisions_total";
    page.family(name, "counter", "Callers by what they presented and what was decided.");
    for (credential, credential_label) in Credential::ALL {
        for (decision, decision_label) in Decision::ALL {
            let labels = format!("credential=\"{credential_label}\",decision=\"{decision_label}\"");
            page.sample(name, &labels, metrics.decisions(credential, decision) as f64);
        }
    }
    let name = "mirai_identity_lookups_total";
    page.family(name, "counter", "Calls to identity providers, and whether they were answered.");
    for (what, label) in Lookup::ALL {
        for (result, value) in ["answered", "failed"].iter().zip(metrics.lookups(what)) {
            page.sample(name, &format!("result=\"{result}\",what=\"{label}\""), value as f64);
        }
    }
}

/// The figures that are known; without a GPU none.
fn device(page: &mut Page, metrics: &Metrics) {
    for (figure, name, kind, help) in DeviceFigure::ALL {
        if let Some(value) = metrics.device.get(figure) {
            page.single(name, kind, help, value);
        }
    }
}

fn requests(page: &mut Page, metrics: &Metrics) {
    let name = "mirai_choices_finished_total";
    page.family(name, "counter", "Choices by how they ended.");
    for ((_, reason), counter) in Ended::ALL.iter().zip(&metrics.finished) {
        page.sample(name, &format!("reason=\"{reason}\""), counter.get() as f64);
    }
    let name = "mirai_requests_refused_total";
    page.family(name, "counter", "Well-formed requests that were not accepted.");
    for ((_, reason), counter) in Refused::ALL.iter().zip(&metrics.refused) {
        page.sample(name, &format!("reason=\"{reason}\""), counter.get() as f64);
    }
    page.single("mirai_streams", "gauge", "Requests in the demultiplexer.", metrics.streams.get() as f64);
    for (name, help, counter) in [
        ("mirai_unknown_fields_total", "Fields of bodies that nobody knows.", &metrics.unknown_fields),
        (
            "mirai_slow_readers_total",
            "Requests cancelled because their client was too slow.",
            &metrics.slow_readers,
        ),
        ("mirai_panics_total", "Panics caught at a request's boundary.", &metrics.panics),
        ("mirai_disconnects_total", "Requests whose client left before their end.", &metrics.disconnects),
        ("mirai_prompt_tokens_total", "Prompt tokens of accepted requests.", &metrics.prompt_tokens),
        ("mirai_cached_tokens_total", "Of these, from the prefix cache.", &metrics.cached_tokens),
        ("mirai_generation_tokens_total", "Output tokens of answers.", &metrics.generation_tokens),
        ("mirai_wasted_tokens_total", "Tokens computed and thrown away.", &metrics.wasted_tokens),
        ("mirai_corrupted_choices_total", "Choices ended by a logit that is not finite.", &metrics.corrupted),
    ] {
        page.single(name, "counter", help, counter.get() as f64);
    }
}

fn own_histograms(m: &Metrics) -> [(&'static str, &'static str, &Histogram); 9] {
    [
        ("mirai_time_to_first_token_seconds", "Arrival to first token.", &m.time_to_first_token),
        ("mirai_inter_token_latency_seconds", "Between two tokens of a choice.", &m.inter_token),
        ("mirai_request_seconds", "Arrival to end.", &m.e2e),
        ("mirai_request_queue_seconds", "Arrival to first slot.", &m.queue),
        ("mirai_request_prefill_seconds", "First slot to first token.", &m.prefill),
        ("mirai_request_decode_seconds", "First token to end.", &m.decode),
        ("mirai_request_prompt_tokens", "Length of prompts.", &m.request_prompt_tokens),
        ("mirai_request_generation_tokens", "Length of outputs.", &m.request_generation_tokens),
        ("mirai_request_preemptions", "Preemptions of a choice.", &m.preemptions),
    ]
}

fn engine_metrics(page: &mut Page, view: EngineView<'_>) {
    let c = view.counters;
    let free = c.blocks_total.saturating_sub(c.blocks_used).saturating_sub(c.blocks_cached);
    for (name, kind, help, value) in [
        ("mirai_sequences_running", "gauge", "Sequences that have a slot.", c.running as f64),
        ("mirai_sequences_waiting", "gauge", "Sequences that wait for a slot.", c.waiting as f64),
        ("mirai_queued_requests", "gauge", "Requests that never had a slot.", c.queued_requests as f64),
        ("mirai_queued_tokens", "gauge", "Their prompt tokens.", c.queued_tokens as f64),
        ("mirai_oldest_queued_seconds", "gauge", "Age of the oldest of them.", view.oldest_queued_seconds),
        ("mirai_kv_usage_ratio", "gauge", "Share of KV blocks that sequences hold.", usage(c)),
        ("mirai_engine_steps_total", "counter", "Steps.", c.steps as f64),
        ("mirai_engine_step_tokens_total", "counter", "Tokens computed in steps.", c.step_tokens as f64),
        ("mirai_engine_step_rows_total", "counter", "Rows of steps.", c.step_rows as f64),
        (
            "mirai_engine_device_seconds_total",
            "counter",
            "Device time of steps.",
            c.device_nanos as f64 * 1e-9,
        ),
        ("mirai_prefix_query_tokens_total", "counter", "Tokens looked up.", c.prefix_query_tokens as f64),
        ("mirai_prefix_hit_tokens_total", "counter", "Of these, found.", c.prefix_hit_tokens as f64),
        ("mirai_evictions_total", "counter", "Cached blocks given up.", c.evictions as f64),
        ("mirai_preemptions_total", "counter", "Sequences that lost their slot.", c.preemptions as f64),
        ("mirai_faults_total", "counter", "Sequences that failed alone.", c.faults as f64),
        ("mirai_integrity_failures_total", "counter", "Violated invariants.", c.integrity_failures as f64),
    ] {
        page.single(name, kind, help, value);
    }
    step_sizes(page, "mirai_engine_iteration_tokens", "", c);
    let joules = "mirai_energy_joules_total";
    page.family(
        joules,
        "counter",
        "Energy by the GPU's counter: charged to requests, and while no step ran.",
    );
    for (state, microjoules) in
        [("attributed", c.energy_attributed_microjoules), ("idle", c.energy_idle_microjoules)]
    {
        page.sample(joules, &format!("state=\"{state}\""), microjoules as f64 * 1e-6);
    }
    page.family("mirai_kv_blocks", "gauge", "KV blocks by state.");
    for (state, value) in [("used", c.blocks_used), ("cached", c.blocks_cached), ("free", free)] {
        page.sample("mirai_kv_blocks", &format!("state=\"{state}\""), value as f64);
    }
}

/// Tokens of each step, as the engine counts them.
fn step_sizes(page: &mut Page, name: &str, labels: &str, c: &Counters) {
    let mut total = 0;
    let mut rows = Vec::with_capacity(STEP_TOKEN_BOUNDS.len());
    for (bound, steps) in STEP_TOKEN_BOUNDS.iter().zip(c.steps_by_tokens) {
        total += steps;
        rows.push((*bound as f64, total));
    }
    let all = c.steps_by_tokens.iter().sum();
    page.buckets(name, "Tokens of a step, prefill and decode.", labels, &rows, c.step_tokens as f64, all);
}

fn usage(c: &Counters) -> f64 {
    if c.blocks_total == 0 { 0.0 } else { c.blocks_used as f64 / c.blocks_total as f64 }
}

/// The names that vLLM's users scrape.
fn aliases(page: &mut Page, m: &Metrics, view: EngineView<'_>) {
    let labels = format!("engine=\"0\",model_name=\"{}\"", escape(view.model));
    let c = view.counters;
    for (name, kind, help, value) in [
        ("vllm:num_requests_running", "gauge", "Requests inside the current batches.", c.running as f64),
        ("vllm:num_requests_waiting", "gauge", "Queued requests.", (c.waiting.max(c.queued_requests)) as f64),
        ("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 0 to 1.", usage(c)),
        ("vllm:prefix_cache_queries_total", "counter", "Tokens looked up.", c.prefix_query_tokens as f64),
        ("vllm:prefix_cache_hits_total", "counter", "Tokens found.", c.prefix_hit_tokens as f64),
        ("vllm:num_preemptions_total", "counter", "Preemptions.", c.preemptions as f64),
        ("vllm:prompt_tokens_total", "counter", "Prompt tokens.", m.prompt_tokens.get() as f64),
        ("vllm:prompt_tokens_cached_total", "counter", "Cached prompt tokens.", m.cached_tokens.get() as f64),
        ("vllm:generation_tokens_total", "counter", "Output tokens.", m.generation_tokens.get() as f64),
        ("vllm:corrupted_requests_total", "counter", "NaN logits seen.", m.corrupted.get() as f64),
    ] {
        page.family(name, kind, help);
        page.sample(name, &labels, value);
    }
    let name = "vllm:request_success_total";
    page.family(name, "counter", "Finished choices.");
    for ((_, reason), counter) in Ended::ALL.iter().zip(&m.finished) {
        page.sample(name, &format!("{labels},finished_reason=\"{reason}\""), counter.get() as f64);
    }
    let name = "vllm:admission_rejections_total";
    page.family(name, "counter", "Refused at the door.");
    for ((_, reason), counter) in Refused::ALL.iter().zip(&m.refused).take(2) {
        page.sample(name, &format!("{labels},reason=\"{reason}\""), counter.get() as f64);
    }
    let info = format!("{labels},block_size=\"{BLOCK_TOKENS}\",num_gpu_blocks=\"{}\"", c.blocks_total);
    page.family("vllm:cache_config_info", "gauge", "Facts about the KV cache.");
    page.sample("vllm:cache_config_info", &info, 1.0);
    step_sizes(page, "vllm:iteration_tokens_total", &labels, c);
    for (name, help, histogram) in [
        ("vllm:request_prompt_tokens", "Prompt length.", &m.request_prompt_tokens),
        ("vllm:request_generation_tokens", "Output length.", &m.request_generation_tokens),
        ("vllm:request_params_n", "Parameter n.", &m.params_n),
        ("vllm:request_params_max_tokens", "Parameter max_tokens.", &m.params_max_tokens),
        ("vllm:time_to_first_token_seconds", "Time to first token.", &m.time_to_first_token),
        ("vllm:inter_token_latency_seconds", "Between two tokens.", &m.inter_token),
        ("vllm:request_time_per_output_token_seconds", "Mean of a choice.", &m.time_per_output_token),
        ("vllm:e2e_request_latency_seconds", "End to end.", &m.e2e),
        ("vllm:request_queue_time_seconds", "Waiting.", &m.queue),
        ("vllm:request_inference_time_seconds", "Running.", &m.inference),
        ("vllm:request_prefill_time_seconds", "Prefill.", &m.prefill),
        ("vllm:request_decode_time_seconds", "Decode.", &m.decode),
        ("vllm:request_num_preemptions", "Preemptions of a choice.", &m.preemptions),
    ] {
        page.histogram(name, help, &labels, histogram);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::routes::RouteId;

    /// The series of a page (name and labels) and its values.
    fn series(page: &str) -> std::collections::BTreeMap<String, f64> {
        page.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').unwrap();
                (name.to_owned(), value.parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn every_line_parses_and_every_family_is_declared_once() {
        let metrics = Metrics::new();
        metrics.answered(Some(RouteId(0)), 200);
        metrics.answered(None, 404);
        metrics.finished(Ended::Length);
        metrics.refused(Refused::QueueTokens);
        metrics.time_to_first_token.observe(0.2);
        metrics.device.set(DeviceFigure::Energy, Some(12.5));
        let mut counters =
            Counters { blocks_total: 10, blocks_used: 5, step_tokens: 20_300, ..Counters::default() };
        // Steps of 300 and of 20,000 tokens.
        (counters.steps_by_tokens[7], counters.steps_by_tokens[13]) = (1, 1);
        counters.energy_idle_microjoules = 2_500_000;
        let view = EngineView { model: "a\"b", counters: &counters, oldest_queued_seconds: 0.0 };
        let page = render(&metrics, Seen { engine: Some(view), ..Seen::default() }, false, 3);
        let map = series(&page);
        assert_eq!(map["vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"a\\\"b\"}"], 0.5);
        let steps = |suffix: &str, le: &str| {
            map[&format!("vllm:iteration_tokens_total{suffix}{{engine=\"0\",model_name=\"a\\\"b\"{le}}}")]
        };
        assert_eq!(steps("_bucket", ",le=\"256.0\""), 0.0);
        assert_eq!(steps("_bucket", ",le=\"512.0\""), 1.0);
        assert_eq!(steps("_bucket", ",le=\"16384.0\""), 1.0);
        assert_eq!(steps("_bucket", ",le=\"+Inf\""), 2.0);
        assert_eq!((steps("_sum", ""), steps("_count", "")), (20_300.0, 2.0));
        assert_eq!(map["mirai_choices_finished_total{reason=\"length\"}"], 1.0);
        assert_eq!(map["mirai_gpu_energy_joules_total"], 12.5);
        assert_eq!(map["mirai_energy_joules_total{state=\"idle\"}"], 2.5);
        assert_eq!(map["mirai_energy_joules_total{state=\"attributed\"}"], 0.0);
        assert!(!map.contains_key("mirai_gpu_power_watts"), "it is not known");
        assert_eq!(map["mirai_time_to_first_token_seconds_bucket{le=\"0.25\"}"], 1.0);
        assert_eq!(map["mirai_time_to_first_token_seconds_bucket{le=\"0.1\"}"], 0.0);
        assert_eq!(map["mirai_http_requests_total{method=\"none\",route=\"none\",status=\"4xx\"}"], 1.0);
        let mut types: Vec<_> = page.lines().filter(|l| l.starts_with("# TYPE")).collect();
        let all = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), all);
        assert_eq!(map.len(), page.lines().filter(|l| !l.starts_with('#')).count(), "no series twice");
        for line in page.lines().filter(|l| l.starts_with("# TYPE mirai_")) {
            assert!(!line.contains(':'), "{line}");
        }
    }

    #[test]
    fn without_a_model_there_are_no_aliases() {
        let page = render(&Metrics::new(), Seen::default(), true, 0);
        assert!(!page.contains("vllm:"));
        assert_eq!(series(&page)["mirai_draining"], 1.0);
    }
}
