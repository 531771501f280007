//! Two versions of the schema, and the file itself.

use super::*;
use crate::error::StoreError;
use crate::row::{Class, FIELDS};
use crate::store::schema::{MIGRATIONS, Migration};
use crate::value::Value;

fn next_statements() -> Vec<String> {
    vec!["ALTER TABLE mirai_request ADD COLUMN tool_calls BIGINT NOT NULL DEFAULT 0".into()]
}

/// What the next release might add.
fn next(needs: u32) -> Vec<Migration> {
    let mut all = MIGRATIONS.to_vec();
    all.push(Migration { version: newest() + 1, needs, statements: next_statements });
    all
}

#[test]
fn two_versions_run_side_by_side() {
    two_versions(&SqliteFile::new());
}

pub(super) fn two_versions(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("old", LEASE, false).unwrap();
    store.commit(&me, LEASE, &[new(request(1))]).unwrap();
    // The new one upgrades under the old one's feet; twice is once.
    let mut newer = db.connect();
    newer.migrate(&next(1)).unwrap();
    newer.migrate(&next(1)).unwrap();
    assert_eq!(newer.schema().unwrap(), 2);
    store.commit(&me, LEASE, &[old(closed(&request(1), 5)), new(request(2))]).unwrap();
    // An old one that starts later leaves it as it is.
    let mut later = db.connect();
    assert_eq!(later.schema().unwrap(), 2);
    let other = later.register("later", LEASE, false).unwrap();
    later.commit(&other, LEASE, &[new(request(3))]).unwrap();
    // A row with a word and a version that the old one does not know is read, counted, and let be.
    let change = "UPDATE mirai_request SET schema_version = 2, tool_calls = 1, finish = 'tool_calls', \
                  state = 'closed' WHERE id = 'R000003'";
    newer.sql.execute(change, &[]).unwrap();
    assert_eq!(later.row("R000003").unwrap().unwrap().finish.as_str(), "tool_calls");
    let report = verify(&mut later, None).unwrap();
    assert_eq!(report.newer, 1);
}

#[test]
fn a_schema_that_needs_a_newer_build_is_refused() {
    let db = SqliteFile::new();
    db.connect().migrate(&next(newest() + 1)).unwrap();
    let options = SqliteOptions { exclusive: false, ..SqliteOptions::default() };
    let refused = StoreError::Newer { found: newest() + 1, needs: newest() + 1, ours: newest() };
    assert_eq!(SqlStore::open(&db.path(), None, &options).unwrap_err(), refused);
    assert_eq!(SqlStore::open_reading(&db.path()).unwrap_err(), refused);
    assert!(refused.to_string().contains(&format!("this build is {}", newest())));
}

/// The first release on a database that this one has brought up to date: it finds all it knows as it was.
#[test]
fn the_first_release_runs_beside_this_one() {
    let db = SqliteFile::new();
    let connection = rusqlite::Connection::open(db.path()).unwrap();
    connection.execute_batch(include_str!("../../../tests/golden/ledger-v1.sql")).unwrap();
    let first = &MIGRATIONS[..1];
    let mut old = SqlStore::reading(Sqlite::new(connection, 64, None).unwrap()).unwrap();
    assert_eq!(old.check_schema(first, false).unwrap(), 1);
    let mut ours = db.connect();
    assert_eq!(ours.schema_version(false).unwrap(), (newest(), 1));
    old.migrate(first).unwrap();
    assert_eq!(old.check_schema(first, false).unwrap(), newest(), "and it may go on");
    let me = old.register("old", LEASE, false).unwrap();
    old.commit(&me, LEASE, &[new(request(9))]).unwrap();
    sound(&mut ours);
}

