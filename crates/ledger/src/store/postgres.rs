//! PostgreSQL: one database for several replicas.
//!
//! Owns the connection, which it makes when it is first needed and again after it was lost, and the meaning of
//! PostgreSQL's errors. A statement of a transaction whose connection is gone fails; it never runs alone.

use std::collections::HashMap;
use std::error::Error as _;
use std::time::Duration;

use postgres::types::{FromSql, IsNull, ToSql, Type, private::BytesMut, to_sql_checked};
use postgres::{Client, Config, NoTls, Statement};

use super::sql::{Sql, SqlStore};
use crate::chain::ChainKey;
use crate::error::StoreError;
use crate::value::Value;

/// Prepared statements that are kept.
const STATEMENTS: usize = 128;
/// What every session is told: a commit waits for the disk, and nothing waits for ever.
const SESSION: &str = "SET synchronous_commit = on; SET statement_timeout = '10s'; SET lock_timeout = '5s'; \
                       SET idle_in_transaction_session_timeout = '30s'";

/// A connection that comes back.
pub struct Postgres {
    config: Config,
    client: Option<Client>,
    statements: HashMap<String, Statement>,
    in_transaction: bool,
}

impl std::fmt::Debug for Postgres {
    /// Without the configuration, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Postgres").field("connected", &self.client.is_some()).finish_non_exhaustive()
    }
}

impl SqlStore<Postgres> {
    /// A store by URL or `key=value` words, as libpq takes them. The connection is not encrypted: use a socket,
    /// or a network that is.
    ///
    /// # Errors
    /// The URL is wrong, the server is out of reach, or the schema is too new.
    pub fn connect(url: &str, key: Option<ChainKey>) -> Result<Self, StoreError> {
        Self::new(Postgres::new(url)?, key)
    }
}

impl Postgres {
    /// A connection that is made when it is needed.
    ///
    /// # Errors
    /// The URL is wrong.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        // The parser's message may quote the URL, and with it the password.
        let wrong = |_| StoreError::Broken("the PostgreSQL URL cannot be read".to_owned());
        Ok(Self::of(url.parse().map_err(wrong)?))
    }

    /// The same, of a configuration.
    pub fn of(mut config: Config) -> Self {
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_secs(5));
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(Duration::from_secs(10));
        }
        config.application_name("mirai-ledger");
        Self { config, client: None, statements: HashMap::new(), in_transaction: false }
    }

    fn client(&mut self) -> Result<&mut Client, StoreError> {
        let lost = self.client.as_ref().is_none_or(Client::is_closed);
        if lost {
            self.statements.clear();
            self.client = None;
            if self.in_transaction {
                return Err(StoreError::Unavailable("the connection was lost in a transaction".to_owned()));
            }
            let mut client = self.config.connect(NoTls).map_err(|e| meaning(&e))?;
            client.batch_execute(SESSION).map_err(|e| meaning(&e))?;
            self.client = Some(client);
        }
        self.client.as_mut().ok_or_else(|| StoreError::Unavailable("no connection".to_owned()))
    }

    fn simple(&mut self, sql: &str) -> Result<(), StoreError> {
        self.client()?.batch_execute(sql).map_err(|e| meaning(&e))
    }

    fn prepared(&mut self, sql: &str) -> Result<Statement, StoreError> {
        self.client()?;
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client()?.prepare(sql).map_err(|e| meaning(&e))?;
        if self.statements.len() >= STATEMENTS {
            self.statements.clear();
        }
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }
}

/// What an error means. Messages about data are left out: they quote it.
fn meaning(error: &postgres::Error) -> StoreError {
    let Some(db) = error.as_db_error() else {
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        return StoreError::Unavailable(format!("{error}: {cause}"));
    };
    let code = db.code().code();
    let text = format!("PostgreSQL {code}: {}", if code.starts_with("22") { "" } else { db.message() });
    match &code[..2] {
        // Connection, resources, an operator, locks, conflicts, a standby, rights that are being changed; two
        // that registered at once.
        "08" | "53" | "57" | "55" | "40" | "25" | "28" | "23" | "3D" => StoreError::Unavailable(text),
        _ => StoreError::Broken(text),
    }
}

impl ToSql for Value {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Int(n) => n.to_sql(ty, out),
            Self::Text(text) => text.to_sql(ty, out),
            Self::Bytes(bytes) => bytes.to_sql(ty, out),
        }
    }

    fn accepts(ty: &Type) -> bool {
        [Type::INT8, Type::TEXT, Type::BYTEA].contains(ty)
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Value {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(match *ty {
            Type::INT8 => Self::Int(i64::from_sql(ty, raw)?),
            Type::INT4 => Self::Int(i32::from_sql(ty, raw)?.into()),
            Type::BYTEA => Self::Bytes(Vec::from_sql(ty, raw)?),
            _ => Self::Text(String::from_sql(ty, raw)?),
        })
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self::Null)
    }

    fn accepts(ty: &Type) -> bool {
        [Type::INT8, Type::INT4, Type::TEXT, Type::BYTEA].contains(ty)
    }
}

fn params(values: &[Value]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}

impl Sql for Postgres {
    const FOR_UPDATE: &'static str = " FOR UPDATE";

    fn begin(&mut self, write: bool) -> Result<(), StoreError> {
        self.in_transaction = false;
        self.simple(if write {
            "BEGIN ISOLATION LEVEL READ COMMITTED"
        } else {
            "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        })?;
        self.in_transaction = true;
        Ok(())
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        self.simple("COMMIT")?;
        self.in_transaction = false;
        Ok(())
    }

    fn rollback(&mut self) {
        // A connection that is gone has undone it already.
        let gone = self.client.as_ref().is_none_or(Client::is_closed);
        if !gone && self.simple("ROLLBACK").is_err() {
            self.client = None;
        }
        self.in_transaction = false;
    }

    fn execute(&mut self, sql: &str, values: &[Value]) -> Result<u64, StoreError> {
        if values.is_empty() && (sql.starts_with("CREATE") || sql.starts_with("ALTER")) {
            return self.simple(sql).map(|()| 0);
        }
        let statement = self.prepared(sql)?;
        self.client()?.execute(&statement, &params(values)).map_err(|e| meaning(&e))
    }

    fn query(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Vec<Value>>, StoreError> {
        let statement = self.prepared(sql)?;
        let rows = self.client()?.query(&statement, &params(values)).map_err(|e| meaning(&e))?;
        let read = |row: &postgres::Row| {
            (0..row.len()).map(|i| row.try_get(i).map_err(|e| meaning(&e))).collect::<Result<_, _>>()
        };
        rows.iter().map(read).collect()
    }

    fn now(&mut self) -> Result<i64, StoreError> {
        let sql = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)";
        match self.query(sql, &[])?.into_iter().flatten().next() {
            Some(Value::Int(now)) => Ok(now),
            _ => Err(StoreError::Broken("the clock cannot be read".to_owned())),
        }
    }

    fn lock_schema(&mut self) -> Result<(), StoreError> {
        // Any number that others are unlikely to lock: the first bytes of "mirai".
        self.simple("SELECT pg_advisory_xact_lock(469786060649)")
    }
}
