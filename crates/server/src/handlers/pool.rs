//! Embedding, rerank and score calls.
//!
//! Owns the way of a call's items into the engine: judged on a worker, announced to the demultiplexer, submitted
//! in a window that leaves room for others; and what undoes each step when the next one fails or the client
//! leaves.

use std::sync::Arc;

use hyper::Request;
use hyper::body::Incoming;
use mirai_engine::{AdmissionError, EngineHandle, EngineRequest, RequestId, SamplingParams, Task};
use tokio::sync::{oneshot, watch};

use super::admission::{attributed, deadline, refusal, serving};
use super::judged;
use crate::auth::{self, Caller};
use crate::demux::CallRegistration;
use crate::demux::sink::Ticket;
use crate::error::ApiError;
use crate::http::reply::{Reply, Scope};
use crate::pooling::answer::{self, Identity, Shape, Style};
use crate::pooling::{self, Body, PoolingRequest};
use crate::state::{Live, State};

/// Items of one call that are with the engine at the same time.
const WINDOW: u32 = 256;

/// Numbers from which an answer is written off the network's threads.
const LARGE_ANSWER: usize = 16_384;

/// Which body is to be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PoolKind {
    Embeddings,
    Rerank,
    Score,
}

/// Answers a call.
pub(crate) async fn pool(
    state: &Arc<State>,
    request: Request<Incoming>,
    caller: Caller,
    kind: PoolKind,
    scope: &mut Scope,
) -> Result<Reply, ApiError> {
    let live = serving(state)?.clone();
    let judged = judged(state, &live, request, move |judge| {
        let body = match kind {
            PoolKind::Embeddings => Body::Embeddings(judge.parse()?),
            PoolKind::Rerank => Body::Rerank(judge.parse()?),
            PoolKind::Score => Body::Score(judge.parse()?),
        };
        let texts = judge.state.config.rerank_documents_as_text;
        pooling::judge(body, judge.rules(), if texts { Style::Texts } else { Style::Objects })
    })
    .await?;
    // The drain may have begun while the body came.
    serving(state)?;
    let caller = attributed(state, caller, &judged.attribution, scope)?;
    admit(state, &live, judged, &caller, scope).await
}

/// Hands a judged call over, and answers.
async fn admit(
    state: &State,
    live: &Live,
    judged: PoolingRequest,
    caller: &Caller,
    scope: &mut Scope,
) -> Result<Reply, ApiError> {
    let PoolingRequest { model, items, shape, .. } = judged;
    let count = items.len() as u32;
    let first = state.ids.engine(count);
    let tokens = items.iter().map(|item| item.len() as u64).sum();
    let ticket = Arc::new(Ticket::new(tokens));
    let (sink, answer) = oneshot::channel();
    let (progress, ended) = watch::channel(0);
    live.demux.register_call(CallRegistration {
        first,
        items: count,
        ticket: ticket.clone(),
        arrived: scope.arrived,
        arrived_engine: live.engine.now().saturating_sub(scope.arrived.elapsed()),
        progress,
        sink,
    })?;
    let mut submission = Submission {
        template: EngineRequest {
            task: Task::Pool,
            id: first,
            tenant: caller.tenant,
            weight: caller.weight,
            cache_salt: auth::cache_salt(caller, None),
            priority: 0,
            deadline: Some(deadline(state, live, scope)),
            prompt: Arc::default(),
            max_tokens: 0,
            choices: 1,
            sampling: Arc::new(SamplingParams::default()),
        },
        engine: live.engine.clone(),
        ticket: ticket.clone(),
        accepted: 0,
        done: false,
    };
    for item in items {
        let length = item.len() as u64;
        match submission.submit(item, ended.clone()).await {
            Ok(true) => {}
            // It has failed already; the answer says why.
            Ok(false) => break,
            Err(error) => return Err(refusal(state, live, &error)),
        }
        scope.ticket.get_or_insert_with(|| ticket.clone());
        state.metrics.prompt_tokens.add(length);
        state.metrics.request_prompt_tokens.observe(length as f64);
    }
    let values = answer.await.unwrap_or_else(|_| Err(ApiError::internal("the answer was lost")))?;
    submission.done = true;
    drop(submission);
    let id = scope.id.trim_start_matches("req-").to_owned();
    write(shape, values, id, model, tokens).await
}

async fn write(
    shape: Shape,
    values: Vec<Box<[f32]>>,
    id: String,
    model: Arc<str>,
    tokens: u64,
) -> Result<Reply, ApiError> {
    let numbers: usize = values.iter().map(|values| values.len()).sum();
    let job = move || answer::write(shape, &values, Identity { id: &id, model: &model, tokens });
    if numbers < LARGE_ANSWER {
        return job();
    }
    let written = tokio::task::spawn_blocking(job).await;
    written.unwrap_or_else(|_| Err(ApiError::internal("this request failed; others are not affected")))
}

/// The items that the engine has taken. When it is dropped before the call is done, they are cancelled: the
/// client has left, or the call has failed.
struct Submission {
    template: EngineRequest,
    engine: EngineHandle,
    ticket: Arc<Ticket>,
    accepted: u32,
    done: bool,
}

impl Submission {
    /// Submits one item as soon as the window and the queue have room for it. A full queue refuses a call only
    /// if none of its items is there already. False if the call has ended meanwhile.
    async fn submit(
        &mut self,
        item: Arc<[u32]>,
        mut ended: watch::Receiver<u32>,
    ) -> Result<bool, AdmissionError> {
        let request = EngineRequest {
            id: RequestId(self.template.id.0 + u64::from(self.accepted)),
            prompt: item,
            ..self.template.clone()
        };
        loop {
            let seen = *ended.borrow_and_update();
            if ended.has_changed().is_err() {
                return Ok(false);
            }
            let under_way = self.accepted - seen;
            if under_way < WINDOW {
                match self.engine.submit(request.clone()) {
                    Ok(()) => {
                        self.accepted += 1;
                        return Ok(true);
                    }
                    Err(AdmissionError::QueueFull { .. } | AdmissionError::QueueTokensFull { .. })
                        if under_way > 0 => {}
                    Err(error) => return Err(error),
                }
            }
            if ended.changed().await.is_err() {
                return Ok(false);
            }
        }
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        self.ticket.set_submitted(self.accepted);
        if self.done {
            return;
        }
        self.ticket.leave();
        for item in 0..u64::from(self.accepted) {
            self.engine.cancel(RequestId(self.template.id.0 + item));
        }
    }
}
