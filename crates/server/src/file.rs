//! Small files that an operator mounts: keys, applications, secrets, authorities.
//!
//! Owns how such a file is opened and the bound on what is read of it; never what is in it.

use std::io::Read;
use std::path::{Path, PathBuf};

/// Why a file cannot be read. Never repeats what is in it.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A pipe, a device or a folder: reading it may never end.
    #[error("{}: not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// It is larger than anything of its kind.
    #[error("{}: longer than {limit} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Most bytes.
        limit: u64,
    },
}

/// All of a file. It may wait for a disk: not for threads that serve connections.
///
/// # Errors
/// It cannot be read, is no regular file, or is longer than `limit`.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let fail = |source| FileError::Read { path: path.to_owned(), source };
    let regular = |data: std::fs::Metadata| {
        if data.is_file() { Ok(()) } else { Err(FileError::NotRegular { path: path.to_owned() }) }
    };
    // Before it is opened, for to open a pipe is to wait for who writes it; and after, for what was really opened.
    regular(std::fs::metadata(path).map_err(fail)?)?;
    let file = std::fs::File::open(path).map_err(fail)?;
    regular(file.metadata().map_err(fail)?)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > limit {
        return Err(FileError::TooLong { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// The same, of a file that is text.
///
/// # Errors
/// Those of [`read`], and bytes that are not UTF-8.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, FileError> {
    let not_text = |_| FileError::Read {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, "not valid UTF-8"),
    };
    String::from_utf8(read(path, limit)?).map_err(not_text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_a_bounded_length_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let error = |path: &Path| read_text(path, 4).unwrap_err().to_string();
        assert!(error(&path).contains("file: "));
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read_text(&path, 4).unwrap(), "four");
        std::fs::write(&path, "fives").unwrap();
        assert!(error(&path).contains("longer than 4 bytes"));
        std::fs::write(&path, b"\xff").unwrap();
        assert!(error(&path).contains("UTF-8"));
        assert!(error(directory.path()).contains("not a regular file"));
        assert!(error(Path::new("/dev/zero")).contains("not a regular file"));
        let pipe = directory.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        if made.is_ok_and(|status| status.success()) {
            assert!(error(&pipe).contains("not a regular file"), "opening it would wait for ever");
        }
    }
}
