//! Hashes that make a change visible.
//!
//! Owns what a digest covers, how a writer's links are chained, the commitment to a personal field and the
//! signature of a head. Never reads a store.

use sha2::{Digest, Sha256};

use crate::row::{FIELDS, Row, Settled};
use crate::secret::{Secret, ShortSecret};
use crate::value::{Hash, Hex, Value, words};

words! {
    /// What a link of the chain attests.
    LinkKind {
        /// A request was accepted: the fields that are settled by then.
        Open = "open",
        /// An owner that was given up has come back, and takes its row again: the same fields.
        Reclaim = "reclaim",
        /// The row's end, by its owner.
        Close = "close",
        /// The row's end, by recovery.
        Recover = "recover",
    }
}

impl LinkKind {
    /// Whether the row is open after such a link.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::Open | Self::Reclaim)
    }
}

/// One writer's run: its chain's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch {
    /// The writer's name, at most [`crate::MAX_TEXT`] bytes.
    pub writer: String,
    /// The run's number, from 1.
    pub epoch: u64,
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.writer, self.epoch)
    }
}

/// A link of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whose chain.
    pub chain: Epoch,
    /// Its place, from 1, without gaps.
    pub seq: u64,
    /// What it attests.
    pub kind: LinkKind,
    /// Of which request.
    pub id: String,
    /// The digest of what it attests.
    pub digest: Hash,
    /// The chain's hash up to here.
    pub head: Hash,
}

fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// The digest of the fields that are settled when a row opens.
pub fn open_digest(row: &Row) -> Hash {
    digest(row, b"open", |settled| settled == Settled::Open)
}

/// The digest of all fields but those that may be erased.
pub fn content_digest(row: &Row) -> Hash {
    digest(row, b"content", |settled| settled != Settled::Erasable)
}

fn digest(row: &Row, kind: &[u8], covers: impl Fn(Settled) -> bool) -> Hash {
    let mut hash = Sha256::new_with_prefix(b"mirai-ledger row 1\0");
    field(&mut hash, kind);
    for (of, value) in FIELDS.iter().zip(row.values()) {
        if !covers(of.settled) || value.is_default() {
            continue;
        }
        hash.update(of.tag.to_le_bytes());
        match value {
            Value::Null => {}
            Value::Int(n) => field(&mut hash, &n.to_le_bytes()),
            Value::Text(text) => field(&mut hash, text.as_bytes()),
            Value::Bytes(bytes) => field(&mut hash, &bytes),
        }
    }
    Hex(hash.finalize().into())
}

/// The hash before a chain's first link.
pub(crate) fn genesis(chain: &Epoch) -> Hash {
    let mut hash = Sha256::new_with_prefix(b"mirai-ledger chain 1\0");
    field(&mut hash, chain.writer.as_bytes());
    hash.update(chain.epoch.to_le_bytes());
    Hex(hash.finalize().into())
}

/// The hash after a link.
pub(crate) fn next_head(head: Hash, seq: u64, kind: &LinkKind, id: &str, digest: Hash) -> Hash {
    let mut hash = Sha256::new_with_prefix(b"mirai-ledger link 1\0");
    hash.update(head.0);
    hash.update(seq.to_le_bytes());
    field(&mut hash, kind.as_str().as_bytes());
    field(&mut hash, id.as_bytes());
    hash.update(digest.0);
    Hex(hash.finalize().into())
}

/// The commitment to a pseudonym. Without its salt it says nothing about it.
pub fn commitment(salt: &Hex<16>, user: &str) -> Hash {
    let mut hash = Sha256::new_with_prefix(b"mirai-ledger user 1\0");
    hash.update(salt.0);
    field(&mut hash, user.as_bytes());
    Hex(hash.finalize().into())
}

/// The secret under which heads are signed: who lacks it can break a chain but not make one.
#[derive(Clone)]
pub struct ChainKey {
    /// Which secret this is.
    pub version: u32,
    secret: Secret,
}

impl std::fmt::Debug for ChainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChainKey").field("version", &self.version).finish_non_exhaustive()
    }
}

const HEAD_PURPOSE: &[u8] = b"mirai-ledger head 1\0";

