//! What a caller is told: how it stands, and why it may not.
//!
//! Owns the words and numbers for headers and errors; knows no HTTP.

use std::time::Duration;

use super::kind::Kind;

/// How a limit stands, as OpenAI's headers say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// `x-ratelimit-limit-*`
    pub limit: u64,
    /// `x-ratelimit-remaining-*`: what a new request might still take. What other replicas took since this one
    /// last spoke with the store, at most a second ago while the application is active, is not in it yet.
    pub remaining: u64,
    /// `x-ratelimit-reset-*`: when all of it is free again, if nothing more is taken.
    pub reset: Duration,
}

/// How an application stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests a minute.
    pub requests: Option<Level>,
    /// Tokens of the shortest period that has a limit: minute, day or month.
    pub tokens: Option<Level>,
}

/// A limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// Which.
    pub kind: Kind,
    /// How large it is.
    pub limit: u64,
    /// What is left of it.
    pub remaining: u64,
    /// What the request needs: its prompt and the longest answers it asks for.
    pub requested: u64,
    /// When to come back; `None` if a request of this size never fits.
    pub retry_after: Option<Duration>,
}

/// A request may not be served now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A limit is reached: 429, with `Retry-After` where there is one.
    #[error(
        "{} of this application: limit {}, {} left, {} needed",
        .0.kind.word(), .0.limit, .0.remaining, .0.requested
    )]
    Exceeded(Exceeded),
    /// The answer asked for is longer than the application's answers may be: 400.
    #[error("answers of this application have at most {limit} tokens, {requested} were asked for")]
    OutputTooLong {
        /// The limit.
        limit: u64,
        /// What was asked for.
        requested: u64,
    },
    /// Nobody can say whether a limit is reached: 503 with `Retry-After`.
    #[error("quotas cannot be counted now")]
    Unavailable {
        /// When to come back.
        retry_after: Duration,
    },
}

impl Refusal {
    /// Seconds of a `Retry-After` header: rounded up, so that who obeys it comes in time.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        let after = match self {
            Self::Exceeded(exceeded) => exceeded.retry_after,
            Self::OutputTooLong { .. } => None,
            Self::Unavailable { retry_after } => Some(*retry_after),
        };
        after.map(|after| after.as_millis().div_ceil(1000).clamp(1, u128::from(u32::MAX)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_obeys_retry_after_comes_in_time() {
        let after = |retry_after| {
            let kind = Kind::TokensPerDay;
            Refusal::Exceeded(Exceeded { kind, limit: 9, remaining: 1, requested: 2, retry_after })
        };
        assert_eq!(after(Some(Duration::from_millis(1001))).retry_after_seconds(), Some(2));
        assert_eq!(after(Some(Duration::ZERO)).retry_after_seconds(), Some(1));
        assert_eq!(after(None).retry_after_seconds(), None);
        assert_eq!(after(None).to_string(), "tokens_per_day of this application: limit 9, 1 left, 2 needed");
        let long = Refusal::OutputTooLong { limit: 1, requested: 2 };
        assert_eq!(long.retry_after_seconds(), None);
        let lost = Refusal::Unavailable { retry_after: Duration::from_secs(1) };
        assert_eq!(lost.retry_after_seconds(), Some(1));
    }
}
