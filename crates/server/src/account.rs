//! One row of the ledger for each request that the engine takes.
//!
//! Owns what a row says of this server, and the handle through which a request's row is opened, followed and
//! closed, and through whose end its quota is settled. Without a ledger every call here allows everything. It never
//! counts a token: the demultiplexer does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mirai_ledger::money::Money;
use mirai_ledger::price::{PriceBook, Work};
use mirai_ledger::quota::Reservation;
use mirai_ledger::store::sqlite::system_micros;
use mirai_ledger::{Counts, Endpoint, Ledger, Open, Outcome, Row, Unavailable};

use crate::auth::{Auth, Caller};
use crate::error::ApiError;

/// What rows are written to, and what they say of this server.
#[derive(Debug)]
pub struct Accounting {
    /// Where rows go.
    pub ledger: Ledger,
    /// Where requests run: the pod or the machine.
    pub replica: String,
    /// What usage costs, if that is told: rows name the list in force, and answers their cost.
    pub prices: Option<Arc<PriceBook>>,
}

/// The price list that was in force when a request arrived.
#[derive(Debug)]
pub(crate) struct Rate {
    book: Arc<PriceBook>,
    version: String,
    model: String,
}

/// A request's row, and what it will be charged by.
#[derive(Debug)]
pub(crate) struct Opened {
    open: Open,
    rate: Option<Rate>,
}

/// What is known of a request when the engine has room for it.
#[derive(Debug)]
pub(crate) struct Charge<'a> {
    /// The request's public id, unique for ever.
    pub(crate) id: &'a str,
    pub(crate) endpoint: Endpoint,
    pub(crate) model: &'a str,
    pub(crate) revision: &'a str,
    pub(crate) arrived: Instant,
    pub(crate) prompt_tokens: u64,
    pub(crate) caller: &'a Caller,
}

impl Accounting {
    /// Opens a row. It becomes durable while the request is queued and computed.
    ///
    /// # Errors
    /// 503: the request cannot be accounted for.
    pub(crate) fn open(&self, charge: &Charge<'_>, auth: &Auth) -> Result<Opened, ApiError> {
        let caller = charge.caller;
        let pseudonym = auth.pseudonym(caller);
        let since = i64::try_from(charge.arrived.elapsed().as_micros()).unwrap_or(i64::MAX);
        let queued_at = system_micros().saturating_sub(since);
        let rate = self.prices.as_ref().and_then(|book| {
            let version = book.at(queued_at)?.version().to_owned();
            Some(Rate { book: book.clone(), version, model: charge.model.to_owned() })
        });
        let row = Row {
            id: charge.id.to_owned(),
            endpoint: charge.endpoint.clone(),
            queued_at,
            price_version: rate.as_ref().map(|rate| rate.version.clone()),
            model: charge.model.to_owned(),
            model_revision: charge.revision.to_owned(),
            replica: self.replica.clone(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            prompt_tokens: charge.prompt_tokens,
            application: caller.application.to_string(),
            key_id: caller.key_id.to_string(),
            key_version: caller.key_version,
            user_key_version: pseudonym.as_ref().map_or(0, |pseudonym| pseudonym.key_version),
            user: pseudonym.map(|pseudonym| pseudonym.value),
            ..Row::default()
        };
        match self.ledger.open(row, charge.arrived) {
            Ok(open) => Ok(Opened { open, rate }),
            Err(fault) => Err(refusal(&fault)),
        }
    }

    /// Whether a new request would be refused now.
    ///
    /// # Errors
    /// 503: it would.
    pub(crate) fn takes_more(&self) -> Result<(), ApiError> {
        self.ledger.takes_more().map_err(|fault| refusal(&fault))
    }
}

/// What the ledger's refusal means for a client. What is wrong with the store is in the log.
fn refusal(fault: &Unavailable) -> ApiError {
    match fault {
        Unavailable::Full(_) => ApiError::saturated("too many requests are open"),
        Unavailable::Store | Unavailable::Stopping => {
            ApiError::ledger_unavailable("requests cannot be accounted for now")
        }
        Unavailable::Conflict | Unavailable::Row(_) => {
            ApiError::internal("this request failed; others are not affected")
        }
    }
    .retry_after(Duration::from_secs(5))
}

/// What must be durable before bytes may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// The opening, and all but a window of so many tokens.
    Tokens(u64),
    /// The end.
    Closed,
}

