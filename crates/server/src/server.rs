//! The server's life: bind, load, serve, drain, end.
//!
//! Owns the order of these and nothing else. It prints nothing and listens to no signal: the binary does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::account::Accounting;
use crate::auth::{Auth, IdentityError};
use crate::config::ServerConfig;
use crate::config_error::{ConfigError, seconds};
use crate::demux::{Context, Demux};
use crate::error::ApiError;
use crate::events::{EventsError, Exporter, UsageEvents};
use crate::handlers::{self, Door};
use crate::http::accept::{self, Acceptor};
use crate::http::io::Deadlines;
use crate::http::tls::{Tls, TlsError};
use crate::metrics::{DeviceFigure, Metrics};
use crate::model::{ModelInfo, ServedModel};
use crate::state::{Drain, Live, Loading, State};
use crate::usage::Reader;
use mirai_engine::EngineHealth;
use mirai_ledger::location::Location;
use mirai_ledger::quota::Quotas;

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A file of keys, applications or secrets cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The address is taken, not ours, or not allowed.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The operating system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Why a model was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// A server serves one model.
    #[error("a model is served already")]
    Twice,
    /// Rows have one place.
    #[error("there is a ledger already")]
    TwoLedgers,
    /// Limits have one count.
    #[error("there are quotas already")]
    TwoQuotas,
    /// There must be a name to ask for.
    #[error("the model has no name")]
    NoName,
    /// The operating system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Why the server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// Told to, and every request had ended in time.
    Drained,
    /// Told to; so many requests were cut off with an error event.
    Cut(usize),
    /// Told twice.
    Forced,
    /// The engine is dead: the process should exit with an error.
    EngineDied(String),
    /// The ledger's store must not be asked again: the process should exit with an error, and recover when it is
    /// started anew.
    LedgerBroken,
}

/// A bound server that does not serve yet.
pub struct Server {
    handle: ServerHandle,
    listener: TcpListener,
    address: SocketAddr,
    metrics: Option<(TcpListener, SocketAddr)>,
    admin: Option<(TcpListener, SocketAddr)>,
    tls: Option<Arc<Tls>>,
}

/// What the rest of the process tells the server. Cheap to clone.
#[derive(Clone)]
pub struct ServerHandle {
    state: Arc<State>,
    /// How often the end was asked for.
    signals: Arc<watch::Sender<u32>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").field("loading", &self.state.loading()).finish_non_exhaustive()
    }
}

impl ServerHandle {
    /// Tells probes how far the load is: a phase in a word or two, and percent of the whole.
    pub fn loading(&self, phase: &str, percent: u8) {
        self.state.set_loading(Loading { phase: phase.to_owned(), percent: percent.min(100) });
    }

    /// Takes a loaded model; from now on requests are served.
    ///
    /// # Errors
    /// There is a model already, it has no name, or no thread could be started.
    pub fn ready(&self, model: ServedModel) -> Result<(), ReadyError> {
        if model.names.is_empty() {
            return Err(ReadyError::NoName);
        }
        if self.state.live().is_some() {
            return Err(ReadyError::Twice);
        }
        let (info, engine, events) = ModelInfo::split(model);
        let model = Arc::new(info);
        let config = &self.state.config;
        let context = Context {
            model: model.clone(),
            engine: engine.clone(),
            metrics: self.state.metrics.clone(),
            max_stream_buffer: config.limits.max_stream_buffer_bytes,
            error_message_copy: config.error_message_copy,
        };
        let ping = Some(seconds(config.timeouts.ping_seconds)).filter(|every| !every.is_zero());
        let demux = Demux::start(context, events, ping)?;
        self.loading("ready", 100);
        if self.state.set_live(Live { model, engine, demux }) { Ok(()) } else { Err(ReadyError::Twice) }
    }

    /// Takes the ledger. To be called before [`ServerHandle::ready`]: from then on every request that the engine
    /// takes has its row.
    ///
    /// # Errors
    /// There is one already.
    pub fn account(&self, accounting: Accounting) -> Result<(), ReadyError> {
        if self.state.set_accounting(accounting) { Ok(()) } else { Err(ReadyError::TwoLedgers) }
    }

    /// Takes the quotas. To be called before [`ServerHandle::ready`]: from then on every request of an application
    /// with limits is counted.
    ///
    /// # Errors
    /// There are some already.
    pub fn quotas(&self, quotas: Quotas) -> Result<(), ReadyError> {
        if self.state.set_quotas(quotas) { Ok(()) } else { Err(ReadyError::TwoQuotas) }
    }

    /// Takes the place from which usage is read: `GET /v1/organization/usage/completions` answers from now on.
    ///
    /// # Errors
    /// There is one already.
    pub fn read_usage(&self, ledger: Location) -> Result<(), ReadyError> {
        if self.state.set_usage(Reader::new(ledger)) { Ok(()) } else { Err(ReadyError::TwoLedgers) }
    }

