//! The HTTP/1.1 client: a stack of idle keep-alive connections to one server. Owns connecting, reuse and the
//! headers; never reads a stream ([`crate::request`] does) and never resends a request that may have arrived.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::Failure;
use crate::{BenchError, BenchOptions, FailureKind};

/// Most idle connections that are kept.
const MAX_IDLE: usize = 16_384;
/// Most bytes of an answer that is read whole.
const MAX_BODY: usize = 8 << 20;
/// Largest response header block, and read buffer, in bytes.
const MAX_BUFFER: usize = 256 << 10;

pub(crate) type Sender = SendRequest<Full<Bytes>>;

/// One server.
pub(crate) struct Client {
    host: String,
    port: u16,
    authority: HeaderValue,
    /// Path before `/v1`, without a slash at its end.
    base_path: String,
    base_url: String,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    authorization: Option<HeaderValue>,
    /// Last in, first out: few connections stay in use, the rest may expire.
    idle: Mutex<Vec<Sender>>,
    opened: AtomicU64,
}

impl Client {
    pub(crate) fn new(options: &BenchOptions) -> Result<Self, BenchError> {
        let bad = |reason: String| BenchError::BadOption { flag: "url", reason };
        let uri: Uri = options.url.parse().map_err(|error| bad(format!("{:?}: {error}", options.url)))?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad(format!("{:?}: must begin with http:// or https://", options.url))),
        };
        let authority = uri.authority().ok_or_else(|| bad(format!("{:?}: names no host", options.url)))?;
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(bad("user information and a query are not accepted; use --api-key".into()));
        }
        // An IPv6 address has brackets in a URL, and nowhere else.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let path = uri.path().trim_end_matches('/');
        let base_path = path.strip_suffix("/v1").unwrap_or(path).to_owned();
        let tls = if is_tls {
            let name =
                ServerName::try_from(host.clone()).map_err(|error| bad(format!("{host:?}: {error}")))?;
            Some((crate::tls::connector(options.ca_bundle.as_deref())?, name))
        } else {
            None
        };
        let authorization = match options.effective_api_key() {
            None => None,
            Some(key) => {
                let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| {
                    let reason = "holds characters that a header may not hold".to_owned();
                    BenchError::BadOption { flag: "api-key", reason }
                })?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        Ok(Self {
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            base_url: format!("{}://{authority}{base_path}", if is_tls { "https" } else { "http" }),
            authority: HeaderValue::try_from(authority.as_str()).map_err(|error| bad(error.to_string()))?,
            host,
            base_path,
            tls,
            authorization,
            idle: Mutex::new(Vec::new()),
            opened: AtomicU64::new(0),
        })
    }

    /// The server's address, for messages.
    pub(crate) fn base_url(&self) -> &str {
        &self.base_url
    }

    /// Connections opened so far.
    pub(crate) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Sends one request. The sender that comes with the response goes back by [`Client::recycle`] once the
    /// body has been read to its end.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, Sender), Failure> {
        let mut request = self.request(method, path, body)?;
        loop {
            let (mut sender, is_reused) = self.checkout().await?;
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, sender)),
                // Given back unsent: the server had closed the idle connection.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if is_reused => request = unsent,
                    _ => return Err(transport(error.into_error())),
                },
            }
        }
    }

    /// Returns a connection for the next request.
    pub(crate) fn recycle(&self, sender: Sender) {
        if let Ok(mut idle) = self.idle.lock()
            && idle.len() < MAX_IDLE
        {
            idle.push(sender);
        }
    }

    /// Sends a request outside of the measurement and reads the whole answer.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let work = async {
            let (response, sender) = self.send(method, path, body).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY)
                .collect()
                .await
                .map_err(|error| Failure::new(FailureKind::Transport, error.to_string()))?;
            self.recycle(sender);
            Ok((status, body.to_bytes()))
        };
        tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| {
            Err(Failure::new(FailureKind::Timeout, format!("no answer within {timeout:?}")))
        })
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, Failure> {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base_path))
            .header(HOST, self.authority.clone())
            .header(USER_AGENT, HeaderValue::from_static(concat!("mirai-bench/", env!("CARGO_PKG_VERSION"))))
            .header(ACCEPT, HeaderValue::from_static("text/event-stream, application/json"))
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(value) = &self.authorization {
            builder = builder.header(AUTHORIZATION, value.clone());
        }
        builder
            .body(Full::new(body))
            .map_err(|error| Failure::new(FailureKind::Transport, format!("invalid request: {error}")))
    }

    /// An idle connection that is still open, or a new one. The flag says whether it has been used before.
    async fn checkout(&self) -> Result<(Sender, bool), Failure> {
        loop {
            let idle = self.idle.lock().ok().and_then(|mut idle| idle.pop());
            let Some(mut sender) = idle else {
                return Ok((self.connect().await?, false));
            };
            if sender.ready().await.is_ok() {
                return Ok((sender, true));
            }
        }
    }

    async fn connect(&self) -> Result<Sender, Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(FailureKind::Connect, format!("{}:{}: {error}", self.host, self.port))
        };
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        match &self.tls {
            None => handshake(stream).await,
            Some((connector, name)) => {
                handshake(connector.connect(name.clone(), stream).await.map_err(failed)?).await
            }
        }
    }
}

async fn handshake(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Sender, Failure> {
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_BUFFER)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(transport)?;
    // Ends when the sender is dropped or the connection breaks; the request sees the error.
    tokio::spawn(connection);
    Ok(sender)
}

/// A failure with the chain of causes, which is where hyper says what happened.
// By value, because that is how `map_err` gives it.
#[allow(clippy::needless_pass_by_value)]
pub(crate) fn transport(error: hyper::Error) -> Failure {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        source = cause.source();
    }
    // The server spoke, but not HTTP.
    let kind = if error.is_parse() { FailureKind::Malformed } else { FailureKind::Transport };
    Failure::new(kind, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::options::tests::parse;

    #[test]
    fn base_urls() {
        for (url, host, port, path) in [
            ("http://h", "h", 80, ""),
            ("http://h:8000/", "h", 8000, ""),
            ("http://h:8000/v1/", "h", 8000, ""),
            ("http://h/api/v1", "h", 80, "/api"),
            ("http://[::1]:9", "::1", 9, ""),
        ] {
            let client = Client::new(&parse(&["--url", url])).unwrap();
            assert_eq!(
                (client.host.as_str(), client.port, client.base_path.as_str()),
                (host, port, path),
                "{url}"
            );
        }
    }

    #[test]
    fn bad_urls_and_keys() {
        for (args, words) in [
            (["--url", "ftp://h"], "http:// or https://"),
            (["--url", "localhost:8000"], "http:// or https://"),
            (["--url", "http://"], "--url"),
            (["--url", "http://user@h"], "user information"),
            (["--url", "http://h/?a=1"], "query"),
            (["--api-key", "a\nb"], "--api-key"),
        ] {
            let error = Client::new(&parse(&args)).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(words), "{args:?}: {error}");
        }
    }
}
