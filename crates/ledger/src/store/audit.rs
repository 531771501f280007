//! Reading chains for verification.
//!
//! Owns the queries; what they must show is `verify`'s.

use super::sql::{Sql, SqlStore, int, take, text};
use super::{AuditLink, ChainHead, PurgeRecord};
use crate::chain::{Epoch, Link};
use crate::error::StoreError;
use crate::row::{FIELDS, Row};
use crate::value::{Hash, Hex, Value};

fn chain(values: &mut impl Iterator<Item = Value>) -> Result<Epoch, StoreError> {
    Ok(Epoch { writer: take(values, "writer")?, epoch: take(values, "epoch")? })
}

impl<C: Sql> SqlStore<C> {
    pub(super) fn chain_heads(&mut self) -> Result<Vec<ChainHead>, StoreError> {
        let sql = "SELECT writer, epoch, state, seq, head, key_version, mac FROM mirai_writer \
                   ORDER BY writer, epoch";
        let rows = self.sql.query(sql, &[])?;
        let head = |row: Vec<Value>| {
            let values = &mut row.into_iter();
            Ok(ChainHead {
                chain: chain(values)?,
                ended: take::<String>(values, "state")? == "ended",
                seq: take(values, "seq")?,
                head: take(values, "head")?,
                signature: match (take::<Option<u64>>(values, "key_version")?, take(values, "mac")?) {
                    (Some(version), Some(mac)) => Some((u32::try_from(version).unwrap_or(u32::MAX), mac)),
                    _ => None,
                },
            })
        };
        rows.into_iter().map(head).collect()
    }

    pub(super) fn purge_records(&mut self) -> Result<Vec<PurgeRecord>, StoreError> {
        let sql = "SELECT writer, epoch, seq, head, purged_rows, at, key_version, mac FROM mirai_purge \
                   ORDER BY writer, epoch";
        let rows = self.sql.query(sql, &[])?;
        let record = |row: Vec<Value>| {
            let values = &mut row.into_iter();
            Ok(PurgeRecord {
                chain: chain(values)?,
                seq: take(values, "seq")?,
                head: take(values, "head")?,
                rows: take(values, "purged_rows")?,
                at: take(values, "at")?,
                signature: (take(values, "key_version")?, take(values, "mac")?),
            })
        };
        rows.into_iter().map(record).collect()
    }

    pub(super) fn audit_links(
        &mut self,
        of: &Epoch,
        after: u64,
        limit: usize,
    ) -> Result<Vec<AuditLink>, StoreError> {
        let sql = format!(
            "SELECT l.seq, l.kind, l.id, l.digest, l.head, \
             CASE WHEN r.id IS NOT NULL AND r.writer = l.writer AND r.epoch = l.epoch AND NOT EXISTS \
             (SELECT 1 FROM mirai_link n WHERE n.id = l.id AND n.writer = l.writer AND n.epoch = l.epoch \
             AND n.seq > l.seq) THEN 1 ELSE 0 END, \
             CASE WHEN EXISTS (SELECT 1 FROM mirai_link o WHERE o.id = l.id AND o.kind = 'open') \
             THEN 1 ELSE 0 END, r.digest, {} \
             FROM mirai_link l LEFT JOIN mirai_request r ON r.id = l.id \
             WHERE l.writer = $1 AND l.epoch = $2 AND l.seq > $3 ORDER BY l.seq LIMIT $4",
            self.words.r_columns
        );
        let params = [text(&of.writer), int(of.epoch), int(after), int(limit as u64)];
        let rows = self.sql.query(&sql, &params)?;
        rows.into_iter().map(|row| audit_link(of, row)).collect()
    }
}

fn audit_link(of: &Epoch, row: Vec<Value>) -> Result<AuditLink, StoreError> {
    let mut values = row.into_iter();
    let link = Link {
        chain: of.clone(),
        seq: take(&mut values, "seq")?,
        kind: take(&mut values, "kind")?,
        id: take(&mut values, "id")?,
        digest: take(&mut values, "digest")?,
        head: take(&mut values, "head")?,
    };
    let newest = take::<i64>(&mut values, "newest")? != 0;
    let opened = take::<i64>(&mut values, "opened")? != 0;
    let digest: Option<Hash> = take::<Option<Hex<32>>>(&mut values, "digest")?;
    let row = match digest {
        Some(digest) => Some((Row::from_values(values.take(FIELDS.len()))?, digest)),
        None => None,
    };
    Ok(AuditLink { link, row, newest, opened })
}
