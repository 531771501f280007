//! What usage costs, and who else is told of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Prices, events and figures by application. All off by default; all need a ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct UsageConfig {
    /// TOML file of price lists: rows name the list in force, and costs are told with them.
    pub(crate) price_file: Option<PathBuf>,
    /// Where each ended request is sent as a CloudEvent by HTTP POST, at least once.
    pub(crate) events_url: Option<String>,
    /// File with the bearer token for that address; read again when it changes.
    pub(crate) events_token_file: Option<PathBuf>,
    /// The events' source: the same on all replicas, since any of them may send an event again.
    pub(crate) events_source: String,
    /// Whether events hold the user's pseudonym, which is personal data.
    pub(crate) events_with_user: bool,
    /// Whether metrics tell figures by application: its name is then a label.
    pub(crate) application_metrics: bool,
}

impl Default for UsageConfig {
    fn default() -> Self {
        Self {
            price_file: None,
            events_url: None,
            events_token_file: None,
            events_source: "/mirai/ledger".to_owned(),
            events_with_user: false,
            application_metrics: false,
        }
    }
}
