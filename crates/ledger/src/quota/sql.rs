//! Counters in the store.
//!
//! Owns the statements. A transaction locks a replica's own row and then applications in the order of their
//! names, so that replicas wait for each other and never in a circle.

use std::time::Duration;

use super::account::{Answer, Cell, Item, State};
use super::calendar::Calendar;
use super::kind::Kind;
use crate::error::StoreError;
use crate::row::{Finish, RowError};
use crate::store::SqlStore;
use crate::store::sql::{Sql, int, micros, take, text};
use crate::value::{CellError, Value};

/// Leases of one dead replica that one transaction ends.
const SWEPT: u64 = 256;
/// Dead replicas looked at in one round.
const DEAD: u64 = 64;
/// How far the times of rows and of a replica's last word may be apart, microseconds.
const SLACK: i64 = 30_000_000;
/// The row of an application that is locked. It counts nothing: it holds the last second in which something was
/// taken, and by how much the application's seconds are ahead of the clock's.
const ANCHOR: &str = "anchor";

/// A replica, from its registration on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Unlike any other's, ever.
    pub(crate) name: String,
    /// The ledger's writer in the same process.
    pub(crate) writer: String,
    /// Whether that writer's rows, in this store, tell what it used.
    pub(crate) by_rows: bool,
}

/// What a transaction came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Synced {
    /// As asked.
    Done {
        /// The store's clock, microseconds since 1970, at its beginning.
        now: i64,
        /// One for each item.
        answers: Vec<Answer>,
    },
    /// This replica was given up: nothing was done.
    GivenUp,
}

/// The lease, and the clock by which rows are dated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) lease: Duration,
    /// Microseconds since 1970.
    pub(crate) wall: i64,
}

/// What sweeping did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// Replicas that are over.
    pub(crate) holders: u64,
    /// Tokens of their leases that count as spent.
    pub(crate) spent: u64,
    /// Tokens of their leases that came back.
    pub(crate) back: u64,
    /// Whether there is more to do.
    pub(crate) more: bool,
}

/// Durable counters. Every method is one transaction, but for sweeping, which is one a replica.
pub(crate) trait QuotaStore: Send {
    /// Makes a replica known. With `takeover` earlier replicas of its writer are known to be over.
    fn enrol(&mut self, holder: &Holder, terms: Terms, takeover: bool) -> Result<(), StoreError>;

    /// How many transactions of a replica took effect, once none of them can any more. `None` if it is not known.
    fn sequence(&mut self, holder: &str) -> Result<Option<u64>, StoreError>;

    /// Reports and asks: a replica's transaction number `sequence + 1`. What it comes to is left in `outcome`
    /// before it is made durable, for the case that nobody hears whether it was.
    fn sync(
        &mut self,
        calendar: &Calendar,
        who: (&str, u64),
        terms: Terms,
        items: &[Item],
        outcome: &mut Option<Synced>,
    ) -> Result<(), StoreError>;

    /// Ends the leases of replicas that were silent for too long.
    fn sweep(&mut self, me: &str, lease: Duration) -> Result<Swept, StoreError>;

    /// A replica goes. What it still holds is left to sweeping.
    fn leave(&mut self, holder: &str) -> Result<(), StoreError>;
}

fn unknown_kind() -> StoreError {
    StoreError::Row(RowError::Cell { field: "kind", error: CellError::new("a kind of limit", &Value::Null) })
}

fn kind_of(word: &str) -> Result<Kind, StoreError> {
    Kind::by_word(word).ok_or_else(unknown_kind)
}

impl<C: Sql> QuotaStore for SqlStore<C> {
    fn enrol(&mut self, holder: &Holder, terms: Terms, takeover: bool) -> Result<(), StoreError> {
        self.transaction(|store| {
            let sql = store.driver();
            if takeover {
                let over = "UPDATE mirai_quota_holder SET lease_until = 0 WHERE writer = $1";
                sql.execute(over, &[text(&holder.writer)])?;
            }
            let until = sql.now()?.saturating_add(micros(terms.lease));
            let new = "INSERT INTO mirai_quota_holder (holder, writer, by_rows, seq, lease_until, started_at, \
                       synced_at) VALUES ($1, $2, $3, 0, $4, $5, $5)";
            let by_rows = Value::Int(holder.by_rows.into());
            let params = [text(&holder.name), text(&holder.writer), by_rows, Value::Int(until)];
            sql.execute(new, &[&params[..], &[Value::Int(terms.wall)]].concat()).map(|_| ())
        })
    }