/// A request's row, if rows are written, and what it has taken of its application's limits, if it has any. Clones
/// mean the same; when the last one is dropped without an end, the row ends with an error.
#[derive(Clone, Debug, Default)]
pub(crate) struct Account(Option<Arc<Kept>>);

#[derive(Debug)]
struct Kept {
    open: Option<Open>,
    held: Mutex<Option<Reservation>>,
    prompt_tokens: u64,
    rate: Option<Rate>,
    /// Output tokens told last.
    told: AtomicU64,
}

impl Kept {
    /// Gives back what was not used. The first end counts.
    fn settle(&self, completion_tokens: u64) {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reservation) = held {
            reservation.settle(self.prompt_tokens.saturating_add(completion_tokens));
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.settle(self.told.load(Ordering::Relaxed));
    }
}

impl Account {
    pub(crate) fn new(opened: Option<Opened>, held: Option<Reservation>, prompt_tokens: u64) -> Self {
        if opened.is_none() && held.is_none() {
            return Self::default();
        }
        let (open, rate) = opened.map_or((None, None), |opened| (Some(opened.open), opened.rate));
        let kept = Kept { open, held: Mutex::new(held), prompt_tokens, rate, told: AtomicU64::new(0) };
        Self(Some(Arc::new(kept)))
    }

    fn open(&self) -> Option<&Open> {
        self.0.as_deref()?.open.as_ref()
    }

    /// Whether there is a row.
    pub(crate) fn exists(&self) -> bool {
        self.open().is_some()
    }

    /// Whether bytes may leave.
    pub(crate) fn permits(&self, needs: Needs) -> bool {
        self.open().is_none_or(|open| match needs {
            Needs::Tokens(tokens) => open.permitted().is_some_and(|permitted| permitted >= tokens),
            Needs::Closed => open.is_closed(),
        })
    }

    /// Waits until they may. `status` is what the client gets otherwise: 200 where a head has left.
    ///
    /// # Errors
    /// 503: not in time. The row then ends with an error, whatever end it had.
    pub(crate) async fn wait(self, needs: Needs, status: u16) -> Result<(), ApiError> {
        let Some(open) = self.open() else { return Ok(()) };
        let waited = match needs {
            Needs::Tokens(tokens) => open.may_send(tokens).await,
            Needs::Closed => open.closed().await,
        };
        waited.map_err(|fault| {
            open.fail(status);
            refusal(&fault)
        })
    }

    /// What the request costs, in the price list's currency, if its model has a price.
    pub(crate) fn cost(&self, counts: &Counts) -> Option<f64> {
        let kept = self.0.as_deref()?;
        let rate = kept.rate.as_ref()?;
        let work = Work {
            prompt_tokens: kept.prompt_tokens,
            cached_tokens: counts.cached_tokens,
            completion_tokens: counts.completion_tokens,
            gpu_micros: counts.gpu_micros,
        };
        rate.book.version(&rate.version)?.of(&rate.model, &work).map(Money::to_f64)
    }

    /// Tells how far the request is.
    pub(crate) fn checkpoint(&self, counts: impl FnOnce() -> Counts) {
        let Some(kept) = self.0.as_deref() else { return };
        let counts = counts();
        kept.told.store(counts.completion_tokens, Ordering::Relaxed);
        if let Some(open) = &kept.open {
            open.checkpoint(&counts);
        }
    }

    /// Ends the row. The first end counts.
    pub(crate) fn close(&self, outcome: impl FnOnce() -> Outcome) {
        let Some(kept) = self.0.as_deref() else { return };
        let outcome = outcome();
        // First: who reads the row may ask how the application stands.
        kept.settle(outcome.counts.completion_tokens);
        if let Some(open) = &kept.open {
            open.close(&outcome);
        }
    }
}
