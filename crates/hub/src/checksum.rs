//! SHA-256 manifests of a model directory in the format of coreutils' `sha256sum` (`SHA256SUMS`), so that
//! `sha256sum -c SHA256SUMS` and this module accept each other's files.
//!
//! Owns: hashing by streaming, writing, parsing and checking manifests. Never follows a name or a link out of
//! the directory (except to the blobs of the same repository in the local store).

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::HubError;
use crate::files::{Bounds, read_small};

/// Name of the manifest.
pub const MANIFEST_NAME: &str = "SHA256SUMS";
const MAX_MANIFEST_BYTES: u64 = 16 << 20;
const MAX_FILES: usize = 100_000;
const MAX_DEPTH: usize = 8;
const BUFFER_BYTES: usize = 1 << 20;

/// How far a long computation over files is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashProgress<'a> {
    /// The file being read, relative to the directory.
    pub file: &'a str,
    /// Bytes of all files read so far.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
}

/// A SHA-256 digest, shown in lower-case hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256Digest(pub [u8; 32]);

impl Sha256Digest {
    /// Reads 64 hexadecimal digits of either case.
    pub fn from_hex(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        if bytes.len() != 64 {
            return None;
        }
        let mut digest = [0_u8; 32];
        for (slot, pair) in digest.iter_mut().zip(bytes.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16)?;
            let low = char::from(pair[1]).to_digit(16)?;
            *slot = u8::try_from(high * 16 + low).ok()?;
        }
        Some(Self(digest))
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One line of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the directory, with `/`.
    pub file: String,
    /// The file's digest.
    pub digest: Sha256Digest,
}

/// One file that is not as the manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Path relative to the directory.
    pub file: String,
    /// The manifest's digest.
    pub expected: Sha256Digest,
    /// The file's digest, or why it could not be read.
    pub got: Result<Sha256Digest, String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.got {
            Ok(got) => write!(f, "{}: expected sha256 {}, got {got}", self.file, self.expected),
            Err(reason) => {
                write!(f, "{}: expected sha256 {}, got no file: {reason}", self.file, self.expected)
            }
        }
    }
}

/// What [`verify`] found where every listed file is intact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Number of files checked.
    pub files: usize,
    /// Bytes read.
    pub bytes: u64,
    /// Files in the directory that the manifest does not list, sorted.
    pub unlisted: Vec<String>,
}

/// Digest of one file, read in pieces of 1 MiB; `on_bytes` is told of each piece's size.
///
/// # Errors
/// [`HubError::Io`].
pub fn hash_file(path: &Path, mut on_bytes: impl FnMut(u64)) -> Result<Sha256Digest, HubError> {
    let mut file = File::open(path).map_err(HubError::io(path, "open"))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Sha256Digest(hasher.finalize().into())),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                on_bytes(count as u64);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(HubError::Io { path: path.to_owned(), action: "read", source }),
        }
    }
}

