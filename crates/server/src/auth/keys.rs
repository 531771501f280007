//! Plain keys: from a flag, a variable, or a file with one a line.
//!
//! Owns their digests. Every key is compared, each in constant time, so that the time of an answer tells nothing
//! about any of them. Keys of a file change with the file; one that cannot be used leaves the old keys in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use mirai_engine::TenantId;
use mirai_ledger::identity::{DEFAULT_APPLICATION, Quota};
use mirai_ledger::{Scope, Scopes};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::applications::Numbers;
use super::caller::Caller;
use crate::config_error::key_problem;
use crate::file::{self, FileError};

/// Most keys of a file: each of them is compared with every request's.
pub const MAX_KEYS: usize = 1024;

/// Most bytes of a file of keys.
const MAX_FILE: u64 = 1 << 20;

/// Why a file of keys cannot be used. Never repeats what is in it.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read as text.
    #[error(transparent)]
    File(#[from] FileError),
    /// It would lock everybody out.
    #[error("{}: holds no key", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// More keys than are compared with each request.
    #[error("{}: {keys} keys, more than {MAX_KEYS}", path.display())]
    TooMany {
        /// The file.
        path: PathBuf,
        /// Keys in it.
        keys: usize,
    },
    /// A line that no client could send.
    #[error("{}: the key in line {line} is {problem}", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The keys of a file: one a line; empty lines and lines that start with `#` do not count.
///
/// # Errors
/// The file cannot be read, is too long, holds no key or too many, or one that could never be sent.
pub fn read_keys(path: &Path) -> Result<Vec<String>, KeyFileError> {
    let owned = || path.to_owned();
    let text = file::read_text(path, MAX_FILE)?;
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(problem) = key_problem(line) {
            return Err(KeyFileError::BadKey { path: owned(), line: number, problem });
        }
        keys.push(line.to_owned());
    }
    match keys.len() {
        0 => Err(KeyFileError::Empty { path: owned() }),
        keys if keys > MAX_KEYS => Err(KeyFileError::TooMany { path: owned(), keys }),
        _ => Ok(keys),
    }
}

/// Longest key, bytes: what is longer is some token.
const MAX_KEY: usize = 4096;

/// One accepted key.
#[derive(Clone, Debug)]
struct Accepted {
    digest: [u8; 32],
    tenant: TenantId,
    /// `key-` and its number.
    id: Arc<str>,
}

/// The accepted keys, as digests.
#[derive(Debug)]
pub(super) struct PlainKeys {
    /// Keys that do not come from a file, and stay.
    fixed: Vec<String>,
    file: Option<PathBuf>,
    numbers: Arc<Numbers>,
    current: ArcSwap<Vec<Accepted>>,
}

impl PlainKeys {
    /// Takes keys that stay, and those of a file.
    ///
    /// # Errors
    /// The file cannot be used.
    pub(super) fn load(
        fixed: &[String],
        file: Option<&Path>,
        numbers: Arc<Numbers>,
    ) -> Result<Self, KeyFileError> {
        let keys = Self {
            fixed: fixed.to_vec(),
            file: file.map(Path::to_owned),
            numbers,
            current: ArcSwap::default(),
        };
        keys.read()?;
        Ok(keys)
    }

    /// Whether there are any, now or from a file later.
    pub(super) fn is_configured(&self) -> bool {
        !self.fixed.is_empty() || self.file.is_some()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.current.load().len()
    }

    pub(super) fn path(&self) -> Option<&PathBuf> {
        self.file.as_ref()
    }

    /// Reads the file again. A key that stays keeps its number, and a number is never given to a second key: whoever
    /// comes after a withdrawn key does not inherit its cached prefixes.
    ///
    /// # Errors
    /// The file cannot be used; the old keys stay.
    pub(super) fn read(&self) -> Result<(), KeyFileError> {
        let of_file = self.file.as_ref().map_or_else(|| Ok(Vec::new()), |file| read_keys(file))?;
        let old = self.current.load();
        let mut next: Vec<Accepted> = Vec::new();
        for digest in self.fixed.iter().chain(&of_file).map(|key| digest(key.as_bytes())) {
            if next.iter().any(|other| other.digest == digest) {
                continue;
            }
            let known = old.iter().find(|other| other.digest == digest).cloned();
            next.push(known.unwrap_or_else(|| {
                let tenant = self.numbers.next();
                Accepted { digest, tenant, id: format!("key-{}", tenant.0).into() }
            }));
        }
        self.current.store(Arc::new(next));
        Ok(())
    }

