//! An issuer of signed tokens: found by OpenID Connect discovery, its keys kept and renewed.
//!
//! Owns when keys are fetched: at first use, at intervals, and when a token names a key that is not known, but never
//! more often than the configuration allows, whatever tokens come. Keys that cannot be renewed are used for a while.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::claims::{self, Identity, unix_now};
use super::config::{Algorithm, IssuerConfig};
use super::jwt::{Compact, KeySet, TokenError};
use super::refusal::Refusal;
use crate::config_error::seconds;
use crate::http::client::{Call, CallError, Client, Target};
use crate::metrics::identity::{IdentityMetrics, Lookup};

/// Most bytes of a discovery document or a key set.
const MAX_DOCUMENT: usize = 256 << 10;

/// Keys, and when they came.
#[derive(Debug)]
struct Fetched {
    keys: KeySet,
    at: Instant,
}

/// When the last fetch was, and how it went.
#[derive(Debug, Default)]
struct Tries {
    last: Option<Instant>,
    failed: bool,
}

/// One issuer.
#[derive(Debug)]
pub(super) struct Issuer {
    config: IssuerConfig,
    client: Client,
    metrics: Arc<IdentityMetrics>,
    fetched: ArcSwapOption<Fetched>,
    tries: Mutex<Tries>,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl Issuer {
    pub(super) fn new(config: IssuerConfig, client: Client, metrics: Arc<IdentityMetrics>) -> Self {
        Self { config, client, metrics, fetched: ArcSwapOption::empty(), tries: Mutex::default() }
    }

    /// Its name in the file of applications.
    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    /// As tokens name it.
    pub(super) fn issuer(&self) -> &str {
        &self.config.issuer
    }

    /// Who is meant by a token that says it comes from here.
    ///
    /// # Errors
    /// The token is not good, or that cannot be known now.
    pub(super) async fn verify(self: &Arc<Self>, token: Compact<'_>) -> Result<Identity, Refusal> {
        let config = &self.config;
        let algorithm = token.algorithm(&config.algorithms)?;
        let fetched = self.keys_for(token.kid(), algorithm).await?;
        token.verify(&fetched.keys, algorithm)?;
        let claims = token.claims(&config.issuer, &config.audiences, unix_now(), config.skew_seconds)?;
        claims::identity(&claims, &config.claims, "azp").ok_or(Refusal::Token(TokenError::Application))
    }

    /// The keys in force, fetched again where this one is missing.
    async fn keys_for(
        self: &Arc<Self>,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Arc<Fetched>, Refusal> {
        let stale = seconds(self.config.stale_seconds);
        let current = || self.fetched.load_full().filter(|fetched| fetched.at.elapsed() < stale);
        if let Some(fetched) = current().filter(|fetched| fetched.keys.has(kid, algorithm)) {
            return Ok(fetched);
        }
        // In a task of its own: a client that leaves must not take the fetch with it that others wait for.
        let this = self.clone();
        let failed = tokio::spawn(async move { this.fetch().await }).await.unwrap_or(true);
        match current() {
            Some(fetched) if fetched.keys.has(kid, algorithm) => Ok(fetched),
            // It may be a key that the issuer has and we could not fetch.
            None => Err(Refusal::Unavailable),
            Some(_) if failed => Err(Refusal::Unavailable),
            Some(_) => Err(Refusal::Token(TokenError::UnknownKey)),
        }
    }

    /// Fetches the keys unless that was tried a moment ago. Whoever comes meanwhile waits for the same fetch. True if
    /// the last one failed.
    async fn fetch(&self) -> bool {
        let mut tries = self.tries.lock().await;
        let gap = seconds(self.config.refetch_seconds);
        if tries.last.is_some_and(|last| last.elapsed() < gap) {
            return tries.failed;
        }
        let result = self.download().await;
        self.metrics.looked_up(Lookup::Keys, result.is_ok());
        tries.last = Some(Instant::now());
        tries.failed = result.is_err();
        match result {
            Ok(keys) => {
                let fetched = Fetched { keys, at: Instant::now() };
                self.fetched.store(Some(Arc::new(fetched)));
            }
            Err(error) => {
                tracing::warn!(provider = self.config.name, %error, "keys of an issuer not fetched; the old ones stay");
            }
        }
        tries.failed
    }

    async fn download(&self) -> Result<KeySet, CallError> {
        let base = self.config.issuer.trim_end_matches('/');
        let known =
            Target::parse(&format!("{base}/.well-known/openid-configuration")).ok_or(CallError::Content)?;
        let document = self.client.call(&known, Call::Get, MAX_DOCUMENT).await?;
        let discovery: Discovery = serde_json::from_slice(&document).map_err(|_| CallError::Content)?;
        // Another issuer's keys would make its tokens ours.
        if discovery.issuer != self.config.issuer {
            return Err(CallError::Content);
        }
        let keys = Target::parse(&discovery.jwks_uri).ok_or(CallError::Content)?;
        if known.is_secure() && !keys.is_secure() {
            return Err(CallError::Content);
        }
        let set = self.client.call(&keys, Call::Get, MAX_DOCUMENT).await?;
        KeySet::parse(&set).ok_or(CallError::Content)
    }

    /// Fetches the keys now, and again at intervals. Never returns.
    pub(super) async fn keep_fresh(&self) {
        let refresh = seconds(self.config.refresh_seconds);
        let retry = seconds(self.config.refetch_seconds).max(Duration::from_secs(1)).min(refresh);
        loop {
            let failed = self.fetch().await;
            tokio::time::sleep(if failed { retry } else { refresh }).await;
        }
    }
}
