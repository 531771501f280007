//! Who may call.
//!
//! Owns the one question that every request is asked, and the order of the answers: a plain key, a key of an
//! application, a signed token, an opaque token. What was decided is a [`Caller`]; no key, token or user reaches a
//! log, a metric or an error from here. What a caller may then do is written in the table of routes.

mod applications;
mod caller;
mod claims;
pub(crate) mod config;
mod gateway;
mod introspection;
mod jwt;
mod keys;
mod oidc;
mod refusal;
mod seldom;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use tokio::task::JoinSet;

use crate::api::wire::{Metadata, Name};
use crate::config::ServerConfig;
use crate::config_error::seconds;
use crate::error::ApiError;
use crate::http::client::{self, BundleError, Client};
use crate::metrics::identity::{Credential, Decision};
use crate::metrics::{Metrics, Reloaded};
use crate::reload::Watch;

pub use applications::IdentityFileError;
pub use config::{
    Algorithm, ClaimsConfig, GatewayConfig, IdentityConfig, IntrospectionConfig, IssuerConfig, Unknown,
};
pub use keys::{KeyFileError, MAX_KEYS, read_keys};

pub(crate) use applications::Pseudonym;
pub(crate) use caller::{Caller, Known, User, cache_salt};

use applications::{Files, Numbers, Registry};
use claims::Identity;
use gateway::Gateway;
use introspection::Introspection;
use jwt::Compact;
use keys::PlainKeys;
use oidc::Issuer;
use refusal::Refusal;

/// Beginning of the keys that `mirai keys new` makes: they are never shown to an identity provider.
const KEY_PREFIX: &str = "mirai-";

/// What the identity of callers rests on cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file of plain keys.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// The file of applications, or one of secrets.
    #[error(transparent)]
    File(#[from] IdentityFileError),
    /// The authorities for outbound calls.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// What a body says of whom it is for.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Attribution {
    pub(crate) user: Option<String>,
    pub(crate) metadata: Vec<(String, String)>,
}

impl Attribution {
    /// What the three fields say together.
    pub(crate) fn of(user: Name, safety_identifier: Name, metadata: Metadata) -> Self {
        let Metadata(metadata) = metadata;
        let named = || metadata.iter().find(|(member, _)| member == "user").map(|(_, user)| user.clone());
        let user = user.0.or(safety_identifier.0).or_else(named);
        Self { user, metadata }
    }
}

impl std::fmt::Debug for Attribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attribution").finish_non_exhaustive()
    }
}

/// Decides who calls.
#[derive(Debug)]
pub(crate) struct Auth {
    /// Whether callers have to say who they are.
    required: bool,
    plain: PlainKeys,
    registry: Registry,
    gateway: Gateway,
    issuers: Vec<Arc<Issuer>>,
    introspection: Option<Arc<Introspection>>,
    trust: Arc<ArcSwapOption<rustls::ClientConfig>>,
    /// The file that `trust` is made of, where https is called.
    bundle: Option<Option<std::path::PathBuf>>,
    metrics: Arc<Metrics>,
    plain_watch: Watch,
    watch: Watch,
}

