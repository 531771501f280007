//! Opening a store over SQL, and each of its operations.
//!
//! Owns which operation runs in a transaction; what it does there is in `merge`, `usage`, `retention` and `audit`.

use std::time::Duration;

use super::schema::MIGRATIONS;
use super::sql::{Sql, SqlStore, Words, int, take, text};
use super::{
    AuditLink, ChainHead, Committed, Entry, PurgeRecord, Purged, Recovered, Store, UsageQuery, UsageRow,
};
use crate::chain::{ChainKey, Epoch};
use crate::error::StoreError;
use crate::row::{Row, SCHEMA_VERSION};

impl<C: Sql> SqlStore<C> {
    /// A store on an open connection. Brings the schema up to date.
    ///
    /// # Errors
    /// The database failed, or its schema is too new.
    pub fn new(sql: C, key: Option<ChainKey>) -> Result<Self, StoreError> {
        let mut store = Self { sql, key, words: Words::new() };
        store.migrate(MIGRATIONS)?;
        Ok(store)
    }

    /// A store on a connection that only reads. The schema is checked and left as it is.
    ///
    /// # Errors
    /// The database failed, or its schema is too new.
    pub fn reading(sql: C) -> Result<Self, StoreError> {
        let mut store = Self { sql, key: None, words: Words::new() };
        store.check_schema(MIGRATIONS, false)?;
        Ok(store)
    }
}

impl<C: Sql> Store for SqlStore<C> {
    fn register(&mut self, writer: &str, lease: Duration, takeover: bool) -> Result<Epoch, StoreError> {
        self.transaction(|store| store.register_in(writer, lease, takeover))
    }

    fn commit(&mut self, owner: &Epoch, lease: Duration, entries: &[Entry]) -> Result<Committed, StoreError> {
        self.transaction(|store| store.commit_in(owner, lease, entries))
    }

    fn recover(&mut self, by: &Epoch, limit: usize) -> Result<Recovered, StoreError> {
        self.recover_one(by, limit)
    }

    fn release(&mut self, owner: &Epoch) -> Result<(), StoreError> {
        self.transaction(|store| store.release_in(owner))
    }

    fn usage(&mut self, query: &UsageQuery) -> Result<Vec<UsageRow>, StoreError> {
        self.usage_of(query)
    }

    fn row(&mut self, id: &str) -> Result<Option<Row>, StoreError> {
        self.select("WHERE id = $1", &[text(id)]).map(|mut rows| rows.pop())
    }

    fn rows(&mut self, after: &str, limit: usize) -> Result<Vec<Row>, StoreError> {
        self.select("WHERE id > $1 ORDER BY id LIMIT $2", &[text(after), int(limit as u64)])
    }

    fn anonymize(&mut self, before: i64, limit: usize) -> Result<u64, StoreError> {
        let done = self.transaction(|store| store.anonymize_in(before, limit))?;
        if done > 0 {
            self.sql.erased()?;
        }
        Ok(done)
    }

    fn purge(&mut self, before: i64, limit: usize) -> Result<Purged, StoreError> {
        let done = self.transaction(|store| store.purge_in(before, limit))?;
        if done.rows > 0 {
            self.sql.erased()?;
        }
        Ok(done)
    }

    fn begin_audit(&mut self) -> Result<(), StoreError> {
        self.sql.begin(false)?;
        self.sql.check()
    }

    fn end_audit(&mut self) {
        self.sql.rollback();
    }

    fn chains(&mut self) -> Result<Vec<ChainHead>, StoreError> {
        self.chain_heads()
    }

    fn purges(&mut self) -> Result<Vec<PurgeRecord>, StoreError> {
        self.purge_records()
    }

    fn links(&mut self, chain: &Epoch, after: u64, limit: usize) -> Result<Vec<AuditLink>, StoreError> {
        self.audit_links(chain, after, limit)
    }

    fn schema(&mut self) -> Result<u32, StoreError> {
        let (found, _) = self.schema_version(false)?;
        let known = MIGRATIONS.iter().map(|step| step.version).max().unwrap_or(0);
        // What a newer build made of its rows is not known; more than one version for each step it is not.
        Ok(SCHEMA_VERSION + found.saturating_sub(known))
    }

    fn count(&mut self) -> Result<u64, StoreError> {
        let rows = self.sql.query("SELECT COUNT(*) FROM mirai_request", &[])?;
        take(&mut rows.into_iter().flatten(), "count")
    }

    fn interrupter(&self) -> Option<super::Interrupter> {
        self.sql.interrupter()
    }
}
