//! Chat and completion requests.
//!
//! Owns the way of a request into the engine: judged on a worker, given room and a row, announced to the
//! demultiplexer, submitted; and what undoes each step when the next one fails or the client leaves.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::Request;
use hyper::body::Incoming;
use mirai_engine::{EngineRequest, RequestId, Task};
use mirai_ledger::Endpoint;
use mirai_ledger::quota::Demand;
use tokio::sync::oneshot;

use super::admission::{account, attributed, deadline, refusal, refused, serving};
use super::judged;
use crate::account::{Charge, Needs};
use crate::auth::{self, Caller};
use crate::demux::Registration;
use crate::demux::sink::Sink;
use crate::demux::stream::{StreamBuffer, StreamReader};
use crate::demux::ticket::{LeaveGuard, Ticket};
use crate::error::ApiError;
use crate::http::reply::{JSON, Reply, Scope};
use crate::quota::{self, Held};
use crate::rules::Body;
use crate::state::{Live, State};
use crate::validate::{self, GenerationRequest, Kind};

/// Answers a generation request.
pub(crate) async fn generate(
    state: &Arc<State>,
    request: Request<Incoming>,
    caller: Caller,
    kind: Kind,
    scope: &mut Scope,
) -> Result<Reply, ApiError> {
    let live = serving(state)?.clone();
    let judged = judged(state, &live, request, move |judge| {
        let body = match kind {
            Kind::Chat => Body::Chat(Box::new(judge.parse()?)),
            Kind::Completion => Body::Completion(Box::new(judge.parse()?)),
        };
        validate::validate(body, judge.rules())
    })
    .await?;
    // The drain may have begun while the body came.
    serving(state)?;
    observe(state, &judged);
    let caller = attributed(state, caller, &judged.attribution, scope)?;
    admit(state, &live, judged, &caller, scope).await
}

fn observe(state: &State, judged: &GenerationRequest) {
    state.metrics.params_n.observe(f64::from(judged.n));
    for prompt in &judged.prompts {
        state.metrics.params_max_tokens.observe(f64::from(prompt.max_tokens));
    }
}

/// Hands a judged request over, and answers.
async fn admit(
    state: &State,
    live: &Live,
    mut judged: GenerationRequest,
    caller: &Caller,
    scope: &mut Scope,
) -> Result<Reply, ApiError> {
    let held = reserve(state, &mut judged, caller).await?;
    let count = judged.prompts.len() as u32;
    let first = state.ids.engine(count);
    let lengths: Vec<u64> = judged.prompts.iter().map(|prompt| prompt.ids.len() as u64).collect();
    let prompt_tokens = lengths.iter().sum();
    let requests = engine_requests(state, live, &judged, caller, first, scope);
    // Room first: what is refused leaves no row.
    let admission = live.engine.reserve(requests).map_err(|error| refusal(state, live, &error))?;
    let id = scope.id.trim_start_matches("req-");
    let account = account(
        state,
        &Charge {
            id,
            endpoint: if judged.kind == Kind::Chat { Endpoint::Chat } else { Endpoint::Completion },
            model: &judged.model,
            revision: &live.model.revision,
            arrived: scope.arrived,
            prompt_tokens,
            caller,
        },
        held,
    )?;
    let ticket = Arc::new(Ticket::new(prompt_tokens));
    let (sink, answer) = if judged.output.stream {
        let buffer = Arc::new(StreamBuffer::new(account.clone()));
        (Sink::Stream(buffer.clone()), Answer::Stream(buffer))
    } else {
        let (sender, receiver) = oneshot::channel();
        (Sink::Whole(Some(sender)), Answer::Whole(receiver))
    };
    let prefix = if judged.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    live.demux.register(Registration {
        kind: judged.kind,
        id: format!("{prefix}-{id}"),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        model: judged.model,
        first,
        prompts: judged.prompts,
        n: judged.n,
        sampling: judged.sampling,
        output: judged.output,
        sink,
        ticket: ticket.clone(),
        account: account.clone(),
        arrived: scope.arrived,
        arrived_engine: live.engine.now().saturating_sub(scope.arrived.elapsed()),
    })?;
    let mut guard = LeaveGuard::new(ticket.clone(), live.engine.clone(), first);
    // The engine has ended if it refuses now; the demultiplexer then ends what was announced.
    guard.submit(admission).map_err(|error| refused(state, live, &guard, &error))?;
    guard.complete();
    scope.ticket = Some(ticket.clone());
    for length in lengths {
        state.metrics.prompt_tokens.add(length);
        state.metrics.request_prompt_tokens.observe(length as f64);
    }
    match answer {
        Answer::Stream(buffer) => {
            // The head of a 200 tells that there is a row.
            account.wait(Needs::Tokens(0), 503).await.inspect_err(|_| ticket.give_up(503))?;
            Ok(Reply::stream(StreamReader::new(buffer, state.config.error_message_copy, guard)))
        }
        Answer::Whole(receiver) => {
            let bytes = receiver.await.unwrap_or_else(|_| Err(ApiError::internal("the answer was lost")))?;
            account.wait(Needs::Closed, 503).await?;
            drop(guard);
            Ok(Reply::new(hyper::StatusCode::OK, JSON, bytes))
        }
    }
}

/// Takes the most that it may use from its application's limits. Its answers get no longer than those allow.
async fn reserve(state: &State, judged: &mut GenerationRequest, caller: &Caller) -> Result<Held, ApiError> {
    for prompt in &mut judged.prompts {
        prompt.max_tokens = quota::longest(caller, prompt.max_tokens);
    }
    let longest = judged.prompts.iter().map(|prompt| prompt.max_tokens).max().unwrap_or(0);
    let demand = Demand {
        prompt_tokens: judged.prompts.iter().map(|prompt| prompt.ids.len() as u64).sum(),
        max_output_tokens: longest.into(),
        choices: u64::from(judged.n) * judged.prompts.len() as u64,
    };
    quota::reserve(state, caller, demand).await
}

enum Answer {
    Stream(Arc<StreamBuffer>),
    Whole(oneshot::Receiver<Result<bytes::Bytes, ApiError>>),
}

fn engine_requests(
    state: &State,
    live: &Live,
    judged: &GenerationRequest,
    caller: &Caller,
    first: RequestId,
    scope: &Scope,
) -> Vec<EngineRequest> {
    let deadline = deadline(state, live, scope);
    let cache_salt = auth::cache_salt(caller, judged.cache_salt.as_deref());
    (0..)
        .zip(&judged.prompts)
        .map(|(i, prompt)| EngineRequest {
            task: Task::Generate,
            id: RequestId(first.0 + i),
            tenant: caller.tenant,
            weight: caller.weight,
            cache_salt,
            priority: 0,
            deadline: Some(deadline),
            prompt: prompt.ids.clone(),
            max_tokens: prompt.max_tokens,
            choices: judged.n,
            sampling: judged.sampling.clone(),
        })
        .collect()
}
