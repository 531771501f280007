//! The limits there are, and what a request needs of each.
//!
//! Owns the list; knows no counter and no clock.

use crate::identity::Quota;

/// A limit whose consumption is counted in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Requests in a minute.
    RequestsPerMinute,
    /// Tokens, of prompts and answers, in a minute.
    TokensPerMinute,
    /// The same in a day.
    TokensPerDay,
    /// The same in a month.
    TokensPerMonth,
    /// Requests at once.
    ConcurrentRequests,
}

/// How a kind's consumption falls into buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// A bucket a second; the newest ones count.
    Window,
    /// A bucket a day of the zone.
    Day,
    /// A bucket a month of the zone.
    Month,
    /// One bucket, of what goes on now.
    Always,
}

/// One value for each kind, in the order of [`Kind::ALL`].
pub(super) type PerKind<T> = [T; Kind::ALL.len()];

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::RequestsPerMinute,
        Self::TokensPerMinute,
        Self::TokensPerDay,
        Self::TokensPerMonth,
        Self::ConcurrentRequests,
    ];

    /// Its place in [`Kind::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Its name: in the store, in configuration and in metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::RequestsPerMinute => "requests_per_minute",
            Self::TokensPerMinute => "tokens_per_minute",
            Self::TokensPerDay => "tokens_per_day",
            Self::TokensPerMonth => "tokens_per_month",
            Self::ConcurrentRequests => "concurrent_requests",
        }
    }

    /// By its name.
    pub(super) fn by_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }

    pub(super) const fn span(self) -> Span {
        match self {
            Self::RequestsPerMinute | Self::TokensPerMinute => Span::Window,
            Self::TokensPerDay => Span::Day,
            Self::TokensPerMonth => Span::Month,
            Self::ConcurrentRequests => Span::Always,
        }
    }

    /// Whether what a replica holds of it is kept apart from what is used, because it may come back long after.
    /// What is taken of a window counts as used at once: a minute later it is over anyway.
    pub(super) const fn is_leased(self) -> bool {
        !matches!(self.span(), Span::Window)
    }

    /// Whether tokens are counted.
    pub(super) const fn is_tokens(self) -> bool {
        matches!(self, Self::TokensPerMinute | Self::TokensPerDay | Self::TokensPerMonth)
    }

    /// The limit that a quota sets; `None` is without bound. No limit is above what a store can count.
    pub fn limit(self, quota: &Quota) -> Option<u64> {
        let limit = match self {
            Self::RequestsPerMinute => quota.requests_per_minute,
            Self::TokensPerMinute => quota.tokens_per_minute,
            Self::TokensPerDay => quota.tokens_per_day,
            Self::TokensPerMonth => quota.tokens_per_month,
            Self::ConcurrentRequests => quota.concurrent_requests,
        };
        limit.map(|limit| limit.min(MAX_LIMIT))
    }
}

/// The largest limit that is told from another: sums of a few of them still fit the store's numbers.
pub(super) const MAX_LIMIT: u64 = 1 << 56;

pub(super) fn limits(quota: &Quota) -> PerKind<Option<u64>> {
    Kind::ALL.map(|kind| kind.limit(quota))
}

/// The most that a request may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Most tokens of one of its answers.
    pub max_output_tokens: u64,
    /// How many answers.
    pub choices: u64,
}

impl Demand {
    /// Tokens in all.
    pub fn tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.max_output_tokens.saturating_mul(self.choices))
    }

    pub(super) fn needs(&self) -> PerKind<u64> {
        Kind::ALL.map(|kind| if kind.is_tokens() { self.tokens() } else { 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_found_by_name_and_place() {
        for (i, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!((kind.index(), Kind::by_word(kind.word())), (i, Some(kind)));
        }
        assert_eq!(Kind::by_word("anchor"), None);
        let quota = Quota { tokens_per_day: Some(u64::MAX), ..Quota::default() };
        assert_eq!(limits(&quota), [None, None, Some(MAX_LIMIT), None, None]);
    }

    #[test]
    fn a_demand_is_all_that_may_come() {
        let demand = Demand { prompt_tokens: 7, max_output_tokens: 100, choices: 3 };
        assert_eq!(demand.needs(), [1, 307, 307, 307, 1]);
        let huge = Demand { prompt_tokens: u64::MAX, max_output_tokens: u64::MAX, choices: u64::MAX };
        assert_eq!(huge.tokens(), u64::MAX);
    }
}
