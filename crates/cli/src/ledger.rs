//! From the settings of the ledger to a running one.
//!
//! Owns the reading of its secrets and its name; what rows hold belongs to `mirai-ledger` and the server.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mirai_ledger::location::Location;
use mirai_ledger::secret::parse_versions;
use mirai_ledger::{ChainKey, Ledger, Spool, StartError, StoreError};
use mirai_server::Accounting;

use crate::config::{LedgerConfig, UsageConfig};
use crate::exit::Failure;
use crate::prices;

/// Most bytes of a file of secrets.
const MAX_SECRETS: u64 = 64 << 10;
/// Most applications whose figures are metrics.
const MAX_APPLICATIONS: usize = 1000;

/// Checks what can be checked without touching the machine.
pub(crate) fn check(config: &LedgerConfig) -> Result<(), Failure> {
    location(config)?;
    for (name, value, most) in [
        ("ledger.lease_seconds", config.lease_seconds, 3600.0),
        ("ledger.stall_seconds", config.stall_seconds, 600.0),
    ] {
        if !(1.0..=most).contains(&value) {
            return Err(Failure::usage(format!("{name} is {value}, but must be from 1 to {most}")));
        }
    }
    let least = 1 << 20;
    if !(least..=1 << 40).contains(&config.spool_bytes) {
        let bytes = config.spool_bytes;
        return Err(Failure::usage(format!(
            "ledger.spool_bytes is {bytes}, but must be from {least} to {}",
            1u64 << 40
        )));
    }
    let writer = config.writer.as_deref().unwrap_or("w");
    if !(1..=128).contains(&writer.len()) || !writer.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::usage(
            "ledger.writer must be 1 to 128 printable ASCII characters without spaces",
        ));
    }
    Ok(())
}

fn location(config: &LedgerConfig) -> Result<Option<Location>, Failure> {
    let parse = |url: &String| url.parse().map_err(|error| Failure::usage(format!("ledger.store: {error}")));
    config.store.as_ref().map(parse).transpose()
}

/// The text of a small file of secrets. A message names the file, never what is in it.
fn read(path: &Path) -> Result<String, Failure> {
    let failure = |error: std::io::Error| Failure::usage(format!("{}: {error}", path.display()));
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failure)?;
    file.take(MAX_SECRETS).read_to_string(&mut text).map_err(failure)?;
    Ok(text)
}

/// The store's place with the password for it, if rows are written.
pub(crate) fn place(config: &LedgerConfig) -> Result<Option<Location>, Failure> {
    let Some(location) = location(config)? else { return Ok(None) };
    let password = match &config.password_file {
        Some(path) => Some(read(path)?.trim_end_matches(['\r', '\n']).to_owned()),
        None => config.password.clone(),
    };
    Ok(Some(match password {
        Some(password) => location.with_password(&password),
        None => location,
    }))
}

/// The key that signs chains: the newest of its file.
pub(crate) fn chain_key(path: Option<&Path>) -> Result<Option<ChainKey>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let failure = |error: String| Failure::usage(format!("{}: {error}", path.display()));
    let versions = parse_versions(&read(path)?).map_err(|error| failure(error.to_string()))?;
    let Some((version, secret)) = versions.first() else { return Ok(None) };
    ChainKey::new(*version, secret).map(Some).map_err(|error| failure(error.to_string()))
}

/// The host's name: a pod's under Kubernetes.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "mirai".to_owned() } else { name.to_owned() }
}

/// This process's name among those that write.
pub(crate) fn writer(config: &LedgerConfig) -> String {
    config.writer.clone().unwrap_or_else(host)
}

/// Opens the store and starts the ledger. Blocks.
pub(crate) fn start(config: &LedgerConfig, usage: &UsageConfig) -> Result<Option<Accounting>, Failure> {
    let Some(location) = place(config)? else {
        tracing::warn!("no ledger: requests are counted in metrics only (--ledger)");
        return Ok(None);
    };
    let key = chain_key(config.chain_key_file.as_deref())?;
    if key.is_none() {
        tracing::warn!("the ledger's chain is not signed (ledger.chain_key_file)");
    }
    let spool = config.spool.as_deref().map(|path| Spool::open(path, config.spool_bytes));
    let spool = spool.transpose().map_err(Failure::environment)?;
    let replica = writer(config);
    let prices = usage.price_file.as_deref().map(prices::read).transpose()?.map(Arc::new);
    let settings = mirai_ledger::LedgerConfig {
        writer: replica.clone(),
        takeover: location.is_exclusive(),
        lease: Duration::from_secs_f64(config.lease_seconds),
        stall: Duration::from_secs_f64(config.stall_seconds),
        applications: if usage.application_metrics { MAX_APPLICATIONS } else { 0 },
        ..mirai_ledger::LedgerConfig::default()
    };
    let failed = |error: StoreError| Failure::environment(format!("ledger {location}: {error}"));
    let store = location.open(key).map_err(failed)?;
    let ledger = Ledger::start(store, spool, settings).map_err(|error| match error {
        StartError::Store(error) => failed(error),
        StartError::Thread(_) => Failure::environment(error),
    })?;
    tracing::info!(store = %location, writer = replica, "requests are accounted for");
    Ok(Some(Accounting { ledger, replica, prices }))
}
