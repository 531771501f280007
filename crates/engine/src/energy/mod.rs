//! What each sequence cost in device time and in energy.
//!
//! Owns the arithmetic of sharing: a step's time among its rows, the energy counter's growth among the time that
//! steps took. Pure: no clock and no I/O; whoever drives it says what time it is and what the counter showed. It
//! never decides what a step computes.
//!
//! **Work.** A step's time is shared in proportion to the tokens that each row computes; a token drawn and a prompt
//! token weigh the same. In one step both pass through the same matmuls, which read each weight once for all of
//! them. What makes decoding dear is that its steps have few tokens, and that is in their time already; a weight on
//! top would count it twice. What the rule leaves out is attention over contexts of different lengths.
//!
//! **Energy.** The counter grows in jumps of 20 to 100 ms that do not fall on the ends of steps. So energy is not
//! shared among steps directly: windows of the counter give the power of a busy second, and a sequence's energy is
//! its device time at the power of the window it lies in ([`power`]).

mod device;
mod power;

use std::fmt::Debug;
use std::time::Duration;

use crate::time::Time;
use device::StepTimes;
use power::Power;

/// The device's energy counter.
pub trait EnergyCounter: Debug + Send + Sync {
    /// Microjoules of all devices together since some moment in the past; none if it cannot be read now. It may
    /// stand still and begin anew. Called on the engine's thread, at most every [`READ_INTERVAL`].
    fn microjoules(&self) -> Option<u64>;
}

/// Least time between two readings of the counter.
pub const READ_INTERVAL: Duration = Duration::from_millis(20);

/// How a sequence's energy became known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EnergyMethod {
    /// It did not: there is no counter, or it has not moved yet.
    #[default]
    None,
    /// From the device's counter.
    Counter,
    /// Mostly at the last known power: the counter stood still, began anew, or has shown too little so far.
    Estimated,
}

/// What a sequence cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bill {
    /// Its share of the steps' time, times the number of devices, microseconds.
    pub device_micros: u64,
    /// Its share of the devices' energy, microjoules.
    pub energy_microjoules: u64,
    /// Where the energy comes from.
    pub method: EnergyMethod,
}

/// A row of a submitted step that is not collected yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Tokens of the row.
    pub tokens: u32,
    /// Tokens of the step.
    pub step_tokens: u64,
}

/// One sequence's account. Times are of steps: wall time of all devices at once, nanoseconds.
#[derive(Clone, Debug, Default)]
struct Account {
    /// Share of all steps so far.
    nanos: u64,
    /// Of this, what has no price yet.
    unpriced: u64,
    /// Energy of what has one.
    nanojoules: u64,
    /// Of this, what windows of the counter gave.
    measured: u64,
    /// What was billed, once it was: what comes after changes only the pot.
    billed: Option<u64>,
}

/// Accounts of all sequences that live, by small indices that the caller reuses.
#[derive(Debug)]
pub struct Meter {
    devices: u64,
    accounts: Vec<Account>,
    times: StepTimes,
    power: Power,
    /// What bills and steps differ by, nanoseconds; shared out with the next step.
    carry: i64,
    /// Device nanoseconds below a microsecond that bills left over.
    rest: u64,
}

impl Meter {
    /// An empty one, for steps that run on `devices` at once.
    #[must_use]
    pub fn new(devices: u32) -> Self {
        Self {
            devices: u64::from(devices.max(1)),
            accounts: Vec::new(),
            times: StepTimes::default(),
            power: Power::default(),
            carry: 0,
            rest: 0,
        }
    }

    /// Opens an account, empty whatever it held.
    pub fn open(&mut self, index: u32) {
        let index = index as usize;
        if self.accounts.len() <= index {
            self.accounts.resize_with(index + 1, Account::default);
        }
        self.accounts[index] = Account::default();
    }

    /// No step was running up to `now`, apart from those that were told.
    pub fn rested(&mut self, now: Time) {
        self.power.known_until(now);
        self.settle();
    }

    /// The counter showed `microjoules` at `at`.
    pub fn reading(&mut self, at: Time, microjoules: u64) {
        self.power.reading(at, microjoules);
        self.settle();
    }

