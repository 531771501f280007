//! What can be wrong with model files: every variant names the file, the field and the reason.

use std::path::PathBuf;

/// A problem with the files of a model. The command line maps all of these to exit code 4.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The `--model` argument is neither a path nor `ORG/NAME`.
    #[error("model {given:?}: {reason}; expected a directory, a .gguf file, or ORG/NAME[@REVISION]")]
    BadReference {
        /// The argument as given.
        given: String,
        /// Why it is not understood.
        reason: String,
    },
    /// A file or directory could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried: `read`, `open`, `write` ...
        action: &'static str,
        /// The reason from the operating system.
        source: std::io::Error,
    },
    /// A file that the model needs is not there.
    #[error("{}: missing file {file}: {reason}", dir.display())]
    MissingFile {
        /// The model's directory.
        dir: PathBuf,
        /// The file's name.
        file: String,
        /// Who needs it.
        reason: String,
    },
    /// The directory holds weights only in a format that can run code when it is read.
    #[error(
        "{}: weights are pickle files ({found}), which are never opened: safetensors/GGUF only; \
         convert the model first",
        dir.display()
    )]
    PickleOnly {
        /// The model's directory.
        dir: PathBuf,
        /// The first such file.
        found: String,
    },
    /// The directory holds no weights at all.
    #[error("{}: no weights found (neither *.safetensors nor *.gguf)", dir.display())]
    NoWeights {
        /// The model's directory.
        dir: PathBuf,
    },
    /// Several files could be the weights and nothing says which.
    #[error("{}: {count} candidates for the weights ({examples}): {hint}", dir.display())]
    Ambiguous {
        /// The model's directory.
        dir: PathBuf,
        /// How many files qualify.
        count: usize,
        /// Some of their names.
        examples: String,
        /// What would settle it.
        hint: &'static str,
    },
    /// `model.safetensors.index.json` is not what it should be.
    #[error("{}: field {field}: {reason}", path.display())]
    BadIndex {
        /// The index file.
        path: PathBuf,
        /// The field, for example `weight_map["lm_head.weight"]`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A name or a symbolic link leads out of the model's directory or store.
    #[error("{}: leads to {}, outside {}", path.display(), target.display(), allowed.display())]
    Escapes {
        /// The file as named.
        path: PathBuf,
        /// Where it really is.
        target: PathBuf,
        /// The directory it must stay in.
        allowed: PathBuf,
    },
    /// A path that should be a regular file is something else.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file is larger than this kind of file may be.
    #[error("{}: {bytes} bytes, more than the limit of {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A directory holds more files than a model may have.
    #[error("{}: more than {limit} files", dir.display())]
    TooManyFiles {
        /// The directory.
        dir: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// The model is not in the local store.
    #[error("model {repo} (revision {revision}) is not in the local store {}: {reason}", store.display())]
    NotInStore {
        /// `ORG/NAME`.
        repo: String,
        /// Branch, tag or commit that was asked for.
        revision: String,
        /// The store's directory.
        store: PathBuf,
        /// What exactly was missing, and what to do.
        reason: String,
    },
    /// The network is needed and forbidden.
    #[error("offline (HF_HUB_OFFLINE is set): {repo} cannot be downloaded: {reason}")]
    Offline {
        /// `ORG/NAME`.
        repo: String,
        /// Why the local copy does not do.
        reason: String,
    },
    /// This binary was built without the feature `download`.
    #[error(
        "cannot download {repo}: this build has no `download` feature; copy the files to a directory and \
         give its path, or build with `--features download`"
    )]
    DownloadDisabled {
        /// `ORG/NAME`.
        repo: String,
    },
    /// Only hub repositories can be downloaded.
    #[error("{given} is a local path: there is nothing to download")]
    NotARepository {
        /// The reference as given.
        given: String,
    },
    /// The hub or the network failed.
    #[error("download of {repo} (revision {revision}) failed: {reason}")]
    Download {
        /// `ORG/NAME`.
        repo: String,
        /// Revision that was asked for.
        revision: String,
        /// The client's message.
        reason: String,
    },
    /// A line of a `SHA256SUMS` file is malformed.
    #[error("{}: line {line}: {reason}", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// Files differ from the manifest.
    #[error("{}", display_failures(dir, failures))]
    Checksum {
        /// The model's directory.
        dir: PathBuf,
        /// Every file that is wrong; never empty.
        failures: Vec<crate::checksum::Failure>,
    },
}

impl HubError {
    /// Builds the mapping function for `map_err` on an I/O result.
    pub(crate) fn io(
        path: impl Into<PathBuf>,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> HubError {
        let path = path.into();
        move |source| HubError::Io { path, action, source }
    }
}

fn display_failures(dir: &std::path::Path, failures: &[crate::checksum::Failure]) -> String {
    let mut text = format!(
        "{}: {} file(s) differ from {}",
        dir.display(),
        failures.len(),
        crate::checksum::MANIFEST_NAME
    );
    for failure in failures {
        text.push_str("\n  ");
        text.push_str(&failure.to_string());
    }
    text
}
