//! The thread that writes.
//!
//! Owns the store and the spool. Each turn takes what the requests have to say, makes it durable in one commit,
//! and tells them. While the store is out of reach, batches go to the spool, and are replayed in order before
//! anything else reaches the store. Nothing leaves the queue before it is durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::slot::{Phase, Slot};
use super::{Health, Shared, StartError};
use crate::chain::Epoch;
use crate::error::StoreError;
use crate::row::{Finish, Row, State};
use crate::spool::{Spool, SpoolError};
use crate::store::{Committed, Entry, Store};

/// Frames replayed in one turn: requests that wait for the spool must not wait for all of it.
const FRAMES: usize = 8;
/// Rows of dead writers closed in one turn.
const RECOVERED: usize = 256;
/// Registrations in one turn: each means that somebody gave this writer up.
const REGISTRATIONS: usize = 3;

pub(super) struct Committer {
    pub(super) store: Box<dyn Store>,
    pub(super) spool: Option<Spool>,
    pub(super) shared: Arc<Shared>,
    pub(super) owner: Option<Epoch>,
    /// Bytes of the spool that a dead process wrote.
    inherited: u64,
    /// Where the next frame to replay begins.
    replay_at: u64,
    /// When the store may be tried again; `None` if it did not fail.
    retry_at: Option<Instant>,
    failing_since: Option<Instant>,
    beat_at: Instant,
    recover_at: Instant,
}

/// What a batch came to.
enum Batch {
    /// Durable in the store, but for conflicts.
    Stored(Committed),
    /// Durable in the spool.
    Spooled,
    /// Not durable.
    Failed,
}

impl Committer {
    pub(super) fn new(
        store: Box<dyn Store>,
        spool: Option<Spool>,
        shared: Arc<Shared>,
        now: Instant,
    ) -> Self {
        let inherited = spool.as_ref().map_or(0, Spool::len);
        Self {
            store,
            spool,
            shared,
            owner: None,
            inherited,
            replay_at: 0,
            retry_at: None,
            failing_since: None,
            beat_at: now,
            recover_at: now,
        }
    }

    /// Registers, before the first request. Out of reach is no error if there is a spool.
    pub(super) fn first(&mut self) -> Result<(), StartError> {
        match self.register() {
            Err(error) if error.is_unavailable() && self.spool.is_some() => {
                self.failed(&error, Instant::now());
                Ok(())
            }
            other => Ok(other?),
        }
    }

    pub(super) fn run(mut self) {
        // Also when a panic ends it: nothing would become durable any more.
        let _end = End(self.shared.clone());
        while self.shared.health() != Health::Broken {
            self.shared.set_busy(true);
            let wait = self.turn(Instant::now());
            self.shared.set_busy(false);
            if self.is_over() {
                break;
            }
            self.wait(wait);
        }
        if let Some(owner) = self.owner.take().filter(|_| self.shared.health() != Health::Broken)
            && let Err(error) = self.store.release(&owner)
        {
            tracing::warn!(%error, "the ledger's run is left to its lease");
        }
    }

    /// Stopping, and either all is written or the store does not answer.
    fn is_over(&self) -> bool {
        let queue = self.shared.queue();
        queue.stopping && (queue.dirty.is_empty() || self.failing_since.is_some())
    }

    /// Waits for something to do, at most so long; then a little for more to share the commit.
    fn wait(&self, at_most: Duration) {
        let queue = self.shared.queue();
        let idle = |queue: &mut super::Queue| queue.dirty.is_empty() && !queue.stopping;
        // What waits for the store to come back must not keep the thread busy.
        let retrying = self.shared.health() >= Health::Retrying;
        let patient = |queue: &mut super::Queue| (retrying || idle(queue)) && !queue.stopping;
        let Ok((queue, _)) = self.shared.work.wait_timeout_while(queue, at_most, patient) else { return };
        let gather = |queue: &mut super::Queue| !queue.urgent && !queue.stopping && !queue.dirty.is_empty();
        // A poisoned lock is taken all the same, at the next turn.
        let _ = self.shared.work.wait_timeout_while(queue, self.shared.config.gather, gather);
    }

    /// Does what there is to do. Returns how long there will be nothing else, unless a request comes.
    pub(super) fn turn(&mut self, now: Instant) -> Duration {
        self.write(now);
        let mut busy = self.replay(now);
        if self.is_reachable(now) && now >= self.beat_at {
            self.beat(now);
        }
        if self.is_reachable(now) && now >= self.recover_at {
            busy |= self.recover(now);
        }
        self.judge(now);
        if busy {
            return Duration::ZERO;
        }
        let next = self.retry_at.unwrap_or_else(|| self.beat_at.min(self.recover_at));
        next.saturating_duration_since(now)
    }

    fn is_reachable(&self, now: Instant) -> bool {
        self.shared.health() != Health::Broken && self.retry_at.is_none_or(|at| now >= at)
    }

    /// Whether batches must go to the spool: the store failed, or has yet to get what was spooled before.
    fn detours(&self, now: Instant) -> bool {
        self.spool.as_ref().is_some_and(|spool| !spool.is_empty() || !self.is_reachable(now))
    }

