//! Who calls, once that is known.
//!
//! Owns what the rest of the server may ask about a caller: which application pays, what it may do, with whom it
//! shares prefixes. Never holds a key or a token, and never prints a user.

use std::sync::Arc;

use mirai_engine::TenantId;
use mirai_ledger::identity::{Application, Quota};
use mirai_ledger::{Scope, Scopes};
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// A user as a token, a header or a body names it: personal, so it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct User(Box<str>);

/// Longest name of a user, bytes.
const MAX_USER: usize = 256;

impl User {
    /// `None` if this is no name: empty, too long, or with control characters.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let fits = (1..=MAX_USER).contains(&name.len()) && !name.chars().any(char::is_control);
        fits.then(|| Self(name.into()))
    }

    /// To make its pseudonym of, and nothing else.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("User(..)")
    }
}

/// An application of the file, with the number that the scheduler knows it by.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// Stable for the name while the process lives, and never given to another.
    pub(crate) tenant: TenantId,
    pub(crate) name: Arc<str>,
    pub(crate) application: Arc<Application>,
}

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Of the application, whatever its key; 0 where nobody has to say.
    pub(crate) tenant: TenantId,
    /// Its share beside others.
    pub(crate) weight: u32,
    /// Who pays; empty where nobody has to say.
    pub(crate) application: Arc<str>,
    /// Which key, or which identity provider.
    pub(crate) key_id: Arc<str>,
    /// Version of the secret under which the key is hashed; 0 for what is no such key.
    pub(crate) key_version: u32,
    /// What it may do.
    pub(crate) scopes: Scopes,
    /// What its application may use.
    pub(crate) quota: Quota,
    /// On whose behalf, if it was said.
    pub(crate) user: Option<User>,
    /// With whom it shares prefixes beside itself.
    pub(crate) cache_group: Option<Arc<str>>,
    /// A gateway that has not said yet for which application it speaks: the body may.
    pub(crate) may_name: bool,
}

impl Caller {
    /// Where nobody has to say who calls.
    pub(crate) fn anybody() -> Self {
        Self {
            tenant: TenantId(0),
            weight: 1,
            application: Arc::from(""),
            key_id: Arc::from(""),
            key_version: 0,
            scopes: Scopes::INFER.with(Scope::ReadUsage),
            quota: Quota::default(),
            user: None,
            cache_group: None,
            may_name: false,
        }
    }

    /// A caller of an application, with what this credential may do.
    pub(crate) fn of(known: &Known, key_id: Arc<str>, key_version: u32, scopes: Scopes) -> Self {
        let application = &known.application;
        Self {
            tenant: known.tenant,
            weight: application.weight,
            application: known.name.clone(),
            key_id,
            key_version,
            scopes,
            quota: application.quota,
            user: None,
            cache_group: application.cache_group.as_deref().map(Arc::from),
            may_name: false,
        }
    }

    /// The same key, speaking for another application: what both may do.
    pub(crate) fn for_application(&self, known: &Known) -> Self {
        let scopes = self.scopes.and(known.application.scopes);
        Self { user: self.user.clone(), ..Self::of(known, self.key_id.clone(), self.key_version, scopes) }
    }

    /// # Errors
    /// 403 without this scope.
    pub(crate) fn needs(&self, scope: Option<Scope>) -> Result<(), ApiError> {
        let Some(scope) = scope.filter(|scope| !self.scopes.has(*scope)) else { return Ok(()) };
        let word = Scope::ALL.into_iter().find(|(other, _)| *other == scope).map_or("", |(_, word)| word);
        Err(ApiError::insufficient_scope(format!("this credential lacks the scope `{word}`")))
    }
}

/// Separates prefix caches: of different applications unless both are in one group, and of one caller's salts if it
/// sends any.
pub(crate) fn cache_salt(caller: &Caller, salt: Option<&str>) -> u64 {
    if caller.tenant.0 == 0 && salt.is_none() {
        return 0;
    }
    let mut hash = Sha256::new();
    match &caller.cache_group {
        None => {
            hash.update([0]);
            hash.update(caller.tenant.0.to_le_bytes());
        }
        Some(group) => {
            hash.update([1]);
            hash.update((group.len() as u64).to_le_bytes());
            hash.update(group.as_bytes());
        }
    }
    hash.update([u8::from(salt.is_some())]);
    hash.update(salt.unwrap_or_default());
    let digest: [u8; 32] = hash.finalize().into();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    // 0 means no salt at all.
    u64::from_le_bytes(first).max(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn salts_separate_and_groups_share() {
        let caller = |tenant: u64, group: Option<&str>| Caller {
            tenant: TenantId(tenant),
            cache_group: group.map(Arc::from),
            ..Caller::anybody()
        };
        let all = [
            cache_salt(&caller(0, None), None),
            cache_salt(&caller(0, None), Some("")),
            cache_salt(&caller(0, None), Some("a")),
            cache_salt(&caller(1, None), None),
            cache_salt(&caller(1, None), Some("")),
            cache_salt(&caller(1, None), Some("a")),
            cache_salt(&caller(2, None), Some("a")),
            cache_salt(&caller(1, Some("g")), None),
            cache_salt(&caller(1, Some("g")), Some("a")),
            cache_salt(&caller(1, Some("h")), None),
        ];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(all[0], 0);
        assert_eq!(cache_salt(&caller(7, Some("g")), None), all[7]);
    }

    #[test]
    fn users_are_bounded_and_never_printed() {
        let user = User::new("zoé").unwrap();
        assert_eq!((user.name(), format!("{user:?}").as_str()), ("zoé", "User(..)"));
        for bad in ["", "a\nb", "\u{7f}", &"x".repeat(257)] {
            assert_eq!(User::new(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_missing_scope_is_named() {
        let error = Caller::anybody().needs(Some(Scope::Admin)).unwrap_err();
        assert!(error.status == 403 && error.message.contains("`admin`"), "{error}");
        Caller::anybody().needs(Some(Scope::Infer)).unwrap();
        Caller::anybody().needs(None).unwrap();
    }
}
