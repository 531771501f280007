//! The one typed configuration, and the layers that fill it: a TOML file, the environment, flags; last wins.
//!
//! Owns where a value comes from and what it is called there. What a value means belongs to the crate that
//! uses it. Secrets are never read from the file and never printed.

mod device;
mod energy;
mod layers;
mod ledger;
mod quotas;
mod usage;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use mirai_server::{IdentityConfig, ServerConfig};

pub(crate) use device::Device;
pub(crate) use energy::EnergyConfig;
pub(crate) use layers::{ConfigError, Flag, load};
pub(crate) use ledger::LedgerConfig;
pub(crate) use quotas::QuotasConfig;
pub(crate) use usage::UsageConfig;

/// Everything the server can be told. `mirai check-config` prints it; each field is also a key of the TOML file
/// and, as `MIRAI__SECTION__KEY`, an environment variable.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Which model, and how it is loaded.
    pub(crate) model: ModelConfig,
    /// How much runs at once.
    pub(crate) engine: EngineConfig,
    /// The HTTP surface.
    pub(crate) server: ServerConfig,
    /// Accounting for requests.
    pub(crate) ledger: LedgerConfig,
    /// How the energy of requests becomes known.
    pub(crate) energy: EnergyConfig,
    /// What usage costs, and who else is told of it.
    pub(crate) usage: UsageConfig,
    /// Who may call.
    pub(crate) identity: IdentityConfig,
    /// How what applications may use is counted.
    pub(crate) quotas: QuotasConfig,
    /// What is written about it.
    pub(crate) log: LogConfig,
}

/// Which model, and how it is loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ModelConfig {
    /// A folder, a GGUF file, or ORG/NAME in the local store; without one, the embedded demo model.
    pub(crate) path: Option<String>,
    /// Names that clients may use, the first in answers. Default: the model's own name.
    pub(crate) served_names: Vec<String>,
    /// What computes: `auto`, `cpu`, `cuda` (the first GPU) or `cuda:N`.
    pub(crate) device: Device,
    /// Where weights come from.
    pub(crate) load_format: LoadFormat,
    /// Blocks that linear weights are quantized to while loading.
    pub(crate) quantization: Option<Quantization>,
    /// What the model is served for.
    pub(crate) task: Task,
    /// Longest sequence, prompt and output. Default: what the model was made for, and memory allows.
    pub(crate) max_len: Option<u32>,
    /// How the model marks its reasoning: `auto` (by its template and vocabulary), `none` (all output is the
    /// answer), or the name of a format.
    pub(crate) reasoning_parser: String,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            path: None,
            served_names: Vec::new(),
            device: Device::default(),
            load_format: LoadFormat::default(),
            quantization: None,
            task: Task::Auto,
            max_len: None,
            reasoning_parser: "auto".to_owned(),
        }
    }
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LoadFormat {
    /// From the model's files.
    #[default]
    Auto,
    /// Random weights of the true shape, for benchmarks: only `config.json` is needed.
    Dummy,
}

/// What a model is served for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Task {
    /// What its files say: embeddings where sentence-transformers' files lie beside it, else what it is made for.
    #[default]
    Auto,
    /// Chats and completions.
    Generate,
    /// Embeddings.
    Embed,
    /// Scores of pairs of texts.
    Score,
}

/// Blocks that linear weights are quantized to while loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Quantization {
    /// 8 bits, blocks of 32.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4 bits, super-blocks of 256.
    #[value(name = "q4_k")]
    #[serde(rename = "q4_k")]
    Q4K,
    /// 8-bit floats (e4m3), on a GPU.
    Fp8,
}

/// Element of the cache of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KvCacheDtype {
    /// bf16.
    #[default]
    Auto,
    /// 16 bits.
    Bf16,
    /// 8-bit floats (e4m3), on a GPU: half the memory.
    Fp8,
}

/// How much runs at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct EngineConfig {
    /// Sequences that run at once.
    pub(crate) max_num_seqs: u32,
    /// Tokens of one step: decoding sequences first, then chunks of prompts. More of them make prefill cheaper and
    /// running streams wait longer. Default: 512 on the processor, 2048 on a GPU.
    pub(crate) max_num_batched_tokens: Option<u32>,
    /// Memory for keys and values in bytes; never more than `max_num_seqs` full contexts need. Default: a quarter of
    /// the machine's memory, at most 4 GiB; on a GPU, what its share leaves.
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Element of keys and values.
    pub(crate) kv_cache_dtype: KvCacheDtype,
    /// Share of the GPU's memory that may be in use, from above 0 to 1. Default: 0.9.
    pub(crate) gpu_memory_utilization: Option<f64>,
    /// Folder in which choices made by the clock at start are kept, so that a restart computes the same bits.
    /// Default: `mirai` in the user's cache folder.
    pub(crate) plan_folder: Option<PathBuf>,
    /// Algorithms of cublasLt that are timed for each shape of matmul at start; 1 takes its own first choice.
    pub(crate) matmul_candidates: usize,
    /// Whether prompts reuse the computed blocks of earlier ones.
    pub(crate) enable_prefix_caching: bool,
    /// Requests that may wait; further ones get 503.
    pub(crate) max_queued_requests: usize,
    /// Prompt tokens that may wait; further ones get 503.
    pub(crate) max_queued_tokens: usize,
    /// Promise that a sequence's numbers do not depend on what runs beside it.
    pub(crate) batch_invariant: bool,
    /// Threads that compute on the CPU. Default: all cores.
    pub(crate) threads: Option<usize>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: None,
            kv_cache_memory_bytes: None,
            kv_cache_dtype: KvCacheDtype::default(),
            gpu_memory_utilization: None,
            plan_folder: None,
            matmul_candidates: 8,
            enable_prefix_caching: true,
            max_queued_requests: 1024,
            max_queued_tokens: 4 << 20,
            batch_invariant: false,
            threads: None,
        }
    }
}

/// What is written, and how. Never a prompt, never an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogConfig {
    /// For people or for collectors.
    pub(crate) format: LogFormat,
    /// Least severity: error, warn, info, debug or trace; per module as `info,mirai_engine=debug`.
    pub(crate) level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: "info".to_owned() }
    }
}

/// For people or for collectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// A line that reads well.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_default_configuration_survives_its_own_format() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), Config::default());
    }
}
