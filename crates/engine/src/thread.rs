//! The engine's thread: the loop, its boundaries against faults, and its end.
//!
//! Owns the executor and the scheduler. Everything that can fail ends here in one of three ways: a row's fault
//! ends its sequence, a device's fault ends the engine, and a request to stop ends it in order. It never
//! decides what a step computes.

use std::any::Any;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use crate::config::EngineConfig;
use crate::energy::{EnergyCounter, READ_INTERVAL};
use crate::executor::{DeviceFault, Executor};
use crate::handle::{BoxError, EngineHandle, Shared, StartError};
use crate::mailbox::Letters;
use crate::request::{Event, FinishReason, SeqUsage};
use crate::scheduler::{CommitError, HashKey, Scheduler};
use crate::step::{StepOutcome, StepPlan};
use crate::time::Time;

/// Time between two beats while idle.
const IDLE_BEAT: Duration = Duration::from_secs(1);

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    String::from(text.unwrap_or("of unknown type"))
}

/// Why the loop ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Device(#[from] DeviceFault),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error("the demultiplexer is gone")]
    NoListener,
    #[error("told to stop")]
    Told,
}

/// Starts the engine's thread, which loads its executor with `make` (executors need not be `Send`) and then
/// serves. Blocks until the executor is loaded. Events come in batches, one or more a step, for one
/// demultiplexer; when it is gone or too slow the engine stops or waits.
///
/// # Errors
/// The executor could not be loaded or has no room, or no thread could be started.
pub fn start(
    config: EngineConfig,
    make: impl FnOnce() -> Result<Box<dyn Executor>, BoxError> + Send + 'static,
) -> Result<(EngineHandle, Receiver<Vec<Event>>), StartError> {
    let (events, receiver) = sync_channel(config.event_batches.max(1));
    let (loaded, ready) = sync_channel(1);
    std::thread::Builder::new().name(String::from("mirai-engine")).spawn(move || {
        let engine = match catch_unwind(AssertUnwindSafe(|| Engine::load(&config, make, events))) {
            Ok(Ok(engine)) => engine,
            Ok(Err(error)) => return drop(loaded.send(Err(error))),
            Err(panic) => return drop(loaded.send(Err(StartError::Panic(panic_text(panic.as_ref()))))),
        };
        if loaded.send(Ok(Arc::clone(&engine.shared))).is_ok() {
            engine.live();
        }
    })?;
    // The thread sends exactly one answer, unless it dies in a way that cannot be caught.
    let answer = ready.recv().map_err(|_| StartError::Panic(String::from("the thread is gone")))?;
    answer.map(|shared| (EngineHandle::new(shared), receiver))
}

struct Engine {
    shared: Arc<Shared>,
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    look_ahead: bool,
    events: SyncSender<Vec<Event>>,
    letters: Letters,
    plan: StepPlan,
    outcome: StepOutcome,
    energy: Option<Arc<dyn EnergyCounter>>,
    /// When the energy counter may be read again.
    next_reading: Time,
    /// Until when sequences may go on once the engine was told to stop.
    last_call: Option<Time>,
    /// Whether the check of the idle state was done since the last step.
    checked: bool,
}

impl Engine {
    fn load(
        config: &EngineConfig,
        make: impl FnOnce() -> Result<Box<dyn Executor>, BoxError>,
        events: SyncSender<Vec<Event>>,
    ) -> Result<Self, StartError> {
        let executor = make().map_err(StartError::Executor)?;
        let random = || RandomState::new().build_hasher().finish();
        let hash = HashKey { key: (random(), random()), ..HashKey::default() };
        let scheduler = Scheduler::new(config, executor.geometry(), hash).map_err(StartError::Geometry)?;
        let shared = Arc::new(Shared::new(config, executor.geometry().clone()));
        let look_ahead = config.look_ahead.unwrap_or_else(|| executor.is_asynchronous());
        tracing::info!(look_ahead, geometry = ?executor.geometry(), "engine loaded");
        let mut engine = Self {
            shared,
            executor,
            scheduler,
            look_ahead,
            events,
            letters: Letters::default(),
            plan: StepPlan::default(),
            outcome: StepOutcome::default(),
            energy: config.energy.clone(),
            next_reading: Time::ZERO,
            last_call: None,
            checked: false,
        };
        #[cfg(feature = "test-hooks")]
        engine.scheduler.set_hooks(Arc::clone(&engine.shared.hooks));
        engine.publish();
        Ok(engine)
    }

