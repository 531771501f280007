//! From a counter that jumps to the power of a busy and of an idle second.
//!
//! Owns the windows of the counter and the meter's books: what was attributed, what was idle, and that both
//! together follow the counter. It never knows a sequence.
//!
//! A jump that is seen at `t` happened after the reading before, and not earlier than the counter's period before
//! `t`: the middle is taken, and half of the interval is the error. A window opens at one jump and closes at a
//! later one, as soon as the errors of its two edges are small against its busy energy, or after [`LONGEST`]. Until
//! it closes, its power counts the more the better it is known. Sequences that end meanwhile are charged at that
//! power; by what they were charged wrongly the books differ from the counter, and the difference is paid back in
//! small parts by what is priced later, and wholly by the next idle time.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Time;

/// Longest period of a counter that moves, nanoseconds.
const PERIOD: u64 = 100_000_000;
/// Error of a window's edges, relative to its busy energy, at which it closes.
const TOLERANCE: f64 = 0.04;
/// A window that is as long closes at the next jump, nanoseconds.
const LONGEST: u64 = 2_000_000_000;
/// How far the power of an idle second is trusted, relative.
const IDLE_ERROR: f64 = 0.03;
/// Power of an idle second while it is not known, relative to a busy one's.
const IDLE_GUESS: f64 = 0.2;
/// Most that a price may leave the window's power to mend the books, relative.
const MOST_MENDED: f64 = 0.03;
/// How fast a power changes while nobody looks, relative, a second.
const DRIFT: f64 = 0.02;
/// Errors by which a new power may leave the old one before that is forgotten.
const SURPRISE: f64 = 3.0;
/// Share of busy time up to which a window teaches the power of an idle second.
const IDLE_WINDOW: f64 = 0.02;
/// After so long without a jump, what is charged is an estimate, nanoseconds.
const STALE: u64 = 1_000_000_000;
/// So is what is charged at a power of a larger variance.
const VAGUE: f64 = 1.2;
/// Most points of the timeline: thousands of steps between two readings of a counter that is read at most every 20 ms.
const MAX_POINTS: usize = 1 << 14;

/// A place on the timeline, nanoseconds: time since the start, and busy time up to it.
#[derive(Clone, Copy, Debug, Default)]
struct Point {
    at: u64,
    busy: u64,
}

impl Point {
    /// Busy and idle time since `earlier`.
    fn since(self, earlier: Self) -> (f64, f64) {
        let busy = self.busy.saturating_sub(earlier.busy);
        (busy as f64, self.at.saturating_sub(earlier.at).saturating_sub(busy) as f64)
    }
}

/// When steps ran. Points are in order; between two, busy time grows evenly.
#[derive(Debug)]
struct Timeline(VecDeque<Point>);

impl Default for Timeline {
    fn default() -> Self {
        Self(VecDeque::from([Point::default()]))
    }
}

impl Timeline {
    fn last(&self) -> Point {
        self.0.back().copied().unwrap_or_default()
    }

    /// Idle up to `at`.
    fn rest(&mut self, at: u64) {
        let Point { at: last, busy } = self.last();
        if at > last {
            self.push(Point { at, busy });
        }
    }

    /// A step of `nanos` that ended by `at`. What has no room since the step before goes into idle time before it:
    /// the step had ended long before anybody looked.
    fn step(&mut self, at: u64, nanos: u64) {
        let last = self.last();
        let first = self.0.front().copied().unwrap_or_default();
        let inside = nanos.min(at.saturating_sub(last.at));
        let (_, room) = last.since(first);
        let before = (nanos - inside).min(room as u64);
        self.push(Point { at: last.at, busy: last.busy + before });
        self.rest(at.saturating_sub(inside));
        let Point { busy, .. } = self.last();
        if inside > 0 {
            self.push(Point { at, busy: busy + inside });
        }
    }

