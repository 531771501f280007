//! Where an answer goes: a stream's buffer or a waiting handler; and what both sides know of the request.
//!
//! Owns the bounded buffer between the demultiplexer's thread and a connection's task. Each side holds the
//! lock for a copy of a pointer, never across I/O.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use mirai_engine::{AdmissionError, EngineHandle, EngineRequest, RequestId};
use tokio::sync::oneshot;

use crate::error::ApiError;

/// Bytes on their way to one client.
#[derive(Debug, Default)]
pub(crate) struct StreamBuffer {
    state: Mutex<StreamState>,
}

#[derive(Debug, Default)]
struct StreamState {
    bytes: Vec<u8>,
    finished: bool,
    waker: Option<Waker>,
}

impl StreamBuffer {
    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves `bytes` over. Returns false, and takes nothing, if more than `max` would wait.
    pub(crate) fn push(&self, bytes: &mut Vec<u8>, max: usize) -> bool {
        let waker = {
            let mut state = self.lock();
            if state.bytes.len() + bytes.len() > max {
                return false;
            }
            if state.bytes.is_empty() {
                std::mem::swap(&mut state.bytes, bytes);
            } else {
                state.bytes.extend_from_slice(bytes);
            }
            bytes.clear();
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Adds the last bytes, whatever waits already, and ends the stream.
    pub(crate) fn finish(&self, last: &[u8]) {
        let waker = {
            let mut state = self.lock();
            state.bytes.extend_from_slice(last);
            state.finished = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Everything that waits, as one frame.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut state = self.lock();
        if !state.bytes.is_empty() {
            return Poll::Ready(Some(std::mem::take(&mut state.bytes).into()));
        }
        if state.finished {
            return Poll::Ready(None);
        }
        if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// Where an answer goes.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Event by event.
    Stream(Arc<StreamBuffer>),
    /// At the end; `None` once it is sent.
    Whole(Option<oneshot::Sender<Result<Bytes, ApiError>>>),
}

/// Somebody waits for the answer.
const HERE: u8 = 0;
/// The client is gone.
const LEFT: u8 = 1;
/// The engine refused a part of the request, and the client was told.
const REFUSED: u8 = 2;

/// Not all prompts of the request have been handed to the engine yet.
const UNKNOWN: u32 = u32::MAX;

/// What the connection's side and the demultiplexer tell each other, and what the access log reports.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// Why nobody waits for the answer any more: one of the constants below.
    gone: AtomicU8,
    /// The answer is complete.
    finished: AtomicBool,
    /// Prompts that the engine has accepted.
    submitted: AtomicU32,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
    /// Arrival to first token, microseconds; 0 before it.
    pub(crate) first_token_micros: AtomicU64,
    outcome: AtomicU8,
}

/// How a request ended, in one word for the log.
pub(crate) const OUTCOMES: [&str; 5] = ["open", "ok", "error", "abort", "timeout"];

impl Ticket {
    pub(crate) fn new(prompt_tokens: u64) -> Self {
        Self {
            gone: AtomicU8::new(HERE),
            finished: AtomicBool::new(false),
            submitted: AtomicU32::new(UNKNOWN),
            prompt_tokens: AtomicU64::new(prompt_tokens),
            cached_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
            first_token_micros: AtomicU64::new(0),
            outcome: AtomicU8::new(0),
        }
    }

    /// Nobody waits for the answer any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire) != HERE
    }

    /// The client is gone, which is not what was done to it.
    pub(crate) fn has_left(&self) -> bool {
        self.gone.load(Ordering::Acquire) == LEFT
    }

    /// How many prompts the engine has accepted, once that is known.
    pub(crate) fn submitted(&self) -> Option<u32> {
        let submitted = self.submitted.load(Ordering::Acquire);
        (submitted != UNKNOWN).then_some(submitted)
    }

    fn set_submitted(&self, prompts: u32) {
        self.submitted.store(prompts, Ordering::Release);
    }

    /// The first reason why nobody waits any more stands; a finished request has none.
    fn let_go(&self, reason: u8) {
        if !self.finished.load(Ordering::Acquire) {
            // A failed exchange has found a reason.
            let _ = self.gone.compare_exchange(HERE, reason, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// The answer was complete and good: nothing is left to cancel.
    fn is_answered(&self) -> bool {
        self.finished.load(Ordering::Acquire) && self.outcome.load(Ordering::Relaxed) == 1
    }

    /// Marks the answer as complete: from now on nothing has to be cancelled.
    pub(crate) fn finish(&self, outcome: u8) {
        self.outcome.store(outcome, Ordering::Relaxed);
        self.finished.store(true, Ordering::Release);
    }

    pub(crate) fn outcome(&self) -> &'static str {
        match (usize::from(self.outcome.load(Ordering::Relaxed)), self.gone.load(Ordering::Acquire)) {
            (0, LEFT) => "abort",
            (0, REFUSED) => "error",
            (outcome, _) => OUTCOMES[outcome.min(OUTCOMES.len() - 1)],
        }
    }
}

/// What the engine has accepted of a request. It is cancelled when the request's connection lets go of this
/// before the answer is complete.
#[derive(Debug)]
pub(crate) struct LeaveGuard {
    ticket: Arc<Ticket>,
    engine: EngineHandle,
    /// The engine's id of the first prompt; the others follow.
    first: RequestId,
    accepted: u32,
}

impl LeaveGuard {
    pub(crate) fn new(ticket: Arc<Ticket>, engine: EngineHandle, first: RequestId) -> Self {
        Self { ticket, engine, first, accepted: 0 }
    }

    pub(crate) fn first(&self) -> RequestId {
        self.first
    }

    /// Prompts that the engine has accepted.
    pub(crate) fn accepted(&self) -> u32 {
        self.accepted
    }

    /// Hands the next prompt to the engine, under the next id.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) fn submit(&mut self, request: EngineRequest) -> Result<(), AdmissionError> {
        let id = RequestId(self.first.0 + u64::from(self.accepted));
        self.engine.submit(EngineRequest { id, ..request })?;
        self.accepted += 1;
        Ok(())
    }

    /// The engine has all that it will get.
    pub(crate) fn complete(&self) {
        self.ticket.set_submitted(self.accepted);
    }

    /// Ends the request because the engine refused its next prompt. Returns how many were accepted before.
    pub(crate) fn refuse(self) -> u32 {
        self.ticket.let_go(REFUSED);
        self.accepted
    }
}

impl Drop for LeaveGuard {
    fn drop(&mut self) {
        self.complete();
        if self.ticket.is_answered() {
            return;
        }
        self.ticket.let_go(LEFT);
        for prompt in 0..u64::from(self.accepted) {
            self.engine.cancel(RequestId(self.first.0 + prompt));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;

    struct Count(AtomicU32);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_waits_leaves_as_one_frame_and_wakes_once() {
        let buffer = StreamBuffer::default();
        let count = Arc::new(Count(AtomicU32::new(0)));
        let waker = Waker::from(count.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(buffer.poll(&mut cx).is_pending());
        assert!(buffer.push(&mut b"ab".to_vec(), 10));
        assert!(buffer.push(&mut b"cd".to_vec(), 10));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(matches!(buffer.poll(&mut cx), Poll::Ready(Some(bytes)) if bytes == "abcd"));
        buffer.finish(b"z");
        assert!(matches!(buffer.poll(&mut cx), Poll::Ready(Some(bytes)) if bytes == "z"));
        assert!(matches!(buffer.poll(&mut cx), Poll::Ready(None)));
    }

    #[test]
    fn a_full_buffer_takes_nothing_but_the_end() {
        let buffer = StreamBuffer::default();
        let mut bytes = b"abc".to_vec();
        assert!(!buffer.push(&mut bytes, 2));
        assert_eq!(bytes, b"abc");
        buffer.finish(b"end");
        let waker = Waker::noop();
        assert!(matches!(buffer.poll(&mut Context::from_waker(waker)), Poll::Ready(Some(b)) if b == "end"));
    }

    #[test]
    fn a_ticket_tells_how_it_ended() {
        let ticket = Ticket::new(3);
        assert_eq!((ticket.outcome(), ticket.submitted()), ("open", None));
        ticket.set_submitted(2);
        assert_eq!(ticket.submitted(), Some(2));
        ticket.let_go(LEFT);
        assert_eq!(ticket.outcome(), "abort");
        ticket.let_go(REFUSED);
        assert!(ticket.has_left(), "the first reason stands");
        ticket.finish(1);
        assert_eq!(ticket.outcome(), "ok");
    }

    #[test]
    fn a_refused_request_has_not_left_and_a_finished_one_is_not_gone() {
        let refused = Ticket::new(1);
        refused.let_go(REFUSED);
        assert_eq!((refused.is_gone(), refused.has_left(), refused.outcome()), (true, false, "error"));
        let finished = Ticket::new(1);
        finished.finish(2);
        finished.let_go(LEFT);
        assert_eq!((finished.is_gone(), finished.is_answered()), (false, false));
    }
}
