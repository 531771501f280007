//! The OpenAI-compatible HTTP surface: routes, validation, streaming, authentication, limits, health, metrics
//! and the OpenAPI document.
//!
//! Knows requests, text and clients; never a tensor, never a model's architecture. A request's way:
//! `http` (connection, body) -> `handlers` (route, key) -> `validate` (one [`GenerationRequest`] for every
//! endpoint, on a `worker`) -> the engine -> `demux` (one thread: events to text to bytes) -> `http`.
//!
//! [`GenerationRequest`]: validate::GenerationRequest

mod account;
pub mod api;
mod auth;
pub mod config;
mod config_error;
mod demux;
pub mod doors;
pub mod error;
mod events;
mod file;
mod format;
mod handlers;
mod health;
mod http;
mod ids;
mod metrics;
mod model;
pub mod openapi;
mod parse;
mod pooling;
mod prompt;
mod quota;
mod reload;
mod routes;
mod rules;
mod server;
mod state;
mod task;
mod unsupported;
mod usage;
mod validate;
mod worker;

pub use account::Accounting;
pub use auth::{
    Algorithm, ClaimsConfig, GatewayConfig, IdentityConfig, IdentityError, IdentityFileError,
    IdentitySummary, IntrospectionConfig, IssuerConfig, KeyFileError, MAX_KEYS, Unknown, read_keys,
};
pub use config::{Limits, ServerConfig, Timeouts, TlsConfig};
pub use config_error::ConfigError;
pub use events::{EventsError, UsageEvents};
pub use file::FileError;
pub use http::client::BundleError;
pub use http::tls::TlsError;
pub use metrics::DeviceFigure;
pub use model::{FimTokens, GenerationDefaults, ServedModel};
pub use server::{BindError, ExitReason, ReadyError, Server, ServerHandle};
pub use task::{EmbedSpec, PairFormat, ScoreRule, ScoreSpec, Task};
