//! Who may wait.
//!
//! Owns the count of what is between the door and a first slot, for each tenant, and the decision whether one more
//! request may join. It never knows what waits, nor in which order.
//!
//! Anybody may use the whole queue while it has room. When it is full, a tenant that holds less than its share of it,
//! by weight among those that wait, may join still: a flood of one tenant's requests is refused, the others' are not.
//! So the queue may grow beyond its limits, up to twice as long.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::door::AdmissionError;
use crate::ids::TenantId;

/// What one tenant has in the queue.
#[derive(Debug, Default)]
struct Waiting {
    requests: usize,
    tokens: usize,
    weight: u64,
}

#[derive(Debug)]
pub(crate) struct Queue {
    max_requests: usize,
    max_tokens: usize,
    /// Tenants with requests in it.
    tenants: Mutex<HashMap<TenantId, Waiting>>,
    /// The sums, for whoever only looks.
    requests: AtomicUsize,
    tokens: AtomicUsize,
}

/// A tenant's part of a limit.
fn share(limit: usize, weight: u64, all: u64) -> usize {
    (limit as u128 * u128::from(weight) / u128::from(all.max(1))) as usize
}

impl Queue {
    pub(crate) fn new(max_requests: usize, max_tokens: usize) -> Self {
        Self {
            max_requests,
            max_tokens,
            tenants: Mutex::default(),
            requests: AtomicUsize::new(0),
            tokens: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, Waiting>> {
        // Two additions cannot leave it half written.
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests and prompt tokens in it.
    pub(crate) fn len(&self) -> (usize, usize) {
        (self.requests.load(Ordering::Relaxed), self.tokens.load(Ordering::Relaxed))
    }

    /// Makes room for `count` requests of one tenant with `tokens` prompt tokens together.
    ///
    /// # Errors
    /// The queue is full, and the tenant has its share of it.
    pub(crate) fn enter(
        &self,
        tenant: TenantId,
        weight: u32,
        count: usize,
        tokens: usize,
    ) -> Result<(), AdmissionError> {
        let mut tenants = self.lock();
        let (requests_now, tokens_now) = self.len();
        let weight = u64::from(weight.max(1));
        let others = tenants.iter().filter(|(id, _)| **id != tenant);
        let all = others.fold(weight, |sum, (_, waiting)| sum.saturating_add(waiting.weight));
        let own = tenants.get(&tenant).map_or((0, 0), |waiting| (waiting.requests, waiting.tokens));
        let fits = |now: usize, own: usize, more: usize, limit: usize| {
            now + more <= limit
                || (own + more <= share(limit, weight, all) && now + more <= limit.saturating_mul(2))
        };
        if !fits(requests_now, own.0, count, self.max_requests) {
            return Err(AdmissionError::QueueFull { queued: requests_now, limit: self.max_requests });
        }
        // An empty queue takes any request that fits the model, or it could never be served.
        if requests_now > 0 && !fits(tokens_now, own.1, tokens, self.max_tokens) {
            return Err(AdmissionError::QueueTokensFull {
                queued: tokens_now,
                request: tokens,
                limit: self.max_tokens,
            });
        }
        let waiting = tenants.entry(tenant).or_default();
        waiting.weight = weight;
        waiting.requests += count;
        waiting.tokens += tokens;
        self.requests.fetch_add(count, Ordering::Relaxed);
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        Ok(())
    }

    /// What left it: the tenant, requests and prompt tokens of each.
    pub(crate) fn leave(&self, gone: impl IntoIterator<Item = (TenantId, usize, usize)>) {
        let mut tenants = self.lock();
        for (tenant, count, tokens) in gone {
            let Some(waiting) = tenants.get_mut(&tenant) else {
                debug_assert!(false, "{tenant:?} leaves a queue that it is not in");
                continue;
            };
            waiting.requests -= count;
            waiting.tokens -= tokens;
            if waiting.requests == 0 {
                tenants.remove(&tenant);
            }
            self.requests.fetch_sub(count, Ordering::Relaxed);
            self.tokens.fetch_sub(tokens, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: TenantId = TenantId(1);
    const OTHER: TenantId = TenantId(2);

    fn flood(queue: &Queue, tenant: TenantId, weight: u32) -> usize {
        (0..1000).take_while(|_| queue.enter(tenant, weight, 1, 10).is_ok()).count()
    }

    #[test]
    fn a_flood_keeps_nobody_else_out() {
        let queue = Queue::new(100, 1 << 20);
        assert_eq!(flood(&queue, ONE, 1), 100);
        assert_eq!(queue.enter(ONE, 1, 1, 10), Err(AdmissionError::QueueFull { queued: 100, limit: 100 }));
        assert_eq!(flood(&queue, OTHER, 3), 75);
        assert_eq!(flood(&queue, TenantId(3), 4), 25, "no more than twice the limit");
        assert_eq!(queue.len(), (200, 2000));
        // Those of the flood leave first; it comes back when there is room.
        queue.leave((0..100).map(|_| (ONE, 1, 10)));
        assert_eq!(flood(&queue, ONE, 1), 12, "an eighth of the queue while the others fill it");
        queue.leave([(OTHER, 75, 750), (TenantId(3), 25, 250), (ONE, 12, 120)]);
        assert_eq!(queue.len(), (0, 0));
        assert!(queue.lock().is_empty());
    }

    #[test]
    fn tokens_are_shared_like_places() {
        let queue = Queue::new(100, 1000);
        assert_eq!(queue.enter(ONE, 1, 1, 5000), Ok(()), "alone, any request may come");
        let full = AdmissionError::QueueTokensFull { queued: 5000, request: 1, limit: 1000 };
        assert_eq!(queue.enter(OTHER, 1, 1, 1), Err(full), "beyond twice the limit nobody may");
        queue.leave([(ONE, 1, 5000)]);
        assert_eq!(queue.enter(ONE, 1, 10, 1000), Ok(()));
        assert_eq!(queue.enter(OTHER, 1, 1, 500), Ok(()));
        let full = AdmissionError::QueueTokensFull { queued: 1500, request: 1, limit: 1000 };
        assert_eq!(queue.enter(OTHER, 1, 1, 1), Err(full));
    }
}
