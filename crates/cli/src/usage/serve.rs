//! What a server tells of usage: sums over HTTP, events, prices.
//!
//! Owns the way from settings to the server's handle.

use std::sync::Arc;

use mirai_ledger::event::EventOptions;
use mirai_server::{ServerHandle, UsageEvents};

use crate::config::{Config, UsageConfig};
use crate::exit::Failure;
use crate::{ledger, prices};

/// Most bytes of the events' source: it is a header of each.
const MAX_SOURCE: usize = 256;

/// Checks what can be checked without touching the machine.
pub(crate) fn check(config: &UsageConfig, ledger: bool) -> Result<(), Failure> {
    let source = &config.events_source;
    if !(1..=MAX_SOURCE).contains(&source.len()) || !source.bytes().all(|b| b.is_ascii_graphic()) {
        let text = "usage.events_source must be 1 to 256 printable ASCII characters without spaces";
        return Err(Failure::usage(text));
    }
    if config.events_url.is_some() && !ledger {
        return Err(Failure::usage("usage.events_url needs a ledger (--ledger)"));
    }
    if config.events_token_file.is_some() && config.events_url.is_none() {
        return Err(Failure::usage("usage.events_token_file is of no use without usage.events_url"));
    }
    Ok(())
}

/// Lets the server read its ledger, and tell others of it. Needs the runtime that serves.
pub(crate) fn start(config: &Config, replica: &str, server: &ServerHandle) -> Result<(), Failure> {
    let usage = &config.usage;
    let Some(location) = ledger::place(&config.ledger)? else { return Ok(()) };
    server.read_usage(location.clone()).map_err(Failure::run)?;
    let Some(url) = &usage.events_url else { return Ok(()) };
    let prices = usage.price_file.as_deref().map(prices::read).transpose()?.map(Arc::new);
    let events = UsageEvents {
        ledger: location,
        url: url.clone(),
        token_file: usage.events_token_file.clone(),
        ca_bundle: config.identity.ca_bundle.clone(),
        options: EventOptions { source: usage.events_source.clone(), with_user: usage.events_with_user },
        prices,
        holder: replica.to_owned(),
    };
    server.send_events(events).map_err(Failure::usage)?;
    tracing::info!("ended requests are sent as events");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        let good = UsageConfig { events_url: Some("https://h/".into()), ..UsageConfig::default() };
        assert!(check(&good, true).is_ok() && check(&UsageConfig::default(), false).is_ok());
        let token = UsageConfig { events_token_file: Some("t".into()), ..UsageConfig::default() };
        let source = |text: &str| UsageConfig { events_source: text.into(), ..UsageConfig::default() };
        for (config, ledger, words) in [
            (good, false, "needs a ledger"),
            (token, true, "usage.events_url"),
            (source(""), true, "events_source"),
            (source("a b"), true, "events_source"),
            (source("é"), true, "events_source"),
            (source(&"x".repeat(257)), true, "events_source"),
        ] {
            let failure = check(&config, ledger).unwrap_err();
            assert!(matches!(&failure, Failure::Usage(text) if text.contains(words)), "{failure}");
        }
    }
}
