//! Sends the requests: a closed loop (a fixed number in flight) or an open loop (absolute times). Owns the
//! schedule; a late client shows as lag, never as a slower schedule.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::arrival::arrivals;
use crate::dataset::{Workload, mix};
use crate::progress::Progress;
use crate::prompt::BodyBuilder;
use crate::request::{Plan, Sample, execute};
use crate::{BenchOptions, RequestRate};

/// Most requests in flight, whatever the options say: each needs a connection, hence a file descriptor.
pub(crate) const MAX_IN_FLIGHT: usize = 16_384;

/// When requests are sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Schedule {
    /// As soon as one of so many slots is free.
    Closed {
        /// Requests in flight.
        slots: usize,
    },
    /// At these times since the start; at most so many in flight.
    Open {
        /// One for each request, ascending.
        times: Vec<Duration>,
        /// Requests in flight.
        slots: usize,
    },
}

impl Schedule {
    pub(crate) fn of(options: &BenchOptions, workload: &Workload) -> Self {
        let slots = options.concurrency.unwrap_or(MAX_IN_FLIGHT).min(MAX_IN_FLIGHT);
        let from_trace = || workload.specs.iter().map(|spec| spec.at).collect::<Option<Vec<_>>>();
        match options.request_rate {
            Some(RequestRate::PerSecond(rate)) => {
                let mut rng = StdRng::seed_from_u64(mix(options.seed, 4));
                let times = arrivals(&mut rng, workload.specs.len(), rate, options.burstiness);
                Self::Open { times, slots }
            }
            Some(RequestRate::Infinite) => Self::Closed { slots },
            None => match from_trace() {
                Some(times) => Self::Open { times, slots },
                None => Self::Closed { slots },
            },
        }
    }
}

/// What all tasks of a run share.
pub(crate) struct Run {
    pub(crate) plan: Arc<Plan>,
    pub(crate) builder: Arc<BodyBuilder>,
    pub(crate) workload: Workload,
    pub(crate) progress: Arc<Progress>,
}

impl Run {
    async fn one(&self, index: usize, origin: Instant) -> Sample {
        let spec = &self.workload.specs[index];
        let body = self.builder.body(&self.workload, spec);
        self.measured(execute(&self.plan, body, spec.output_len, origin, None).await)
    }

    fn measured(&self, sample: Sample) -> Sample {
        self.progress.finished_one(sample.outcome.as_ref().ok().map(|usage| usage.completion_tokens));
        sample
    }
}

/// Sends all requests of `run` and returns what was measured, in no particular order.
///
/// Dropping the future aborts everything in flight.
pub(crate) async fn drive(run: &Arc<Run>, schedule: &Schedule) -> Vec<Sample> {
    match schedule {
        Schedule::Closed { slots } => closed(run, *slots).await,
        Schedule::Open { times, slots } => open(run, times, *slots).await,
    }
}

async fn closed(run: &Arc<Run>, slots: usize) -> Vec<Sample> {
    let total = run.workload.specs.len();
    let next = Arc::new(AtomicUsize::new(0));
    let origin = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..slots.min(total) {
        let (run, next) = (run.clone(), next.clone());
        workers.spawn(async move {
            let mut samples = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= run.workload.specs.len() {
                    return samples;
                }
                samples.push(run.one(index, origin).await);
            }
        });
    }
    workers.join_all().await.into_iter().flatten().collect()
}

async fn open(run: &Arc<Run>, times: &[Duration], slots: usize) -> Vec<Sample> {
    let free = Arc::new(Semaphore::new(slots));
    let mut tasks = JoinSet::new();
    let mut samples = Vec::with_capacity(times.len());
    let origin = Instant::now();
    for (index, &intended) in times.iter().enumerate() {
        let spec = &run.workload.specs[index];
        // Built before its time comes, so that building does not delay it.
        let body = run.builder.body(&run.workload, spec);
        let output_len = spec.output_len;
        tokio::time::sleep_until((origin + intended).into()).await;
        let Ok(permit) = free.clone().acquire_owned().await else {
            break; // Never closed.
        };
        let run = run.clone();
        tasks.spawn(async move {
            let sample = execute(&run.plan, body, output_len, origin, Some(intended)).await;
            drop(permit);
            run.measured(sample)
        });
        // What has ended is collected on the way, so that ended tasks do not pile up.
        while let Some(Ok(sample)) = tasks.try_join_next() {
            samples.push(sample);
        }
    }
    samples.extend(tasks.join_all().await);
    samples
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::dataset::{Input, Spec};
    use crate::options::tests::parse;

    fn workload(at: Option<u64>) -> Workload {
        let spec = |i| Spec {
            input: Input::Random { len: 1, seed: i },
            output_len: 1,
            at: at.map(|step| Duration::from_secs(step * i)),
        };
        Workload { specs: (0..3).map(spec).collect(), ..Workload::default() }
    }

    #[test]
    fn which_loop() {
        let of = |args: &[&str], at| Schedule::of(&parse(args), &workload(at));
        assert_eq!(of(&[], None), Schedule::Closed { slots: MAX_IN_FLIGHT });
        assert_eq!(of(&["--concurrency", "8"], None), Schedule::Closed { slots: 8 });
        assert_eq!(of(&["--request-rate", "inf"], Some(1)), Schedule::Closed { slots: MAX_IN_FLIGHT });
        let times = [0, 2, 4].map(Duration::from_secs).to_vec();
        assert_eq!(of(&["--concurrency", "8"], Some(2)), Schedule::Open { times, slots: 8 });
        let Schedule::Open { times, slots } = of(&["--request-rate", "100"], Some(2)) else {
            panic!("a rate is an open loop");
        };
        assert_eq!((times.len(), slots), (3, MAX_IN_FLIGHT));
        assert!(times[2] < Duration::from_secs(2));
    }
}
