//! Names of requests.
//!
//! Owns our own ids, and which of a caller's `X-Request-Id` may be echoed. A caller's id is never a key.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use mirai_engine::RequestId;

/// Gives ids that sort by time and do not repeat in this process; between processes 64 random bits keep them
/// apart.
#[derive(Debug)]
pub(crate) struct Ids {
    next: AtomicU64,
    key: u64,
}

impl Ids {
    pub(crate) fn new() -> Self {
        Self { next: AtomicU64::new(1), key: rand::random() }
    }

    /// `count` consecutive ids for the engine.
    pub(crate) fn engine(&self, count: u32) -> RequestId {
        RequestId(self.next.fetch_add(u64::from(count), Ordering::Relaxed))
    }

    /// 26 characters of Crockford base 32, as in a ULID: 48 bits of milliseconds, 80 bits that differ.
    pub(crate) fn public(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let rest = (u128::from(mix(number ^ self.key)) << 16) | u128::from(number & 0xffff);
        let value = ((millis & 0xffff_ffff_ffff) << 80) | rest;
        (0..26).rev().map(|i| char::from(ALPHABET[(value >> (5 * i)) as usize & 31])).collect()
    }
}

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection, so distinct numbers stay distinct.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Whether a caller's id may be echoed and logged.
pub(crate) fn is_sane(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/+=".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_ids_are_distinct_and_sort_by_time() {
        let ids = Ids::new();
        let list: Vec<String> = (0..1000).map(|_| ids.public()).collect();
        let distinct: std::collections::HashSet<_> = list.iter().collect();
        assert_eq!(distinct.len(), list.len());
        assert!(list.iter().all(|id| id.len() == 26 && id[..10] >= list[0][..10]));
        let first = ids.engine(5);
        assert!(ids.engine(1).0 >= first.0 + 5);
    }

    #[test]
    fn only_plain_ids_are_echoed() {
        for good in ["a", "req-1_2.3:4", &"x".repeat(128)] {
            assert!(is_sane(good), "{good}");
        }
        for bad in ["", "a b", "a\nb", "é", "<x>", &"x".repeat(129)] {
            assert!(!is_sane(bad), "{bad}");
        }
    }
}
