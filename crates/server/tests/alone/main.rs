//! Tests that need the process to themselves: one counts its file descriptors, one reads its log.

#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs, dead_code)]

#[path = "../suite/client.rs"]
mod client;
mod log;
mod storm;
#[path = "../suite/support.rs"]
mod support;

/// Held by each test of this binary while it runs.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
