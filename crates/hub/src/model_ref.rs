//! Reads a `--model` argument. Owns the grammar of references; never says whether the model is complete.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::HubError;

/// Longest accepted organisation, model name or revision, in bytes (the hub's own limit is 96).
const MAX_PART: usize = 128;

/// Where a model is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A directory with `config.json`, a tokenizer and weights.
    Dir(PathBuf),
    /// One GGUF file.
    Gguf(PathBuf),
    /// A repository of the hub, looked up in the local store.
    HubRepo {
        /// Organisation or user.
        org: String,
        /// Model name.
        name: String,
        /// Branch, tag or commit; `main` where absent.
        revision: Option<String>,
    },
}

impl ModelRef {
    /// Parses a directory, a `.gguf` file or `ORG/NAME[@REVISION]`.
    ///
    /// What exists on disk wins; something that looks like a path (`/x`, `./x`, `../x`, `~`, more than one
    /// slash, `.gguf`) is a path even where it does not exist yet.
    ///
    /// # Errors
    /// [`HubError::BadReference`] for anything else.
    pub fn parse(given: &str) -> Result<Self, HubError> {
        let bad =
            |reason: &str| HubError::BadReference { given: given.to_owned(), reason: reason.to_owned() };
        if given.is_empty() {
            return Err(bad("empty"));
        }
        if given.contains('\0') {
            return Err(bad("contains a NUL byte"));
        }
        let path = Path::new(given);
        let is_gguf = path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("gguf"));
        if path.is_dir() {
            return Ok(Self::Dir(path.to_owned()));
        }
        if is_gguf {
            return Ok(Self::Gguf(path.to_owned()));
        }
        if path.is_file() {
            return Err(bad("is a file that is not GGUF"));
        }
        let looks_like_path = given.starts_with(['/', '.', '~', '\\']) || given.matches('/').count() > 1;
        if looks_like_path {
            return Ok(Self::Dir(path.to_owned()));
        }
        let Some((org, rest)) = given.split_once('/') else {
            return Err(bad("no such directory"));
        };
        let (name, revision) = match rest.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (rest, None),
        };
        check_part(org).map_err(|reason| bad(&format!("organisation {reason}")))?;
        check_part(name).map_err(|reason| bad(&format!("name {reason}")))?;
        if let Some(revision) = revision {
            check_part(revision).map_err(|reason| bad(&format!("revision {reason}")))?;
        }
        Ok(Self::HubRepo { org: org.into(), name: name.into(), revision: revision.map(Into::into) })
    }

    /// The name to serve the model under where none was given: the repository, or the last part of the path
    /// without `.gguf`.
    pub fn default_name(&self) -> String {
        match self {
            Self::HubRepo { org, name, .. } => format!("{org}/{name}"),
            Self::Dir(path) => last_part(path, false),
            Self::Gguf(path) => last_part(path, true),
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(path) | Self::Gguf(path) => write!(f, "{}", path.display()),
            Self::HubRepo { org, name, revision: None } => write!(f, "{org}/{name}"),
            Self::HubRepo { org, name, revision: Some(revision) } => write!(f, "{org}/{name}@{revision}"),
        }
    }
}

fn last_part(path: &Path, strip_extension: bool) -> String {
    // `.` and `..` have no file name of their own.
    let real =
        if path.file_name().is_none() { path.canonicalize().unwrap_or_default() } else { path.to_owned() };
    let part = if strip_extension { real.file_stem() } else { real.file_name() };
    part.map_or_else(|| "model".to_owned(), |part| part.to_string_lossy().into_owned())
}

/// The parts become directory names (`models--ORG--NAME`), so they may hold nothing that moves elsewhere or
/// that makes two repositories share one directory.
pub(crate) fn check_part(part: &str) -> Result<(), String> {
    if part.is_empty() {
        return Err("is empty".into());
    }
    if part.len() > MAX_PART {
        return Err(format!("has {} bytes, more than {MAX_PART}", part.len()));
    }
    if let Some(c) = part.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
        return Err(format!("has the character {c:?}; letters, digits, '.', '_' and '-' are allowed"));
    }
    if part.starts_with(['.', '-']) || part.ends_with(['.', '-']) {
        return Err("starts or ends with '.' or '-'".into());
    }
    if part.contains("--") || part.contains("..") {
        return Err("contains '--' or '..'".into());
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn repo(org: &str, name: &str, revision: Option<&str>) -> ModelRef {
        ModelRef::HubRepo { org: org.into(), name: name.into(), revision: revision.map(Into::into) }
    }

    #[test]
    fn repositories() {
        assert_eq!(ModelRef::parse("Qwen/Qwen3-0.6B").unwrap(), repo("Qwen", "Qwen3-0.6B", None));
        assert_eq!(ModelRef::parse("a/b@v1.0").unwrap(), repo("a", "b", Some("v1.0")));
        assert_eq!(ModelRef::parse("a/b@v1.0").unwrap().to_string(), "a/b@v1.0");
        assert_eq!(repo("a", "b", None).default_name(), "a/b");
    }

    #[test]
    fn paths_even_where_absent() {
        for text in ["/no/such/dir", "./nothing", "../nothing", "~/x", "a/b/c"] {
            assert_eq!(ModelRef::parse(text).unwrap(), ModelRef::Dir(text.into()), "{text}");
            assert_eq!(ModelRef::parse(text).unwrap().to_string(), text);
        }
        let gguf = ModelRef::parse("models/tiny.GGUF").unwrap();
        assert_eq!(gguf, ModelRef::Gguf("models/tiny.GGUF".into()));
        assert_eq!(gguf.default_name(), "tiny");
        assert_eq!(ModelRef::Dir("x/llama".into()).default_name(), "llama");
        assert_eq!(ModelRef::Dir("/".into()).default_name(), "model");
        assert_ne!(ModelRef::Dir(".".into()).default_name(), ".");
    }

    #[test]
    fn existing_paths_win() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().to_str().unwrap();
        assert_eq!(ModelRef::parse(text).unwrap(), ModelRef::Dir(dir.path().into()));
        let file = dir.path().join("weights.bin");
        std::fs::write(&file, b"x").unwrap();
        let error = ModelRef::parse(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("not GGUF"), "{error}");
    }

    #[test]
    fn refused() {
        let long = format!("a/{}", "b".repeat(200));
        for (text, word) in [
            ("", "empty"),
            ("gpt2-nowhere", "no such directory"),
            ("a/", "name is empty"),
            ("a/b@", "revision is empty"),
            ("a/..b", "name starts"),
            ("a/b@..", "revision starts"),
            ("a/b c", "character ' '"),
            ("a/b--c", "'--'"),
            ("a/b\0c", "NUL"),
            (long.as_str(), "more than 128"),
        ] {
            let error = ModelRef::parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }
}
