//! What all connections share: configuration, the model once it is there, and the phase of the server's life.
//!
//! Owns the transitions loading -> ready -> draining -> ended; it never serves a request.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use mirai_engine::{EngineHandle, EngineHealth};
use mirai_ledger::quota::Quotas;

use crate::account::Accounting;
use crate::auth::Auth;
use crate::config::ServerConfig;
use crate::config_error::seconds;
use crate::demux::Demux;
use crate::error::ApiError;
use crate::events::EventCounters;
use crate::ids::Ids;
use crate::metrics::Metrics;
use crate::model::ModelInfo;
use crate::rules::Rules;
use crate::usage::Reader;
use crate::worker::Workers;

/// A loaded model and its engine.
pub(crate) struct Live {
    pub(crate) model: Arc<ModelInfo>,
    pub(crate) engine: EngineHandle,
    pub(crate) demux: Demux,
}

/// How far the load is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loading {
    pub(crate) phase: String,
    pub(crate) percent: u8,
}

/// The end of the server's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Drain {
    /// It takes requests.
    No = 0,
    /// It takes requests, but says that it is not ready: balancers have time to notice.
    NotReady = 1,
    /// It takes no more; what runs may end.
    Refusing = 2,
}

/// Everything that a handler may need.
pub(crate) struct State {
    pub(crate) config: ServerConfig,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) ids: Ids,
    pub(crate) auth: Arc<Auth>,
    pub(crate) workers: Workers,
    loading: Mutex<Loading>,
    failed: OnceLock<String>,
    live: OnceLock<Arc<Live>>,
    accounting: OnceLock<Accounting>,
    quotas: OnceLock<Quotas>,
    usage: OnceLock<Reader>,
    events: OnceLock<Arc<EventCounters>>,
    drain: AtomicU8,
}

impl State {
    pub(crate) fn new(config: ServerConfig, auth: Auth, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        Ok(Self {
            metrics,
            ids: Ids::new(),
            auth: Arc::new(auth),
            workers: Workers::start(config.workers, config.limits.max_queued_jobs)?,
            loading: Mutex::new(Loading { phase: "starting".to_owned(), percent: 0 }),
            failed: OnceLock::new(),
            live: OnceLock::new(),
            accounting: OnceLock::new(),
            quotas: OnceLock::new(),
            usage: OnceLock::new(),
            events: OnceLock::new(),
            drain: AtomicU8::new(0),
            config,
        })
    }

    pub(crate) fn set_loading(&self, loading: Loading) {
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner) = loading;
    }

    pub(crate) fn loading(&self) -> Loading {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_failed(&self, reason: String) {
        // Of several reasons the first stands.
        let _ = self.failed.set(reason);
    }

    pub(crate) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Returns false if there is a model already.
    pub(crate) fn set_live(&self, live: Live) -> bool {
        self.live.set(Arc::new(live)).is_ok()
    }

    pub(crate) fn live(&self) -> Option<&Arc<Live>> {
        self.live.get()
    }

    /// Returns false if there is a ledger already.
    pub(crate) fn set_accounting(&self, accounting: Accounting) -> bool {
        self.accounting.set(accounting).is_ok()
    }

    /// Returns false if there is a reader already.
    pub(crate) fn set_usage(&self, reader: Reader) -> bool {
        self.usage.set(reader).is_ok()
    }

    /// What reads the ledger, if there is one.
    pub(crate) fn usage(&self) -> Option<&Reader> {
        self.usage.get()
    }

    /// Returns false if there is an exporter already.
    pub(crate) fn set_events(&self, counters: Arc<EventCounters>) -> bool {
        self.events.set(counters).is_ok()
    }

    /// What the exporter of events did, if there is one.
    pub(crate) fn events(&self) -> Option<&EventCounters> {
        self.events.get().map(Arc::as_ref)
    }

    pub(crate) fn accounting(&self) -> Option<&Accounting> {
        self.accounting.get()
    }

    /// Returns false if there are quotas already.
    pub(crate) fn set_quotas(&self, quotas: Quotas) -> bool {
        self.quotas.set(quotas).is_ok()
    }

    pub(crate) fn quotas(&self) -> Option<&Quotas> {
        self.quotas.get()
    }

    pub(crate) fn drain(&self) -> Drain {
        match self.drain.load(Ordering::Acquire) {
            0 => Drain::No,
            1 => Drain::NotReady,
            _ => Drain::Refusing,
        }
    }

    pub(crate) fn set_drain(&self, drain: Drain) {
        self.drain.fetch_max(drain as u8, Ordering::AcqRel);
    }

    /// The model, for a request that needs it now.
    ///
    /// # Errors
    /// 503: loading, failed to load, or draining.
    pub(crate) fn serving(&self) -> Result<&Arc<Live>, ApiError> {
        if self.drain() == Drain::Refusing {
            return Err(ApiError::draining("the server is shutting down")
                .retry_after(Duration::from_secs(1))
                .closing());
        }
        self.loaded()
    }

    /// The model, for what is served while draining too.
    ///
    /// # Errors
    /// 503: loading, or failed to load.
    pub(crate) fn loaded(&self) -> Result<&Arc<Live>, ApiError> {
        if let Some(live) = self.live() {
            return Ok(live);
        }
        if self.failed().is_some() {
            return Err(ApiError::load_failed("the model could not be loaded"));
        }
        let Loading { phase, percent } = self.loading();
        let text = format!("the model is loading: {phase}, {percent} %");
        Err(ApiError::loading(text).retry_after(Duration::from_secs(5)))
    }

    pub(crate) fn rules<'a>(&'a self, model: &'a ModelInfo) -> Rules<'a> {
        Rules { model, limits: &self.config.limits }
    }

    /// Whether the engine lives and moves.
    ///
    /// # Errors
    /// Why not, in words.
    pub(crate) fn engine_moves(&self, engine: &EngineHandle) -> Result<(), String> {
        let limit = seconds(self.config.timeouts.engine_progress_seconds);
        match engine.health() {
            EngineHealth::Running { last_progress, .. } if last_progress > limit => {
                Err(format!("the engine has made no progress for {} s", last_progress.as_secs()))
            }
            EngineHealth::Running { .. } => Ok(()),
            EngineHealth::Stopped => Err("the engine has stopped".to_owned()),
            // The reason may name files and devices; it is in the log.
            EngineHealth::Dead(_) => Err("the engine is dead".to_owned()),
        }
    }
}
