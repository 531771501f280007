//! `mirai bench`: the load generator on the command line.

use std::io::Write;

use mirai_bench::{BenchError, BenchOptions, Progress};

use crate::exit::Failure;

/// Runs one benchmark and prints its table; requests that failed make the command fail.
pub(crate) fn run(options: BenchOptions) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::environment(format!("cannot start the runtime: {e}")))?;
    let report = runtime.block_on(mirai_bench::run(options, Progress::stderr())).map_err(|e| match e {
        BenchError::BadOption { .. } | BenchError::BadData { .. } => Failure::usage(e),
        BenchError::Io { .. } | BenchError::Server { .. } => Failure::environment(e),
        other => Failure::run(other),
    })?;
    let mut out = std::io::stdout().lock();
    report.write_table(&mut out).and_then(|()| out.flush()).map_err(Failure::run)?;
    match report.failed() {
        0 => Ok(()),
        failed => Err(Failure::run(format!("{failed} requests failed"))),
    }
}
