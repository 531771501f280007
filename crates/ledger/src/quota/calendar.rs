//! When seconds, days and months begin.
//!
//! Owns the zone. Days and months are those of the zone, so a day may have 23 or 25 hours. The database of zones
//! is built in: an image needs none, and all replicas of a release agree.

use jiff::Timestamp;
use jiff::civil::{Date, date};
use jiff::tz::TimeZone;

use super::kind::{Kind, Span};

/// Microseconds of a second.
pub(super) const SECOND: i64 = 1_000_000;
/// Seconds for which a bucket of a window counts. What is taken in one second may be used until the end of the
/// next, so that no interval of 60 s sees the uses of more than 62 buckets.
pub(super) const WINDOW: i64 = 62;
/// Seconds for which something taken of a window may be used: to the end of the second after.
pub(super) const USABLE: i64 = 2;

/// A moment of the store's clock, and what it falls into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    /// Microseconds since 1970.
    pub(crate) micros: i64,
    /// Days since 1970.
    pub(super) day: i64,
    pub(super) day_ends: i64,
    /// Months since the year 0.
    pub(super) month: i64,
    pub(super) month_ends: i64,
    /// Seconds by which an application's seconds are ahead of the clock's: as many as it was ever set back.
    pub(super) ahead: i64,
}

impl Moment {
    /// As an application sees it.
    pub(super) fn ahead_by(self, ahead: i64) -> Self {
        Self { ahead, ..self }
    }

    /// As an application sees it whose last moment was in `last`: its seconds never go back, or what was taken in
    /// them would be counted in another's place.
    pub(super) fn not_before(self, last: i64) -> Self {
        Self { ahead: self.ahead + (last - self.second()).max(0), ..self }
    }

    /// The application's second.
    pub(super) fn second(&self) -> i64 {
        self.micros.div_euclid(SECOND) + self.ahead
    }

    /// The bucket in which something is counted now.
    pub(super) fn bucket(&self, kind: Kind) -> i64 {
        match kind.span() {
            Span::Window => self.second(),
            Span::Day => self.day,
            Span::Month => self.month,
            Span::Always => 0,
        }
    }

    /// Whether a bucket counts now.
    pub(super) fn counts(&self, kind: Kind, bucket: i64) -> bool {
        match kind.span() {
            Span::Window => bucket > self.bucket(kind) - WINDOW,
            _ => bucket == self.bucket(kind),
        }
    }

    /// How long what is taken now may be used, microseconds.
    pub(super) fn usable(&self, kind: Kind) -> i64 {
        match kind.span() {
            Span::Window => USABLE * SECOND - self.micros.rem_euclid(SECOND),
            Span::Day => self.day_ends - self.micros,
            Span::Month => self.month_ends - self.micros,
            Span::Always => i64::MAX,
        }
    }
}

impl Moment {
    /// Microseconds until a bucket of a window counts no more.
    pub(super) fn until_over(&self, bucket: i64) -> i64 {
        (bucket + WINDOW - self.second()) * SECOND - self.micros.rem_euclid(SECOND)
    }
}

/// A zone's calendar.
#[derive(Clone, Debug)]
pub(crate) struct Calendar(TimeZone);

/// No such zone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no zone of the IANA database, such as \"Europe/Paris\"")]
pub struct UnknownZone(pub String);

impl Calendar {
    /// # Errors
    /// No zone has that name.
    pub(crate) fn new(zone: &str) -> Result<Self, UnknownZone> {
        TimeZone::get(zone).map(Self).map_err(|_| UnknownZone(zone.to_owned()))
    }

    /// What a moment, in microseconds since 1970, falls into.
    pub(crate) fn at(&self, micros: i64) -> Moment {
        let at = Timestamp::from_microsecond(micros).unwrap_or_default().to_zoned(self.0.clone());
        let today = at.date();
        let next_month = today.last_of_month();
        Moment {
            micros,
            day: today.duration_since(date(1970, 1, 1)).as_hours() / 24,
            day_ends: self.day_after(today),
            month: i64::from(today.year()) * 12 + i64::from(today.month()) - 1,
            month_ends: self.day_after(next_month),
            ahead: 0,
        }
    }

