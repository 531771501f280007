//! The command line.
//!
//! Owns flags and their help; a flag's value becomes a layer of the configuration and is judged there.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use toml::Value;

use crate::config::{
    Config, ConfigError, Device, Flag, KvCacheDtype, LoadFormat, LogFormat, Quantization, Task, load,
};

/// Serves open-weight language models behind an OpenAI-compatible HTTP API.
#[derive(Parser)]
#[command(name = "mirai", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Serve a model over HTTP; without --model, the embedded demo model.
    Serve(Box<ServeArgs>),
    /// Load a running server and report latencies and throughput.
    Bench(Box<mirai_bench::BenchOptions>),
    /// Print the effective configuration, secrets left out, and whether it can be served.
    CheckConfig(Box<ServeArgs>),
    /// Download a model into the local store, with checksums.
    Pull(PullArgs),
    /// Say what was used, by which application and model, from the ledger's rows; erase, purge, verify them.
    Usage(Box<crate::usage::UsageArgs>),
    /// Make keys for applications.
    Keys(KeysArgs),
    /// Say what a model is, what it needs and what would be refused, without loading it.
    Verify(VerifyArgs),
}

/// Arguments of `keys`.
#[derive(Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    pub(crate) command: KeysCommand,
}

#[derive(Subcommand)]
pub(crate) enum KeysCommand {
    /// Print a new key, once, and the stanza with its hash for the file of applications.
    New {
        /// What the key is called in usage and in the file: 1 to 64 of a-z, 0-9, '-', '_', '.'.
        #[arg(long)]
        id: String,
        /// Secrets under which hashes are made, one `VERSION SECRET` a line; the highest version makes this one.
        #[arg(long, value_name = "FILE")]
        pepper_file: PathBuf,
    },
}

/// Arguments of `verify`.
#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// A folder, a GGUF file, or ORG/NAME in the local store.
    #[arg(value_name = "DIR|FILE.gguf|ORG/NAME")]
    pub(crate) model: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `serve`. Each overrides the environment (`MIRAI__SECTION__KEY`), which overrides `--config`.
#[derive(Args, Default)]
pub(crate) struct ServeArgs {
    /// TOML file with any of the settings that `mirai check-config` prints.
    #[arg(long, env = "MIRAI_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// A folder, a GGUF file, or ORG/NAME in the local store [default: the embedded demo model].
    #[arg(long, value_name = "DIR|FILE.gguf|ORG/NAME", help_heading = "Model")]
    model: Option<String>,
    /// Names that clients may use; the first appears in answers.
    #[arg(long, value_name = "NAME", num_args = 1.., help_heading = "Model")]
    served_model_name: Option<Vec<String>>,
    /// What computes: auto (a GPU where there is one), cpu, cuda (the first GPU) or cuda:N [default: auto].
    #[arg(long, value_name = "DEVICE", help_heading = "Model")]
    device: Option<Device>,
    /// Where weights come from; `dummy` makes random ones of the true shape [default: auto].
    #[arg(long, value_enum, help_heading = "Model")]
    load_format: Option<LoadFormat>,
    /// Quantize linear weights while loading.
    #[arg(long, value_enum, help_heading = "Model")]
    quantization: Option<Quantization>,
    /// What the model is served for [default: auto].
    #[arg(long, value_enum, help_heading = "Model")]
    task: Option<Task>,
    /// Longest sequence, prompt and output, in tokens [default: the model's own].
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    max_model_len: Option<u32>,
    /// How the model marks its reasoning: auto, none, or the name of a format [default: auto].
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    reasoning_parser: Option<String>,

    /// Sequences that run at once [default: 256].
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_num_seqs: Option<u32>,
    /// Tokens of one step [default: 512, on a GPU 2048].
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    max_num_batched_tokens: Option<u32>,
    /// Share of the GPU's memory that may be in use, weights, keys and values and all else [default: 0.9].
    #[arg(long, value_name = "SHARE", help_heading = "Engine")]
    gpu_memory_utilization: Option<f64>,
    /// Memory for keys and values, in bytes [default: on a GPU what is left, else a quarter of the machine's].
    #[arg(long, visible_alias = "kv-cache-memory", value_name = "BYTES", help_heading = "Engine")]
    kv_cache_memory_bytes: Option<u64>,
    /// Element of keys and values [default: auto].
    #[arg(long, value_enum, help_heading = "Engine")]
    kv_cache_dtype: Option<KvCacheDtype>,
    /// Folder for choices made by the clock at start, so that a restart computes the same bits [default: the user's
    /// cache folder].
    #[arg(long, value_name = "FOLDER", help_heading = "Engine")]
    plan_folder: Option<PathBuf>,
    /// Compute every prompt in full.
    #[arg(long, help_heading = "Engine")]
    no_enable_prefix_caching: bool,
    /// Requests that may wait; further ones get 503 [default: 1024].
    #[arg(long, value_name = "N", help_heading = "Engine")]
    max_num_queued_reqs: Option<u64>,
    /// A sequence's numbers do not depend on what runs beside it.
    #[arg(long, help_heading = "Engine")]
    batch_invariant: bool,
    /// Threads that compute on the CPU [default: all cores].
    #[arg(long, value_name = "N", help_heading = "Engine")]
    threads: Option<u64>,