    /// Runs until the end, whatever ends it, and leaves nobody waiting.
    fn live(mut self) {
        let end =
            catch_unwind(AssertUnwindSafe(
                || {
                    if self.look_ahead { self.run_ahead() } else { self.run_plain() }
                },
            ));
        let reason = match end {
            Ok(End::Told) => None,
            Ok(end) => Some(end.to_string()),
            Err(panic) => Some(format!("panic in the engine: {}", panic_text(panic.as_ref()))),
        };
        if let Some(reason) = &reason {
            tracing::error!(reason, "the engine is dead");
            // Before the events, so that whoever sees one also sees why.
            let _ = self.shared.dead.set(reason.clone());
        }
        let unread = self.shared.mailbox.close();
        for request in unread.submits {
            self.shared.queue.leave([(request.tenant, 1, request.prompt.len())]);
            for choice in 0..request.choices {
                let usage = SeqUsage { prompt_tokens: request.prompt.len() as u32, ..SeqUsage::default() };
                let (request, reason) = (request.id, FinishReason::EngineStopped);
                self.farewell(vec![Event::Finished { request, choice, reason, usage }]);
            }
        }
        // The scheduler may be what failed.
        let last = catch_unwind(AssertUnwindSafe(|| {
            self.scheduler.end_all(&FinishReason::EngineStopped);
            self.scheduler.take_events()
        }));
        self.farewell(last.unwrap_or_default());
        self.publish();
        self.shared.busy.store(false, Ordering::Relaxed);
        self.shared.stopped.store(true, Ordering::Release);
    }

    fn farewell(&self, events: Vec<Event>) {
        if !events.is_empty() {
            let _ = self.events.send(events);
        }
    }

    /// The whole engine, without look-ahead.
    fn run_plain(&mut self) -> End {
        loop {
            if let Err(end) = self.plain_step() {
                return end;
            }
        }
    }

    fn plain_step(&mut self) -> Result<(), End> {
        self.intake();
        self.scheduler.plan(self.shared.now(), &mut self.plan);
        if self.plan.rows.is_empty() {
            return self.rest();
        }
        self.submit()?;
        self.read_energy();
        self.collect()
    }

    /// The same with one step of look-ahead: step n+1 is submitted before step n is collected.
    fn run_ahead(&mut self) -> End {
        loop {
            if let Err(end) = self.ahead_step() {
                return end;
            }
        }
    }

    fn ahead_step(&mut self) -> Result<(), End> {
        self.intake();
        self.scheduler.plan(self.shared.now(), &mut self.plan);
        let planned = !self.plan.rows.is_empty();
        if planned {
            self.submit()?;
            self.read_energy();
        }
        match self.scheduler.steps_in_flight() {
            0 => self.rest(),
            1 if planned => self.deliver(),
            _ => self.collect(),
        }
    }

    fn submit(&mut self) -> Result<(), End> {
        self.checked = false;
        #[cfg(feature = "test-hooks")]
        if self.shared.hooks.takes_device_fault() {
            return Err(DeviceFault { step: self.plan.step, message: String::from("injected") }.into());
        }
        Ok(self.executor.submit(&self.plan)?)
    }

    fn collect(&mut self) -> Result<(), End> {
        self.executor.collect(&mut self.outcome)?;
        self.scheduler.observe(self.shared.now(), None);
        self.scheduler.commit(&mut self.outcome)?;
        self.deliver()
    }

