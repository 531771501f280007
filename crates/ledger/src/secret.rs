//! Versioned secrets, the text of their files, and the keyed hashes made with them.
//!
//! Owns HMAC-SHA256 with a purpose in front, so that one secret used twice by mistake still gives unrelated
//! hashes. Never prints a secret, and reads no file.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::value::{Hash, Hex};

/// Fewest bytes of a secret.
pub const MIN_SECRET: usize = 32;

/// A secret of less than 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret has {0} bytes, at least {MIN_SECRET} are needed")]
pub struct ShortSecret(pub usize);

/// Most secrets of a file: the one that makes, and those that still verify.
pub const MAX_VERSIONS: usize = 16;

/// Most bytes of one secret.
pub const MAX_SECRET: usize = 1024;

/// A file of secrets cannot be used. Never quotes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretFileError {
    /// No line holds a secret.
    #[error("holds no secret; a line is `VERSION SECRET`")]
    Empty,
    /// More than are ever needed at once.
    #[error("more than {MAX_VERSIONS} secrets")]
    TooMany,
    /// A line is not a version and a secret.
    #[error("line {line}: not `VERSION SECRET` with a version from 1 to {max}", max = u32::MAX)]
    Shape {
        /// Its line, from 1.
        line: usize,
    },
    /// A secret that could be guessed, or no secret at all.
    #[error("line {line}: the secret has {bytes} bytes, it must have {MIN_SECRET} to {MAX_SECRET}")]
    Length {
        /// Its line, from 1.
        line: usize,
        /// How many it has.
        bytes: usize,
    },
    /// A version comes twice.
    #[error("line {line}: version {version} was there before")]
    Twice {
        /// The second one's line, from 1.
        line: usize,
        /// Which version.
        version: u32,
    },
}

/// The secrets of a file, newest (highest version) first: that one makes, all of them verify. A line is
/// `VERSION SECRET`, the secret being printable ASCII without spaces; empty lines and lines that start with `#`
/// do not count.
///
/// # Errors
/// The first line that cannot be used, or that there is none; nothing of the file is used then.
pub fn parse_versions(text: &str) -> Result<Vec<(u32, Vec<u8>)>, SecretFileError> {
    let mut all: Vec<(u32, Vec<u8>)> = Vec::new();
    for (line, content) in (1..).zip(text.lines().map(str::trim)) {
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let (version, secret) = content.split_once([' ', '\t']).ok_or(SecretFileError::Shape { line })?;
        let secret = secret.trim_start().as_bytes();
        let version = version.parse().ok().filter(|version| *version > 0);
        let (Some(version), true) = (version, secret.iter().all(u8::is_ascii_graphic)) else {
            return Err(SecretFileError::Shape { line });
        };
        if !(MIN_SECRET..=MAX_SECRET).contains(&secret.len()) {
            return Err(SecretFileError::Length { line, bytes: secret.len() });
        }
        if all.iter().any(|(other, _)| *other == version) {
            return Err(SecretFileError::Twice { line, version });
        }
        if all.len() == MAX_VERSIONS {
            return Err(SecretFileError::TooMany);
        }
        all.push((version, secret.to_vec()));
    }
    if all.is_empty() {
        return Err(SecretFileError::Empty);
    }
    all.sort_unstable_by_key(|(version, _)| std::cmp::Reverse(*version));
    Ok(all)
}

#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl Secret {
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, ShortSecret> {
        if bytes.len() < MIN_SECRET {
            return Err(ShortSecret(bytes.len()));
        }
        Ok(Self(bytes.to_vec()))
    }

    fn mac(&self, purpose: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(purpose);
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    pub(crate) fn hash(&self, purpose: &[u8], parts: &[&[u8]]) -> Hash {
        Hex(self.mac(purpose, parts).finalize().into_bytes().into())
    }

    /// Takes the same time whatever the answer.
    pub(crate) fn made(&self, purpose: &[u8], parts: &[&[u8]], hash: &Hash) -> bool {
        self.mac(purpose, parts).verify_slice(&hash.0).is_ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_newest_first() {
        let (old, new) = ("o".repeat(32), "n".repeat(40));
        let text = format!("# made in May\n\n 1 {old}\r\n10\t {new} \n");
        let all = parse_versions(&text).unwrap();
        assert_eq!(all, [(10, new.into_bytes()), (1, old.into_bytes())]);
    }

    #[test]
    fn a_bad_file_is_named_by_line_and_never_quoted() {
        let good = "k4n4ry".repeat(6);
        let many: String = (1..=17).map(|version| format!("{version} {good}\n")).collect();
        let cases = [
            (String::new(), "holds no secret"),
            ("# 1 only a comment".into(), "holds no secret"),
            (format!("1 {good}\n{good}"), "line 2: not"),
            (format!("0 {good}"), "line 1: not"),
            (format!("-1 {good}"), "line 1: not"),
            (format!("4294967296 {good}"), "line 1: not"),
            (format!("one {good}"), "line 1: not"),
            (format!("1 {good} {good}"), "line 1: not"),
            (format!("1 {good}\u{e9}"), "line 1: not"),
            ("1 k4n4ry".into(), "line 1: the secret has 6 bytes"),
            (format!("1 {}", "k4n4ry".repeat(200)), "line 1: the secret has 1200 bytes"),
            (format!("7 {good}\n#\n7 {good}x"), "line 3: version 7 was there"),
            (many, "more than 16 secrets"),
        ];
        for (text, words) in cases {
            let error = parse_versions(&text).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("k4n4ry"), "{error} / {words}");
        }
    }
}
