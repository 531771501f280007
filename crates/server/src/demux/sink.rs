//! Where an answer goes: a stream's buffer or a waiting handler; and what both sides know of the request.
//!
//! Owns the ticket, and the cancelling of what a client no longer waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bytes::Bytes;
use mirai_engine::{EngineHandle, RequestId};
use tokio::sync::oneshot;

use super::stream::StreamBuffer;
use crate::error::ApiError;

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
    /// The status under which we gave it up, before its connection lets go of it; 0 if we did not.
    failed: AtomicU16,
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
            failed: AtomicU16::new(0),
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

    /// Gives the request up: what follows is not the client's doing. `status` is what it has heard.
    pub(crate) fn fail(&self, status: u16) {
        self.failed.store(status, Ordering::Release);
    }

    /// The status under which it was given up, if it was.
    pub(crate) fn failure(&self) -> Option<u16> {
        let status = self.failed.load(Ordering::Acquire);
        (status != 0).then_some(status)
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
