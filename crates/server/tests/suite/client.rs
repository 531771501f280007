//! The smallest HTTP client that shows everything: raw bytes in and out.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The data of a stream's events. The last one must be `[DONE]`, which is left out.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        let mut data: Vec<&str> = text
            .split("\n\n")
            .filter(|event| !event.is_empty() && !event.starts_with(':'))
            .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {event}")))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.iter().map(|d| serde_json::from_str(d).unwrap()).collect()
    }
}

/// Reads an answer to its end, whether by length, in chunks or by the connection's end.
pub async fn read_answer<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<Answer> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = find(&bytes, b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned()))
        .collect();
    let get = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let mut body = bytes.split_off(head_end);
    if let Some(length) = get("content-length") {
        let length: usize = length.parse().unwrap();
        while body.len() < length {
            if stream.read_buf(&mut body).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    } else if get("transfer-encoding") == Some("chunked") {
        body = dechunk(stream, body).await?;
    }
    Ok(Answer { status, headers, body })
}

async fn dechunk<S: AsyncRead + Unpin>(stream: &mut S, mut raw: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let Some(line) = find(&raw, b"\r\n") else {
            if stream.read_buf(&mut raw).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            continue;
        };
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..line]).unwrap(), 16).unwrap();
        while raw.len() < line + 2 + size + 2 {
            if stream.read_buf(&mut raw).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        body.extend_from_slice(&raw[line + 2..line + 2 + size]);
        raw.drain(..line + 2 + size + 2);
        if size == 0 {
            return Ok(body);
        }
    }
}

pub fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

pub fn head(method: &str, path: &str, headers: &[(&str, &str)], length: Option<usize>) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(length) = length {
        text.push_str(&format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// Writes what the server takes of `bytes`, and reads its answer, at the same time: a server may answer before
/// it has read everything.
pub async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(stream: S, bytes: &[u8]) -> std::io::Result<Answer> {
    let (mut read, mut write) = tokio::io::split(stream);
    let sending = async {
        let _ = write.write_all(bytes).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = read_answer(&mut read) => answer,
        () = sending => unreachable!(),
    }
}

pub async fn raw(address: SocketAddr, bytes: &[u8]) -> std::io::Result<Answer> {
    exchange(TcpStream::connect(address).await?, bytes).await
}

pub async fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
) -> Answer {
    let mut bytes = head(method, path, headers, body.map(<[u8]>::len));
    bytes.extend_from_slice(body.unwrap_or_default());
    raw(address, &bytes).await.unwrap_or_else(|e| panic!("{method} {path}: {e}"))
}

pub async fn get(address: SocketAddr, path: &str) -> Answer {
    request(address, "GET", path, &[], None).await
}

pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    request(address, "POST", path, &[], Some(body.to_string().as_bytes())).await
}
