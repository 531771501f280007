//! From a request's head to its answer.
//!
//! Owns the order: route, key, then everything else. Nothing that scales with a request's numbers happens
//! before its body was judged.

mod admin;
mod admission;
mod generate;
mod info;
mod pool;
mod usage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{HOST, HeaderMap};
use hyper::{Method, Request, Response, Version};
use mirai_ledger::identity::Quota;
use serde::de::DeserializeOwned;

use crate::auth::Caller;
use crate::error::ApiError;
use crate::handlers::pool::PoolKind;
use crate::health::{self, Probe};
use crate::http::body::{self, HeldBody, Share};
use crate::http::io::ConnState;
use crate::http::reply::{Body, Reply, Scope};
use crate::ids;
use crate::metrics::Refused;
use crate::parse::parse;
use crate::routes::{self, Access, Match, Route, Target};
use crate::rules::Rules;
use crate::state::{Drain, Live, State};
use crate::validate::Kind;
use crate::worker::JobError;

/// Which listener a request came in on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// Everything; without metrics if those have a door of their own.
    Main,
    /// Metrics and probes only.
    Metrics,
    /// What administrators do, and nothing else.
    Admin,
}

/// Longest path that is looked up.
const MAX_PATH: usize = 8 << 10;

/// Answers one request.
pub(crate) async fn handle(
    state: Arc<State>,
    door: Door,
    conn: Arc<ConnState>,
    request: Request<Incoming>,
) -> Response<Body> {
    state.metrics.active.add(1);
    let caller_id = caller_id(request.headers());
    let mut scope = Scope {
        metrics: state.metrics.clone(),
        conn,
        arrived: Instant::now(),
        patience: None,
        route: None,
        method: method_name(request.method()),
        id: format!("req-{}", state.ids.public()),
        caller_id: caller_id.clone(),
        status: 0,
        ticket: None,
        error_code: None,
        allow: None,
        tenant: 0,
        payer: None,
    };
    let id = caller_id.unwrap_or_else(|| scope.id.clone());
    let mut reply = match dispatch(&state, door, request, &mut scope).await {
        Ok(reply) => reply,
        Err(error) => {
            scope.error_code = Some(error.code);
            Reply::error(&error, state.config.error_message_copy)
        }
    };
    reply.allow = scope.allow;
    if let (Some(quotas), Some((application, quota))) = (state.quotas(), &scope.payer)
        && *quota != Quota::default()
    {
        reply.standing = quotas.standing(application, quota);
    }
    reply.close |= state.drain() == Drain::Refusing;
    reply.into_response(scope, &id)
}

/// One of a fixed list: the method is a label and a log field.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

fn caller_id(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-request-id")?.to_str().ok()?;
    ids::is_sane(value).then(|| value.to_owned())
}

/// The rules of HTTP/1.1 that routing depends on.
fn check_head(request: &Request<Incoming>) -> Result<(), ApiError> {
    if request.uri().path().len() > MAX_PATH {
        return Err(ApiError::uri_too_long("the path is too long").closing());
    }
    let hosts = request.headers().get_all(HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
        return Err(ApiError::bad_request("exactly one `Host` header is needed").closing());
    }
    Ok(())
}

/// How long the caller says it will wait: `X-Request-Timeout`, in seconds.
fn patience(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let mut values = headers.get_all("x-request-timeout").iter();
    let seconds = match (values.next(), values.next()) {
        (None, _) => return Ok(None),
        (Some(value), None) => value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok()),
        (Some(_), Some(_)) => None,
    };
    let patience = seconds.filter(|seconds| *seconds > 0.0).and_then(|s| Duration::try_from_secs_f64(s).ok());
    patience.map(Some).ok_or_else(|| {
        ApiError::invalid_value("`X-Request-Timeout` must be one number of seconds above 0")
            .param("X-Request-Timeout")
    })
}