    /// A step was collected at `now`, on which the devices worked for `device_time`. Rows are indices of accounts
    /// with the tokens that they computed.
    pub fn step(&mut self, now: Time, device_time: Duration, rows: impl Iterator<Item = (u32, u32)> + Clone) {
        let nanos = i64::try_from(device_time.as_nanos()).unwrap_or(i64::MAX);
        let total: u64 = rows.clone().map(|(_, tokens)| u64::from(tokens)).sum();
        self.times.note(total, nanos.unsigned_abs());
        self.power.step(now, nanos.unsigned_abs());
        let pot = nanos.saturating_add(self.carry);
        let shared = if total == 0 { 0 } else { pot.max(0).unsigned_abs() };
        self.carry = pot - shared.cast_signed();
        // Shares end where the exact sums of all shares so far end, rounded down: their sum is exact.
        let (mut work, mut given) = (0, 0);
        for (index, tokens) in rows {
            work += u64::from(tokens);
            let until = (u128::from(shared) * u128::from(work) / u128::from(total.max(1))) as u64;
            let account = &mut self.accounts[index as usize];
            account.nanos += until - given;
            if account.billed.is_none() {
                account.unpriced += until - given;
            }
            given = until;
        }
        self.settle();
    }

    /// Gives what has no price yet the price of a window that closed, if one did.
    fn settle(&mut self) {
        let open = |account: &&mut Account| account.billed.is_none() && account.unpriced > 0;
        if !self.power.has_news() {
            return;
        }
        let unpriced: u64 = self.accounts.iter_mut().filter(open).map(|account| account.unpriced).sum();
        let Some(price) = self.power.close(unpriced) else { return };
        for account in self.accounts.iter_mut().filter(open) {
            let nanojoules = (account.unpriced as f64 * price.watts) as u64;
            account.nanojoules += nanojoules;
            account.measured += if price.measured { nanojoules } else { 0 };
            account.unpriced = 0;
            self.power.attribute(nanojoules);
        }
    }

    /// What a sequence costs that ends now. Rows under way are billed at the time of the last step of about their
    /// step's size; what that is wrong by goes into the pot of the step that follows its [`Meter::close`].
    pub fn bill(&mut self, index: u32, pending: impl Iterator<Item = Pending>) -> Bill {
        let ahead: u64 = pending
            .map(|row| {
                let time = u128::from(self.times.of(row.step_tokens));
                (time * u128::from(row.tokens) / u128::from(row.step_tokens.max(1))) as u64
            })
            .sum();
        let account = &mut self.accounts[index as usize];
        let nanos = account.nanos + ahead;
        let unpriced = account.unpriced + ahead;
        account.billed = Some(nanos);
        account.unpriced = 0;
        let estimate = (unpriced as f64 * self.power.busy_watts().unwrap_or(0.0)) as u64;
        let nanojoules = account.nanojoules + estimate;
        self.power.attribute(estimate);
        let device = nanos * self.devices + self.rest;
        self.rest = device % 1000;
        let method = match self.power.busy_watts() {
            Some(_) if account.measured >= nanojoules / 2 || self.power.is_fresh() => EnergyMethod::Counter,
            Some(_) => EnergyMethod::Estimated,
            None => EnergyMethod::None,
        };
        Bill { device_micros: device / 1000, energy_microjoules: nanojoules / 1000, method }
    }

    /// The account's last step was collected, or will never be.
    pub fn close(&mut self, index: u32) {
        let account = &mut self.accounts[index as usize];
        if let Some(billed) = account.billed.take() {
            self.carry += account.nanos.cast_signed() - billed.cast_signed();
        }
        *account = Account::default();
    }

    /// Energy that sequences have been charged with, microjoules. Only grows.
    #[must_use]
    pub fn attributed_microjoules(&self) -> u64 {
        self.power.attributed() / 1000
    }

    /// Energy of the time without a step, microjoules. Only grows.
    #[must_use]
    pub fn idle_microjoules(&self) -> u64 {
        self.power.idle() / 1000
    }
}
