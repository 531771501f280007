//! Opaque tokens: looked up at the identity provider (RFC 7662), and remembered for a while.
//!
//! Owns the memory of answers and the calls. A token is never kept, only its digest. Lookups of one token at the same
//! time are one call; bad tokens cannot push good ones out; when nobody answers, nobody gets in.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderValue;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::Instant;

use super::applications::{IdentityFileError, read_secret};
use super::claims::{self, Identity, unix_now};
use super::config::IntrospectionConfig;
use super::jwt::TokenError;
use super::refusal::Refusal;
use super::seldom::Seldom;
use crate::config_error::seconds;
use crate::http::client::{Call, CallError, Client, Target, form_encode};
use crate::metrics::identity::{IdentityMetrics, Lookup};

/// Most bytes of an answer.
const MAX_ANSWER: usize = 64 << 10;

type Key = [u8; 32];
type Outcome = Result<Identity, Refusal>;

/// Answers until their time has passed. Two generations: when the younger is full, the older goes.
#[derive(Debug)]
struct Memory<V> {
    young: HashMap<Key, (Instant, V)>,
    old: HashMap<Key, (Instant, V)>,
    /// Of one generation.
    limit: usize,
}

impl<V: Clone> Memory<V> {
    fn new(entries: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), limit: (entries / 2).max(1) }
    }

    fn get(&self, key: &Key, now: Instant) -> Option<V> {
        let (until, value) = self.young.get(key).or_else(|| self.old.get(key))?;
        (now < *until).then(|| value.clone())
    }

    fn put(&mut self, key: Key, until: Instant, value: V) {
        if self.young.len() >= self.limit {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, (until, value));
    }
}

#[derive(Debug)]
struct Tables {
    good: Memory<Identity>,
    bad: Memory<TokenError>,
    /// Lookups under way.
    calls: HashMap<Key, watch::Receiver<Option<Outcome>>>,
}

/// Where opaque tokens are looked up.
#[derive(Debug)]
pub(super) struct Introspection {
    config: IntrospectionConfig,
    target: Target,
    client: Client,
    metrics: Arc<IdentityMetrics>,
    authorization: ArcSwap<HeaderValue>,
    tables: Mutex<Tables>,
    warned: Seldom,
}

/// Removes a lookup when it has ended, however that was.
struct UnderWay {
    owner: Arc<Introspection>,
    key: Key,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.owner.tables().calls.remove(&self.key);
    }
}

