//! How the rest of the process talks to the engine's thread.
//!
//! Owns the handle, the decision at the door, and the view of the engine's health. Nothing here waits for the
//! engine's thread, so a frozen engine can never freeze a caller.

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::config::EngineConfig;
use crate::door::{AdmissionError, Door};
use crate::ids::RequestId;
use crate::mailbox::Mailbox;
use crate::queue::Queue;
use crate::request::EngineRequest;
use crate::stats::{Counters, EngineStats};
use crate::step::Geometry;
use crate::time::Time;

/// Any error of the code that loads an executor.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The executor could not be loaded.
    #[error(transparent)]
    Executor(BoxError),
    /// The executor has no room for even one sequence of one token.
    #[error("the executor has no room: {0}")]
    Geometry(String),
    /// The operating system refused a thread.
    #[error("cannot start the engine's thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The code that loads the executor panicked.
    #[error("loading the executor panicked: {0}")]
    Panic(String),
}

/// What an outside observer may say about the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineHealth {
    /// The thread lives. It beats at least once a step, and about once a second while idle: a
    /// `last_progress` of many seconds means that it hangs, busy or not.
    Running {
        /// Whether any sequence runs or waits.
        busy: bool,
        /// Time since the last beat.
        last_progress: Duration,
    },
    /// It ended because it was told to.
    Stopped,
    /// It ended by a fault of the device or a bug; the process should exit.
    Dead(String),
}

/// State that the thread and all handles see.
pub(crate) struct Shared {
    pub(crate) epoch: Instant,
    pub(crate) geometry: Geometry,
    pub(crate) door: Door,
    pub(crate) stats: EngineStats,
    pub(crate) mailbox: Mailbox,
    /// Nanoseconds since `epoch` of the last beat.
    pub(crate) beat: AtomicU64,
    pub(crate) busy: AtomicBool,
    pub(crate) stopping: AtomicBool,
    pub(crate) stopped: AtomicBool,
    pub(crate) dead: OnceLock<String>,
    /// Requests between the door and their first slot.
    pub(crate) queue: Queue,
    #[cfg(feature = "test-hooks")]
    pub(crate) hooks: Arc<crate::hooks::TestHooks>,
}

impl Shared {
    pub(crate) fn new(config: &EngineConfig, geometry: Geometry) -> Self {
        Self {
            epoch: Instant::now(),
            door: Door::new(config, &geometry),
            geometry,
            stats: EngineStats::default(),
            mailbox: Mailbox::default(),
            beat: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            dead: OnceLock::new(),
            queue: Queue::new(config.max_queued_requests, config.max_queued_tokens),
            #[cfg(feature = "test-hooks")]
            hooks: Arc::default(),
        }
    }

    pub(crate) fn now(&self) -> Time {
        self.epoch.elapsed()
    }

    pub(crate) fn beat(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
        let nanos = u64::try_from(self.now().as_nanos()).unwrap_or(u64::MAX);
        self.beat.store(nanos, Ordering::Release);
    }
}

/// Ends the engine when the last handle is gone: nobody could speak to it any more.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.mailbox.post(|letters| letters.shutdown = Some(Duration::ZERO));
    }
}

/// Room in the queue, held for requests that come together.
#[must_use = "dropped, it gives its room back and nothing is queued"]
pub struct Admission {
    owner: Arc<Owner>,
    /// Empty once they are queued.
    requests: Vec<EngineRequest>,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission").field("requests", &self.requests.len()).finish_non_exhaustive()
    }
}

impl Admission {
    /// Requests in it.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "who holds room for nothing has no use for it")]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Queues all of them. From `Ok` on, exactly one [`Event::Finished`] comes for each of their choices.
    ///
    /// # Errors
    /// The engine takes no more; nothing was queued.
    pub fn submit(mut self) -> Result<(), AdmissionError> {
        let shared = &self.owner.0;
        let mut accepted = false;
        let requests = &mut self.requests;
        shared.mailbox.post(|letters| {
            // Decided under the mailbox's lock: the thread closes the box under the same lock when it ends,
            // so no accepted request is left unread.
            accepted = !letters.closed;
            if accepted {
                letters.submits.append(requests);
            }
        });
        if accepted {
            return Ok(());
        }
        Err(shared.dead.get().map_or(AdmissionError::Stopping, |reason| AdmissionError::Dead(reason.clone())))
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        // What was queued keeps its room until it has a slot.
        if !self.requests.is_empty() {
            self.owner
                .0
                .queue
                .leave(self.requests.iter().map(|request| (request.tenant, 1, request.prompt.len())));
        }
    }
}

