//! What the server is told about who may call.
//!
//! Owns names, defaults and ranges of `[identity]`; reads no file and calls nobody.

use std::net::SocketAddr;
use std::path::PathBuf;

use mirai_ledger::{Scope, Scopes};
use serde::{Deserialize, Serialize};

use crate::config_error::ConfigError;
use crate::http::client::Target;

/// The provider whose names a gateway uses; no identity provider may be called so.
pub(crate) const GATEWAY: &str = "gateway";
/// Most issuers: each token is matched with them.
const MAX_ISSUERS: usize = 16;

/// Who may call. The default asks for nothing beyond the plain keys of `[server]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IdentityConfig {
    /// TOML file of applications, with weights, quotas and keyed hashes of their keys; read again when it changes.
    pub applications_file: Option<PathBuf>,
    /// Secrets under which the hashes of keys are made, one `VERSION SECRET` a line; the same on all replicas.
    pub pepper_file: Option<PathBuf>,
    /// Secrets under which the pseudonyms of users are made, one `VERSION SECRET` a line; the same on all replicas,
    /// and others than the pepper. Without it no user is recorded.
    pub user_key_file: Option<PathBuf>,
    /// Authorities that the certificates of identity providers are verified against, PEM. Default: `SSL_CERT_FILE`,
    /// else the system's.
    pub ca_bundle: Option<PathBuf>,
    /// Address of the admin listener, `127.0.0.1:8001` for instance. Default: none.
    pub admin_listen: Option<SocketAddr>,
    /// Who speaks for others.
    pub gateway: GatewayConfig,
    /// Issuers of signed tokens (JWT).
    pub issuer: Vec<IssuerConfig>,
    /// Who knows what opaque tokens mean.
    pub introspection: Option<IntrospectionConfig>,
}

/// What a gateway says, whose key belongs to an application with `gateway = true`. Nobody else's headers count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Header with the application's name. Default `X-Consumer-Username`; empty for none.
    pub application_header: String,
    /// Header with the user. Default: none.
    pub user_header: String,
    /// Member of the body's `metadata` with the application's name, where no header has it. Default `application`;
    /// empty for none.
    pub application_metadata: String,
    /// What happens to the name of an application that is in no file.
    pub unknown_application: Unknown,
}

/// What happens to names that nobody knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unknown {
    /// 403.
    #[default]
    Refuse,
    /// The request is the gateway's own.
    Gateway,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            application_header: "X-Consumer-Username".to_owned(),
            user_header: String::new(),
            application_metadata: "application".to_owned(),
            unknown_application: Unknown::Refuse,
        }
    }
}

/// A signature that is accepted. There is neither `none` nor a symmetric one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Algorithm {
    /// RSA PKCS#1 v1.5 with SHA-256.
    RS256,
    /// RSA PSS with SHA-256.
    PS256,
    /// ECDSA on P-256 with SHA-256.
    ES256,
    /// Ed25519.
    EdDSA,
}

/// Where in a token what is found. A path may lead into objects: `resource_access.mirai.roles`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClaimsConfig {
    /// Claim with the name that the provider has for the application. Default `azp` of a signed token, `client_id` of
    /// an opaque one.
    pub application: Option<String>,
    /// Claim with the user. Default `sub`.
    pub user: Option<String>,
    /// Claim with roles or scopes: words with spaces between, a list, or an object whose names count. Default: none,
    /// every token has what its application has.
    pub roles: Option<String>,
    /// Role that gives `infer`. Default: everybody has it.
    pub infer_role: Option<String>,
    /// Role that gives `read-usage`. Default: nobody has it.
    pub read_usage_role: Option<String>,
    /// Role that gives `admin`. Default: nobody has it.
    pub admin_role: Option<String>,
}

impl ClaimsConfig {
    /// What roles give; `None` if the configuration does not ask for them.
    pub(crate) fn scopes(&self, has_role: impl Fn(&str) -> bool) -> Option<Scopes> {
        self.roles.as_ref()?;
        let has = |role: &Option<String>| role.as_deref().is_some_and(&has_role);
        let mut scopes = Scopes::default();
        if self.infer_role.is_none() || has(&self.infer_role) {
            scopes = scopes.with(Scope::Infer);
        }
        if has(&self.read_usage_role) {
            scopes = scopes.with(Scope::ReadUsage);
        }
        if has(&self.admin_role) {
            scopes = scopes.with(Scope::Admin);
        }
        Some(scopes)
    }
}