impl Auth {
    /// Reads everything, and calls nobody yet.
    ///
    /// # Errors
    /// A file cannot be used.
    pub(crate) fn load(config: &ServerConfig, metrics: Arc<Metrics>) -> Result<Self, IdentityError> {
        let identity = &config.identity;
        let files = Files {
            applications: identity.applications_file.clone(),
            pepper: identity.pepper_file.clone(),
            user_key: identity.user_key_file.clone(),
        };
        // Looked at before they are read: see `Watch::new`.
        let plain_watch = Watch::new(config.api_key_file.iter().cloned().collect());
        let secret = identity.introspection.as_ref().map(|introspection| &introspection.client_secret_file);
        let watched = files.paths().chain(secret).chain(&identity.ca_bundle).cloned().collect();
        let watch = Watch::new(watched);
        let numbers = Arc::new(Numbers::default());
        let plain = PlainKeys::load(&config.api_keys, config.api_key_file.as_deref(), numbers.clone())?;
        let registry = Registry::new(files, numbers);
        registry.take(registry.files().read()?);
        let bundle = identity.needs_trust().then(|| identity.ca_bundle.clone());
        let trusted = bundle.as_ref().map(|bundle| client::trust(bundle.as_deref())).transpose()?;
        let trust = Arc::new(ArcSwapOption::new(trusted));
        let caller = |timeout| Client::new(seconds(timeout), trust.clone());
        let issuers = identity.issuer.iter().map(|issuer| {
            Arc::new(Issuer::new(issuer.clone(), caller(issuer.timeout_seconds), metrics.identity.clone()))
        });
        let issuers = issuers.collect();
        let introspection = identity.introspection.clone().map(|introspection| {
            let caller = caller(introspection.timeout_seconds);
            Introspection::load(introspection, caller, metrics.identity.clone()).map(Arc::new)
        });
        Ok(Self {
            required: plain.is_configured() || identity.authenticates(),
            plain,
            registry,
            gateway: Gateway::new(&identity.gateway),
            issuers,
            introspection: introspection.transpose()?,
            trust,
            bundle,
            metrics,
            plain_watch,
            watch,
        })
    }