impl ChainKey {
    /// A key from a secret of at least 32 bytes.
    ///
    /// # Errors
    /// The secret is shorter.
    pub fn new(version: u32, secret: &[u8]) -> Result<Self, ShortSecret> {
        Ok(Self { version, secret: Secret::new(secret)? })
    }

    /// Signs a chain's head.
    pub fn sign(&self, chain: &Epoch, seq: u64, head: Hash) -> Hash {
        let (epoch, seq) = (chain.epoch.to_le_bytes(), seq.to_le_bytes());
        self.secret.hash(HEAD_PURPOSE, &[chain.writer.as_bytes(), &epoch, &seq, &head.0])
    }

    /// Whether a head bears this key's signature. Takes the same time whatever the answer.
    pub fn signed(&self, chain: &Epoch, seq: u64, head: Hash, mac: &Hash) -> bool {
        let (epoch, seq) = (chain.epoch.to_le_bytes(), seq.to_le_bytes());
        self.secret.made(HEAD_PURPOSE, &[chain.writer.as_bytes(), &epoch, &seq, &head.0], mac)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::row::{Finish, State};

    /// A row unlike the default in every field.
    fn row() -> Row {
        Row { id: "a".into(), user: Some("u".into()), user_salt: Some(Hex([1; 16])), ..Row::default() }
    }

    fn changed(index: usize) -> Row {
        let mut values = row().values();
        values[index] = match &values[index] {
            Value::Int(n) => Value::Int(n + 1),
            Value::Text(text) => Value::Text(format!("{text}x")),
            Value::Bytes(bytes) => Value::Bytes(vec![9; bytes.len()]),
            Value::Null => match FIELDS[index].sql {
                "BIGINT" => Value::Int(1),
                "TEXT" => Value::Text("x".into()),
                _ => Value::Bytes(vec![9; 32]),
            },
        };
        Row::from_values(values).unwrap()
    }

    #[test]
    fn a_digest_covers_each_settled_field_and_no_erasable_one() {
        for (index, field) in FIELDS.iter().enumerate() {
            let other = changed(index);
            assert_ne!(other, row(), "{}", field.name);
            let content = content_digest(&other) != content_digest(&row());
            let open = open_digest(&other) != open_digest(&row());
            assert_eq!(content, field.settled != Settled::Erasable, "{}", field.name);
            assert_eq!(open, field.settled == Settled::Open, "{}", field.name);
        }
        assert_ne!(open_digest(&row()), content_digest(&row()));
    }

    /// Written down once: a change of what is hashed would make every stored chain invalid.
    #[test]
    fn digests_are_those_of_the_first_release() {
        let mut row = row();
        row.state = State::Closed;
        row.finish = Finish::Stop;
        let chain = Epoch { writer: "w".into(), epoch: 1 };
        let digest = content_digest(&row);
        let head = next_head(genesis(&chain), 1, &LinkKind::Close, "a", digest);
        let mac = ChainKey::new(1, &[5; 32]).unwrap().sign(&chain, 1, head);
        let all = [open_digest(&row), digest, head, mac, commitment(&Hex([1; 16]), "u")];
        let golden = include_str!("../tests/golden/digests-v1.txt");
        let written: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(written, golden.lines().collect::<Vec<_>>());
    }

    #[test]
    fn a_signature_holds_for_its_head_only() {
        let key = ChainKey::new(1, &[5; 32]).unwrap();
        let chain = Epoch { writer: "w".into(), epoch: 1 };
        let head = genesis(&chain);
        let mac = key.sign(&chain, 4, head);
        assert!(key.signed(&chain, 4, head, &mac));
        assert!(!key.signed(&chain, 5, head, &mac));
        assert!(!key.signed(&Epoch { epoch: 2, ..chain.clone() }, 4, head, &mac));
        assert!(!ChainKey::new(1, &[6; 32]).unwrap().signed(&chain, 4, head, &mac));
        assert_eq!(ChainKey::new(1, &[0; 31]).unwrap_err(), ShortSecret(31));
        assert!(!format!("{key:?}").contains("5, 5"));
        assert_eq!(chain.to_string(), "w/1");
    }
}
