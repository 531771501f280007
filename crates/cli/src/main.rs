//! The binary `mirai`.
//!
//! Owns wiring: flags to configuration, configuration to crates, failures to exit codes. Never logic of its own.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod args;
mod bench;
mod config;
mod demo;
mod device;
mod exit;
#[cfg(feature = "test-hooks")]
mod hooks;
mod keys;
mod ledger;
mod load;
mod logging;
mod prices;
mod pull;
mod quotas;
mod serve;
mod task;
mod telemetry;
mod tokenizer;
mod usage;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    // clap ends with 0 after --help and --version, and with 2 on a wrong command line.
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Bench(options) => bench::run(*options),
        Command::CheckConfig(args) => serve::check_config(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Usage(args) => usage::run(&args),
        Command::Keys(args) => keys::run(&args.command),
        Command::Verify(args) => verify::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
