//! Where an answer goes.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::stream::StreamBuffer;
use crate::error::ApiError;

/// Where an answer goes.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Event by event.
    Stream(Arc<StreamBuffer>),
    /// At the end; `None` once it is sent.
    Whole(Option<oneshot::Sender<Result<Bytes, ApiError>>>),
}
