//! What a request comes to in the ledger.
//!
//! Owns the words and numbers of a row's end. A row of a request that has failed waits for the engine's last word,
//! so that its waste is exact, but not for ever: its client waits for the row.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mirai_engine::{EnergyMethod as Method, FinishReason, SeqUsage};
use mirai_ledger::impact::Footprint;
use mirai_ledger::{Counts, EnergyMethod, Finish, Outcome};

use super::ticket::Ticket;
use crate::account::Account;
use crate::error::ApiError;
use crate::format::chunk::UsageCounts;

/// How long the engine may take to confirm the end of a request that has failed.
const CONFIRMATION: Duration = Duration::from_secs(1);

/// The client closed the connection before its answer: nginx's word for it, as in the access log.
const CLIENT_CLOSED: u16 = 499;

/// The end of a row, as far as it is known.
#[derive(Debug)]
pub(super) struct Settlement {
    account: Account,
    /// Its head has left as 200 whatever comes after.
    streams: bool,
    /// What its choices cost, those that have ended.
    spent: Spent,
    /// The least good end of a choice.
    worst: Finish,
    failed: Option<Failure>,
}

#[derive(Clone, Debug, Default)]
struct Spent {
    wasted_tokens: u64,
    device_micros: u64,
    energy_microjoules: u64,
    measured: bool,
    estimated: bool,
}

#[derive(Clone, Debug)]
struct Failure {
    status: u16,
    finish: Finish,
    at: Instant,
}

impl Spent {
    /// One estimate among measurements makes an estimate of the sum.
    fn method(&self) -> EnergyMethod {
        match (self.measured, self.estimated) {
            (_, true) => EnergyMethod::Estimated,
            (true, false) => EnergyMethod::Nvml,
            (false, false) => EnergyMethod::None,
        }
    }
}

/// Of two choices' ends the one that says more.
fn rank(finish: &Finish) -> u8 {
    match finish {
        Finish::Stop => 0,
        Finish::Length => 1,
        _ => 2,
    }
}

impl Settlement {
    pub(super) fn new(account: Account, streams: bool) -> Self {
        Self { account, streams, spent: Spent::default(), worst: Finish::Stop, failed: None }
    }

    /// Tells how far a stream is: before what it tells leaves.
    pub(super) fn checkpoint(&self, usage: UsageCounts, ticket: &Ticket) {
        self.account.checkpoint(|| self.counts(usage, ticket));
    }

    /// A choice, or an item, has ended; its client got `delivered` tokens of it, and where nothing measured its energy
    /// that was `estimate` microjoules. Returns the tokens that were computed in vain.
    pub(super) fn part_ended(
        &mut self,
        reason: &FinishReason,
        stopped: bool,
        usage: &SeqUsage,
        delivered: u32,
        estimate: Option<u64>,
    ) -> u64 {
        let wasted =
            u64::from(usage.wasted_tokens) + u64::from(usage.completion_tokens.saturating_sub(delivered));
        self.spent.wasted_tokens += wasted;
        self.spent.device_micros += usage.device_micros;
        let estimate = estimate.filter(|_| usage.energy_method == Method::None);
        self.spent.energy_microjoules += estimate.unwrap_or(usage.energy_microjoules);
        self.spent.measured |= usage.energy_method == Method::Counter;
        self.spent.estimated |= usage.energy_method == Method::Estimated || estimate.is_some();
        let finish = match reason {
            FinishReason::Deadline => Finish::Timeout,
            _ if stopped => Finish::Stop,
            _ => Finish::Length,
        };
        if rank(&finish) > rank(&self.worst) {
            self.worst = finish;
        }
        wasted
    }

    /// kWh and kgCO2eq of what has ended so far, if its energy is known.
    pub(super) fn impacts(&self, footprint: Option<Footprint>) -> Option<(f64, f64)> {
        let footprint = footprint.filter(|_| self.spent.method() != EnergyMethod::None)?;
        Some(footprint.impacts(self.spent.energy_microjoules))
    }

    /// What the request costs so far, if it has a price.
    pub(super) fn cost(&self, usage: UsageCounts, ticket: &Ticket) -> Option<f64> {
        self.account.cost(&self.counts(usage, ticket))
    }

    /// The request was ended with an error.
    pub(super) fn failed(&mut self, error: &ApiError) {
        let finish = if error.code == "deadline_exceeded" { Finish::Timeout } else { Finish::Error };
        let status = error.status.as_u16();
        self.failed.get_or_insert_with(|| Failure { status, finish, at: Instant::now() });
    }

    /// Whether the engine has kept silent for too long about a request that has failed.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.failed.as_ref().is_some_and(|failure| now.saturating_duration_since(failure.at) >= CONFIRMATION)
    }

    /// Ends the row. The first end counts.
    pub(super) fn close(&self, usage: UsageCounts, ticket: &Ticket) {
        self.account.close(|| {
            let (finish, status) = self.end(ticket);
            Outcome { counts: self.counts(usage, ticket), finish, status, energy_method: self.spent.method() }
        });
    }

    fn end(&self, ticket: &Ticket) -> (Finish, u16) {
        if let Some(status) = ticket.given_up() {
            return (Finish::Error, status);
        }
        if ticket.has_left() {
            return (Finish::Abort, CLIENT_CLOSED);
        }
        match &self.failed {
            Some(failure) if self.streams => (failure.finish.clone(), 200),
            Some(failure) => (failure.finish.clone(), failure.status),
            None => (self.worst.clone(), 200),
        }
    }

    fn counts(&self, usage: UsageCounts, ticket: &Ticket) -> Counts {
        let first = ticket.first_token_micros.load(Ordering::Relaxed);
        Counts {
            completion_tokens: usage.completion,
            reasoning_tokens: usage.reasoning,
            cached_tokens: usage.cached,
            wasted_tokens: self.spent.wasted_tokens,
            first_token_after: (first > 0).then_some(first),
            gpu_micros: self.spent.device_micros,
            energy_microjoules: self.spent.energy_microjoules,
        }
    }
}
