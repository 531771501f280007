//! From the settings of quotas to their running count.
//!
//! Owns where they are counted: beside the ledger, or in this process where there is none.

use std::time::Duration;

use mirai_ledger::quota::{QuotaConfig, QuotaStartError, Quotas};

use crate::config::Config;
use crate::exit::Failure;
use crate::ledger;

/// Checks what can be checked without touching the machine.
pub(crate) fn check(config: &Config) -> Result<(), Failure> {
    for (name, value, least, most) in [
        ("quotas.lease_seconds", config.quotas.lease_seconds, 3.0, 3600.0),
        ("quotas.wait_seconds", config.quotas.wait_seconds, 0.01, 60.0),
    ] {
        if !(least..=most).contains(&value) {
            return Err(Failure::usage(format!("{name} is {value}, but must be from {least} to {most}")));
        }
    }
    QuotaConfig::check_zone(&config.quotas.zone)
        .map_err(|error| Failure::usage(format!("quotas.zone: {error}")))
}

/// Opens the store and begins to count, where there are applications to count for. Blocks.
pub(crate) fn start(config: &Config) -> Result<Option<Quotas>, Failure> {
    if config.identity.applications_file.is_none() {
        return Ok(None);
    }
    if !config.quotas.enforce {
        tracing::warn!("limits of applications do not hold (quotas.enforce)");
        return Ok(None);
    }
    let place = ledger::place(&config.ledger)?;
    let settings = QuotaConfig {
        zone: config.quotas.zone.clone(),
        writer: ledger::writer(&config.ledger),
        takeover: place.as_ref().is_some_and(mirai_ledger::location::Location::is_exclusive),
        // A spool may hold rows that the store has not seen.
        rows_tell: place.is_some() && config.ledger.spool.is_none(),
        lease: Duration::from_secs_f64(config.quotas.lease_seconds),
        max_wait: Duration::from_secs_f64(config.quotas.wait_seconds),
        on_store_loss: config.quotas.on_store_loss,
        ..QuotaConfig::default()
    };
    let started = match &place {
        Some(place) => place.start_quotas(settings),
        None => {
            tracing::warn!("no ledger: limits of applications are counted in this process alone (--ledger)");
            Quotas::start_in_memory(settings)
        }
    };
    started.map(Some).map_err(|error| match error {
        QuotaStartError::Zone(_) => Failure::usage(error),
        QuotaStartError::Store(_) | QuotaStartError::Thread(_) => {
            Failure::environment(format!("quotas: {error}"))
        }
    })
}
