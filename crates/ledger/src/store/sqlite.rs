//! SQLite: one file, for one replica with a volume.
//!
//! Owns the connection, its durability settings and the meaning of SQLite's errors. Write-ahead log with full
//! sync: a commit has returned when its frames are on the disk. Never repeats a commit of its own accord.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, ToSql, params_from_iter};

use super::Interrupter;
use super::sql::{Sql, SqlStore};
use crate::chain::ChainKey;
use crate::error::StoreError;
use crate::value::Value;

/// The system's clock, microseconds since 1970.
pub fn system_micros() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// How a file is opened.
#[derive(Clone, Debug)]
pub struct SqliteOptions {
    /// How long a statement waits for another process's transaction before the store counts as unavailable.
    pub busy_timeout: Duration,
    /// Whether this process alone may write. It then may take its dead predecessors' rows over at once.
    pub exclusive: bool,
    /// Statements kept prepared.
    pub statements: usize,
}

impl Default for SqliteOptions {
    fn default() -> Self {
        Self { busy_timeout: Duration::from_secs(5), exclusive: true, statements: 64 }
    }
}

/// A connection to a file.
#[derive(Debug)]
pub struct Sqlite {
    connection: Connection,
    /// Held as long as this process may write.
    _lock: Option<File>,
}

impl SqlStore<Sqlite> {
    /// Opens a file to write, and creates it if there is none.
    ///
    /// # Errors
    /// Another process has it, the schema is too new, or the file cannot be used.
    pub fn open(path: &Path, key: Option<ChainKey>, options: &SqliteOptions) -> Result<Self, StoreError> {
        let lock = if options.exclusive { Some(lock(path)?) } else { None };
        // Created by us for the mode: the log and its index take the mode of the file. The group may write,
        // because some platforms give each pod another user of the same group.
        open_file(path)?;
        let connection = Connection::open(path).map_err(|e| meaning(&e))?;
        connection.busy_timeout(options.busy_timeout).map_err(|e| meaning(&e))?;
        let driver = Sqlite::new(connection, options.statements, lock)?;
        let store = Self::new(driver, key)?;
        sync_folder(path)?;
        Ok(store)
    }

    /// A store that lasts as long as its process.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn in_memory() -> Result<Self, StoreError> {
        let options = SqliteOptions::default();
        let connection = Connection::open_in_memory().map_err(|e| meaning(&e))?;
        Self::new(Sqlite::new(connection, options.statements, None)?, None)
    }

    /// Opens a file to read, beside a server that may be writing it.
    ///
    /// # Errors
    /// The schema is too new, or the file cannot be used.
    pub fn open_reading(path: &Path) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(|e| meaning(&e))?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(|e| meaning(&e))?;
        Self::reading(Sqlite { connection, _lock: None })
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn open_file(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o660)
        .open(path)
        .map_err(|error| StoreError::Unavailable(format!("{}: {error}", path.display())))
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let file = open_file(&with_suffix(path, "-writer"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(path.to_owned())),
        Err(TryLockError::Error(error)) => {
            Err(StoreError::Unavailable(format!("{}: {error}", path.display())))
        }
    }
}

/// A new file's name must last too.
fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| StoreError::Broken(format!("{}: {error}", folder.display())))
}

/// What an error means. Messages of SQLite name columns and tables, never values.
pub(crate) fn meaning(error: &rusqlite::Error) -> StoreError {
    let text = error.to_string();
    let code = error.sqlite_error_code();
    match code {
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::DiskFull
            | ErrorCode::OutOfMemory
            | ErrorCode::OperationInterrupted
            | ErrorCode::CannotOpen,
        ) => StoreError::Unavailable(text),
        _ => StoreError::Broken(text),
    }
}

impl Sqlite {
    pub(super) fn new(
        connection: Connection,
        statements: usize,
        lock: Option<File>,
    ) -> Result<Self, StoreError> {
        connection.set_prepared_statement_cache_capacity(statements);
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON; \
                 PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY;",
            )
            .map_err(|e| meaning(&e))?;
        Ok(Self { connection, _lock: lock })
    }

    #[cfg(test)]
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Int(n) => ValueRef::Integer(*n),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

fn value(of: ValueRef<'_>) -> Result<Value, StoreError> {
    Ok(match of {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(n) => Value::Int(n),
        ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => return Err(StoreError::Broken("a stored text is not UTF-8".to_owned())),
        },
        ValueRef::Blob(bytes) => Value::Bytes(bytes.to_owned()),
        // No column has numbers of this kind; damage may look like one.
        ValueRef::Real(_) => return Err(StoreError::Broken("a stored number is not whole".to_owned())),
    })
}

/// SQLite takes `$2` for a name and numbers names as it meets them; `?2` is the second parameter.
fn numbered(sql: &str) -> String {
    sql.replace('$', "?")
}

impl Sql for Sqlite {
    const FOR_UPDATE: &'static str = "";

    fn begin(&mut self, write: bool) -> Result<(), StoreError> {
        self.execute(if write { "BEGIN IMMEDIATE" } else { "BEGIN" }, &[]).map(|_| ())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        self.execute("COMMIT", &[]).map(|_| ())
    }

    fn rollback(&mut self) {
        if !self.connection.is_autocommit() && self.execute("ROLLBACK", &[]).is_err() {
            tracing::warn!("a transaction could not be undone");
        }
    }

    fn execute(&mut self, sql: &str, params: &[Value]) -> Result<u64, StoreError> {
        let run = || self.connection.prepare_cached(&numbered(sql))?.execute(params_from_iter(params));
        run().map(|rows| rows as u64).map_err(|e| meaning(&e))
    }

    fn query(&mut self, sql: &str, params: &[Value]) -> Result<Vec<Vec<Value>>, StoreError> {
        let mut statement = self.connection.prepare_cached(&numbered(sql)).map_err(|e| meaning(&e))?;
        let width = statement.column_count();
        let mut rows = statement.query(params_from_iter(params)).map_err(|e| meaning(&e))?;
        let mut out = Vec::new();
        while let Some(row) = rows.next().map_err(|e| meaning(&e))? {
            let values = (0..width).map(|i| value(row.get_ref(i).map_err(|e| meaning(&e))?));
            out.push(values.collect::<Result<_, _>>()?);
        }
        Ok(out)
    }

    fn check(&mut self) -> Result<(), StoreError> {
        match self.query("PRAGMA integrity_check(1)", &[])?.into_iter().flatten().next() {
            Some(Value::Text(text)) if text == "ok" => Ok(()),
            _ => Err(StoreError::Broken("the file's structures are damaged".to_owned())),
        }
    }

    fn now(&mut self) -> Result<i64, StoreError> {
        Ok(system_micros())
    }

    fn interrupter(&self) -> Option<Interrupter> {
        let handle = self.connection.get_interrupt_handle();
        Some(Box::new(move || handle.interrupt()))
    }

    /// Deleted content is overwritten in the file; here it leaves the log too, unless a reader needs it still.
    fn erased(&mut self) -> Result<(), StoreError> {
        let rows = self.query("PRAGMA wal_checkpoint(TRUNCATE)", &[])?;
        if rows.first().and_then(|row| row.first()) != Some(&Value::Int(0)) {
            tracing::warn!("a reader keeps the log from being emptied; erased values leave it later");
        }
        Ok(())
    }
}
