//! Why a token is not taken.

use std::time::Duration;

use super::jwt::TokenError;
use crate::error::ApiError;

/// Why a token does not let its bearer in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Token(TokenError),
    /// The identity provider could not be asked.
    Unavailable,
}

impl From<TokenError> for Refusal {
    fn from(error: TokenError) -> Self {
        Self::Token(error)
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Token(error) => Self::unauthorized(format!("the token is not valid: {error}")),
            Refusal::Unavailable => Self::identity_unavailable("the identity provider does not answer")
                .retry_after(Duration::from_secs(5)),
        }
    }
}