    fn push(&mut self, point: Point) {
        if self.0.len() >= MAX_POINTS {
            // Every other: what lies between two is drawn as a line anyway.
            let mut keep = false;
            self.0.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.0.push_back(point);
    }

    /// The place at a time.
    fn at(&self, at: u64) -> Point {
        let after = self.0.partition_point(|point| point.at < at);
        match (after.checked_sub(1).and_then(|before| self.0.get(before)), self.0.get(after)) {
            (Some(before), Some(after)) => {
                let part = (at - before.at) as f64 / (after.at - before.at).max(1) as f64;
                Point { at, busy: before.busy + ((after.busy - before.busy) as f64 * part) as u64 }
            }
            (Some(last), None) => Point { at, busy: last.busy },
            (None, first) => first.copied().unwrap_or_default(),
        }
    }

    /// Forgets what lies wholly before a time.
    fn forget(&mut self, before: u64) {
        while self.0.get(1).is_some_and(|second| second.at <= before) {
            self.0.pop_front();
        }
    }
}

/// Where a window begins.
#[derive(Clone, Copy, Debug, Default)]
struct Edge {
    point: Point,
    /// The counter, nanojoules since the first reading.
    total: f64,
    /// Busy and idle time by which the jump may lie earlier or later.
    error: (f64, f64),
    /// Power of a busy second when the window began.
    busy: Option<Watts>,
}

/// What is known of the counter.
#[derive(Clone, Copy, Debug)]
struct Counter {
    microjoules: u64,
    /// When it was read last, and when it last showed something new.
    read: u64,
    moved: u64,
}

/// What busy time costs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Price {
    /// Nanojoules a nanosecond.
    pub(super) watts: f64,
    /// The window's own, and not the last known.
    pub(super) measured: bool,
}

#[derive(Debug, Default)]
pub(super) struct Power {
    line: Timeline,
    counter: Option<Counter>,
    /// It has jumped.
    begun: bool,
    /// A reading from a time of which it is not known yet whether a step ran.
    held: Option<(u64, u64)>,
    window: Edge,
    /// The last jump.
    last: Point,
    /// Where that jump was and its error if the counter had stood still before: true if it stands still after.
    doubtful: Option<(Point, (f64, f64))>,
    /// The counter without its resets, nanojoules since the first reading.
    total: f64,
    /// Power of a busy and of an idle second.
    busy: Option<Watts>,
    rest: Option<Watts>,
    /// Power of a busy second of the window that closed, if it is known well.
    measured: Option<f64>,
    /// A window closed: the last jump, and when it was seen.
    closed: Option<(Point, u64)>,
    /// Up to here idle time is in the books.
    booked: Point,
    attributed: u64,
    idle: u64,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A power and how well it is known.
#[derive(Clone, Copy, Debug)]
struct Watts {
    value: f64,
    /// Square of its error in units of [`TOLERANCE`].
    variance: f64,
    /// When it was known so well, nanoseconds.
    at: u64,
}

impl Watts {
    fn variance_at(self, at: u64) -> f64 {
        let drifted = DRIFT / TOLERANCE * at.saturating_sub(self.at) as f64 / 1e9;
        self.variance + drifted * drifted
    }

    /// What is known after a new value: the mean of both, each weighted by how well it is known by then (a Kalman
    /// filter of one number), or the new one alone where both cannot be true.
    fn after(old: Option<Self>, new: Self) -> Self {
        let Some(old) = old else { return new };
        let variance = old.variance_at(new.at);
        let off = (new.value - old.value) / (old.value.max(1e-9) * TOLERANCE);
        let sum = variance + new.variance;
        if off * off > sum * SURPRISE * SURPRISE && new.variance <= 1.0 {
            return new;
        }
        let value = old.value + (new.value - old.value) * variance / sum.max(1e-9);
        Self { value, variance: variance * new.variance / sum.max(1e-9), at: new.at }
    }
}

impl Power {
    pub(super) fn known_until(&mut self, now: Time) {
        self.line.rest(nanos(now));
        self.release();
    }

    pub(super) fn step(&mut self, now: Time, device_nanos: u64) {
        self.line.step(nanos(now).max(self.line.last().at), device_nanos);
        self.release();
    }

    pub(super) fn reading(&mut self, at: Time, microjoules: u64) {
        self.held = Some((nanos(at), microjoules));
        self.release();
    }

    /// Power of a busy second, watts: nanojoules a nanosecond.
    pub(super) fn busy_watts(&self) -> Option<f64> {
        self.busy.map(|watts| watts.value)
    }

    fn idle_watts(&self) -> Option<f64> {
        self.rest.map(|watts| watts.value)
    }

    /// Whether that power rests on what the counter has just shown.
    pub(super) fn is_fresh(&self) -> bool {
        let now = self.line.last().at;
        self.counter.is_some_and(|counter| now.saturating_sub(counter.moved) < STALE)
            && self.busy.is_some_and(|watts| watts.variance_at(now) <= VAGUE)
    }

    pub(super) fn attribute(&mut self, nanojoules: u64) {
        self.attributed += nanojoules;
    }

    pub(super) fn attributed(&self) -> u64 {
        self.attributed
    }

