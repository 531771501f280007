//! Bodies of requests.
//!
//! Owns how much is read: at most one body's limit and one frame, within a budget that all bodies share, in
//! the time that a body may take.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use tokio::time::Instant;

use crate::config::{Limits, Timeouts};
use crate::config_error::seconds;
use crate::error::ApiError;
use crate::metrics::{Metrics, Refused};

/// Bytes for which a body has one second more.
const BYTES_PER_SECOND: f64 = 16.0 * 1024.0;

/// A body, and its share of the budget until it is dropped.
#[derive(Debug)]
pub(crate) struct HeldBody {
    pub(crate) bytes: Bytes,
    share: Share,
}

impl HeldBody {
    /// Keeps the budget for `bytes` of what was made of the body, which outlive it.
    pub(crate) fn keep(&mut self, bytes: usize) -> Share {
        self.share.split(bytes)
    }
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    metrics: Arc<Metrics>,
    bytes: usize,
}

impl Share {
    /// Takes `bytes` more, if all bodies together stay within `limit`.
    fn grow(&mut self, bytes: usize, limit: usize) -> Result<(), ApiError> {
        self.metrics.body_bytes.add(bytes as i64);
        self.bytes += bytes;
        if self.metrics.body_bytes.get() > limit as i64 {
            self.metrics.refused(Refused::BodyBudget);
            let error = ApiError::saturated("too many request bodies are being read");
            return Err(error.retry_after(Duration::from_secs(1)).closing());
        }
        Ok(())
    }
}

impl Share {
    /// Parts with `bytes`, as far as it has so many.
    fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { metrics: self.metrics.clone(), bytes }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.metrics.body_bytes.add(-(self.bytes as i64));
    }
}

/// Refuses what is not plain JSON.
///
/// # Errors
/// 415.
pub(crate) fn check_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let encoded = |value: &hyper::header::HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    if headers.get_all(CONTENT_ENCODING).iter().any(encoded) {
        return Err(ApiError::unsupported_media("compressed bodies are not served").closing());
    }
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let kind = value.as_bytes().split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
    if kind.eq_ignore_ascii_case(b"application/json") {
        return Ok(());
    }
    Err(ApiError::unsupported_media("the body must be `application/json`").closing())
}

/// Reads a body to its end.
///
/// # Errors
/// 413 beyond the limit, 408 beyond the time, 503 beyond the budget, 400 where the peer breaks off.
pub(crate) async fn read(
    mut body: Incoming,
    limits: &Limits,
    timeouts: &Timeouts,
    metrics: &Arc<Metrics>,
) -> Result<HeldBody, ApiError> {
    let limit = limits.max_body_bytes;
    let too_large = || ApiError::too_large(format!("the body is larger than {limit} bytes")).closing();
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let mut share = Share { metrics: metrics.clone(), bytes: 0 };
    let start = Instant::now();
    let base = seconds(timeouts.body_seconds);
    let mut bytes = BytesMut::new();
    loop {
        let deadline = start + base + Duration::from_secs_f64(bytes.len() as f64 / BYTES_PER_SECOND);
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Err(_) => {
                metrics.read_timeouts.inc();
                return Err(ApiError::body_timeout("the body came too slowly").closing());
            }
            Ok(None) => break,
            Ok(Some(Err(_))) => return Err(ApiError::bad_request("the body broke off").closing()),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(too_large());
        }
        share.grow(data.len(), limits.max_inflight_body_bytes)?;
        bytes.extend_from_slice(&data);
    }
    Ok(HeldBody { bytes: bytes.freeze(), share })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_json_is_read() {
        let check = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            check_headers(&headers).is_ok()
        };
        assert!(check_headers(&HeaderMap::new()).is_ok());
        for good in ["application/json", "Application/JSON; charset=utf-8"] {
            assert!(check("content-type", good), "{good}");
        }
        for bad in
            ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"]
        {
            assert!(!check("content-type", bad), "{bad}");
        }
        assert!(check("content-encoding", "identity"));
        assert!(!check("content-encoding", "gzip"));
    }

    #[test]
    fn the_budget_is_shared_and_given_back() {
        let metrics = Arc::new(Metrics::new());
        let mut first = Share { metrics: metrics.clone(), bytes: 0 };
        first.grow(60, 100).unwrap();
        let mut second = Share { metrics: metrics.clone(), bytes: 0 };
        assert_eq!(second.grow(60, 100).unwrap_err().status, 503);
        drop(second);
        first.grow(40, 100).unwrap();
        let kept = first.split(30);
        drop(first);
        assert_eq!(metrics.body_bytes.get(), 30);
        drop(kept);
        assert_eq!(metrics.body_bytes.get(), 0);
    }
}