    /// Whose key this is: each is a tenant of its own.
    pub(super) fn caller(&self, key: &[u8]) -> Option<Caller> {
        if key.len() > MAX_KEY {
            return None;
        }
        let presented = digest(key);
        let accepted = self.current.load();
        let mut found = u32::MAX;
        for (index, accepted) in (0u32..).zip(accepted.iter()) {
            let equal: Choice = accepted.digest.ct_eq(&presented);
            found.conditional_assign(&index, equal);
        }
        let accepted = accepted.get(found as usize)?;
        Some(Caller {
            tenant: accepted.tenant,
            application: DEFAULT_APPLICATION.into(),
            key_id: accepted.id.clone(),
            scopes: Scopes::INFER.with(Scope::ReadUsage),
            quota: Quota::default(),
            ..Caller::anybody()
        })
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn fixed(keys: &[&str]) -> PlainKeys {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        PlainKeys::load(&keys, None, Arc::default()).unwrap()
    }

    fn who(keys: &PlainKeys, key: &str) -> Option<u64> {
        keys.caller(key.as_bytes()).map(|caller| caller.tenant.0)
    }

    #[test]
    fn each_key_is_its_own_tenant() {
        let keys = fixed(&["alpha", "beta", "alpha"]);
        assert_eq!((who(&keys, "alpha"), who(&keys, "beta")), (Some(1), Some(2)));
        let caller = keys.caller(b"beta").unwrap();
        assert_eq!((&*caller.application, &*caller.key_id, caller.key_version), ("default", "key-2", 0));
        assert!(caller.scopes.infer && caller.scopes.read_usage && !caller.scopes.admin);
        for wrong in ["", "alph", "alphaa", "ALPHA", "alpha\t", " alpha", &"a".repeat(4097)] {
            assert_eq!(who(&keys, wrong), None, "{wrong}");
        }
        assert!(keys.is_configured() && !fixed(&[]).is_configured());
    }

    #[test]
    fn a_file_is_read_line_by_line_and_a_bad_one_is_named_without_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, "# ours\n\none\r\n two \n").unwrap();
        assert_eq!(read_keys(&path).unwrap(), ["one", "two"]);
        let long = "k".repeat(1 << 20);
        let many: String = (0..=MAX_KEYS).map(|i| format!("key{i}\n")).collect();
        for (content, words) in [
            (b"".as_slice(), "holds no key"),
            (b"\n#\n", "holds no key"),
            (b"good\nse cret\n", "line 2 is not made"),
            (b"\xff\n", "UTF-8"),
            (format!("{long}\n").as_bytes(), "longer than 1048576 bytes"),
            (many.as_bytes(), "1025 keys, more than 1024"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = PlainKeys::load(&[], Some(&path), Arc::default()).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("keys: "), "{error}");
            assert!(!error.contains("cret") && !error.contains("key7"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read_keys(&path), Err(KeyFileError::File(FileError::Read { .. }))));
    }

    #[test]
    fn a_changed_file_changes_the_keys_and_a_bad_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, "stays\nold\n").unwrap();
        let keys = PlainKeys::load(&["fixed".to_owned()], Some(&path), Arc::default()).unwrap();
        let now = || ["fixed", "stays", "old", "new"].map(|key| who(&keys, key));
        assert_eq!(now(), [Some(1), Some(2), Some(3), None]);
        std::fs::write(&path, "new\nstays\n").unwrap();
        keys.read().unwrap();
        assert_eq!(now(), [Some(1), Some(2), None, Some(4)], "no number is given twice");
        for bad in [Some("# none\n"), Some("a b\n"), None] {
            match bad {
                Some(text) => std::fs::write(&path, text).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            keys.read().unwrap_err();
            assert_eq!(now(), [Some(1), Some(2), None, Some(4)], "{bad:?}");
        }
        std::fs::write(&path, "old\n").unwrap();
        keys.read().unwrap();
        assert_eq!(now(), [Some(1), None, Some(5), None]);
    }
}
