//! Durable accounting: exactly one row for each accepted request, whatever ends it.
//!
//! Owns rows, the stores that keep them, and the chain that makes a change visible. Never holds a prompt or an
//! answer, knows no HTTP and no model.

mod chain;
pub mod date;
mod error;
pub mod event;
pub mod export;
pub mod identity;
pub mod impact;
mod ledger;
pub mod location;
pub mod money;
pub mod price;
pub mod quota;
mod row;
mod scope;
pub mod secret;
mod spool;
pub mod store;
mod value;
mod verify;

pub use chain::{ChainKey, Epoch, Link, LinkKind, commitment, content_digest, open_digest};
pub use error::StoreError;
pub use ledger::{
    ApplicationCounts, COMMIT_SECONDS, Counter, Counters, Counts, Health, Ledger, LedgerConfig, Open,
    Outcome, StartError, Unavailable,
};
pub use row::{
    Anonymise, Class, Endpoint, EnergyMethod, FIELDS, Field, Finish, MAX_TEXT, Retention, Row, RowError,
    SCHEMA_VERSION, Settled, State, UserKind, registry_json,
};
pub use scope::{Scope, Scopes};
pub use secret::{MIN_SECRET, ShortSecret};
pub use spool::{Spool, SpoolError};
pub use value::{CellError, Hash, Hex, Value};
pub use verify::{Problem, Report, verify};
