//! Calls that the server itself makes: to identity providers, and to who is told of usage.
//!
//! Owns the connections, and the bounds on what another server may cost: time, bytes, open connections. It follows
//! no redirect, always verifies certificates, and never logs what it sends.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::file;

/// Most bytes of an answer's head.
const MAX_HEAD: usize = 16 << 10;
/// Header lines of an answer.
const MAX_HEADERS: usize = 64;
/// Connections to one server that wait for their next use.
const MAX_IDLE: usize = 8;
/// Most bytes of a bundle of authorities.
const MAX_BUNDLE: u64 = 4 << 20;
/// Where distributions keep theirs.
const BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Why authorities cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] file::FileError),
    /// It holds nothing to trust.
    #[error("{}: no usable certificate in it", .0.display())]
    Empty(PathBuf),
    /// Nobody said which authorities to trust.
    #[error("https needs certificate authorities and the system has none: set `identity.ca_bundle`")]
    Missing,
    /// rustls refuses its own defaults.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Why there is no answer. Says nothing of what was sent, nor of what came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    #[error("no connection")]
    Connect,
    #[error("the TLS handshake failed")]
    Tls,
    #[error("no answer in time")]
    Time,
    #[error("the connection broke")]
    Transport,
    #[error("the answer is too long")]
    Long,
    #[error("status {0}")]
    Status(u16),
    #[error("the answer is not what it should be")]
    Content,
}

/// An address that may be called: https, or http on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    uri: Uri,
    secure: bool,
    host: String,
    port: u16,
}

impl Target {
    /// `None` for any other scheme, for credentials in the address, and for http to another machine.
    pub(crate) fn parse(url: &str) -> Option<Self> {
        let target = Self::parse_any(url)?;
        let local = target.host == "localhost"
            || target.host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        (target.secure || local).then_some(target)
    }

    /// The same, but http to any machine: for what holds no secret.
    pub(crate) fn parse_any(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
        // An IPv6 address has brackets in an address, and nowhere else.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Some(Self { uri, secure, host, port })
    }

    pub(crate) fn is_secure(&self) -> bool {
        self.secure
    }
}

