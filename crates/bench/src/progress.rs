//! Progress of a run on standard error, where that is a terminal.

use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far a run is. Shared by all tasks of a run.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    tokens: AtomicU64,
    failed: AtomicU64,
}

impl Progress {
    /// Shows nothing.
    pub fn hidden() -> Self {
        Self::with(ProgressBar::hidden())
    }

    /// A bar on standard error; nothing where that is not a terminal.
    pub fn stderr() -> Self {
        Self::with(ProgressBar::no_length())
    }

    fn with(bar: ProgressBar) -> Self {
        Self { bar, tokens: AtomicU64::new(0), failed: AtomicU64::new(0) }
    }

    pub(crate) fn begin(&self, what: &'static str, total: usize) {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {elapsed} {msg}");
        self.bar.set_style(style.expect("the template is a constant"));
        self.bar.set_prefix(what);
        self.bar.reset();
        self.bar.set_length(total as u64);
        self.tokens.store(0, Ordering::Relaxed);
        self.failed.store(0, Ordering::Relaxed);
    }

    /// One request is over; `tokens` is `None` where it failed.
    pub(crate) fn finished_one(&self, tokens: Option<u64>) {
        let all = self.tokens.fetch_add(tokens.unwrap_or(0), Ordering::Relaxed) + tokens.unwrap_or(0);
        let failed = self.failed.fetch_add(u64::from(tokens.is_none()), Ordering::Relaxed)
            + u64::from(tokens.is_none());
        self.bar.inc(1);
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("{all} tokens, {failed} failed"));
        }
    }

    pub(crate) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        for progress in [Progress::hidden(), Progress::stderr()] {
            progress.begin("test", 3);
            progress.finished_one(Some(5));
            progress.finished_one(None);
            progress.finished_one(Some(7));
            assert_eq!(progress.bar.position(), 3);
            assert_eq!(progress.tokens.load(Ordering::Relaxed), 12);
            assert_eq!(progress.failed.load(Ordering::Relaxed), 1);
            progress.begin("again", 2);
            assert_eq!(progress.bar.position(), 0);
            progress.end();
        }
    }
}
