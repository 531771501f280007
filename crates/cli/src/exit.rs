//! Failures of the process, and the exit codes that tell them apart.

use std::fmt::Display;
use std::process::ExitCode;

use crate::config::ConfigError;

/// Why the process ends without having done what it was asked. Printed as one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line or the configuration is wrong.
    #[error("{0}")]
    Usage(String),
    /// The machine lacks something: a free port, a device, a reachable server.
    #[error("{0}")]
    Environment(String),
    /// The model's files are missing or wrong.
    #[error("{0}")]
    Model(String),
    /// The engine's device failed while serving, or a benchmark had failures.
    #[error("{0}")]
    Run(String),
}

impl Failure {
    pub(crate) fn usage(error: impl Display) -> Self {
        Self::Usage(error.to_string())
    }

    pub(crate) fn environment(error: impl Display) -> Self {
        Self::Environment(error.to_string())
    }

    pub(crate) fn model(error: impl Display) -> Self {
        Self::Model(error.to_string())
    }

    pub(crate) fn run(error: impl Display) -> Self {
        Self::Run(error.to_string())
    }

    const fn code(&self) -> u8 {
        match self {
            Self::Run(_) => 1,
            Self::Usage(_) => 2,
            Self::Environment(_) => 3,
            Self::Model(_) => 4,
        }
    }

    /// One line on standard error, and the code.
    #[allow(clippy::print_stderr, reason = "the last word of a command-line tool")]
    pub(crate) fn report(&self) -> ExitCode {
        eprintln!("mirai: {self}");
        ExitCode::from(self.code())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_published_ones() {
        assert_eq!(Failure::run("x").code(), 1);
        assert_eq!(Failure::usage("x").code(), 2);
        assert_eq!(Failure::environment("x").code(), 3);
        assert_eq!(Failure::model("x").code(), 4);
        assert_eq!(
            Failure::model("weights.safetensors: too short").to_string(),
            "weights.safetensors: too short"
        );
    }
}
