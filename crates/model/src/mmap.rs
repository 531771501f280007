//! Bytes of a file, mapped or held.
//!
//! Owns the only unsafe code of this crate. Mappings live while a model is loaded and no longer: backends copy
//! what they keep, so a file that is truncated while serving cannot fault a running server.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::PathBuf;

use memmap2::Mmap;

use crate::error::{ModelError, Result};

/// Where a file's bytes come from.
#[derive(Clone, Debug)]
pub enum FileSource {
    /// A regular file.
    Path(PathBuf),
    /// Compiled into the program, or made by a test.
    Static(&'static [u8]),
}

/// A file's bytes.
#[derive(Debug)]
pub enum FileBytes {
    /// Of a mapped file.
    Mapped(Mmap),
    /// In the program.
    Static(&'static [u8]),
}

impl FileSource {
    /// Makes the bytes readable.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or is not a regular file.
    pub fn open(&self, name: &str) -> Result<FileBytes> {
        let path = match self {
            Self::Static(bytes) => return Ok(FileBytes::Static(bytes)),
            Self::Path(path) => path,
        };
        let io = |source| ModelError::Io { file: name.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(ModelError::corrupt(name, "file", "not a regular file"));
        }
        if meta.len() == 0 {
            // An empty mapping is an error on some systems; an empty file is an error of its format.
            return Ok(FileBytes::Static(&[]));
        }
        // SAFETY: the mapping is read-only and private to this process. Rust cannot exclude that another
        // process changes the file meanwhile; its bytes are only ever read as plain integers and floats, for
        // which every pattern is valid, and every offset was checked against the length at mapping time.
        // Truncation by another process while loading ends this process by a signal, before it serves anyone.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(FileBytes::Mapped(map))
    }

    /// Reads a small file whole.
    ///
    /// # Errors
    /// It cannot be read, or is larger than `limit`.
    pub fn read(&self, name: &str, limit: usize) -> Result<Vec<u8>> {
        let bytes = self.open(name)?;
        let bytes = bytes.as_ref();
        if bytes.len() > limit {
            let why = format!("{} bytes, at most {limit} are read", bytes.len());
            return Err(ModelError::corrupt(name, "file", why));
        }
        Ok(bytes.to_vec())
    }
}

impl AsRef<[u8]> for FileBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn maps_files_and_refuses_what_is_none() {
        let dir = std::env::temp_dir();
        let e = FileSource::Path(dir.clone()).open("d").unwrap_err();
        assert!(e.to_string().starts_with("d: "), "{e}");
        let e = FileSource::Path(dir.join("mirai-does-not-exist")).open("x").unwrap_err();
        assert!(matches!(e, ModelError::Io { .. }), "{e}");
        let path = dir.join(format!("mirai-mmap-{}", std::process::id()));
        std::fs::write(&path, b"abc").unwrap();
        let source = FileSource::Path(path.clone());
        assert_eq!(source.read("f", 3).unwrap(), b"abc");
        assert!(source.read("f", 2).unwrap_err().to_string().contains("3 bytes, at most 2"));
        std::fs::write(&path, b"").unwrap();
        assert!(source.open("f").unwrap().as_ref().is_empty());
        std::fs::remove_file(path).unwrap();
    }
}