    /// Address to listen on [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", help_heading = "Server")]
    host: Option<String>,
    /// Port to listen on; 0 lets the system choose [default: 8000].
    #[arg(long, help_heading = "Server")]
    port: Option<u16>,
    /// Own address for /metrics.
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Server")]
    metrics_listen: Option<String>,
    /// Bearer key that clients must send; may be repeated. Better from --api-key-file or MIRAI_API_KEY: other
    /// users of the machine can see flags.
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    api_key: Vec<String>,
    /// File with one bearer key a line; read again when it changes.
    #[arg(long, env = "MIRAI_API_KEY_FILE", value_name = "FILE", help_heading = "Server")]
    api_key_file: Option<PathBuf>,
    /// TOML file of applications with the hashes of their keys; read again when it changes.
    #[arg(long, env = "MIRAI_APPLICATIONS", value_name = "FILE", help_heading = "Server")]
    applications: Option<PathBuf>,
    /// Secrets under which those hashes were made; read again when it changes.
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pepper_file: Option<PathBuf>,
    /// Authorities for calls that the server makes, in PEM [default: SSL_CERT_FILE, else the system's].
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    ca_bundle: Option<PathBuf>,
    /// Serve other machines without any key.
    #[arg(long, help_heading = "Server")]
    insecure_no_auth: bool,
    /// Certificate chain in PEM: serve TLS.
    #[arg(long, value_name = "FILE", requires = "ssl_keyfile", help_heading = "Server")]
    ssl_certfile: Option<PathBuf>,
    /// The certificate's private key in PEM.
    #[arg(long, value_name = "FILE", requires = "ssl_certfile", help_heading = "Server")]
    ssl_keyfile: Option<PathBuf>,
    /// Authorities of which every client must show a certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "ssl_certfile", help_heading = "Server")]
    ssl_ca_certs: Option<PathBuf>,
    /// Seconds between SIGTERM and the first refusal: not ready, still serving [default: 0].
    #[arg(long, value_name = "SECONDS", help_heading = "Server")]
    drain_delay: Option<f64>,
    /// Seconds that running requests then have to end [default: 30].
    #[arg(long, value_name = "SECONDS", help_heading = "Server")]
    shutdown_timeout: Option<f64>,

    /// Where each request gets a row: sqlite:///PATH, or postgres://USER@HOST/DATABASE for several replicas
    /// [default: no rows].
    #[arg(long, value_name = "URL", help_heading = "Accounting")]
    ledger: Option<String>,
    /// File that takes rows while the store is out of reach; without one, new work is then refused.
    #[arg(long, value_name = "FILE", help_heading = "Accounting")]
    ledger_spool: Option<PathBuf>,

    /// For people or for collectors [default: text].
    #[arg(long, value_enum, help_heading = "Log")]
    log_format: Option<LogFormat>,
    /// error, warn, info, debug or trace; per module as `info,mirai_engine=debug` [default: info].
    #[arg(long, value_name = "LEVEL", help_heading = "Log")]
    log_level: Option<String>,

    /// Simulated executor instead of a model (this build has test hooks).
    #[cfg(feature = "test-hooks")]
    #[command(flatten)]
    pub(crate) hooks: crate::hooks::HookArgs,
}

impl ServeArgs {
    /// All layers together, with the keys that come from no file.
    pub(crate) fn resolve(&self) -> Result<Config, ConfigError> {
        // Variables that are not UTF-8 cannot be ours: all our names and values are text.
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let mut config = load(self.config.as_deref(), environment, self.flags())?;
        let variable = std::env::var("MIRAI_API_KEY").ok();
        config.server.api_keys = keys(&self.api_key, variable.as_deref());
        config.ledger.password = std::env::var("MIRAI_LEDGER_PASSWORD").ok();
        config.server.identity = config.identity.clone();
        Ok(config)
    }

