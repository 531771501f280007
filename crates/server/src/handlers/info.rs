//! Everything that generates nothing: models, tokens, version, document, metrics.

use std::sync::Arc;

use hyper::Request;
use hyper::body::Incoming;

use super::judged;
use crate::api::models::{ModelCard, ModelList, Version};
use crate::api::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
use crate::error::ApiError;
use crate::http::reply::{JSON, Reply};
use crate::metrics::{self, EngineView, Seen};
use crate::model::ModelInfo;
use crate::openapi;
use crate::prompt;
use crate::routes;
use crate::state::{Drain, State};
use crate::validate::resolve_model;

fn card(model: &ModelInfo, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model".to_owned(),
        created: model.created,
        owned_by: "mirai".to_owned(),
        root: model.name().to_string(),
        parent: None,
        max_model_len: model.max_model_len,
    }
}

/// `GET /v1/models`.
pub(crate) fn models(state: &State) -> Result<Reply, ApiError> {
    let model = &state.loaded()?.model;
    let data = model.names.iter().map(|name| card(model, name)).collect();
    Ok(Reply::json(&ModelList { object: "list".to_owned(), data }))
}

/// `GET /v1/models/{model}`.
pub(crate) fn model(state: &State, name: &str) -> Result<Reply, ApiError> {
    let model = &state.loaded()?.model;
    let name = routes::decode(name);
    let name = resolve_model(Some(name.as_deref().unwrap_or_default()), model)?;
    Ok(Reply::json(&card(model, name)))
}

/// `POST /tokenize`.
pub(crate) async fn tokenize(state: &Arc<State>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let live = state.serving()?.clone();
    judged(state, &live, request, |judge| {
        let body: TokenizeRequest = judge.parse()?;
        let model = &judge.live.model;
        resolve_model(body.model.as_deref(), model)?;
        let strings = body.return_token_strs == Some(true);
        let tokens = prompt::tokenize(body, judge.rules())?;
        let text =
            |id: &u32| String::from_utf8_lossy(model.tokenizer.token_bytes(*id).unwrap_or_default()).into();
        Ok(Reply::json(&TokenizeResponse {
            count: tokens.len(),
            max_model_len: model.max_model_len,
            token_strs: strings.then(|| tokens.iter().map(text).collect()),
            tokens,
        }))
    })
    .await
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(state: &Arc<State>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let live = state.serving()?.clone();
    judged(state, &live, request, |judge| {
        let body: DetokenizeRequest = judge.parse()?;
        let model = &judge.live.model;
        resolve_model(body.model.as_deref(), model)?;
        let Some(tokens) = body.tokens else {
            return Err(ApiError::missing_field("`tokens` is missing").param("tokens"));
        };
        let text = model.tokenizer.decode(&tokens.0, false).map_err(|_| {
            ApiError::invalid_value("`tokens` has an id outside the vocabulary").param("tokens")
        })?;
        Ok(Reply::json(&DetokenizeResponse { prompt: text }))
    })
    .await
}

/// `GET /version`.
pub(crate) fn version() -> Reply {
    Reply::json(&Version { version: env!("CARGO_PKG_VERSION").to_owned() })
}

/// `GET /openapi.json`: the committed document, which a test holds to the types.
pub(crate) fn openapi() -> Reply {
    Reply::new(hyper::StatusCode::OK, JSON, openapi::COMMITTED.as_bytes())
}

/// `GET /metrics`.
pub(crate) fn metrics(state: &State) -> Reply {
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let counters = state.live().map(|live| live.engine.counters());
    let engine = state.live().zip(counters.as_ref()).map(|(live, counters)| EngineView {
        model: live.model.name(),
        counters,
        oldest_queued_seconds: counters.oldest_queued_age(live.engine.now()).as_secs_f64(),
    });
    let rows = state.accounting().map(|accounting| &accounting.ledger);
    let seen = Seen { engine, rows, quotas: state.quotas(), told: state.events() };
    let page = metrics::render(&state.metrics, seen, state.drain() != Drain::No, tasks);
    Reply::new(hyper::StatusCode::OK, metrics::CONTENT_TYPE, page)
}
