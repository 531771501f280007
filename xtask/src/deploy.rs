//! `cargo xtask deploy`: all that is known of installing and operating, tested: chart, policies, dashboards, alerts,
//! the image's root, upgrades, the conformity matrix. The tests are `tests/deploy`; this only finds what they need.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::emulation;
use crate::shell::{self, root};

/// One file of tests: `tests/deploy/test_NAME.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// The chart lints, renders, validates, repeats itself, sets every option of the server.
    Chart,
    /// The clusters' rules, and every manifest by them.
    Policy,
    /// Every alert fires and keeps silent where it should.
    Rules,
    /// Panels and rules against a real Prometheus and real servers.
    Monitoring,
    /// The image's root file system.
    Image,
    /// Upgrades behind a real proxy.
    Rolling,
    /// The conformity matrix.
    Conformity,
}

const ALL: [Part; 7] =
    [Part::Chart, Part::Policy, Part::Rules, Part::Monitoring, Part::Image, Part::Rolling, Part::Conformity];

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Chart => "chart",
            Self::Policy => "policy",
            Self::Rules => "rules",
            Self::Monitoring => "monitoring",
            Self::Image => "image",
            Self::Rolling => "rolling",
            Self::Conformity => "conformity",
        }
    }

    fn needs_server(self) -> bool {
        matches!(self, Self::Chart | Self::Monitoring | Self::Image | Self::Rolling)
    }
}

/// What the tests saw, one object a test.
pub(crate) fn report() -> PathBuf {
    root().join("target/deploy/report.json")
}

/// Runs the named parts, or all, on a server that is built here.
pub(crate) fn run(parts: &[Part], strict: bool) -> Result<()> {
    let parts = if parts.is_empty() { &ALL } else { parts };
    if parts.iter().any(|p| p.needs_server()) {
        // The whole workspace, because a selection would build heavy dependencies anew with other features.
        shell::run("cargo", &["build", "--workspace"])?;
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    run_on(&target.join("debug/mirai"), parts, strict)
}

/// As [`run`] without building: on this binary.
pub(crate) fn run_on(server: &Path, parts: &[Part], strict: bool) -> Result<()> {
    let parts = if parts.is_empty() { &ALL } else { parts };
    if parts.contains(&Part::Monitoring) {
        // So that the panels of GPUs are tested without one.
        emulation::build_driver(None)?;
    }
    shell::run_command(tests(server, parts, strict))
}

fn tests(server: &Path, parts: &[Part], strict: bool) -> Command {
    let mut command = shell::command(&python(), &["tests/deploy/run.py"]);
    command.arg("--report").arg(report());
    if strict {
        command.arg("--strict");
    }
    command.args(parts.iter().map(|p| p.name()));
    command.env("MIRAI_TEST_BINARY", server);
    with_helm(&mut command);
    command
}

/// Names the Helm that `.ci/run` installs, unless the environment names another.
pub(crate) fn with_helm(command: &mut Command) {
    let helm = root().join("target/tools/node_modules/.bin/helm");
    if std::env::var_os("MIRAI_TEST_HELM").is_none() && helm.exists() {
        command.env("MIRAI_TEST_HELM", helm);
    }
}

/// The Python that has the tests' packages: as the environment says, or the checkout's own, or the system's.
pub(crate) fn python() -> String {
    let own = root().join(".venv/bin/python");
    std::env::var("MIRAI_TEST_PYTHON").unwrap_or_else(|_| {
        if own.exists() { own.to_string_lossy().into_owned() } else { "python3".to_owned() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_a_file_and_each_file_a_part() {
        let folder = root().join("tests/deploy");
        let names = std::fs::read_dir(folder).unwrap().filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_prefix("test_").and_then(|n| n.strip_suffix(".py")).map(str::to_owned)
        });
        let mut names: Vec<String> = names.collect();
        names.sort();
        let mut parts = ALL.map(Part::name);
        parts.sort_unstable();
        assert_eq!(names, parts);
    }

    #[test]
    fn the_tests_get_the_server_and_their_parts() {
        let command = tests(Path::new("/somewhere/mirai"), &[Part::Policy, Part::Rolling], true);
        let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        assert_eq!(words[0], "tests/deploy/run.py");
        assert_eq!(words[3..], ["--strict", "policy", "rolling"]);
        let server = command.get_envs().find(|(name, _)| *name == "MIRAI_TEST_BINARY").unwrap().1;
        assert_eq!(server.unwrap(), "/somewhere/mirai");
        assert!(Part::Chart.needs_server() && !Part::Policy.needs_server());
    }
}
