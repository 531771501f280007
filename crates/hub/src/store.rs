//! The local store in the Hugging Face cache layout: `models--ORG--NAME/{blobs,refs,snapshots}`.
//! Owns where the store is and which snapshot a revision names; never writes.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::HubError;
use crate::files::read_small;

/// Most bytes of a `refs/REVISION` file (it holds one commit id).
const MAX_REF_BYTES: u64 = 256;

/// Where models are looked up and how they may be fetched.
#[derive(Clone, Default)]
pub struct StoreOptions {
    /// Directory that holds `models--ORG--NAME`. `None`: there is no store (no home directory is known).
    pub cache_dir: Option<PathBuf>,
    /// Never use the network (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Access token for gated repositories (`HF_TOKEN`). Never printed.
    pub token: Option<String>,
    /// Base URL of the hub (`HF_ENDPOINT`); the public one where absent.
    pub endpoint: Option<String>,
    /// Accept a directory without weights (`--load-format dummy` needs only the configuration).
    pub allow_missing_weights: bool,
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreOptions")
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("token", &self.token.as_ref().map(|_| "***"))
            .field("endpoint", &self.endpoint)
            .field("allow_missing_weights", &self.allow_missing_weights)
            .finish()
    }
}

impl StoreOptions {
    /// Reads the variables that the Hugging Face tools read.
    pub fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// The same, from any source of variables. Empty values count as absent.
    ///
    /// Store: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub`,
    /// `HOME/.cache/huggingface/hub`. Token: `HF_TOKEN`, the file `HF_TOKEN_PATH`, the file `HF_HOME/token`.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let home = get("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| get("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("huggingface")))
            .or_else(|| get("HOME").map(|dir| Path::new(&dir).join(".cache/huggingface")));
        let cache_dir = get("HF_HUB_CACHE")
            .or_else(|| get("HUGGINGFACE_HUB_CACHE"))
            .map(PathBuf::from)
            .or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token_file =
            get("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = get("HF_TOKEN")
            .or_else(|| token_file.and_then(|file| read_small(&file, 4096).ok()))
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let offline = get("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "on", "yes", "true"].iter().any(|word| value.trim().eq_ignore_ascii_case(word))
        });
        Self { cache_dir, offline, token, endpoint: get("HF_ENDPOINT"), allow_missing_weights: false }
    }
}

/// A snapshot found in the store.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// `.../models--ORG--NAME/snapshots/COMMIT`.
    pub(crate) dir: PathBuf,
    /// The commit id, which is the snapshot directory's name.
    pub(crate) commit: String,
}

/// Finds the snapshot of a repository. `revision` may be a branch, a tag or a commit id.
pub(crate) fn find_snapshot(
    options: &StoreOptions,
    org: &str,
    name: &str,
    revision: Option<&str>,
) -> Result<Snapshot, HubError> {
    let revision = revision.unwrap_or("main");
    let store = options.cache_dir.clone().unwrap_or_default();
    let missing = |reason: String| HubError::NotInStore {
        repo: format!("{org}/{name}"),
        revision: revision.to_owned(),
        store: store.clone(),
        reason,
    };
    if options.cache_dir.is_none() {
        return Err(missing("no store is configured: set HF_HUB_CACHE, HF_HOME or HOME".into()));
    }
    let repo_dir = store.join(format!("models--{org}--{name}"));
    if !repo_dir.is_dir() {
        return Err(missing(format!("no {}; run `mirai pull {org}/{name}` first", repo_dir.display())));
    }
    let ref_file = repo_dir.join("refs").join(revision);
    let commit = if ref_file.is_file() {
        read_small(&ref_file, MAX_REF_BYTES)?.trim().to_owned()
    } else {
        revision.to_owned()
    };
    // The ref file's content becomes a directory name: the same rules as for names hold.
    crate::model_ref::check_part(&commit)
        .map_err(|reason| missing(format!("{}: commit id {reason}", ref_file.display())))?;
    let dir = repo_dir.join("snapshots").join(&commit);
    if !dir.is_dir() {
        return Err(missing(format!(
            "neither {} nor {} exists; run `mirai pull {org}/{name}` first",
            ref_file.display(),
            dir.display()
        )));
    }
    Ok(Snapshot { dir, commit })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> StoreOptions {
        StoreOptions::from_lookup(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn where_the_store_is() {
        let dir = |pairs: &[(&str, &str)]| options(pairs).cache_dir;
        assert_eq!(dir(&[]), None);
        assert_eq!(dir(&[("HOME", "/h")]), Some("/h/.cache/huggingface/hub".into()));
        assert_eq!(dir(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x/huggingface/hub".into()));
        assert_eq!(dir(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]), Some("/f/hub".into()));
        assert_eq!(dir(&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/o")]), Some("/o".into()));
        assert_eq!(dir(&[("HUGGINGFACE_HUB_CACHE", "/o"), ("HF_HUB_CACHE", "/c")]), Some("/c".into()));
        assert_eq!(dir(&[("HF_HUB_CACHE", " "), ("HF_HOME", "/f")]), Some("/f/hub".into()));
    }

    #[test]
    fn offline_words() {
        for word in ["1", "ON", "Yes", "true"] {
            assert!(options(&[("HF_HUB_OFFLINE", word)]).offline, "{word}");
        }
        for word in ["0", "", "no", "off", "false"] {
            assert!(!options(&[("HF_HUB_OFFLINE", word)]).offline, "{word}");
        }
    }

    #[test]
    fn token_sources_and_secrecy() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        assert_eq!(options(&[("HF_HOME", home)]).token.as_deref(), Some("from-file"));
        let both = options(&[("HF_HOME", home), ("HF_TOKEN", "from-env"), ("HF_ENDPOINT", "http://h")]);
        assert_eq!(both.token.as_deref(), Some("from-env"));
        assert_eq!(both.endpoint.as_deref(), Some("http://h"));
        assert!(!format!("{both:?}").contains("from-env"));
        let other = dir.path().join("other");
        std::fs::write(&other, "  \n").unwrap();
        assert_eq!(options(&[("HF_TOKEN_PATH", other.to_str().unwrap())]).token, None);
    }

    #[test]
    fn no_store_is_said() {
        let error = find_snapshot(&StoreOptions::default(), "a", "b", None).unwrap_err().to_string();
        assert!(error.contains("HF_HUB_CACHE"), "{error}");
    }
}
