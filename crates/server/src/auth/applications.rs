//! The applications of the file, and the secrets that belong to them.
//!
//! Owns what is read from these files, the numbers of applications, and whom a key or a name means. All of them are
//! read together, and only what can be used altogether is taken.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use mirai_engine::TenantId;
use mirai_ledger::ShortSecret;
use mirai_ledger::identity::{self, Applications, ApplicationsError, Pepper, UserKey};
use mirai_ledger::secret::{SecretFileError, parse_versions};

use super::caller::{Caller, Known, User};
use crate::file::{self, FileError};

/// Most bytes of a file of secrets.
const MAX_SECRETS: u64 = 64 << 10;

/// Why the file of applications or a file of secrets cannot be used. Never repeats what is in it.
#[derive(Debug, thiserror::Error)]
pub enum IdentityFileError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// What it says of applications.
    #[error("{}: {source}", path.display())]
    Applications {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ApplicationsError,
    },
    /// What it says of secrets.
    #[error("{}: {source}", path.display())]
    Secrets {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SecretFileError,
    },
    /// A secret that could be guessed.
    #[error("{}: {source}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// How long it is.
        source: ShortSecret,
    },
    /// Keys of which nothing can be known.
    #[error("{}: it has keys, and `identity.pepper_file` is not set", .0.display())]
    NoPepper(PathBuf),
    /// One line for two purposes: who knows one would know the other.
    #[error("{}: it has the same secret as the pepper", .0.display())]
    SameSecret(PathBuf),
    /// A secret that must be one line.
    #[error("{}: not one line of 1 to 4096 printable ASCII characters", .0.display())]
    Secret(PathBuf),
}

/// Where it all comes from.
#[derive(Clone, Debug, Default)]
pub(super) struct Files {
    pub(super) applications: Option<PathBuf>,
    pub(super) pepper: Option<PathBuf>,
    pub(super) user_key: Option<PathBuf>,
}

/// Gives each who needs one a number of its own, from 1.
#[derive(Debug, Default)]
pub(super) struct Numbers(AtomicU64);

impl Numbers {
    pub(super) fn next(&self) -> TenantId {
        TenantId(self.0.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// What the files hold.
#[derive(Debug, Default)]
pub(super) struct Contents {
    applications: Applications,
    peppers: Vec<Pepper>,
    /// Newest first.
    user_keys: Vec<UserKey>,
}

/// What is in force.
#[derive(Debug, Default)]
struct Current {
    contents: Contents,
    known: HashMap<Arc<str>, Arc<Known>>,
}

/// The applications.
#[derive(Debug)]
pub(super) struct Registry {
    files: Files,
    numbers: Arc<Numbers>,
    /// Every name there ever was: a number outlives its application, so that who comes back finds its prefixes, and
    /// nobody else does.
    given: Mutex<HashMap<Arc<str>, TenantId>>,
    current: ArcSwap<Current>,
}

/// A pseudonym, and under which secret it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pseudonym {
    pub(crate) value: String,
    pub(crate) key_version: u32,
}

fn secrets<T>(
    path: &Path,
    make: impl Fn(u32, &[u8]) -> Result<T, ShortSecret>,
) -> Result<(Vec<T>, Vec<Vec<u8>>), IdentityFileError> {
    let text = file::read_text(path, MAX_SECRETS)?;
    let all = parse_versions(&text)
        .map_err(|source| IdentityFileError::Secrets { path: path.to_owned(), source })?;
    let made = all
        .iter()
        .map(|(version, secret)| make(*version, secret))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| IdentityFileError::Short { path: path.to_owned(), source })?;
    Ok((made, all.into_iter().map(|(_, secret)| secret).collect()))
}

impl Files {
    /// Reads all of them.
    ///
    /// # Errors
    /// The first that cannot be used.
    pub(super) fn read(&self) -> Result<Contents, IdentityFileError> {
        let (peppers, pepper_bytes) =
            self.pepper.as_deref().map(|path| secrets(path, Pepper::new)).transpose()?.unwrap_or_default();
        let (user_keys, user_bytes) =
            self.user_key.as_deref().map(|path| secrets(path, UserKey::new)).transpose()?.unwrap_or_default();
        if let Some(path) = &self.user_key
            && user_bytes.iter().any(|secret| pepper_bytes.contains(secret))
        {
            return Err(IdentityFileError::SameSecret(path.clone()));
        }
        let applications = match &self.applications {
            None => Applications::default(),
            Some(path) => {
                let text = file::read_text(path, identity::MAX_FILE as u64)?;
                let wrong = |source| IdentityFileError::Applications { path: path.clone(), source };
                let applications = Applications::parse(&text).map_err(wrong)?;
                if applications.keys() > 0 && peppers.is_empty() {
                    return Err(IdentityFileError::NoPepper(path.clone()));
                }
                applications
            }
        };
        Ok(Contents { applications, peppers, user_keys })
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.applications, &self.pepper, &self.user_key].into_iter().flatten()
    }
}

