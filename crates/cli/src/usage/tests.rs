//! The commands on a small ledger, through the command line.

use clap::Parser;
use mirai_ledger::store::Entry;
use mirai_ledger::{Finish, Hex, Row, UserKind, commitment};

use super::*;
use crate::args::{Cli, Command};

const NOW: &str = "2026-11-24T12:00:00Z";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// What must leave by `--with-user` only.
const CANARY: &str = "canary-pseudonym";

struct Bed {
    folder: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let bed = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::write(bed.path("keys"), format!("7 {SECRET}\n")).unwrap();
        std::fs::write(
            bed.path("prices.toml"),
            "currency = 'EUR'\n[[list]]\nversion = '2026-11'\nvalid_from = 2026-11-01\n[[list.model]]\n\
             name = 'demo'\ninput = 1\noutput = 2\n",
        )
        .unwrap();
        let key = ledger::chain_key(Some(&bed.path("keys"))).unwrap();
        let mut store = bed.url().parse::<Location>().unwrap().open(key).unwrap();
        let lease = std::time::Duration::from_secs(3600);
        let me = store.register("w", lease, true).unwrap();
        let row = |n: u64, at: &str, application: &str, state: State| Row {
            id: format!("R{n}"),
            queued_at: date::parse(at).unwrap(),
            application: application.into(),
            key_id: format!("{application}-1"),
            model: if n == 3 { "other".into() } else { "demo".into() },
            user: Some(CANARY.into()),
            user_salt: Some(Hex([3; 16])),
            user_commitment: Some(commitment(&Hex([3; 16]), CANARY)),
            user_anon: UserKind::Present,
            prompt_tokens: 1_000_000,
            completion_tokens: 500_000,
            energy_microjoules: 3_600_000_000_000,
            finish: if state == State::Open { Finish::None } else { Finish::Stop },
            state,
            ..Row::default()
        };
        let rows = [
            row(1, "2026-10-31T23:59:59Z", "mail", State::Closed),
            row(2, "2026-11-02T08:00:00Z", "mail", State::Closed),
            row(3, "2026-11-02T09:00:00Z", "search", State::Closed),
            row(4, "2026-11-24T11:00:00Z", "mail", State::Open),
        ];
        let entries: Vec<Entry> = rows.into_iter().map(|row| Entry { row, stored: false }).collect();
        store.commit(&me, lease, &entries).unwrap();
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn url(&self) -> String {
        format!("sqlite://{}", self.path("ledger.db").display())
    }

    /// What a command prints and what it has to say, with `{name}` for files of the bed.
    fn run(&self, line: &str) -> Result<(String, Notes), Failure> {
        let folder = format!("{}/", self.folder.path().display());
        let words = line.split_whitespace().map(|word| word.replace('@', &folder));
        let words: Vec<String> = ["mirai".to_owned(), "usage".to_owned()].into_iter().chain(words).collect();
        let cli = Cli::try_parse_from(words).map_err(Failure::usage)?;
        let Command::Usage(args) = cli.command else { panic!("not usage") };
        let (mut out, now) = (Vec::new(), date::parse(NOW).unwrap());
        let notes = match &args.command {
            None => report(&args.ledger, &args.report, now, &mut out),
            Some(UsageCommand::Rows(args)) => rows(args, &mut out),
            Some(UsageCommand::Anonymize(args)) => anonymize(args, now),
            Some(UsageCommand::Purge(args)) => purge(args, now),
            Some(UsageCommand::Verify(args)) => verified(args, &mut out),
            Some(UsageCommand::Registry) => registry(&mut out),
        }?;
        Ok((String::from_utf8(out).unwrap(), notes))
    }

    fn ledger(&self, line: &str) -> (String, Notes) {
        self.run(&format!("{line} --ledger {}", self.url()))
            .unwrap_or_else(|failure| panic!("{line}: {failure}"))
    }
}

