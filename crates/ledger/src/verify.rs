//! Whether a ledger is whole: what an auditor runs.
//!
//! Owns the rules; reads any [`Store`] in one consistent state, page by page, and changes nothing.
//!
//! 1. Each chain's links follow one another without gaps from its beginning, or from what a purge signed, to the
//!    head that its writer left; with a key, heads and purges bear its signature.
//! 2. Each link that opens a row has its row, and that row's settled fields have the link's digest.
//! 3. A row's last link says what the row says: its digest if it is closed, that it is open if it is.
//! 4. A link without a row has no opening either: a signed purge took both.
//! 5. There is no other row.
//! 6. A pseudonym that is still there is the one that was committed to.

use std::collections::HashMap;

use crate::chain::{ChainKey, Epoch, commitment, content_digest, genesis, next_head, open_digest};
use crate::error::StoreError;
use crate::row::{Row, SCHEMA_VERSION, State};
use crate::store::{AuditLink, ChainHead, PurgeRecord, Store};
use crate::value::Hash;

/// Links read at a time.
const PAGE: usize = 512;
/// Problems that are listed; the rest is counted.
const MAX_PROBLEMS: usize = 100;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A writer's run is missing.
    #[error("writer {writer}: run {epoch} is missing")]
    MissingEpoch {
        /// The writer.
        writer: String,
        /// The run.
        epoch: u64,
    },
    /// A link is missing, or there is one too many.
    #[error("chain {chain}: link {found} where {expected} should be")]
    Gap {
        /// Whose chain.
        chain: Epoch,
        /// The place that should come.
        expected: u64,
        /// The place that came.
        found: u64,
    },
    /// A link was altered.
    #[error("chain {chain}, link {seq}: the hash does not follow")]
    Hash {
        /// Whose chain.
        chain: Epoch,
        /// The link.
        seq: u64,
    },
    /// A chain ends elsewhere than its writer left it.
    #[error("chain {chain} ends at link {found}, its writer left it at {expected}")]
    Head {
        /// Whose chain.
        chain: Epoch,
        /// Where it should end.
        expected: u64,
        /// Where it does.
        found: u64,
    },
    /// A head or a purge is not signed with the key.
    #[error("chain {chain}: the {what} bears no valid signature")]
    Signature {
        /// Whose chain.
        chain: Epoch,
        /// What should be signed.
        what: &'static str,
    },
    /// A request has no row.
    #[error("request {id}: its row is missing (chain {chain}, link {seq})")]
    MissingRow {
        /// Whose chain.
        chain: Epoch,
        /// The link that tells of it.
        seq: u64,
        /// The request.
        id: String,
    },
    /// A row was altered.
    #[error("request {id}: {what}")]
    Row {
        /// The request.
        id: String,
        /// What does not fit.
        what: &'static str,
    },
    /// There are rows that no chain knows.
    #[error("{0} rows that no chain knows")]
    UnknownRows(u64),
    /// A row cannot even be read.
    #[error("chain {chain}: {error}")]
    Unreadable {
        /// Whose chain.
        chain: Epoch,
        /// Why.
        error: StoreError,
    },
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Chains read.
    pub chains: u64,
    /// Links read.
    pub links: u64,
    /// Rows whose last link was read.
    pub rows: u64,
    /// Those of them that are open.
    pub open: u64,
    /// Rows whose digest could not be checked, because a newer version wrote them.
    pub newer: u64,
    /// Rows that were purged.
    pub purged: u64,
    /// Heads whose signature was made with another key than the given one, or without any.
    pub unsigned: u64,
    /// What is wrong, up to 100.
    pub problems: Vec<Problem>,
    /// How much is wrong.
    pub problem_count: u64,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problem_count == 0
    }

    fn add(&mut self, problem: Problem) {
        self.problem_count += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }
}

/// Verifies a store. With a key, signatures made with its version are checked, and purges must bear one.
///
/// # Errors
/// The store failed. What is wrong with its content is in the report.
pub fn verify(store: &mut dyn Store, key: Option<&ChainKey>) -> Result<Report, StoreError> {
    let report = store.begin_audit().and_then(|()| {
        Audit { store: &mut *store, key, report: Report::default(), purged: false, schema: 0 }.run()
    });
    store.end_audit();
    report
}

struct Audit<'a> {
    store: &'a mut dyn Store,
    key: Option<&'a ChainKey>,
    report: Report,
    /// Whether there was ever a purge.
    purged: bool,
    /// The newest version that may have written.
    schema: u32,
}

