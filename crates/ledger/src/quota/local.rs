//! What this replica holds of one application's limits.
//!
//! Owns leases at hand, reservations under way, what is still to be reported, and what the store was last seen
//! to hold. Every method is a few additions: they run under the lock that every request takes. No I/O.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::account::{Item, Key, Report};
use super::calendar::{Moment, SECOND};
use super::kind::{Kind, PerKind, Span};
use super::refusal::{Exceeded, Level, Refusal, Standing};
use super::reservation::Unclaimed;
use crate::identity::Quota;

/// A share of a limit, up to which a replica holds more than its requests need: a twentieth.
const SHARE: u64 = 20;

/// Amounts of a bucket that a request has reserved; `None` where there was no limit.
pub(super) type Charges = PerKind<Option<(i64, u64)>>;

/// What is told to a request that waited.
#[derive(Debug)]
pub(super) enum Verdict {
    Go(Unclaimed),
    No(Refusal),
    /// The store does not answer.
    Lost,
}

/// A request that waits for the store.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) quota: Quota,
    pub(super) needs: PerKind<u64>,
    /// What it has already, from what was at hand.
    pub(super) has: Charges,
    /// Whether it was short although all that is at hand would have sufficed: now that is given back first.
    pub(super) again: bool,
    pub(super) tell: oneshot::Sender<Verdict>,
}

/// The store's clock, read once and carried on by our own.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoreTime {
    pub(super) micros: i64,
    pub(super) read_at: Duration,
}

impl StoreTime {
    pub(super) fn at(&self, now: Duration) -> i64 {
        let since = now.saturating_sub(self.read_at).as_micros();
        self.micros.saturating_add(i64::try_from(since).unwrap_or(i64::MAX))
    }
}

/// One kind's share.
#[derive(Debug, Default)]
pub(super) struct Meter {
    pub(super) limit: Option<u64>,
    /// Granted and not reserved.
    pub(super) free: u64,
    /// Of which bucket.
    pub(super) bucket: i64,
    /// Until when it may be used, by our clock.
    pub(super) until: Duration,
    /// Under way, by bucket; only of kinds that are leased.
    pub(super) reserved: BTreeMap<i64, u64>,
    pub(super) reports: BTreeMap<i64, Report>,
    /// Taken by all, by bucket, when the store was last asked.
    pub(super) seen: Vec<(i64, u64)>,
    /// What of that was spent for good.
    pub(super) spent: u64,
    /// A need that the store had no room for, and until when that is believed.
    denied: Option<(u64, Duration)>,
    /// What was reserved in this second and in the one before.
    second: u64,
    use_now: u64,
    use_before: u64,
}

impl Meter {
    fn at_hand(&self, now: Duration) -> u64 {
        if now < self.until { self.free } else { 0 }
    }

    fn report(&mut self, bucket: i64, report: &Report) {
        self.reports.entry(bucket).or_default().add(report);
    }

    fn roll(&mut self, now: Duration) {
        let second = now.as_secs();
        if second != self.second {
            self.use_before = if second == self.second + 1 { self.use_now } else { 0 };
            (self.second, self.use_now) = (second, 0);
        }
    }

    /// What this replica wants at hand: one second of what it uses, and no more than a share of the limit.
    fn target(&mut self, now: Duration) -> u64 {
        self.roll(now);
        self.limit.map_or(0, |limit| (limit / SHARE).min(self.use_now.max(self.use_before)))
    }

    /// Puts what is at hand among what is given back.
    fn retire(&mut self) {
        let returned = std::mem::take(&mut self.free);
        if returned > 0 {
            self.report(self.bucket, &Report { returned, ..Report::default() });
        }
    }
}

/// One application.
#[derive(Debug, Default)]
pub(super) struct Local {
    pub(super) meters: PerKind<Meter>,
    pub(super) waiting: VecDeque<Waiter>,
    /// Requests that the transaction under way asks for.
    pub(super) asked: usize,
    /// What it reports.
    sent: Vec<(Key, Report)>,
    /// Whether it is among those to look at in the next turn.
    pub(super) listed: bool,
    pub(super) touched: Duration,
    /// By how much its seconds are ahead of the store's clock, as last told.
    pub(super) ahead: i64,
}

impl Local {
    pub(super) fn set_limits(&mut self, limits: &PerKind<Option<u64>>) {
        for (meter, limit) in self.meters.iter_mut().zip(limits) {
            if meter.limit != *limit {
                // What a narrower limit had no room for, a wider one may have.
                (meter.limit, meter.denied) = (*limit, None);
            }
        }
    }

