//! A server with applications, and everything that lets a caller in: keys, an identity provider, a gateway.

use std::path::Path;

use mirai_ledger::identity::{NewKey, Pepper};
use mirai_server::{ClaimsConfig, IntrospectionConfig, IssuerConfig};
use serde_json::{Value, json};

use crate::client::{Answer, request};
use crate::provider::{AUDIENCE, CLIENT, Provider, SECRET, now};
use crate::signer::Signer;
use crate::support::*;

/// A server with applications, and everything that lets a caller in.
pub struct World {
    pub server: TestServer,
    pub provider: Provider,
    pub signer: Signer,
    /// Plain, of application `chat`, of `batch` (may not infer), of `ops` (admin), of a gateway.
    pub keys: [String; 5],
    directory: tempfile::TempDir,
}

pub const USER_KEY: &str = "user-key-user-key-user-key-user-key-0123";
const PEPPER: &str = "pepper-0123456789-0123456789-0123456789";

fn stanza(name: &str, settings: &str, key: &NewKey) -> String {
    format!("[[application]]\nname = \"{name}\"\n{settings}{}", key.stanza)
}

/// The file, and the keys in it: of `chat`, `batch`, `ops` and the gateway.
fn applications() -> (String, [String; 4]) {
    let pepper = Pepper::new(1, PEPPER.as_bytes()).unwrap();
    let [chat, batch, ops, gateway] =
        ["chat-1", "batch-1", "ops-1", "gateway-1"].map(|id| NewKey::new(id, &pepper).unwrap());
    let client = |provider: &str, id: &str| {
        format!("[[application.client]]\nprovider = \"{provider}\"\nid = \"{id}\"\n")
    };
    let text = [
        stanza("chat", "weight = 3\n[application.quota]\ntokens_per_day = 1000\n", &chat),
        client("keycloak", "chat-app"),
        client("zitadel", "4711@chat"),
        client("gateway", "Consumer-1"),
        stanza("batch", "scopes = [\"read-usage\"]\n", &batch),
        client("keycloak", "batch-app"),
        stanza("ops", "scopes = [\"infer\", \"read-usage\", \"admin\"]\n", &ops),
        client("keycloak", "ops-app"),
        client("zitadel", "ops-app"),
        stanza("front", "gateway = true\n", &gateway),
    ];
    (text.concat(), [chat.key, batch.key, ops.key, gateway.key])
}

fn roles() -> ClaimsConfig {
    ClaimsConfig {
        roles: Some("resource_access.mirai-api.roles".into()),
        admin_role: Some("operator".into()),
        read_usage_role: Some("accountant".into()),
        ..ClaimsConfig::default()
    }
}

impl World {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Options)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let (text, [chat, batch, ops, gateway]) = applications();
        std::fs::write(at("applications.toml"), text).unwrap();
        std::fs::write(at("pepper"), format!("1 {PEPPER}\n")).unwrap();
        std::fs::write(at("users"), format!("1 {USER_KEY}\n")).unwrap();
        std::fs::write(at("secret"), format!("{SECRET}\n")).unwrap();
        let provider = Provider::start().await;
        let signer = Signer::new("ES256");
        provider.publish(&[&signer]);
        let mut options = Options::default();
        options.config.api_keys = vec!["plain-key".into()];
        options.config.timeouts.reload_seconds = 0.02;
        let identity = &mut options.config.identity;
        identity.applications_file = Some(at("applications.toml"));
        identity.pepper_file = Some(at("pepper"));
        identity.user_key_file = Some(at("users"));
        identity.admin_listen = Some("127.0.0.1:0".parse().unwrap());
        identity.gateway.user_header = "X-End-User".into();
        identity.issuer = vec![IssuerConfig {
            name: "keycloak".into(),
            issuer: provider.issuer(),
            audiences: vec![AUDIENCE.into()],
            algorithms: serde_json::from_value(json!(["ES256", "RS256"])).unwrap(),
            claims: roles(),
            refetch_seconds: 0.05,
            ..IssuerConfig::default()
        }];
        identity.introspection = Some(IntrospectionConfig {
            name: "zitadel".into(),
            endpoint: format!("http://{}/introspect", provider.address),
            client_id: CLIENT.into(),
            client_secret_file: at("secret"),
            audiences: vec![AUDIENCE.into()],
            ..IntrospectionConfig::default()
        });
        change(&mut options);
        let server = TestServer::start(options).await;
        Self { server, provider, signer, keys: ["plain-key".into(), chat, batch, ops, gateway], directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A signed token with some claims changed.
    pub fn signed(&self, azp: &str, changes: &Value) -> String {
        let mut claims = self.provider.claims(azp);
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        self.signer.token("k0", &claims)
    }

    /// An opaque token that introspection knows.
    pub fn opaque(&self, token: &str, answer: Value) -> String {
        self.provider.change(|behaviour| behaviour.tokens.insert(token.to_owned(), answer));
        token.to_owned()
    }

    /// What introspection says of a good token.
    pub fn active(&self, client: &str) -> Value {
        json!({"active": true, "client_id": client, "aud": [AUDIENCE], "exp": now() + 600, "sub": "user-2"})
    }

    pub async fn models(&self, token: &str) -> Answer {
        self.get(token, &[]).await
    }

    pub async fn get(&self, token: &str, headers: &[(&str, &str)]) -> Answer {
        let bearer = format!("Bearer {token}");
        let headers: Vec<_> =
            [("Authorization", bearer.as_str())].into_iter().chain(headers.iter().copied()).collect();
        request(self.server.address, "GET", "/v1/models", &headers, None).await
    }

    pub async fn post(&self, token: &str, headers: &[(&str, &str)], more: &Value) -> Answer {
        let bearer = format!("Bearer {token}");
        let headers: Vec<_> =
            [("Authorization", bearer.as_str())].into_iter().chain(headers.iter().copied()).collect();
        let body = chat(&"some words again and ".repeat(12), more).to_string();
        request(self.server.address, "POST", "/v1/chat/completions", &headers, Some(body.as_bytes())).await
    }
}
