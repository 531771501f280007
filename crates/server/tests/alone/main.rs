//! Tests that need the process to themselves: one counts its file descriptors, one reads its log.

#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs, dead_code)]

#[path = "../suite/client.rs"]
mod client;
mod log;
#[path = "../suite/provider.rs"]
mod provider;
#[path = "../suite/signer.rs"]
mod signer;
mod storm;
#[path = "../suite/support.rs"]
mod support;
#[path = "../suite/world.rs"]
mod world;

/// Held by each test of this binary while it runs.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
