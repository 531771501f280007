//! Embedding, rerank and score calls.
//!
//! Owns the way of a call's items into the engine: judged on a worker, announced to the demultiplexer, submitted
//! in a window that leaves room for others; and what undoes each step when the next one fails or the client
//! leaves.

use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use mirai_engine::{AdmissionError, EngineHandle, EngineRequest, SamplingParams, Task};
use mirai_ledger::quota::Demand;
use tokio::sync::{oneshot, watch};

use super::admission::{account, attributed, deadline, refusal, refused, serving};
use super::judged;
use crate::account::{Charge, Needs};
use crate::api::common::Impacts;
use crate::api::pooling::PoolingUsage;
use crate::auth::{self, Caller};
use crate::demux::ticket::{LeaveGuard, Ticket};
use crate::demux::{CallRegistration, Pooled};
use crate::error::ApiError;
use crate::http::reply::{Reply, Scope};
use crate::pooling::answer::{self, Identity, Shape, Style};
use crate::pooling::{self, Body, PoolingRequest};
use crate::quota;
use crate::state::{Live, State};

/// Items of one call that are with the engine at the same time.
const WINDOW: u32 = 256;

/// How long a call that has begun waits for room in a queue that others fill, before it looks again.
const RETRY: Duration = Duration::from_millis(20);

/// Bytes from which an answer is written off the network's threads.
const LARGE_ANSWER: usize = 128 << 10;

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
    // What the answer repeats stays within the budget of bodies until it is written.
    let (judged, _held) = judged(state, &live, request, move |judge| {
        let body = match kind {
            PoolKind::Embeddings => Body::Embeddings(judge.parse()?),
            PoolKind::Rerank => Body::Rerank(judge.parse()?),
            PoolKind::Score => Body::Score(judge.parse()?),
        };
        let texts = judge.state.config.rerank_documents_as_text;
        let style = if texts { Style::Texts } else { Style::Objects };
        let request = pooling::judge(body, judge.rules(), style)?;
        let held = judge.keep(request.shape.repeated_bytes());
        Ok((request, held))
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
    let lengths: Vec<u64> = items.iter().map(|item| item.len() as u64).collect();
    let tokens: u64 = lengths.iter().sum();
    let demand = Demand { prompt_tokens: tokens, max_output_tokens: 0, choices: 0 };
    let held = quota::reserve(state, caller, demand).await?;
    let template = EngineRequest {
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
    };
    let id = scope.id.trim_start_matches("req-").to_owned();
    let mut items = items.into_iter();
    // Room for the first item first: what is refused leaves no row.
    let requests = items.next().map(|prompt| EngineRequest { prompt, ..template.clone() });
    let admission = live.engine.reserve(requests.into_iter().collect());
    let admission = admission.map_err(|error| refusal(state, live, &error))?;
    let charge = Charge {
        id: &id,
        endpoint: shape.endpoint(),
        model: &model,
        revision: &live.model.revision,
        arrived: scope.arrived,
        prompt_tokens: tokens,
        caller,
    };
    let account = account(state, &charge, held)?;
    let ticket = Arc::new(Ticket::new(tokens));
    let (sink, answer) = oneshot::channel();
    let (progress, ended) = watch::channel(0);
    live.demux.register(CallRegistration {
        first,
        items: count,
        ticket: ticket.clone(),
        account: account.clone(),
        arrived: scope.arrived,
        arrived_engine: live.engine.now().saturating_sub(scope.arrived.elapsed()),
        progress,
        sink,
    })?;
    let guard = LeaveGuard::new(ticket.clone(), live.engine.clone(), first);
    let mut submission = Submission { template, guard, engine: live.engine.clone() };
    scope.ticket = Some(ticket);
    state.metrics.prompt_tokens.add(tokens);
    for length in lengths {
        state.metrics.request_prompt_tokens.observe(length as f64);
    }
    let mut submitted = submission.guard.submit(admission).map(|()| true);
    while let Ok(true) = submitted
        && let Some(item) = items.next()
    {
        submitted = submission.submit(item, ended.clone()).await;
    }
    // Without an error: all are submitted, or the call has failed already, and the answer says why.
    if let Err(error) = submitted {
        return Err(refused(state, live, &submission.guard, &error));
    }
    let pooled = answer.await.unwrap_or_else(|_| Err(ApiError::internal("the answer was lost")))?;
    drop(submission);
    account.wait(Needs::Closed, 503).await?;
    write(shape, pooled, id, model, tokens).await
}

async fn write(
    shape: Shape,
    pooled: Pooled,
    id: String,
    model: Arc<str>,
    tokens: u64,
) -> Result<Reply, ApiError> {
    let Pooled { values, cost, impacts } = pooled;
    let impacts = impacts.map(|(kwh, kgco2eq)| Impacts { kwh, kgco2eq });
    let usage = PoolingUsage { prompt_tokens: tokens, total_tokens: tokens, cost, impacts };
    let bytes = shape.answer_bytes(&values);
    written(bytes, move || answer::write(shape, &values, Identity { id: &id, model: &model, usage })).await
}

/// Runs what writes an answer of about `bytes`: where it is called, or, if that would hold up other connections,
/// on a thread that may be busy for long.
async fn written<T: Send + 'static>(
    bytes: usize,
    job: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes < LARGE_ANSWER {
        return job();
    }
    let written = tokio::task::spawn_blocking(job).await;
    written.unwrap_or_else(|_| Err(ApiError::internal("this request failed; others are not affected")))
}

