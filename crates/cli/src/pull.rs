//! `mirai pull`: a model into the local store.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mirai_hub::{ModelRef, PullProgress, StoreOptions};

use crate::args::PullArgs;
use crate::exit::Failure;

/// Least time between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &PullArgs) -> Result<(), Failure> {
    let reference = ModelRef::parse(&args.model).map_err(Failure::usage)?;
    let last = Mutex::new(None::<Instant>);
    let terminal = std::io::stderr().is_terminal();
    let progress = move |p: PullProgress| {
        let Ok(mut last) = last.lock() else { return };
        if last.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            *last = Some(Instant::now());
            report(&p, terminal);
        }
    };
    let model = mirai_hub::pull(&reference, &StoreOptions::from_env(), progress).map_err(|e| match e {
        mirai_hub::HubError::NotARepository { .. } => Failure::usage(e),
        mirai_hub::HubError::DownloadDisabled { .. }
        | mirai_hub::HubError::Download { .. }
        | mirai_hub::HubError::Offline { .. } => Failure::environment(e),
        _ => Failure::model(e),
    })?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", model.root.display()).map_err(Failure::run)
}

fn report(p: &PullProgress, terminal: bool) {
    let (line_start, line_end) = if terminal { ("\r\x1b[2K", "") } else { ("", "\n") };
    let file = p.file.as_deref().unwrap_or("all files");
    let mib = |bytes: u64| bytes >> 20;
    let total = if p.bytes_total == 0 { String::new() } else { format!(" of {}", mib(p.bytes_total)) };
    // Progress is a courtesy: a closed standard error must not end the download.
    let _ = write!(std::io::stderr(), "{line_start}{file}: {}{total} MiB{line_end}", mib(p.bytes_done));
}
