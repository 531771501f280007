//! Load generator for OpenAI-compatible servers: what `mirai bench` runs.
//!
//! Owns: datasets and traces, arrival processes, the streaming HTTP client, the metrics and the report (a
//! table, and JSON with the key names of `vllm bench serve`).
//!
//! Never: counts tokens by counting chunks (the server's `usage` is the count), drops a failed request from
//! the report, lets a late client pass for a fast server (the lag behind the schedule is measured), or
//! depends on another crate of the project: it measures any server.
//!
//! Definitions, all from the client's side, where `send` is the moment before a connection is taken:
//! * TTFT: first chunk with generated text minus `send`. A chunk that only announces the role is none.
//! * E2EL: last chunk (text or usage) minus `send`.
//! * TPOT: `(E2EL - TTFT) / (completion_tokens - 1)`, for requests of at least two tokens.
//! * ITL: gaps between consecutive chunks with text. Chunks that one read delivers together have one time
//!   stamp, so their gap is 0: that is when the client could first have shown them.

mod arrival;
mod client;
mod dataset;
mod error;
mod load;
mod options;
mod progress;
mod prompt;
mod report;
mod request;
mod run;
mod sse;
mod stats;
mod tls;
mod trace;

pub use error::{BenchError, FailureKind};
pub use options::{BenchOptions, Dataset, Endpoint, Metric, RequestRate, Secret, Slo, TokenIdRange};
pub use progress::Progress;
pub use report::{Report, TokenIdSource};
pub use run::run;
pub use stats::Summary;