/// A call's way into the engine, item by item.
struct Submission {
    /// Each item, but for its id and its prompt.
    template: EngineRequest,
    guard: LeaveGuard,
    engine: EngineHandle,
}

impl Submission {
    /// Submits one item as soon as the window and the queue have room for it. A full queue refuses a call only
    /// if nothing of it was accepted, or if its time is over: what is computed already is not thrown away. False
    /// if the call has ended meanwhile.
    async fn submit(
        &mut self,
        item: Arc<[u32]>,
        mut ended: watch::Receiver<u32>,
    ) -> Result<bool, AdmissionError> {
        let request = EngineRequest { prompt: item, ..self.template.clone() };
        loop {
            let seen = *ended.borrow_and_update();
            if ended.has_changed().is_err() {
                return Ok(false);
            }
            if self.guard.accepted() - seen < WINDOW {
                let request = EngineRequest { id: self.guard.next(), ..request.clone() };
                let submitted = self.engine.reserve(vec![request]).and_then(|room| self.guard.submit(room));
                match submitted {
                    Ok(()) => return Ok(true),
                    Err(AdmissionError::QueueFull { .. } | AdmissionError::QueueTokensFull { .. })
                        if self.guard.accepted() > 0 && self.has_time() => {}
                    Err(error) => return Err(error),
                }
            }
            // The call's own items tell of their end, those of others do not.
            if let Ok(Err(_)) = tokio::time::timeout(RETRY, ended.changed()).await {
                return Ok(false);
            }
        }
    }

