//! What every request that goes to the engine shares on its way there.

use std::sync::Arc;
use std::time::Duration;

use mirai_engine::{AdmissionError, Time};

use crate::account::{Account, Charge};
use crate::auth::{Attribution, Caller};
use crate::config_error::seconds;
use crate::demux::ticket::LeaveGuard;
use crate::error::ApiError;
use crate::http::reply::Scope;
use crate::metrics::Refused;
use crate::quota::Held;
use crate::state::{Live, State};

/// The model, or a counted refusal.
pub(super) fn serving(state: &State) -> Result<&Arc<Live>, ApiError> {
    state.serving().inspect_err(|error| {
        let draining = error.code == "draining";
        state.metrics.refused(if draining { Refused::Draining } else { Refused::Loading });
    })?;
    if let Some(accounting) = state.accounting() {
        accounting.takes_more().inspect_err(|_| state.metrics.refused(Refused::Ledger))?;
    }
    state.loaded()
}

/// The caller as its body names it. Whoever that is must be allowed here too.
pub(super) fn attributed(
    state: &State,
    caller: Caller,
    attribution: &Attribution,
    scope: &mut Scope,
) -> Result<Caller, ApiError> {
    let caller = state.auth.attributed(caller, attribution)?;
    scope.called_by(&caller);
    caller.needs(scope.route.and_then(|route| route.route().access.scope()))?;
    Ok(caller)
}

/// Opens the request's row, if rows are written; its end settles what was taken of its application's limits.
pub(super) fn account(state: &State, charge: &Charge<'_>, held: Held) -> Result<Account, ApiError> {
    let open = state.accounting().map(|accounting| accounting.open(charge, &state.auth)).transpose();
    let open = open.inspect_err(|_| state.metrics.refused(Refused::Ledger))?;
    Ok(Account::new(open, held.take(), charge.prompt_tokens))
}

/// When the request ends whatever its state, on the engine's clock: the caller's patience, but no longer than the
/// server's own limit.
pub(super) fn deadline(state: &State, live: &Live, scope: &Scope) -> Time {
    let most = seconds(state.config.timeouts.request_seconds);
    let whole = scope.patience.map_or(most, |patience| patience.min(most));
    live.engine.now().saturating_add(whole.saturating_sub(scope.arrived.elapsed()))
}

/// Gives up a request of which the engine refused a part, and says what that means for its client.
pub(super) fn refused(state: &State, live: &Live, guard: &LeaveGuard, error: &AdmissionError) -> ApiError {
    let error = refusal(state, live, error);
    guard.give_up(error.status.as_u16());
    error
}

/// What the engine's refusal means for a client.
pub(super) fn refusal(state: &State, live: &Live, error: &AdmissionError) -> ApiError {
    let waiting = live.engine.counters().queued_requests;
    let full = |reason| {
        state.metrics.refused(reason);
        ApiError::saturated("the queue is full").retry_after(state.metrics.queue_drain_time(waiting))
    };
    match error {
        AdmissionError::QueueFull { .. } => full(Refused::QueueRequests),
        AdmissionError::QueueTokensFull { .. } => full(Refused::QueueTokens),
        AdmissionError::TooLong { .. } | AdmissionError::NeverFits { .. } => {
            ApiError::context_length(error.to_string()).param("max_tokens")
        }
        AdmissionError::PromptTooLong { .. } => ApiError::context_length(error.to_string()).param("input"),
        AdmissionError::EmptyPrompt | AdmissionError::UnknownToken { .. } => {
            ApiError::invalid_value(error.to_string()).param("prompt")
        }
        AdmissionError::Choices { .. } => ApiError::invalid_value(error.to_string()).param("n"),
        AdmissionError::WrongTask(_) => ApiError::wrong_task(error.to_string()).param("model"),
        AdmissionError::DuplicateId(_) | AdmissionError::PoolingShape { .. } => {
            ApiError::internal("this request failed; others are not affected")
        }
        AdmissionError::Stopping | AdmissionError::Dead(_) => {
            state.metrics.refused(Refused::EngineStopped);
            ApiError::engine_stopped("the engine has stopped").retry_after(Duration::from_secs(10))
        }
    }
}
