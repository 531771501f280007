//! Files that are read again when they change: keys and certificates.
//!
//! Owns when the files are looked at and when a change counts, and that both happen on threads that may wait for a
//! disk. It never opens them: what is in a file, and what happens to a bad one, belongs to whoever watches it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::metrics::{Metrics, Reloaded};

/// What tells one content of a file from the next without reading it. The inode and the time of change see what
/// a preserved modification time hides: a renamed file, a switched link (as mounted secrets are).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    changed: (i64, i64),
    length: u64,
}

fn stamp(path: &Path) -> Option<Stamp> {
    let data = std::fs::metadata(path).ok()?;
    Some(Stamp { inode: data.ino(), changed: (data.ctime(), data.ctime_nsec()), length: data.len() })
}

/// Some files, and how they looked before they were first read.
#[derive(Debug)]
pub(crate) struct Watch {
    paths: Vec<PathBuf>,
    first: Vec<Option<Stamp>>,
}

impl Watch {
    /// To be called before the files are read: a change from now on is noticed.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let first = paths.iter().map(|path| stamp(path)).collect();
        Self { paths, first }
    }

    /// Whether there is nothing to watch.
    pub(crate) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Looks at the files `every` so often, and calls `reload` once for each change that has come to rest: two
    /// looks agree, so a file that is being written, or a pair of which one half is there, is left alone. Counts
    /// what `reload` says. Never returns.
    pub(crate) async fn run<E: std::fmt::Display + Send + 'static>(
        &self,
        what: Reloaded,
        every: Duration,
        metrics: &Metrics,
        reload: impl Fn() -> Result<(), E> + Send + Sync + 'static,
    ) {
        let reload = Arc::new(reload);
        let mut read = self.first.clone();
        let mut last = read.clone();
        loop {
            tokio::time::sleep(every).await;
            let paths = self.paths.clone();
            let looked = tokio::task::spawn_blocking(move || paths.iter().map(|path| stamp(path)).collect());
            let Ok(now): Result<Vec<_>, _> = looked.await else { continue };
            if now != read && now == last {
                read.clone_from(&now);
                let reload = reload.clone();
                let Ok(result) = tokio::task::spawn_blocking(move || reload()).await else { continue };
                let name = what.name();
                match &result {
                    Ok(()) => tracing::info!("{name} reloaded"),
                    Err(error) => tracing::error!(%error, "{name} not reloaded; the old ones stay"),
                }
                metrics.reloaded(what, result.is_ok());
            }
            last = now;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const EVERY: Duration = Duration::from_secs(2);

    #[tokio::test(start_paused = true)]
    async fn a_change_counts_once_it_rests_and_one_before_the_first_look_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let watch = Watch::new(vec![path.clone(), directory.path().join("missing")]);
        std::fs::write(&path, "three").unwrap();
        let (metrics, counted) = (Metrics::new(), Arc::new(AtomicU32::new(0)));
        let counter = counted.clone();
        let networks = std::thread::current().id();
        let reload = move || {
            assert_ne!(
                std::thread::current().id(),
                networks,
                "a file that hangs would hold up every connection"
            );
            if counter.fetch_add(1, Ordering::SeqCst) == 1 { Err("bad") } else { Ok(()) }
        };
        let calls = || counted.load(Ordering::SeqCst);
        let test = async {
            // Beside the watcher's looks, not at the same moments.
            tokio::time::sleep(EVERY / 2).await;
            tokio::time::sleep(EVERY).await;
            assert_eq!(calls(), 0, "seen for the first time");
            tokio::time::sleep(EVERY).await;
            assert_eq!(calls(), 1);
            tokio::time::sleep(EVERY * 10).await;
            assert_eq!(calls(), 1, "nothing changed");
            for text in ["a", "ab", "abc", "abcd"] {
                std::fs::write(&path, text).unwrap();
                tokio::time::sleep(EVERY).await;
                assert_eq!(calls(), 1, "still being written");
            }
            // The same length, and a name that now means another file.
            let other = directory.path().join("other");
            std::fs::write(&other, "abce").unwrap();
            std::fs::rename(&other, &path).unwrap();
            tokio::time::sleep(EVERY * 2).await;
            assert_eq!(calls(), 2);
            tokio::time::sleep(EVERY * 10).await;
            assert_eq!(calls(), 2, "a bad file is complained of once");
        };
        tokio::select! {
            () = watch.run(Reloaded::ApiKeys, EVERY, &metrics, reload) => unreachable!(),
            () = test => {}
        }
        assert_eq!(metrics.reloads(Reloaded::ApiKeys), [1, 1]);
        assert_eq!(metrics.reloads(Reloaded::Certificates), [0, 0]);
    }
}
