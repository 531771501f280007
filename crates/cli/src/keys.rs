//! `mirai keys`: keys of applications.
//!
//! Owns what is printed: the key on standard output, once, and the stanza that may be committed. Nothing is kept.

use std::io::{Read, Write};
use std::path::Path;

use mirai_ledger::identity::{NewKey, Pepper};
use mirai_ledger::secret::parse_versions;

use crate::args::KeysCommand;
use crate::exit::Failure;

/// Most bytes of a file of secrets.
const MAX_FILE: u64 = 64 << 10;

pub(crate) fn run(command: &KeysCommand) -> Result<(), Failure> {
    let KeysCommand::New { id, pepper_file } = command;
    let made = make(id, pepper_file)?;
    let NewKey { key, stanza } = made;
    let mut out = std::io::stdout().lock();
    writeln!(out, "# The key, shown only here; give it to the application's team:\n{key}\n")
        .map_err(Failure::run)?;
    write!(out, "# The stanza, for the application in the file of applications:\n{stanza}")
        .map_err(Failure::run)
}

fn make(id: &str, pepper_file: &Path) -> Result<NewKey, Failure> {
    let fail = |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", pepper_file.display()));
    let mut text = String::new();
    let file = std::fs::File::open(pepper_file).map_err(|error| fail(&error))?;
    file.take(MAX_FILE).read_to_string(&mut text).map_err(|error| fail(&error))?;
    let newest = parse_versions(&text).map_err(|error| fail(&error))?.swap_remove(0);
    let pepper = Pepper::new(newest.0, &newest.1).map_err(|error| fail(&error))?;
    NewKey::new(id, &pepper).ok_or_else(|| Failure::usage("--id must be 1 to 64 of a-z, 0-9, '-', '_', '.'"))
}

#[cfg(test)]
mod tests {
    use mirai_ledger::identity::Applications;

    use super::*;

    #[test]
    fn a_made_key_is_one_that_the_file_lets_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pepper");
        let secret = "s3cret".repeat(6);
        std::fs::write(&path, format!("1 {}\n2 {secret}\n", "x".repeat(32))).unwrap();
        let made = make("team-a", &path).unwrap();
        let file = format!("[[application]]\nname = \"a\"\n{}", made.stanza);
        let applications = Applications::parse(&file).unwrap();
        let pepper = Pepper::new(2, secret.as_bytes()).unwrap();
        let caller = applications.caller(&made.key, &[pepper]).unwrap();
        assert_eq!((&*caller.key_id, caller.key_version), ("team-a", 2), "the highest version makes");
        assert!(!made.stanza.contains(&made.key));
        let message = |id: &str| make(id, &path).unwrap_err().to_string();
        assert!(message("Team").contains("--id must be"));
        std::fs::write(&path, "2 s3cret").unwrap();
        assert!(message("team").contains("pepper: line 1") && !message("team").contains("s3cret"));
        std::fs::remove_file(&path).unwrap();
        assert!(message("team").contains("pepper: "));
    }
}
