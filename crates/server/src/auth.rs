//! Who may call.
//!
//! Owns the digests of the accepted keys. Every key is compared, each in constant time, so that the time of an
//! answer tells nothing about any of them. Keys of a file change with the file; one that cannot be used leaves
//! the old keys in place.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use mirai_engine::TenantId;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::config::key_problem;
use crate::error::ApiError;
use crate::files;
use crate::metrics::{Metrics, Reloaded};
use crate::reload::Watch;

/// Most keys of a file: each of them is compared with every request's.
pub const MAX_KEYS: usize = 1024;

/// Why a file of keys cannot be used. Never repeats what is in it.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It is no regular file, or cannot be read as text.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is larger than any list of keys.
    #[error("{}: longer than {limit} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Most bytes.
        limit: u64,
    },
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
    let unreadable = |source: std::io::Error| match source.kind() {
        ErrorKind::FileTooLarge => KeyFileError::TooLong { path: owned(), limit: files::MAX_BYTES },
        _ => KeyFileError::Read { path: owned(), source },
    };
    let bytes = files::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| unreadable(std::io::Error::new(ErrorKind::InvalidData, "not valid UTF-8")))?;
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

/// Accepted digests, and whom each of them means.
#[derive(Debug, Default)]
struct Accepted {
    keys: Vec<(TenantId, [u8; 32])>,
    /// The last number given out.
    last: u64,
}

impl Accepted {
    /// The same for other keys. A key that stays keeps its number, and a number is never given to a second key:
    /// whoever comes after a withdrawn key does not inherit its cached prefixes.
    fn renewed<'a>(&self, keys: impl Iterator<Item = &'a String>) -> Self {
        let mut next = Self { keys: Vec::new(), last: self.last };
        for digest in keys.map(|key| digest(key.as_bytes())) {
            if next.keys.iter().any(|(_, other)| *other == digest) {
                continue;
            }
            let known = self.keys.iter().find(|(_, other)| *other == digest).map(|(tenant, _)| *tenant);
            let tenant = known.unwrap_or_else(|| {
                next.last += 1;
                TenantId(next.last)
            });
            next.keys.push((tenant, digest));
        }
        next
    }
}

/// A file of keys that is read again when it changes.
#[derive(Debug)]
struct KeyFile {
    path: PathBuf,
    watch: Watch,
}

/// The accepted keys, as digests.
#[derive(Debug)]
pub(crate) struct Auth {
    /// Keys that do not come from a file, and stay.
    fixed: Vec<String>,
    file: Option<KeyFile>,
    current: ArcSwap<Accepted>,
}

impl Auth {
    /// Takes keys that stay, and those of a file. Blocks while it reads.
    ///
    /// # Errors
    /// The file cannot be used.
    pub(crate) fn load(fixed: &[String], file: Option<&Path>) -> Result<Self, KeyFileError> {
        // Looked at before it is read: see `Watch::new`.
        let watch = |path: &Path| KeyFile { path: path.to_owned(), watch: Watch::new(vec![path.to_owned()]) };
        let file = file.map(watch);
        let auth = Self { fixed: fixed.to_vec(), file, current: ArcSwap::default() };
        let of_file = auth.file.as_ref().map_or_else(|| Ok(Vec::new()), |file| read_keys(&file.path))?;
        auth.take(&of_file);
        Ok(auth)
    }

    /// Accepts the keys that stay and these, and no other.
    fn take(&self, of_file: &[String]) {
        let next = self.current.load().renewed(self.fixed.iter().chain(of_file));
        self.current.store(Arc::new(next));
    }

    /// Takes the keys of the file whenever it changes, if they can be used. Returns at once without a file,
    /// else never.
    pub(crate) async fn watch(&self, every: Duration, metrics: &Metrics) {
        if let Some(file) = &self.file {
            let path = file.path.clone();
            let read = move || read_keys(&path);
            file.watch.run(Reloaded::ApiKeys, every, metrics, read, |keys| self.take(&keys)).await;
        }
    }

    /// Who calls: 0 if nobody has to say, else the key's number from 1.
    ///
    /// # Errors
    /// 401 without exactly one valid `Authorization: Bearer <key>`.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<TenantId, ApiError> {
        let accepted = self.current.load();
        if accepted.keys.is_empty() {
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
        for (tenant, accepted) in &accepted.keys {
            let equal: Choice = accepted.ct_eq(&presented);
            found.conditional_assign(&tenant.0, equal);
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

    fn fixed(keys: &[&str]) -> Auth {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        Auth::load(&keys, None).unwrap()
    }

    fn who(auth: &Auth, key: &str) -> Option<u64> {
        auth.check(&headers(&[format!("Bearer {key}").as_bytes()])).ok().map(|tenant| tenant.0)
    }

    #[test]
    fn each_key_is_its_own_tenant() {
        let auth = fixed(&["alpha", "beta", "alpha"]);
        assert_eq!(auth.check(&headers(&[b"Bearer alpha"])), Ok(TenantId(1)));
        assert_eq!(auth.check(&headers(&[b"bearer beta"])), Ok(TenantId(2)));
        assert_eq!(fixed(&[]).check(&headers(&[])), Ok(TenantId(0)));
    }

    #[test]
    fn anything_else_is_refused() {
        let auth = fixed(&["alpha"]);
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
            let error = Auth::load(&[], Some(&path)).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("keys: "), "{error}");
            assert!(!error.contains("cret") && !error.contains("key7"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Auth::load(&[], Some(&path)), Err(KeyFileError::Read { .. })));
        let error = Auth::load(&[], Some(directory.path())).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_changes_the_keys_and_a_bad_one_does_not() {
        let every = Duration::from_secs(2);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, "stays\nold\n").unwrap();
        let auth = Auth::load(&["fixed".to_owned()], Some(&path)).unwrap();
        let now = || ["fixed", "stays", "old", "new"].map(|key| who(&auth, key));
        assert_eq!(now(), [Some(1), Some(2), Some(3), None]);
        let metrics = Metrics::new();
        let test = async {
            std::fs::write(&path, "new\nstays\n").unwrap();
            tokio::time::sleep(every * 3).await;
            assert_eq!(now(), [Some(1), Some(2), None, Some(4)], "no number is given twice");
            for bad in [Some("# none\n"), Some("a b\n"), None] {
                match bad {
                    Some(text) => std::fs::write(&path, text).unwrap(),
                    None => std::fs::remove_file(&path).unwrap(),
                }
                tokio::time::sleep(every * 3).await;
                assert_eq!(now(), [Some(1), Some(2), None, Some(4)], "{bad:?}");
            }
            std::fs::write(&path, "old\n").unwrap();
            tokio::time::sleep(every * 3).await;
            assert_eq!(now(), [Some(1), None, Some(5), None]);
        };
        tokio::select! {
            () = auth.watch(every, &metrics) => unreachable!(),
            () = test => {}
        }
        assert_eq!(metrics.reloads(Reloaded::ApiKeys), [2, 3]);
        fixed(&["alpha"]).watch(every, &metrics).await;
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
