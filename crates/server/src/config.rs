//! The server's one configuration: every limit and every deadline of the HTTP surface, with its default.
//!
//! Owns values and their consistency; it never reads a file, an environment variable or a flag (the binary
//! does, and embeds this struct in its own).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::api::bounds;
use crate::auth::config::IdentityConfig;
use crate::config_error::{ConfigError, key_problem};

/// Everything the HTTP surface can be told. All fields have defaults; unknown fields are errors.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address to listen on. Default `127.0.0.1`.
    pub host: IpAddr,
    /// Port to listen on; 0 lets the system choose. Default 8000.
    pub port: u16,
    /// Own address for `/metrics`; the main address then answers it with 404. Default: none.
    pub metrics_listen: Option<SocketAddr>,
    /// Accepted bearer keys. Secret, so neither read from nor written to a configuration file: the binary
    /// fills it from the environment or a flag.
    #[serde(skip)]
    pub api_keys: Vec<String>,
    /// File with more of them, one a line; it is read again when it changes. Default: none.
    pub api_key_file: Option<PathBuf>,
    /// Applications, tokens and gateways. A section of its own in a configuration file, so the binary fills it.
    #[serde(skip)]
    pub identity: IdentityConfig,
    /// Allows another address than loopback without any key. Default false.
    pub insecure_no_auth: bool,
    /// Certificates, if the server speaks TLS. Default: none.
    pub tls: Option<TlsConfig>,
    /// Sizes and counts.
    pub limits: Limits,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// Threads that parse bodies, render templates and tokenize. Default: the cores of the machine, at least 2.
    pub workers: usize,
    /// Repeat the error text in a top-level `message`, which some gateways show to people. Default true.
    pub error_message_copy: bool,
    /// Repeat reranked documents as plain strings, as some gateways expect them, instead of objects with a
    /// `text`. Default false.
    pub rerank_documents_as_text: bool,
}

/// PEM files. They are read again when they change; a pair that cannot be read leaves the old one in place.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The server's chain, leaf first.
    pub certfile: PathBuf,
    /// The leaf's private key.
    pub keyfile: PathBuf,
    /// If set, every client must show a certificate that one of these signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_certs: Option<PathBuf>,
}

/// Sizes and counts. A value beyond a bound is a configuration error, a request beyond a limit a 4xx.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Open connections; further ones wait in the kernel's backlog. Default 4096.
    pub max_connections: usize,
    /// Bytes of one body. Default 32 MiB.
    pub max_body_bytes: usize,
    /// Bytes of all bodies that are being read or parsed at one moment. Default 256 MiB.
    pub max_inflight_body_bytes: usize,
    /// Bytes of a request's head (line and headers). Default 64 KiB, at least 8 KiB.
    pub max_header_bytes: usize,
    /// Header lines of a request. Default 100.
    pub max_headers: usize,
    /// Nesting of a JSON body. Default 64.
    pub max_json_depth: usize,
    /// Bodies that wait for a worker. Default 1024.
    pub max_queued_jobs: usize,
    /// Choices (`n`) of one prompt. Default 128.
    pub max_n: u32,
    /// Choices of one request over all its prompts. Default 256.
    pub max_choices: u32,
    /// Prompts of one request. Default 128.
    pub max_prompts: usize,
    /// Texts of one embedding call; documents or pairs of one rerank or score call. Default 2048.
    pub max_items: usize,
    /// Tokens of all items of such a call, if it has more than one. Default 1,048,576.
    pub max_item_tokens: usize,
    /// Messages of one chat. Default 2048.
    pub max_messages: usize,
    /// Stop strings. Default 16.
    pub max_stop: usize,
    /// Bytes of one stop string. Default 1024.
    pub max_stop_bytes: usize,
    /// Log-probabilities for each token. Default 20.
    pub max_logprobs: u32,
    /// Entries of `logit_bias`. Default 1024.
    pub max_logit_bias: usize,
    /// Entries of `bad_words`. Default 128.
    pub max_bad_words: usize,
    /// Bytes of one bad word. Default 256.
    pub max_bad_word_bytes: usize,
    /// Output tokens of one choice, on top of what the context leaves. Default: no other limit.
    pub max_output_tokens: Option<u32>,
    /// Bytes that wait for one client before it counts as too slow and its request is cancelled. Default 1 MiB.
    pub max_stream_buffer_bytes: usize,
}