/// Hashes every file of `dir` (hidden entries and the manifest itself excepted) and writes the manifest
/// beside them, atomically. Returns its entries, sorted by file.
///
/// # Errors
/// I/O, a link that leads out, too many files.
pub fn write_manifest(
    dir: &Path,
    mut progress: impl FnMut(HashProgress<'_>),
) -> Result<Vec<Entry>, HubError> {
    let bounds = Bounds::of_dir(dir)?;
    let files = list_files(&bounds)?;
    let bytes_total = files.values_sum();
    let mut bytes_done = 0;
    let mut entries = Vec::with_capacity(files.0.len());
    let mut text = String::new();
    for (file, _) in &files.0 {
        let digest = hash_file(&bounds.root().join(file), |bytes| {
            bytes_done += bytes;
            progress(HashProgress { file, bytes_done, bytes_total });
        })?;
        let (mark, escaped) = escape(file);
        text.push_str(&format!("{mark}{digest}  {escaped}\n"));
        entries.push(Entry { file: file.clone(), digest });
    }
    let target = bounds.root().join(MANIFEST_NAME);
    let partial = bounds.root().join(format!(".{MANIFEST_NAME}.{}", std::process::id()));
    let written = write_synced(&partial, text.as_bytes())
        .and_then(|()| std::fs::rename(&partial, &target).map_err(HubError::io(&target, "write")));
    if written.is_err() {
        // Best effort: the error that matters is the one being returned.
        let _ = std::fs::remove_file(&partial);
    }
    written.map(|()| entries)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    let mut file = File::create(path).map_err(HubError::io(path, "create"))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(HubError::io(path, "write"))
}

/// Reads the manifest of `dir`.
///
/// # Errors
/// [`HubError::BadManifest`] with the line for anything that is not a digest and a path within the
/// directory; I/O.
pub fn read_manifest(dir: &Path) -> Result<Vec<Entry>, HubError> {
    let path = dir.join(MANIFEST_NAME);
    let text = read_small(&path, MAX_MANIFEST_BYTES)?;
    let mut entries = Vec::new();
    let mut seen = BTreeSet::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = |reason: String| HubError::BadManifest { path: path.clone(), line: number + 1, reason };
        let entry = parse_line(line).map_err(bad)?;
        if !seen.insert(entry.file.clone()) {
            return Err(bad(format!("{}: listed twice", entry.file)));
        }
        entries.push(entry);
    }
    if entries.is_empty() {
        return Err(HubError::BadManifest { path, line: 1, reason: "lists no file".into() });
    }
    Ok(entries)
}

