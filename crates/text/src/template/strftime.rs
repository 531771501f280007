//! `strftime_now` with an injected clock, in UTC and in English.
//!
//! Owns the directives of Python's `strftime` that templates use; an unknown one is an error, as a
//! silently wrong date would be part of the prompt.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

struct Clock {
    year: i64,
    /// 1 to 12.
    month: usize,
    /// 1 to 31.
    day: i64,
    /// 0 is Sunday.
    weekday: usize,
    /// 1 to 366.
    day_of_year: i64,
    hour: i64,
    minute: i64,
    second: i64,
    micros: u32,
}

impl Clock {
    fn new(now: SystemTime) -> Self {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = i64::try_from(since.as_secs()).unwrap_or(0);
        let days = seconds.div_euclid(86_400);
        let second_of_day = seconds.rem_euclid(86_400);
        let (year, month, day) = civil_from_days(days);
        Self {
            year,
            month,
            day,
            weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
            day_of_year: days - days_from_civil(year, 1, 1) + 1,
            hour: second_of_day / 3600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
            micros: since.subsec_micros(),
        }
    }
}

/// Proleptic Gregorian date of a day number (0 is 1970-01-01); the usual 400-year-era algorithm
/// with years that begin in March, so that the leap day is the last.
fn civil_from_days(days: i64) -> (i64, usize, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, usize::try_from(month).unwrap_or(1), day)
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let march_month = (month + 9) % 12;
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Formats `now` by Python's directives.
pub(super) fn format(now: SystemTime, format: &str) -> Result<String, Error> {
    let clock = Clock::new(now);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let text = directive.and_then(|d| expand(&clock, d, padded));
        out.push_str(&text.ok_or_else(|| {
            Error::new(ErrorKind::InvalidOperation, "strftime_now: unknown directive in the format")
        })?);
    }
    Ok(out)
}

fn expand(clock: &Clock, directive: char, padded: bool) -> Option<String> {
    let number = |value: i64, width: usize| {
        if padded { format!("{value:0width$}") } else { value.to_string() }
    };
    let hour12 = (clock.hour + 11) % 12 + 1;
    let month = i64::try_from(clock.month).unwrap_or(1);
    let (month_name, day_name) = (MONTHS[clock.month - 1], DAYS[clock.weekday]);
    let two = |value: i64| format!("{value:02}");
    let time = || format!("{}:{}:{}", two(clock.hour), two(clock.minute), two(clock.second));
    Some(match directive {
        'Y' => number(clock.year, 4),
        'y' => number(clock.year % 100, 2),
        'm' => number(month, 2),
        'd' => number(clock.day, 2),
        'e' => format!("{:2}", clock.day),
        'H' => number(clock.hour, 2),
        'I' => number(hour12, 2),
        'M' => number(clock.minute, 2),
        'S' => number(clock.second, 2),
        'f' => number(i64::from(clock.micros), 6),
        'j' => number(clock.day_of_year, 3),
        'w' => clock.weekday.to_string(),
        'B' => month_name.to_owned(),
        'b' | 'h' => month_name[..3].to_owned(),
        'A' => day_name.to_owned(),
        'a' => day_name[..3].to_owned(),
        'p' => if clock.hour < 12 { "AM" } else { "PM" }.to_owned(),
        'F' => format!("{:04}-{}-{}", clock.year, two(month), two(clock.day)),
        'D' => format!("{}/{}/{}", two(month), two(clock.day), two(clock.year % 100)),
        'T' | 'X' => time(),
        'R' => format!("{}:{}", two(clock.hour), two(clock.minute)),
        'Z' => "UTC".to_owned(),
        'z' => "+0000".to_owned(),
        '%' => "%".to_owned(),
        _ => return None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn all_directives() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let now = at(1_709_211_909);
        let text =
            format(now, "%Y-%m-%d %H:%M:%S %B %b %A %a %j %y %I %p %-d %-m %e %F %T %D %R %w %f %Z%z %%");
        assert_eq!(
            text.unwrap(),
            "2024-02-29 13:05:09 February Feb Thursday Thu 060 24 01 PM 29 2 29 2024-02-29 \
             13:05:09 02/29/24 13:05 4 000000 UTC+0000 %"
        );
    }

    #[test]
    fn dates_agree_with_their_inverse_over_800_years() {
        for days in (-150_000..150_000).step_by(13) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, i64::try_from(month).unwrap(), day), days);
        }
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(-1), (1969, 12, 31));
    }

    #[test]
    fn an_unknown_directive_is_an_error() {
        assert!(format(at(0), "%Q").is_err());
        assert!(format(at(0), "%").is_err());
    }
}
