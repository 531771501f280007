//! The one table of errors that a client can see.
//!
//! Owns statuses, types, codes and their JSON. Messages name fields, limits and numbers; they never repeat a
//! prompt, a key, a path or an address.

use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;

use crate::format::json;

/// An error as the client sees it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{status} {code}: {message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// OpenAI's coarse class (`invalid_request_error`, ...).
    pub kind: &'static str,
    /// What programs branch on.
    pub code: &'static str,
    /// The field at fault, if one is.
    pub param: Option<String>,
    /// For people.
    pub message: String,
    /// When to come back; only where it makes sense to.
    pub retry_after: Option<Duration>,
    /// Whether the connection ends with this answer.
    pub close: bool,
}

/// Rows of the table: (name, status, type, code).
macro_rules! table {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $kind:literal, $code:literal;)*) => {
        impl ApiError {
            $($(#[$doc])*
            pub fn $name(message: impl Into<String>) -> Self {
                Self::new(StatusCode::$status, $kind, $code, message.into())
            })*
        }

        /// Every (status, type, code) that the server can answer; documented in the OpenAPI document.
        pub const ERROR_TABLE: &[(u16, &str, &str)] = &[$((StatusCode::$status.as_u16(), $kind, $code)),*];
    };
}

table! {
    /// A field's value is wrong.
    invalid_value = BAD_REQUEST, "invalid_request_error", "invalid_value";
    /// The body is not JSON of the right shape.
    invalid_json = BAD_REQUEST, "invalid_request_error", "invalid_json";
    /// A field that must be there is not.
    missing_field = BAD_REQUEST, "invalid_request_error", "missing_required_parameter";
    /// A known field that this server does not serve.
    unsupported = BAD_REQUEST, "invalid_request_error", "unsupported_parameter";
    /// The model is served for something else.
    wrong_task = BAD_REQUEST, "invalid_request_error", "wrong_task";
    /// Prompt and cap together do not fit.
    context_length = BAD_REQUEST, "invalid_request_error", "context_length_exceeded";
    /// The chat template refused the conversation.
    template = BAD_REQUEST, "invalid_request_error", "chat_template_error";
    /// Bias, allowed ids, bad words and `min_tokens` together leave no token.
    no_token_possible = BAD_REQUEST, "invalid_request_error", "no_token_possible";
    /// The head of the request is malformed.
    bad_request = BAD_REQUEST, "invalid_request_error", "bad_request";
    /// No key, or a wrong one.
    unauthorized = UNAUTHORIZED, "authentication_error", "invalid_api_key";
    /// The credential is good, and may not do this.
    insufficient_scope = FORBIDDEN, "permission_error", "insufficient_scope";
    /// The credential is good, and what it names is in no file.
    unknown_application = FORBIDDEN, "permission_error", "unknown_application";
    /// No such path.
    not_found = NOT_FOUND, "invalid_request_error", "not_found";
    /// No such model.
    model_not_found = NOT_FOUND, "invalid_request_error", "model_not_found";
    /// The path exists, the method does not.
    method_not_allowed = METHOD_NOT_ALLOWED, "invalid_request_error", "method_not_allowed";
    /// The body did not arrive in time.
    body_timeout = REQUEST_TIMEOUT, "invalid_request_error", "body_timeout";
    /// The body is too large.
    too_large = PAYLOAD_TOO_LARGE, "invalid_request_error", "request_too_large";
    /// The path is too long.
    uri_too_long = URI_TOO_LONG, "invalid_request_error", "uri_too_long";
    /// The body is compressed or not JSON.
    unsupported_media = UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", "unsupported_media_type";
    /// Our fault, limited to this request.
    internal = INTERNAL_SERVER_ERROR, "server_error", "internal_error";
    /// A logit of this request was NaN or infinite.
    numerical_fault = INTERNAL_SERVER_ERROR, "server_error", "numerical_fault";
    /// What the caller's application may use is used.
    rate_limited = TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded";
    /// The model is not loaded yet.
    loading = SERVICE_UNAVAILABLE, "unavailable_error", "model_loading";
    /// The model could not be loaded.
    load_failed = SERVICE_UNAVAILABLE, "unavailable_error", "model_failed";
    /// Every queue place is taken.
    saturated = SERVICE_UNAVAILABLE, "unavailable_error", "overloaded";
    /// The server is going away.
    draining = SERVICE_UNAVAILABLE, "unavailable_error", "draining";
    /// The device or the engine is gone.
    engine_stopped = SERVICE_UNAVAILABLE, "unavailable_error", "engine_stopped";
    /// What this request uses could not be written down.
    ledger_unavailable = SERVICE_UNAVAILABLE, "unavailable_error", "ledger_unavailable";
    /// Nobody can say what the caller's application has used.
    quotas_unavailable = SERVICE_UNAVAILABLE, "unavailable_error", "quotas_unavailable";
    /// Whoever could say who calls does not answer.
    identity_unavailable = SERVICE_UNAVAILABLE, "unavailable_error", "identity_unavailable";
    /// A file that was to be read again cannot be used.
    reload_refused = CONFLICT, "invalid_request_error", "reload_refused";
    /// The engine makes no progress.
    unhealthy = SERVICE_UNAVAILABLE, "unavailable_error", "unhealthy";
    /// The time for this request ended before its first token.
    deadline = SERVICE_UNAVAILABLE, "unavailable_error", "deadline_exceeded";
    /// The client takes its stream too slowly.
    slow_reader = REQUEST_TIMEOUT, "invalid_request_error", "slow_reader";
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: String) -> Self {
        Self { status, kind, code, param: None, message, retry_after: None, close: false }
    }

    /// Names the field at fault.
    #[must_use]
    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when to come back; at least one second on the wire.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Ends the connection with this answer.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// `{"error":{"message","type","param","code"}}`, and the message once more beside it if `copy` is set.
    pub fn body(&self, copy: bool) -> Bytes {
        let mut out = Vec::with_capacity(160 + 2 * self.message.len());
        self.write(&mut out, copy);
        out.into()
    }

    /// The same, appended to `out`.
    pub(crate) fn write(&self, out: &mut Vec<u8>, copy: bool) {
        out.extend_from_slice(b"{\"error\":{\"message\":");
        json::string(out, &self.message);
        out.extend_from_slice(b",\"type\":");
        json::string(out, self.kind);
        out.extend_from_slice(b",\"param\":");
        match &self.param {
            Some(param) => json::string(out, param),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"code\":");
        json::string(out, self.code);
        out.push(b'}');
        if copy {
            out.extend_from_slice(b",\"message\":");
            json::string(out, &self.message);
        }
        out.push(b'}');
    }

    /// Whole seconds for `Retry-After`, from 1 to 3600.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        self.retry_after.map(|d| d.as_secs_f64().ceil().clamp(1.0, 3600.0) as u64)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shape_is_openais() {
        let error = ApiError::invalid_value("`n` is \"x\"").param("n");
        let value: serde_json::Value = serde_json::from_slice(&error.body(true)).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "error": {"message": "`n` is \"x\"", "type": "invalid_request_error", "param": "n",
                          "code": "invalid_value"},
                "message": "`n` is \"x\""
            })
        );
        let value: serde_json::Value = serde_json::from_slice(&ApiError::internal("x").body(false)).unwrap();
        assert_eq!(value["error"]["param"], serde_json::Value::Null);
        assert!(value.get("message").is_none());
    }

    #[test]
    fn codes_are_unique_and_retry_after_is_whole_seconds() {
        let mut codes: Vec<_> = ERROR_TABLE.iter().map(|row| row.2).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), ERROR_TABLE.len());
        let after = |s| ApiError::saturated("").retry_after(Duration::from_secs_f64(s)).retry_after_seconds();
        assert_eq!(after(0.0), Some(1));
        assert_eq!(after(1.2), Some(2));
        assert_eq!(after(1e9), Some(3600));
        assert_eq!(ApiError::internal("").retry_after_seconds(), None);
    }
}
