//! The transfer by `hf-hub`: lists a repository, fetches what [`crate::pull`] selects into the store, checks
//! digests. Owns nothing of the store's layout, which is `hf-hub`'s and [`crate::store`]'s to agree on.

use std::path::{Path, PathBuf};

use futures_util::{StreamExt, pin_mut};
use hf_hub::HFClient;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;

use crate::HubError;
use crate::checksum::{Failure, Sha256Digest, hash_file};
use crate::selection::{PullProgress, is_pooling_folder, is_wanted_file, select_files};
use crate::store::StoreOptions;

/// Most entries of a repository.
const MAX_LISTING: usize = 100_000;

struct Reporter<F>(F);

impl<F: Fn(PullProgress) + Send + Sync> ProgressHandler for Reporter<F> {
    fn on_progress(&self, event: &ProgressEvent) {
        match event {
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                for file in files {
                    (self.0)(PullProgress {
                        file: Some(file.filename.clone()),
                        bytes_done: file.bytes_completed,
                        bytes_total: file.total_bytes,
                    });
                }
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress {
                bytes_completed,
                total_bytes,
                ..
            }) => {
                (self.0)(PullProgress {
                    file: None,
                    bytes_done: *bytes_completed,
                    bytes_total: *total_bytes,
                });
            }
            _ => {}
        }
    }
}

/// Downloads into the store. Blocks.
pub(crate) fn snapshot(
    org: &str,
    name: &str,
    revision: Option<&str>,
    options: &StoreOptions,
    progress: impl Fn(PullProgress) + Send + Sync + 'static,
) -> Result<(), HubError> {
    let revision = revision.unwrap_or("main");
    let failed = |reason: String| HubError::Download {
        repo: format!("{org}/{name}"),
        revision: revision.to_owned(),
        reason,
    };
    let Some(store) = &options.cache_dir else {
        return Err(failed("no store is configured: set HF_HUB_CACHE, HF_HOME or HOME".into()));
    };
    // A thread of its own: a runtime must not be started or dropped inside the caller's.
    let dir = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .map_err(|error| failed(format!("cannot start a runtime: {error}")))?;
            runtime.block_on(fetch(org, name, revision, store, options, progress, &failed))
        });
        worker.join().unwrap_or_else(|_| Err(failed("the download panicked".into())))
    })?;
    check_digests(&dir)
}

async fn fetch(
    org: &str,
    name: &str,
    revision: &str,
    store: &Path,
    options: &StoreOptions,
    progress: impl Fn(PullProgress) + Send + Sync + 'static,
    failed: &impl Fn(String) -> HubError,
) -> Result<PathBuf, HubError> {
    let mut builder =
        HFClient::builder().cache_dir(store).user_agent(concat!("mirai/", env!("CARGO_PKG_VERSION")));
    if let Some(endpoint) = &options.endpoint {
        builder = builder.endpoint(endpoint);
    }
    if let Some(token) = &options.token {
        builder = builder.token(token);
    }
    let repo = builder.build().map_err(|error| failed(error.to_string()))?.model(org, name);
    let mut listing = Vec::new();
    {
        let entries = repo
            .list_tree()
            .revision(revision.to_owned())
            .send()
            .map_err(|error| failed(error.to_string()))?;
        pin_mut!(entries);
        while let Some(entry) = entries.next().await {
            if let RepoTreeEntry::File { path, .. } = entry.map_err(|error| failed(error.to_string()))? {
                if listing.len() >= MAX_LISTING {
                    return Err(failed(format!("the repository lists more than {MAX_LISTING} files")));
                }
                listing.push(path);
            }
        }
    }
    let files = select_files(&format!("{org}/{name}"), listing)?;
    repo.snapshot_download()
        .revision(revision)
        .allow_patterns(files.iter().map(|file| glob_literal(file)).collect::<Vec<_>>())
        .progress(Reporter(progress))
        .send()
        .await
        .map_err(|error| failed(error.to_string()))
}

/// A glob that matches exactly `name`.
fn glob_literal(name: &str) -> String {
    let mut glob = String::with_capacity(name.len());
    for c in name.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '{' | '}' | '!' | '\\') {
            glob.extend(['[', c, ']']);
        } else {
            glob.push(c);
        }
    }
    glob
}

/// The store names the blob of a large file by its SHA-256: compares content and name.
fn check_digests(snapshot: &Path) -> Result<(), HubError> {
    let mut failures = Vec::new();
    for name in wanted_files(snapshot)? {
        let path = snapshot.join(&name);
        let target = path.canonicalize().map_err(HubError::io(&path, "open"))?;
        let blob = target.file_name().unwrap_or_default().to_string_lossy();
        let Some(expected) = Sha256Digest::from_hex(&blob) else { continue };
        let got = hash_file(&target, |_| {})?;
        if got != expected {
            failures.push(Failure { file: name, expected, got: Ok(got) });
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    Err(HubError::Checksum { dir: snapshot.to_owned(), failures })
}

/// The files of a snapshot that [`is_wanted_file`] names, as it names them.
fn wanted_files(snapshot: &Path) -> Result<Vec<String>, HubError> {
    let list = |dir: &Path| -> Result<Vec<String>, HubError> {
        let entries = std::fs::read_dir(dir).map_err(HubError::io(dir, "list"))?;
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.map_err(HubError::io(dir, "list"))?;
            Ok(entry.file_name().to_string_lossy().into_owned())
        };
        entries.map(name).collect()
    };
    let mut files = list(snapshot)?;
    let folders: Vec<String> = files.iter().filter(|name| is_pooling_folder(name)).cloned().collect();
    for folder in folders {
        files.extend(list(&snapshot.join(&folder))?.iter().map(|name| format!("{folder}/{name}")));
    }
    files.retain(|file| is_wanted_file(file));
    files.sort_unstable();
    Ok(files)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_of_the_pooling_folder_is_seen() {
        let store = tempfile::tempdir().unwrap();
        let (blobs, snapshot) = (store.path().join("blobs"), store.path().join("snapshots/c"));
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(snapshot.join("1_Pooling")).unwrap();
        // What `sha256sum` says of two bytes, `{}`.
        let digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        std::fs::write(blobs.join(digest), "{}").unwrap();
        std::os::unix::fs::symlink(blobs.join(digest), snapshot.join("1_Pooling/config.json")).unwrap();
        std::os::unix::fs::symlink(blobs.join(digest), snapshot.join("config.json")).unwrap();
        std::fs::write(snapshot.join("1_Pooling/notes.md"), "").unwrap();
        assert_eq!(wanted_files(&snapshot).unwrap(), ["1_Pooling/config.json", "config.json"]);
        check_digests(&snapshot).unwrap();
        std::fs::write(blobs.join(digest), "{ }").unwrap();
        let Err(HubError::Checksum { failures, .. }) = check_digests(&snapshot) else { panic!("not seen") };
        let files: Vec<&str> = failures.iter().map(|failure| failure.file.as_str()).collect();
        assert_eq!(files, ["1_Pooling/config.json", "config.json"]);
    }

    #[test]
    fn globs_match_only_their_name() {
        assert_eq!(glob_literal("model-00001.safetensors"), "model-00001.safetensors");
        assert_eq!(glob_literal("a*[b]?.json"), "a[*][[]b[]][?].json");
    }
}
