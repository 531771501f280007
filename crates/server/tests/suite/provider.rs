//! An identity provider on this machine: discovery, keys that rotate, introspection; and what can go wrong with it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::signer::Signer;

pub const CLIENT: &str = "mirai";
pub const SECRET: &str = "s3cret-of:mirai";
pub const AUDIENCE: &str = "mirai-api";

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// What the provider does, to be changed while it runs.
pub struct Behaviour {
    /// What discovery says; `None` for its own address.
    pub issuer: Option<String>,
    pub keys: Vec<Value>,
    /// Opaque tokens and what introspection says of them.
    pub tokens: HashMap<String, Value>,
    /// If set, the answer to everything: status and body.
    pub broken: Option<(u16, Bytes)>,
    /// Before each answer.
    pub delay: Duration,
    /// Times asked: discovery, keys, introspection.
    pub asked: [usize; 3],
}

#[derive(Clone)]
pub struct Provider {
    pub address: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
}

impl Provider {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let behaviour = Behaviour {
            issuer: None,
            keys: Vec::new(),
            tokens: HashMap::new(),
            broken: None,
            delay: Duration::ZERO,
            asked: [0; 3],
        };
        let provider = Self { address, behaviour: Arc::new(Mutex::new(behaviour)) };
        let serving = provider.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let provider = serving.clone();
                let service = service_fn(move |request| {
                    let provider = provider.clone();
                    async move { Ok::<_, Infallible>(provider.answer(request).await) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        provider
    }

    pub fn issuer(&self) -> String {
        format!("http://{}/realms/test", self.address)
    }

    pub fn change<T>(&self, change: impl FnOnce(&mut Behaviour) -> T) -> T {
        change(&mut self.behaviour.lock().unwrap())
    }

    pub fn asked(&self) -> [usize; 3] {
        self.change(|behaviour| behaviour.asked)
    }

    /// Publishes the keys of these signers, named `k0`, `k1`…
    pub fn publish(&self, signers: &[&Signer]) {
        let keys = signers.iter().enumerate().map(|(i, signer)| signer.jwk(&format!("k{i}"))).collect();
        self.change(|behaviour| behaviour.keys = keys);
    }

    /// Claims of a good token.
    pub fn claims(&self, azp: &str) -> Value {
        json!({"iss": self.issuer(), "aud": [AUDIENCE], "exp": now() + 600, "iat": now(), "azp": azp, "sub": "user-1"})
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let delay = self.change(|behaviour| behaviour.delay);
        tokio::time::sleep(delay).await;
        let issuer = self.issuer();
        self.change(|behaviour| {
            let path = head.uri.path();
            let which = ["/realms/test/.well-known/openid-configuration", "/keys", "/introspect"];
            let Some(which) = which.iter().position(|known| *known == path) else {
                return reply(404, Bytes::new());
            };
            behaviour.asked[which] += 1;
            if let Some((status, body)) = &behaviour.broken {
                return reply(*status, body.clone());
            }
            let value = match which {
                0 => json!({"issuer": behaviour.issuer.as_ref().unwrap_or(&issuer),
                            "jwks_uri": format!("http://{}/keys", self.address), "other": [1, 2]}),
                1 => json!({"keys": behaviour.keys}),
                _ => {
                    let basic = format!("Basic {}", STANDARD.encode(format!("{CLIENT}:s3cret-of%3Amirai")));
                    if head.headers.get("authorization").is_none_or(|value| *value != *basic) {
                        return reply(401, Bytes::new());
                    }
                    let form = std::str::from_utf8(&body).unwrap();
                    let token = form.split('&').find_map(|pair| pair.strip_prefix("token=")).unwrap();
                    behaviour.tokens.get(token).cloned().unwrap_or_else(|| json!({"active": false}))
                }
            };
            reply(200, value.to_string().into())
        })
    }
}

fn reply(status: u16, body: Bytes) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(body)).unwrap()
}