/// A secret that is a file of one line.
///
/// # Errors
/// The file cannot be read, or is not one such line.
pub(super) fn read_secret(path: &Path) -> Result<String, IdentityFileError> {
    let text = file::read_text(path, MAX_SECRETS)?;
    let secret = text.trim();
    let plausible = (1..=4096).contains(&secret.len()) && secret.bytes().all(|b| b.is_ascii_graphic());
    if plausible { Ok(secret.to_owned()) } else { Err(IdentityFileError::Secret(path.to_owned())) }
}

impl Registry {
    pub(super) fn new(files: Files, numbers: Arc<Numbers>) -> Self {
        Self { files, numbers, given: Mutex::default(), current: ArcSwap::default() }
    }

    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// Puts what was read in force.
    pub(super) fn take(&self, contents: Contents) {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let known = contents.applications.all().iter().map(|application| {
            let name: Arc<str> = application.name.as_str().into();
            let tenant = *given.entry(name.clone()).or_insert_with(|| self.numbers.next());
            (name.clone(), Arc::new(Known { tenant, name, application: application.clone() }))
        });
        let known = known.collect();
        self.current.store(Arc::new(Current { contents, known }));
    }

    /// Whose key this is, and whether that is a gateway.
    pub(super) fn key(&self, key: &str) -> Option<(Caller, bool)> {
        let current = self.current.load();
        let found = current.contents.applications.caller(key, &current.contents.peppers)?;
        let known = current.known.get(found.application.name.as_str())?;
        let caller = Caller::of(known, found.key_id.clone(), found.key_version, found.scopes);
        Some((caller, found.application.gateway))
    }

    /// The application of this name.
    pub(super) fn named(&self, name: &str) -> Option<Arc<Known>> {
        self.current.load().known.get(name).cloned()
    }

    /// The application that `provider` calls `id`.
    pub(super) fn client(&self, provider: &str, id: &str) -> Option<Arc<Known>> {
        let current = self.current.load();
        let application = current.contents.applications.client(provider, id)?;
        current.known.get(application.name.as_str()).cloned()
    }

    /// What is recorded of a user; `None` if nothing is to be.
    pub(super) fn pseudonym(&self, application: &str, user: &User) -> Option<Pseudonym> {
        let current = self.current.load();
        let key = current.contents.user_keys.first()?;
        Some(Pseudonym { value: key.pseudonym(application, user.name()), key_version: key.version })
    }

