//! One benchmark from options to report. Owns the order of things: check, ask the server, warm up, measure,
//! write.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::client::Client;
use crate::dataset::Workload;
use crate::load::{Run, Schedule, drive};
use crate::progress::Progress;
use crate::prompt::{BodyBuilder, SAMPLE_TEXT, Vocabulary};
use crate::report::{Facts, Report, TokenIdSource};
use crate::request::Plan;
use crate::{BenchError, BenchOptions, Dataset, Endpoint, TokenIdRange};

/// Longest wait for an answer outside of the measurement.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// Fewest distinct ids that make prompts random enough not to share cached blocks by chance.
const MIN_IDS: usize = 32;
/// Ids that are ordinary bytes in byte-level vocabularies (0 to 255) and in those with byte fallback (3 to
/// 258).
const SAFE_RANGE: TokenIdRange = TokenIdRange { low: 32, high: 250 };

/// Runs one benchmark and writes `--json` where it is given. Needs a tokio runtime with time and I/O.
///
/// Failed requests do not make this fail: they are in the report.
///
/// # Errors
/// Bad options, unreadable files, a server that does not name its model, a failed warm-up.
pub async fn run(options: BenchOptions, progress: Progress) -> Result<Report, BenchError> {
    options.validate()?;
    let workload = Workload::build(&options)?;
    let client = Client::new(&options)?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None => ask_model(&client).await?,
    };
    let (vocabulary, token_ids) = choose_vocabulary(&options, &client, &model).await;
    let progress = Arc::new(progress);
    let builder = Arc::new(BodyBuilder::new(&options, &model, vocabulary));
    let path = match options.endpoint {
        Endpoint::Chat => "/v1/chat/completions",
        Endpoint::Completions => "/v1/completions",
    };
    let timeout = Duration::from_secs_f64(options.timeout);
    let plan = Arc::new(Plan { client, path, timeout });
    let load = |workload| {
        let (plan, builder, progress) = (plan.clone(), builder.clone(), progress.clone());
        Arc::new(Run { plan, builder, workload, progress })
    };

    if options.warmup > 0 {
        warm_up(&options, &load(Workload::warmup(&options)), &progress).await?;
    }
    let schedule = Schedule::of(&options, &workload);
    let opened_before = plan.client.opened();
    let mut facts = Facts {
        model,
        is_open_loop: matches!(schedule, Schedule::Open { .. }),
        clipped_inputs: workload.clipped_inputs,
        clipped_outputs: workload.clipped_outputs,
        token_ids,
        connections: 0,
        started: SystemTime::now(),
    };
    progress.begin("measuring", workload.specs.len());
    let mut samples = drive(&load(workload), &schedule).await;
    progress.end();
    facts.connections = plan.client.opened() - opened_before;
    let report = Report::new(&options, facts, &mut samples);
    if let Some(path) = &options.json {
        let mut text = report.to_json().to_string();
        text.push('\n');
        std::fs::write(path, text).map_err(|source| BenchError::Io {
            path: path.clone(),
            action: "write",
            source,
        })?;
    }
    Ok(report)
}

async fn warm_up(options: &BenchOptions, run: &Arc<Run>, progress: &Progress) -> Result<(), BenchError> {
    progress.begin("warming up", options.warmup);
    let slots = options.concurrency.unwrap_or(options.warmup).min(options.warmup);
    let samples = drive(run, &Schedule::Closed { slots }).await;
    let mut failures = samples.iter().filter_map(|sample| sample.outcome.as_ref().err());
    match failures.next() {
        None => Ok(()),
        Some(first) => Err(BenchError::Warmup {
            failed: 1 + failures.count(),
            requests: samples.len(),
            example: first.to_string(),
        }),
    }
}

/// The first model that the server lists.
async fn ask_model(client: &Client) -> Result<String, BenchError> {
    let url = format!("{}/v1/models", client.base_url());
    let failed = |reason: String| BenchError::Server { url: url.clone(), reason };
    let (status, body) = client
        .call(Method::GET, "/v1/models", Bytes::new(), ASK_TIMEOUT)
        .await
        .map_err(|failure| failed(failure.to_string()))?;
    if status != StatusCode::OK {
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        return Err(failed(format!("status {status}: {text}")));
    }
    let answer: Value = serde_json::from_slice(&body).map_err(|error| failed(error.to_string()))?;
    let id = answer.pointer("/data/0/id").and_then(Value::as_str);
    id.map(ToOwned::to_owned).ok_or_else(|| failed("field data: lists no model; give --model".into()))
}

/// What random prompts are made of, and how it was found.
async fn choose_vocabulary(
    options: &BenchOptions,
    client: &Client,
    model: &str,
) -> (Vocabulary, TokenIdSource) {
    if options.endpoint == Endpoint::Chat || options.dataset == Dataset::Prompts {
        return (Vocabulary::words(), TokenIdSource::Text);
    }
    let range = |range: TokenIdRange| Vocabulary::Ids((range.low..=range.high).collect());
    if let Some(given) = options.token_ids {
        return (range(given), TokenIdSource::Given);
    }
    match learn_ids(client, model).await {
        Some(ids) => (Vocabulary::Ids(ids), TokenIdSource::Tokenize),
        None => (range(SAFE_RANGE), TokenIdSource::SafeRange),
    }
}

/// Distinct ids of ordinary text, from the server's `/tokenize`; `None` where it has none.
async fn learn_ids(client: &Client, model: &str) -> Option<Vec<u32>> {
    let body = json!({"model": model, "prompt": SAMPLE_TEXT, "add_special_tokens": false}).to_string();
    let (status, body) = client.call(Method::POST, "/tokenize", Bytes::from(body), ASK_TIMEOUT).await.ok()?;
    if status != StatusCode::OK {
        return None;
    }
    let answer: Value = serde_json::from_slice(&body).ok()?;
    let tokens = answer.get("tokens")?.as_array()?;
    let mut ids: Vec<u32> =
        tokens.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect::<Option<_>>()?;
    ids.sort_unstable();
    ids.dedup();
    (ids.len() >= MIN_IDS).then_some(ids)
}