/// Checks every file that the manifest of `dir` lists, all of them even after the first failure.
///
/// # Errors
/// [`HubError::Checksum`] with every file that is wrong or missing; [`HubError::BadManifest`]; I/O on the
/// directory itself.
pub fn verify(dir: &Path, mut progress: impl FnMut(HashProgress<'_>)) -> Result<Verified, HubError> {
    let bounds = Bounds::of_dir(dir)?;
    let entries = read_manifest(bounds.root())?;
    let size = |entry: &Entry| bounds.root().join(&entry.file).metadata().map_or(0, |data| data.len());
    let bytes_total = entries.iter().map(size).sum();
    let mut bytes_done = 0;
    let mut failures = Vec::new();
    for Entry { file, digest } in &entries {
        let got = bounds.check(bounds.root().join(file)).and_then(|path| {
            hash_file(&path, |bytes| {
                bytes_done += bytes;
                progress(HashProgress { file, bytes_done, bytes_total });
            })
        });
        let got = got.map_err(|error| error.to_string());
        if got.as_ref() != Ok(digest) {
            failures.push(Failure { file: file.clone(), expected: *digest, got });
        }
    }
    if !failures.is_empty() {
        return Err(HubError::Checksum { dir: dir.to_owned(), failures });
    }
    let listed: BTreeSet<&str> = entries.iter().map(|entry| entry.file.as_str()).collect();
    let unlisted = list_files(&bounds)?
        .0
        .into_iter()
        .map(|(file, _)| file)
        .filter(|file| !listed.contains(file.as_str()))
        .collect();
    Ok(Verified { files: entries.len(), bytes: bytes_done, unlisted })
}

/// Relative paths with sizes in bytes, sorted.
struct Listing(Vec<(String, u64)>);

impl Listing {
    fn values_sum(&self) -> u64 {
        self.0.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// All regular files of the directory, to a depth of [`MAX_DEPTH`].
fn list_files(bounds: &Bounds) -> Result<Listing, HubError> {
    let root = bounds.root();
    let mut files = Vec::new();
    let mut pending: Vec<(PathBuf, String, usize)> = vec![(root.to_owned(), String::new(), 0)];
    while let Some((dir, prefix, depth)) = pending.pop() {
        for entry in std::fs::read_dir(&dir).map_err(HubError::io(&dir, "list"))? {
            let entry = entry.map_err(HubError::io(&dir, "list"))?;
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                return Err(HubError::BadManifest {
                    path: root.join(MANIFEST_NAME),
                    line: 0,
                    reason: format!("{}: file name is not UTF-8", path.display()),
                });
            };
            if name.starts_with('.') || (depth == 0 && name == MANIFEST_NAME) {
                continue;
            }
            let kind = entry.file_type().map_err(HubError::io(&path, "read"))?;
            let relative = format!("{prefix}{name}");
            if kind.is_dir() {
                if depth < MAX_DEPTH {
                    pending.push((path, format!("{relative}/"), depth + 1));
                }
                continue;
            }
            let path = bounds.check(path)?;
            if files.len() >= MAX_FILES {
                return Err(HubError::TooManyFiles { dir: root.to_owned(), limit: MAX_FILES });
            }
            let bytes = path.metadata().map_err(HubError::io(&path, "read"))?.len();
            files.push((relative, bytes));
        }
    }
    files.sort_unstable();
    Ok(Listing(files))
}

/// coreutils puts a backslash before the line of a file whose name holds a backslash or a line break.
fn escape(file: &str) -> (&'static str, String) {
    if file.contains(['\\', '\n', '\r']) {
        ("\\", file.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r"))
    } else {
        ("", file.to_owned())
    }
}

fn unescape(text: &str) -> Result<String, String> {
    let mut file = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let real = match c {
            '\\' => match chars.next() {
                Some('\\') => '\\',
                Some('n') => '\n',
                Some('r') => '\r',
                other => return Err(format!("unknown escape \\{}", other.unwrap_or(' '))),
            },
            other => other,
        };
        file.push(real);
    }
    Ok(file)
}

fn parse_line(line: &str) -> Result<Entry, String> {
    let (rest, escaped) = match line.strip_prefix('\\') {
        Some(rest) => (rest, true),
        None => (line, false),
    };
    let (hex, rest) = rest.split_once(' ').ok_or("expected a digest, two spaces and a file name")?;
    let digest = Sha256Digest::from_hex(hex).ok_or("the digest is not 64 hexadecimal digits")?;
    let name = rest.strip_prefix([' ', '*']).ok_or("expected a space or '*' before the file name")?;
    let file = if escaped { unescape(name)? } else { name.to_owned() };
    // `sha256sum ./*` writes a leading `./`.
    let file = file.strip_prefix("./").unwrap_or(&file).to_owned();
    if file.is_empty() || file.contains('\0') {
        return Err("empty or invalid file name".into());
    }
    let plain = Path::new(&file).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain {
        return Err(format!("{file:?}: must stay within the directory"));
    }
    Ok(Entry { file, digest })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stderr)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn dir_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        dir
    }

    #[test]
    fn published_vectors() {
        let dir = dir_with(&[("empty", b""), ("abc", b"abc")]);
        assert_eq!(hash_file(&dir.path().join("empty"), |_| {}).unwrap().to_string(), EMPTY);
        assert_eq!(hash_file(&dir.path().join("abc"), |_| {}).unwrap().to_string(), ABC);
        // A file larger than the buffer: one million letters, from FIPS 180.
        std::fs::write(dir.path().join("a"), vec![b'a'; 1_000_000]).unwrap();
        let digest = hash_file(&dir.path().join("a"), |_| {}).unwrap();
        assert_eq!(digest.to_string(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
        assert_eq!(format!("{:?}", Sha256Digest::from_hex(ABC).unwrap()), ABC);
        assert_eq!(Sha256Digest::from_hex("zz"), None);
        assert_eq!(Sha256Digest::from_hex(&"g".repeat(64)), None);
    }

    #[test]
    fn write_then_verify() {
        let dir = dir_with(&[
            ("abc", b"abc"),
            ("sub/empty", b""),
            (".hidden", b"x"),
            ("back\\slash\nname", b"abc"),
        ]);
        let mut last = None;
        let entries = write_manifest(dir.path(), |p| last = Some((p.bytes_done, p.bytes_total))).unwrap();
        assert_eq!(last, Some((6, 6)));
        assert_eq!(entries.len(), 3);
        assert_eq!(read_manifest(dir.path()).unwrap(), entries);
        let text = std::fs::read_to_string(dir.path().join(MANIFEST_NAME)).unwrap();
        assert!(text.contains(&format!("{EMPTY}  sub/empty\n")), "{text}");
        assert!(text.contains(&format!("\\{ABC}  back\\\\slash\\nname\n")), "{text}");
        let verified = verify(dir.path(), |_| {}).unwrap();
        assert_eq!(verified, Verified { files: 3, bytes: 6, unlisted: vec![] });
        std::fs::write(dir.path().join("new"), b"n").unwrap();
        assert_eq!(verify(dir.path(), |_| {}).unwrap().unlisted, ["new"]);
    }

    #[test]
    fn coreutils_agrees() {
        let dir = dir_with(&[("abc", b"abc"), ("empty", b""), ("back\\slash", b"x")]);
        write_manifest(dir.path(), |_| {}).unwrap();
        let check = std::process::Command::new("sha256sum")
            .args(["--check", "--strict", MANIFEST_NAME])
            .current_dir(dir.path())
            .output();
        let Ok(check) = check else {
            eprintln!("skipped: no sha256sum");
            return;
        };
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    }

    #[test]
    fn every_wrong_file_is_named() {
        let dir = dir_with(&[("a", b"abc"), ("b", b"abc"), ("c", b"abc")]);
        write_manifest(dir.path(), |_| {}).unwrap();
        std::fs::write(dir.path().join("a"), b"").unwrap();
        std::fs::remove_file(dir.path().join("c")).unwrap();
        let error = verify(dir.path(), |_| {}).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("a: expected sha256 {ABC}, got {EMPTY}")), "{text}");
        assert!(text.contains("\n  c: expected") && text.contains("got no file"), "{text}");
        assert!(matches!(error, HubError::Checksum { failures, .. } if failures.len() == 2));
    }

    #[test]
    fn bad_manifests() {
        for (line, word) in [
            ("nothing", "expected a digest"),
            ("abcd  file", "64 hexadecimal"),
            (&*format!("{ABC} file"), "before the file name"),
            (&*format!("{ABC}  "), "empty"),
            (&*format!("{ABC}  ../file"), "within the directory"),
            (&*format!("{ABC}  /etc/passwd"), "within the directory"),
            (&*format!("{ABC}  a/../../b"), "within the directory"),
            (&*format!("\\{ABC}  a\\q"), "unknown escape"),
            (&*format!("{ABC}  a\n{ABC} *a"), "twice"),
            ("# only a remark", "lists no file"),
        ] {
            let dir = dir_with(&[(MANIFEST_NAME, line.as_bytes())]);
            let error = verify(dir.path(), |_| {}).unwrap_err();
            assert!(matches!(error, HubError::BadManifest { .. }), "{line}: {error}");
            assert!(error.to_string().contains(word), "{line}: {error}");
        }
        let dir = dir_with(&[]);
        assert!(matches!(verify(dir.path(), |_| {}), Err(HubError::Io { .. })));
    }

    #[test]
    fn binary_mark_and_dot_slash_are_read() {
        let text = format!("{ABC} *abc\n{}  ./x\n", EMPTY.to_uppercase());
        let dir = dir_with(&[("abc", b"abc"), ("x", b""), (MANIFEST_NAME, text.as_bytes())]);
        assert_eq!(verify(dir.path(), |_| {}).unwrap().files, 2);
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_out_are_refused() {
        let outside = dir_with(&[("secret", b"abc")]);
        let text = format!("{ABC}  link\n");
        let dir = dir_with(&[(MANIFEST_NAME, text.as_bytes())]);
        std::os::unix::fs::symlink(outside.path().join("secret"), dir.path().join("link")).unwrap();
        let error = verify(dir.path(), |_| {}).unwrap_err().to_string();
        assert!(error.contains("outside"), "{error}");
        assert!(matches!(write_manifest(dir.path(), |_| {}), Err(HubError::Escapes { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn unwritable_directory_is_named() {
        let dir = dir_with(&[("a", b"abc")]);
        // A directory where the manifest should be: the rename fails and no partial file is left.
        std::fs::create_dir_all(dir.path().join(MANIFEST_NAME).join("x")).unwrap();
        let error = write_manifest(dir.path(), |_| {}).unwrap_err().to_string();
        assert!(error.contains(MANIFEST_NAME) && error.contains("cannot write"), "{error}");
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 2);
    }
}