    pub(super) fn idle(&self) -> u64 {
        self.idle
    }

    pub(super) fn has_news(&self) -> bool {
        self.closed.is_some()
    }

    /// Looks at the held reading once the timeline has come to it.
    fn release(&mut self) {
        if let Some((at, microjoules)) = self.held
            && at <= self.line.last().at
        {
            self.held = None;
            self.look(at, microjoules);
        }
    }

    /// What busy and idle time should cost, nanojoules, at a mean power where no other is known.
    fn cost(&self, (busy, idle): (f64, f64), mean: f64) -> f64 {
        let busy_watts = self.busy_watts().unwrap_or(mean);
        busy * busy_watts + idle * self.idle_watts().unwrap_or(busy_watts * IDLE_GUESS)
    }

    /// What an interval should have cost, nanojoules.
    fn expected(&self, interval: (f64, f64)) -> f64 {
        self.cost(interval, 0.0)
    }

    fn look(&mut self, at: u64, microjoules: u64) {
        let Some(counter) = self.counter else {
            let point = self.line.at(at.saturating_sub(PERIOD / 2));
            self.counter = Some(Counter { microjoules, read: at, moved: at });
            (self.booked, self.last, self.window.point) = (point, point, point);
            return;
        };
        let earliest = counter.read.max(at.saturating_sub(PERIOD));
        self.counter = Some(Counter { read: at, ..counter });
        if microjoules == counter.microjoules {
            if at - counter.moved > PERIOD
                && let Some((jump, error)) = self.doubtful.take()
                && self.last.at == self.window.point.at
            {
                (self.last, self.window.point, self.window.error) = (jump, jump, error);
            }
        } else {
            self.counter = Some(Counter { microjoules, read: at, moved: at });
            let (jump, error) = self.between(earliest, at);
            self.doubtful = (earliest > counter.read).then(|| self.between(counter.read, at));
            if microjoules > counter.microjoules {
                self.total += (microjoules - counter.microjoules) as f64 * 1e3;
                if std::mem::replace(&mut self.begun, true) {
                    self.jump(at, jump, error);
                } else {
                    // How long the counter had shown its first value nobody knows.
                    self.close_window(at, jump, error);
                }
            } else {
                // It began anew: nobody knows what it lost, so that the window counts as expected and teaches nothing.
                self.total += self.expected(jump.since(self.last));
                self.close_window(at, jump, error);
            }
            self.last = jump;
        }
        self.line.forget(at.min(counter.read));
    }

    /// A jump in an interval: its middle, and the error.
    fn between(&self, earliest: u64, at: u64) -> (Point, (f64, f64)) {
        let (busy, idle) = self.line.at(at).since(self.line.at(earliest));
        (self.line.at(earliest.midpoint(at)), (busy / 2.0, idle / 2.0))
    }

    /// The counter jumped at `jump`, seen at `at`.
    fn jump(&mut self, at: u64, jump: Point, error: (f64, f64)) {
        let (busy, idle) = jump.since(self.window.point);
        let span = busy + idle;
        let energy = self.total - self.window.total;
        if span <= 0.0 {
            return;
        }
        let mean = energy / span;
        let long = span >= LONGEST as f64;
        let edges = self.cost(self.window.error, mean) + self.cost(error, mean);
        // Errors are squared: what is known half as well counts a quarter.
        let known = |value: f64, of: f64, error: f64| {
            let error = error / (TOLERANCE * of).max(1.0);
            Watts { value, variance: error * error, at: jump.at }
        };
        if busy < span * IDLE_WINDOW {
            let watts = (energy - self.busy_watts().unwrap_or(mean) * busy).max(0.0) / idle;
            let new = known(watts, energy, edges);
            if long || new.variance <= 1.0 {
                self.rest = Some(Watts::after(self.rest, new));
                self.close_window(at, jump, error);
            }
            return;
        }
        let unknown = energy * IDLE_GUESS / (busy + idle * IDLE_GUESS);
        let idle_watts = self.idle_watts().unwrap_or(unknown).min(mean);
        let busy_energy = energy - idle_watts * idle;
        let in_all = edges + IDLE_ERROR * idle_watts * idle;
        let new = known(busy_energy / busy, busy_energy, in_all);
        self.busy = Some(Watts::after(self.window.busy, new));
        if long || new.variance <= 1.0 {
            self.measured = (new.variance <= 1.0).then_some(new.value);
            self.close_window(at, jump, error);
        }
    }

    fn close_window(&mut self, at: u64, jump: Point, error: (f64, f64)) {
        self.window = Edge { point: jump, total: self.total, error, busy: self.busy };
        self.closed = Some((jump, at));
    }

