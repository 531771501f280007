//! What is checked and measured on a GPU besides the kernels' own tests: golden cases, matmul rates, steps against their
//! floors. `docs/gpu.md` says how it is run; `tests/gpu/suite.py` runs it and writes the tables.
//!
//! Prints a line of JSON for each result as soon as it is there, so that a device that dies takes one case with it.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program whose output is its result")]

mod suite;

use std::io::Write as _;
use std::process::ExitCode;

use suite::Options;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}\n{}", suite::USAGE);
            return ExitCode::from(2);
        }
    };
    let mut emit = |row: serde_json::Value| {
        println!("{row}");
        // Whoever reads wants each line when it is made; a reader that has gone is noticed at the next one.
        let _ = std::io::stdout().flush();
    };
    match suite::run(&options, &mut emit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
