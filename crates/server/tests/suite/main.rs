//! Black-box tests: the real server in this process, on port 0, over a simulated executor.

#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs)]

mod accounting;
mod bad_input;
mod chat;
mod client;
mod completions;
mod doors;
mod faults;
mod life;
mod load;
mod metrics;
mod pooling;
mod python;
mod reasoning;
mod slow;
mod support;
mod tls;
mod usage;