    fn has_time(&self) -> bool {
        self.template.deadline.is_none_or(|deadline| self.engine.now() < deadline)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mirai_engine::sim::{SimConfig, SimExecutor};
    use mirai_engine::{EngineConfig, Geometry, RequestId, TenantId};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn large_answers_are_written_off_the_networks_threads() {
        let thread = || Ok(std::thread::current().id());
        let own = std::thread::current().id();
        assert_eq!(written(LARGE_ANSWER - 1, thread).await.unwrap(), own);
        assert_ne!(written(LARGE_ANSWER, thread).await.unwrap(), own);
        let lost = written::<()>(LARGE_ANSWER, || panic!("injected into one answer")).await;
        assert_eq!(lost.unwrap_err().code, "internal_error");
    }

    /// An engine that takes items and computes none until this is dropped: it could not end either.
    struct Frozen(EngineHandle);

    impl std::ops::Deref for Frozen {
        type Target = EngineHandle;

        fn deref(&self) -> &EngineHandle {
            &self.0
        }
    }

    impl Drop for Frozen {
        fn drop(&mut self) {
            self.hooks().thaw();
        }
    }

    /// A frozen engine, and a call that has submitted nothing yet.
    async fn frozen(max_queued_requests: usize) -> (Frozen, Submission) {
        let geometry = Geometry {
            groups: Vec::new(),
            blocks: 0,
            slots: 4,
            snapshots: 0,
            max_step_tokens: 16,
            max_context: 16,
            vocab: 2,
            generates: false,
            pools: true,
            whole_prompts: true,
        };
        let config = EngineConfig { max_queued_requests, ..EngineConfig::default() };
        let make = move || Ok(Box::new(SimExecutor::new(SimConfig::new(geometry))) as _);
        let (engine, events) = mirai_engine::start(config, make).unwrap();
        std::thread::spawn(move || while events.recv().is_ok() {});
        let engine = Frozen(engine);
        engine.hooks().freeze();
        while !engine.hooks().is_frozen() {
            tokio::task::yield_now().await;
        }
        let submission = Submission {
            template: EngineRequest {
                task: Task::Pool,
                id: RequestId(1),
                tenant: TenantId(0),
                weight: 1,
                cache_salt: 0,
                priority: 0,
                deadline: Some(engine.now() + PATIENCE),
                prompt: Arc::default(),
                max_tokens: 0,
                choices: 1,
                sampling: Arc::new(SamplingParams::default()),
            },
            guard: guard(&engine),
            engine: engine.0.clone(),
        };
        (engine, submission)
    }

    fn guard(engine: &EngineHandle) -> LeaveGuard {
        LeaveGuard::new(Arc::new(Ticket::new(0)), engine.clone(), RequestId(1))
    }

    fn item() -> Arc<[u32]> {
        [1].into()
    }

    #[tokio::test]
    async fn a_call_that_has_begun_waits_for_a_queue_that_others_fill() {
        let (engine, mut call) = frozen(1).await;
        let (progress, ended) = watch::channel(0);
        assert_eq!(call.submit(item(), ended.clone()).await, Ok(true));
        // All of its own has ended, and yet the queue is full.
        progress.send_replace(1);
        let waits = tokio::time::timeout(RETRY * 5, call.submit(item(), ended.clone())).await;
        assert!(waits.is_err(), "{waits:?}");
        engine.hooks().thaw();
        let goes_on = tokio::time::timeout(PATIENCE, call.submit(item(), ended.clone())).await;
        assert_eq!(goes_on, Ok(Ok(true)));
        assert_eq!(call.guard.accepted(), 2);
        // The call was decided: whoever waits is told.
        drop(progress);
        assert_eq!(call.submit(item(), ended).await, Ok(false));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_a_call_of_which_nothing_was_accepted_or_whose_time_is_over() {
        let (engine, mut call) = frozen(1).await;
        let (_progress, ended) = watch::channel(0);
        assert_eq!(call.submit(item(), ended.clone()).await, Ok(true));
        call.template.deadline = Some(engine.now());
        let full = Err(AdmissionError::QueueFull { queued: 1, limit: 1 });
        assert_eq!(call.submit(item(), ended.clone()).await, full);
        call.template.deadline = None;
        call.guard = guard(&engine);
        assert_eq!(call.submit(item(), ended).await, full);
    }

    #[tokio::test]
    async fn a_call_has_at_most_a_windows_items_with_the_engine() {
        let (engine, mut call) = frozen(2 * WINDOW as usize).await;
        let (progress, ended) = watch::channel(0);
        for _ in 0..WINDOW {
            assert_eq!(call.submit(item(), ended.clone()).await, Ok(true));
        }
        let waits = tokio::time::timeout(RETRY * 5, call.submit(item(), ended.clone())).await;
        assert!(waits.is_err(), "{waits:?}");
        assert_eq!(engine.counters().queued_requests, u64::from(WINDOW));
        progress.send_replace(1);
        assert_eq!(call.submit(item(), ended.clone()).await, Ok(true));
        let waits = tokio::time::timeout(RETRY * 5, call.submit(item(), ended)).await;
        assert!(waits.is_err(), "one place was free: {waits:?}");
    }
}
