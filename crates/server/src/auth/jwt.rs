//! Signed tokens (JWS in compact form, RFC 7515, 7518, 8037) and the keys that verify them (JWK, RFC 7517).
//!
//! Owns the shape, the signature and the times of a token. The algorithm comes from the configuration and the key's
//! type, never from the token alone: there is no `none`, and nothing symmetric that a public key could be used for.
//! Knows no network and no clock.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::claims::{is_for, time};
use super::config::Algorithm;

/// Longest token that is looked at, bytes.
pub(super) const MAX_TOKEN: usize = 16 << 10;
/// Most keys of a set.
const MAX_KEYS: usize = 64;
/// Longest name of a key, bytes.
const MAX_KID: usize = 256;

/// Why a token is not believed. Never repeats any of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TokenError {
    #[error("it is malformed")]
    Malformed,
    #[error("its signature's algorithm is not accepted")]
    Algorithm,
    #[error("its key is not known")]
    UnknownKey,
    #[error("its signature is wrong")]
    Signature,
    #[error("it is not an access token")]
    Kind,
    #[error("its issuer is another")]
    Issuer,
    #[error("it is for somebody else")]
    Audience,
    #[error("it has expired, or never does")]
    Expired,
    #[error("it is not valid yet")]
    Early,
    #[error("it names no application")]
    Application,
}

#[derive(Debug, Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    typ: Option<String>,
    /// Extensions that must be understood: none is.
    #[serde(default)]
    crit: Option<Value>,
}

/// A token taken apart, of which nothing is believed yet.
pub(super) struct Compact<'a> {
    header: Header,
    claims: Map<String, Value>,
    /// Header and claims as they were signed.
    signed: &'a [u8],
    signature: Vec<u8>,
}

fn decode(part: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(part).ok()
}

impl<'a> Compact<'a> {
    /// `None` if this is no such token, whatever else it may be.
    pub(super) fn parse(token: &'a str) -> Option<Self> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: Header = serde_json::from_slice(&decode(header)?).ok()?;
        let claims = serde_json::from_slice(&decode(claims)?).ok()?;
        Some(Self { header, claims, signed: signed.as_bytes(), signature: decode(signature)? })
    }

    /// Who says to have issued it.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims.get("iss")?.as_str()
    }

    /// The name of its key.
    pub(super) fn kid(&self) -> Option<&str> {
        self.header.kid.as_deref()
    }

    /// What can be refused without a key.
    ///
    /// # Errors
    /// The algorithm is not one of these, or it is a token of another kind.
    pub(super) fn algorithm(&self, accepted: &[Algorithm]) -> Result<Algorithm, TokenError> {
        let found = [
            ("RS256", Algorithm::RS256),
            ("PS256", Algorithm::PS256),
            ("ES256", Algorithm::ES256),
            ("EdDSA", Algorithm::EdDSA),
        ];
        let found =
            found.into_iter().find(|(name, _)| *name == self.header.alg).map(|(_, algorithm)| algorithm);
        let algorithm =
            found.filter(|algorithm| accepted.contains(algorithm)).ok_or(TokenError::Algorithm)?;
        let kinds = ["jwt", "at+jwt", "application/at+jwt"];
        let typ = self.header.typ.as_deref();
        let is_access = typ.is_none_or(|typ| kinds.iter().any(|kind| typ.eq_ignore_ascii_case(kind)));
        // Keycloak says in a claim what a token is for.
        let is_other =
            matches!(self.claims.get("typ").and_then(Value::as_str), Some("ID" | "Refresh" | "Logout"));
        if !is_access || is_other {
            return Err(TokenError::Kind);
        }
        if self.header.crit.is_some() || self.kid().is_some_and(|kid| kid.len() > MAX_KID) {
            return Err(TokenError::Malformed);
        }
        Ok(algorithm)
    }

    /// Whether one of the keys has signed it.
    ///
    /// # Errors
    /// No key fits, or none has.
    pub(super) fn verify(&self, keys: &KeySet, algorithm: Algorithm) -> Result<(), TokenError> {
        let mut fits = keys.fitting(self.kid(), algorithm).peekable();
        if fits.peek().is_none() {
            return Err(TokenError::UnknownKey);
        }
        let good = fits.any(|key| key.verifies(algorithm, self.signed, &self.signature));
        if good { Ok(()) } else { Err(TokenError::Signature) }
    }

    /// What it says, if it is for us and its time is now.
    ///
    /// # Errors
    /// Who, whom or when is wrong.
    pub(super) fn claims(
        self,
        issuer: &str,
        audiences: &[String],
        now: f64,
        skew: f64,
    ) -> Result<Map<String, Value>, TokenError> {
        let claims = self.claims;
        if claims.get("iss").and_then(Value::as_str) != Some(issuer) {
            return Err(TokenError::Issuer);
        }
        if !is_for(&claims, audiences) {
            return Err(TokenError::Audience);
        }
        let time = |name| time(&claims, name).map_err(|()| TokenError::Malformed);
        if time("exp")?.is_none_or(|exp| now >= exp + skew) {
            return Err(TokenError::Expired);
        }
        if time("nbf")?.is_some_and(|nbf| now + skew < nbf)
            || time("iat")?.is_some_and(|iat| now + skew < iat)
        {
            return Err(TokenError::Early);
        }
        Ok(claims)
    }
}

