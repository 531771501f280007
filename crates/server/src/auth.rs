//! Who may call.
//!
//! Owns the digests of the accepted keys. Every key is compared, each in constant time, so that the time of an
//! answer tells nothing about any of them.

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use mirai_engine::TenantId;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::error::ApiError;

/// The accepted keys, as digests.
#[derive(Debug)]
pub(crate) struct Auth {
    digests: Vec<[u8; 32]>,
}

impl Auth {
    pub(crate) fn new(keys: &[String]) -> Self {
        Self { digests: keys.iter().map(|key| digest(key.as_bytes())).collect() }
    }

    /// Who calls: 0 if nobody has to say, else the key's number from 1.
    ///
    /// # Errors
    /// 401 without exactly one valid `Authorization: Bearer <key>`.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<TenantId, ApiError> {
        if self.digests.is_empty() {
            return Ok(TenantId(0));
        }
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(ApiError::unauthorized("exactly one `Authorization: Bearer <key>` header is needed"));
        };
        let wrong = || ApiError::unauthorized("the API key is not valid");
        let key = bearer(value.as_bytes()).ok_or_else(wrong)?;
        let presented = digest(key);
        let mut found = 0u64;
        for (number, accepted) in (1u64..).zip(&self.digests) {
            let equal: Choice = accepted.ct_eq(&presented);
            found.conditional_assign(&number, equal);
        }
        if found == 0 { Err(wrong()) } else { Ok(TenantId(found)) }
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    let plausible = (1..=4096).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic);
    (scheme.eq_ignore_ascii_case(b"bearer ") && plausible).then_some(key)
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Separates prefix caches: of different callers always, of one caller's salts if it sends any.
pub(crate) fn cache_salt(tenant: TenantId, salt: Option<&str>) -> u64 {
    if tenant.0 == 0 && salt.is_none() {
        return 0;
    }
    let mut hash = Sha256::new();
    hash.update(tenant.0.to_le_bytes());
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

    fn headers(values: &[&[u8]]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for value in values {
            map.append(AUTHORIZATION, hyper::header::HeaderValue::from_bytes(value).unwrap());
        }
        map
    }

    #[test]
    fn each_key_is_its_own_tenant() {
        let auth = Auth::new(&["alpha".into(), "beta".into()]);
        assert_eq!(auth.check(&headers(&[b"Bearer alpha"])), Ok(TenantId(1)));
        assert_eq!(auth.check(&headers(&[b"bearer beta"])), Ok(TenantId(2)));
        assert_eq!(Auth::new(&[]).check(&headers(&[])), Ok(TenantId(0)));
    }

    #[test]
    fn anything_else_is_refused() {
        let auth = Auth::new(&["alpha".into()]);
        let long = [b"Bearer ".as_slice(), &[b'a'; 8192]].concat();
        for bad in [
            &b"Bearer"[..],
            b"Bearer ",
            b"Bearer  alpha",
            b"alpha",
            b"Basic alpha",
            b"Bearer alph",
            b"Bearer alphaa",
            b"Bearer ' OR 1=1",
            b"Bearer ALPHA",
            b"Bearer alpha\t",
            b"\xff",
            &long,
        ] {
            assert_eq!(auth.check(&headers(&[bad])).unwrap_err().status, 401, "{bad:?}");
        }
        assert_eq!(auth.check(&headers(&[])).unwrap_err().status, 401);
        assert_eq!(auth.check(&headers(&[b"Bearer alpha", b"Bearer alpha"])).unwrap_err().status, 401);
    }

    #[test]
    fn salts_separate() {
        let all = [
            cache_salt(TenantId(0), None),
            cache_salt(TenantId(0), Some("")),
            cache_salt(TenantId(0), Some("a")),
            cache_salt(TenantId(1), None),
            cache_salt(TenantId(1), Some("")),
            cache_salt(TenantId(1), Some("a")),
            cache_salt(TenantId(2), Some("a")),
        ];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(all[0], 0);
    }
}