#[test]
fn sums_of_this_month_by_default() {
    let bed = Bed::new();
    let (text, notes) = bed.ledger("");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..5], ["start", "end", "application", "model", "requests"]);
    assert_eq!(lines[1][..7], ["2026-11-02", "00:00", "2026-11-03", "00:00", "mail", "demo", "1"]);
    assert_eq!(lines[2][4..7], ["search", "other", "1"]);
    assert_eq!(lines[3][4..8], ["mail", "demo", "0", "1"]);
    assert_eq!(lines.len(), 4);
    assert_eq!(notes, ["1 requests still run and are in no sum"]);
}

#[test]
fn what_is_asked_for_is_what_comes() {
    let bed = Bed::new();
    let (text, _) = bed.ledger("--from 2026-10-01 --bucket all --group-by none --format csv --to 2026-11-24");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[1].starts_with("2026-10-01T00:00:00Z,2026-11-24T00:00:00Z,3,0,3000000,0,1500000,"));
    let (text, notes) = bed.ledger(
        "--from 2026-11-02T10:00:00+01:00 --to 2026-11-03 --group-by key,model --format json --prices @prices.toml",
    );
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["data"].as_array().unwrap().len(), 1);
    assert_eq!(
        (json["data"][0]["key_id"].as_str(), &json["data"][0]["cost"]),
        (Some("search-1"), &serde_json::Value::Null)
    );
    assert_eq!(notes, ["1 requests have no price"]);
    let (text, notes) = bed.ledger(
        "--model demo --format csv --prices @prices.toml --to 2026-11-20 --pue 1.5 --grid-factor 0.04",
    );
    // A kWh of the machine, and half as much for the site; a million tokens at 1 and half a million at 2.
    assert!(text.lines().nth(1).unwrap().ends_with(",1.5,0.06,2,EUR,0"), "{text}");
    assert!(notes.is_empty());
    let (text, _) = bed
        .ledger("--application mail --key mail-1 --bucket 1h --format csv --group-by application,price-list");
    assert!(text.contains("2026-11-02T08:00:00Z,2026-11-02T09:00:00Z,mail,,1,"), "{text}");
    let (text, _) = bed.ledger("--format focus --account ministry --prices @prices.toml");
    assert_eq!(text.lines().count(), 1 + 2 + 2);
}

#[test]
fn a_file_is_whole_or_not_there() {
    let bed = Bed::new();
    let (text, _) = bed.ledger("--format parquet --output @usage.parquet");
    assert_eq!(text, "");
    let file = std::fs::read(bed.path("usage.parquet")).unwrap();
    assert!(file.starts_with(b"PAR1") && file.ends_with(b"PAR1"));
    std::fs::write(bed.path("old.csv"), "old").unwrap();
    std::fs::create_dir(bed.path("old.csv.part")).unwrap();
    let failure = bed.run(&format!("--ledger {} --format csv --output @old.csv", bed.url())).unwrap_err();
    assert!(matches!(&failure, Failure::Run(text) if text.contains("old.csv")), "{failure}");
    assert_eq!(std::fs::read_to_string(bed.path("old.csv")).unwrap(), "old");
    let broken = to_file(Some(&bed.path("new")), &mut Vec::new(), |out| {
        out.write_all(b"half").map_err(Failure::run)?;
        Err::<(), _>(Failure::run("on purpose"))
    });
    assert!(broken.is_err() && !bed.path("new").exists() && !bed.path("new.part").exists());
}

#[test]
fn rows_have_no_user_unless_asked_for() {
    let bed = Bed::new();
    let (text, notes) = bed.ledger("rows --from 2026-11-01");
    assert_eq!((text.lines().count(), notes.len()), (2, 1));
    assert!(!text.contains(CANARY) && !text.contains("user_salt"));
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!((first["id"].as_str(), first["user_anon"].as_str()), (Some("R2"), Some("present")));
    let (text, _) = bed.ledger("rows --to 2026-11-01 --with-user --output @rows.jsonl");
    assert_eq!(text, "");
    let text = std::fs::read_to_string(bed.path("rows.jsonl")).unwrap();
    assert!(text.lines().count() == 1 && text.contains(CANARY) && !text.contains("user_salt"));
}