/// A database as the first release wrote it, as SQL text: today's build reads it, verifies it and goes on.
#[test]
fn a_database_of_the_first_release_is_read() {
    let db = SqliteFile::new();
    let connection = rusqlite::Connection::open(db.path()).unwrap();
    connection.execute_batch(include_str!("../../../tests/golden/ledger-v1.sql")).unwrap();
    drop(connection);
    let mut store = db.connect();
    let report = sound(&mut store);
    assert_eq!((report.rows, report.open, report.links, report.unsigned), (3, 1, 5, 0));
    let rows = store.rows("", 10).unwrap();
    let golden: Vec<Row> = include_str!("../../../tests/golden/rows-v1.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows, golden);
    let me = store.register("golden", LEASE, true).unwrap();
    assert_eq!((me.epoch, store.recover(&me, 10).unwrap().rows), (2, 1));
    sound(&mut store);
}

/// What a later release may write, in JSON: unknown fields and words are no error, absent fields have defaults.
#[test]
fn rows_of_other_releases_are_read() {
    let golden = include_str!("../../../tests/golden/rows-next.jsonl");
    let rows: Vec<Row> = golden.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((rows[0].schema_version, rows[0].finish.as_str()), (2, "tool_calls"));
    assert_eq!(rows[0].completion_tokens, 12);
    assert_eq!((rows[1].attempt, rows[1].completion_tokens, rows[1].user.as_deref()), (1, 0, None));
}

/// Rewrites the golden files of this release: `LEDGER_GOLDEN=1 cargo test -p mirai-ledger golden_files`.
#[test]
fn golden_files_are_what_this_release_writes() {
    let db = SqliteFile::new();
    let mut store = db.connect();
    let me = store.register("golden", LEASE, false).unwrap();
    let rows: Vec<Row> = (0..3).map(request).collect();
    store.commit(&me, LEASE, &[new(closed(&rows[0], 12)), new(tokens(&rows[1], 8))]).unwrap();
    store.commit(&me, LEASE, &[new(closed(&rows[2], 3))]).unwrap();
    let mut json = String::new();
    for row in store.rows("", 10).unwrap() {
        json.push_str(&serde_json::to_string(&row).unwrap());
        json.push('\n');
    }
    store.sql.execute("UPDATE mirai_writer SET lease_until = 0, started_at = 0", &[]).unwrap();
    let dump = dump(&mut store);
    // The schema has moved on since the first release; what is in a row has not.
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/");
    if std::env::var_os("LEDGER_GOLDEN").is_some() {
        std::fs::write(format!("{folder}rows-v1.jsonl"), &json).unwrap();
        std::fs::write(format!("{folder}ledger-v3.sql"), &dump).unwrap();
    }
    assert_eq!(json, include_str!("../../../tests/golden/rows-v1.jsonl"));
    let golden = std::fs::read_to_string(format!("{folder}ledger-v3.sql")).unwrap();
    assert_eq!(dump, golden);
}

fn dump(store: &mut SqlStore<Sqlite>) -> String {
    let mut out = String::new();
    let schema = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY type DESC, name";
    let tables = store.sql.query(schema, &[]).unwrap();
    for table in &tables {
        let [Value::Text(name), Value::Text(sql)] = &table[..] else { unreachable!() };
        out.push_str(&format!("{sql};\n"));
        if !sql.starts_with("CREATE TABLE") {
            continue;
        }
        for row in store.sql.query(&format!("SELECT * FROM {name} ORDER BY 1, 2, 3"), &[]).unwrap() {
            let values: Vec<String> = row
                .iter()
                .map(|value| match value {
                    Value::Null => "NULL".into(),
                    Value::Int(n) => n.to_string(),
                    Value::Text(text) => format!("'{text}'"),
                    Value::Bytes(b) => {
                        format!("x'{}'", b.iter().map(|b| format!("{b:02x}")).collect::<String>())
                    }
                })
                .collect();
            out.push_str(&format!("INSERT INTO {name} VALUES ({});\n", values.join(", ")));
        }
    }
    out
}

#[test]
fn columns_are_the_registry() {
    let mut store = SqliteFile::new().connect();
    let columns = store.sql.query("SELECT name FROM pragma_table_info('mirai_request')", &[]).unwrap();
    let names: Vec<String> =
        columns.into_iter().flatten().map(|v| String::from_utf8(text_of(v)).unwrap()).collect();
    let mut expected: Vec<&str> = FIELDS.iter().map(|field| field.name).collect();
    expected.push("digest");
    assert_eq!(names, expected);
    assert!(FIELDS.iter().any(|field| field.class == Class::Personal));
}

fn text_of(value: Value) -> Vec<u8> {
    match value {
        Value::Text(text) => text.into_bytes(),
        _ => unreachable!("a name is a text"),
    }
}

#[test]
fn one_process_writes_and_others_read() {
    let db = SqliteFile::new();
    let options = SqliteOptions::default();
    let mut store = SqlStore::open(&db.path(), Some(key()), &options).unwrap();
    assert_eq!(SqlStore::open(&db.path(), None, &options).unwrap_err(), StoreError::Locked(db.path()),);
    let me = store.register("a", LEASE, false).unwrap();
    store.commit(&me, LEASE, &[new(request(1))]).unwrap();
    let mut reader = SqlStore::open_reading(&db.path()).unwrap();
    assert_eq!(reader.count().unwrap(), 1);
    assert!(matches!(reader.register("r", LEASE, false), Err(StoreError::Broken(_))));
    sound(&mut reader);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(db.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "{mode:o}");
    drop(store);
    SqlStore::open(&db.path(), None, &options).unwrap();
    let missing = db.folder.path().join("no/such/folder/ledger.db");
    assert!(matches!(SqlStore::open(&missing, None, &options), Err(StoreError::Unavailable(_))));
    assert!(SqlStore::open_reading(&missing).is_err());
}

#[test]
fn a_busy_database_is_unavailable_and_a_broken_one_is_broken() {
    let db = SqliteFile::new();
    let (mut one, mut two) = (db.connect(), db.connect());
    let me = two.register("a", LEASE, false).unwrap();
    two.sql.connection().busy_timeout(Duration::ZERO).unwrap();
    one.sql.begin(true).unwrap();
    assert!(two.heartbeat(&me, LEASE).unwrap_err().is_unavailable());
    one.sql.rollback();
    two.heartbeat(&me, LEASE).unwrap();
    // A full disk: nothing of the transaction stays, and it may be asked again.
    two.sql.connection().execute_batch("PRAGMA max_page_count = 1").unwrap();
    let many: Vec<Entry> = (0..200).map(|n| new(request(n))).collect();
    assert!(two.commit(&me, LEASE, &many).unwrap_err().is_unavailable());
    assert_eq!(two.count().unwrap(), 0);
    two.sql.connection().execute_batch("PRAGMA max_page_count = 100000").unwrap();
    assert_eq!(two.commit(&me, LEASE, &many).unwrap().inserted, 200);
    sound(&mut two);
    std::fs::write(db.folder.path().join("text"), "this is no database, and long enough to tell").unwrap();
    let options = SqliteOptions::default();
    let refused = SqlStore::open(&db.folder.path().join("text"), None, &options);
    assert!(matches!(refused, Err(StoreError::Broken(_))));
}

/// Erased means erased: no byte of a pseudonym stays in the file or its log.
#[test]
fn erased_pseudonyms_leave_the_disk() {
    let db = SqliteFile::new();
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let row = Row { user: Some("canary-7f3a".into()), user_commitment: None, user_salt: None, ..request(1) };
    store.commit(&me, LEASE, &[new(closed(&row, 1))]).unwrap();
    let on_disk = || {
        let files = std::fs::read_dir(db.folder.path()).unwrap();
        files.flatten().any(|file| {
            let bytes = std::fs::read(file.path()).unwrap();
            bytes.windows(11).any(|window| window == b"canary-7f3a")
        })
    };
    assert!(on_disk());
    store.anonymize(i64::MAX, 10).unwrap();
    assert!(!on_disk());
}
