//! What a setting must be, whichever section it stands in.

use std::net::IpAddr;
use std::time::Duration;

/// A configuration that cannot be served.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Reachable from other machines, open to everyone.
    #[error(
        "refusing to listen on {0} without an API key: set one, or a file of applications, or pass --insecure-no-auth if a gateway in \
         front authenticates"
    )]
    OpenWithoutKey(IpAddr),
    /// An empty or unprintable key would never match, or always.
    #[error("API key number {index} is {problem}")]
    BadKey {
        /// Position in the list, from 1.
        index: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Who may call.
    #[error("identity: {field} {problem}")]
    Identity {
        /// Name of the field.
        field: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A limit outside of what the server can hold.
    #[error("{field} is {value}, but must be from {min} to {max}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// What it is.
        value: f64,
        /// Smallest value allowed.
        min: f64,
        /// Largest value allowed.
        max: f64,
    },
}

/// Why a key can never be sent in a header, if so. Never repeats the key.
pub(crate) fn key_problem(key: &str) -> Option<&'static str> {
    if key.is_empty() {
        Some("empty")
    } else if key.len() > 4096 {
        Some("longer than 4096 bytes")
    } else if !key.bytes().all(|b| b.is_ascii_graphic()) {
        Some("not made of printable ASCII characters without spaces")
    } else {
        None
    }
}

/// A number of seconds that `ServerConfig::validate` has accepted.
pub(crate) fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)
}