impl Audit<'_> {
    fn run(mut self) -> Result<Report, StoreError> {
        self.schema = self.store.schema()?.max(SCHEMA_VERSION);
        let heads = self.store.chains()?;
        let purges: HashMap<Epoch, PurgeRecord> =
            self.store.purges()?.into_iter().map(|purge| (purge.chain.clone(), purge)).collect();
        self.purged = !purges.is_empty();
        let mut last: Option<&Epoch> = None;
        for head in &heads {
            let chain = &head.chain;
            let before = last.filter(|last| last.writer == chain.writer).map_or(0, |last| last.epoch);
            for epoch in before + 1..chain.epoch.min(before + 1 + MAX_PROBLEMS as u64) {
                self.report.add(Problem::MissingEpoch { writer: chain.writer.clone(), epoch });
            }
            last = Some(chain);
            match self.chain(head, purges.get(chain)) {
                // What cannot be read is found damage; what cannot be reached is not.
                Err(error @ StoreError::Row(_)) => {
                    self.report.add(Problem::Unreadable { chain: chain.clone(), error });
                }
                other => other?,
            }
        }
        let rows = self.store.count()?;
        if rows > self.report.rows {
            self.report.add(Problem::UnknownRows(rows - self.report.rows));
        }
        Ok(self.report)
    }

    fn chain(&mut self, head: &ChainHead, purge: Option<&PurgeRecord>) -> Result<(), StoreError> {
        let chain = &head.chain;
        self.report.chains += 1;
        let (mut seq, mut hash) = (0, genesis(chain));
        if let Some(purge) = purge {
            (seq, hash) = (purge.seq, purge.head);
            self.report.purged += purge.rows;
            self.signature(chain, "purge", seq, hash, Some(purge.signature));
        }
        loop {
            let page = self.store.links(chain, seq, PAGE)?;
            for found in &page {
                let link = &found.link;
                if link.seq != seq + 1 {
                    self.report.add(Problem::Gap {
                        chain: chain.clone(),
                        expected: seq + 1,
                        found: link.seq,
                    });
                }
                if link.head != next_head(hash, link.seq, &link.kind, &link.id, link.digest) {
                    self.report.add(Problem::Hash { chain: chain.clone(), seq: link.seq });
                }
                (seq, hash) = (link.seq, link.head);
                self.link(found);
            }
            if page.len() < PAGE {
                break;
            }
        }
        if (seq, hash) != (head.seq, head.head) {
            self.report.add(Problem::Head { chain: chain.clone(), expected: head.seq, found: seq });
        }
        self.signature(chain, "head", head.seq, head.head, head.signature);
        Ok(())
    }

    fn signature(
        &mut self,
        chain: &Epoch,
        what: &'static str,
        seq: u64,
        head: Hash,
        by: Option<(u32, Hash)>,
    ) {
        let Some(key) = self.key else {
            self.report.unsigned += 1;
            return;
        };
        match by {
            Some((version, mac)) if version == key.version => {
                if !key.signed(chain, seq, head, &mac) {
                    self.report.add(Problem::Signature { chain: chain.clone(), what });
                }
            }
            // Made before this key, or without one: not proven, not refuted.
            _ => self.report.unsigned += 1,
        }
    }

    fn link(&mut self, found: &AuditLink) {
        let link = &found.link;
        self.report.links += 1;
        let Some((row, stored)) = &found.row else {
            // The opening may be in another chain than the end, but a purge of some chain took it.
            if found.opened || !self.purged {
                let (chain, seq) = (link.chain.clone(), link.seq);
                self.report.add(Problem::MissingRow { chain, seq, id: link.id.clone() });
            }
            return;
        };
        let mut wrong = |what| self.report.add(Problem::Row { id: row.id.clone(), what });
        if !found.opened {
            wrong("there is no link that opened it");
        }
        if row.schema_version > self.schema {
            wrong("it claims a version that this store never saw");
        }
        let readable = row.schema_version <= SCHEMA_VERSION;
        if readable && link.kind.is_open() && link.digest != open_digest(row) {
            wrong("what was settled when it opened has changed");
        }
        if !found.newest {
            return;
        }
        if readable && *stored != content_digest(row) {
            wrong("its digest does not fit its content");
        }
        if link.kind.is_open() != (row.state == State::Open) {
            wrong("its last link and its state differ");
        } else if !link.kind.is_open() && link.digest != *stored {
            wrong("it was changed after its end");
        }
        if !pseudonym_fits(row) {
            wrong("its pseudonym is not the one that was committed to");
        }
        self.report.rows += 1;
        self.report.open += u64::from(row.state == State::Open);
        self.report.newer += u64::from(!readable);
    }
}

fn pseudonym_fits(row: &Row) -> bool {
    match (&row.user, &row.user_salt, &row.user_commitment) {
        (Some(user), Some(salt), Some(committed)) => commitment(salt, user) == *committed,
        // Erased: both are gone. Never there: all three are.
        (None, None, _) => true,
        _ => false,
    }
}
