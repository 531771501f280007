//! Exact money.
//!
//! Owns amounts and prices: whole numbers of so small a part that no price times a count ever rounds, so the cost of a
//! sum is the sum of costs. What is rounded is only what is shown.

use std::fmt;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most that a million tokens or an hour of a device may cost, in millionths.
const MAX_PRICE: u64 = 1_000_000_000_000;

/// Parts of one unit of currency: a price has six decimals, is for a million tokens or for 3.6e9 device
/// microseconds.
const PARTS: u128 = 3_600_000_000_000_000;
/// Parts of 1e-12 of a unit.
const PER_PICO: u128 = 3_600;

/// An exact amount of money, of no named currency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(u128);

impl Money {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// The amount in units of the currency, for wire formats that know no decimals.
    pub fn to_f64(self) -> f64 {
        // Twelve decimals of what is shown, so that 0.15 is 0.15.
        self.to_string().parse().unwrap_or(f64::MAX)
    }

    /// Whole 1e-12 of the currency's unit, rounded half up.
    pub(crate) fn picos(self) -> i128 {
        i128::try_from(self.0.saturating_add(PER_PICO / 2) / PER_PICO).unwrap_or(i128::MAX)
    }

    /// Whole millionths of the currency's unit, rounded half up.
    pub const fn micros(self) -> u128 {
        (self.0 + PARTS / 2_000_000) / (PARTS / 1_000_000)
    }
}

impl std::ops::Add for Money {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl std::ops::AddAssign for Money {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Money {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::ZERO, |sum, one| sum + one)
    }
}

impl fmt::Display for Money {
    /// Up to twelve decimals, rounded half up, without zeros at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&decimal(self.picos()))
    }
}

/// A number of 1e-12 parts, none of them negative, as a decimal without zeros at its end.
pub(crate) fn decimal(picos: i128) -> String {
    let (whole, part) = (picos / 1_000_000_000_000, picos % 1_000_000_000_000);
    let part = format!("{part:012}");
    match part.trim_end_matches('0') {
        "" => whole.to_string(),
        part => format!("{whole}.{part}"),
    }
}

/// A price in millionths of the currency's unit. Read from a whole number, a decimal or a text with one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Price(u64);

impl Price {
    /// The price of so many pieces of which a million have this price.
    pub(crate) const fn of_million(self, count: u64) -> Money {
        Money(self.0 as u128 * count as u128 * PER_PICO)
    }

    /// The price of so many microseconds of which an hour has this price.
    pub(crate) const fn of_hour(self, micros: u64) -> Money {
        Money(self.0 as u128 * micros as u128)
    }

    /// The price of one token of which a million have this price.
    pub const fn each(self) -> Money {
        self.of_million(1)
    }

    /// The price of one hour.
    pub const fn hour(self) -> Money {
        self.of_hour(3_600_000_000)
    }

    /// A decimal with up to six places behind its point.
    fn parse(text: &str) -> Option<Self> {
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || whole.len() > 7 || part.len() > 6 || !digits(whole) || !digits(part) {
            return None;
        }
        let part = format!("{part:0<6}").parse::<u64>().ok()?;
        let micros = whole.parse::<u64>().ok()? * 1_000_000 + part;
        (micros <= MAX_PRICE).then_some(Self(micros))
    }
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hour().fmt(f)
    }
}

impl Serialize for Price {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Price {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = Price;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a price from 0 to 1000000 with at most six decimals")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Price, E> {
                Price::parse(text)
                    .ok_or_else(|| E::custom("a price is 0 to 1000000 with at most six decimals"))
            }
            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Price, E> {
                self.visit_str(&n.to_string())
            }
            fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Price, E> {
                self.visit_str(&n.to_string())
            }
            // Its shortest text, which is what was written: no binary fraction ever counts.
            fn visit_f64<E: serde::de::Error>(self, n: f64) -> Result<Price, E> {
                self.visit_str(&n.to_string())
            }
        }
        deserializer.deserialize_any(Read)
    }
}