    fn sequence(&mut self, holder: &str) -> Result<Option<u64>, StoreError> {
        // The lock waits for a transaction of ours that the database may still be busy with.
        self.transaction(|store| store.locked_sequence(holder))
    }

    fn sync(
        &mut self,
        calendar: &Calendar,
        (holder, sequence): (&str, u64),
        terms: Terms,
        items: &[Item],
        outcome: &mut Option<Synced>,
    ) -> Result<(), StoreError> {
        *outcome = None;
        self.transaction(|store| {
            let Some(found) = store.locked_sequence(holder)? else {
                *outcome = Some(Synced::GivenUp);
                return Ok(());
            };
            if found != sequence {
                let expected = format!("a replica's transactions are out of order: {found}, not {sequence}");
                return Err(StoreError::Broken(expected));
            }
            let now = store.driver().now()?;
            let alive = "UPDATE mirai_quota_holder SET seq = $1, lease_until = $2, synced_at = $3 \
                         WHERE holder = $4";
            let until = Value::Int(now.saturating_add(micros(terms.lease)));
            let params = [int(sequence + 1), until, Value::Int(terms.wall), text(holder)];
            store.driver().execute(alive, &params)?;
            let mut answers = Vec::with_capacity(items.len());
            for item in items {
                answers.push(store.account(calendar, holder, item)?);
            }
            *outcome = Some(Synced::Done { now, answers });
            Ok(())
        })
    }

    fn sweep(&mut self, me: &str, lease: Duration) -> Result<Swept, StoreError> {
        let now = self.driver().now()?;
        let dead = "SELECT holder FROM mirai_quota_holder WHERE lease_until < $1 AND holder <> $2 \
                    ORDER BY lease_until, holder LIMIT $3";
        let dead = self.driver().query(dead, &[Value::Int(now), text(me), int(DEAD)])?;
        let mut all = Swept::default();
        for row in dead {
            let holder: String = take(&mut row.into_iter(), "holder")?;
            let done = self.transaction(|store| store.sweep_one(&holder, lease))?;
            all.holders += done.holders;
            all.spent += done.spent;
            all.back += done.back;
            all.more |= done.more;
        }
        Ok(all)
    }

    fn leave(&mut self, holder: &str) -> Result<(), StoreError> {
        self.transaction(|store| {
            let sql = store.driver();
            let over = "UPDATE mirai_quota_holder SET lease_until = 0 WHERE holder = $1";
            sql.execute(over, &[text(holder)])?;
            let gone = "DELETE FROM mirai_quota_holder WHERE holder = $1 \
                        AND NOT EXISTS (SELECT 1 FROM mirai_quota_lease WHERE holder = $1)";
            sql.execute(gone, &[text(holder)]).map(|_| ())
        })
    }
}

impl<C: Sql> SqlStore<C> {
    fn locked_sequence(&mut self, holder: &str) -> Result<Option<u64>, StoreError> {
        let query = "SELECT seq FROM mirai_quota_holder WHERE holder = $1";
        let rows = self.driver().query(&format!("{query}{}", C::FOR_UPDATE), &[text(holder)])?;
        rows.into_iter().next().map(|row| take(&mut row.into_iter(), "seq")).transpose()
    }

    /// Nobody else changes an application's counters until the transaction ends. Returns its last second, and by
    /// how much its seconds are ahead.
    fn lock_application(&mut self, application: &str) -> Result<(i64, i64), StoreError> {
        let key = [text(application), text(ANCHOR)];
        let lock = "SELECT used, leased FROM mirai_quota WHERE application = $1 AND kind = $2 AND bucket = 0";
        let lock = format!("{lock}{}", C::FOR_UPDATE);
        let mut rows = self.driver().query(&lock, &key)?;
        if rows.is_empty() {
            let new = "INSERT INTO mirai_quota (application, kind, bucket, used, leased) \
                       VALUES ($1, $2, 0, 0, 0) ON CONFLICT (application, kind, bucket) DO NOTHING";
            self.driver().execute(new, &key)?;
            rows = self.driver().query(&lock, &key)?;
        }
        let values = &mut rows.into_iter().flatten();
        Ok((take(values, "used")?, take(values, "leased")?))
    }