    fn write(&mut self, now: Instant) {
        if self.shared.health() == Health::Broken || (self.spool.is_none() && !self.is_reachable(now)) {
            return;
        }
        let slots: Vec<Arc<Slot>> = {
            let mut queue = self.shared.queue();
            let count = queue.dirty.len().min(self.shared.config.max_batch);
            queue.urgent = count < queue.dirty.len();
            queue.dirty.drain(..count).collect()
        };
        if slots.is_empty() {
            return;
        }
        let entries: Vec<Entry> = slots.iter().map(|slot| slot.take()).collect();
        if !self.detours(now) {
            let began = Instant::now();
            match self.commit(&entries) {
                Ok(done) => {
                    self.shared.counters.committed(entries.len(), began.elapsed());
                    self.reached(now);
                    return self.tell(slots.into_iter().zip(entries), &Batch::Stored(done));
                }
                Err(error) => self.failed(&error, now),
            }
        }
        if self.shared.health() == Health::Broken || self.spool.is_none() {
            return self.tell(slots.into_iter().zip(entries), &Batch::Failed);
        }
        // Openings and ends always find room, because it was kept for them. Checkpoints take none of it.
        let all = slots.into_iter().zip(entries);
        let (kept, mut rest): (Vec<_>, Vec<_>) =
            all.partition(|(slot, entry)| entry.row.state == State::Closed || slot.phase() == Phase::New);
        if self.has_room_for(kept.len() + rest.len()) {
            self.failing_since = None;
            rest.extend(kept);
            return self.spool(rest, now);
        }
        self.failing_since.get_or_insert(now);
        self.tell(rest, &Batch::Failed);
        self.spool(kept, now);
    }

    /// Whether so many rows fit into the spool beside the ends of all open requests.
    fn has_room_for(&self, rows: usize) -> bool {
        self.spool.as_ref().is_some_and(|spool| spool.len() + self.shared.reserved(rows) <= spool.limit())
    }

    /// Tells requests what became of their states.
    fn tell(&mut self, states: impl IntoIterator<Item = (Arc<Slot>, Entry)>, batch: &Batch) {
        let mut again = Vec::new();
        for (slot, entry) in states {
            let conflict = matches!(batch, Batch::Stored(done) if done.conflicts.contains(&entry.row.id));
            match batch {
                Batch::Failed => {
                    if slot.requeue() {
                        again.push(slot);
                    }
                    continue;
                }
                // Its end says the same once more.
                _ if slot.phase() == Phase::Conflict => {}
                _ if conflict => {
                    self.shared.counters.conflicts.add(1);
                    tracing::error!(id = %entry.row.id, "two requests have one id");
                    slot.conflict();
                    self.shared.open.fetch_sub(1, Ordering::AcqRel);
                }
                Batch::Stored(_) => self.durable(&slot, &entry.row, true),
                Batch::Spooled => self.durable(&slot, &entry.row, false),
            }
        }
        if !again.is_empty() {
            let mut queue = self.shared.queue();
            again.append(&mut queue.dirty);
            queue.dirty = again;
        }
    }

    fn durable(&self, slot: &Slot, row: &Row, stored: bool) {
        let counters = &self.shared.counters;
        let closes = row.state == State::Closed;
        let before = slot.phase();
        if before == Phase::New {
            counters.opened.add(1);
        }
        if closes && before != Phase::Closed {
            counters.closed.add(1);
            counters.closed_tokens.add(row.completion_tokens);
            self.shared.count_for_application(row);
            self.shared.open.fetch_sub(1, Ordering::AcqRel);
        }
        // Last: who is told may look at the counters.
        slot.durable(row, stored);
    }

    fn register(&mut self) -> Result<(), StoreError> {
        let config = &self.shared.config;
        // Taken over once: later this process itself is the earlier run.
        let takeover = config.takeover && self.shared.counters.fenced.get() == 0;
        let owner = self.store.register(&config.writer, config.lease, takeover)?;
        tracing::info!(%owner, "the ledger is registered");
        self.owner = Some(owner);
        Ok(())
    }

    /// Commits to the store, and registers again where another has given this writer up.
    fn commit(&mut self, entries: &[Entry]) -> Result<Committed, StoreError> {
        for _ in 0..REGISTRATIONS {
            let Some(owner) = self.owner.clone() else {
                self.register()?;
                continue;
            };
            match self.store.commit(&owner, self.shared.config.lease, entries) {
                Err(StoreError::Fenced(owner)) => {
                    tracing::warn!(%owner, "this writer was given up by another; it registers again");
                    self.shared.counters.fenced.add(1);
                    self.owner = None;
                }
                other => return other,
            }
        }
        Err(StoreError::Unavailable("this writer is given up again and again".to_owned()))
    }

