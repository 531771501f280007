//! Applications, their keys, and pseudonyms of users.
//!
//! Owns the file of applications and what a presented key means. The file holds keyed hashes only: whoever
//! reads it learns no key, and without the pepper cannot even test a guess. Does no I/O; who reads the file
//! parses it again when it changes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::scope::Scopes;
use crate::secret::{Secret, ShortSecret};
use crate::value::{Hash, Hex};

/// Most bytes of the file.
pub const MAX_FILE: usize = 4 << 20;
/// Most applications in it.
pub const MAX_APPLICATIONS: usize = 10_000;
/// Most keys of one application: two while one replaces the other, a few more for teams.
pub const MAX_KEYS: usize = 16;
/// Most names of one application at identity providers and gateways.
pub const MAX_CLIENTS: usize = 64;
/// Longest key that is looked at, bytes.
pub const MAX_KEY: usize = 512;
/// Longest name of an application at an identity provider, bytes.
pub const MAX_CLIENT_ID: usize = 256;
/// What the holders of keys that are in no such file are accounted to: no application may be called so.
pub const DEFAULT_APPLICATION: &str = "default";

const KEY_PURPOSE: &[u8] = b"mirai-ledger api key 1\0";
const USER_PURPOSE: &[u8] = b"mirai-ledger pseudonym 1\0";

/// The secret under which keys are hashed: the same on all replicas.
#[derive(Clone)]
pub struct Pepper {
    /// Which secret this is.
    pub version: u32,
    secret: Secret,
}

/// The secret under which pseudonyms are made: the same on all replicas, and another than the pepper.
#[derive(Clone)]
pub struct UserKey {
    /// Which secret this is.
    pub version: u32,
    secret: Secret,
}

macro_rules! hidden {
    ($($name:ident)*) => {$(
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).field("version", &self.version).finish_non_exhaustive()
            }
        }

        impl $name {
            /// From a secret of at least 32 bytes.
            ///
            /// # Errors
            /// It is shorter.
            pub fn new(version: u32, secret: &[u8]) -> Result<Self, ShortSecret> {
                Ok(Self { version, secret: Secret::new(secret)? })
            }
        }
    )*};
}
hidden!(Pepper UserKey);

impl Pepper {
    /// What the file holds of a key.
    pub fn hash(&self, key: &str) -> Hash {
        self.secret.hash(KEY_PURPOSE, &[key.as_bytes()])
    }
}

impl UserKey {
    /// The pseudonym of an application's user: the same user of two applications has two.
    pub fn pseudonym(&self, application: &str, user: &str) -> String {
        self.secret.hash(USER_PURPOSE, &[application.as_bytes(), user.as_bytes()]).to_string()
    }
}

/// What an application may use. `None` is without bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// Requests in a minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens, of prompts and answers, in a minute.
    pub tokens_per_minute: Option<u64>,
    /// The same in a day.
    pub tokens_per_day: Option<u64>,
    /// The same in a month.
    pub tokens_per_month: Option<u64>,
    /// Requests at once.
    pub concurrent_requests: Option<u64>,
    /// Tokens of one answer.
    pub max_output_tokens: Option<u64>,
}

/// A key as the file has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyStanza {
    id: String,
    pepper: u32,
    hash: Hex<32>,
    /// Instead of the application's.
    #[serde(default)]
    scopes: Option<Scopes>,
}

/// The application's name somewhere else.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientStanza {
    /// Which identity provider, by its name in the configuration, or `gateway`.
    provider: String,
    /// What it calls the application.
    id: String,
}

/// One application.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Application {
    /// Its name, for accounting: 1 to 64 of `a-z`, `0-9`, `-`, `_`, `.`.
    pub name: String,
    /// Its share beside others, 1 to 1000.
    #[serde(default = "one")]
    pub weight: u32,
    /// What it may use.
    #[serde(default)]
    pub quota: Quota,
    /// What its callers may do, whatever a token says beyond it.
    #[serde(default = "infer")]
    pub scopes: Scopes,
    /// Whether its keys may speak for other applications.
    #[serde(default)]
    pub gateway: bool,
    /// Applications of one group share the prefixes of their prompts; without one, an application shares with
    /// nobody.
    #[serde(default)]
    pub cache_group: Option<String>,
    #[serde(default, rename = "key")]
    keys: Vec<KeyStanza>,
    #[serde(default, rename = "client")]
    clients: Vec<ClientStanza>,
}

