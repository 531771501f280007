#![cfg_attr(test, allow(clippy::unwrap_used))]
//! `cargo xtask`: what a developer or CI runs, in one place and under one name.
//!
//! Owns the order of checks and their limits; it never contains a check's own logic beyond reading its report.

#![allow(clippy::print_stdout, reason = "a command-line tool talks to its user")]

mod ci;
mod coverage;
mod deploy;
mod emulation;
mod evidence;
mod full;
mod gpu_suite;
mod image;
mod kernels;
mod lint;
mod sbom;
mod shell;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Development tasks of mirai")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Format, lints, tests under coverage, ratchet, licences.
    Ci {
        /// Then the long versions, in a release build; writes `benches/results/full.md`.
        #[arg(long)]
        full: bool,
    },
    /// The long checks alone: all of them, which writes `benches/results/full.md`, or only those that are named.
    Full {
        /// Which; none means all.
        checks: Vec<full::Check>,
    },
    /// Print each crate's line coverage from a report of `cargo llvm-cov --json` and hold it to the ratchet.
    Coverage {
        /// The report.
        report: PathBuf,
        /// Write the measured values into the ratchet where they are higher.
        #[arg(long)]
        raise: bool,
    },
    /// Compile the CUDA kernels for every architecture, and write the fatbin that the binary embeds. Needs no GPU.
    Kernels {
        /// Accept registers, shared memory and parameters as they are now.
        #[arg(long)]
        update: bool,
        /// Write nothing.
        #[arg(long, conflicts_with = "update")]
        check: bool,
    },
    /// Run the CUDA kernels' tests on the host, plain and under sanitizers.
    CudaEmu {
        /// Then prove that they notice faults (long).
        #[arg(long)]
        faults: bool,
        /// Run the server's black-box suites on the emulated GPU instead (minutes). Needs `MIRAI_TEST_PYTHON`, a Python with
        /// the package `openai`.
        #[arg(long, conflicts_with_all = ["faults", "driver"])]
        server: bool,
        /// Run the CUDA backend's tests and a server on an emulated driver with AddressSanitizer instead, which watches what
        /// lies between the regions of device memory (long).
        #[arg(long, conflicts_with_all = ["faults", "driver", "server"])]
        watched: bool,
        /// Only build the emulated driver, cublasLt and NVML, in `target/cuda-emu/driver` (`-address`).
        #[arg(long, conflicts_with = "faults")]
        driver: bool,
        /// Build it with a sanitizer.
        #[arg(long, requires = "driver")]
        sanitize: Option<emulation::Sanitizer>,
    },
    /// Test what is deployed and how it is operated: all of it, or only the named parts. Builds the server first.
    Deploy {
        /// Which; none means all.
        parts: Vec<deploy::Part>,
        /// A test that cannot run here fails.
        #[arg(long)]
        strict: bool,
    },
    /// Build container images with buildah, into its store.
    Image(image::Options),
    /// Write a dated folder with what an audit asks for.
    Evidence(evidence::Options),
    /// Prepare `target/gpu-suite`, which is carried to a machine with a GPU and run there. Needs no GPU.
    GpuSuite,
    /// Make the golden checkpoints and log-probabilities anew with HF transformers.
    Golden {
        /// A Python with torch and transformers.
        #[arg(long, default_value = "python3")]
        python: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().task {
        Task::Ci { full } => ci::run().and_then(|()| if full { full::run(&[]) } else { Ok(()) }),
        Task::Full { checks } => full::run(&checks),
        Task::Coverage { report, raise } => coverage::check(&report, raise),
        Task::Kernels { update, check } => kernels::run(match (update, check) {
            (true, _) => kernels::Mode::Update,
            (_, true) => kernels::Mode::Check,
            _ => kernels::Mode::Build,
        }),
        Task::CudaEmu { driver: true, sanitize, .. } => emulation::build_driver(sanitize),
        Task::CudaEmu { watched: true, .. } => emulation::watched(),
        Task::CudaEmu { server: true, .. } => emulation::server(),
        Task::CudaEmu { faults, .. } => emulation::check()
            .and_then(|()| emulation::goldens())
            .and_then(|()| if faults { emulation::faults() } else { Ok(()) }),
        Task::Deploy { parts, strict } => deploy::run(&parts, strict),
        Task::Image(options) => image::run(&options),
        Task::Evidence(options) => evidence::run(&options),
        Task::GpuSuite => gpu_suite::run(),
        Task::Golden { python } => shell::run(&python.to_string_lossy(), &["crates/model/golden/make.py"]),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