impl Introspection {
    /// # Errors
    /// The file with the secret cannot be used.
    pub(super) fn load(
        config: IntrospectionConfig,
        client: Client,
        metrics: Arc<IdentityMetrics>,
    ) -> Result<Self, IdentityFileError> {
        let authorization = authorization(&config)?;
        let target = Target::parse(&config.endpoint)
            .ok_or_else(|| IdentityFileError::Secret(config.client_secret_file.clone()))?;
        let tables = Tables {
            good: Memory::new(config.max_entries),
            bad: Memory::new(config.max_entries),
            calls: HashMap::new(),
        };
        Ok(Self {
            target,
            client,
            metrics,
            authorization: ArcSwap::from_pointee(authorization),
            tables: Mutex::new(tables),
            warned: Seldom::default(),
            config,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    /// What would be sent with the secret as the file has it now.
    ///
    /// # Errors
    /// The file cannot be used.
    pub(super) fn read(&self) -> Result<HeaderValue, IdentityFileError> {
        authorization(&self.config)
    }

    /// Puts what was read in force.
    pub(super) fn take(&self, authorization: HeaderValue) {
        self.authorization.store(Arc::new(authorization));
    }

    fn tables(&self) -> std::sync::MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who is meant by a token.
    ///
    /// # Errors
    /// The token is not good, or that cannot be known now.
    pub(super) async fn lookup(self: &Arc<Self>, token: &str) -> Outcome {
        let key: Key = Sha256::digest(token).into();
        let mut answer = {
            let mut tables = self.tables();
            let now = Instant::now();
            if let Some(identity) = tables.good.get(&key, now) {
                return Ok(identity);
            }
            if let Some(error) = tables.bad.get(&key, now) {
                return Err(Refusal::Token(error));
            }
            if let Some(answer) = tables.calls.get(&key) {
                answer.clone()
            } else if tables.calls.len() >= self.config.max_calls {
                return Err(Refusal::Unavailable);
            } else {
                self.start(key, token, &mut tables)
            }
        };
        // A task that died has not let anybody in.
        let outcome = answer.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(Err(Refusal::Unavailable))
    }

    /// Asks in a task of its own: a client that leaves must not take the call with it that others wait for.
    fn start(
        self: &Arc<Self>,
        key: Key,
        token: &str,
        tables: &mut Tables,
    ) -> watch::Receiver<Option<Outcome>> {
        let (sender, answer) = watch::channel(None);
        tables.calls.insert(key, answer.clone());
        let under_way = UnderWay { owner: self.clone(), key };
        let mut body = String::from("token_type_hint=access_token&token=");
        form_encode(token, &mut body);
        tokio::spawn(async move {
            let outcome = under_way.owner.ask(key, body).await;
            // Remembered, or refused, before the next caller may ask again.
            drop(under_way);
            sender.send_replace(Some(outcome));
        });
        answer
    }

    async fn ask(&self, key: Key, body: String) -> Outcome {
        let authorization = HeaderValue::clone(&self.authorization.load());
        let answer = self.client.call(&self.target, Call::Form { body, authorization }, MAX_ANSWER).await;
        let parsed = answer.and_then(|bytes| {
            serde_json::from_slice::<Map<String, Value>>(&bytes).map_err(|_| CallError::Content)
        });
        let parsed = parsed.and_then(|map| match map.get("active") {
            Some(Value::Bool(active)) => Ok((*active, map)),
            _ => Err(CallError::Content),
        });
        self.metrics.looked_up(Lookup::Token, parsed.is_ok());
        let (active, claims) = parsed.map_err(|error| {
            if self.warned.is_due() {
                tracing::warn!(provider = self.config.name, %error, "a token could not be looked up; its caller is refused");
            }
            Refusal::Unavailable
        })?;
        let now = Instant::now();
        match self.judge(active, &claims) {
            Ok((identity, lives)) => {
                let until = now + seconds(self.config.positive_seconds.min(lives));
                self.tables().good.put(key, until, identity.clone());
                Ok(identity)
            }
            Err(error) => {
                let until = now + seconds(self.config.negative_seconds);
                self.tables().bad.put(key, until, error);
                Err(Refusal::Token(error))
            }
        }
    }

    /// Who is meant, and for how many seconds that holds.
    fn judge(&self, active: bool, claims: &Map<String, Value>) -> Result<(Identity, f64), TokenError> {
        if !active {
            return Err(TokenError::Expired);
        }
        let time = |name| claims::time(claims, name).map_err(|()| TokenError::Malformed);
        let now = unix_now();
        let lives = time("exp")?.map_or(f64::INFINITY, |exp| exp - now);
        if lives <= 0.0 {
            return Err(TokenError::Expired);
        }
        if time("nbf")?.is_some_and(|nbf| now < nbf) {
            return Err(TokenError::Early);
        }
        if let Some(issuer) = &self.config.issuer
            && claims.get("iss").and_then(Value::as_str) != Some(issuer)
        {
            return Err(TokenError::Issuer);
        }
        if !self.config.audiences.is_empty() && !claims::is_for(claims, &self.config.audiences) {
            return Err(TokenError::Audience);
        }
        let identity = claims::identity(claims, &self.config.claims, "client_id");
        Ok((identity.ok_or(TokenError::Application)?, lives))
    }
}

/// RFC 6749, 2.3.1: both parts are escaped as in a form.
fn authorization(config: &IntrospectionConfig) -> Result<HeaderValue, IdentityFileError> {
    let path: &Path = &config.client_secret_file;
    let secret = read_secret(path)?;
    let mut pair = String::new();
    form_encode(&config.client_id, &mut pair);
    pair.push(':');
    form_encode(&secret, &mut pair);
    let mut value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(pair)))
        .map_err(|_| IdentityFileError::Secret(path.to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn memory_forgets_in_time_and_is_bounded() {
        let mut memory = Memory::new(8);
        let now = Instant::now();
        let key = |i: u8| [i; 32];
        memory.put(key(0), now + Duration::from_secs(5), 'a');
        assert_eq!(memory.get(&key(0), now), Some('a'));
        assert_eq!(memory.get(&key(0), now + Duration::from_secs(5)), None);
        for i in 1..=100 {
            memory.put(key(i), now + Duration::from_secs(5), 'b');
            assert!(memory.young.len() + memory.old.len() <= 8);
            assert_eq!(memory.get(&key(i), now), Some('b'));
        }
        assert_eq!(memory.get(&key(0), now), None);
    }

    #[test]
    fn the_secret_is_escaped_and_hidden() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        std::fs::write(&path, "p:w%\n").unwrap();
        let config = IntrospectionConfig {
            client_id: "a b".into(),
            client_secret_file: path.clone(),
            ..IntrospectionConfig::default()
        };
        let value = authorization(&config).unwrap();
        let pair = STANDARD.decode(value.to_str().unwrap().strip_prefix("Basic ").unwrap()).unwrap();
        assert_eq!(pair, b"a%20b:p%3Aw%25");
        assert_eq!(format!("{value:?}"), "Sensitive");
        std::fs::write(&path, "").unwrap();
        assert!(authorization(&config).is_err());
    }
}