    /// The flags that were given, as a layer.
    fn flags(&self) -> Vec<Flag> {
        let mut flags = Vec::new();
        let mut add = |name, setting, value: Option<Value>| {
            flags.extend(value.map(|value| Flag { name, setting, value }));
        };
        let on = |given: bool, value: bool| given.then_some(Value::Boolean(value));
        add("model", "model.path", value(self.model.as_ref()));
        add("served-model-name", "model.served_names", value(self.served_model_name.as_ref()));
        add("device", "model.device", value(self.device.as_ref()));
        add("load-format", "model.load_format", value(self.load_format.as_ref()));
        add("quantization", "model.quantization", value(self.quantization.as_ref()));
        add("task", "model.task", value(self.task.as_ref()));
        add("max-model-len", "model.max_len", value(self.max_model_len.as_ref()));
        add("reasoning-parser", "model.reasoning_parser", value(self.reasoning_parser.as_ref()));
        add("max-num-seqs", "engine.max_num_seqs", value(self.max_num_seqs.as_ref()));
        let tokens = value(self.max_num_batched_tokens.as_ref());
        add("max-num-batched-tokens", "engine.max_num_batched_tokens", tokens);
        let bytes = value(self.kv_cache_memory_bytes.as_ref());
        add("kv-cache-memory-bytes", "engine.kv_cache_memory_bytes", bytes);
        let share = value(self.gpu_memory_utilization.as_ref());
        add("gpu-memory-utilization", "engine.gpu_memory_utilization", share);
        add("kv-cache-dtype", "engine.kv_cache_dtype", value(self.kv_cache_dtype.as_ref()));
        add("plan-folder", "engine.plan_folder", value(self.plan_folder.as_ref()));
        let prefix = on(self.no_enable_prefix_caching, false);
        add("no-enable-prefix-caching", "engine.enable_prefix_caching", prefix);
        add("max-num-queued-reqs", "engine.max_queued_requests", value(self.max_num_queued_reqs.as_ref()));
        add("batch-invariant", "engine.batch_invariant", on(self.batch_invariant, true));
        add("threads", "engine.threads", value(self.threads.as_ref()));
        add("host", "server.host", value(self.host.as_ref()));
        add("port", "server.port", value(self.port.as_ref()));
        add("metrics-listen", "server.metrics_listen", value(self.metrics_listen.as_ref()));
        add("api-key-file", "server.api_key_file", value(self.api_key_file.as_ref()));
        add("applications", "identity.applications_file", value(self.applications.as_ref()));
        add("pepper-file", "identity.pepper_file", value(self.pepper_file.as_ref()));
        add("ca-bundle", "identity.ca_bundle", value(self.ca_bundle.as_ref()));
        add("insecure-no-auth", "server.insecure_no_auth", on(self.insecure_no_auth, true));
        if let (Some(certfile), Some(keyfile)) = (&self.ssl_certfile, &self.ssl_keyfile) {
            let mut tls = toml::Table::new();
            tls.extend(value(Some(certfile)).map(|v| ("certfile".to_owned(), v)));
            tls.extend(value(Some(keyfile)).map(|v| ("keyfile".to_owned(), v)));
            tls.extend(value(self.ssl_ca_certs.as_ref()).map(|v| ("ca_certs".to_owned(), v)));
            add("ssl-certfile", "server.tls", Some(Value::Table(tls)));
        }
        add("drain-delay", "server.timeouts.drain_delay_seconds", value(self.drain_delay.as_ref()));
        add("shutdown-timeout", "server.timeouts.shutdown_seconds", value(self.shutdown_timeout.as_ref()));
        add("ledger", "ledger.store", value(self.ledger.as_ref()));
        add("ledger-spool", "ledger.spool", value(self.ledger_spool.as_ref()));
        add("log-format", "log.format", value(self.log_format.as_ref()));
        add("log-level", "log.level", value(self.log_level.as_ref()));
        flags
    }
}

/// Those of `--api-key`, then those of `MIRAI_API_KEY`: one, or several with commas between them.
fn keys(flags: &[String], variable: Option<&str>) -> Vec<String> {
    let list =
        variable.filter(|list| !list.is_empty()).map(|list| list.split(',').map(|key| key.trim().to_owned()));
    flags.iter().cloned().chain(list.into_iter().flatten()).collect()
}

/// A given value as TOML. What TOML cannot hold (a number beyond 2^63, a path that is not UTF-8) becomes text that
/// the setting's own type then refuses.
fn value<T: Serialize + std::fmt::Debug>(given: Option<&T>) -> Option<Value> {
    given.map(|v| Value::try_from(v).unwrap_or_else(|_| Value::String(format!("{v:?}"))))
}

