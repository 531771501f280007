//! Rows that have ended, once more and in order, for a consumer outside.
//!
//! Owns how far each consumer has been told, durably, and which replica tells it. The chains are the queue: a row
//! that ends appends a link, so nothing is written on the way of a request. Delivery is at least once; a row that
//! recovery closed and its owner closed again is delivered twice, with what it said each time.

use std::time::Duration;

use super::sql::{Sql, SqlStore, int, micros, take, text};
use crate::chain::Epoch;
use crate::error::StoreError;
use crate::row::{FIELDS, Row};
use crate::value::{Hash, Hex, Value};

/// Chains looked at for one batch.
const CHAINS: u64 = 64;

/// What a consumer has not been told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Ended rows and their digests, which tell two ends of one request apart.
    pub rows: Vec<(Row, Hash)>,
    /// How far each chain has been read for it.
    places: Vec<(Epoch, u64)>,
}

impl Batch {
    /// Whether there is nothing to tell and nothing to remember.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

/// A queue of ended rows for consumers by name.
pub trait Outbox: Send {
    /// Takes or extends the right to tell a consumer. False while another holder has it.
    ///
    /// # Errors
    /// The store failed.
    fn hold(&mut self, consumer: &str, holder: &str, lease: Duration) -> Result<bool, StoreError>;

    /// The next rows, from at most `limit` links.
    ///
    /// # Errors
    /// The store failed, or a row cannot be read.
    fn next(&mut self, consumer: &str, limit: usize) -> Result<Batch, StoreError>;

    /// Remembers that a batch was told. False if the right was lost meanwhile: another may tell it once more.
    ///
    /// # Errors
    /// The store failed.
    fn told(&mut self, consumer: &str, holder: &str, batch: &Batch) -> Result<bool, StoreError>;

    /// Gives the right back.
    ///
    /// # Errors
    /// The store failed.
    fn let_go(&mut self, consumer: &str, holder: &str) -> Result<(), StoreError>;

    /// Links that the consumer was not told of: openings and ends.
    ///
    /// # Errors
    /// The store failed.
    fn pending(&mut self, consumer: &str) -> Result<u64, StoreError>;
}

/// Chains and how far a consumer was told of them.
const BEHIND: &str = "FROM mirai_writer w LEFT JOIN mirai_outbox o ON o.consumer = $1 AND o.writer = w.writer \
                      AND o.epoch = w.epoch WHERE w.seq > COALESCE(o.seq, 0)";

impl<C: Sql> SqlStore<C> {
    fn hold_in(&mut self, consumer: &str, holder: &str, lease: Duration) -> Result<bool, StoreError> {
        let now = self.sql.now()?;
        let until = Value::Int(now.saturating_add(micros(lease)));
        let mine = [text(consumer), text(holder), until, Value::Int(now)];
        let take = "UPDATE mirai_outbox_lease SET holder = $2, lease_until = $3 \
                    WHERE consumer = $1 AND (holder = $2 OR lease_until < $4)";
        let first = "INSERT INTO mirai_outbox_lease (consumer, holder, lease_until) VALUES ($1, $2, $3) \
                     ON CONFLICT (consumer) DO NOTHING";
        Ok(self.sql.execute(take, &mine)? > 0 || self.sql.execute(first, &mine[..3])? > 0)
    }

    /// Adds the ends of rows among the links of one chain after a place. Returns how many links that were.
    fn ends(&mut self, chain: Epoch, after: u64, limit: u64, batch: &mut Batch) -> Result<u64, StoreError> {
        let sql = format!(
            "SELECT l.seq, r.digest, {} FROM mirai_link l LEFT JOIN mirai_request r ON r.id = l.id \
             AND r.digest = l.digest AND r.state = 'closed' AND l.kind <> 'open' \
             WHERE l.writer = $1 AND l.epoch = $2 AND l.seq > $3 ORDER BY l.seq LIMIT $4",
            self.words.r_columns
        );
        let params = [text(&chain.writer), int(chain.epoch), int(after), int(limit)];
        let (mut last, mut links) = (after, 0);
        for link in self.sql.query(&sql, &params)? {
            let mut values = link.into_iter();
            last = take(&mut values, "seq")?;
            links += 1;
            if let Some(digest) = take::<Option<Hex<32>>>(&mut values, "digest")? {
                batch.rows.push((Row::from_values(values.take(FIELDS.len()))?, digest));
            }
        }
        batch.places.push((chain, last));
        Ok(links)
    }
}

impl<C: Sql> Outbox for SqlStore<C> {
    fn hold(&mut self, consumer: &str, holder: &str, lease: Duration) -> Result<bool, StoreError> {
        self.transaction(|store| store.hold_in(consumer, holder, lease))
    }

    fn next(&mut self, consumer: &str, limit: usize) -> Result<Batch, StoreError> {
        let sql = format!(
            "SELECT w.writer, w.epoch, COALESCE(o.seq, 0) {BEHIND} ORDER BY w.writer, w.epoch LIMIT $2"
        );
        let chains = self.sql.query(&sql, &[text(consumer), int(CHAINS)])?;
        let mut batch = Batch::default();
        let mut left = limit as u64;
        for row in chains {
            if left == 0 {
                break;
            }
            let values = &mut row.into_iter();
            let chain = Epoch { writer: take(values, "writer")?, epoch: take(values, "epoch")? };
            left -= self.ends(chain, take(values, "seq")?, left, &mut batch)?;
        }
        Ok(batch)
    }

    fn told(&mut self, consumer: &str, holder: &str, batch: &Batch) -> Result<bool, StoreError> {
        self.transaction(|store| {
            let lock = format!(
                "SELECT 1 FROM mirai_outbox_lease WHERE consumer = $1 AND holder = $2{}",
                C::FOR_UPDATE
            );
            if store.sql.query(&lock, &[text(consumer), text(holder)])?.is_empty() {
                return Ok(false);
            }
            let sql = "INSERT INTO mirai_outbox (consumer, writer, epoch, seq) VALUES ($1, $2, $3, $4) \
                       ON CONFLICT (consumer, writer, epoch) DO UPDATE SET seq = excluded.seq \
                       WHERE mirai_outbox.seq < excluded.seq";
            for (chain, seq) in &batch.places {
                let params = [text(consumer), text(&chain.writer), int(chain.epoch), int(*seq)];
                store.sql.execute(sql, &params)?;
            }
            Ok(true)
        })
    }

    fn let_go(&mut self, consumer: &str, holder: &str) -> Result<(), StoreError> {
        let sql = "DELETE FROM mirai_outbox_lease WHERE consumer = $1 AND holder = $2";
        self.sql.execute(sql, &[text(consumer), text(holder)]).map(|_| ())
    }

    fn pending(&mut self, consumer: &str) -> Result<u64, StoreError> {
        let sql = format!("SELECT CAST(COALESCE(SUM(w.seq - COALESCE(o.seq, 0)), 0) AS BIGINT) {BEHIND}");
        let rows = self.sql.query(&sql, &[text(consumer)])?;
        take(&mut rows.into_iter().flatten(), "pending")
    }
}