/// The rest of the process's end of the engine. Cheap to clone; every method returns at once. The engine ends
/// when the last clone is dropped.
#[derive(Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").field("health", &self.health()).finish_non_exhaustive()
    }
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { owner: Arc::new(Owner(shared)) }
    }

    fn shared(&self) -> &Shared {
        &self.owner.0
    }

    /// Holds room in the queue for all of these requests of one tenant, or for none. Nothing is queued before
    /// [`Admission::submit`]: a caller has time to do what must come between, and gives the room back by dropping
    /// it. A full queue still takes those of a tenant that has less than its share of it.
    ///
    /// # Errors
    /// One of them can never fit, the queue is full, or the engine takes no more.
    ///
    /// # Panics
    /// The requests are of several tenants.
    pub fn reserve(&self, requests: Vec<EngineRequest>) -> Result<Admission, AdmissionError> {
        let shared = self.shared();
        if let Some(reason) = shared.dead.get() {
            return Err(AdmissionError::Dead(reason.clone()));
        }
        if shared.stopping.load(Ordering::Acquire) {
            return Err(AdmissionError::Stopping);
        }
        requests.iter().try_for_each(|request| shared.door.check(request))?;
        if let Some(first) = requests.first() {
            let (tenant, weight) = (first.tenant, first.weight);
            assert!(requests.iter().all(|request| request.tenant == tenant), "requests of several tenants");
            let tokens = requests.iter().map(|request| request.prompt.len()).sum();
            shared.queue.enter(tenant, weight, requests.len(), tokens)?;
        }
        // From here on dropping it gives the room back.
        Ok(Admission { owner: Arc::clone(&self.owner), requests })
    }

    /// Hands a request over. From `Ok` on, exactly one [`Event::Finished`] comes for each of its choices.
    ///
    /// # Errors
    /// The request can never fit, the queue is full, or the engine takes no more.
    pub fn submit(&self, request: EngineRequest) -> Result<(), AdmissionError> {
        self.reserve(vec![request])?.submit()
    }

    /// Ends all choices of a request with [`crate::FinishReason::Cancelled`]. Unknown or ended ones are ignored.
    pub fn cancel(&self, request: RequestId) {
        self.shared().mailbox.post(|letters| {
            if !letters.closed {
                letters.cancels.insert(request);
            }
        });
    }

    /// Ends one choice with [`crate::FinishReason::Stopped`]: the demultiplexer found a stop condition after
    /// `kept_tokens` output tokens. Later tokens count as wasted. Where the choice has already ended, nothing
    /// happens, and the caller's own `kept_tokens` stands over the `completion_tokens` of its
    /// [`Event::Finished`]; what lies between is wasted.
    pub fn stop(&self, request: RequestId, choice: u32, kept_tokens: u32) {
        self.shared().mailbox.post(|letters| {
            if !letters.closed {
                letters.stops.entry((request, choice)).or_insert(kept_tokens);
            }
        });
    }

    /// The live counters.
    #[must_use]
    pub fn stats(&self) -> &EngineStats {
        &self.shared().stats
    }

    /// The counters now, with what waits between the door and the engine's thread.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut counters = self.shared().stats.snapshot();
        let (requests, tokens) = self.shared().queue.len();
        (counters.queued_requests, counters.queued_tokens) = (requests as u64, tokens as u64);
        counters
    }

    /// Time since the engine's start: what deadlines are measured in.
    #[must_use]
    pub fn now(&self) -> Time {
        self.shared().now()
    }

    /// Whether the engine lives and moves.
    #[must_use]
    pub fn health(&self) -> EngineHealth {
        let shared = self.shared();
        if let Some(reason) = shared.dead.get() {
            return EngineHealth::Dead(reason.clone());
        }
        if shared.stopped.load(Ordering::Acquire) {
            return EngineHealth::Stopped;
        }
        let beat = Duration::from_nanos(shared.beat.load(Ordering::Acquire));
        EngineHealth::Running {
            busy: shared.busy.load(Ordering::Relaxed) || shared.queue.len().0 > 0,
            last_progress: shared.now().saturating_sub(beat),
        }
    }

    /// What the executor has room for.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.shared().geometry
    }

    /// Tokens of the longest prompt that the door could let in: the context, or what one step holds where
    /// prompts are computed whole.
    #[must_use]
    pub fn max_prompt_tokens(&self) -> u32 {
        self.shared().door.max_prompt()
    }

    /// Takes no more requests, lets the accepted ones go on for `grace`, then ends the rest with
    /// [`crate::FinishReason::EngineStopped`] and ends the thread; the receiver of events then disconnects.
    /// Returns at once. Of several calls the shortest grace counts.
    pub fn shutdown(&self, grace: Duration) {
        self.shared().stopping.store(true, Ordering::Release);
        self.shared().mailbox.post(|letters| {
            letters.shutdown = Some(letters.shutdown.map_or(grace, |other| other.min(grace)));
        });
    }

    /// Switches for tests.
    #[cfg(feature = "test-hooks")]
    #[must_use]
    pub fn hooks(&self) -> &crate::hooks::TestHooks {
        &self.shared().hooks
    }
}