/// Deadlines, in seconds (fractions allowed).
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// From the first byte of a head (or the accepted connection) to its last. Default 10.
    pub header_seconds: f64,
    /// Of a body, on top of one second for each 16 KiB received. Default 30.
    pub body_seconds: f64,
    /// Of a connection between two requests. Default 75.
    pub idle_seconds: f64,
    /// During which the client takes no byte. Default 30.
    pub write_stall_seconds: f64,
    /// Of silence on a stream, after which a `: ping` comment is sent; 0 sends none. Default 15.
    pub ping_seconds: f64,
    /// Of one request from its arrival to its end; its output then ends with `length`. Default 3600.
    pub request_seconds: f64,
    /// Without progress of a busy engine, after which health says so. Default 10.
    pub engine_progress_seconds: f64,
    /// Between the drain signal and the first refusal: not ready, still serving. Default 0.
    pub drain_delay_seconds: f64,
    /// That running requests have once the drain refuses new ones. Default 30.
    pub shutdown_seconds: f64,
    /// Between two looks at the files of keys and certificates; a change counts at the second look that sees
    /// it. Default 2.
    pub reload_seconds: f64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8000,
            metrics_listen: None,
            api_keys: Vec::new(),
            api_key_file: None,
            identity: IdentityConfig::default(),
            insecure_no_auth: false,
            tls: None,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            workers: std::thread::available_parallelism().map_or(2, |n| n.get().max(2)),
            error_message_copy: true,
            rerank_documents_as_text: false,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_body_bytes: 32 << 20,
            max_inflight_body_bytes: 256 << 20,
            max_header_bytes: 64 << 10,
            max_headers: 100,
            max_json_depth: 64,
            max_queued_jobs: 1024,
            max_n: 128,
            max_choices: 256,
            max_prompts: bounds::PROMPTS,
            max_items: bounds::ITEMS,
            max_item_tokens: 1 << 20,
            max_messages: bounds::MESSAGES,
            max_stop: bounds::STOP,
            max_stop_bytes: 1024,
            max_logprobs: bounds::LOGPROBS,
            max_logit_bias: bounds::LOGIT_BIAS,
            max_bad_words: bounds::BAD_WORDS,
            max_bad_word_bytes: 256,
            max_output_tokens: None,
            max_stream_buffer_bytes: 1 << 20,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            header_seconds: 10.0,
            body_seconds: 30.0,
            idle_seconds: 75.0,
            write_stall_seconds: 30.0,
            ping_seconds: 15.0,
            request_seconds: 3600.0,
            engine_progress_seconds: 10.0,
            drain_delay_seconds: 0.0,
            shutdown_seconds: 30.0,
            reload_seconds: 2.0,
        }
    }
}