/// Trusts the authorities of a file: the one given, else `SSL_CERT_FILE`, else the system's.
pub(crate) fn trust(bundle: Option<&Path>) -> Result<Arc<ClientConfig>, BundleError> {
    let path = bundle
        .map(Path::to_owned)
        .or_else(|| std::env::var_os("SSL_CERT_FILE").map(PathBuf::from))
        .or_else(|| BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file()))
        .ok_or(BundleError::Missing)?;
    let pem = file::read(&path, MAX_BUNDLE)?;
    let mut roots = RootCertStore::empty();
    // Systems' bundles hold certificates that no longer parse.
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
    if roots.is_empty() {
        return Err(BundleError::Empty(path));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

type Sender = SendRequest<Full<Bytes>>;

/// What a call sends.
pub(crate) enum Call {
    Get,
    /// Something to take note of, with its head.
    Event {
        headers: Vec<(HeaderName, HeaderValue)>,
        body: String,
    },
    /// A form, with the credentials of HTTP's basic scheme.
    Form {
        body: String,
        authorization: HeaderValue,
    },
}

/// Calls one server.
pub(crate) struct Client {
    timeout: Duration,
    /// `None` where nothing is called by https.
    trust: Arc<ArcSwapOption<ClientConfig>>,
    /// With the host and port they lead to. Last in, first out: few stay in use.
    idle: Mutex<Vec<(Target, Sender)>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Client {
    pub(crate) fn new(timeout: Duration, trust: Arc<ArcSwapOption<ClientConfig>>) -> Self {
        Self { timeout, trust, idle: Mutex::new(Vec::new()) }
    }

    /// The body of a success (2xx), at most `limit` bytes of it.
    ///
    /// # Errors
    /// Anything else, and too late.
    pub(crate) async fn call(&self, target: &Target, call: Call, limit: usize) -> Result<Bytes, CallError> {
        let work = async {
            let request = request(target, call).map_err(|_| CallError::Content)?;
            let (response, sender) = self.send(target, request).await?;
            if !response.status().is_success() {
                return Err(CallError::Status(response.status().as_u16()));
            }
            let body = Limited::new(response.into_body(), limit).collect().await.map_err(|error| {
                if error.is::<http_body_util::LengthLimitError>() {
                    CallError::Long
                } else {
                    CallError::Transport
                }
            })?;
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < MAX_IDLE {
                idle.push((target.clone(), sender));
            }
            Ok(body.to_bytes())
        };
        tokio::time::timeout(self.timeout, work).await.unwrap_or(Err(CallError::Time))
    }

    async fn send(
        &self,
        target: &Target,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(hyper::Response<hyper::body::Incoming>, Sender), CallError> {
        loop {
            let (mut sender, reused) = match self.waiting(target) {
                Some(sender) => (sender, true),
                None => (self.connect(target).await?, false),
            };
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, sender)),
                // Given back unsent: the other side had closed the waiting connection.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(CallError::Transport),
                },
            }
        }
    }

    fn waiting(&self, target: &Target) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(_, sender)| !sender.is_closed());
        let same = |other: &Target| {
            (other.secure, other.port, other.host.as_str())
                == (target.secure, target.port, target.host.as_str())
        };
        let at = idle.iter().rposition(|(other, sender)| same(other) && sender.is_ready())?;
        Some(idle.swap_remove(at).1)
    }

    async fn connect(&self, target: &Target) -> Result<Sender, CallError> {
        let address = (target.host.as_str(), target.port);
        let stream = TcpStream::connect(address).await.map_err(|_| CallError::Connect)?;
        // One small packet each way: waiting to fill it would only add time.
        stream.set_nodelay(true).map_err(|_| CallError::Connect)?;
        if !target.secure {
            return handshake(stream).await;
        }
        let trust = self.trust.load_full().ok_or(CallError::Tls)?;
        let name = ServerName::try_from(target.host.clone()).map_err(|_| CallError::Tls)?;
        handshake(TlsConnector::from(trust).connect(name, stream).await.map_err(|_| CallError::Tls)?).await
    }
}

fn request(target: &Target, call: Call) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
    let authority = target.uri.authority().map_or("", |authority| authority.as_str());
    let path = target.uri.path_and_query().map_or("/", |path| path.as_str());
    let builder = Request::builder()
        .uri(path)
        .header(HOST, authority)
        .header(USER_AGENT, concat!("mirai/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT, "application/json");
    match call {
        Call::Get => builder.method(Method::GET).body(Full::default()),
        Call::Event { headers, body } => {
            let mut request = builder.method(Method::POST).body(Full::new(body.into()))?;
            request.headers_mut().extend(headers);
            Ok(request)
        }
        Call::Form { body, authorization } => builder
            .method(Method::POST)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(AUTHORIZATION, authorization)
            .body(Full::new(body.into())),
    }
}

async fn handshake<S>(stream: S) -> Result<Sender, CallError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| CallError::Transport)?;
    // Ends with the sender, or with the other side.
    tokio::spawn(connection);
    Ok(sender)
}

