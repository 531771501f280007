//! One suite for every database behind the store.

pub(crate) mod faults;
pub(crate) mod history;
#[cfg(feature = "postgres")]
pub(crate) mod pg;
mod power;
mod rules;
mod schema;
mod tamper;

use std::time::Duration;

use super::sql::Sql;
use super::sqlite::{Sqlite, SqliteOptions};
use super::{Entry, SqlStore, Store};
use crate::chain::{ChainKey, Epoch, commitment};
use crate::row::{Finish, Row, State, UserKind};
use crate::value::Hex;
use crate::verify::{Report, verify};

pub(crate) const LEASE: Duration = Duration::from_secs(3600);

pub(crate) fn key() -> ChainKey {
    ChainKey::new(1, &[7; 32]).unwrap()
}

/// The version that this build brings a database to.
pub(crate) fn newest() -> u32 {
    super::schema::MIGRATIONS.iter().map(|step| step.version).max().unwrap()
}

/// A database of one kind, for one test.
pub(crate) trait Database {
    type Driver: Sql;
    /// Another connection to it.
    fn connect(&self) -> SqlStore<Self::Driver>;
}

/// A file, without waiting for the disk.
pub(crate) struct SqliteFile {
    pub(crate) folder: tempfile::TempDir,
}

impl SqliteFile {
    pub(crate) fn new() -> Self {
        // In memory where there is such a folder: these tests are about logic, not about disks.
        let memory = std::path::Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self { folder: folder.unwrap() }
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("ledger.db")
    }
}

impl Database for SqliteFile {
    type Driver = Sqlite;
    fn connect(&self) -> SqlStore<Sqlite> {
        let connection = rusqlite::Connection::open(self.path()).unwrap();
        connection.busy_timeout(Duration::from_secs(5)).unwrap();
        let driver = Sqlite::new(connection, 64, None).unwrap();
        driver.connection().execute_batch("PRAGMA synchronous = OFF").unwrap();
        SqlStore::new(driver, Some(key())).unwrap()
    }
}

/// A request as it opens.
pub(crate) fn request(n: u64) -> Row {
    let salt = Hex([n as u8; 16]);
    let user = format!("user-{n}");
    Row {
        id: format!("R{n:06}"),
        queued_at: 1000 + n as i64,
        application: format!("app-{}", n % 3),
        key_id: "k".into(),
        model: "demo".into(),
        user_commitment: Some(commitment(&salt, &user)),
        user: Some(user),
        user_salt: Some(salt),
        user_anon: UserKind::Present,
        prompt_tokens: 5,
        status: 200,
        ..Row::default()
    }
}

pub(crate) fn tokens(row: &Row, tokens: u64) -> Row {
    Row { completion_tokens: tokens, duration: tokens, ..row.clone() }
}

pub(crate) fn closed(row: &Row, tokens: u64) -> Row {
    let ended = Row { state: State::Closed, finish: Finish::Stop, ..row.clone() };
    Row { completion_tokens: tokens, duration: tokens, ..ended }
}

pub(crate) fn new(row: Row) -> Entry {
    Entry { row, stored: false }
}

pub(crate) fn old(row: Row) -> Entry {
    Entry { row, stored: true }
}

/// As if the writer had said nothing for an hour.
pub(crate) fn expire<C: Sql>(store: &mut SqlStore<C>, epoch: &Epoch) {
    use super::sql::{int, text};
    let sql = "UPDATE mirai_writer SET lease_until = 0 WHERE writer = $1 AND epoch = $2";
    store.sql.execute(sql, &[text(&epoch.writer), int(epoch.epoch)]).unwrap();
}

pub(crate) fn sound<C: Sql>(store: &mut SqlStore<C>) -> Report {
    let report = verify(store, Some(&key())).unwrap();
    assert!(report.is_sound(), "{:?}", report.problems);
    report
}
