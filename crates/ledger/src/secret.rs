//! Versioned secrets and the keyed hashes made with them.
//!
//! Owns HMAC-SHA256 with a purpose in front, so that one secret used twice by mistake still gives unrelated
//! hashes. Never prints a secret.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::chain::Hash;
use crate::value::Hex;

/// Fewest bytes of a secret.
pub const MIN_SECRET: usize = 32;

/// A secret of less than 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret has {0} bytes, at least {MIN_SECRET} are needed")]
pub struct ShortSecret(pub usize);

#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl Secret {
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, ShortSecret> {
        if bytes.len() < MIN_SECRET {
            return Err(ShortSecret(bytes.len()));
        }
        Ok(Self(bytes.to_vec()))
    }

    fn mac(&self, purpose: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(purpose);
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    pub(crate) fn hash(&self, purpose: &[u8], parts: &[&[u8]]) -> Hash {
        Hex(self.mac(purpose, parts).finalize().into_bytes().into())
    }

    /// Takes the same time whatever the answer.
    pub(crate) fn made(&self, purpose: &[u8], parts: &[&[u8]], hash: &Hash) -> bool {
        self.mac(purpose, parts).verify_slice(&hash.0).is_ok()
    }
}
