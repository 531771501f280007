//! What applications may use, asked before the engine is.
//!
//! Owns the words of a refusal and the headers in which a caller reads how it stands; `mirai-ledger` counts.

use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use mirai_ledger::quota::{Demand, Kind, Level, Refusal, Reservation, Standing};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::metrics::Refused;
use crate::state::State;

/// What a request has taken of its application's limits. Dropped before it is handed on, it is given back.
#[derive(Debug, Default)]
pub(crate) struct Held(Option<Reservation>);

impl Held {
    /// Hands it on to who settles it.
    pub(crate) fn take(mut self) -> Option<Reservation> {
        self.0.take()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(reservation) = self.0.take() {
            reservation.cancel();
        }
    }
}

/// Takes the most that a request may use from its application's limits.
///
/// # Errors
/// 429: a limit is reached. 503: nobody can tell.
pub(crate) async fn reserve(state: &State, caller: &Caller, demand: Demand) -> Result<Held, ApiError> {
    let Some(quotas) = state.quotas() else { return Ok(Held::default()) };
    match quotas.reserve(&caller.application, &caller.quota, demand).await {
        Ok(reservation) => Ok(Held(Some(reservation))),
        Err(refusal) => {
            state.metrics.refused(Refused::Quota);
            Err(refused(&refusal))
        }
    }
}

/// The longest answer that a caller may have: what it asks for, or what its application may.
pub(crate) fn longest(caller: &Caller, asked: u32) -> u32 {
    let most = caller.quota.max_output_tokens.unwrap_or(u64::MAX);
    u32::try_from(most).unwrap_or(u32::MAX).max(1).min(asked)
}

/// A limit as a caller calls it.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::RequestsPerMinute => "requests per minute",
        Kind::TokensPerMinute => "tokens per minute",
        Kind::TokensPerDay => "tokens per day",
        Kind::TokensPerMonth => "tokens per month",
        Kind::ConcurrentRequests => "requests at once",
    }
}

fn refused(refusal: &Refusal) -> ApiError {
    let error = match refusal {
        Refusal::Exceeded(limit) => {
            let (name, at_most) = (name(limit.kind), limit.limit);
            let text = match limit.retry_after {
                Some(_) => format!(
                    "rate limit reached: {name}: limit {at_most}, {} left, {} needed",
                    limit.remaining, limit.requested
                ),
                None => format!(
                    "this request is too large: {name}: limit {at_most}, {} needed; reduce the prompt, `n` or \
                     `max_tokens`",
                    limit.requested
                ),
            };
            ApiError::rate_limited(text)
        }
        Refusal::OutputTooLong { limit, requested } => {
            let text = format!("{requested} output tokens are asked for, this application may have {limit}");
            ApiError::invalid_value(text).param("max_tokens")
        }
        Refusal::Unavailable { .. } => ApiError::quotas_unavailable("quotas cannot be counted now"),
    };
    match refusal.retry_after_seconds() {
        Some(seconds) => error.retry_after(Duration::from_secs(seconds)),
        None => error,
    }
}

/// A time as OpenAI writes it: `17ms`, `8s`, `6m0s`, `11h30m0s`. Rounded up.
fn reset(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        return format!("{}ms", time.as_micros().div_ceil(1000));
    }
    let seconds = time.as_micros().div_ceil(1_000_000);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

/// Writes how an application stands, in OpenAI's headers.
pub(crate) fn write_headers(headers: &mut HeaderMap, standing: &Standing) {
    let names = |of: &Level, limit: &'static str, remaining: &'static str, when: &'static str| {
        [(limit, of.limit.to_string()), (remaining, of.remaining.to_string()), (when, reset(of.reset))]
    };
    let requests = standing.requests.as_ref().map(|level| {
        names(
            level,
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests",
        )
    });
    let tokens = standing.tokens.as_ref().map(|level| {
        names(level, "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens")
    });
    for (name, value) in requests.into_iter().chain(tokens).flatten() {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mirai_ledger::identity::Quota;
    use mirai_ledger::quota::Exceeded;

    use super::*;

    #[test]
    fn times_are_written_as_openai_does() {
        for (micros, text) in [
            (0, "0ms"),
            (16_400, "17ms"),
            (1_000_000, "1s"),
            (1_000_001, "2s"),
            (360_000_000, "6m0s"),
            (41_400_000_000, "11h30m0s"),
            (2_592_000_000_000, "720h0m0s"),
        ] {
            assert_eq!(reset(Duration::from_micros(micros)), text);
        }
    }

    #[test]
    fn only_limits_that_exist_are_told() {
        let mut headers = HeaderMap::new();
        write_headers(&mut headers, &Standing::default());
        assert!(headers.is_empty());
        let level = Level { limit: 10, remaining: 7, reset: Duration::from_secs(61) };
        write_headers(&mut headers, &Standing { requests: None, tokens: Some(level) });
        assert_eq!(headers.len(), 3);
        assert_eq!(headers["x-ratelimit-limit-tokens"], "10");
        assert_eq!(headers["x-ratelimit-remaining-tokens"], "7");
        assert_eq!(headers["x-ratelimit-reset-tokens"], "1m1s");
    }

    #[test]
    fn a_refusal_says_which_limit_and_when_to_come_back() {
        for kind in Kind::ALL {
            let exceeded = |retry_after| {
                refused(&Refusal::Exceeded(Exceeded {
                    kind,
                    limit: 10,
                    remaining: 3,
                    requested: 5,
                    retry_after,
                }))
            };
            let error = exceeded(Some(Duration::from_millis(2100)));
            assert_eq!((error.status.as_u16(), error.retry_after_seconds()), (429, Some(3)));
            assert!(error.message.contains("limit 10, 3 left, 5 needed"), "{}", error.message);
            assert_eq!(exceeded(None).retry_after_seconds(), None);
        }
        let long = refused(&Refusal::OutputTooLong { limit: 1, requested: 2 });
        assert_eq!((long.status.as_u16(), long.param.as_deref()), (400, Some("max_tokens")));
        let lost = refused(&Refusal::Unavailable { retry_after: Duration::from_secs(1) });
        assert_eq!((lost.status.as_u16(), lost.retry_after_seconds()), (503, Some(1)));
    }

    #[test]
    fn an_applications_answers_have_a_length() {
        let quota = Quota { max_output_tokens: Some(100), ..Quota::default() };
        let caller = Caller { quota, ..Caller::anybody() };
        assert_eq!((longest(&caller, 40), longest(&caller, 4000)), (40, 100));
        assert_eq!(longest(&Caller::anybody(), 4000), 4000);
    }
}
