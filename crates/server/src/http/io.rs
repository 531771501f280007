//! A connection with deadlines.
//!
//! Owns the time that a peer may take for a head, between requests, and to take bytes. hyper has a deadline
//! for heads only, and the same for idle connections; a body's deadline is its reader's.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::config::Timeouts;
use crate::config_error::seconds;
use crate::metrics::Metrics;

/// What a connection's handler tells its deadlines.
#[derive(Debug, Default)]
pub(crate) struct ConnState {
    /// From the end of a head to the end of its answer.
    in_flight: AtomicBool,
    /// Set with the first head, for good.
    used: AtomicBool,
    /// The connection's task, while it waits for an answer: the end of the answer starts the idle time, and
    /// nobody else would wake the task to notice.
    waker: Mutex<Option<Waker>>,
}

impl ConnState {
    /// Whether a request has come.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    pub(crate) fn set_in_flight(&self, value: bool) {
        if value {
            self.used.store(true, Ordering::Release);
        }
        self.in_flight.store(value, Ordering::Release);
        if !value && let Some(waker) = self.lock().take() {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waker>> {
        self.waker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an answer is under way; if so, its end wakes this task.
    fn poll_in_flight(&self, cx: &Context<'_>) -> bool {
        if !self.in_flight.load(Ordering::Acquire) {
            return false;
        }
        let mut waker = self.lock();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        // It may have ended between the two.
        self.in_flight.load(Ordering::Acquire)
    }
}

/// The deadlines of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    pub(crate) header: Duration,
    pub(crate) idle: Duration,
    pub(crate) write: Duration,
}

impl Deadlines {
    pub(crate) fn new(timeouts: &Timeouts) -> Self {
        Self {
            header: seconds(timeouts.header_seconds),
            idle: seconds(timeouts.idle_seconds),
            write: seconds(timeouts.write_stall_seconds),
        }
    }
}

/// What the peer owes us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owes {
    /// The rest of a head, by this time.
    Head(Instant),
    /// The first byte of a head, by this time.
    Next(Instant),
    /// Nothing: it waits for our answer.
    Nothing,
}

/// Reads and writes of a connection, each with its deadline.
pub(crate) struct DeadlineIo<S> {
    inner: S,
    state: Arc<ConnState>,
    metrics: Arc<Metrics>,
    deadlines: Deadlines,
    owes: Owes,
    read_timer: Pin<Box<Sleep>>,
    /// Running while a write makes no progress.
    write_timer: Option<Pin<Box<Sleep>>>,
}

impl<S> DeadlineIo<S> {
    pub(crate) fn new(inner: S, state: Arc<ConnState>, metrics: Arc<Metrics>, deadlines: Deadlines) -> Self {
        let first = Instant::now() + deadlines.header;
        Self {
            inner,
            state,
            metrics,
            deadlines,
            owes: Owes::Head(first),
            read_timer: Box::pin(tokio::time::sleep_until(first)),
            write_timer: None,
        }
    }

    /// Nothing came; whether the peer's time is up.
    fn poll_read_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.state.poll_in_flight(cx) {
            self.owes = Owes::Nothing;
            return Poll::Pending;
        }
        let until = match self.owes {
            Owes::Head(until) | Owes::Next(until) => until,
            Owes::Nothing => {
                let until = Instant::now() + self.deadlines.idle;
                self.owes = Owes::Next(until);
                until
            }
        };
        if self.read_timer.deadline() != until {
            self.read_timer.as_mut().reset(until);
        }
        ready!(self.read_timer.as_mut().poll(cx));
        if matches!(self.owes, Owes::Head(_)) {
            self.metrics.read_timeouts.inc();
        }
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the peer did not send a request in time"))
    }

    /// A write could not go on; whether the peer's time is up.
    fn poll_write_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let write = self.deadlines.write;
        let timer = self.write_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(write)));
        ready!(timer.as_mut().poll(cx));
        self.metrics.write_stalls.inc();
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no bytes"))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for DeadlineIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        if result.is_pending() {
            return self.poll_read_deadline(cx).map(Err);
        }
        let some = buf.filled().len() > before;
        if some && !self.state.in_flight.load(Ordering::Acquire) && !matches!(self.owes, Owes::Head(_)) {
            self.owes = Owes::Head(Instant::now() + self.deadlines.header);
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for DeadlineIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        if result.is_pending() {
            return self.poll_write_deadline(cx).map(Err);
        }
        self.write_timer = None;
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        if result.is_pending() {
            return self.poll_write_deadline(cx).map(Err);
        }
        self.write_timer = None;
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        if result.is_pending() {
            return self.poll_write_deadline(cx).map(Err);
        }
        self.write_timer = None;
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        if result.is_pending() {
            return self.poll_write_deadline(cx).map(Err);
        }
        result
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn wrap(
        inner: tokio::io::DuplexStream,
    ) -> (DeadlineIo<tokio::io::DuplexStream>, Arc<ConnState>, Arc<Metrics>) {
        let (state, metrics) = (Arc::new(ConnState::default()), Arc::new(Metrics::new()));
        let deadlines = Deadlines {
            header: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            write: Duration::from_secs(30),
        };
        (DeadlineIo::new(inner, state.clone(), metrics.clone(), deadlines), state, metrics)
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_however_it_trickles() {
        let (mut peer, ours) = tokio::io::duplex(64);
        let (mut io, _, metrics) = wrap(ours);
        let start = Instant::now();
        tokio::spawn(async move {
            loop {
                if peer.write_all(b"x").await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let error = loop {
            if let Err(error) = io.read_u8().await {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed().as_secs(), 10);
        assert_eq!(metrics.read_timeouts.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_take_their_time_and_idle_is_longer() {
        let (mut peer, ours) = tokio::io::duplex(64);
        let (mut io, state, metrics) = wrap(ours);
        peer.write_all(b"x").await.unwrap();
        io.read_u8().await.unwrap();
        state.set_in_flight(true);
        assert!(tokio::time::timeout(Duration::from_secs(1000), io.read_u8()).await.is_err());
        state.set_in_flight(false);
        let start = Instant::now();
        assert_eq!(io.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed().as_secs(), 75);
        assert_eq!(metrics.read_timeouts.get(), 0, "an idle connection is no attack");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_let_go() {
        let (mut peer, ours) = tokio::io::duplex(4);
        let (mut io, _, metrics) = wrap(ours);
        io.write_all(b"1234").await.unwrap();
        let start = Instant::now();
        let read = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(20)).await;
            peer.read_u8().await.unwrap();
            tokio::time::sleep(Duration::from_secs(1000)).await;
        });
        let error = io.write_all(b"56").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed().as_secs(), 50, "progress starts the time anew");
        assert_eq!(metrics.write_stalls.get(), 1);
        read.abort();
    }
}
