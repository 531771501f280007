//! What the connection's side and the engine's side know of a request.
//!
//! Owns the ticket, and the cancelling of what a client no longer waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use mirai_engine::{Admission, AdmissionError, EngineHandle, RequestId};

/// Somebody waits for the answer.
const HERE: u8 = 0;
/// The client is gone.
const LEFT: u8 = 1;
/// We gave the request up, and the client was told: the engine refused a part of it, or it cannot be accounted for.
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
    /// What its client has heard, if we gave it up.
    status: AtomicU16,
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
            status: AtomicU16::new(0),
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

    /// Gives the request up: what follows is not the client's doing. `status` is what it has heard.
    pub(crate) fn give_up(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
        self.let_go(REFUSED);
    }

    /// The status under which it was given up, if it was.
    pub(crate) fn given_up(&self) -> Option<u16> {
        (self.gone.load(Ordering::Acquire) == REFUSED).then(|| self.status.load(Ordering::Relaxed))
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

    /// Prompts that the engine has accepted.
    pub(crate) fn accepted(&self) -> u32 {
        self.accepted
    }

    /// The engine's id of the next prompt.
    pub(crate) fn next(&self) -> RequestId {
        RequestId(self.first.0 + u64::from(self.accepted))
    }

    /// Hands the next prompts to the engine; their ids begin with [`Self::next`].
    ///
    /// # Errors
    /// The engine's.
    pub(crate) fn submit(&mut self, admission: Admission) -> Result<(), AdmissionError> {
        let prompts = admission.len() as u32;
        admission.submit()?;
        self.accepted += prompts;
        Ok(())
    }

    /// The engine has all that it will get.
    pub(crate) fn complete(&self) {
        self.ticket.set_submitted(self.accepted);
    }

    /// Ends the request before its time: see [`Ticket::give_up`].
    pub(crate) fn give_up(&self, status: u16) {
        self.ticket.give_up(status);
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
