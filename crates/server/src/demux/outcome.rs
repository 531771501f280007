//! What the engine's last word on a choice means for its client.
//!
//! Owns that table; the errors themselves are in `error`.

use std::time::Duration;

use mirai_engine::{FinishReason, RowFault, SamplingParams};

use super::Context;
use crate::error::ApiError;
use crate::format::chunk::{Finish, StopReason};

const RETRY: Duration = Duration::from_secs(10);

/// What the engine's reason means for a client that has `tokens` tokens of the choice.
pub(super) fn outcome(
    reason: &FinishReason,
    sampling: &SamplingParams,
    cx: &Context,
    tokens: u32,
) -> Result<Finish, ApiError> {
    match reason {
        FinishReason::StopToken(id) => {
            // The model's own end is no reason that the request named.
            let own =
                cx.model.eos_token_ids.binary_search(id).is_ok() || !sampling.stop_token_ids.contains(id);
            Ok(Finish { reason: "stop", stop: (!own).then_some(StopReason::Token(*id)) })
        }
        FinishReason::Stopped => Ok(Finish { reason: "stop", stop: None }),
        FinishReason::Length | FinishReason::Pooled => Ok(Finish { reason: "length", stop: None }),
        FinishReason::Deadline if tokens > 0 => Ok(Finish { reason: "length", stop: None }),
        FinishReason::Deadline => {
            Err(ApiError::deadline("the time for this request ended before its first token")
                .retry_after(RETRY))
        }
        FinishReason::Cancelled => Err(ApiError::internal("the request was cancelled")),
        FinishReason::Fault(RowFault::NothingAllowed) => {
            Err(ApiError::no_token_possible("bias, allowed ids, bad words and min_tokens leave no token"))
        }
        FinishReason::Fault(RowFault::NonFinite) => {
            Err(ApiError::numerical_fault("the model computed a number that is not finite for this request"))
        }
        FinishReason::Fault(RowFault::Panic(_)) => {
            cx.metrics.panics.inc();
            Err(ApiError::internal("this request failed; others are not affected"))
        }
        FinishReason::EngineStopped => Err(ApiError::engine_stopped("the engine stopped").retry_after(RETRY)),
    }
}
