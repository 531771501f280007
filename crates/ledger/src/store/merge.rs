//! How a row on its way meets the row that is stored.
//!
//! Owns the rules that make a commit repeatable, and the appending of links. The table of rules:
//!
//! | stored | comes | result |
//! |---|---|---|
//! | nothing | any | it is stored |
//! | open | open | the later one; tokens never fall |
//! | open | closed | closed as it comes |
//! | closed by its owner, well | closed by its owner, with an error | closed as it comes |
//! | closed by its owner | any other | unchanged |
//! | closed by recovery | open, of a living owner | open again, tokens never fall |
//! | closed by recovery | closed by its owner | closed as it comes |
//! | closed by recovery | closed by recovery | tokens never fall |
//! | another request's | any | unchanged, reported |

use std::time::Duration;

use super::sql::{Sql, SqlStore, int, micros, mutable_values, take, text};
use super::{Committed, Entry};
use crate::chain::{Epoch, LinkKind, content_digest, genesis, next_head, open_digest};
use crate::error::StoreError;
use crate::row::{Finish, Row, State};
use crate::value::{Cell, Hash, Value};

/// The end of a chain within a transaction.
pub(super) struct Tail {
    pub(super) chain: Epoch,
    pub(super) seq: u64,
    pub(super) head: Hash,
}

impl<C: Sql> SqlStore<C> {
    pub(super) fn register_in(
        &mut self,
        writer: &str,
        lease: Duration,
        takeover: bool,
    ) -> Result<Epoch, StoreError> {
        // Locked first, so that two processes of one name do not find the same number free.
        let lock = format!("SELECT epoch FROM mirai_writer WHERE writer = $1{}", C::FOR_UPDATE);
        let mut last = 0;
        for row in self.sql.query(&lock, &[text(writer)])? {
            last = last.max(take::<u64>(&mut row.into_iter(), "epoch")?);
        }
        if takeover {
            let give_up = "UPDATE mirai_writer SET lease_until = 0 WHERE writer = $1 AND state = 'live'";
            self.sql.execute(give_up, &[text(writer)])?;
        }
        let chain = Epoch { writer: writer.to_owned(), epoch: last + 1 };
        let now = self.sql.now()?;
        let head = genesis(&chain);
        let mut values = vec![
            text(writer),
            int(chain.epoch),
            Value::Int(now.saturating_add(micros(lease))),
            Value::Int(now),
            head.to_value(),
        ];
        values.extend(self.signature(&chain, 0, head));
        self.sql.execute(
            "INSERT INTO mirai_writer (writer, epoch, state, lease_until, started_at, seq, head, \
             key_version, mac) VALUES ($1, $2, 'live', $3, $4, 0, $5, $6, $7)",
            &values,
        )?;
        Ok(chain)
    }

    pub(super) fn commit_in(
        &mut self,
        owner: &Epoch,
        lease: Duration,
        entries: &[Entry],
    ) -> Result<Committed, StoreError> {
        let mut tail = self.lock_chain(owner, "live")?;
        let mut done = Committed::default();
        for entry in entries {
            let mut row = entry.row.clone();
            owner.writer.clone_into(&mut row.writer);
            row.epoch = owner.epoch;
            self.merge(&mut tail, row, entry.stored, &mut done)?;
        }
        let until = self.sql.now()?.saturating_add(micros(lease));
        self.store_tail(&tail, Some(until))?;
        Ok(done)
    }

    /// Locks a chain, if its run has this state.
    pub(super) fn lock_chain(&mut self, chain: &Epoch, state: &str) -> Result<Tail, StoreError> {
        let query = format!(
            "SELECT seq, head FROM mirai_writer WHERE writer = $1 AND epoch = $2 AND state = $3{}",
            C::FOR_UPDATE
        );
        let rows = self.sql.query(&query, &[text(&chain.writer), int(chain.epoch), text(state)])?;
        let Some(row) = rows.into_iter().next() else { return Err(StoreError::Fenced(chain.clone())) };
        let mut row = row.into_iter();
        Ok(Tail { chain: chain.clone(), seq: take(&mut row, "seq")?, head: take(&mut row, "head")? })
    }

    pub(super) fn store_tail(&mut self, tail: &Tail, lease: Option<i64>) -> Result<(), StoreError> {
        let mut values = vec![int(tail.seq), tail.head.to_value()];
        values.extend(self.signature(&tail.chain, tail.seq, tail.head));
        values.extend([text(&tail.chain.writer), int(tail.chain.epoch)]);
        values.extend(lease.map(Value::Int));
        let lease = if lease.is_some() { ", lease_until = $7" } else { "" };
        let sql = format!(
            "UPDATE mirai_writer SET seq = $1, head = $2, key_version = $3, mac = $4{lease} \
             WHERE writer = $5 AND epoch = $6"
        );
        self.sql.execute(&sql, &values).map(|_| ())
    }

    /// The two columns of a head's signature.
    pub(super) fn signature(&self, chain: &Epoch, seq: u64, head: Hash) -> [Value; 2] {
        match &self.key {
            Some(key) => [int(key.version.into()), key.sign(chain, seq, head).to_value()],
            None => [Value::Null, Value::Null],
        }
    }

