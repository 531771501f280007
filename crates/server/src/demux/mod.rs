//! The demultiplexer: one thread that turns the engine's events into answers.
//!
//! Owns the open requests, their text and their buffers. It never blocks on a client, takes one short lock for
//! each stream and batch, and survives a panic in the code of one request.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod boundary_tests;
mod choice;
mod clock;
mod group;
mod outcome;
mod pending;
mod pooling;
mod settle;
pub(crate) mod sink;
pub(crate) mod stream;
mod text;
pub(crate) mod ticket;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mirai_engine::{EngineHandle, Event, RequestId};
use tokio::sync::Notify;

pub(crate) use group::Registration;
pub(crate) use pooling::{Pooled, Registration as CallRegistration};

use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::model::ModelInfo;
use group::Group;
use pooling::Calls;

/// What the code of one request may use.
pub(crate) struct Context {
    pub(crate) model: Arc<ModelInfo>,
    pub(crate) engine: EngineHandle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) max_stream_buffer: usize,
    pub(crate) error_message_copy: bool,
}

/// A request on its way into the demultiplexer.
#[derive(Debug)]
pub(crate) enum Announced {
    /// Ends in text.
    Group(Box<Registration>),
    /// Ends in pooling.
    Call(CallRegistration),
}

impl From<Registration> for Announced {
    fn from(registration: Registration) -> Self {
        Self::Group(Box::new(registration))
    }
}

impl From<CallRegistration> for Announced {
    fn from(registration: CallRegistration) -> Self {
        Self::Call(registration)
    }
}

/// What the connections' side leaves for the thread.
#[derive(Debug, Default)]
struct Inbox {
    announced: Vec<Announced>,
    /// Ends every request with this error.
    abort: Option<ApiError>,
    /// The thread is gone.
    closed: bool,
}

/// The connections' end of the demultiplexer.
#[derive(Clone, Debug)]
pub(crate) struct Demux {
    inbox: Arc<Mutex<Inbox>>,
    /// Told when the engine's events end.
    ended: Arc<Notify>,
}

fn lock(inbox: &Mutex<Inbox>) -> MutexGuard<'_, Inbox> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Demux {
    /// Starts the thread. It ends when the engine's events end, after failing what is open.
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub(crate) fn start(
        context: Context,
        events: Receiver<Vec<Event>>,
        ping_every: Option<Duration>,
    ) -> std::io::Result<Self> {
        let demux = Self { inbox: Arc::default(), ended: Arc::default() };
        let thread = Thread {
            inbox: demux.inbox.clone(),
            ended: demux.ended.clone(),
            context,
            groups: Vec::new(),
            free: Vec::new(),
            requests: HashMap::new(),
            calls: Calls::default(),
            dirty: Vec::new(),
            ping_every,
            next_tick: Instant::now(),
        };
        std::thread::Builder::new().name("demux".to_owned()).spawn(move || thread.run(&events))?;
        Ok(demux)
    }

    /// Announces a request. Must come before the first part of it goes to the engine. Fails if the thread is gone.
    pub(crate) fn register(&self, request: impl Into<Announced>) -> Result<(), ApiError> {
        let mut inbox = lock(&self.inbox);
        if inbox.closed {
            return Err(ApiError::engine_stopped("the engine stopped").retry_after(Duration::from_secs(10)));
        }
        inbox.announced.push(request.into());
        Ok(())
    }

    /// Ends all open requests with this error, at the thread's next tick.
    pub(crate) fn abort_all(&self, error: ApiError) {
        lock(&self.inbox).abort = Some(error);
    }

    /// Returns when the engine's events have ended.
    pub(crate) async fn ended(&self) {
        let notified = self.ended.notified();
        if lock(&self.inbox).closed {
            return;
        }
        notified.await;
    }
}

/// How often open requests are looked at when nothing happens.
const TICK: Duration = Duration::from_millis(100);
/// The same while there is none: a request that was announced to an engine that hangs must be seen too.
const IDLE_TICK: Duration = Duration::from_millis(500);
/// Batches taken in one go: enough to catch up, few enough to flush often.
const BATCHES: usize = 8;

struct Thread {
    inbox: Arc<Mutex<Inbox>>,
    ended: Arc<Notify>,
    context: Context,
    groups: Vec<Option<Box<Group>>>,
    free: Vec<usize>,
    /// Engine request to (group, number of the prompt in it).
    requests: HashMap<RequestId, (usize, u32)>,
    calls: Calls,
    /// Groups with bytes of this batch.
    dirty: Vec<usize>,
    ping_every: Option<Duration>,
    next_tick: Instant,
}