#[test]
fn people_are_forgotten_and_the_chain_holds() {
    let bed = Bed::new();
    let sound = "1 chains, 7 links, 4 requests of which 1 run; 0 were purged\nsound\n";
    assert_eq!(bed.ledger("verify --chain-key-file @keys"), (sound.into(), Vec::new()));
    assert_eq!(bed.ledger("verify").1, ["1 heads or purges whose signature was not checked"]);
    assert_eq!(bed.ledger("anonymize --before 2026-11-01").1, ["1 requests have no pseudonym any more"]);
    assert_eq!(bed.ledger("anonymize --before 2026-11-24").1, ["2 requests have no pseudonym any more"]);
    assert!(!bed.ledger("rows --with-user").0.contains(CANARY));
    assert_eq!(bed.ledger("verify --chain-key-file @keys").0, sound);
    let failure = bed.run(&format!("purge --before 2026-11-01 --ledger {}", bed.url())).unwrap_err();
    assert!(matches!(&failure, Failure::Usage(text) if text.contains("--chain-key-file")), "{failure}");
    let (_, notes) = bed.ledger("purge --before 2026-11-01 --chain-key-file @keys");
    assert_eq!(notes, ["1 requests and 2 links of chains were removed"]);
    let (text, _) = bed.ledger("verify --chain-key-file @keys");
    assert!(text.contains("3 requests of which 1 run; 1 were purged\nsound"), "{text}");
    // What somebody changes by hand is found, and named.
    let database = rusqlite::Connection::open(bed.path("ledger.db")).unwrap();
    database.execute("UPDATE mirai_request SET completion_tokens = 1 WHERE id = 'R2'", []).unwrap();
    drop(database);
    let failure = bed.run(&format!("verify --ledger {}", bed.url())).unwrap_err();
    assert!(matches!(&failure, Failure::Run(text) if text.ends_with("1 problems")), "{failure}");
}

#[test]
fn the_registry_names_every_field() {
    let bed = Bed::new();
    let fields: serde_json::Value = serde_json::from_str(&bed.run("registry").unwrap().0).unwrap();
    let user = fields.as_array().unwrap().iter().find(|field| field["name"] == "user").unwrap();
    assert_eq!((user["class"].as_str(), user["anonymise"].as_str()), (Some("personal"), Some("erase")));
}

#[test]
fn what_is_wrong_is_said_by_its_kind() {
    let bed = Bed::new();
    let url = bed.url();
    std::fs::write(bed.path("bad.toml"), "currency = 1").unwrap();
    for (line, words) in [
        ("--from 2026-11-01".to_owned(), "--ledger"),
        ("--ledger mysql://x".into(), "a store is"),
        (
            format!("--ledger {url} --from 2026-11-02 --to 2026-11-01"),
            "--from 2026-11-02T00:00:00Z is not before",
        ),
        (format!("--ledger {url} --from yesterday"), "expected a date"),
        (format!("--ledger {url} --from 1969-01-01"), "1970"),
        (format!("--ledger {url} --model {}", "m,".repeat(100) + "m"), "101 values"),
        (format!("--ledger {url} --pue 1.2"), "--grid-factor"),
        (format!("--ledger {url} --pue 0.2 --grid-factor 1"), "--pue must be"),
        (format!("--ledger {url} --prices @none.toml"), "none.toml"),
        (format!("--ledger {url} --prices @bad.toml"), "line 1"),
        (format!("anonymize --before 2026-11-25 --ledger {url}"), "has not come yet"),
        (format!("purge --before 2026-11-25 --ledger {url}"), "has not come yet"),
        (format!("--ledger {url} verify"), "cannot be used"),
    ] {
        match bed.run(&line) {
            Err(Failure::Usage(text)) => assert!(text.contains(words), "{line}: {text}"),
            Err(other) => panic!("{line}: {other}"),
            Ok(_) => panic!("{line}: taken"),
        }
    }
    let missing = bed.run("--ledger sqlite:/no/such/ledger.db").unwrap_err();
    assert!(matches!(missing, Failure::Environment(_)), "{missing}");
}