    fn account(&mut self, calendar: &Calendar, holder: &str, item: &Item) -> Result<Answer, StoreError> {
        let (last, ahead) = self.lock_application(&item.application)?;
        // After the lock: what is granted is of the moment in which it is.
        let at = calendar.at(self.driver().now()?).ahead_by(ahead).not_before(last);
        if (at.second(), at.ahead) != (last, ahead) {
            let set = "UPDATE mirai_quota SET used = $3, leased = $4 WHERE application = $1 AND kind = $2 \
                       AND bucket = 0";
            let key = [text(&item.application), text(ANCHOR)];
            let clock = [Value::Int(at.second()), Value::Int(at.ahead)];
            self.driver().execute(set, &[&key[..], &clock].concat())?;
        }
        let before = self.state(holder, &item.application)?;
        let mut after = before.clone();
        let answer = after.apply(item, at);
        self.store_state(holder, &item.application, &before, &after)?;
        Ok(answer)
    }

    fn state(&mut self, holder: &str, application: &str) -> Result<State, StoreError> {
        let mut state = State::default();
        let cells = "SELECT kind, bucket, used, leased FROM mirai_quota WHERE application = $1";
        for row in self.driver().query(cells, &[text(application)])? {
            let values = &mut row.into_iter();
            let word: String = take(values, "kind")?;
            // The anchor, and kinds that a newer release counts.
            let Some(kind) = Kind::by_word(&word) else { continue };
            let key = (kind, take(values, "bucket")?);
            let cell = Cell { used: take(values, "used")?, leased: take(values, "leased")? };
            state.cells.insert(key, cell);
        }
        let held =
            "SELECT kind, bucket, amount FROM mirai_quota_lease WHERE holder = $1 AND application = $2";
        for row in self.driver().query(held, &[text(holder), text(application)])? {
            let values = &mut row.into_iter();
            let word: String = take(values, "kind")?;
            let key = (kind_of(&word)?, take(values, "bucket")?);
            state.held.insert(key, take(values, "amount")?);
        }
        Ok(state)
    }

    fn store_state(
        &mut self,
        holder: &str,
        application: &str,
        before: &State,
        after: &State,
    ) -> Result<(), StoreError> {
        for ((kind, bucket), cell) in &after.cells {
            if before.cells.get(&(*kind, *bucket)) != Some(cell) {
                let set = "INSERT INTO mirai_quota (application, kind, bucket, used, leased) \
                           VALUES ($1, $2, $3, $4, $5) ON CONFLICT (application, kind, bucket) \
                           DO UPDATE SET used = excluded.used, leased = excluded.leased";
                let key = [text(application), text(kind.word()), Value::Int(*bucket)];
                let counts = [int(cell.used), int(cell.leased)];
                self.driver().execute(set, &[&key[..], &counts].concat())?;
            }
        }
        for (kind, bucket) in before.cells.keys().filter(|key| !after.cells.contains_key(key)) {
            let gone = "DELETE FROM mirai_quota WHERE application = $1 AND kind = $2 AND bucket = $3";
            self.driver().execute(gone, &[text(application), text(kind.word()), Value::Int(*bucket)])?;
        }
        let of =
            |kind: Kind, bucket| [text(holder), text(application), text(kind.word()), Value::Int(bucket)];
        for ((kind, bucket), amount) in &after.held {
            if before.held.get(&(*kind, *bucket)) != Some(amount) {
                let set = "INSERT INTO mirai_quota_lease (holder, application, kind, bucket, amount) \
                           VALUES ($1, $2, $3, $4, $5) ON CONFLICT (holder, application, kind, bucket) \
                           DO UPDATE SET amount = excluded.amount";
                self.driver().execute(set, &[&of(*kind, *bucket)[..], &[int(*amount)]].concat())?;
            }
        }
        for (kind, bucket) in before.held.keys().filter(|key| !after.held.contains_key(key)) {
            let gone = "DELETE FROM mirai_quota_lease WHERE holder = $1 AND application = $2 AND kind = $3 \
                        AND bucket = $4";
            self.driver().execute(gone, &of(*kind, *bucket))?;
        }
        Ok(())
    }

