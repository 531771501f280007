//! The storm of hang-ups, in a process of its own: it counts the process's file descriptors.

#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs, dead_code)]

#[path = "../suite/client.rs"]
mod client;
mod storm;
#[path = "../suite/support.rs"]
mod support;
