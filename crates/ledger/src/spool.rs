//! What waits on the disk while the store is out of reach.
//!
//! Owns one bounded file of frames, each one batch of rows, synced before it counts. A frame is whole or it
//! never was; damage anywhere but at the end is an error, never a silent loss. Rows in it are merged into the
//! store later, so replaying a frame twice does nothing.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::row::Row;

const MAGIC: &[u8; 8] = b"MIRSPL1\n";
/// Magic, length, the first half of the body's SHA-256.
const HEADER: usize = 8 + 4 + 16;
/// No frame is larger: a batch is bounded, and so is a row.
const MAX_FRAME: usize = 64 << 20;
/// The most that one row takes in a frame: the fields' names, and texts whose every byte may need a backslash.
pub(crate) const MAX_ROW_BYTES: u64 = 12 * 1024;

/// What can go wrong with a spool.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file cannot be used.
    #[error("spool {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("spool {0} is in use by another process")]
    Locked(PathBuf),
    /// There is no room for the frame.
    #[error("the spool holds {held} of {limit} bytes; {frame} more do not fit")]
    Full {
        /// Bytes in it.
        held: u64,
        /// Its bound.
        limit: u64,
        /// What was to be added.
        frame: u64,
    },
    /// A frame is damaged that others follow.
    #[error("spool {path}: damaged at byte {offset} of {length}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the damaged frame begins.
        offset: u64,
        /// The file's length.
        length: u64,
    },
    /// A frame's rows cannot be read.
    #[error("spool {path}: frame at byte {offset}: {error}")]
    Rows {
        /// The file.
        path: PathBuf,
        /// Where the frame begins.
        offset: u64,
        /// Why; names a place, no value.
        error: String,
    },
}

/// A file, as far as a spool needs one. Tests put faults behind it.
pub(crate) trait Disk: Send {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
    fn truncate(&mut self, length: u64) -> io::Result<()>;
    fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>>;
    fn length(&mut self) -> io::Result<u64>;
}

struct OnDisk(File);

impl Disk for OnDisk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.seek(SeekFrom::End(0))?;
        self.0.write_all(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }
    fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        self.0.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        (&mut self.0).take(length as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
    fn length(&mut self) -> io::Result<u64> {
        self.0.metadata().map(|meta| meta.len())
    }
}