impl Application {
    /// The ids of its keys, in the order of the file.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| key.id.as_str())
    }

    /// What it is called at identity providers and gateways: (provider, name there).
    pub fn clients(&self) -> impl Iterator<Item = (&str, &str)> {
        self.clients.iter().map(|client| (client.provider.as_str(), client.id.as_str()))
    }
}

fn infer() -> Scopes {
    Scopes::INFER
}

fn one() -> u32 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    application: Vec<Application>,
}

/// The file cannot be used. Never quotes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplicationsError {
    /// It is too large.
    #[error("{0} bytes, at most {MAX_FILE} are read")]
    Large(usize),
    /// It is not TOML of the right shape.
    #[error("line {line}: {message}")]
    Shape {
        /// Where.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Too many applications.
    #[error("{0} applications, at most {MAX_APPLICATIONS}")]
    Applications(usize),
    /// Too many keys.
    #[error("application number {number}: {keys} keys, at most {MAX_KEYS}")]
    Keys {
        /// Which application, from 1.
        number: usize,
        /// How many.
        keys: usize,
    },
    /// Too many names elsewhere.
    #[error("application number {number}: {clients} clients, at most {MAX_CLIENTS}")]
    Clients {
        /// Which application, from 1.
        number: usize,
        /// How many.
        clients: usize,
    },
    /// A name elsewhere that no token could have.
    #[error(
        "application number {number}: a client's id must be 1 to {MAX_CLIENT_ID} printable ASCII characters without \
         spaces"
    )]
    ClientId {
        /// Which application, from 1.
        number: usize,
    },
    /// The name of what has no stanza.
    #[error("application number {number}: the name is kept for keys that are in no such file")]
    Reserved {
        /// Which application, from 1.
        number: usize,
    },
    /// A name breaks the rules.
    #[error("application number {number}: {what} must be 1 to 64 of a-z, 0-9, '-', '_', '.'")]
    Name {
        /// Which application, from 1.
        number: usize,
        /// The name or a key's id.
        what: &'static str,
    },
    /// A weight is out of range.
    #[error("application number {number}: weight {weight}, it must be 1 to 1000")]
    Weight {
        /// Which application, from 1.
        number: usize,
        /// Its weight.
        weight: u32,
    },
    /// Something that must be unique comes twice.
    #[error("application number {number}: the {what} was there before")]
    Twice {
        /// The second one, from 1.
        number: usize,
        /// Name, key id or hash.
        what: &'static str,
    },
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The application.
    pub application: Arc<Application>,
    /// Which of its keys.
    pub key_id: Arc<str>,
    /// The version of the pepper under which the key is hashed.
    pub key_version: u32,
    /// What the key may do.
    pub scopes: Scopes,
}

/// All applications.
#[derive(Clone, Debug, Default)]
pub struct Applications {
    all: Vec<Arc<Application>>,
    callers: HashMap<(u32, Hash), Caller>,
    names: HashMap<String, Arc<Application>>,
    /// Provider -> name there -> application.
    clients: HashMap<String, HashMap<String, Arc<Application>>>,
}

fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

/// What can be said of one stanza alone.
fn check(number: usize, application: &Application) -> Result<(), ApplicationsError> {
    let name = |text: &str, what| {
        if is_name(text) { Ok(()) } else { Err(ApplicationsError::Name { number, what }) }
    };
    name(&application.name, "the name")?;
    if application.name == DEFAULT_APPLICATION {
        return Err(ApplicationsError::Reserved { number });
    }
    if !(1..=1000).contains(&application.weight) {
        return Err(ApplicationsError::Weight { number, weight: application.weight });
    }
    if application.keys.len() > MAX_KEYS {
        return Err(ApplicationsError::Keys { number, keys: application.keys.len() });
    }
    if application.clients.len() > MAX_CLIENTS {
        return Err(ApplicationsError::Clients { number, clients: application.clients.len() });
    }
    application.keys.iter().try_for_each(|key| name(&key.id, "a key's id"))?;
    application.cache_group.iter().try_for_each(|group| name(group, "the cache group"))?;
    for client in &application.clients {
        name(&client.provider, "a client's provider")?;
        if !is_client_id(&client.id) {
            return Err(ApplicationsError::ClientId { number });
        }
    }
    Ok(())
}

