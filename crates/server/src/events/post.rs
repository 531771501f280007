//! Events by HTTP POST, as CloudEvents' binary mode has them.
//!
//! Owns the head of the request and the token. The client bounds what the receiver may cost.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue};
use mirai_ledger::event::{Event, SPEC_VERSION, TYPE};

use super::Deliver;
use crate::file::{self, FileError};
use crate::http::client::{self, BundleError, Call, Client, Target};

/// Most bytes of a receiver's answer: nobody reads it.
const MAX_ANSWER: usize = 64 << 10;
/// Most bytes of a file with a token.
const MAX_TOKEN: u64 = 16 << 10;
/// How long a receiver may take for one event.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why events cannot be sent at all.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// No address to send to. It is not repeated: it may hold a secret.
    #[error("events need an address as https://receiver/path, or http:// where no token is sent")]
    Address,
    /// The token cannot be had.
    #[error(transparent)]
    Token(#[from] FileError),
    /// What is in the file is no token.
    #[error("{}: not one line of printable characters", .0.display())]
    BadToken(PathBuf),
    /// The authorities cannot be trusted.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// There is an exporter already.
    #[error("usage events are sent already")]
    Twice,
}

/// The token as a header.
fn read_token(path: &Path) -> Result<HeaderValue, EventsError> {
    let text = file::read_text(path, MAX_TOKEN)?;
    let token = text.trim_end_matches(['\r', '\n']);
    let bad = || EventsError::BadToken(path.to_owned());
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad());
    }
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| bad())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Sends each event to one address.
pub(crate) struct Post {
    client: Client,
    target: Target,
    token_file: Option<PathBuf>,
    token: Mutex<Option<HeaderValue>>,
}

impl Post {
    pub(crate) fn new(
        url: &str,
        token_file: Option<PathBuf>,
        ca_bundle: Option<&Path>,
    ) -> Result<Self, EventsError> {
        // Without a secret, what is inside a cluster may be told in the clear; with one, never.
        let target = if token_file.is_some() { Target::parse(url) } else { Target::parse_any(url) };
        let target = target.ok_or(EventsError::Address)?;
        let trust = Arc::new(arc_swap::ArcSwapOption::empty());
        if target.is_secure() {
            trust.store(Some(client::trust(ca_bundle)?));
        }
        let token = token_file.as_deref().map(read_token).transpose()?;
        Ok(Self { client: Client::new(TIMEOUT, trust), target, token_file, token: Mutex::new(token) })
    }

    fn headers(&self, event: &Event) -> Result<Vec<(HeaderName, HeaderValue)>, String> {
        let value =
            |text: &str| HeaderValue::try_from(text).map_err(|_| "an attribute is no header".to_owned());
        let mut headers = vec![
            (CONTENT_TYPE, HeaderValue::from_static("application/json")),
            (HeaderName::from_static("ce-specversion"), HeaderValue::from_static(SPEC_VERSION)),
            (HeaderName::from_static("ce-type"), HeaderValue::from_static(TYPE)),
            (HeaderName::from_static("ce-id"), value(&event.id)?),
            (HeaderName::from_static("ce-source"), value(&event.source)?),
            (HeaderName::from_static("ce-subject"), value(&event.subject)?),
            (HeaderName::from_static("ce-time"), value(&event.time)?),
        ];
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        headers.extend(token.map(|token| (AUTHORIZATION, token)));
        Ok(headers)
    }
}

impl Deliver for Post {
    async fn prepare(&self) -> Result<(), String> {
        let Some(path) = self.token_file.clone() else { return Ok(()) };
        let read = tokio::task::spawn_blocking(move || read_token(&path).map_err(|error| error.to_string()));
        let token = read.await.map_err(|_| "the token could not be read".to_owned())??;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(())
    }

    async fn deliver(&self, event: &Event) -> Result<(), String> {
        let call = Call::Event { headers: self.headers(event)?, body: event.data.clone() };
        let answer = self.client.call(&self.target, call, MAX_ANSWER).await;
        answer.map(drop).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn event() -> Event {
        Event {
            id: "R1-00ff".into(),
            source: "/mirai/ledger".into(),
            subject: "R1".into(),
            time: "2026-11-24T02:12:20Z".into(),
            data: "{\"id\":\"R1\"}".into(),
        }
    }

    /// One request's text, answered with a status.
    async fn receive(listener: &TcpListener, status: &str) -> String {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !text.ends_with('}') {
            let read = stream.read(&mut buffer).await.unwrap();
            text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
        }
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        text
    }

    #[tokio::test]
    async fn an_event_travels_in_binary_mode_with_the_newest_token() {
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(&token, "first\n").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/usage", listener.local_addr().unwrap());
        let post = Post::new(&url, Some(token.clone()), None).unwrap();
        let event = event();
        let (sent, text) = tokio::join!(post.deliver(&event), receive(&listener, "202 Accepted"));
        sent.unwrap();
        let lower = text.to_lowercase();
        assert!(lower.starts_with("post /usage http/1.1\r\n"), "{text}");
        for line in [
            "ce-specversion: 1.0",
            "ce-type: fr.gouv.interieur.mirai.inference.usage.v1",
            "ce-id: r1-00ff",
            "ce-source: /mirai/ledger",
            "ce-subject: r1",
            "ce-time: 2026-11-24t02:12:20z",
            "content-type: application/json",
            "authorization: bearer first",
        ] {
            assert!(lower.contains(&format!("\r\n{line}\r\n")), "{line} is not in {text}");
        }
        assert!(text.ends_with("\r\n\r\n{\"id\":\"R1\"}"));
        std::fs::write(&token, "second\n").unwrap();
        post.prepare().await.unwrap();
        let (sent, text) = tokio::join!(post.deliver(&event), receive(&listener, "503 No"));
        assert_eq!(sent.unwrap_err(), "status 503");
        assert!(text.to_lowercase().contains("bearer second"));
        std::fs::write(&token, "not a token\n").unwrap();
        let error = post.prepare().await.unwrap_err();
        assert!(error.contains("token") && !error.contains("not a token"), "{error}");
    }

    #[test]
    fn a_token_is_sent_to_https_and_this_machine_only() {
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(&token, "t").unwrap();
        assert!(Post::new("http://broker.svc/usage", None, None).is_ok());
        for (url, with) in [
            ("http://broker.svc/usage", Some(token.clone())),
            ("ftp://broker.svc/", None),
            ("http://user:canary@broker.svc/", None),
        ] {
            let error = Post::new(url, with, None).err().unwrap();
            assert!(matches!(error, EventsError::Address) && !error.to_string().contains("canary"), "{url}");
        }
        let missing = Post::new("http://localhost/", Some(folder.path().join("none")), None).err().unwrap();
        assert!(matches!(missing, EventsError::Token(_)), "{missing}");
        let none = folder.path().join("none.pem");
        assert!(matches!(Post::new("https://h/", None, Some(&none)).err().unwrap(), EventsError::Bundle(_)));
    }
}
