//! Small files that the operator names: keys and certificates.
//!
//! Owns how they are opened: regular files of a bounded size. What is in them belongs to whoever asks. Reading
//! blocks, so it is called from threads that may.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Most bytes of a file.
pub(crate) const MAX_BYTES: u64 = 1 << 20;

/// A file's bytes.
///
/// # Errors
/// [`ErrorKind::FileTooLarge`] beyond [`MAX_BYTES`]; [`ErrorKind::InvalidInput`] for anything but a regular file
/// (whoever opens a pipe waits for its other end, for ever); and the system's.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    // Before it is opened, for opening a pipe is what waits; and after, for what was really opened.
    check(&path.metadata()?)?;
    let file = File::open(path)?;
    check(&file.metadata()?)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("longer than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

fn check(data: &std::fs::Metadata) -> Result<()> {
    if data.is_file() { Ok(()) } else { Err(Error::new(ErrorKind::InvalidInput, "not a regular file")) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let content = vec![b'x'; MAX_BYTES as usize];
        std::fs::write(&path, &content).unwrap();
        assert_eq!(read(&path).unwrap(), content);
        std::fs::write(&path, [content, vec![b'x']].concat()).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::FileTooLarge);
        for other in [directory.path(), Path::new("/dev/null")] {
            assert_eq!(read(other).unwrap_err().kind(), ErrorKind::InvalidInput, "{}", other.display());
        }
        assert_eq!(read(&directory.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_pipe_that_nobody_writes_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let (told, result) = std::sync::mpsc::channel();
        std::thread::spawn(move || told.send(read(&path).unwrap_err().kind()));
        let kind = result.recv_timeout(std::time::Duration::from_secs(60));
        assert_eq!(kind, Ok(ErrorKind::InvalidInput));
    }
}
