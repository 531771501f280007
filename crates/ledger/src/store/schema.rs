//! The tables, and how an older database becomes a newer one.
//!
//! Owns every statement that defines something. Migrations only add: what a newer build adds, an older one must
//! be able to leave out, so both can run side by side during an upgrade.

use super::sql::{Sql, SqlStore, take};
use crate::error::StoreError;
use crate::row::{FIELDS, Field};
use crate::value::Value;

/// A step of the schema's history.
#[derive(Clone, Copy, Debug)]
pub(super) struct Migration {
    /// The schema's version after it.
    pub(super) version: u32,
    /// The oldest build, by its newest migration, that may use the database after it.
    pub(super) needs: u32,
    /// Its statements.
    pub(super) statements: fn() -> Vec<String>,
}

pub(super) const MIGRATIONS: &[Migration] = &[
    Migration { version: 1, needs: 1, statements: first },
    Migration { version: 2, needs: 1, statements: quotas },
    // How far consumers of ended rows were told. A build without it tells nobody.
    Migration { version: 3, needs: 1, statements: outbox },
];

/// The fields of the first release. Later ones come by `ALTER TABLE ... ADD COLUMN`.
const FIRST_FIELDS: u16 = 33;

fn first() -> Vec<String> {
    let column = |field: &Field| format!("\"{}\" {}", field.name, field.sql);
    let columns: Vec<String> = FIELDS.iter().filter(|f| f.tag <= FIRST_FIELDS).map(column).collect();
    [
        &format!(
            "CREATE TABLE mirai_request ({}, digest BYTEA NOT NULL, PRIMARY KEY (id))",
            columns.join(", ")
        ),
        "CREATE INDEX mirai_request_open ON mirai_request (writer, epoch) WHERE state = 'open'",
        "CREATE INDEX mirai_request_time ON mirai_request (queued_at)",
        "CREATE TABLE mirai_writer (writer TEXT NOT NULL, epoch BIGINT NOT NULL, state TEXT NOT NULL, \
         lease_until BIGINT NOT NULL, started_at BIGINT NOT NULL, seq BIGINT NOT NULL, head BYTEA NOT NULL, \
         key_version BIGINT, mac BYTEA, PRIMARY KEY (writer, epoch))",
        "CREATE TABLE mirai_link (writer TEXT NOT NULL, epoch BIGINT NOT NULL, seq BIGINT NOT NULL, \
         kind TEXT NOT NULL, id TEXT NOT NULL, digest BYTEA NOT NULL, head BYTEA NOT NULL, \
         PRIMARY KEY (writer, epoch, seq))",
        "CREATE INDEX mirai_link_id ON mirai_link (id)",
        "CREATE TABLE mirai_purge (writer TEXT NOT NULL, epoch BIGINT NOT NULL, seq BIGINT NOT NULL, \
         head BYTEA NOT NULL, purged_rows BIGINT NOT NULL, at BIGINT NOT NULL, key_version BIGINT NOT NULL, \
         mac BYTEA NOT NULL, PRIMARY KEY (writer, epoch))",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// What applications used and what replicas hold of it; nothing of a request.
fn quotas() -> Vec<String> {
    [
        "CREATE TABLE mirai_quota (application TEXT NOT NULL, kind TEXT NOT NULL, bucket BIGINT NOT NULL, \
         used BIGINT NOT NULL, leased BIGINT NOT NULL, PRIMARY KEY (application, kind, bucket))",
        "CREATE TABLE mirai_quota_holder (holder TEXT NOT NULL, writer TEXT NOT NULL, by_rows BIGINT NOT NULL, \
         seq BIGINT NOT NULL, lease_until BIGINT NOT NULL, started_at BIGINT NOT NULL, \
         synced_at BIGINT NOT NULL, PRIMARY KEY (holder))",
        "CREATE TABLE mirai_quota_lease (holder TEXT NOT NULL, application TEXT NOT NULL, \
         kind TEXT NOT NULL, bucket BIGINT NOT NULL, amount BIGINT NOT NULL, \
         PRIMARY KEY (holder, application, kind, bucket))",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// How far consumers of ended rows were told, and who tells them.
fn outbox() -> Vec<String> {
    [
        "CREATE TABLE mirai_outbox (consumer TEXT NOT NULL, writer TEXT NOT NULL, epoch BIGINT NOT NULL, \
         seq BIGINT NOT NULL, PRIMARY KEY (consumer, writer, epoch))",
        "CREATE TABLE mirai_outbox_lease (consumer TEXT NOT NULL PRIMARY KEY, holder TEXT NOT NULL, \
         lease_until BIGINT NOT NULL)",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Kept in the database, apart from the tables it describes.
const META: &str = "CREATE TABLE IF NOT EXISTS mirai_schema (one BIGINT NOT NULL PRIMARY KEY, \
                    version BIGINT NOT NULL, needs BIGINT NOT NULL)";

impl<C: Sql> SqlStore<C> {
    /// Brings the schema to the newest of `migrations`; a database that is newer is left as it is.
    pub(super) fn migrate(&mut self, migrations: &[Migration]) -> Result<(), StoreError> {
        self.transaction(|store| {
            store.sql.lock_schema()?;
            store.sql.execute(META, &[])?;
            let begin = "INSERT INTO mirai_schema (one, version, needs) VALUES (1, 0, 0) \
                         ON CONFLICT (one) DO NOTHING";
            store.sql.execute(begin, &[])?;
            let found = store.check_schema(migrations, true)?;
            for step in migrations.iter().filter(|step| step.version > found) {
                for statement in (step.statements)() {
                    store.sql.execute(&statement, &[])?;
                }
                let done = [Value::Int(step.version.into()), Value::Int(step.needs.into())];
                store.sql.execute("UPDATE mirai_schema SET version = $1, needs = $2 WHERE one = 1", &done)?;
            }
            Ok(())
        })
    }

    /// The schema's version, if this build may use it.
    pub(super) fn check_schema(&mut self, migrations: &[Migration], lock: bool) -> Result<u32, StoreError> {
        let ours = migrations.iter().map(|step| step.version).max().unwrap_or(0);
        let (found, needs) = self.schema_version(lock)?;
        if needs > ours {
            return Err(StoreError::Newer { found, needs, ours });
        }
        Ok(found)
    }

    /// The schema's version, and the oldest that may use it.
    pub(super) fn schema_version(&mut self, lock: bool) -> Result<(u32, u32), StoreError> {
        let query = "SELECT version, needs FROM mirai_schema WHERE one = 1";
        let query = format!("{query}{}", if lock { C::FOR_UPDATE } else { "" });
        let rows = self.sql.query(&query, &[])?;
        let mut values = rows.into_iter().flatten();
        Ok((take(&mut values, "version")?, take(&mut values, "needs")?))
    }
}
