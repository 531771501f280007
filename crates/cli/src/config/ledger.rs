//! Where rows of requests go, and what is done when they cannot go there.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Accounting for requests, one row each. Off unless `store` says where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LedgerConfig {
    /// `sqlite:///absolute/path` for one replica with a volume, `postgres://user@host/database` for several. Default:
    /// no rows are written.
    pub(crate) store: Option<String>,
    /// File with the password of the database's user. `MIRAI_LEDGER_PASSWORD` says the same.
    pub(crate) password_file: Option<PathBuf>,
    /// File of versioned secrets, one `VERSION SECRET` a line: the highest signs the chain of rows, the same on all
    /// replicas. Without one, the chain shows damage but proves nothing.
    pub(crate) chain_key_file: Option<PathBuf>,
    /// File that takes rows while the store is out of reach. Without one, new work is then refused.
    pub(crate) spool: Option<PathBuf>,
    /// Most bytes of that file. Default: 64 MiB, some 40,000 requests.
    pub(crate) spool_bytes: u64,
    /// This process's name among those that write: the same after a restart, unlike any other's. Default: the host's
    /// name.
    pub(crate) writer: Option<String>,
    /// Silence after which others close this process's rows. Default: 30.
    pub(crate) lease_seconds: f64,
    /// How long the store may fail before streams that wait for it are ended. Default: 10.
    pub(crate) stall_seconds: f64,
    /// The password, from the environment. Never read from nor written to a file of settings.
    #[serde(skip)]
    pub(crate) password: Option<String>,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            store: None,
            password_file: None,
            chain_key_file: None,
            spool: None,
            spool_bytes: 64 << 20,
            writer: None,
            lease_seconds: 30.0,
            stall_seconds: 10.0,
            password: None,
        }
    }
}
