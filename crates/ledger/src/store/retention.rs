//! Erasing pseudonyms, and removing rows, without breaking a chain.
//!
//! Owns the cut of a purge. A chain is cut before the first link of a row that stays; a row goes with the link
//! that opened it. Links beyond the cut that end such a row stay, and are known by having no opening.

use super::Purged;
use super::sql::{Sql, SqlStore, int, take, text};
use crate::chain::Epoch;
use crate::error::StoreError;
use crate::value::{Cell, Hash, Value};

/// Ended before `$1`. Additions of times cannot overflow: durations are bounded by the age of the process.
const ENDED: &str = "r.state = 'closed' AND r.queued_at + r.duration < $1";

impl<C: Sql> SqlStore<C> {
    pub(super) fn anonymize_in(&mut self, before: i64, limit: usize) -> Result<u64, StoreError> {
        let sql = format!(
            "UPDATE mirai_request SET \"user\" = NULL, user_salt = NULL WHERE id IN \
             (SELECT r.id FROM mirai_request r WHERE {ENDED} \
             AND (r.\"user\" IS NOT NULL OR r.user_salt IS NOT NULL) ORDER BY r.id LIMIT $2)"
        );
        self.sql.execute(&sql, &[Value::Int(before), int(limit as u64)])
    }

    pub(super) fn purge_in(&mut self, before: i64, limit: usize) -> Result<Purged, StoreError> {
        if self.key.is_none() {
            return Err(StoreError::NoKey);
        }
        let mut done = Purged::default();
        // In the order of epochs: a row moves from an earlier one to a later one only.
        for chain in self.chain_heads()? {
            self.purge_chain(&chain.chain, chain.seq, before, limit as u64, &mut done)?;
        }
        Ok(done)
    }

    fn purge_chain(
        &mut self,
        chain: &Epoch,
        last: u64,
        before: i64,
        limit: u64,
        done: &mut Purged,
    ) -> Result<(), StoreError> {
        let (writer, epoch) = (text(&chain.writer), int(chain.epoch));
        let first = self.sql.query(
            "SELECT MIN(seq) FROM mirai_link WHERE writer = $1 AND epoch = $2",
            &[writer.clone(), epoch.clone()],
        )?;
        let Some(first) = take::<Option<u64>>(&mut first.into_iter().flatten(), "seq")? else {
            return Ok(());
        };
        let stays = format!(
            "SELECT MIN(l.seq) FROM mirai_link l JOIN mirai_request r ON r.id = l.id \
             WHERE (NOT ({ENDED}) OR NOT EXISTS (SELECT 1 FROM mirai_link o WHERE o.id = l.id \
             AND o.kind = 'open' AND o.writer = l.writer AND o.epoch = l.epoch)) \
             AND l.writer = $2 AND l.epoch = $3"
        );
        let stays = self.sql.query(&stays, &[Value::Int(before), writer.clone(), epoch.clone()])?;
        let stays: Option<u64> = take(&mut stays.into_iter().flatten(), "seq")?;
        let possible = stays.map_or(last, |seq| seq - 1);
        let cut = possible.min(first.saturating_add(limit) - 1);
        if cut < first {
            return Ok(());
        }
        done.more |= cut < possible;
        self.cut(chain, cut, done)
    }

    fn cut(&mut self, chain: &Epoch, cut: u64, done: &mut Purged) -> Result<(), StoreError> {
        let place = [text(&chain.writer), int(chain.epoch), int(cut)];
        let head = self
            .sql
            .query("SELECT head FROM mirai_link WHERE writer = $1 AND epoch = $2 AND seq = $3", &place)?;
        let head: Hash = take(&mut head.into_iter().flatten(), "head")?;
        let rows = self.sql.execute(
            "DELETE FROM mirai_request WHERE id IN (SELECT id FROM mirai_link \
             WHERE writer = $1 AND epoch = $2 AND seq <= $3 AND kind = 'open')",
            &place,
        )?;
        done.links += self
            .sql
            .execute("DELETE FROM mirai_link WHERE writer = $1 AND epoch = $2 AND seq <= $3", &place)?;
        done.rows += rows;
        let now = self.sql.now()?;
        let mut values = place.to_vec();
        values.extend([head.to_value(), int(rows), Value::Int(now)]);
        values.extend(self.signature(chain, cut, head));
        self.sql
            .execute(
                "INSERT INTO mirai_purge (writer, epoch, seq, head, purged_rows, at, key_version, mac) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (writer, epoch) DO UPDATE SET \
                 seq = excluded.seq, head = excluded.head, at = excluded.at, \
                 purged_rows = mirai_purge.purged_rows + excluded.purged_rows, \
                 key_version = excluded.key_version, mac = excluded.mac",
                &values,
            )
            .map(|_| ())
    }
}
