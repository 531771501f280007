//! From the driver's errors to those of the backend.

use mirai_model::backend::BackendError;

use crate::driver::CudaError;

/// A device operation that cannot be done, in words.
pub(crate) fn device(operation: &'static str, message: impl Into<String>) -> BackendError {
    BackendError::Device { operation, message: message.into() }
}

/// The driver said no while doing `operation`.
pub(crate) fn driver(operation: &'static str) -> impl Fn(CudaError) -> BackendError {
    move |error| match error {
        CudaError::Arena { part, wanted, left, .. } => {
            BackendError::OutOfMemory { what: part.to_owned(), need: wanted, have: left }
        }
        other => device(operation, other.to_string()),
    }
}

impl From<CudaError> for BackendError {
    fn from(error: CudaError) -> Self {
        driver("record")(error)
    }
}