    /// Takes what files hold whenever they change, if it can be used, and keeps the issuers' keys fresh. Never
    /// returns.
    pub(crate) async fn watch(self: Arc<Self>, every: Duration) {
        let mut tasks = JoinSet::new();
        for issuer in &self.issuers {
            let issuer = issuer.clone();
            tasks.spawn(async move { issuer.keep_fresh().await });
        }
        if self.plain.path().is_some() {
            let this = self.clone();
            tasks.spawn(async move {
                let reload = {
                    let this = this.clone();
                    move || this.plain.read()
                };
                this.plain_watch.run(Reloaded::ApiKeys, every, &this.metrics, reload).await;
            });
        }
        if !self.watch.is_empty() {
            let this = self.clone();
            tasks.spawn(async move {
                let reload = {
                    let this = this.clone();
                    move || this.reload()
                };
                this.watch.run(Reloaded::Identity, every, &this.metrics, reload).await;
            });
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Reads applications, secrets and authorities again, and takes all of it or nothing. It waits for disks: not for
    /// threads that serve connections.
    ///
    /// # Errors
    /// A file cannot be used; what was in force stays.
    pub(crate) fn reload(&self) -> Result<(), IdentityError> {
        let contents = self.registry.files().read()?;
        let secret = self.introspection.as_ref().map(|introspection| introspection.read()).transpose()?;
        let trusted = self.bundle.as_ref().map(|bundle| client::trust(bundle.as_deref())).transpose()?;
        self.registry.take(contents);
        if let (Some(introspection), Some(secret)) = (&self.introspection, secret) {
            introspection.take(secret);
        }
        self.trust.store(trusted);
        Ok(())
    }

    /// Who calls.
    ///
    /// # Errors
    /// 401 without exactly one good `Authorization: Bearer …`, 403 for an application that nobody knows, 400 for a
    /// gateway's malformed headers, 503 when the identity provider does not answer.
    pub(crate) async fn check(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if !self.required {
            return Ok(Caller::anybody());
        }
        let (credential, result) = match bearer(headers) {
            Ok(token) => self.identify(token, headers).await,
            Err(error) => (Credential::None, Err(error)),
        };
        let decision = match &result {
            Ok(_) => Decision::Accepted,
            Err(error) if error.status.is_server_error() => Decision::Unavailable,
            Err(_) => Decision::Refused,
        };
        self.metrics.identity.decided(credential, decision);
        result
    }

    async fn identify(&self, token: &str, headers: &HeaderMap) -> (Credential, Result<Caller, ApiError>) {
        if let Some(caller) = self.plain.caller(token.as_bytes()) {
            return (Credential::Key, Ok(caller));
        }
        if let Some((caller, gateway)) = self.registry.key(token) {
            let caller =
                if gateway { self.gateway.by_headers(caller, headers, &self.registry) } else { Ok(caller) };
            return (Credential::ApplicationKey, caller);
        }
        let signed = if self.issuers.is_empty() { None } else { Compact::parse(token) };
        if let Some(signed) = signed
            && let Some(issuer) = self.issuers.iter().find(|issuer| signed.issuer() == Some(issuer.issuer()))
        {
            let identity = issuer.verify(signed).await;
            return (Credential::Signed, self.of_token(issuer.name(), identity));
        }
        if let Some(introspection) = &self.introspection
            && !token.starts_with(KEY_PREFIX)
        {
            let identity = introspection.lookup(token).await;
            return (Credential::Opaque, self.of_token(introspection.name(), identity));
        }
        (Credential::Unknown, Err(ApiError::unauthorized("the API key is not valid")))
    }

    /// The application that a good token means.
    fn of_token(&self, provider: &str, identity: Result<Identity, Refusal>) -> Result<Caller, ApiError> {
        let identity = identity?;
        let known = self.registry.client(provider, &identity.client).ok_or_else(|| {
            ApiError::unknown_application("the application that the token names is not known here")
        })?;
        // What a token says counts within what its application may do.
        let own = known.application.scopes;
        let scopes = identity.scopes.map_or(own, |scopes| scopes.and(own));
        Ok(Caller { user: identity.user, ..Caller::of(&known, provider.into(), 0, scopes) })
    }

    /// The caller, with what its body says of whom it is for: an application if this is a gateway that has not named
    /// one, a user if nobody has named one.
    ///
    /// # Errors
    /// 400 or 403 for the name of an application.
    pub(crate) fn attributed(&self, caller: Caller, body: &Attribution) -> Result<Caller, ApiError> {
        let mut caller = caller;
        if caller.may_name {
            caller = self.gateway.by_body(caller, &body.metadata, &self.registry)?;
            caller.may_name = false;
        }
        if caller.user.is_none() {
            caller.user = body.user.as_deref().and_then(User::new);
        }
        Ok(caller)
    }

    /// What is recorded of a caller's user; `None` if there is none, or nothing is to be recorded.
    pub(crate) fn pseudonym(&self, caller: &Caller) -> Option<Pseudonym> {
        self.registry.pseudonym(&caller.application, caller.user.as_ref()?)
    }

    /// Every application of the file, in its order.
    pub(crate) fn applications(&self) -> Vec<Arc<Known>> {
        self.registry.all()
    }
}

/// What the files of a configuration hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdentitySummary {
    /// Plain keys.
    pub keys: usize,
    /// Applications.
    pub applications: usize,
}

impl IdentitySummary {
    /// Reads every file that the identity of callers rests on, as a start would, and calls nobody.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn read(config: &ServerConfig) -> Result<Self, IdentityError> {
        let auth = Auth::load(config, Arc::new(Metrics::new()))?;
        Ok(Self { keys: auth.plain.len(), applications: auth.registry.all().len() })
    }
}

/// The one token of a request.
fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(ApiError::unauthorized("exactly one `Authorization: Bearer <key>` header is needed"));
    };
    let wrong = || ApiError::unauthorized("the API key is not valid");
    let (scheme, token) = value.as_bytes().split_at_checked(7).ok_or_else(wrong)?;
    let plausible = (1..=jwt::MAX_TOKEN).contains(&token.len()) && token.iter().all(u8::is_ascii_graphic);
    if !scheme.eq_ignore_ascii_case(b"bearer ") || !plausible {
        return Err(wrong());
    }
    std::str::from_utf8(token).map_err(|_| wrong())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stdout)]
mod timing_tests;
