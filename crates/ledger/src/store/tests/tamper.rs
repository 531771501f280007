//! What an auditor must notice.

use super::*;
use crate::store::sql::{int, text};
use crate::value::Value;
use crate::verify::Problem;

/// Two writers' runs, an open row, a recovered one, closed ones and a purged one.
fn ledger() -> (SqliteFile, SqlStore<Sqlite>) {
    let db = SqliteFile::new();
    let mut store = db.connect();
    let dead = store.register("a", LEASE, false).unwrap();
    let rows: Vec<Row> = (0..5).map(request).collect();
    store.commit(&dead, LEASE, &[new(closed(&rows[0], 3))]).unwrap();
    store.commit(&dead, LEASE, &[new(tokens(&rows[1], 3))]).unwrap();
    let me = store.register("a", LEASE, true).unwrap();
    store.recover(&me, 9).unwrap();
    store.commit(&me, LEASE, &[new(closed(&rows[2], 3)), new(rows[3].clone())]).unwrap();
    store.commit(&me, LEASE, &[new(closed(&rows[4], 8))]).unwrap();
    store.purge(1004, 2).unwrap();
    let report = sound(&mut store);
    assert_eq!((report.rows, report.purged, report.open), (4, 1, 1));
    (db, store)
}

fn problems(sql: &str) -> Vec<Problem> {
    let (_db, mut store) = ledger();
    assert!(store.sql.execute(sql, &[]).unwrap() > 0, "{sql}");
    let report = verify(&mut store, Some(&key())).unwrap();
    assert_eq!(report.problem_count, report.problems.len() as u64);
    report.problems
}

#[test]
fn every_change_of_a_row_is_noticed() {
    use crate::row::{FIELDS, Settled};
    for field in FIELDS {
        let change = match (field.name, field.sql) {
            ("id", _) => "id || 'x'".to_owned(),
            (name, sql) if sql.starts_with("BIGINT") => format!("COALESCE(\"{name}\", 0) + 1"),
            (_, sql) if sql.starts_with("TEXT") => "'altered'".to_owned(),
            ("user_salt", _) => "zeroblob(16)".to_owned(),
            _ => "zeroblob(32)".to_owned(),
        };
        for id in ["R000001", "R000002", "R000003"] {
            let sql = format!("UPDATE mirai_request SET \"{}\" = {change} WHERE id = '{id}'", field.name);
            assert!(!problems(&sql).is_empty(), "{sql}");
        }
        // Erasing is allowed where the registry says so, and only there.
        if field.settled == Settled::Erasable {
            let sql = "UPDATE mirai_request SET \"user\" = NULL, user_salt = NULL WHERE id = 'R000002'";
            assert_eq!(problems(sql), []);
        }
    }
}

#[test]
fn every_change_of_a_chain_is_noticed() {
    let chain = Epoch { writer: "a".into(), epoch: 2 };
    let missing = |seq, id: &str| Problem::MissingRow { chain: chain.clone(), seq, id: id.into() };
    assert_eq!(problems("DELETE FROM mirai_request WHERE id = 'R000003'"), [missing(3, "R000003")]);
    let gap = problems("DELETE FROM mirai_link WHERE epoch = 2 AND seq = 3");
    assert!(gap.contains(&Problem::Gap { chain: chain.clone(), expected: 3, found: 4 }), "{gap:?}");
    assert!(gap.contains(&Problem::UnknownRows(1)));
    let end = problems("DELETE FROM mirai_link WHERE epoch = 2 AND seq = 5");
    assert!(end.contains(&Problem::Head { chain: chain.clone(), expected: 5, found: 4 }), "{end:?}");
    for change in ["kind = 'recover'", "id = 'R000009'", "digest = zeroblob(32)", "head = zeroblob(32)"] {
        let found = problems(&format!("UPDATE mirai_link SET {change} WHERE epoch = 2 AND seq = 3"));
        assert!(found.contains(&Problem::Hash { chain: chain.clone(), seq: 3 }), "{change}: {found:?}");
    }
    for change in ["seq = seq + 1", "head = zeroblob(32)", "mac = zeroblob(32)"] {
        let found = problems(&format!("UPDATE mirai_writer SET {change} WHERE epoch = 2"));
        let what = "head";
        assert!(found.contains(&Problem::Signature { chain: chain.clone(), what }), "{change}: {found:?}");
        assert!(!problems(&format!("UPDATE mirai_purge SET {change}")).is_empty(), "{change}");
    }
    let found = problems("DELETE FROM mirai_writer WHERE epoch = 1");
    assert!(found.contains(&Problem::MissingEpoch { writer: "a".into(), epoch: 1 }), "{found:?}");
    assert!(!problems("DELETE FROM mirai_purge").is_empty());
    assert!(!problems("UPDATE mirai_request SET digest = zeroblob(32) WHERE id = 'R000003'").is_empty());
    let late = "UPDATE mirai_request SET schema_version = 9 WHERE id = 'R000002'";
    assert!(problems(late).iter().any(|p| p.to_string().contains("never saw")));
}