/// The spool's file.
pub struct Spool {
    disk: Box<dyn Disk>,
    path: PathBuf,
    limit: u64,
    /// Bytes of whole frames.
    length: u64,
    /// A sync failed: what the file holds is no longer known, and it takes nothing more.
    broken: bool,
}

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spool")
            .field("path", &self.path)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl Spool {
    /// Opens a spool of at most `limit` bytes, and checks what an earlier process left in it.
    ///
    /// # Errors
    /// Another process has it, it cannot be used, or it is damaged.
    pub fn open(path: &Path, limit: u64) -> Result<Self, SpoolError> {
        let io = |source| SpoolError::Io { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o660);
        let file = options.open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SpoolError::Locked(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()).map_err(io)?;
        Self::on(Box::new(OnDisk(file)), path, limit)
    }

    pub(crate) fn on(disk: Box<dyn Disk>, path: &Path, limit: u64) -> Result<Self, SpoolError> {
        let mut spool = Self { disk, path: path.to_owned(), limit, length: 0, broken: false };
        spool.scan()?;
        Ok(spool)
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Its bound, bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    fn io(&self, source: io::Error) -> SpoolError {
        SpoolError::Io { path: self.path.clone(), source }
    }

    /// Adds one batch. It is durable when this returns; if this fails, it is not there.
    ///
    /// # Errors
    /// There is no room, or the disk failed. After a failed sync the spool takes nothing more.
    pub fn append(&mut self, rows: &[Row]) -> Result<(), SpoolError> {
        let body = serde_json::to_vec(rows).map_err(|error| self.io(error.into()))?;
        let frame = (HEADER + body.len()) as u64;
        if self.broken || self.length + frame > self.limit || body.len() > MAX_FRAME {
            return Err(SpoolError::Full { held: self.length, limit: self.limit, frame });
        }
        let mut bytes = Vec::with_capacity(frame as usize);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&Sha256::digest(&body)[..16]);
        bytes.extend_from_slice(&body);
        let written = self.disk.append(&bytes);
        let synced = written.is_ok();
        if let Err(error) = written.and_then(|()| self.disk.sync()) {
            // A frame that did not fit is taken back. After a failed sync nothing is certain.
            let back = self.disk.truncate(self.length).and_then(|()| self.disk.sync());
            self.broken = synced || back.is_err();
            return Err(self.io(error));
        }
        self.length += frame;
        Ok(())
    }

    /// Whether a sync failed.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The batch that begins at a byte, and where the next one does; `None` at the end.
    ///
    /// # Errors
    /// The disk failed, or the rows cannot be read.
    pub fn batch(&mut self, offset: u64) -> Result<Option<(Vec<Row>, u64)>, SpoolError> {
        let Some(body) = self.frame(offset, self.length)? else { return Ok(None) };
        let next = offset + (HEADER + body.len()) as u64;
        match serde_json::from_slice(&body) {
            Ok(rows) => Ok(Some((rows, next))),
            Err(error) => {
                let (line, column) = (error.line(), error.column());
                let error = format!("{:?} at {line}:{column}", error.classify());
                Err(SpoolError::Rows { path: self.path.clone(), offset, error })
            }
        }
    }

    /// Empties it, once the store has everything.
    ///
    /// # Errors
    /// The disk failed.
    pub fn clear(&mut self) -> Result<(), SpoolError> {
        self.disk.truncate(0).and_then(|()| self.disk.sync()).map_err(|error| self.io(error))?;
        (self.length, self.broken) = (0, false);
        Ok(())
    }

    /// The body of a whole frame; `None` if there is none at this place.
    fn frame(&mut self, offset: u64, end: u64) -> Result<Option<Vec<u8>>, SpoolError> {
        if offset + HEADER as u64 > end {
            return Ok(None);
        }
        let header = self.disk.read(offset, HEADER).map_err(|error| self.io(error))?;
        let (Some(magic), Some(length), Some(digest)) =
            (header.get(..8), header.get(8..12), header.get(12..))
        else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(length.try_into().unwrap_or_default()) as usize;
        if magic != MAGIC || length > MAX_FRAME || offset + (HEADER + length) as u64 > end {
            return Ok(None);
        }
        let body = self.disk.read(offset + HEADER as u64, length).map_err(|error| self.io(error))?;
        Ok((body.len() == length && Sha256::digest(&body)[..16] == *digest).then_some(body))
    }

    /// Finds the end of the last whole frame, and removes what an interrupted append left after it.
    fn scan(&mut self) -> Result<(), SpoolError> {
        let end = self.disk.length().map_err(|error| self.io(error))?;
        let mut offset = 0;
        while let Some(body) = self.frame(offset, end)? {
            offset += (HEADER + body.len()) as u64;
        }
        self.length = offset;
        if offset == end {
            return Ok(());
        }
        // Each frame was synced before the next: whole frames after a broken one mean that it broke later.
        let rest = self.disk.read(offset + 1, MAX_FRAME + HEADER).map_err(|error| self.io(error))?;
        for at in memory_find(&rest, MAGIC) {
            if self.frame(offset + 1 + at as u64, end)?.is_some() {
                return Err(SpoolError::Damaged { path: self.path.clone(), offset, length: end });
            }
        }
        self.disk.truncate(offset).and_then(|()| self.disk.sync()).map_err(|error| self.io(error))
    }
}

