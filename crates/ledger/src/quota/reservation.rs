//! What a request holds while it runs.
//!
//! Owns the rule for its end: settled, it costs what was used; cancelled, nothing; dropped otherwise, all of it,
//! because nobody then knows how much of it was used.

use std::sync::Arc;

use super::Shared;
use super::local::Charges;
use super::refusal::Standing;
use crate::identity::Quota;

/// The most that a request may use, taken from its application's limits.
#[must_use = "a reservation that is dropped counts as used to the last token"]
#[derive(Debug)]
pub struct Reservation {
    shared: Arc<Shared>,
    application: Arc<str>,
    quota: Quota,
    /// `None` once it is over.
    pub(super) charges: Option<Charges>,
}

impl Reservation {
    pub(super) fn new(shared: &Arc<Shared>, application: &Arc<str>, quota: &Quota, charges: Charges) -> Self {
        let application = application.clone();
        Self { shared: shared.clone(), application, quota: *quota, charges: Some(charges) }
    }

    /// The request is over and used so many tokens, of its prompt and of all its answers. What it did not use is
    /// free again; the request itself stays counted.
    pub fn settle(mut self, used_tokens: u64) {
        if let Some(charges) = self.charges.take() {
            let used = |kind: super::Kind, _| match kind {
                super::Kind::RequestsPerMinute => 1,
                super::Kind::ConcurrentRequests => 0,
                _ => used_tokens,
            };
            self.shared.finish(&self.application, &charges, used);
        }
    }

    /// The request was not served, and uses nothing.
    pub fn cancel(mut self) {
        if let Some(charges) = self.charges.take() {
            self.shared.finish(&self.application, &charges, |_, _| 0);
        }
    }

    /// Whether nothing was counted, because there is no limit.
    pub(super) fn is_empty(&self) -> bool {
        self.charges.is_none_or(|charges| charges == Charges::default())
    }

    /// How its application stands, for the headers of the answer.
    pub fn standing(&self) -> Standing {
        self.shared.standing(&self.application, &self.quota)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(charges) = self.charges.take().filter(|charges| *charges != Charges::default()) {
            self.shared.counters.dropped.add(1);
            let all = |kind, amount| if kind == super::Kind::ConcurrentRequests { 0 } else { amount };
            self.shared.finish(&self.application, &charges, all);
        }
    }
}

/// A reservation on its way to a request that may have given up: then it is cancelled.
#[derive(Debug)]
pub(super) struct Unclaimed(Option<Reservation>);

impl Unclaimed {
    pub(super) fn new(reservation: Reservation) -> Self {
        Self(Some(reservation))
    }

    pub(super) fn claim(mut self) -> Option<Reservation> {
        self.0.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(reservation) = self.0.take() {
            reservation.cancel();
        }
    }
}