    /// Reads the energy counter, if there is one and it is time to. Called when nothing waits for this thread: the
    /// device has a step to work on, or there is none.
    fn read_energy(&mut self) {
        let Some(counter) = &self.energy else { return };
        let before = self.shared.now();
        if before < self.next_reading {
            return;
        }
        let microjoules = counter.microjoules();
        let now = self.shared.now();
        // A driver that answers slowly is asked less often: it has at most 1 % of this thread's time.
        self.next_reading = now + READ_INTERVAL.max((now - before) * 100);
        self.scheduler.observe(now, microjoules);
    }

    /// Hands events and numbers to the rest of the process.
    fn deliver(&mut self) -> Result<(), End> {
        self.publish();
        let events = self.scheduler.take_events();
        if events.is_empty() {
            return Ok(());
        }
        // Waits where the demultiplexer is behind: events must not be lost, and must not pile up.
        self.events.send(events).map_err(|_| End::NoListener)
    }

    fn publish(&mut self) {
        let gone = self.scheduler.take_dequeued();
        if !gone.is_empty() {
            self.shared.queue.leave(gone.into_iter().map(|(tenant, tokens)| (tenant, 1, tokens)));
        }
        self.shared.stats.publish(&self.scheduler.counters());
        self.shared.beat(!self.scheduler.is_idle());
    }

    /// Takes in what callers said.
    fn intake(&mut self) {
        #[cfg(feature = "test-hooks")]
        self.shared.hooks.pause_point();
        let mut letters = std::mem::take(&mut self.letters);
        self.shared.mailbox.take(&mut letters);
        let now = self.shared.now();
        for request in letters.submits.drain(..) {
            self.add(request, now);
        }
        for (&(request, choice), &kept) in &letters.stops {
            self.scheduler.stop(request, choice, kept);
        }
        for &request in &letters.cancels {
            self.scheduler.cancel(request);
        }
        if let Some(grace) = letters.shutdown {
            let until = now.saturating_add(grace);
            self.last_call = Some(self.last_call.map_or(until, |other| other.min(until)));
        }
        letters.clear();
        self.letters = letters;
        if self.last_call.is_some_and(|until| now >= until) {
            self.scheduler.end_all(&FinishReason::EngineStopped);
        }
    }

    fn add(&mut self, request: crate::EngineRequest, now: Time) {
        let (id, choices, place) = (request.id, request.choices, (request.tenant, 1, request.prompt.len()));
        if let Err(error) = self.scheduler.add(request, now) {
            // The door has checked the rest: only a duplicate id comes here, and its events could not be told
            // from the first one's. It is the caller's bug; nothing more can be said to anybody.
            tracing::error!(%id, choices, %error, "request refused after the door");
            self.shared.queue.leave([place]);
        }
    }

    /// Nothing can be submitted or collected: sends what is left to send, ends if told to, else sleeps.
    fn rest(&mut self) -> Result<(), End> {
        self.read_energy();
        self.deliver()?;
        if !self.scheduler.is_idle() {
            // Every sequence runs, waits for a step in flight, or can be admitted into the empty pool.
            tracing::error!("work waits but nothing can be planned");
            return Err(End::Device(DeviceFault {
                step: 0,
                message: String::from("the scheduler is stuck"),
            }));
        }
        if self.last_call.is_some() {
            return Err(End::Told);
        }
        // The check takes milliseconds in a large pool: only after a quiet second, where nobody waits for it.
        if !self.shared.mailbox.wait(IDLE_BEAT) && !std::mem::replace(&mut self.checked, true) {
            self.check_idle();
        }
        Ok(())
    }

    fn check_idle(&mut self) {
        if let Err(error) = self.scheduler.audit_idle() {
            tracing::error!(%error, "integrity check failed");
            debug_assert!(false, "{error}");
            self.scheduler.count_integrity_failure();
        }
    }
}