impl ServerConfig {
    /// Checks what can be checked without touching the machine.
    ///
    /// # Errors
    /// The first inconsistency, naming the field.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !self.host.is_loopback()
            && self.api_keys.is_empty()
            && self.api_key_file.is_none()
            && !self.identity.authenticates()
            && !self.insecure_no_auth
            && !self.mutual_tls()
        {
            return Err(ConfigError::OpenWithoutKey(self.host));
        }
        for (i, key) in self.api_keys.iter().enumerate() {
            if let Some(problem) = key_problem(key) {
                return Err(ConfigError::BadKey { index: i + 1, problem });
            }
        }
        self.identity.validate()?;
        self.check_ranges()
    }

    fn mutual_tls(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.ca_certs.is_some())
    }

    fn check_ranges(&self) -> Result<(), ConfigError> {
        let l = &self.limits;
        let t = &self.timeouts;
        let sizes: [(&'static str, usize, usize, usize); 18] = [
            ("workers", self.workers, 1, 1024),
            ("limits.max_connections", l.max_connections, 1, 1 << 20),
            ("limits.max_body_bytes", l.max_body_bytes, 1 << 10, 1 << 30),
            ("limits.max_inflight_body_bytes", l.max_inflight_body_bytes, l.max_body_bytes, 1 << 40),
            ("limits.max_header_bytes", l.max_header_bytes, 8 << 10, 1 << 20),
            ("limits.max_headers", l.max_headers, 8, 1000),
            ("limits.max_json_depth", l.max_json_depth, 8, 100),
            ("limits.max_queued_jobs", l.max_queued_jobs, 1, 1 << 20),
            ("limits.max_n", l.max_n as usize, 1, l.max_choices as usize),
            ("limits.max_choices", l.max_choices as usize, 1, 16_384),
            ("limits.max_prompts", l.max_prompts, 1, bounds::PROMPTS),
            ("limits.max_items", l.max_items, 1, bounds::ITEMS),
            ("limits.max_item_tokens", l.max_item_tokens, 1, 1 << 30),
            ("limits.max_messages", l.max_messages, 1, bounds::MESSAGES),
            ("limits.max_stop", l.max_stop, 0, bounds::STOP),
            ("limits.max_logprobs", l.max_logprobs as usize, 0, bounds::LOGPROBS as usize),
            ("limits.max_logit_bias", l.max_logit_bias, 0, bounds::LOGIT_BIAS),
            ("limits.max_bad_words", l.max_bad_words, 0, bounds::BAD_WORDS),
        ];
        for (field, value, min, max) in sizes {
            if value < min || value > max {
                let (value, min, max) = (value as f64, min as f64, max as f64);
                return Err(ConfigError::OutOfRange { field, value, min, max });
            }
        }
        let year = 365.0 * 86_400.0;
        let times: [(&'static str, f64, f64); 10] = [
            ("timeouts.header_seconds", t.header_seconds, 0.01),
            ("timeouts.body_seconds", t.body_seconds, 0.01),
            ("timeouts.idle_seconds", t.idle_seconds, 0.01),
            ("timeouts.write_stall_seconds", t.write_stall_seconds, 0.01),
            ("timeouts.ping_seconds", t.ping_seconds, 0.0),
            ("timeouts.request_seconds", t.request_seconds, 0.01),
            ("timeouts.engine_progress_seconds", t.engine_progress_seconds, 0.01),
            ("timeouts.drain_delay_seconds", t.drain_delay_seconds, 0.0),
            ("timeouts.shutdown_seconds", t.shutdown_seconds, 0.0),
            ("timeouts.reload_seconds", t.reload_seconds, 0.01),
        ];
        for (field, value, min) in times {
            if !(min..=year).contains(&value) {
                return Err(ConfigError::OutOfRange { field, value, min, max: year });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        ServerConfig::default().validate().unwrap();
    }

    #[test]
    fn another_address_than_loopback_needs_a_key_or_a_word() {
        let mut config = ServerConfig { host: "0.0.0.0".parse().unwrap(), ..ServerConfig::default() };
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains("0.0.0.0") && message.contains("--insecure-no-auth"), "{message}");
        config.insecure_no_auth = true;
        config.validate().unwrap();
        config.insecure_no_auth = false;
        config.api_keys = vec!["k".to_owned()];
        config.validate().unwrap();
        config.api_keys.clear();
        config.api_key_file = Some("keys".into());
        config.validate().unwrap();
        config.api_key_file = None;
        config.tls =
            Some(TlsConfig { certfile: "c".into(), keyfile: "k".into(), ca_certs: Some("ca".into()) });
        config.validate().unwrap();
    }

    #[test]
    fn bad_keys_are_refused() {
        for key in ["", "a b", "a\n", "é", &"x".repeat(4097)] {
            let config =
                ServerConfig { api_keys: vec!["good".into(), key.into()], ..ServerConfig::default() };
            let error = config.validate().unwrap_err();
            assert!(matches!(error, ConfigError::BadKey { index: 2, .. }), "{error}");
            assert!(key.is_empty() || !error.to_string().contains(key), "a key must not reach a message");
        }
    }

    #[test]
    fn values_out_of_range_name_their_field() {
        let mut config = ServerConfig::default();
        config.limits.max_stop = 17;
        assert!(config.validate().unwrap_err().to_string().starts_with("limits.max_stop is 17"));
        config.limits.max_stop = 4;
        config.timeouts.header_seconds = f64::NAN;
        assert!(config.validate().unwrap_err().to_string().contains("timeouts.header_seconds"));
    }

    #[test]
    fn keys_never_reach_a_file_and_unknown_fields_are_errors() {
        let config = ServerConfig { api_keys: vec!["secret".into()], ..ServerConfig::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert!(!text.contains("secret"));
        let back: ServerConfig = serde_json::from_str(&text).unwrap();
        assert_eq!(back, ServerConfig { api_keys: vec![], ..config });
        assert!(serde_json::from_str::<ServerConfig>(r#"{"prot": 1}"#).is_err());
        assert!(serde_json::from_str::<ServerConfig>(r#"{"api_keys": ["x"]}"#).is_err());
    }
}