/// A key that verifies.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// Uncompressed point.
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    kid: Option<String>,
    /// The one that it is for, if it says so.
    algorithm: Option<String>,
    material: Material,
}

impl Key {
    fn fits(&self, algorithm: Algorithm) -> bool {
        let of_type = matches!(
            (algorithm, &self.material),
            (Algorithm::RS256 | Algorithm::PS256, Material::Rsa { .. })
                | (Algorithm::ES256, Material::P256(_))
                | (Algorithm::EdDSA, Material::Ed25519(_))
        );
        let named = match algorithm {
            Algorithm::RS256 => "RS256",
            Algorithm::PS256 => "PS256",
            Algorithm::ES256 => "ES256",
            Algorithm::EdDSA => "EdDSA",
        };
        of_type && self.algorithm.as_deref().is_none_or(|own| own == named)
    }

    fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let result = match (&self.material, algorithm) {
            (Material::Rsa { n, e }, Algorithm::RS256) => {
                let key = RsaPublicKeyComponents { n, e };
                key.verify(&signature::RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
            (Material::Rsa { n, e }, Algorithm::PS256) => {
                let key = RsaPublicKeyComponents { n, e };
                key.verify(&signature::RSA_PSS_2048_8192_SHA256, message, signature)
            }
            (Material::P256(point), Algorithm::ES256) => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            (Material::Ed25519(point), Algorithm::EdDSA) => {
                UnparsedPublicKey::new(&signature::ED25519, point).verify(message, signature)
            }
            _ => Err(ring::error::Unspecified),
        };
        result.is_ok()
    }
}

#[derive(Deserialize)]
struct RawSet {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct RawKey {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl RawKey {
    /// `None` if it verifies nothing that we accept.
    fn key(self) -> Option<Key> {
        let for_signatures = self.usage.as_deref().is_none_or(|usage| usage == "sig")
            && self.key_ops.is_none_or(|ops| ops.iter().any(|op| op == "verify"));
        if !for_signatures || self.kid.as_ref().is_some_and(|kid| kid.len() > MAX_KID) {
            return None;
        }
        let part = |part: &Option<String>| decode(part.as_deref()?);
        let material = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => Material::Rsa { n: part(&self.n)?, e: part(&self.e)? },
            ("EC", Some("P-256")) => {
                let (x, y) = (part(&self.x)?, part(&self.y)?);
                if (x.len(), y.len()) != (32, 32) {
                    return None;
                }
                Material::P256([&[4][..], &x, &y].concat())
            }
            ("OKP", Some("Ed25519")) => Material::Ed25519(part(&self.x).filter(|x| x.len() == 32)?),
            _ => return None,
        };
        Some(Key { kid: self.kid, algorithm: self.alg, material })
    }
}

/// The public keys of an issuer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KeySet(Vec<Key>);

impl KeySet {
    /// The usable keys of a JWK set; others are left out, as RFC 7517 wants it. `None` if it is no set, or none is
    /// usable.
    pub(super) fn parse(json: &[u8]) -> Option<Self> {
        let raw: RawSet = serde_json::from_slice(json).ok()?;
        let keys = raw.keys.into_iter().filter_map(|key| serde_json::from_value::<RawKey>(key).ok()?.key());
        let keys: Vec<Key> = keys.take(MAX_KEYS).collect();
        (!keys.is_empty()).then_some(Self(keys))
    }

    /// Those that could have signed: of this name, or all if the token does not say.
    fn fitting(&self, kid: Option<&str>, algorithm: Algorithm) -> impl Iterator<Item = &Key> {
        self.0
            .iter()
            .filter(move |key| kid.is_none() || key.kid.as_deref() == kid)
            .filter(move |key| key.fits(algorithm))
    }

    /// Whether there is one.
    pub(super) fn has(&self, kid: Option<&str>, algorithm: Algorithm) -> bool {
        self.fitting(kid, algorithm).next().is_some()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "jwt_tests.rs"]
mod tests;