/// An issuer of signed tokens, found by OpenID Connect discovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IssuerConfig {
    /// Its name in the file of applications: 1 to 64 of a-z, 0-9, `-`, `_`, `.`.
    pub name: String,
    /// Its address, exactly as in the tokens' `iss`.
    pub issuer: String,
    /// A token must be for one of these (`aud`). At least one.
    pub audiences: Vec<String>,
    /// Signatures that are accepted. Default: RS256.
    pub algorithms: Vec<Algorithm>,
    /// Where in a token what is found.
    pub claims: ClaimsConfig,
    /// How far its clock and ours may be apart, seconds. Default 60.
    pub skew_seconds: f64,
    /// Longest time of one call, seconds. Default 5.
    pub timeout_seconds: f64,
    /// After how long its keys are fetched again, seconds. Default 600.
    pub refresh_seconds: f64,
    /// Least time between two fetches, whatever tokens come, seconds. Default 10.
    pub refetch_seconds: f64,
    /// How long keys are used that could not be fetched again, seconds. Default 86,400.
    pub stale_seconds: f64,
}

impl Default for IssuerConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            issuer: String::new(),
            audiences: Vec::new(),
            algorithms: vec![Algorithm::RS256],
            claims: ClaimsConfig::default(),
            skew_seconds: 60.0,
            timeout_seconds: 5.0,
            refresh_seconds: 600.0,
            refetch_seconds: 10.0,
            stale_seconds: 86_400.0,
        }
    }
}

/// Where opaque tokens are looked up (RFC 7662).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IntrospectionConfig {
    /// Its name in the file of applications: 1 to 64 of a-z, 0-9, `-`, `_`, `.`.
    pub name: String,
    /// Address of the endpoint.
    pub endpoint: String,
    /// Who asks.
    pub client_id: String,
    /// File with the secret of who asks; read again when it changes.
    pub client_secret_file: PathBuf,
    /// If set, a token's `iss` must be this.
    pub issuer: Option<String>,
    /// If not empty, a token must be for one of these (`aud`).
    pub audiences: Vec<String>,
    /// Where in the answer what is found.
    pub claims: ClaimsConfig,
    /// Longest time of one call, seconds. Default 5.
    pub timeout_seconds: f64,
    /// How long a good token is not asked for again, seconds, and never beyond its `exp`: a token that was withdrawn
    /// may work for so long. Default 60.
    pub positive_seconds: f64,
    /// How long a bad token is not asked for again, seconds. Default 10.
    pub negative_seconds: f64,
    /// Good tokens, and bad ones, that are remembered. Default 10,000.
    pub max_entries: usize,
    /// Calls under way at once. Default 32.
    pub max_calls: usize,
}

impl Default for IntrospectionConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            endpoint: String::new(),
            client_id: String::new(),
            client_secret_file: PathBuf::new(),
            issuer: None,
            audiences: Vec::new(),
            claims: ClaimsConfig::default(),
            timeout_seconds: 5.0,
            positive_seconds: 60.0,
            negative_seconds: 10.0,
            max_entries: 10_000,
            max_calls: 32,
        }
    }
}

impl IdentityConfig {
    /// Whether callers have to say who they are.
    pub fn authenticates(&self) -> bool {
        self.applications_file.is_some() || !self.issuer.is_empty() || self.introspection.is_some()
    }