    /// Whether requests wait, behind whom new ones must stand.
    pub(super) fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || self.asked > 0
    }

    /// Reserves all that a request needs from what is at hand, or nothing.
    pub(super) fn take(&mut self, needs: &PerKind<u64>, now: Duration) -> Option<Charges> {
        let short = |(meter, need): (&Meter, &u64)| meter.limit.is_some() && meter.at_hand(now) < *need;
        if self.meters.iter().zip(needs).any(short) {
            return None;
        }
        let mut charges = Charges::default();
        for kind in Kind::ALL {
            self.take_one(kind, needs[kind.index()], now, &mut charges);
        }
        Some(charges)
    }

    /// Reserves of one kind, if there is enough at hand.
    pub(super) fn take_one(&mut self, kind: Kind, need: u64, now: Duration, charges: &mut Charges) {
        let meter = &mut self.meters[kind.index()];
        if meter.limit.is_none() || meter.at_hand(now) < need {
            return;
        }
        meter.free -= need;
        let bucket = meter.bucket;
        self.charge(kind, bucket, need, now, charges);
    }

    /// Notes that a request has reserved.
    pub(super) fn charge(
        &mut self,
        kind: Kind,
        bucket: i64,
        amount: u64,
        now: Duration,
        charges: &mut Charges,
    ) {
        let meter = &mut self.meters[kind.index()];
        if kind.is_leased() {
            *meter.reserved.entry(bucket).or_default() += amount;
        }
        meter.roll(now);
        meter.use_now = meter.use_now.saturating_add(amount);
        charges[kind.index()] = Some((bucket, amount));
    }

    /// Ends a reservation, of which so much is used.
    pub(super) fn settle(&mut self, kind: Kind, (bucket, amount): (i64, u64), used: u64, now: Duration) {
        let back = amount.saturating_sub(used);
        let mut report = Report { spent: used.saturating_sub(amount), ..Report::default() };
        let meter = &mut self.meters[kind.index()];
        if kind.is_leased() {
            report.settled = amount - back;
            if let Some(reserved) = meter.reserved.get_mut(&bucket) {
                *reserved = reserved.saturating_sub(amount);
                if *reserved == 0 {
                    meter.reserved.remove(&bucket);
                }
            }
        }
        if back > 0 {
            meter.denied = None;
            if meter.bucket == bucket && now < meter.until {
                meter.free += back;
            } else {
                report.returned = back;
            }
        }
        if report != Report::default() {
            meter.report(bucket, &report);
        }
    }

    /// Whether more should be fetched before somebody has to wait for it.
    pub(super) fn runs_low(&mut self, now: Duration) -> bool {
        let low = |meter: &mut Meter| meter.limit.is_some() && meter.at_hand(now) < meter.target(now) / 2;
        self.meters.iter_mut().any(low)
    }

    /// What is to be said to the store, and the requests for which it asks.
    pub(super) fn plan(&mut self, application: &Arc<str>, at: &Moment, now: Duration) -> (Item, Vec<Waiter>) {
        let at = at.ahead_by(self.ahead);
        let mut waiters: Vec<Waiter> = self.waiting.drain(..).filter(|w| !w.tell.is_closed()).collect();
        let again = waiters.iter().any(|waiter| waiter.again);
        for kind in Kind::ALL {
            let meter = &mut self.meters[kind.index()];
            let target = meter.target(now);
            if again || now >= meter.until {
                meter.retire();
            } else if kind.is_leased() && meter.free > target {
                let returned = meter.free - target;
                meter.free = target;
                meter.report(meter.bucket, &Report { returned, ..Report::default() });
            }
        }
        let mut asks = Vec::with_capacity(waiters.len());
        for waiter in &mut waiters {
            for kind in Kind::ALL {
                self.take_one(kind, waiter.needs[kind.index()], now, &mut waiter.has);
            }
            asks.push(Kind::ALL.map(|kind| {
                let i = kind.index();
                let short = waiter.has[i].is_none() && self.meters[i].limit.is_some();
                if short { waiter.needs[i] } else { 0 }
            }));
        }
        let headroom = Kind::ALL.map(|kind| {
            let meter = &mut self.meters[kind.index()];
            let target = meter.target(now);
            // What is of a second that is over ends before the next turn.
            let lasts = meter.bucket == at.bucket(kind);
            if lasts { target.saturating_sub(meter.at_hand(now)) } else { target }
        });
        let mut reports: Vec<(Key, Report)> = Vec::new();
        for kind in Kind::ALL {
            let all = std::mem::take(&mut self.meters[kind.index()].reports);
            reports.extend(all.into_iter().map(|(bucket, report)| ((kind, bucket), report)));
        }
        self.asked = waiters.len();
        self.sent.clone_from(&reports);
        let limits = self.meters.each_ref().map(|meter| meter.limit);
        (Item { application: application.clone(), limits, reports, asks, headroom }, waiters)
    }

    /// Whether a plan would have nothing to say.
    pub(super) fn is_quiet(&mut self, now: Duration) -> bool {
        let quiet = |meter: &mut Meter| meter.free == 0 && meter.reports.is_empty() && meter.target(now) == 0;
        self.waiting.is_empty()
            && self.asked == 0
            && self.sent.is_empty()
            && self.meters.iter_mut().all(quiet)
    }

    /// Whether nothing would be lost if it were forgotten.
    pub(super) fn is_idle(&mut self, now: Duration) -> bool {
        self.is_quiet(now) && self.meters.iter().all(|meter| meter.reserved.is_empty())
    }

    /// The transaction under way took effect, or it did not: then it is yet to be said what it reported.
    pub(super) fn sent(&mut self, arrived: bool) {
        for ((kind, bucket), report) in std::mem::take(&mut self.sent) {
            if !arrived {
                self.meters[kind.index()].report(bucket, &report);
            }
        }
    }

    /// Undoes what a request has reserved.
    pub(super) fn give_back(&mut self, charges: &mut Charges, now: Duration) {
        for kind in Kind::ALL {
            if let Some(charge) = charges[kind.index()].take() {
                self.settle(kind, charge, 0, now);
            }
        }
    }

    /// Requests wait again, before all others.
    pub(super) fn requeue(&mut self, waiters: Vec<Waiter>, now: Duration) {
        for mut waiter in waiters.into_iter().rev() {
            self.give_back(&mut waiter.has, now);
            self.waiting.push_front(waiter);
        }
        self.asked = 0;
    }

    /// Gives back what was granted and came to nobody's hand.
    pub(super) fn return_grant(&mut self, kind: Kind, bucket: i64, returned: u64) {
        self.meters[kind.index()].report(bucket, &Report { returned, ..Report::default() });
    }

    /// Whether what the store lacks for a request lies idle here.
    pub(super) fn has_at_hand(
        &self,
        needs: &PerKind<u64>,
        at: &Moment,
        now: Duration,
        lacks: impl Fn(Kind) -> bool,
    ) -> bool {
        let mut lacking = Kind::ALL.into_iter().filter(|kind| lacks(*kind));
        lacking.all(|kind| self.remaining(kind, at, now) >= needs[kind.index()])
    }

    /// Puts all that is at hand among what is given back.
    pub(super) fn retire(&mut self) {
        for meter in &mut self.meters {
            meter.retire();
        }
    }

    /// Something granted comes to hand.
    pub(super) fn grant(&mut self, kind: Kind, bucket: i64, amount: u64, until: Duration) {
        let meter = &mut self.meters[kind.index()];
        if amount == 0 {
            return;
        }
        if meter.bucket != bucket {
            meter.retire();
        }
        (meter.bucket, meter.until) = (bucket, until);
        meter.free += amount;
    }

    pub(super) fn deny(&mut self, kind: Kind, need: u64, until: Duration) {
        let meter = &mut self.meters[kind.index()];
        let least = meter.denied.map_or(need, |(least, _)| least.min(need));
        meter.denied = Some((least, until));
    }

    /// Whether the store just said that there is no room for this.
    pub(super) fn is_denied(&self, needs: &PerKind<u64>, now: Duration) -> bool {
        let denied = |(meter, need): (&Meter, &u64)| {
            meter.limit.is_some() && meter.denied.is_some_and(|(least, until)| *need >= least && now < until)
        };
        self.meters.iter().zip(needs).any(denied)
    }

    /// This replica was given up: what it held is no longer its own. Requests under way are counted anew, and
    /// what they used meanwhile is too, so that nothing is counted less than once.
    pub(super) fn given_up(&mut self) {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.is_leased()) {
            let meter = &mut self.meters[kind.index()];
            (meter.free, meter.until) = (0, Duration::ZERO);
            for report in meter.reports.values_mut() {
                let spent = report.spent.saturating_add(report.settled);
                *report = Report { spent, ..Report::default() };
            }
            for (bucket, forced) in meter.reserved.clone() {
                meter.report(bucket, &Report { forced, ..Report::default() });
            }
        }
    }

    /// Leases end with the replica's own.
    pub(super) fn expire(&mut self) {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.is_leased()) {
            self.meters[kind.index()].until = Duration::ZERO;
        }
    }

    /// What is left of a limit, as far as is known here.
    pub(super) fn remaining(&self, kind: Kind, at: &Moment, now: Duration) -> u64 {
        let (meter, at) = (&self.meters[kind.index()], at.ahead_by(self.ahead));
        let counts = |bucket: i64| at.counts(kind, bucket);
        let seen = meter.seen.iter().filter(|(bucket, _)| counts(*bucket));
        let taken = seen.fold(0u64, |sum, (_, taken)| sum.saturating_add(*taken));
        let sent = self.sent.iter().filter(|((of, _), _)| *of == kind).map(|((_, bucket), r)| (bucket, r));
        let said = meter.reports.iter().chain(sent).filter(|(bucket, _)| counts(**bucket));
        let (back, more) = said.fold((0u64, 0u64), |(back, more), (_, report)| {
            (back + report.returned, more.saturating_add(report.forced).saturating_add(report.spent))
        });
        let mine = if counts(meter.bucket) && now < meter.until { meter.free } else { 0 };
        let taken = taken.saturating_sub(back).saturating_sub(mine).saturating_add(more);
        meter.limit.unwrap_or(u64::MAX).saturating_sub(taken)
    }

    /// Reserves without the store's leave, as if this replica were alone. `None` if what is known speaks against
    /// it.
    pub(super) fn take_alone(&mut self, needs: &PerKind<u64>, at: &Moment, now: Duration) -> Option<Charges> {
        let limited = |kind: &Kind| self.meters[kind.index()].limit.is_some();
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(limited).collect();
        if kinds.iter().any(|kind| self.remaining(*kind, at, now) < needs[kind.index()]) {
            return None;
        }
        let mut charges = Charges::default();
        for kind in kinds {
            let need = needs[kind.index()];
            self.take_one(kind, need, now, &mut charges);
            if charges[kind.index()].is_none() {
                let bucket = at.ahead_by(self.ahead).bucket(kind);
                self.meters[kind.index()].report(bucket, &Report { forced: need, ..Report::default() });
                self.charge(kind, bucket, need, now, &mut charges);
            }
        }
        Some(charges)
    }

    /// Why a request has to wait: of the limits without room the one that takes longest.
    pub(super) fn refusal(
        &self,
        needs: &PerKind<u64>,
        at: &Moment,
        now: Duration,
        without: impl Fn(Kind) -> bool,
    ) -> Option<Refusal> {
        let exceeded = |kind: Kind| {
            let limit = self.meters[kind.index()].limit?;
            let (requested, remaining) = (needs[kind.index()], self.remaining(kind, at, now));
            let retry_after = self.retry_after(kind, requested, at);
            Some(Exceeded { kind, limit, remaining, requested, retry_after: Some(retry_after) })
        };
        let all = Kind::ALL.into_iter().filter(|kind| without(*kind)).filter_map(exceeded);
        all.max_by_key(|exceeded| exceeded.retry_after).map(Refusal::Exceeded)
    }

    /// Until there will be room, if nobody takes more: soon, where what is reserved now may come back.
    fn retry_after(&self, kind: Kind, need: u64, at: &Moment) -> Duration {
        let meter = &self.meters[kind.index()];
        let limit = meter.limit.unwrap_or(u64::MAX);
        let micros = match kind.span() {
            Span::Always => SECOND,
            Span::Day | Span::Month if meter.spent.saturating_add(need) <= limit => SECOND,
            Span::Day | Span::Month => at.usable(kind),
            Span::Window => {
                let mut taken = meter.seen.iter().fold(0u64, |sum, (_, taken)| sum.saturating_add(*taken));
                let mut ends = SECOND;
                for (bucket, amount) in &meter.seen {
                    if taken.saturating_add(need) <= limit {
                        break;
                    }
                    taken = taken.saturating_sub(*amount);
                    ends = at.ahead_by(self.ahead).until_over(*bucket);
                }
                ends
            }
        };
        Duration::from_micros(micros.max(0) as u64)
    }

    fn level(&self, kind: Kind, at: &Moment, now: Duration) -> Option<Level> {
        let meter = &self.meters[kind.index()];
        let limit = meter.limit?;
        let remaining = self.remaining(kind, at, now);
        let micros = match kind.span() {
            _ if remaining == limit => 0,
            Span::Always => 0,
            Span::Day | Span::Month => at.usable(kind),
            // What this replica reserves from what is at hand is of this second, or of the one before.
            Span::Window => {
                let newest = meter.seen.last().map_or(meter.bucket, |(bucket, _)| *bucket).max(meter.bucket);
                at.ahead_by(self.ahead).until_over(newest)
            }
        };
        Some(Level { limit, remaining, reset: Duration::from_micros(micros.max(0) as u64) })
    }

    pub(super) fn standing(&self, at: &Moment, now: Duration) -> Standing {
        let tokens = Kind::ALL.into_iter().filter(|kind| kind.is_tokens());
        Standing {
            requests: self.level(Kind::RequestsPerMinute, at, now),
            tokens: tokens.filter_map(|kind| self.level(kind, at, now)).next(),
        }
    }
}
