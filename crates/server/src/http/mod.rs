//! Connections: accepting them, their deadlines, TLS, bodies and answers; and the few calls of our own.
//!
//! Owns everything between the socket and a handler; it knows no model.

pub(crate) mod accept;
pub(crate) mod body;
pub(crate) mod client;
pub(crate) mod io;
pub(crate) mod reply;
pub(crate) mod tls;