/// Whether this could be what an identity provider or a gateway calls an application.
pub fn is_client_id(id: &str) -> bool {
    (1..=MAX_CLIENT_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

impl Applications {
    /// Reads a file.
    ///
    /// # Errors
    /// The first thing that is wrong; nothing of the file is used then.
    pub fn parse(text: &str) -> Result<Self, ApplicationsError> {
        if text.len() > MAX_FILE {
            return Err(ApplicationsError::Large(text.len()));
        }
        let file: File = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = 1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
            // Only the kind of fault: the message may quote what somebody pasted there.
            let message =
                error.message().split(['`', '"', '\'']).next().unwrap_or_default().trim().to_owned();
            ApplicationsError::Shape { line, message }
        })?;
        if file.application.len() > MAX_APPLICATIONS {
            return Err(ApplicationsError::Applications(file.application.len()));
        }
        let mut ids = HashSet::new();
        let mut out = Self::default();
        for (number, application) in (1..).zip(file.application) {
            out.add(number, Arc::new(application), &mut ids)?;
        }
        Ok(out)
    }

    fn add(
        &mut self,
        number: usize,
        application: Arc<Application>,
        ids: &mut HashSet<String>,
    ) -> Result<(), ApplicationsError> {
        check(number, &application)?;
        if self.names.insert(application.name.clone(), application.clone()).is_some() {
            return Err(ApplicationsError::Twice { number, what: "name" });
        }
        for key in &application.keys {
            if !ids.insert(key.id.clone()) {
                return Err(ApplicationsError::Twice { number, what: "key id" });
            }
            let caller = Caller {
                application: application.clone(),
                key_id: key.id.as_str().into(),
                key_version: key.pepper,
                scopes: key.scopes.unwrap_or(application.scopes),
            };
            if self.callers.insert((key.pepper, key.hash), caller).is_some() {
                return Err(ApplicationsError::Twice { number, what: "key's hash" });
            }
        }
        for client in &application.clients {
            let there = self.clients.entry(client.provider.clone()).or_default();
            if there.insert(client.id.clone(), application.clone()).is_some() {
                return Err(ApplicationsError::Twice { number, what: "client" });
            }
        }
        self.all.push(application);
        Ok(())
    }

    /// Every application, in the order of the file.
    pub fn all(&self) -> &[Arc<Application>] {
        &self.all
    }

    /// The application of this name.
    pub fn named(&self, name: &str) -> Option<&Arc<Application>> {
        self.names.get(name)
    }

    /// The application that `provider` calls `id`.
    pub fn client(&self, provider: &str, id: &str) -> Option<&Arc<Application>> {
        self.clients.get(provider)?.get(id)
    }

    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.callers.len()
    }

    /// Whose key this is. The work is one hash for each pepper, whatever the key: what is compared afterwards
    /// is the hash, which a caller cannot steer without the pepper.
    pub fn caller(&self, key: &str, peppers: &[Pepper]) -> Option<&Caller> {
        if key.len() > MAX_KEY {
            return None;
        }
        peppers
            .iter()
            .map(|pepper| self.callers.get(&(pepper.version, pepper.hash(key))))
            .fold(None, Option::or)
    }
}

/// A key that was just made: to be shown once.
pub struct NewKey {
    /// The key itself, for the application's team.
    pub key: String,
    /// The stanza to commit under the application.
    pub stanza: String,
}

impl std::fmt::Debug for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewKey").field("stanza", &self.stanza).finish_non_exhaustive()
    }
}

impl NewKey {
    /// Makes a key of 256 random bits. `None` if the id breaks the rules.
    pub fn new(id: &str, pepper: &Pepper) -> Option<Self> {
        if !is_name(id) {
            return None;
        }
        let key = format!("mirai-{}", Hex(rand::random::<[u8; 32]>()));
        let hash = pepper.hash(&key);
        let version = pepper.version;
        let stanza = format!("[[application.key]]\nid = \"{id}\"\npepper = {version}\nhash = \"{hash}\"\n");
        Some(Self { key, stanza })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