    fn merge(
        &mut self,
        tail: &mut Tail,
        row: Row,
        stored: bool,
        done: &mut Committed,
    ) -> Result<(), StoreError> {
        if stored && self.advance(&row)? {
            done.updated += 1;
            return self.close_link(tail, &row);
        }
        if !stored && self.insert(&row)? {
            done.inserted += 1;
            self.append(tail, &LinkKind::Open, &row.id, open_digest(&row))?;
            return self.close_link(tail, &row);
        }
        let Some(old) = self.select("WHERE id = $1", &[text(&row.id)])?.pop() else {
            // Believed to be stored, and is not: the database was set back. What we know is stored again.
            return self.merge(tail, row, false, done);
        };
        if open_digest(&old) != open_digest(&row) {
            done.conflicts.push(row.id);
            return Ok(());
        }
        match joined(&old, row) {
            None => done.unchanged += 1,
            Some(row) => {
                self.replace(&row)?;
                done.updated += 1;
                if row.state == State::Closed {
                    self.close_link(tail, &row)?;
                } else if old.state == State::Closed || (&old.writer, old.epoch) != (&row.writer, row.epoch) {
                    self.append(tail, &LinkKind::Reclaim, &row.id, open_digest(&row))?;
                }
            }
        }
        Ok(())
    }

    fn close_link(&mut self, tail: &mut Tail, row: &Row) -> Result<(), StoreError> {
        if row.state == State::Open {
            return Ok(());
        }
        let kind = if row.is_crashed() { LinkKind::Recover } else { LinkKind::Close };
        self.append(tail, &kind, &row.id, content_digest(row))
    }

    fn insert(&mut self, row: &Row) -> Result<bool, StoreError> {
        let mut values = row.values();
        values.push(content_digest(row).to_value());
        Ok(self.sql.execute(&self.words.insert, &values)? > 0)
    }

    /// The usual case: an open row of ours goes on, or ends.
    fn advance(&mut self, row: &Row) -> Result<bool, StoreError> {
        let mut values = mutable_values(row);
        values.extend([
            content_digest(row).to_value(),
            text(&row.id),
            text(&row.writer),
            int(row.epoch),
            // An end counts what it counts; it may take back tokens after a stop string.
            if row.state == State::Open { int(row.completion_tokens) } else { Value::Int(i64::MAX) },
        ]);
        Ok(self.sql.execute(&self.words.update, &values)? > 0)
    }

    pub(super) fn replace(&mut self, row: &Row) -> Result<(), StoreError> {
        let mut values = row.values();
        values.extend([content_digest(row).to_value(), text(&row.id)]);
        self.sql.execute(&self.words.replace, &values).map(|_| ())
    }

    pub(super) fn append(
        &mut self,
        tail: &mut Tail,
        kind: &LinkKind,
        id: &str,
        digest: Hash,
    ) -> Result<(), StoreError> {
        tail.seq += 1;
        tail.head = next_head(tail.head, tail.seq, kind, id, digest);
        let values = [
            text(&tail.chain.writer),
            int(tail.chain.epoch),
            int(tail.seq),
            kind.to_value(),
            text(id),
            digest.to_value(),
            tail.head.to_value(),
        ];
        let sql = "INSERT INTO mirai_link (writer, epoch, seq, kind, id, digest, head) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
        self.sql.execute(sql, &values).map(|_| ())
    }
}

/// What a stored row becomes when another state of the same request comes; `None` if nothing changes.
fn joined(old: &Row, new: Row) -> Option<Row> {
    if old.state == State::Closed && old.finish != Finish::Crashed {
        // Nobody knew that it was written, so the client was told of a failure.
        let was_good = matches!(old.finish, Finish::Stop | Finish::Length);
        if !was_good || new.state != State::Closed || new.finish != Finish::Error {
            return None;
        }
    }
    let mut row = new;
    if row.state == State::Open || row.is_crashed() {
        row.completion_tokens = row.completion_tokens.max(old.completion_tokens);
        row.reasoning_tokens = row.reasoning_tokens.max(old.reasoning_tokens);
        row.cached_tokens = row.cached_tokens.max(old.cached_tokens);
        row.wasted_tokens = row.wasted_tokens.max(old.wasted_tokens);
        row.duration = row.duration.max(old.duration);
        row.gpu_micros = row.gpu_micros.max(old.gpu_micros);
        row.energy_microjoules = row.energy_microjoules.max(old.energy_microjoules);
        row.first_token_after = old.first_token_after.or(row.first_token_after);
    }
    // Erased stays erased.
    row.user.clone_from(&old.user);
    row.user_salt = old.user_salt;
    let same = Row { writer: old.writer.clone(), epoch: old.epoch, ..row.clone() } == *old;
    let crashed_again = old.is_crashed() && row.is_crashed();
    // Who says the same again changes nothing; only a living owner takes a row over.
    if same && (crashed_again || (&old.writer, old.epoch) == (&row.writer, row.epoch)) {
        return None;
    }
    Some(row)
}