/// Flags of `pull`.
#[derive(Args)]
pub(crate) struct PullArgs {
    /// ORG/NAME, or ORG/NAME@REVISION.
    pub(crate) model: String,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn serve(args: &[&str]) -> ServeArgs {
        let words = ["mirai", "serve"].iter().chain(args);
        let Command::Serve(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not serve") };
        *args
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_names_a_setting_that_exists() {
        let args = serve(&[
            "--model",
            "m",
            "--served-model-name",
            "a",
            "b",
            "--device",
            "cuda:1",
            "--load-format",
            "dummy",
            "--quantization",
            "q4_k",
            "--max-model-len",
            "9",
            "--reasoning-parser",
            "qwen3",
            "--max-num-seqs",
            "3",
            "--max-num-batched-tokens",
            "64",
            "--kv-cache-memory",
            "1000",
            "--gpu-memory-utilization",
            "0.5",
            "--kv-cache-dtype",
            "fp8",
            "--plan-folder",
            "p",
            "--no-enable-prefix-caching",
            "--max-num-queued-reqs",
            "5",
            "--batch-invariant",
            "--threads",
            "2",
            "--host",
            "::1",
            "--port",
            "0",
            "--metrics-listen",
            "127.0.0.1:0",
            "--api-key-file",
            "f",
            "--applications",
            "apps",
            "--pepper-file",
            "pepper",
            "--ca-bundle",
            "bundle",
            "--insecure-no-auth",
            "--ssl-certfile",
            "c",
            "--ssl-keyfile",
            "k",
            "--ssl-ca-certs",
            "a",
            "--drain-delay",
            "1.5",
            "--shutdown-timeout",
            "2",
            "--ledger",
            "sqlite:l.db",
            "--ledger-spool",
            "s",
            "--log-format",
            "json",
            "--log-level",
            "debug",
        ]);
        let config = load(None, std::iter::empty(), args.flags()).unwrap();
        assert_eq!(config.model.served_names, ["a", "b"]);
        assert_eq!(config.model.reasoning_parser, "qwen3");
        assert_eq!(config.model.quantization, Some(Quantization::Q4K));
        assert_eq!(config.model.device, Device::Cuda(1));
        assert_eq!(config.engine.kv_cache_memory_bytes, Some(1000));
        assert_eq!(config.engine.gpu_memory_utilization, Some(0.5));
        assert_eq!(config.engine.kv_cache_dtype, KvCacheDtype::Fp8);
        assert_eq!(config.engine.plan_folder.as_deref(), Some(std::path::Path::new("p")));
        assert!(config.engine.batch_invariant && !config.engine.enable_prefix_caching);
        assert_eq!(config.server.port, 0);
        assert_eq!(config.server.api_key_file.unwrap().to_str(), Some("f"));
        let identity = &config.identity;
        let files = [&identity.applications_file, &identity.pepper_file, &identity.ca_bundle];
        assert_eq!(
            files.map(|file| file.as_ref().and_then(|path| path.to_str())),
            [Some("apps"), Some("pepper"), Some("bundle")]
        );
        assert_eq!(config.server.tls.unwrap().ca_certs.unwrap().to_str(), Some("a"));
        assert!((config.server.timeouts.drain_delay_seconds - 1.5).abs() < 1e-9);
        assert_eq!(config.ledger.store.as_deref(), Some("sqlite:l.db"));
        assert_eq!(config.ledger.spool.as_deref(), Some(std::path::Path::new("s")));
        assert_eq!(config.log.level, "debug");
        let default = load(None, std::iter::empty(), serve(&[]).flags()).unwrap();
        assert_eq!(default, Config::default());
    }

    #[test]
    fn keys_come_from_flags_and_the_environment() {
        let flags = ["one".to_owned()];
        assert_eq!(keys(&flags, Some("two, five")), ["one", "two", "five"]);
        assert_eq!(keys(&flags, Some("")), ["one"]);
        assert_eq!(keys(&[], None), [""; 0]);
        // An empty key between commas is refused later, not dropped.
        assert_eq!(keys(&[], Some("a,")), ["a", ""]);
    }

    #[test]
    fn a_certificate_needs_its_key() {
        assert!(Cli::try_parse_from(["mirai", "serve", "--ssl-certfile", "c"]).is_err());
    }

    #[test]
    fn a_wrong_address_is_refused_by_its_flag() {
        let error = load(None, std::iter::empty(), serve(&["--host", "nowhere"]).flags()).unwrap_err();
        assert!(error.to_string().contains("--host"), "{error}");
    }

    #[test]
    fn every_command_in_an_answer_of_the_demo_model_is_understood() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo/faq.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let mut commands = 0;
        for line in text.lines() {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            let answer = entry["answer"].as_str().unwrap();
            for command in answer.split('`').skip(1).step_by(2).filter(|c| c.starts_with("mirai ")) {
                commands += 1;
                if let Err(error) = Cli::try_parse_from(command.split_whitespace()) {
                    let help = matches!(
                        error.kind(),
                        clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion
                    );
                    assert!(help, "{}: `{command}`: {error}", entry["id"]);
                }
            }
        }
        assert!(commands >= 20, "{commands} commands were found");
    }
}
