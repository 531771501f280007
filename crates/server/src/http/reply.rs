//! Answers.
//!
//! Owns headers and bodies of answers, and the moment a request is over: when its answer's body is dropped,
//! whether sent or not.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Frame;
use hyper::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use mirai_ledger::identity::Quota;
use mirai_ledger::quota::Standing;

use super::io::ConnState;
use crate::auth::Caller;
use crate::demux::stream::StreamReader;
use crate::demux::ticket::Ticket;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::quota;
use crate::routes::RouteId;

/// Exactly this: some gateways compare the whole string.
pub(crate) const JSON: &str = "application/json";
pub(crate) const PROBLEM: &str = "application/problem+json";
pub(crate) const EVENTS: &str = "text/event-stream";

/// What a handler gives back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) content: Content,
    pub(crate) retry_after: Option<u64>,
    pub(crate) close: bool,
    pub(crate) allow: Option<&'static str>,
    /// How the caller's application stands.
    pub(crate) standing: Standing,
}

/// Bytes of an answer.
#[derive(Debug)]
pub(crate) enum Content {
    /// All there.
    Bytes(Bytes),
    /// As they come.
    Stream(StreamReader),
}

impl Reply {
    pub(crate) fn new(status: StatusCode, content_type: &'static str, bytes: impl Into<Bytes>) -> Self {
        let content = Content::Bytes(bytes.into());
        let standing = Standing::default();
        Self { status, content_type, content, retry_after: None, close: false, allow: None, standing }
    }

    /// A JSON answer.
    pub(crate) fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(bytes) => Self::new(StatusCode::OK, JSON, bytes),
            Err(_) => Self::error(&ApiError::internal("the answer could not be written"), false),
        }
    }

    /// An error's answer.
    pub(crate) fn error(error: &ApiError, copy: bool) -> Self {
        let mut reply = Self::new(error.status, JSON, error.body(copy));
        reply.retry_after = error.retry_after_seconds();
        reply.close = error.close;
        reply
    }

    /// A stream of events.
    pub(crate) fn stream(reader: StreamReader) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: EVENTS,
            content: Content::Stream(reader),
            retry_after: None,
            close: false,
            allow: None,
            standing: Standing::default(),
        }
    }

    /// The answer as hyper takes it.
    pub(crate) fn into_response(self, mut scope: Scope, id: &str) -> Response<Body> {
        scope.status = self.status.as_u16();
        let size = match &self.content {
            Content::Bytes(bytes) => Some(bytes.len() as u64),
            Content::Stream(_) => None,
        };
        let mut response = Response::new(Body { content: Some(self.content), size, _scope: scope });
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        if let Ok(id) = HeaderValue::from_str(id) {
            headers.insert(HeaderName::from_static("x-request-id"), id);
        }
        if self.content_type == EVENTS {
            headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(hyper::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(allow) = self.allow {
            headers.insert(hyper::header::ALLOW, HeaderValue::from_static(allow));
        }
        quota::write_headers(headers, &self.standing);
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// One request from its head to the end of its answer: counted, timed, logged once.
#[derive(Debug)]
pub(crate) struct Scope {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) conn: Arc<ConnState>,
    pub(crate) arrived: Instant,
    /// How long the caller will wait, if it said so.
    pub(crate) patience: Option<Duration>,
    pub(crate) route: Option<RouteId>,
    pub(crate) method: &'static str,
    /// Ours.
    pub(crate) id: String,
    /// The caller's, if it may be shown.
    pub(crate) caller_id: Option<String>,
    pub(crate) status: u16,
    pub(crate) ticket: Option<Arc<Ticket>>,
    pub(crate) error_code: Option<&'static str>,
    /// Methods of a path that was asked with another.
    pub(crate) allow: Option<&'static str>,
    pub(crate) tenant: u64,
    /// Who pays, and what it may use.
    pub(crate) payer: Option<(Arc<str>, Quota)>,
}

impl Scope {
    /// Notes who calls.
    pub(crate) fn called_by(&mut self, caller: &Caller) {
        self.tenant = caller.tenant.0;
        self.payer = Some((caller.application.clone(), caller.quota));
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        self.conn.set_in_flight(false);
        self.metrics.active.add(-1);
        // A handler that was dropped before it answered: the client left.
        let status = if self.status == 0 { 499 } else { self.status };
        self.metrics.answered(self.route, status);
        let route = self.route.map_or("none", |route| route.route().name());
        let load = |value: fn(&Ticket) -> u64| self.ticket.as_deref().map(value);
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        tracing::info!(
            target: "mirai::access",
            request_id = %self.id,
            caller_id = self.caller_id.as_deref(),
            method = self.method,
            route,
            status,
            error = self.error_code,
            tenant = self.tenant,
            outcome = self.ticket.as_deref().map(Ticket::outcome),
            prompt_tokens = load(|t| t.prompt_tokens.load(std::sync::atomic::Ordering::Relaxed)),
            cached_tokens = load(|t| t.cached_tokens.load(std::sync::atomic::Ordering::Relaxed)),
            completion_tokens = load(|t| t.completion_tokens.load(std::sync::atomic::Ordering::Relaxed)),
            ttft_ms = self.ticket.as_deref().map(|t| t.first_token_micros.load(relaxed) as f64 / 1e3),
            duration_ms = self.arrived.elapsed().as_secs_f64() * 1e3,
            "request"
        );
    }
}

/// An answer's body.
#[derive(Debug)]
pub(crate) struct Body {
    /// `None` once everything was handed over.
    content: Option<Content>,
    size: Option<u64>,
    _scope: Scope,
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let bytes = match &mut self.content {
            None => return Poll::Ready(None),
            Some(Content::Stream(reader)) => match ready!(reader.poll(cx)) {
                Some(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                None => None,
            },
            Some(Content::Bytes(bytes)) => Some(std::mem::take(bytes)).filter(|bytes| !bytes.is_empty()),
        };
        self.content = None;
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            None => true,
            Some(Content::Bytes(bytes)) => bytes.is_empty(),
            Some(Content::Stream(_)) => false,
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match (&self.content, self.size) {
            (Some(_), Some(size)) => hyper::body::SizeHint::with_exact(size),
            (None, _) => hyper::body::SizeHint::with_exact(0),
            _ => hyper::body::SizeHint::default(),
        }
    }
}
