//! A fixed-size pool of worker threads for the kernels.
//!
//! Owns: its threads, the hand-over of one task at a time, and balanced splitting of an index range.
//! Never: a queue, a future, or an allocation per dispatch. A decode step of a small model makes some two hundred
//! dispatches of a few microseconds each, so an idle worker spins for a moment before it parks.
//!
//! `unsafe` stands here only to call [`TaskCell`]: its two conditions (nobody reads while it is written, and the
//! caller outlives every call) are exactly what the protocol below provides.
#![allow(unsafe_code)]

use crate::simd::shared::{Task, TaskCell};
use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a waiting thread spins before it parks: longer than the gap between two operations of a step, short
/// enough that an idle server burns nothing.
const SPIN: Duration = Duration::from_micros(60);
/// Most threads of one pool.
const MAX_THREADS: usize = 256;

thread_local! {
    /// True while this thread runs a task: a nested dispatch then runs in place.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// State shared by the caller and the workers.
struct Shared {
    task: TaskCell,
    /// Counts dispatches; a worker runs the task when it sees a new number.
    epoch: AtomicUsize,
    /// Workers that have not yet finished the dispatch in progress.
    left: AtomicUsize,
    stop: AtomicBool,
    /// Whom the last worker wakes.
    caller: Mutex<Option<Thread>>,
    caller_parked: AtomicBool,
    /// One flag a worker: set while it is parked or about to.
    parked: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A pool of `threads` workers, the calling thread being worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One dispatch at a time.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// Starts `threads - 1` threads (`threads` is brought into 1..=256).
    ///
    /// # Panics
    /// When the operating system refuses a thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let helpers = threads.clamp(1, MAX_THREADS) - 1;
        let shared = Arc::new(Shared {
            task: TaskCell::new(),
            epoch: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            caller: Mutex::new(None),
            caller_parked: AtomicBool::new(false),
            parked: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        let workers = (0..helpers)
            .map(|slot| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("cpu-{}", slot + 1))
                    .spawn(move || shared.work(slot))
                    .expect("the system starts a worker thread")
            })
            .collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Workers, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once for every worker index in `0..threads`, in parallel, and returns when all calls have ended.
    /// Called from inside a task it runs the indices one after the other.
    ///
    /// # Panics
    /// With the first panic of a task, after all calls have ended; the pool stays usable.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || BUSY.get() {
            (0..self.threads()).for_each(f);
            return;
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: `turn` keeps other callers out, workers have finished the last dispatch, and nothing between here
        // and `clear` returns or unwinds: the caller's own share is caught.
        unsafe { shared.task.set(f) };
        shared.left.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (flag, worker) in shared.parked.iter().zip(&self.workers) {
            if flag.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.take_part(0, f);
        shared.wait_for_workers();
        // SAFETY: every worker has counted itself out, so nobody is inside `call`.
        unsafe { shared.task.clear() };
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Splits `0..n` into chunks of `chunk` and calls `f(worker, range)` for each, threads taking the next chunk as
    /// they come free. Which thread computes a chunk is not fixed; what is computed is.
    pub fn chunks(&self, n: usize, chunk: usize, f: &(dyn Fn(usize, Range<usize>) + Sync)) {
        let chunk = chunk.max(1);
        if n <= chunk || self.workers.is_empty() {
            if n > 0 {
                f(0, 0..n);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(&|worker| {
            loop {
                let start = next.fetch_add(chunk, Ordering::Relaxed);
                if start >= n {
                    return;
                }
                f(worker, start..(start + chunk).min(n));
            }
        });
    }
}

/// The part of `0..n` that worker `index` of `workers` takes when all take as equal parts as possible.
#[must_use]
pub fn balanced(n: usize, workers: usize, index: usize) -> Range<usize> {
    let workers = workers.max(1);
    let (each, rest) = (n / workers, n % workers);
    let start = index * each + index.min(rest);
    start.min(n)..(start + each + usize::from(index < rest)).min(n)
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches every panic of a task, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Body of a worker thread.
    fn work(&self, slot: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.next_epoch(slot, seen) {
            seen = epoch;
            BUSY.set(true);
            // SAFETY: a new epoch was read with acquire order, so `set` came before; `clear` waits for `left`.
            let done = catch_unwind(AssertUnwindSafe(|| unsafe { self.task.call(slot + 1) }));
            BUSY.set(false);
            self.record(done);
            let last = self.left.fetch_sub(1, Ordering::SeqCst) == 1;
            if last
                && self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = &*lock(&self.caller)
            {
                caller.unpark();
            }
        }
    }

    /// Waits for an epoch other than `seen`; `None` when the pool is dropped.
    fn next_epoch(&self, slot: usize, seen: usize) -> Option<usize> {
        let news = || {
            let epoch = self.epoch.load(Ordering::SeqCst);
            (epoch != seen).then_some(epoch)
        };
        let stopped = || self.stop.load(Ordering::SeqCst);
        loop {
            let epoch = spin(|| news().or_else(|| stopped().then_some(seen)));
            match epoch {
                Some(epoch) if epoch != seen => return Some(epoch),
                Some(_) => return None,
                None => {}
            }
            // The flag goes up before the last look, so that a dispatch in between either is seen or unparks us.
            self.parked[slot].store(true, Ordering::SeqCst);
            while news().is_none() && !stopped() && self.parked[slot].load(Ordering::SeqCst) {
                thread::park();
            }
            self.parked[slot].store(false, Ordering::SeqCst);
        }
    }

    /// The caller's share, as worker 0.
    fn take_part(&self, index: usize, f: &Task<'_>) {
        BUSY.set(true);
        let done = catch_unwind(AssertUnwindSafe(|| f(index)));
        BUSY.set(false);
        self.record(done);
    }

    /// Keeps the first panic of a dispatch.
    fn record(&self, done: Result<(), Box<dyn Any + Send>>) {
        if let Err(payload) = done {
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// Returns when every worker has finished.
    fn wait_for_workers(&self) {
        let finished = || (self.left.load(Ordering::SeqCst) == 0).then_some(());
        if spin(finished).is_some() {
            return;
        }
        *lock(&self.caller) = Some(thread::current());
        self.caller_parked.store(true, Ordering::SeqCst);
        while finished().is_none() {
            thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }
}

/// Polls until `ready` or for [`SPIN`]; reads the clock rarely.
fn spin<T>(ready: impl Fn() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if let Some(value) = ready() {
                return Some(value);
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return None;
        }
    }
}

/// A panic inside a task is caught before it could poison these; what they guard is whole in any case.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn every_worker_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for _ in 0..200 {
                let seen: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.run(&|worker| {
                    seen[worker].fetch_add(1, Ordering::Relaxed);
                });
                assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{threads} threads: {seen:?}");
            }
        }
        assert_eq!(Pool::new(0).threads(), 1);
        assert_eq!(format!("{:?}", Pool::new(2)), "Pool { threads: 2 }");
    }

    #[test]
    fn workers_run_at_the_same_time() {
        let pool = Pool::new(3);
        let barrier = Barrier::new(3);
        pool.run(&|_| {
            barrier.wait();
        });
    }

    #[test]
    fn parked_workers_and_a_parked_caller_wake() {
        let pool = Pool::new(2);
        for _ in 0..20 {
            // Both sides outlast the other's spinning.
            let wait = || {
                let start = Instant::now();
                while start.elapsed() < SPIN * 3 {
                    std::hint::spin_loop();
                }
            };
            wait();
            pool.run(&|worker| {
                if worker == 1 {
                    wait();
                }
            });
        }
    }

    #[test]
    fn chunks_cover_the_range_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            for (n, chunk) in [(0, 4), (1, 4), (4, 4), (5, 4), (100, 7), (9, 0)] {
                let seen: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                pool.chunks(n, chunk, &|worker, range| {
                    assert!(worker < threads);
                    for i in range {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn balanced_parts_differ_by_one() {
        for n in 0..20 {
            for workers in 1..6 {
                let parts: Vec<_> = (0..workers).map(|i| balanced(n, workers, i)).collect();
                assert_eq!(parts.iter().map(ExactSizeIterator::len).sum::<usize>(), n);
                assert!(parts.windows(2).all(|w| w[0].end == w[1].start && w[0].len() - w[1].len() <= 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for guilty in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| assert!(worker != guilty, "worker {worker} fails"));
            }));
            let payload = caught.expect_err("the panic of a task");
            assert_eq!(payload.downcast_ref::<String>(), Some(&format!("worker {guilty} fails")));
            let calls = AtomicUsize::new(0);
            pool.run(&|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(calls.into_inner(), 3);
        }
    }

    #[test]
    fn a_dispatch_inside_a_task_runs_in_place() {
        let pool = Pool::new(2);
        let calls = AtomicUsize::new(0);
        pool.run(&|_| {
            pool.run(&|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(calls.into_inner(), 4);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        let calls = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(&|_| {
                            calls.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(calls.into_inner(), 800);
    }
}