/// What a form may hold of a value: everything but letters, digits and `-._~` is escaped.
pub(crate) fn form_encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
            out.push('%');
            out.push(char::from(DIGITS[usize::from(byte >> 4)]));
            out.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn only_https_and_this_machine_are_called() {
        for good in
            ["https://idp.example/a?b=c", "http://localhost:8080/", "http://127.0.0.2", "http://[::1]:9/x"]
        {
            assert!(Target::parse(good).is_some(), "{good}");
        }
        for bad in [
            "http://idp.example/",
            "http://10.0.0.1/",
            "ftp://localhost/",
            "file:///etc/passwd",
            "https://user:word@idp.example/",
            "/path",
            "localhost:80",
            "http://localhost.example/",
            "http://2130706433/",
            "",
        ] {
            assert!(Target::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn forms_are_escaped() {
        let mut out = String::new();
        form_encode("a-Z.9_~ &=+%é", &mut out);
        assert_eq!(out, "a-Z.9_~%20%26%3D%2B%25%C3%A9");
    }

    #[test]
    fn bundles_without_an_authority_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        assert!(trust(Some(&path)).unwrap_err().to_string().contains("ca.pem"));
        std::fs::write(&path, "nothing").unwrap();
        assert!(trust(Some(&path)).unwrap_err().to_string().contains("no usable certificate"));
    }

    /// Answers each connection's first request with these bytes, and says how many came.
    async fn server(answer: &'static [u8]) -> (Target, tokio::sync::watch::Receiver<u32>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::parse(&format!("http://{}/x", listener.local_addr().unwrap())).unwrap();
        let (count, counted) = tokio::sync::watch::channel(0);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                count.send_modify(|count| *count += 1);
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                        if stream.write_all(answer).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        (target, counted)
    }

    fn client(timeout: Duration) -> Client {
        Client::new(timeout, Arc::default())
    }

    #[tokio::test]
    async fn what_another_server_may_cost_is_bounded() {
        /// What is answered, what is made of it.
        type Case = (&'static [u8], Result<&'static [u8], CallError>);
        let cases: [Case; 7] = [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Ok(b"ok")),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123456789", Err(CallError::Long)),
            (
                b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
                Err(CallError::Status(302)),
            ),
            (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", Err(CallError::Status(500))),
            (b"nonsense\r\n\r\n", Err(CallError::Transport)),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n1", Err(CallError::Time)),
            (b"", Err(CallError::Time)),
        ];
        for (answer, expected) in cases {
            let limit = if matches!(expected, Err(CallError::Time)) { 200 } else { 20_000 };
            let (target, _) = server(answer).await;
            let got = client(Duration::from_millis(limit)).call(&target, Call::Get, 8).await;
            assert_eq!(got.as_deref(), expected.as_deref(), "{}", String::from_utf8_lossy(answer));
        }
        let closed = Target::parse("http://127.0.0.1:1/").unwrap();
        let got = client(Duration::from_secs(20)).call(&closed, Call::Get, 8).await;
        assert_eq!(got, Err(CallError::Connect));
    }

    #[tokio::test]
    async fn certificates_are_always_verified() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
            let path = directory.path().join(name);
            std::fs::write(&path, made.cert.pem()).unwrap();
            (made, path)
        };
        let ((made, ours), (_, other)) = (make("ours.pem"), make("other.pem"));
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut buffer = [0; 4096];
                    if stream.read(&mut buffer).await.is_ok() {
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                        stream.write_all(answer).await.unwrap();
                    }
                });
            }
        });
        let trusting = |path: &Path| {
            let trust = ArcSwapOption::new(Some(trust(Some(path)).unwrap()));
            Client::new(Duration::from_secs(20), Arc::new(trust))
        };
        for (bundle, host, expected) in [
            (&ours, "localhost", Ok("ok")),
            (&other, "localhost", Err(CallError::Tls)),
            (&ours, "127.0.0.1", Err(CallError::Tls)),
        ] {
            let target = Target::parse(&format!("https://{host}:{port}/")).unwrap();
            let got = trusting(bundle).call(&target, Call::Get, 8).await;
            assert_eq!(got.as_deref().map_err(|error| *error), expected.map(str::as_bytes), "{host}");
        }
        let target = Target::parse(&format!("https://localhost:{port}/")).unwrap();
        let nobody = client(Duration::from_secs(20));
        assert_eq!(nobody.call(&target, Call::Get, 8).await, Err(CallError::Tls), "no authority is trusted");
    }

    #[tokio::test]
    async fn a_connection_is_used_again() {
        let (target, connections) = server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        let client = client(Duration::from_secs(20));
        for _ in 0..3 {
            let form =
                Call::Form { body: "a=b".into(), authorization: HeaderValue::from_static("Basic eA==") };
            assert_eq!(client.call(&target, form, 8).await.unwrap(), "ok");
            // The connection's task has to see the end of the answer before the next call can have it.
            while !client.idle.lock().unwrap()[0].1.is_ready() {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(*connections.borrow(), 1);
    }
}
