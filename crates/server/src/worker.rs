//! Threads for work that would hold up the network: parsing, templates, tokenization.
//!
//! Owns a bounded queue; it never runs more jobs at once than it has threads, and survives a job's panic.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// Why a job did not give a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobError {
    /// The queue is full.
    Full,
    /// It panicked.
    Panicked,
}

struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    limit: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool. Its threads end when it is dropped, after the job at hand.
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

impl Workers {
    /// Starts `threads` threads with room for `limit` waiting jobs.
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub(crate) fn start(threads: usize, limit: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { jobs: VecDeque::new(), closed: false }),
            ready: Condvar::new(),
            limit,
        });
        for i in 0..threads {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("worker-{i}")).spawn(move || work(&shared))?;
        }
        Ok(Self { shared })
    }

    /// Runs `job` on a thread of the pool.
    ///
    /// # Errors
    /// The queue is full, or the job panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JobError> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut queue = self.shared.lock();
            if queue.jobs.len() >= self.shared.limit {
                return Err(JobError::Full);
            }
            queue.jobs.push_back(Box::new(move || {
                // Nobody waits any more where the client has left: its job is not worth doing.
                if !sender.is_closed() {
                    let _ = sender.send(job());
                }
            }));
        }
        self.shared.ready.notify_one();
        receiver.await.map_err(|_| JobError::Panicked)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.ready.notify_all();
    }
}

fn work(shared: &Shared) {
    loop {
        let job = {
            let mut queue = shared.lock();
            loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.closed {
                    return;
                }
                queue = shared.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        };
        // The panic reaches the waiting side as a closed channel.
        let _ = catch_unwind(AssertUnwindSafe(job));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_give_results_and_panics_stay_inside() {
        let workers = Workers::start(1, 4).unwrap();
        assert_eq!(workers.run(|| 6 * 7).await, Ok(42));
        assert_eq!(workers.run(|| -> u8 { panic!("in a job") }).await, Err(JobError::Panicked));
        assert_eq!(workers.run(|| 1).await, Ok(1));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_and_an_abandoned_job_is_skipped() {
        let workers = Arc::new(Workers::start(1, 1).unwrap());
        let (started, is_started) = oneshot::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let workers = workers.clone();
            async move {
                workers
                    .run(move || {
                        let _ = started.send(());
                        let _ = released.recv();
                    })
                    .await
            }
        });
        is_started.await.unwrap();
        let ran = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let flag = ran.clone();
        let mut second =
            Box::pin(workers.run(move || flag.store(true, std::sync::atomic::Ordering::Relaxed)));
        assert!(
            std::future::poll_fn(|cx| std::task::Poll::Ready(second.as_mut().poll(cx))).await.is_pending()
        );
        assert_eq!(workers.run(|| ()).await, Err(JobError::Full));
        drop(second);
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(()));
        // The abandoned job holds its place until the thread has passed it by.
        let last = loop {
            match workers.run(|| ()).await {
                Err(JobError::Full) => tokio::task::yield_now().await,
                other => break other,
            }
        };
        assert_eq!(last, Ok(()));
        assert!(!ran.load(std::sync::atomic::Ordering::Relaxed));
    }
}