    /// When the day after one begins. At the end of what can be said, never.
    fn day_after(&self, day: Date) -> i64 {
        let begins = day.tomorrow().and_then(|day| day.to_zoned(self.0.clone()));
        begins.and_then(|day| day.start_of_day()).map_or(i64::MAX, |day| day.timestamp().as_microsecond())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn micros(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_microsecond()
    }

    #[test]
    fn a_day_of_paris_has_23_24_or_25_hours() {
        let paris = Calendar::new("Europe/Paris").unwrap();
        for (before, begins, hours) in [
            ("2026-03-28T22:59:59Z", "2026-03-28T23:00:00Z", 23),
            ("2026-10-24T21:59:59Z", "2026-10-24T22:00:00Z", 25),
            ("2026-11-23T22:59:59Z", "2026-11-23T23:00:00Z", 24),
        ] {
            let (before, begins) = (paris.at(micros(before)), paris.at(micros(begins)));
            assert_eq!((before.day + 1, before.day_ends), (begins.day, begins.micros));
            assert_eq!(begins.day_ends - begins.micros, hours * 3600 * SECOND);
            assert_eq!(paris.at(begins.day_ends - 1).day, begins.day);
            assert_eq!(paris.at(begins.day_ends).day, begins.day + 1);
        }
    }

    #[test]
    fn months_follow_each_other_over_years() {
        let paris = Calendar::new("Europe/Paris").unwrap();
        let mut at = paris.at(micros("2023-12-15T00:00:00Z"));
        let mut days = 0;
        for _ in 0..25 {
            let next = paris.at(at.month_ends);
            assert_eq!((next.month, paris.at(at.month_ends - 1).month), (at.month + 1, at.month));
            days += next.day - at.day;
            at = next;
        }
        assert_eq!(at.micros, micros("2025-12-31T23:00:00Z"));
        assert_eq!(days, 17 + 366 + 365);
    }

    #[test]
    fn a_midnight_that_does_not_exist_is_the_first_moment_after() {
        // Cairo's clocks go from midnight to one.
        let cairo = Calendar::new("Africa/Cairo").unwrap();
        let before = cairo.at(micros("2026-04-23T12:00:00Z"));
        assert_eq!(before.day_ends, micros("2026-04-23T22:00:00Z"));
        assert_eq!(cairo.at(before.day_ends).day, before.day + 1);
        assert_eq!(Calendar::new("Mars/Olympus").unwrap_err(), UnknownZone("Mars/Olympus".into()));
    }

    #[test]
    fn no_minute_sees_more_than_the_buckets_that_count() {
        let at = |seconds: i64| Calendar::new("UTC").unwrap().at(seconds * SECOND + 1);
        let kind = Kind::TokensPerMinute;
        let taken = at(1000);
        assert_eq!(taken.usable(kind), 2 * SECOND - 1);
        // Used last just before 1002, so a minute before 1062.
        assert!(at(1061).counts(kind, taken.bucket(kind)));
        assert!(!at(1062).counts(kind, taken.bucket(kind)));
        assert_eq!((taken.until_over(1000), at(1061).until_over(1000)), (62 * SECOND - 1, SECOND - 1));
        // A clock that went back: the application's seconds do not.
        let back = at(990).not_before(1000);
        assert_eq!((back.second(), back.ahead), (1000, 10));
        assert_eq!(at(992).ahead_by(10).not_before(1001).second(), 1002);
        assert!(at(1 << 40).micros > 0, "no moment panics");
        assert!(Calendar::new("UTC").unwrap().at(i64::MAX).day_ends > 0);
    }
}