    /// Puts a batch into the spool.
    fn spool(&mut self, batch: Vec<(Arc<Slot>, Entry)>, now: Instant) {
        let rows: Vec<Row> = batch.iter().map(|(_, entry)| entry.row.clone()).collect();
        let Some(spool) = self.spool.as_mut().filter(|_| !rows.is_empty()) else { return };
        match spool.append(&rows) {
            Ok(()) => {
                self.shared.counters.spooled_rows.add(rows.len() as u64);
                self.shared.spooled_bytes.store(spool.len(), Ordering::Release);
                self.tell(batch, &Batch::Spooled);
            }
            Err(error) => {
                let broken = spool.is_broken();
                self.spool_failed(&error, broken, now);
                self.tell(batch, &Batch::Failed);
            }
        }
    }

    fn spool_failed(&mut self, error: &SpoolError, broken: bool, now: Instant) {
        tracing::error!(%error, "the ledger's spool failed");
        self.failing_since.get_or_insert(now);
        if broken {
            self.shared.set_health(Health::Broken);
        }
    }

    /// Replays some frames. Returns whether there are more.
    fn replay(&mut self, now: Instant) -> bool {
        for _ in 0..FRAMES {
            if !self.is_reachable(now) {
                return false;
            }
            let Some(spool) = self.spool.as_mut().filter(|spool| !spool.is_empty()) else { return false };
            let at = self.replay_at;
            let (rows, next) = match spool.batch(at) {
                Ok(Some(batch)) => batch,
                Ok(None) => return self.replayed(now),
                Err(error) => {
                    self.spool_failed(&error, true, now);
                    return false;
                }
            };
            let dead = at < self.inherited;
            let entry = |row| Entry { row: if dead { crashed(row) } else { row }, stored: false };
            let entries: Vec<Entry> = rows.into_iter().map(entry).collect();
            match self.commit(&entries) {
                Ok(done) => {
                    self.reached(now);
                    self.replay_at = next;
                    self.shared.counters.replayed_rows.add(entries.len() as u64);
                    self.shared.counters.conflicts.add(done.conflicts.len() as u64);
                }
                Err(error) => {
                    self.failed(&error, now);
                    return false;
                }
            }
        }
        true
    }

    /// The store has everything that was spooled.
    fn replayed(&mut self, now: Instant) -> bool {
        let Some(spool) = &mut self.spool else { return false };
        if let Err(error) = spool.clear() {
            self.spool_failed(&error, true, now);
            return false;
        }
        (self.replay_at, self.inherited) = (0, 0);
        self.shared.spooled_bytes.store(0, Ordering::Release);
        false
    }

    fn beat(&mut self, now: Instant) {
        match self.commit(&[]) {
            Ok(_) => self.reached(now),
            Err(error) => self.failed(&error, now),
        }
    }

    /// Closes some rows of dead writers. Returns whether there may be more.
    fn recover(&mut self, now: Instant) -> bool {
        let Some(owner) = self.owner.clone() else { return false };
        match self.store.recover(&owner, RECOVERED) {
            Ok(done) => {
                self.shared.counters.recovered_rows.add(done.rows);
                if done.rows > 0 {
                    tracing::warn!(rows = done.rows, "rows of a dead writer are closed");
                }
                if !done.more {
                    self.recover_at = now + self.shared.config.recover_every;
                }
                done.more
            }
            Err(error) => {
                self.failed(&error, now);
                false
            }
        }
    }

    /// The store has answered.
    fn reached(&mut self, now: Instant) {
        self.beat_at = now + self.shared.config.lease / 3;
        if self.retry_at.take().is_some() {
            tracing::info!("the ledger's store answers again");
        }
        self.failing_since = None;
    }

    fn failed(&mut self, error: &StoreError, now: Instant) {
        self.shared.counters.commit_failures.add(1);
        if error.is_unavailable() {
            if self.retry_at.is_none() {
                tracing::warn!(%error, "the ledger's store failed; it will be tried again");
            }
            self.retry_at = Some(now + self.shared.config.retry);
            if self.spool.is_none() {
                self.failing_since.get_or_insert(now);
            }
        } else {
            tracing::error!(%error, "the ledger's store failed for good");
            self.shared.set_health(Health::Broken);
        }
    }

    /// Sets the health by what happened, and tells those that wait when it is bad.
    fn judge(&mut self, now: Instant) {
        let before = self.shared.health();
        let health = match (before, self.failing_since) {
            (Health::Broken, _) => Health::Broken,
            (_, Some(since)) if now.saturating_duration_since(since) >= self.shared.config.stall => {
                Health::Unavailable
            }
            (_, Some(_)) => Health::Retrying,
            _ if self.detours(now) => Health::Spooling,
            _ => Health::Ok,
        };
        self.shared.set_health(health);
    }
}

/// The thread is gone.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Release);
        let left = std::mem::take(&mut self.0.queue().dirty);
        if std::thread::panicking() || !left.is_empty() {
            self.0.set_health(Health::Broken);
        }
    }
}

/// What a dead process's last word on a row means: its owner will say no more.
fn crashed(row: Row) -> Row {
    if row.state == State::Closed {
        return row;
    }
    Row { state: State::Closed, finish: Finish::Crashed, ..row }
}
