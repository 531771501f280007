//! Files that are read again when they change: keys and certificates.
//!
//! Owns when the files are looked at, when a change counts, and on which threads that happens. It never opens
//! them: what is in a file, and what happens to a bad one, belongs to whoever watches it.

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
    paths: Arc<[PathBuf]>,
    first: Vec<Option<Stamp>>,
}

impl Watch {
    /// To be called before the files are read: a change from now on is noticed. Blocks while it looks.
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        let first = stamps(&paths);
        Self { paths: paths.into(), first }
    }

    /// Looks at the files `every` so often, and calls `read` once for each change that has come to rest: two
    /// looks agree, so a file that is being written, or a pair of which one half is there, is left alone. Gives
    /// `take` what was read, and counts. Looks and reads on threads that may block: a file system that hangs
    /// holds up no request. Never returns.
    pub(crate) async fn run<T, E>(
        &self,
        what: Reloaded,
        every: Duration,
        metrics: &Metrics,
        read: impl Fn() -> Result<T, E> + Send + Sync + 'static,
        mut take: impl FnMut(T),
    ) where
        T: Send + 'static,
        E: std::fmt::Display + Send + 'static,
    {
        let (read, name) = (Arc::new(read), what.name());
        let mut taken = self.first.clone();
        let mut last = taken.clone();
        loop {
            tokio::time::sleep(every).await;
            let paths = self.paths.clone();
            let Ok(now) = tokio::task::spawn_blocking(move || stamps(&paths)).await else { continue };
            if now != taken && now == last {
                taken.clone_from(&now);
                let read = read.clone();
                let result = tokio::task::spawn_blocking(move || read()).await;
                match result.map_err(|e| e.to_string()).and_then(|r| r.map_err(|e| e.to_string())) {
                    Ok(value) => {
                        take(value);
                        metrics.reloaded(what, true);
                        tracing::info!("{name} reloaded");
                    }
                    Err(error) => {
                        metrics.reloaded(what, false);
                        tracing::error!(%error, "{name} not reloaded; the old ones stay");
                    }
                }
            }
            last = now;
        }
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    paths.iter().map(|path| stamp(path)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread::ThreadId;

    use super::*;

    const EVERY: Duration = Duration::from_secs(2);

    #[tokio::test(start_paused = true)]
    async fn a_change_counts_once_it_rests_and_one_before_the_first_look_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let watch = Watch::new(vec![path.clone(), directory.path().join("missing")]);
        std::fs::write(&path, "three").unwrap();
        let metrics = Metrics::new();
        let reads = Arc::new(AtomicU32::new(0));
        let threads = Mutex::new(Vec::<ThreadId>::new());
        let read = {
            let reads = reads.clone();
            move || {
                let number = reads.fetch_add(1, Ordering::SeqCst) + 1;
                if number == 2 { Err("bad") } else { Ok(std::thread::current().id()) }
            }
        };
        let calls = || reads.load(Ordering::SeqCst);
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
            () = watch.run(Reloaded::ApiKeys, EVERY, &metrics, read, |id| threads.lock().unwrap().push(id)) => {
                unreachable!()
            }
            () = test => {}
        }
        assert_eq!(metrics.reloads(Reloaded::ApiKeys), [1, 1]);
        assert_eq!(metrics.reloads(Reloaded::Certificates), [0, 0]);
        // Only what was read well is taken, and it was read where waiting holds up nobody.
        let threads = threads.into_inner().unwrap();
        assert_eq!(threads.len(), 1);
        assert_ne!(threads[0], std::thread::current().id());
    }
}