#[test]
fn a_row_slipped_in_is_noticed() {
    let (_db, mut store) = ledger();
    let row = closed(&request(8), 1);
    let mut values = row.values();
    values.push(Value::Bytes(crate::chain::content_digest(&row).0.to_vec()));
    let insert = store.words.insert.clone();
    store.sql.execute(&insert, &values).unwrap();
    assert_eq!(verify(&mut store, None).unwrap().problems, [Problem::UnknownRows(1)]);
}

#[test]
fn what_cannot_be_read_is_a_problem_and_the_list_is_bounded() {
    let found = problems("UPDATE mirai_request SET duration = -1 WHERE id = 'R000003'");
    assert!(found.iter().any(|p| matches!(p, Problem::Unreadable { .. })), "{found:?}");
    let db = SqliteFile::new();
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let entries: Vec<Entry> = (0..600).map(|n| new(closed(&request(n), 1))).collect();
    store.commit(&me, LEASE, &entries).unwrap();
    assert_eq!(sound(&mut store).links, 1200, "more than one page");
    store.sql.execute("UPDATE mirai_request SET model = 'x'", &[]).unwrap();
    let report = verify(&mut store, None).unwrap();
    assert_eq!((report.problems.len(), report.problem_count, report.unsigned), (100, 1200, 1));
}

#[test]
fn who_lacks_the_key_cannot_make_a_head() {
    let (_db, mut store) = ledger();
    let stranger = ChainKey::new(1, &[8; 32]).unwrap();
    let chain = Epoch { writer: "a".into(), epoch: 2 };
    let head = store.chains().unwrap().pop().unwrap();
    let mac = stranger.sign(&chain, head.seq, head.head);
    let sql = "UPDATE mirai_writer SET mac = $1 WHERE writer = $2 AND epoch = $3";
    let values = [Value::Bytes(mac.0.to_vec()), text("a"), int(2)];
    store.sql.execute(sql, &values).unwrap();
    let report = verify(&mut store, Some(&key())).unwrap();
    assert_eq!(report.problems, [Problem::Signature { chain, what: "head" }]);
    // A key of another version proves nothing either way.
    let later = ChainKey::new(2, &[8; 32]).unwrap();
    let report = verify(&mut store, Some(&later)).unwrap();
    assert!(report.is_sound() && report.unsigned == 3);
}

/// L5: any bit of the file, once the log is folded into it. What is noticed need not be a bit that matters.
#[test]
fn no_flipped_bit_changes_what_is_read_unnoticed() {
    let (db, mut store) = ledger();
    store.sql.query("PRAGMA wal_checkpoint(TRUNCATE)", &[]).unwrap();
    let rows = store.rows("", 100).unwrap();
    let usage = store.usage(&super::super::UsageQuery::ALL).unwrap();
    drop(store);
    let clean = std::fs::read(db.path()).unwrap();
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let (mut noticed, trials) = (0, if cfg!(coverage) { 100 } else { 300 });
    for _ in 0..trials {
        let bit = rand::Rng::random_range(&mut rng, 0..clean.len() * 8);
        let mut bytes = clean.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let other = SqliteFile::new();
        std::fs::write(other.path(), &bytes).unwrap();
        let Ok(mut store) = SqlStore::open_reading(&other.path()) else {
            noticed += 1;
            continue;
        };
        if !verify(&mut store, Some(&key())).is_ok_and(|report| report.is_sound()) {
            noticed += 1;
            continue;
        }
        assert_eq!(store.rows("", 100).unwrap(), rows, "bit {bit}");
        assert_eq!(store.usage(&super::super::UsageQuery::ALL).unwrap(), usage, "bit {bit}");
    }
    println!("{noticed} of {trials} noticed, the others changed nothing");
    assert!(noticed > 0);
}
