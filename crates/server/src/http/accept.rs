//! The accept loop.
//!
//! Owns the number of open connections and what each of them may take of the machine; it never looks into a
//! request.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::io::{ConnState, DeadlineIo, Deadlines};
use super::reply::Body;
use super::tls::Tls;
use crate::config::Limits;
use crate::metrics::Metrics;

/// Connections that the kernel may hold for us.
const BACKLOG: u32 = 4096;

/// Binds and listens.
///
/// # Errors
/// The address is taken, not ours, or not allowed.
pub(crate) fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restarted server must not wait for the old one's connections to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What every connection of a listener shares.
#[derive(Clone)]
pub(crate) struct Acceptor {
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) limits: Limits,
    pub(crate) deadlines: Deadlines,
    /// True from the moment when connections are to end with their current request.
    pub(crate) closing: watch::Receiver<bool>,
}

/// Accepts for ever. `handle` answers one request.
pub(crate) async fn serve<H, F>(listener: TcpListener, acceptor: Acceptor, handle: H)
where
    H: Fn(Arc<ConnState>, Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(acceptor.limits.max_connections));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Usually no file descriptor is left: others must end before it is worth trying again.
                acceptor.metrics.accept_errors.inc();
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        acceptor.metrics.accepted.inc();
        let open = Open::new(acceptor.metrics.clone(), place);
        tokio::spawn(connection(stream, acceptor.clone(), handle.clone(), open));
    }
}

/// One open connection, counted.
struct Open {
    metrics: Arc<Metrics>,
    _place: OwnedSemaphorePermit,
}

impl Open {
    fn new(metrics: Arc<Metrics>, place: OwnedSemaphorePermit) -> Self {
        metrics.connections.add(1);
        Self { metrics, _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.connections.add(-1);
    }
}

async fn connection<H, F>(stream: TcpStream, acceptor: Acceptor, handle: H, open: Open)
where
    H: Fn(Arc<ConnState>, Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    // One event is one small packet: waiting to fill it would add 40 ms to a token.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    match &acceptor.tls {
        None => speak(stream, &acceptor, handle).await,
        Some(tls) => {
            let handshake = tokio::time::timeout(acceptor.deadlines.header, tls.acceptor().accept(stream));
            match handshake.await {
                Ok(Ok(stream)) => speak(stream, &acceptor, handle).await,
                Ok(Err(_)) => {}
                Err(_) => acceptor.metrics.read_timeouts.inc(),
            }
        }
    }
    drop(open);
}

async fn speak<S, H, F>(stream: S, acceptor: &Acceptor, handle: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Arc<ConnState>, Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let state = Arc::new(ConnState::default());
    let io = DeadlineIo::new(stream, state.clone(), acceptor.metrics.clone(), acceptor.deadlines);
    let service = service_fn(|request| {
        state.set_in_flight(true);
        let answer = handle(state.clone(), request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut builder = http1::Builder::new();
    // The deadlines are those of `DeadlineIo`.
    builder.header_read_timeout(None);
    builder.max_buf_size(acceptor.limits.max_header_bytes);
    builder.max_headers(acceptor.limits.max_headers);
    let mut closing = acceptor.closing.clone();
    let used = state.clone();
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
    tokio::select! {
        // Errors are the peer's: it left, was too slow, or sent nonsense, which hyper has answered.
        _ = served.as_mut() => return,
        _ = closing.wait_for(|closing| *closing) => {}
    }
    // A connection that has not sent its first request yet still hears why it is not served.
    if used.is_used() {
        served.as_mut().graceful_shutdown();
    }
    let _ = served.await;
}