    /// Every application, in the order of the file.
    pub(super) fn all(&self) -> Vec<Arc<Known>> {
        let current = self.current.load();
        let all = current.contents.applications.all().iter();
        all.filter_map(|application| current.known.get(application.name.as_str()).cloned()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mirai_ledger::identity::NewKey;

    use super::*;

    fn pepper(version: u32) -> Pepper {
        Pepper::new(version, format!("{version}").repeat(32).as_bytes()).unwrap()
    }

    fn registry(directory: &Path) -> Registry {
        let files = Files {
            applications: Some(directory.join("applications.toml")),
            pepper: Some(directory.join("pepper")),
            user_key: Some(directory.join("users")),
        };
        Registry::new(files, Arc::default())
    }

    #[test]
    fn numbers_stay_with_names_and_are_never_given_twice() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(directory.path());
        std::fs::write(directory.path().join("pepper"), format!("1 {}\n", "1".repeat(32))).unwrap();
        std::fs::write(directory.path().join("users"), format!("3 {}\n2 {0}x", "3".repeat(32))).unwrap();
        let write = |names: &[&str]| {
            let text: String =
                names.iter().map(|name| format!("[[application]]\nname = \"{name}\"\n")).collect();
            std::fs::write(directory.path().join("applications.toml"), text).unwrap();
            registry.take(registry.files().read().unwrap());
        };
        let numbers = || ["a", "b", "c"].map(|name| registry.named(name).map(|known| known.tenant.0));
        write(&["a", "b"]);
        assert_eq!(numbers(), [Some(1), Some(2), None]);
        write(&["c", "b"]);
        assert_eq!(numbers(), [None, Some(2), Some(3)]);
        write(&["a", "c"]);
        assert_eq!(numbers(), [Some(1), None, Some(3)]);
        assert_eq!(registry.all().iter().map(|known| &*known.name).collect::<Vec<_>>(), ["a", "c"]);
        let pseudonym = registry.pseudonym("a", &User::new("zoe").unwrap()).unwrap();
        assert_eq!(pseudonym.key_version, 3, "the newest makes");
        assert!(!pseudonym.value.contains("zoe"));
    }

    #[test]
    fn all_keys_of_an_application_are_one_tenant() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(directory.path());
        let keys = [NewKey::new("a-1", &pepper(1)).unwrap(), NewKey::new("a-2", &pepper(2)).unwrap()];
        let text = format!("[[application]]\nname = \"a\"\nweight = 5\n{}{}", keys[0].stanza, keys[1].stanza);
        std::fs::write(directory.path().join("applications.toml"), text).unwrap();
        let secrets: String = [1, 2].map(|v: u32| format!("{v} {}\n", v.to_string().repeat(32))).concat();
        std::fs::write(directory.path().join("pepper"), secrets).unwrap();
        std::fs::write(directory.path().join("users"), format!("1 {}", "u".repeat(32))).unwrap();
        registry.take(registry.files().read().unwrap());
        let who =
            |key: &str| registry.key(key).map(|(caller, _)| (caller.tenant.0, caller.key_id, caller.weight));
        assert_eq!(who(&keys[0].key), Some((1, "a-1".into(), 5)));
        assert_eq!(who(&keys[1].key), Some((1, "a-2".into(), 5)));
        assert_eq!(who("mirai-"), None);
    }

    #[test]
    fn only_what_can_be_used_altogether_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let key = NewKey::new("k", &pepper(1)).unwrap();
        let with_key = format!("[[application]]\nname = \"a\"\n{}", key.stanza);
        let secret = format!("1 {}", "1".repeat(32));
        let cases = [
            (Some("[[application"), None, None, "applications.toml: line 1"),
            (Some(with_key.as_str()), None, None, "applications.toml: it has keys"),
            (None, Some("1 short"), None, "pepper: line 1: the secret has 5 bytes"),
            (None, None, Some("nothing"), "users: line 1: not"),
            (None, Some(secret.as_str()), Some(secret.as_str()), "users: it has the same secret"),
        ];
        for (applications, pepper, users, words) in cases {
            let put = |name: &str, text: Option<&str>| {
                text.map(|text| {
                    std::fs::write(at(name), text).unwrap();
                    at(name)
                })
            };
            let files = Files {
                applications: put("applications.toml", applications),
                pepper: put("pepper", pepper),
                user_key: put("users", users),
            };
            let error = files.read().unwrap_err().to_string();
            assert!(error.contains(words), "{error} / {words}");
            assert!(!error.contains("111"), "{error}");
        }
        for (text, good) in [("s3cret\n", true), ("", false), ("a b", false), ("a\nb", false)] {
            std::fs::write(at("secret"), text).unwrap();
            assert_eq!(read_secret(&at("secret")).is_ok(), good, "{text:?}");
        }
    }
}