fn memory_find<'a>(bytes: &'a [u8], what: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    bytes.windows(what.len()).enumerate().filter(move |(_, window)| *window == what).map(|(at, _)| at)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A file in memory that fails when it is told to.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Content>>);

    #[derive(Default)]
    struct Content {
        bytes: Vec<u8>,
        fail_append: Option<usize>,
        fail_sync: bool,
        fail_truncate: bool,
    }

    impl Disk for Memory {
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            let mut content = self.0.lock().unwrap();
            let part = content.fail_append.unwrap_or(bytes.len());
            content.bytes.extend_from_slice(&bytes[..part]);
            if part < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
        fn sync(&mut self) -> io::Result<()> {
            if self.0.lock().unwrap().fail_sync { Err(io::Error::other("no sync")) } else { Ok(()) }
        }
        fn truncate(&mut self, length: u64) -> io::Result<()> {
            let mut content = self.0.lock().unwrap();
            if content.fail_truncate {
                return Err(io::Error::other("no truncation"));
            }
            content.bytes.truncate(length as usize);
            Ok(())
        }
        fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
            let content = self.0.lock().unwrap();
            let from = content.bytes.get(offset as usize..).unwrap_or_default();
            Ok(from[..length.min(from.len())].to_vec())
        }
        fn length(&mut self) -> io::Result<u64> {
            Ok(self.0.lock().unwrap().bytes.len() as u64)
        }
    }

    fn row(n: u64) -> Row {
        Row { id: format!("R{n}"), completion_tokens: n, ..Row::default() }
    }

    fn spool(memory: &Memory) -> Result<Spool, SpoolError> {
        Spool::on(Box::new(memory.clone()), Path::new("spool"), 100_000)
    }

    fn all(spool: &mut Spool) -> Vec<Row> {
        let (mut rows, mut at) = (Vec::new(), 0);
        while let Some((batch, next)) = spool.batch(at).unwrap() {
            rows.extend(batch);
            at = next;
        }
        assert_eq!(at, spool.len());
        rows
    }

    /// Two frames, and where the second begins.
    fn two(memory: &Memory) -> u64 {
        let mut spool = spool(memory).unwrap();
        spool.append(&[row(1), row(2)]).unwrap();
        let at = spool.len();
        spool.append(&[row(3)]).unwrap();
        assert_eq!(all(&mut spool), [row(1), row(2), row(3)]);
        at
    }

    #[test]
    fn what_was_synced_is_there_again_and_clearing_empties_it() {
        let memory = Memory::default();
        two(&memory);
        let mut again = spool(&memory).unwrap();
        assert_eq!(all(&mut again).len(), 3);
        again.clear().unwrap();
        assert!(again.is_empty() && all(&mut again).is_empty());
        assert!(spool(&memory).unwrap().is_empty());
    }

    #[test]
    fn a_torn_end_is_removed_wherever_it_tore() {
        let memory = Memory::default();
        let second = two(&memory) as usize;
        let bytes = memory.0.lock().unwrap().bytes.clone();
        for length in 0..bytes.len() {
            memory.0.lock().unwrap().bytes = bytes[..length].to_vec();
            let rows = all(&mut spool(&memory).unwrap());
            assert_eq!(rows.len(), if length < second { 0 } else { 2 }, "{length}");
            // It goes on from there.
            spool(&memory).unwrap().append(&[row(9)]).unwrap();
            assert_eq!(all(&mut spool(&memory).unwrap()).last(), Some(&row(9)));
        }
    }

    #[test]
    fn damage_before_the_end_is_no_torn_end() {
        let memory = Memory::default();
        let second = two(&memory) as usize;
        let bytes = memory.0.lock().unwrap().bytes.clone();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            memory.0.lock().unwrap().bytes = damaged;
            match spool(&memory) {
                Err(SpoolError::Damaged { offset: 0, length, .. }) => {
                    assert!(at < second && length == bytes.len() as u64, "{at}");
                }
                Ok(mut spool) => assert!(at >= second && all(&mut spool).len() == 2, "{at}"),
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn a_full_disk_takes_back_what_did_not_fit() {
        let memory = Memory::default();
        let mut spool = spool(&memory).unwrap();
        spool.append(&[row(1)]).unwrap();
        let length = spool.len();
        memory.0.lock().unwrap().fail_append = Some(20);
        assert!(matches!(spool.append(&[row(2)]), Err(SpoolError::Io { .. })));
        assert!(!spool.is_broken());
        assert_eq!(memory.0.lock().unwrap().bytes.len() as u64, length);
        memory.0.lock().unwrap().fail_append = None;
        spool.append(&[row(3)]).unwrap();
        assert_eq!(all(&mut spool), [row(1), row(3)]);
        // Its own bound.
        let many: Vec<Row> = (0..200).map(row).collect();
        let full = spool.append(&many).unwrap_err();
        assert!(matches!(full, SpoolError::Full { limit: 100_000, .. }), "{full}");
        assert_eq!(spool.limit(), 100_000);
    }

    #[test]
    fn after_a_failed_sync_nothing_is_certain() {
        for fail_truncate in [false, true] {
            let memory = Memory::default();
            let mut spool = spool(&memory).unwrap();
            {
                let mut content = memory.0.lock().unwrap();
                (content.fail_sync, content.fail_truncate) = (!fail_truncate, fail_truncate);
                content.fail_append = fail_truncate.then_some(3);
            }
            spool.append(&[row(1)]).unwrap_err();
            assert!(spool.is_broken());
            *memory.0.lock().unwrap() = Content::default();
            assert!(matches!(spool.append(&[row(1)]), Err(SpoolError::Full { .. })));
        }
    }

    #[test]
    fn rows_that_cannot_be_read_are_named_by_place_alone() {
        let memory = Memory::default();
        let body = br#"[{"id":"secret","attempt":"x"}]"#;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&Sha256::digest(body)[..16]);
        bytes.extend_from_slice(body);
        memory.0.lock().unwrap().bytes = bytes;
        let error = spool(&memory).unwrap().batch(0).unwrap_err().to_string();
        assert!(error.contains("frame at byte 0: Data at 1:") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn one_process_has_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spool");
        let mut spool = Spool::open(&path, 100_000).unwrap();
        spool.append(&[row(1)]).unwrap();
        assert!(format!("{spool:?}").contains("length"));
        assert!(matches!(Spool::open(&path, 1), Err(SpoolError::Locked(_))));
        drop(spool);
        let mut again = Spool::open(&path, 100_000).unwrap();
        assert_eq!(all(&mut again), [row(1)]);
        again.clear().unwrap();
        assert!(matches!(Spool::open(&folder.path().join("no/spool"), 1), Err(SpoolError::Io { .. })));
    }

    /// The bound that admission reckons with.
    #[test]
    fn no_row_is_larger_than_its_bound() {
        let text = "\"".repeat(crate::row::MAX_TEXT);
        let values = crate::row::FIELDS.iter().zip(Row::default().values()).map(|(field, value)| {
            use crate::value::Value;
            match (field.sql.split(' ').next(), value) {
                (Some("BIGINT"), _) if field.name == "status" => Value::Int(65_535),
                (Some("BIGINT"), _) if field.name.contains("version") || field.name == "attempt" => {
                    Value::Int(u32::MAX.into())
                }
                (Some("BIGINT"), _) => Value::Int(i64::MAX),
                (Some("TEXT"), _) => Value::Text(text.clone()),
                _ => Value::Bytes(vec![1; if field.name == "user_salt" { 16 } else { 32 }]),
            }
        });
        let row = Row::from_values(values).unwrap();
        assert_eq!(row.check(), Ok(()));
        let size = HEADER + serde_json::to_vec(&[row]).unwrap().len();
        assert!(size as u64 <= MAX_ROW_BYTES, "{size}");
    }
}