    /// Puts the idle time up to a closed window's end into the books, and returns the price of a busy nanosecond,
    /// nanojoules, of which `unpriced` have none yet. None where nothing has a price.
    pub(super) fn close(&mut self, unpriced: u64) -> Option<Price> {
        let (jump, at) = self.closed.take()?;
        let now = self.line.at(at);
        let (_, idle_time) = now.since(self.booked);
        self.booked = now;
        let idle = self.expected((0.0, idle_time));
        let measured = self.measured.take();
        let watts = measured.or(self.busy_watts());
        let busy = unpriced as f64 * watts.unwrap_or(0.0);
        let target = self.total + self.expected(now.since(jump));
        let gap = target - (self.attributed + self.idle) as f64 - idle - busy;
        let price = watts.filter(|_| unpriced > 0).map(|watts| {
            let mended = gap.clamp(-MOST_MENDED * busy, MOST_MENDED * busy);
            Price { watts: watts * (1.0 + mended / busy.max(1.0)), measured: measured.is_some() }
        });
        let idle = if price.is_none() { (idle + gap).max(0.0) } else { idle };
        self.idle += idle as u64;
        price
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_timeline_tells_busy_from_idle() {
        let mut line = Timeline::default();
        line.rest(10 * MS);
        line.step(30 * MS, 5 * MS);
        line.rest(40 * MS);
        let busy = |at: u64| line.at(at * MS).busy / MS;
        assert_eq!([0, 10, 25, 27, 30, 35, 99].map(busy), [0, 0, 0, 2, 5, 5, 5]);
        assert_eq!(line.at(35 * MS).since(line.at(20 * MS)), (5e6, 10e6));
        line.forget(30 * MS);
        assert_eq!((line.0.len(), line.at(35 * MS).busy), (2, 5 * MS));
    }

    #[test]
    fn a_step_that_had_ended_before_is_put_before() {
        let mut line = Timeline::default();
        line.rest(10 * MS);
        line.step(20 * MS, 10 * MS);
        // Collected late, together with the one before.
        line.step(21 * MS, 8 * MS);
        assert_eq!(line.last().busy, 18 * MS);
        // More than there is time for is nobody's.
        line.step(22 * MS, 90 * MS);
        assert_eq!(line.last().busy, 22 * MS);
    }

    #[test]
    fn a_timeline_is_bounded() {
        let mut line = Timeline::default();
        for at in 1..100_000 {
            line.step(at * MS, MS / 2);
        }
        assert!(line.0.len() <= MAX_POINTS);
        let half = line.at(50_000 * MS).busy as f64;
        assert!((half / 25e9 - 1.0).abs() < 1e-3, "{half}");
    }

    /// One step after the other, with the counter read at the end of each.
    fn run(power: &mut Power, from: u64, to: u64, step: u64, watts: u64) {
        let mut joules = power.counter.map_or(0, |counter| counter.microjoules);
        for at in (from + step..=to).step_by(step as usize) {
            power.step(ms(at), step * MS);
            joules += watts * step * 1000;
            power.reading(ms(at), joules);
            let nanojoules = power.close(step * MS).map(|price| (price.watts * (step * MS) as f64) as u64);
            power.attribute(nanojoules.unwrap_or(0));
        }
    }

    #[test]
    fn power_is_learned_and_a_reset_is_bridged() {
        let mut power = Power::default();
        assert!(!power.is_fresh() && power.busy_watts().is_none());
        run(&mut power, 0, 5000, 50, 400);
        assert!((power.busy_watts().unwrap_or(0.0) - 400.0).abs() < 1.0, "{power:?}");
        let before = power.total;
        power.step(ms(5050), 50 * MS);
        power.reading(ms(5050), 7);
        assert!((power.total - before - 20e9).abs() < 1e9, "a step of 50 ms at 400 W: {power:?}");
        run(&mut power, 5050, 6000, 50, 400);
        assert!((power.busy_watts().unwrap_or(0.0) - 400.0).abs() < 4.0, "{power:?}");
        assert!(power.is_fresh());
        power.known_until(ms(7_001));
        assert!(!power.is_fresh());
    }

    #[test]
    fn a_reading_waits_until_it_is_known_what_ran() {
        let mut power = Power::default();
        power.reading(ms(10), 1000);
        assert!(power.counter.is_none());
        power.known_until(ms(10));
        assert_eq!(power.counter.map(|counter| counter.microjoules), Some(1000));
    }
}