    /// Checks what can be checked without touching the machine.
    ///
    /// # Errors
    /// The first inconsistency, naming the field.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let fail = |field: String, problem| Err(ConfigError::Identity { field, problem });
        let tokens = !self.issuer.is_empty() || self.introspection.is_some();
        if self.applications_file.is_none() && (tokens || self.pepper_file.is_some()) {
            return fail(
                "applications_file".to_owned(),
                "is missing: keys and tokens mean an application of it",
            );
        }
        for (field, header) in [
            ("gateway.application_header", &self.gateway.application_header),
            ("gateway.user_header", &self.gateway.user_header),
        ] {
            if !header.is_empty() && hyper::header::HeaderName::try_from(header.as_str()).is_err() {
                return fail(field.to_owned(), "is no name of a header");
            }
        }
        if self.issuer.len() > MAX_ISSUERS {
            return fail("issuer".to_owned(), "comes more than 16 times");
        }
        for (number, issuer) in (1..).zip(&self.issuer) {
            issuer
                .validate()
                .or_else(|(field, problem)| fail(format!("issuer {number}: {field}"), problem))?;
        }
        if let Some(introspection) = &self.introspection {
            let checked = introspection.validate();
            checked.or_else(|(field, problem)| fail(format!("introspection.{field}"), problem))?;
        }
        let mut names: Vec<&str> = self.issuer.iter().map(|issuer| issuer.name.as_str()).collect();
        names.extend(self.introspection.as_ref().map(|introspection| introspection.name.as_str()));
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return fail("name".to_owned(), "comes twice");
        }
        let mut issuers: Vec<&str> = self.issuer.iter().map(|issuer| issuer.issuer.as_str()).collect();
        issuers.sort_unstable();
        if issuers.windows(2).any(|pair| pair[0] == pair[1]) {
            return fail("issuer".to_owned(), "comes twice");
        }
        Ok(())
    }

    /// Whether anything is called by https.
    pub(crate) fn needs_trust(&self) -> bool {
        let urls = self.issuer.iter().map(|issuer| &issuer.issuer);
        let mut all = urls.chain(self.introspection.as_ref().map(|introspection| &introspection.endpoint));
        all.any(|url| Target::parse(url).is_some_and(|target| target.is_secure()))
    }
}

type Fault = (&'static str, &'static str);

fn check_name(name: &str) -> Result<(), Fault> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    let is_name = (1..=64).contains(&name.len()) && name.bytes().all(allowed);
    if is_name && name != GATEWAY {
        Ok(())
    } else {
        Err(("name", "must be 1 to 64 of a-z, 0-9, '-', '_', '.', and not `gateway`"))
    }
}