    /// Ends leases of a dead replica. Places of its requests come back: they died with it. Of its tokens as many
    /// count as spent as its rows say, once all of them are closed, or all where rows do not tell.
    fn sweep_one(&mut self, holder: &str, lease: Duration) -> Result<Swept, StoreError> {
        let now = self.driver().now()?;
        let query = "SELECT writer, by_rows, started_at, synced_at FROM mirai_quota_holder \
                     WHERE holder = $1 AND lease_until < $2";
        let query = format!("{query}{}", C::FOR_UPDATE);
        let Some(row) = self.driver().query(&query, &[text(holder), Value::Int(now)])?.into_iter().next()
        else {
            return Ok(Swept::default());
        };
        let values = &mut row.into_iter();
        let (writer, by_rows): (String, i64) = (take(values, "writer")?, take(values, "by_rows")?);
        let (started, synced): (i64, i64) = (take(values, "started_at")?, take(values, "synced_at")?);
        let rows = Rows {
            writer,
            from: started.saturating_sub(SLACK),
            to: synced.saturating_add(micros(lease)).saturating_add(SLACK),
            synced: synced.saturating_sub(SLACK),
        };
        let waits = by_rows != 0 && self.has_open_rows(&rows)?;
        let mut leases = self.leases(holder)?;
        let more = leases.len() as u64 == SWEPT;
        leases.sort();
        let mut done = Swept { more: more && !waits, ..Swept::default() };
        let mut left = more;
        for (application, word, bucket, amount) in leases {
            let kind = kind_of(&word)?;
            if kind.is_tokens() && waits {
                left = true;
                continue;
            }
            self.lock_application(&application)?;
            let spent = match (kind.is_tokens(), by_rows != 0) {
                (false, _) => 0,
                (true, false) => amount,
                (true, true) => self.tokens_of(&rows, &application)?.min(amount),
            };
            let key = [text(&application), text(&word), Value::Int(bucket)];
            let change = "UPDATE mirai_quota SET used = used + $4, leased = leased - $5 \
                          WHERE application = $1 AND kind = $2 AND bucket = $3";
            self.driver().execute(change, &[&key[..], &[int(spent), int(amount)]].concat())?;
            let gone = "DELETE FROM mirai_quota_lease WHERE application = $1 AND kind = $2 AND bucket = $3 \
                        AND holder = $4";
            self.driver().execute(gone, &[&key[..], &[text(holder)]].concat())?;
            if kind.is_tokens() {
                done.spent += spent;
                done.back += amount - spent;
            }
        }
        if !left {
            let gone = "DELETE FROM mirai_quota_holder WHERE holder = $1";
            done.holders = self.driver().execute(gone, &[text(holder)])?;
        }
        Ok(done)
    }

    /// A dead replica's leases, those of places first.
    fn leases(&mut self, holder: &str) -> Result<Vec<(String, String, i64, u64)>, StoreError> {
        let query = "SELECT application, kind, bucket, amount FROM mirai_quota_lease WHERE holder = $1 \
                     ORDER BY CASE WHEN kind = $2 THEN 0 ELSE 1 END, application, kind, bucket LIMIT $3";
        let first = text(Kind::ConcurrentRequests.word());
        let rows = self.driver().query(query, &[text(holder), first, int(SWEPT)])?;
        let read = |row: Vec<Value>| {
            let values = &mut row.into_iter();
            let (application, kind) = (take(values, "application")?, take(values, "kind")?);
            Ok((application, kind, take(values, "bucket")?, take(values, "amount")?))
        };
        rows.into_iter().map(read).collect()
    }

    fn has_open_rows(&mut self, of: &Rows) -> Result<bool, StoreError> {
        let open = "SELECT 1 FROM mirai_request WHERE writer = $1 AND state = 'open' AND queued_at >= $2 \
                    AND queued_at <= $3 LIMIT 1";
        let params = [text(&of.writer), Value::Int(of.from), Value::Int(of.to)];
        Ok(!self.driver().query(open, &params)?.is_empty())
    }

    /// Tokens of rows that ended after the replica's last word: what it may have used and not reported.
    fn tokens_of(&mut self, of: &Rows, application: &str) -> Result<u64, StoreError> {
        let sum = "SELECT CAST(COALESCE(SUM(prompt_tokens + completion_tokens), 0) AS BIGINT) \
                   FROM mirai_request WHERE writer = $1 AND application = $2 AND queued_at >= $3 \
                   AND queued_at <= $4 AND (finish = $5 OR queued_at + duration >= $6)";
        let finish = text(Finish::Crashed.as_str());
        let who = [text(&of.writer), text(application)];
        let params =
            [&who[..], &[Value::Int(of.from), Value::Int(of.to), finish, Value::Int(of.synced)]].concat();
        let rows = self.driver().query(sum, &params)?;
        take(&mut rows.into_iter().flatten(), "sum")
    }
}

/// Which rows a dead replica may have used its leases for.
struct Rows {
    writer: String,
    /// Arrival at or after this.
    from: i64,
    /// And at or before this: later ones are those of its successor.
    to: i64,
    /// The replica's last word.
    synced: i64,
}
