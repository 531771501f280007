//! Safe access to single files: bounded reads, and the rule that no name and no link leads out of the
//! directories that a model may use.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::HubError;

/// The directories, canonical, that the files of one model may really lie in.
#[derive(Debug)]
pub(crate) struct Bounds {
    root: PathBuf,
    /// The blobs of the same repository where `root` is a snapshot of a store in the hub's cache layout.
    blobs: Option<PathBuf>,
}

impl Bounds {
    /// The bounds of a model directory. The directory itself may be reached through links.
    pub(crate) fn of_dir(dir: &Path) -> Result<Self, HubError> {
        let root = dir.canonicalize().map_err(HubError::io(dir, "open"))?;
        if !root.is_dir() {
            return Err(HubError::Io {
                path: dir.to_owned(),
                action: "open",
                source: std::io::Error::from(std::io::ErrorKind::NotADirectory),
            });
        }
        // .../models--ORG--NAME/snapshots/COMMIT -> .../models--ORG--NAME/blobs
        let blobs = root
            .parent()
            .filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))
            .and_then(Path::parent)
            .filter(|repo| {
                repo.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"))
            })
            .and_then(|repo| repo.join("blobs").canonicalize().ok())
            // A `blobs` that is itself a link elsewhere widens nothing.
            .filter(|blobs| root.ancestors().nth(2).is_some_and(|repo| blobs.parent() == Some(repo)));
        Ok(Self { root, blobs })
    }

    /// The canonical directory of the model.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Checks that `path` is a regular file within the bounds. Returns `path` unchanged, because the name
    /// (not the blob's hash) is what later error messages should show.
    pub(crate) fn check(&self, path: PathBuf) -> Result<PathBuf, HubError> {
        let target = path.canonicalize().map_err(HubError::io(&path, "open"))?;
        let within = target.starts_with(&self.root)
            || self.blobs.as_ref().is_some_and(|blobs| target.starts_with(blobs));
        if !within {
            return Err(HubError::Escapes { path, target, allowed: self.root.clone() });
        }
        if !target.is_file() {
            return Err(HubError::NotAFile { path });
        }
        Ok(path)
    }

    /// The file `name` in the directory, or in a directory of it, or `None` where there is no such entry.
    pub(crate) fn optional(&self, name: &str) -> Result<Option<PathBuf>, HubError> {
        let path = self.root.join(name);
        match path.symlink_metadata() {
            Ok(_) => self.check(path).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(HubError::Io { path, action: "open", source }),
        }
    }
}

/// Says why `name` is not a plain file name, or `None` where it is one.
pub(crate) fn not_plain(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("empty file name")
    } else if name.contains(['/', '\\']) {
        Some("must be a plain file name without a directory")
    } else if name == "." || name == ".." {
        Some("must be a plain file name, not a directory")
    } else if name.contains('\0') {
        Some("contains a NUL byte")
    } else {
        None
    }
}

/// Reads a text file of at most `limit` bytes.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<String, HubError> {
    let file = File::open(path).map_err(HubError::io(path, "open"))?;
    let bytes = file.metadata().map_err(HubError::io(path, "read"))?.len();
    if bytes > limit {
        return Err(HubError::TooLarge { path: path.to_owned(), bytes, limit });
    }
    let mut text = String::new();
    file.take(limit).read_to_string(&mut text).map_err(HubError::io(path, "read"))?;
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn plain_names() {
        for name in ["a.safetensors", "model-00001-of-00002.safetensors", "..x"] {
            assert_eq!(not_plain(name), None, "{name}");
        }
        for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b"] {
            assert!(not_plain(name).is_some(), "{name:?}");
        }
    }

    #[test]
    fn bounded_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_small(&path, 5).unwrap(), "12345");
        assert!(matches!(read_small(&path, 4), Err(HubError::TooLarge { bytes: 5, limit: 4, .. })));
        assert!(matches!(read_small(&dir.path().join("y"), 4), Err(HubError::Io { action: "open", .. })));
    }
}