fn check_seconds(all: &[(&'static str, f64)]) -> Result<(), Fault> {
    let bad = all.iter().find(|(_, seconds)| !(0.001..=31_536_000.0).contains(seconds));
    bad.map_or(Ok(()), |(field, _)| Err((field, "must be from 0.001 to a year")))
}

fn check_url(field: &'static str, url: &str) -> Result<(), Fault> {
    match Target::parse(url) {
        Some(_) => Ok(()),
        None => Err((field, "must be an https address, or an http one on this machine, without credentials")),
    }
}

impl IssuerConfig {
    fn validate(&self) -> Result<(), Fault> {
        check_name(&self.name)?;
        check_url("issuer", &self.issuer)?;
        if self.audiences.is_empty() {
            return Err(("audiences", "is empty: a token for anybody else would be taken"));
        }
        if self.algorithms.is_empty() {
            return Err(("algorithms", "is empty"));
        }
        if !(0.0..=600.0).contains(&self.skew_seconds) {
            return Err(("skew_seconds", "must be from 0 to 600"));
        }
        check_seconds(&[
            ("timeout_seconds", self.timeout_seconds),
            ("refresh_seconds", self.refresh_seconds),
            ("refetch_seconds", self.refetch_seconds),
            ("stale_seconds", self.stale_seconds),
        ])
    }
}

impl IntrospectionConfig {
    fn validate(&self) -> Result<(), Fault> {
        check_name(&self.name)?;
        check_url("endpoint", &self.endpoint)?;
        if self.client_id.is_empty() {
            return Err(("client_id", "is missing"));
        }
        if self.client_secret_file.as_os_str().is_empty() {
            return Err(("client_secret_file", "is missing"));
        }
        if !(16..=1 << 20).contains(&self.max_entries) {
            return Err(("max_entries", "must be from 16 to 1,048,576"));
        }
        if !(1..=1024).contains(&self.max_calls) {
            return Err(("max_calls", "must be from 1 to 1024"));
        }
        check_seconds(&[
            ("timeout_seconds", self.timeout_seconds),
            ("positive_seconds", self.positive_seconds),
            ("negative_seconds", self.negative_seconds),
        ])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn good() -> IdentityConfig {
        let issuer = IssuerConfig {
            name: "keycloak".into(),
            issuer: "https://idp.example/realms/x".into(),
            audiences: vec!["mirai".into()],
            ..IssuerConfig::default()
        };
        let introspection = IntrospectionConfig {
            name: "zitadel".into(),
            endpoint: "http://127.0.0.1:1/introspect".into(),
            client_id: "mirai".into(),
            client_secret_file: "secret".into(),
            ..IntrospectionConfig::default()
        };
        IdentityConfig {
            applications_file: Some("applications.toml".into()),
            issuer: vec![issuer],
            introspection: Some(introspection),
            ..IdentityConfig::default()
        }
    }

    #[test]
    fn what_contradicts_itself_is_named() {
        good().validate().unwrap();
        assert!(good().needs_trust() && good().authenticates());
        assert!(!IdentityConfig::default().needs_trust() && !IdentityConfig::default().authenticates());
        type Change = fn(&mut IdentityConfig);
        let cases: [(Change, &str); 17] = [
            (|c| c.applications_file = None, "applications_file is missing"),
            (|c| c.gateway.user_header = "a b".into(), "gateway.user_header is no name"),
            (|c| c.issuer[0].name = "Key".into(), "issuer 1: name must be"),
            (|c| c.issuer[0].name = "gateway".into(), "issuer 1: name must be"),
            (|c| c.issuer[0].issuer = "http://idp.example".into(), "issuer 1: issuer must be an https"),
            (|c| c.issuer[0].audiences.clear(), "issuer 1: audiences is empty"),
            (|c| c.issuer[0].algorithms.clear(), "issuer 1: algorithms is empty"),
            (|c| c.issuer[0].skew_seconds = -1.0, "issuer 1: skew_seconds must be"),
            (|c| c.issuer[0].refetch_seconds = 0.0, "issuer 1: refetch_seconds must be"),
            (|c| c.issuer[0].timeout_seconds = f64::NAN, "issuer 1: timeout_seconds must be"),
            (
                |c| c.issuer.push(IssuerConfig { name: "b".into(), ..c.issuer[0].clone() }),
                "issuer comes twice",
            ),
            (|c| c.issuer[0].name = "zitadel".into(), "name comes twice"),
            (|c| c.issuer = vec![c.issuer[0].clone(); 17], "more than 16 times"),
            (|c| c.introspection.as_mut().unwrap().client_id.clear(), "introspection.client_id is missing"),
            (
                |c| c.introspection.as_mut().unwrap().client_secret_file.clear(),
                "introspection.client_secret_file",
            ),
            (|c| c.introspection.as_mut().unwrap().max_entries = 1, "introspection.max_entries must be"),
            (|c| c.introspection.as_mut().unwrap().max_calls = 0, "introspection.max_calls must be"),
        ];
        for (change, words) in cases {
            let mut config = good();
            change(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("identity"), "{error} / {words}");
        }
    }

    #[test]
    fn roles_give_scopes() {
        let claims = ClaimsConfig {
            roles: Some("roles".into()),
            read_usage_role: Some("usage".into()),
            ..ClaimsConfig::default()
        };
        let words = |claims: &ClaimsConfig, roles: &[&str]| {
            let scopes = claims.scopes(|role| roles.contains(&role));
            scopes.map(|scopes| scopes.words().collect::<Vec<_>>())
        };
        assert_eq!(words(&claims, &["usage", "admin"]), Some(vec!["infer", "read-usage"]));
        let strict =
            ClaimsConfig { infer_role: Some("user".into()), admin_role: Some("root".into()), ..claims };
        assert_eq!(words(&strict, &[]), Some(vec![]));
        assert_eq!(words(&strict, &["user", "root"]), Some(vec!["infer", "admin"]));
        assert_eq!(words(&ClaimsConfig::default(), &["root"]), None);
    }

    #[test]
    fn neither_none_nor_a_symmetric_signature_can_be_configured() {
        for bad in ["none", "HS256", "rs256", ""] {
            assert!(serde_json::from_value::<Algorithm>(bad.into()).is_err(), "{bad}");
        }
    }
}