    /// Sends each ended request as an event from now on, at least once. Needs a tokio runtime.
    ///
    /// # Errors
    /// The address, the token or the authorities cannot be used, or events are sent already.
    pub fn send_events(&self, events: UsageEvents) -> Result<(), EventsError> {
        let exporter = Exporter::new(events)?;
        if !self.state.set_events(exporter.counters.clone()) {
            return Err(EventsError::Twice);
        }
        tokio::spawn(exporter.run());
        Ok(())
    }

    /// Takes a figure of the device that computes, for `/metrics`; none is "not known".
    pub fn device_figure(&self, figure: DeviceFigure, value: Option<f64>) {
        self.state.metrics.device.set(figure, value);
    }

    /// Says that no model will come; probes and requests get 503 from now on.
    pub fn failed(&self, reason: &str) {
        self.state.set_failed(reason.to_owned());
    }

    /// Asks for the end: the first call drains, the second ends at once.
    pub fn shutdown(&self) {
        self.signals.send_modify(|count| *count += 1);
    }
}

impl Server {
    /// Checks the configuration, reads keys and certificates, and binds. From then on connections wait in the
    /// kernel. Needs a tokio runtime.
    ///
    /// # Errors
    /// The configuration contradicts itself, keys or certificates cannot be used, or the address cannot be
    /// had.
    pub async fn bind(config: ServerConfig) -> Result<Self, BindError> {
        config.validate()?;
        let counts = Arc::new(Metrics::new());
        let (auth, tls) = read_files(&config, counts.clone()).await?;
        let (listener, address) = bind_one(SocketAddr::new(config.host, config.port))?;
        let metrics = config.metrics_listen.map(bind_one).transpose()?;
        let admin = config.identity.admin_listen.map(bind_one).transpose()?;
        let state = Arc::new(State::new(config, auth, counts).map_err(BindError::Thread)?);
        let handle = ServerHandle { state, signals: Arc::new(watch::Sender::new(0)) };
        Ok(Self { handle, listener, address, metrics, admin, tls })
    }

    /// Where it listens; the port that the system chose, if it was asked to.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are served, if they have an address of their own.
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|(_, address)| *address)
    }

    /// Where administrators are served, if anywhere.
    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.admin.as_ref().map(|(_, address)| *address)
    }

    /// Whether it speaks TLS.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// To load, to drain.
    pub fn handle(&self) -> ServerHandle {
        self.handle.clone()
    }

    /// Serves until it is told to end, or until the engine dies.
    pub async fn run(self) -> ExitReason {
        let Self { handle, listener, metrics, admin, tls, .. } = self;
        let state = handle.state.clone();
        let (close, closing) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let every = seconds(state.config.timeouts.reload_seconds);
        tasks.spawn(state.auth.clone().watch(every));
        if let Some(tls) = tls.clone() {
            let metrics = state.metrics.clone();
            tasks.spawn(async move { tls.watch(every, &metrics).await });
        }
        let acceptor = Acceptor {
            tls,
            metrics: state.metrics.clone(),
            limits: state.config.limits.clone(),
            deadlines: Deadlines::new(&state.config.timeouts),
            closing,
        };
        if let Some((listener, _)) = metrics {
            // Scraped inside the pod's network: without TLS, as probes are.
            let acceptor = Acceptor { tls: None, ..acceptor.clone() };
            let state = state.clone();
            tasks.spawn(accept::serve(listener, acceptor, move |conn, request| {
                handlers::handle(state.clone(), Door::Metrics, conn, request)
            }));
        }
        if let Some((listener, _)) = admin {
            let state = state.clone();
            tasks.spawn(accept::serve(listener, acceptor.clone(), move |conn, request| {
                handlers::handle(state.clone(), Door::Admin, conn, request)
            }));
        }
        let for_requests = state.clone();
        tasks.spawn(accept::serve(listener, acceptor, move |conn, request| {
            handlers::handle(for_requests.clone(), Door::Main, conn, request)
        }));
        let mut signals = handle.signals.subscribe();
        let reason = tokio::select! {
            () = asked(&mut signals, 1) => drain(&state, &mut signals, &close).await,
            reason = engine_end(&state) => {
                close.send_replace(true);
                settle(&state, Duration::from_secs(2)).await;
                ExitReason::EngineDied(reason)
            }
            () = ledger_end(&state) => {
                close.send_replace(true);
                if let Some(live) = state.live() {
                    live.demux.abort_all(ApiError::ledger_unavailable("requests cannot be accounted for"));
                    settle(&state, Duration::from_secs(2)).await;
                    live.engine.shutdown(Duration::ZERO);
                }
                ExitReason::LedgerBroken
            }
        };
        close_ledger(state).await;
        reason
    }
}

