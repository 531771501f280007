//! The access log, in a process of its own.
//!
//! `tracing` remembers for the whole process whether anybody wants an event, and asks the thread that reaches
//! the event first. Among tests that run without a subscriber that answer may be "nobody", whatever this
//! test's thread has set; here the subscriber is the process's only one, and is set before any event.

#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs, dead_code)]

#[path = "../suite/client.rs"]
mod client;
mod log;
#[path = "../suite/support.rs"]
mod support;