impl Thread {
    fn run(mut self, events: &Receiver<Vec<Event>>) {
        loop {
            let batch = events.recv_timeout(if self.is_idle() { IDLE_TICK } else { TICK });
            let now = Instant::now();
            self.read_inbox(now);
            match batch {
                Ok(batch) => {
                    self.take(&batch, now);
                    if !self.catch_up(events, now) {
                        return self.end(now);
                    }
                    self.flush(now);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.end(now),
            }
            if now >= self.next_tick {
                self.next_tick = now + TICK;
                self.tick(now);
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.calls.is_empty()
    }

    /// Takes batches that wait already. Returns false when the engine is gone.
    fn catch_up(&mut self, events: &Receiver<Vec<Event>>, now: Instant) -> bool {
        for _ in 1..BATCHES {
            match events.try_recv() {
                Ok(batch) => {
                    self.read_inbox(now);
                    self.take(&batch, now);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    fn read_inbox(&mut self, now: Instant) {
        let (announced, abort) = {
            let mut inbox = lock(&self.inbox);
            (std::mem::take(&mut inbox.announced), inbox.abort.take())
        };
        for request in announced {
            match request {
                Announced::Group(registration) => self.insert(*registration, now),
                Announced::Call(registration) => self.calls.insert(registration, &self.context),
            }
        }
        if let Some(error) = abort {
            for group in self.groups.iter_mut().flatten() {
                guarded(&mut **group, &self.context, |group, cx| group.fail(&error, cx));
            }
            self.calls.fail_all(&error, &self.context);
        }
    }

    fn insert(&mut self, registration: Registration, now: Instant) {
        let group = Box::new(Group::new(registration, &self.context, now));
        let index = self.free.pop().unwrap_or_else(|| {
            self.groups.push(None);
            self.groups.len() - 1
        });
        for (prompt, request) in (0..).zip(group.requests()) {
            self.requests.insert(request, (index, prompt));
        }
        self.groups[index] = Some(group);
        self.context.metrics.streams.add(1);
    }

    fn take(&mut self, batch: &[Event], now: Instant) {
        for event in batch {
            let request = match event {
                Event::Prefilled { request, .. }
                | Event::Pooled { request, .. }
                | Event::Token { request, .. }
                | Event::Finished { request, .. } => request,
            };
            let Some(&(index, prompt)) = self.requests.get(request) else {
                self.calls.take(*request, event, &self.context, now);
                continue;
            };
            let Some(group) = &mut self.groups[index] else { continue };
            let was_dirty = group.dirty;
            guarded(&mut **group, &self.context, |group, cx| group.on_event(prompt, event, cx, now));
            if group.dirty && !was_dirty {
                self.dirty.push(index);
            }
            if group.is_over() {
                self.remove(index);
            }
        }
    }

    fn flush(&mut self, now: Instant) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            if let Some(group) = self.groups[index].as_mut().filter(|group| group.dirty) {
                guarded(&mut **group, &self.context, |group, cx| group.flush(cx, now));
            }
        }
        self.dirty = dirty;
    }

    /// Pings, and looks after requests and calls whose engine is silent.
    fn tick(&mut self, now: Instant) {
        self.calls.tick(&self.context, now);
        for index in 0..self.groups.len() {
            let Some(group) = &mut self.groups[index] else { continue };
            guarded(&mut **group, &self.context, |group, _| group.settle_late(now));
            if let Some(every) = self.ping_every {
                guarded(&mut **group, &self.context, |group, cx| group.ping(every, cx, now));
            }
            if group.is_over() {
                self.remove(index);
            }
        }
    }

    fn remove(&mut self, index: usize) {
        let Some(mut group) = self.groups[index].take() else { return };
        guarded(&mut *group, &self.context, |group, _| group.settle());
        for request in group.requests() {
            self.requests.remove(&request);
        }
        if group.ticket.has_left() {
            self.context.metrics.disconnects.inc();
        }
        self.context.metrics.streams.add(-1);
        self.free.push(index);
    }

    /// The engine is gone: every open request ends, and no other is taken.
    fn end(mut self, now: Instant) {
        lock(&self.inbox).closed = true;
        self.read_inbox(now);
        self.flush(now);
        let error = ApiError::engine_stopped("the engine stopped").retry_after(Duration::from_secs(10));
        for index in 0..self.groups.len() {
            if let Some(group) = &mut self.groups[index] {
                guarded(&mut **group, &self.context, |group, cx| group.fail(&error, cx));
                self.remove(index);
            }
        }
        self.calls.end(&error, &self.context);
        self.ended.notify_waiters();
    }
}

/// An open request, as the boundary around its code sees it.
trait Fallible {
    /// Ends it with an error, once; later calls do nothing.
    fn fail(&mut self, error: &ApiError, cx: &Context);
}

/// Runs code of one request; a panic ends that request and nothing else.
fn guarded<T: Fallible>(request: &mut T, cx: &Context, code: impl FnOnce(&mut T, &Context)) {
    if catch_unwind(AssertUnwindSafe(|| code(request, cx))).is_err() {
        cx.metrics.panics.inc();
        let error = ApiError::internal("this request failed; others are not affected");
        // What panicked may be the very code that tells the client: then nothing more can be done for it.
        let _ = catch_unwind(AssertUnwindSafe(|| request.fail(&error, cx)));
    }
}
