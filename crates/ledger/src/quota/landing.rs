//! What a transaction granted, handed to the requests that waited for it.
//!
//! Owns the order: what is at hand first, then each request by its turn; what came too late goes back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::account::{Answer, Item};
use super::calendar::Moment;
use super::kind::{Kind, Span};
use super::local::{Local, Verdict, Waiter};
use super::reservation::{Reservation, Unclaimed};
use super::shared::Shared;

pub(super) type Tell = (oneshot::Sender<Verdict>, Verdict);

/// Tells requests, without the lock: who has given up meanwhile cancels what it got, and that takes it.
pub(super) fn tell(all: Vec<Tell>) {
    for (request, verdict) in all {
        // Who has given up wants no answer.
        drop(request.send(verdict));
    }
}

/// An answer on its way to one application's requests.
pub(super) struct Landing<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) began: Duration,
    pub(super) now: Duration,
    pub(super) at: Moment,
    pub(super) answer: &'a Answer,
}

impl Landing<'_> {
    /// Until when what was granted may be used, by our clock: counted from before the store was asked.
    fn until(&self, kind: Kind) -> Duration {
        let usable = self.answer.at.usable(kind).max(0) as u64;
        self.began.saturating_add(Duration::from_micros(usable))
    }

    /// Returns what is to be told, and how many requests wait again.
    pub(super) fn hand_out(
        &self,
        local: &mut Local,
        item: &Item,
        waiters: Vec<Waiter>,
    ) -> (Vec<Tell>, usize) {
        local.sent(true);
        (local.asked, local.ahead) = (0, self.answer.at.ahead);
        let late = |kind: &Kind| kind.span() == Span::Window && self.now >= self.until(*kind);
        for kind in Kind::ALL {
            let i = kind.index();
            local.meters[i].seen.clone_from(&self.answer.seen[i]);
            local.meters[i].spent = self.answer.spent[i];
            local.grant(kind, self.answer.at.bucket(kind), self.answer.headroom[i], self.until(kind));
        }
        let mut tells = Vec::new();
        let mut again = Vec::new();
        let mut waiters = waiters.into_iter();
        for (ask, lacking) in item.asks.iter().zip(&self.answer.lacking) {
            let waiter = waiters.next();
            let granted = !lacking.contains(&true);
            let asked = Kind::ALL.into_iter().filter(|kind| ask[kind.index()] > 0);
            let stale = granted && asked.clone().any(|kind| late(&kind));
            match waiter {
                Some(mut waiter) if granted && !stale => {
                    for kind in asked {
                        let bucket = self.answer.at.bucket(kind);
                        local.charge(kind, bucket, ask[kind.index()], self.now, &mut waiter.has);
                    }
                    tells.push(self.go(&item.application, waiter));
                }
                // Too late, or the request is gone: back with it.
                waiter if granted => {
                    for kind in asked {
                        local.return_grant(kind, self.answer.at.bucket(kind), ask[kind.index()]);
                    }
                    again.extend(waiter);
                }
                Some(mut waiter) => {
                    let lacks = |kind: Kind| lacking[kind.index()];
                    if !waiter.again && local.has_at_hand(&waiter.needs, &self.at, self.now, lacks) {
                        waiter.again = true;
                        again.push(waiter);
                    } else {
                        tells.push(self.no(local, waiter, lacks));
                    }
                }
                None => {}
            }
        }
        let back = again.len();
        local.requeue(again, self.now);
        (tells, back)
    }

    fn go(&self, application: &Arc<str>, waiter: Waiter) -> Tell {
        let reservation = Reservation::new(self.shared, application, &waiter.quota, waiter.has);
        (waiter.tell, Verdict::Go(Unclaimed::new(reservation)))
    }

    fn no(&self, local: &mut Local, mut waiter: Waiter, lacks: impl Fn(Kind) -> bool) -> Tell {
        local.give_back(&mut waiter.has, self.now);
        for kind in Kind::ALL.into_iter().filter(|kind| lacks(*kind)) {
            let until = self.now + self.shared.config.recheck;
            local.deny(kind, waiter.needs[kind.index()], until);
        }
        let refusal = local.refusal(&waiter.needs, &self.at, self.now, lacks);
        (waiter.tell, refusal.map_or(Verdict::Lost, Verdict::No))
    }
}