async fn dispatch(
    state: &Arc<State>,
    door: Door,
    request: Request<Incoming>,
    scope: &mut Scope,
) -> Result<Reply, ApiError> {
    check_head(&request)?;
    let path = request.uri().path().to_owned();
    let matched = routes::find(request.method(), &path, |route| is_behind(state, door, route));
    let open = matches!(matched, Match::Found(route, _) if route.route().access == Access::Open);
    // A probe or a scrape is answered whoever asks, and waits for nobody.
    let caller = if open { Caller::anybody() } else { state.auth.check(request.headers()).await? };
    scope.called_by(&caller);
    let (route, rest) = match matched {
        Match::Found(route, rest) => (route, rest),
        Match::OtherMethod(allow) => {
            scope.allow = Some(allow);
            return Err(ApiError::method_not_allowed(format!("this path answers {allow} only")));
        }
        Match::None => return Err(ApiError::not_found("no such path; GET /openapi.json lists them")),
    };
    scope.route = Some(route);
    scope.patience = patience(request.headers())?;
    caller.needs(route.route().access.scope())?;
    match route.route().target {
        Target::Chat => generate::generate(state, request, caller, Kind::Chat, scope).await,
        Target::Completion => generate::generate(state, request, caller, Kind::Completion, scope).await,
        Target::Embeddings => pool::pool(state, request, caller, PoolKind::Embeddings, scope).await,
        Target::Rerank | Target::RerankV2 => {
            pool::pool(state, request, caller, PoolKind::Rerank, scope).await
        }
        Target::Score => pool::pool(state, request, caller, PoolKind::Score, scope).await,
        Target::Models => info::models(state),
        Target::Model => info::model(state, rest.unwrap_or_default()),
        Target::Tokenize => info::tokenize(state, request).await,
        Target::Detokenize => info::detokenize(state, request).await,
        Target::Usage => usage::usage(state, request.uri(), usage::Sees::of(&caller)).await,
        Target::Version => Ok(info::version()),
        Target::OpenApi => Ok(info::openapi()),
        Target::Health | Target::HealthLive => Ok(health::answer(state, Probe::Live)),
        Target::HealthReady => Ok(health::answer(state, Probe::Ready)),
        Target::HealthStartup => Ok(health::answer(state, Probe::Startup)),
        Target::Metrics => Ok(info::metrics(state)),
        Target::AdminApplications => Ok(admin::applications(state)),
        Target::AdminReload => admin::reload(state).await,
    }
}

/// Whether a route answers at this door.
fn is_behind(state: &State, door: Door, route: &Route) -> bool {
    let (target, access) = (route.target, route.access);
    match door {
        Door::Main => match target {
            Target::Metrics => state.config.metrics_listen.is_none(),
            _ => !access.is_admin(),
        },
        Door::Metrics => access == Access::Open,
        Door::Admin => access.is_admin(),
    }
}

/// A call's JSON body on a worker, and what it is judged by.
struct Judge {
    state: Arc<State>,
    live: Arc<Live>,
    body: HeldBody,
}

impl Judge {
    /// The body as a type; counts the fields that it does not know.
    fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let parsed = parse(&self.body.bytes, self.state.config.limits.max_json_depth)?;
        self.state.metrics.unknown_fields.add(parsed.unknown_fields);
        Ok(parsed.body)
    }

    fn rules(&self) -> Rules<'_> {
        self.state.rules(&self.live.model)
    }

    /// Keeps the budget of bodies for `bytes` of this one that are held until its answer is written.
    fn keep(&mut self, bytes: usize) -> Share {
        self.body.keep(bytes)
    }
}

/// Reads a JSON body and judges it on a worker.
async fn judged<T: Send + 'static>(
    state: &Arc<State>,
    live: &Arc<Live>,
    request: Request<Incoming>,
    job: impl FnOnce(&mut Judge) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    body::check_headers(request.headers())?;
    let config = &state.config;
    let body = body::read(request.into_body(), &config.limits, &config.timeouts, &state.metrics).await?;
    let mut judge = Judge { state: state.clone(), live: live.clone(), body };
    on_worker(state, move || job(&mut judge)).await
}

/// Runs what reads a body's text on a worker.
async fn on_worker<T: Send + 'static>(
    state: &State,
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match state.workers.run(job).await {
        Ok(result) => {
            state.metrics.job_ended();
            result
        }
        Err(JobError::Full) => {
            state.metrics.refused(Refused::Workers);
            Err(ApiError::saturated("too many requests wait to be tokenized")
                .retry_after(state.metrics.jobs_drain_time(state.config.limits.max_queued_jobs as u64)))
        }
        Err(JobError::Panicked) => {
            state.metrics.panics.inc();
            Err(ApiError::internal("this request failed; others are not affected"))
        }
    }
}
