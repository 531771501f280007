//! What callers have told the engine's thread since it last looked.
//!
//! Owns the one lock between callers and the thread; it is held for a push or a swap, never while anything is
//! computed. It is not a channel because a cancel must neither be lost nor wait for a full queue: submissions
//! are bounded by the door, and cancels and stops are sets over the requests that live.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ids::RequestId;
use crate::request::EngineRequest;

/// Everything that arrived between two looks.
#[derive(Debug, Default)]
pub(crate) struct Letters {
    /// In order of arrival.
    pub(crate) submits: Vec<EngineRequest>,
    /// (request, choice) and how many of its tokens the caller keeps.
    pub(crate) stops: BTreeMap<(RequestId, u32), u32>,
    pub(crate) cancels: BTreeSet<RequestId>,
    /// How long running sequences may go on; the shortest that was asked for.
    pub(crate) shutdown: Option<Duration>,
    /// The thread has ended and reads no more.
    pub(crate) closed: bool,
}

impl Letters {
    pub(crate) fn is_empty(&self) -> bool {
        self.submits.is_empty() && self.stops.is_empty() && self.cancels.is_empty() && self.shutdown.is_none()
    }

    pub(crate) fn clear(&mut self) {
        self.submits.clear();
        self.stops.clear();
        self.cancels.clear();
        self.shutdown = None;
    }
}

#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
}

impl Mailbox {
    /// Lets `write` add something and wakes the thread.
    pub(crate) fn post(&self, write: impl FnOnce(&mut Letters)) {
        write(&mut self.lock());
        self.arrived.notify_one();
    }

    /// Swaps what has arrived into `letters`, which must be empty. Never waits for an arrival.
    pub(crate) fn take(&self, letters: &mut Letters) {
        debug_assert!(letters.is_empty(), "unread letters would be lost");
        std::mem::swap(&mut *self.lock(), letters);
    }

    /// Closes the box for good and returns what was still in it.
    pub(crate) fn close(&self) -> Letters {
        let mut guard = self.lock();
        std::mem::replace(&mut *guard, Letters { closed: true, ..Letters::default() })
    }

    /// Sleeps until something has arrived, or for `limit`. Returns whether something has.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let waited = self.arrived.wait_timeout_while(self.lock(), limit, |letters| letters.is_empty());
        let (letters, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !letters.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Letters> {
        // A push or a swap cannot leave the letters half written, so a poisoned lock is as good as another.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
