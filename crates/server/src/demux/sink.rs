//! Where an answer goes: a stream's buffer or a waiting handler; and what both sides know of the request.
//!
//! Owns the bounded buffer between the demultiplexer's thread and a connection's task. Each side holds the
//! lock for a copy of a pointer, never across I/O.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use mirai_engine::{EngineHandle, RequestId};
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

/// Not all prompts of the request have been handed to the engine yet.
const UNKNOWN: u32 = u32::MAX;

/// What the connection's side and the demultiplexer tell each other, and what the access log reports.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// The client is gone, or the request was refused half way.
    gone: AtomicBool,
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
            gone: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            submitted: AtomicU32::new(UNKNOWN),
            prompt_tokens: AtomicU64::new(prompt_tokens),
            cached_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
            first_token_micros: AtomicU64::new(0),
            outcome: AtomicU8::new(0),
        }
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// How many prompts the engine has accepted, once that is known.
    pub(crate) fn submitted(&self) -> Option<u32> {
        let submitted = self.submitted.load(Ordering::Acquire);
        (submitted != UNKNOWN).then_some(submitted)
    }

    pub(crate) fn set_submitted(&self, prompts: u32) {
        self.submitted.store(prompts, Ordering::Release);
    }

    /// The client is gone, or the request was refused half way. A finished one is neither.
    pub(crate) fn leave(&self) {
        if !self.finished.load(Ordering::Acquire) {
            self.gone.store(true, Ordering::Release);
        }
    }

    /// Marks the answer as complete: from now on nothing has to be cancelled.
    pub(crate) fn finish(&self, outcome: u8) {
        self.outcome.store(outcome, Ordering::Relaxed);
        self.finished.store(true, Ordering::Release);
    }

    pub(crate) fn outcome(&self) -> &'static str {
        let outcome = usize::from(self.outcome.load(Ordering::Relaxed));
        if self.is_gone() && outcome == 0 { "abort" } else { OUTCOMES[outcome.min(OUTCOMES.len() - 1)] }
    }
}

/// Cancels what is left of a request when its connection lets go of it.
#[derive(Debug)]
pub(crate) struct LeaveGuard {
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) engine: EngineHandle,
    pub(crate) first: RequestId,
    pub(crate) prompts: u32,
}

impl Drop for LeaveGuard {
    fn drop(&mut self) {
        if self.ticket.finished.load(Ordering::Acquire) {
            return;
        }
        self.ticket.gone.store(true, Ordering::Release);
        for i in 0..self.prompts {
            self.engine.cancel(RequestId(self.first.0 + u64::from(i)));
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
        ticket.gone.store(true, Ordering::Release);
        assert_eq!(ticket.outcome(), "abort");
        ticket.finish(1);
        assert_eq!(ticket.outcome(), "ok");
    }
}
