//! Switches that only tests have (cargo feature `test-hooks`): freezing the engine's thread, and faults for a
//! chosen request at a chosen output token.
//!
//! Owns what was asked for; the engine asks it at the places where the real thing would happen. A release
//! binary has none of this.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::ids::RequestId;
use crate::step::RowFault;

/// Which sequences an injected fault meets. A black-box test knows no request id, but it chooses the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// Every choice of this request.
    Request(RequestId),
    /// One choice of this request.
    Choice(RequestId, u32),
    /// Every sequence that samples with this seed.
    Seed(u64),
}

/// What happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Injection {
    /// The executor reports this fault.
    Fault(RowFault),
    /// The engine's own per-request code panics.
    Panic,
}

#[derive(Debug)]
struct Armed {
    victim: Victim,
    index: u32,
    injection: Injection,
}

/// One engine's switches. Each injection happens once to each sequence that it meets.
#[derive(Debug, Default)]
pub struct TestHooks {
    /// Whether the thread shall stand still, and whether it does.
    frozen: Mutex<(bool, bool)>,
    thawed: Condvar,
    device_fault: AtomicBool,
    /// Whether `injections` is worth a lock.
    any: AtomicBool,
    injections: Mutex<Vec<Armed>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestHooks {
    /// Stops the engine's thread before its next step or its next idle beat (within about a second).
    pub fn freeze(&self) {
        lock(&self.frozen).0 = true;
    }

    /// Whether the thread has come to its standstill.
    pub fn is_frozen(&self) -> bool {
        lock(&self.frozen).1
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        lock(&self.frozen).0 = false;
        self.thawed.notify_all();
    }

    /// Makes the next step end in a device fault.
    pub fn fail_device(&self) {
        self.device_fault.store(true, Ordering::Release);
    }

    /// Makes output token `index` (from 0) of the victim end in a fault or a panic.
    pub fn inject(&self, victim: Victim, index: u32, injection: Injection) {
        lock(&self.injections).push(Armed { victim, index, injection });
        self.any.store(true, Ordering::Release);
    }

    pub(crate) fn pause_point(&self) {
        let mut frozen = lock(&self.frozen);
        while frozen.0 {
            frozen.1 = true;
            frozen = self.thawed.wait(frozen).unwrap_or_else(PoisonError::into_inner);
        }
        frozen.1 = false;
    }

    pub(crate) fn takes_device_fault(&self) -> bool {
        self.device_fault.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn injection(
        &self,
        request: RequestId,
        choice: u32,
        seed: u64,
        index: u32,
    ) -> Option<Injection> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let meets = |armed: &&Armed| {
            armed.index == index
                && match armed.victim {
                    Victim::Request(id) => id == request,
                    Victim::Choice(id, number) => id == request && number == choice,
                    Victim::Seed(number) => number == seed,
                }
        };
        lock(&self.injections).iter().find(meets).map(|armed| armed.injection.clone())
    }
}
