//! Why a model cannot be loaded.
//!
//! Owns the error type of this crate. Every variant says which file, which tensor or field, and what was found.

use crate::backend::{BackendError, Storage};
use crate::budget::CacheBudget;

/// Loading failed. Messages name the file and what in it is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be opened or read.
    #[error("{file}: {source}")]
    Io {
        /// Which.
        file: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// The source has no file that is needed.
    #[error("{place}: {why}")]
    MissingFile {
        /// Directory, or name of the source.
        place: String,
        /// What was looked for.
        why: String,
    },
    /// A file's outer form is broken: header, index, lengths, offsets.
    #[error("{file}: {item}: {why}")]
    Corrupt {
        /// Which.
        file: String,
        /// Part of the file: a header, a tensor, a key.
        item: String,
        /// What is wrong, with expected and found values.
        why: String,
    },
    /// A field of `config.json`, or a metadata key of a GGUF file.
    #[error("{file}: field `{field}`: {why}")]
    Field {
        /// Which file.
        file: String,
        /// Which field.
        field: String,
        /// What is wrong, with expected and found values.
        why: String,
    },
    /// No function makes a specification of this architecture.
    #[error("{file}: architecture `{name}` is not supported; supported: {known}")]
    UnknownArchitecture {
        /// Which file.
        file: String,
        /// What it says.
        name: String,
        /// The registry's names, comma-separated.
        known: String,
    },
    /// The weights lack a tensor that the configuration asks for.
    #[error("{file}: tensor `{tensor}` is missing")]
    MissingTensor {
        /// File, or the index of shards.
        file: String,
        /// Its name.
        tensor: String,
    },
    /// A tensor's shape contradicts the configuration.
    #[error("{file}: tensor `{tensor}` has shape {got:?}, expected {expected:?}")]
    WrongShape {
        /// Which file.
        file: String,
        /// Which tensor.
        tensor: String,
        /// From the configuration.
        expected: Vec<usize>,
        /// In the file.
        got: Vec<usize>,
    },
    /// A tensor's element type is not one that can be loaded.
    #[error("{file}: tensor `{tensor}` has type {got}, expected {expected}")]
    WrongType {
        /// Which file.
        file: String,
        /// Which tensor.
        tensor: String,
        /// What can be loaded.
        expected: &'static str,
        /// In the file.
        got: String,
    },
    /// A weight cannot be converted to the type that the options ask for.
    #[error("tensor `{tensor}`: cannot convert {from} to {to}: {why}", from = from.name(), to = to.name())]
    Convert {
        /// Which tensor.
        tensor: String,
        /// As stored.
        from: Storage,
        /// As asked.
        to: Storage,
        /// Reason.
        why: String,
    },
    /// An option contradicts the model, or the memory that is there.
    #[error("option `{option}`: {why}")]
    Option {
        /// Which.
        option: &'static str,
        /// What is wrong, with expected and found values.
        why: String,
    },
    /// The cache has no room for one sequence of the length that was asked for.
    #[error(
        "option `kv-cache budget`: {budget:?} makes {pages} pages of {page_bytes} bytes in {groups} layer groups, room for \
         a sequence of {fits} tokens; {wanted} were asked for{}{}",
        advice(*fits), table(memory.as_deref())
    )]
    CacheTooSmall {
        /// As configured, or as the device has it left.
        budget: CacheBudget,
        /// Pages that fit.
        pages: u64,
        /// Bytes of one.
        page_bytes: u64,
        /// Groups that take pages.
        groups: u64,
        /// Tokens of the longest sequence that fits.
        fits: usize,
        /// Tokens asked for.
        wanted: usize,
        /// How the device's memory is divided, if it was the device that had no more.
        memory: Option<String>,
    },
    /// The device refused.
    #[error("{what}: {source}")]
    Backend {
        /// While loading what.
        what: String,
        /// The device's words.
        source: BackendError,
    },
}

fn advice(fits: usize) -> String {
    if fits == 0 { String::new() } else { format!(" (use --max-model-len {fits})") }
}

fn table(memory: Option<&str>) -> String {
    memory.map(|table| format!("\n{table}")).unwrap_or_default()
}

impl ModelError {
    /// The process's exit code for it: 4 for the model's files, 3 for the machine, 2 for an option.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Option { .. } | Self::CacheTooSmall { memory: None, .. } => 2,
            Self::CacheTooSmall { .. } => 3,
            Self::Backend {
                source: BackendError::OutOfMemory { .. } | BackendError::Device { .. }, ..
            } => 3,
            _ => 4,
        }
    }

    pub(crate) fn corrupt(file: &str, item: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Corrupt { file: file.to_owned(), item: item.into(), why: why.into() }
    }

    pub(crate) fn field(file: &str, field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Field { file: file.to_owned(), field: field.into(), why: why.into() }
    }
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, ModelError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_files_from_machine_and_options() {
        let out = BackendError::OutOfMemory { what: "weights".into(), need: 2, have: 1 };
        assert_eq!(ModelError::Backend { what: "weights".into(), source: out }.exit_code(), 3);
        assert_eq!(ModelError::Option { option: "max-model-len", why: String::new() }.exit_code(), 2);
        let missing = ModelError::MissingTensor { file: "a.safetensors".into(), tensor: "t".into() };
        assert_eq!(missing.exit_code(), 4);
        assert_eq!(missing.to_string(), "a.safetensors: tensor `t` is missing");
    }
}
