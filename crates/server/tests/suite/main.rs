//! Black-box tests: the real server in this process, on port 0, over a simulated executor.

#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs)]

mod accounting;
mod bad_input;
mod chat;
mod client;
mod completions;
mod doors;
mod faults;
mod identity;
mod life;
mod load;
mod metrics;
mod pooling;
mod provider;
mod python;
mod quotas;
mod reasoning;
mod signer;
mod slow;
mod support;
mod tls;
mod usage;
mod world;
