//! Closing what dead writers left open.
//!
//! Owns the fence: a writer's run that is being recovered is no longer live, so whatever its process still
//! tries is refused. Its chain is extended and ended here.

use super::Recovered;
use super::sql::{Sql, SqlStore, int, take, text};
use crate::chain::{Epoch, LinkKind, content_digest};
use crate::error::StoreError;
use crate::row::{Finish, State};
use crate::value::Value;

impl<C: Sql> SqlStore<C> {
    pub(super) fn recover_one(&mut self, by: &Epoch, limit: usize) -> Result<Recovered, StoreError> {
        // Most rounds find nothing, and then need no lock.
        if self.expired(by)?.is_none() {
            return Ok(Recovered::default());
        }
        self.transaction(|store| {
            let Some((chain, state)) = store.expired(by)? else { return Ok(Recovered::default()) };
            let mut tail = match store.lock_chain(&chain, &state) {
                // Another replica was faster.
                Err(StoreError::Fenced(_)) => return Ok(Recovered { more: true, ..Recovered::default() }),
                other => other?,
            };
            if !store.still_expired(&chain)? {
                return Ok(Recovered { more: true, ..Recovered::default() });
            }
            let open = "WHERE writer = $1 AND epoch = $2 AND state = 'open' ORDER BY id LIMIT $3";
            let params = [text(&chain.writer), int(chain.epoch), int(limit as u64)];
            let rows = store.select(open, &params)?;
            let mut done = Recovered { rows: rows.len() as u64, epochs: 0, more: true };
            for mut row in rows {
                row.state = State::Closed;
                row.finish = Finish::Crashed;
                store.replace(&row)?;
                store.append(&mut tail, &LinkKind::Recover, &row.id, content_digest(&row))?;
            }
            store.store_tail(&tail, None)?;
            let over = done.rows < limit as u64;
            if over {
                done.epochs = 1;
            }
            store.set_state(&chain, if over { "ended" } else { "recovering" })?;
            Ok(done)
        })
    }

    /// A run whose lease is over, with its state.
    fn expired(&mut self, by: &Epoch) -> Result<Option<(Epoch, String)>, StoreError> {
        let now = self.sql.now()?;
        let rows = self.sql.query(
            "SELECT writer, epoch, state FROM mirai_writer WHERE (state = 'recovering' \
             OR (state = 'live' AND lease_until < $1)) AND NOT (writer = $2 AND epoch = $3) \
             ORDER BY writer, epoch LIMIT 1",
            &[Value::Int(now), text(&by.writer), int(by.epoch)],
        )?;
        let Some(row) = rows.into_iter().next() else { return Ok(None) };
        let mut row = row.into_iter();
        let chain = Epoch { writer: take(&mut row, "writer")?, epoch: take(&mut row, "epoch")? };
        Ok(Some((chain, take(&mut row, "state")?)))
    }

    /// Asked once the chain is locked: its owner may have extended the lease just before.
    fn still_expired(&mut self, chain: &Epoch) -> Result<bool, StoreError> {
        let now = self.sql.now()?;
        let rows = self.sql.query(
            "SELECT 1 FROM mirai_writer WHERE writer = $1 AND epoch = $2 \
             AND (state = 'recovering' OR lease_until < $3)",
            &[text(&chain.writer), int(chain.epoch), Value::Int(now)],
        )?;
        Ok(!rows.is_empty())
    }

    pub(super) fn release_in(&mut self, owner: &Epoch) -> Result<(), StoreError> {
        self.lock_chain(owner, "live")?;
        let open = "SELECT 1 FROM mirai_request WHERE writer = $1 AND epoch = $2 AND state = 'open' LIMIT 1";
        let open = !self.sql.query(open, &[text(&owner.writer), int(owner.epoch)])?.is_empty();
        // Rows that are still open need recovery, which a run that is not live has begun.
        self.set_state(owner, if open { "recovering" } else { "ended" })
    }

    fn set_state(&mut self, chain: &Epoch, state: &str) -> Result<(), StoreError> {
        let sql = "UPDATE mirai_writer SET state = $1 WHERE writer = $2 AND epoch = $3";
        self.sql.execute(sql, &[text(state), text(&chain.writer), int(chain.epoch)]).map(|_| ())
    }
}
