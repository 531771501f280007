//! The bytes of one stream between the demultiplexer's thread and its connection's task.
//!
//! Owns the bounded buffer, and the order in which bytes leave: none before what they tell is durable. Each side
//! holds the lock for a copy of a pointer, never across I/O.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;

use super::ticket::LeaveGuard;
use crate::account::{Account, Needs};
use crate::error::ApiError;
use crate::format::chunk;

/// Bytes on their way to one client.
#[derive(Debug, Default)]
pub(crate) struct StreamBuffer {
    /// Says which of them may leave.
    account: Account,
    state: Mutex<StreamState>,
}

/// A batch of bytes, and what must be durable before it leaves.
#[derive(Debug)]
struct Mark {
    /// Where it ends in `bytes`.
    end: usize,
    needs: Needs,
}

#[derive(Debug, Default)]
struct StreamState {
    bytes: Vec<u8>,
    /// In order; empty without a row.
    marks: VecDeque<Mark>,
    finished: bool,
    waker: Option<Waker>,
}

/// What a stream has for its client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Polled {
    /// These bytes.
    Bytes(Bytes),
    /// Nothing more.
    End,
    /// Nothing yet; the waker is told.
    Nothing,
    /// Bytes that may not leave before this is durable.
    Held(Needs),
}

impl StreamBuffer {
    pub(crate) fn new(account: Account) -> Self {
        Self { account, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, state: &mut StreamState, needs: Needs) {
        if self.account.exists() {
            state.marks.push_back(Mark { end: state.bytes.len(), needs });
        }
    }

    /// Moves `bytes` over, with which `tokens` tokens in all have left. Returns false, and takes nothing, if more
    /// than `max` bytes would wait.
    pub(crate) fn push(&self, bytes: &mut Vec<u8>, tokens: u64, max: usize) -> bool {
        let waker = {
            let mut state = self.lock();
            if state.finished {
                // The reader has broken off.
                bytes.clear();
                return true;
            }
            if state.bytes.len() + bytes.len() > max {
                return false;
            }
            if state.bytes.is_empty() {
                std::mem::swap(&mut state.bytes, bytes);
            } else {
                state.bytes.extend_from_slice(bytes);
            }
            bytes.clear();
            self.mark(&mut state, Needs::Tokens(tokens));
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
            if state.finished {
                return;
            }
            state.bytes.extend_from_slice(last);
            state.finished = true;
            self.mark(&mut state, Needs::Closed);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Everything that waits and may leave, as one frame.
    pub(crate) fn poll(&self, cx: &Context<'_>) -> Polled {
        let mut state = self.lock();
        if state.bytes.is_empty() {
            if state.finished {
                return Polled::End;
            }
            if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
            return Polled::Nothing;
        }
        let mut free = if self.account.exists() { 0 } else { state.bytes.len() };
        while let Some(mark) = state.marks.front() {
            if !self.account.permits(mark.needs) {
                if free == 0 {
                    return Polled::Held(mark.needs);
                }
                break;
            }
            free = mark.end;
            state.marks.pop_front();
        }
        let rest = state.bytes.split_off(free);
        state.marks.iter_mut().for_each(|mark| mark.end -= free);
        Polled::Bytes(std::mem::replace(&mut state.bytes, rest).into())
    }
}

type Wait = Pin<Box<dyn Future<Output = Result<(), ApiError>> + Send>>;

/// The client's end of a stream. When it is dropped, what still runs of the request is cancelled.
pub(crate) struct StreamReader {
    buffer: Arc<StreamBuffer>,
    /// For what the ledger has to write before the next bytes may leave.
    wait: Option<Wait>,
    error_message_copy: bool,
    guard: LeaveGuard,
}

impl std::fmt::Debug for StreamReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamReader").field("buffer", &self.buffer).finish_non_exhaustive()
    }
}

impl StreamReader {
    pub(crate) fn new(buffer: Arc<StreamBuffer>, error_message_copy: bool, guard: LeaveGuard) -> Self {
        Self { buffer, wait: None, error_message_copy, guard }
    }

    /// The next frame; `None` after the last.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(wait) = &mut self.wait {
                let waited = ready!(wait.as_mut().poll(cx));
                self.wait = None;
                if let Err(error) = waited {
                    return Poll::Ready(Some(self.break_off(&error)));
                }
            }
            match self.buffer.poll(cx) {
                Polled::Bytes(bytes) => return Poll::Ready(Some(bytes)),
                Polled::End => return Poll::Ready(None),
                Polled::Nothing => return Poll::Pending,
                // The head has left as 200.
                Polled::Held(needs) => {
                    self.wait = Some(Box::pin(self.buffer.account.clone().wait(needs, 200)));
                }
            }
        }
    }

    /// What waits may not leave: the client hears why, and no end that sounds like one.
    fn break_off(&mut self, error: &ApiError) -> Bytes {
        // Its head has left.
        self.guard.give_up(200);
        let mut out = Vec::new();
        chunk::error(&mut out, error, self.error_message_copy);
        let mut state = self.buffer.lock();
        *state = StreamState { finished: true, ..StreamState::default() };
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;

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
        let cx = Context::from_waker(&waker);
        assert_eq!(buffer.poll(&cx), Polled::Nothing);
        assert!(buffer.push(&mut b"ab".to_vec(), 1, 10));
        assert!(buffer.push(&mut b"cd".to_vec(), 2, 10));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(buffer.poll(&cx), Polled::Bytes("abcd".into()));
        buffer.finish(b"z");
        assert_eq!(buffer.poll(&cx), Polled::Bytes("z".into()));
        assert_eq!(buffer.poll(&cx), Polled::End);
    }

    #[test]
    fn a_full_buffer_takes_nothing_but_the_end() {
        let buffer = StreamBuffer::default();
        let mut bytes = b"abc".to_vec();
        assert!(!buffer.push(&mut bytes, 1, 2));
        assert_eq!(bytes, b"abc");
        buffer.finish(b"end");
        assert_eq!(buffer.poll(&Context::from_waker(Waker::noop())), Polled::Bytes("end".into()));
    }
}
