//! Moments as people and formats write them.
//!
//! Owns RFC 3339 in and out, on the proleptic Gregorian calendar, as microseconds since 1970 UTC. Knows no time
//! zone but offsets.

/// Microseconds of a second.
pub const SECOND: i64 = 1_000_000;
/// Microseconds of a minute.
pub const MINUTE: i64 = 60 * SECOND;
/// Microseconds of an hour.
pub const HOUR: i64 = 60 * MINUTE;
/// Microseconds of a day.
pub const DAY: i64 = 24 * HOUR;

/// A text is no moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a date as 2026-11-01 or a time as 2026-11-01T08:30:00Z or 2026-11-01T08:30:00+01:00")]
pub struct DateError;

/// Days since 1970 of a date. Howard Hinnant's `days_from_civil`.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The date of a day since 1970: `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days - era * 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    (year + era * 400 + i64::from(month <= 2), month, day)
}

/// Takes `digits` digits from the front.
fn number(text: &mut &str, digits: usize) -> Option<i64> {
    let head = text.get(..digits)?;
    if !head.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    *text = &text[digits..];
    head.parse().ok()
}

fn skip(text: &mut &str, any_of: &[char]) -> Option<()> {
    *text = text.strip_prefix(any_of)?;
    Some(())
}

fn parsed(mut text: &str) -> Option<i64> {
    let text = &mut text;
    let year = number(text, 4)?;
    skip(text, &['-'])?;
    let month = number(text, 2)?;
    skip(text, &['-'])?;
    let day = number(text, 2)?;
    let date = days(year, month, day);
    // What is no date comes back as another.
    if civil(date) != (year, month, day) {
        return None;
    }
    let date = date * DAY;
    if text.is_empty() {
        return Some(date);
    }
    skip(text, &['T', 't', ' '])?;
    let hour = number(text, 2)?;
    skip(text, &[':'])?;
    let minute = number(text, 2)?;
    let mut second = 0;
    let mut fraction = 0;
    if skip(text, &[':']).is_some() {
        second = number(text, 2)?;
        if skip(text, &['.']).is_some() {
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            let (head, rest) = text.split_at(digits);
            *text = rest;
            let micros: String = head.chars().chain("000000".chars()).take(6).collect();
            fraction = if digits == 0 { return None } else { micros.parse::<i64>().ok()? };
        }
    }
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let time = hour * HOUR + minute * MINUTE + second * SECOND + fraction;
    Some(date + time - offset(text)?)
}

/// `Z`, `+01:00` or nothing, which is UTC too. Takes all that is left.
fn offset(text: &mut &str) -> Option<i64> {
    if matches!(*text, "" | "Z" | "z") {
        return Some(0);
    }
    let sign = if text.starts_with('-') { -1 } else { 1 };
    skip(text, &['+', '-'])?;
    let hours = number(text, 2)?;
    skip(text, &[':'])?;
    let minutes = number(text, 2)?;
    (text.is_empty() && hours <= 23 && minutes <= 59).then_some(sign * (hours * HOUR + minutes * MINUTE))
}

/// A date (midnight UTC) or a time with its offset (UTC without one), as microseconds since 1970.
///
/// # Errors
/// It is neither.
pub fn parse(text: &str) -> Result<i64, DateError> {
    parsed(text.trim()).ok_or(DateError)
}

/// `2026-11-01T08:30:00Z`; with microseconds only where there are some. Years beyond four digits are cut to them.
pub fn rfc3339(micros: i64) -> String {
    let micros = micros.clamp(days(0, 1, 1) * DAY, days(9999, 12, 31) * DAY + DAY - 1);
    let (year, month, day) = civil(micros.div_euclid(DAY));
    let time = micros.rem_euclid(DAY);
    let (hour, minute, second) = (time / HOUR, time / MINUTE % 60, time / SECOND % 60);
    let fraction = match time % SECOND {
        0 => String::new(),
        fraction => format!(".{fraction:06}"),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// The first moment of the month of a moment, and of the next one, in UTC.
pub fn month(micros: i64) -> (i64, i64) {
    let (year, month, _) = civil(micros.div_euclid(DAY));
    let next = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
    (days(year, month, 1) * DAY, days(next.0, next.1, 1) * DAY)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn moments_lead_back_to_themselves() {
        for (text, seconds) in [
            ("1970-01-01", 0),
            ("2000-02-29", 951_782_400),
            ("2026-11-24T02:12:18Z", 1_795_486_338),
            ("2026-11-24T03:12:18+01:00", 1_795_486_338),
            ("2026-11-23 20:42:18-05:30", 1_795_486_338),
            ("2026-11-24T02:12", 1_795_486_320),
            ("1969-12-31T23:59:59Z", -1),
        ] {
            assert_eq!(parse(text).unwrap(), seconds * SECOND, "{text}");
        }
        assert_eq!(parse("2026-11-24T02:12:18.0405Z").unwrap(), 1_795_486_338_040_500);
        assert_eq!(rfc3339(1_795_486_338_040_500), "2026-11-24T02:12:18.040500Z");
        for day in (-800_000..2_900_000).step_by(37) {
            let moment = day * DAY + day.rem_euclid(86_399) * SECOND;
            let text = rfc3339(moment);
            if moment > days(0, 1, 1) * DAY {
                assert_eq!(parse(&text).unwrap(), moment, "{text}");
            }
        }
        assert_eq!(rfc3339(i64::MAX), "9999-12-31T23:59:59.999999Z");
        assert_eq!(rfc3339(i64::MIN), "0000-01-01T00:00:00Z");
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        for text in [
            "",
            "2026",
            "2026-13-01",
            "2026-02-29",
            "2026-00-10",
            "2026-1-1",
            "2026-11-24T",
            "2026-11-24T24:00Z",
            "2026-11-24T02:60Z",
            "2026-11-24T02:12:18.Z",
            "2026-11-24T02:12:18CET",
            "2026-11-24T02:12:18+1",
            "2026-11-24T02:12:18+01:00x",
            "é026-11-24",
        ] {
            assert_eq!(parse(text), Err(DateError), "{text}");
        }
    }

    #[test]
    fn months_follow_one_another() {
        let at = |text| parse(text).unwrap();
        assert_eq!(month(at("2026-11-24T02:12:18Z")), (at("2026-11-01"), at("2026-12-01")));
        assert_eq!(month(at("2026-12-31")), (at("2026-12-01"), at("2027-01-01")));
    }
}
