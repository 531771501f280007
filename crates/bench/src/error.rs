//! What ends a benchmark, and the kinds of failure that one request may have without ending it.

use std::fmt;
use std::path::PathBuf;

/// Why a benchmark could not be run. Failed requests are no such reason: they are in the report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// An option is out of range or contradicts another.
    #[error("--{flag}: {reason}")]
    BadOption {
        /// The flag without dashes.
        flag: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `write`.
        action: &'static str,
        /// The reason from the operating system.
        source: std::io::Error,
    },
    /// A line of a trace or prompt file is malformed.
    #[error("{}: line {line}: {reason}", path.display())]
    BadData {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The server does not answer, or not as an OpenAI-compatible server does.
    #[error("{url}: {reason}")]
    Server {
        /// The address that was asked.
        url: String,
        /// What happened.
        reason: String,
    },
    /// A warm-up request failed, so that the measurement would be worthless.
    #[error("warm-up: {failed} of {requests} requests failed; the first: {example}")]
    Warmup {
        /// Failed requests.
        failed: usize,
        /// Requests sent.
        requests: usize,
        /// The first failure.
        example: String,
    },
}

/// Kinds of failure of one request, as the report counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// No connection could be opened.
    Connect,
    /// The connection broke before the response was complete.
    Transport,
    /// The server answered with another status than 200.
    Http(u16),
    /// The request took longer than `--timeout`.
    Timeout,
    /// The answer is not a stream of well-formed chunks.
    Malformed,
    /// The stream carried an error event.
    ServerError,
    /// The stream ended properly, but without `[DONE]`.
    CutStream,
    /// The stream ended without `usage`, so that its tokens cannot be counted exactly.
    NoUsage,
    /// The stream ended without one generated token.
    NoTokens,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("connect"),
            Self::Transport => f.write_str("transport"),
            Self::Http(status) => write!(f, "http_{status}"),
            Self::Timeout => f.write_str("timeout"),
            Self::Malformed => f.write_str("malformed_stream"),
            Self::ServerError => f.write_str("server_error_event"),
            Self::CutStream => f.write_str("cut_stream"),
            Self::NoUsage => f.write_str("no_usage"),
            Self::NoTokens => f.write_str("no_tokens"),
        }
    }
}

/// The failure of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// For people: at most some hundred characters.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        const MAX_MESSAGE_CHARS: usize = 400;
        let message: String = message.into();
        let message = match message.char_indices().nth(MAX_MESSAGE_CHARS) {
            Some((end, _)) => format!("{}...", &message[..end]),
            None => message,
        };
        Self { kind, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_at_characters() {
        let failure = Failure::new(FailureKind::Http(503), "é".repeat(1000));
        assert_eq!(failure.message.chars().count(), 403);
        assert!(failure.to_string().starts_with("http_503: é"));
    }
}
