//! How what applications may use is counted. What they may use is in the file of applications.

use mirai_ledger::quota::OnStoreLoss;
use serde::{Deserialize, Serialize};

/// Limits of applications: counted in the ledger's store by all replicas together, or without one in this process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct QuotasConfig {
    /// Whether limits hold. Without it they are read, and nothing else. Default: true.
    pub(crate) enforce: bool,
    /// Zone in which days and months begin. Default: `Europe/Paris`.
    pub(crate) zone: String,
    /// When the store is lost and what this replica holds is used up: `refuse` answers 503, `allow` goes on as if
    /// this replica were alone. Default: `refuse`.
    pub(crate) on_store_loss: OnStoreLoss,
    /// Silence after which others end what this replica holds. Default: 30.
    pub(crate) lease_seconds: f64,
    /// How long a request waits for the store at most. Default: 1.
    pub(crate) wait_seconds: f64,
}

impl Default for QuotasConfig {
    fn default() -> Self {
        Self {
            enforce: true,
            zone: "Europe/Paris".to_owned(),
            on_store_loss: OnStoreLoss::default(),
            lease_seconds: 30.0,
            wait_seconds: 1.0,
        }
    }
}