/// The keys and certificates that the configuration names, read where a file that does not answer holds up
/// nothing else.
async fn read_files(
    config: &ServerConfig,
    counts: Arc<Metrics>,
) -> Result<(Auth, Option<Arc<Tls>>), BindError> {
    let config = config.clone();
    let read = move || {
        let auth = Auth::load(&config, counts)?;
        Ok((auth, config.tls.map(Tls::load).transpose()?.map(Arc::new)))
    };
    tokio::task::spawn_blocking(read).await.expect("keys and certificates are read without a panic")
}

fn bind_one(address: SocketAddr) -> Result<(TcpListener, SocketAddr), BindError> {
    let fail = |source| BindError::Listen { address, source };
    let listener = accept::listen(address).map_err(fail)?;
    let local = listener.local_addr().map_err(fail)?;
    Ok((listener, local))
}

/// How often a state that has no waker is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Returns when the engine has ended although nobody asked for it.
async fn engine_end(state: &State) -> String {
    let live = loop {
        match state.live() {
            Some(live) => break live.clone(),
            None => tokio::time::sleep(LOOK).await,
        }
    };
    live.demux.ended().await;
    match live.engine.health() {
        EngineHealth::Dead(reason) => reason,
        _ => "the engine ended".to_owned(),
    }
}

/// Returns when the ledger must not be used any more.
async fn ledger_end(state: &State) {
    loop {
        match state.accounting() {
            Some(accounting) => return accounting.ledger.broken().await,
            None => tokio::time::sleep(LOOK).await,
        }
    }
}

/// How long the last rows have to reach their store. What does not is recovered by the next start.
const LAST_ROWS: Duration = Duration::from_secs(5);

/// Closes what is still open, and ends this process's run in the ledger and among those who count quotas.
async fn close_ledger(state: Arc<State>) {
    if state.accounting().is_none() && state.quotas().is_none() {
        return;
    }
    let until = Instant::now() + LAST_ROWS;
    if let Some(live) = state.live() {
        // The demultiplexer ends rows when the engine's events end.
        live.engine.shutdown(Duration::ZERO);
        let _ = tokio::time::timeout_at(until, live.demux.ended()).await;
    }
    let stop = tokio::task::spawn_blocking(move || {
        if let Some(accounting) = state.accounting() {
            accounting.ledger.stop();
        }
        // After the rows: their ends settle what their requests have taken.
        if let Some(quotas) = state.quotas() {
            quotas.stop();
        }
    });
    if tokio::time::timeout_at(until, stop).await.is_err() {
        tracing::warn!("the ledger's last rows are left to recovery");
    }
}

/// Waits until no request is open and no connection is left, at most `limit`.
async fn settle(state: &State, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    while state.metrics.active.get() > 0 || state.metrics.connections.get() > 0 {
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}

/// Returns when the end was asked for `times` times.
async fn asked(signals: &mut watch::Receiver<u32>, times: u32) {
    while *signals.borrow_and_update() < times {
        if signals.changed().await.is_err() {
            // No handle is left that could ask.
            std::future::pending::<()>().await;
        }
    }
}

async fn drain(state: &State, signals: &mut watch::Receiver<u32>, close: &watch::Sender<bool>) -> ExitReason {
    let timeouts = &state.config.timeouts;
    state.set_drain(Drain::NotReady);
    let delay = seconds(timeouts.drain_delay_seconds);
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        () = asked(signals, 2) => return force(state),
    }
    state.set_drain(Drain::Refusing);
    // Connections end with the request at hand; new ones hear 503 and `Connection: close`.
    close.send_replace(true);
    let until = Instant::now() + seconds(timeouts.shutdown_seconds);
    let open = async {
        while state.metrics.active.get() > 0 {
            tokio::time::sleep(LOOK).await;
        }
    };
    let cut = tokio::select! {
        () = open => 0,
        () = sleep_until(until) => usize::try_from(state.metrics.streams.get()).unwrap_or(0),
        () = asked(signals, 2) => return force(state),
    };
    if let Some(live) = state.live() {
        live.demux.abort_all(shutting_down());
        settle(state, Duration::from_secs(1)).await;
        live.engine.shutdown(Duration::ZERO);
    }
    if cut == 0 { ExitReason::Drained } else { ExitReason::Cut(cut) }
}

fn shutting_down() -> ApiError {
    ApiError::draining("the server is shutting down").retry_after(Duration::from_secs(1)).closing()
}

fn force(state: &State) -> ExitReason {
    if let Some(live) = state.live() {
        live.engine.shutdown(Duration::ZERO);
    }
    ExitReason::Forced
}
