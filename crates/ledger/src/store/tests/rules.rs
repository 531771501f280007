//! Each rule of a store by itself.

use super::*;
use crate::error::StoreError;
use crate::store::{Grouping, Outbox, Purged, Recovered, UsageQuery, UsageRow, for_each_usage};

/// Names each test for SQLite, and all of them for databases that are dear to start.
macro_rules! on_each {
    ($($name:ident)*) => {
        mod sqlite {
            $(#[test]
            fn $name() {
                super::$name(&crate::store::tests::SqliteFile::new());
            })*
        }

        /// Runs every test, each on a database of its own.
        #[cfg(feature = "postgres")]
        pub(super) fn all<D: Database>(make: impl Fn() -> D) {
            $($name(&make());)*
        }
    };
}

on_each! {
    a_request_opens_goes_on_and_ends
    every_commit_may_be_repeated
    a_row_closed_at_once_has_both_links
    a_good_end_gives_way_to_an_error_and_never_the_reverse
    recovery_closes_at_the_last_checkpoint_and_only_once
    a_writer_that_was_given_up_is_refused_and_may_come_back
    what_an_owner_knows_replaces_what_recovery_guessed
    another_request_of_the_same_id_is_reported
    a_database_set_back_gets_its_rows_again
    takeover_gives_up_earlier_runs_at_once
    release_leaves_open_rows_to_others
    pseudonyms_are_erased_and_the_chain_holds
    a_purge_leaves_a_signed_head
    a_purge_waits_for_what_runs
    sums_are_by_bucket_application_key_and_model
    sums_are_filtered_grouped_and_read_in_pages
    ended_rows_are_told_once_and_again_after_a_fault
    one_replica_tells
    rows_are_read_in_pages
}

fn a_request_opens_goes_on_and_ends(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    assert_eq!(me, Epoch { writer: "a".into(), epoch: 1 });
    let row = request(1);
    assert_eq!(store.commit(&me, LEASE, &[new(row.clone())]).unwrap().inserted, 1);
    let stored = store.row(&row.id).unwrap().unwrap();
    assert_eq!(stored, Row { writer: "a".into(), epoch: 1, ..row.clone() });
    assert_eq!(store.commit(&me, LEASE, &[old(tokens(&row, 16))]).unwrap().updated, 1);
    assert_eq!(store.row(&row.id).unwrap().unwrap().completion_tokens, 16);
    // An end may take tokens back: what a stop string cut off.
    assert_eq!(store.commit(&me, LEASE, &[old(closed(&row, 14))]).unwrap().updated, 1);
    let stored = store.row(&row.id).unwrap().unwrap();
    assert_eq!((stored.completion_tokens, stored.finish), (14, Finish::Stop));
    let report = sound(&mut store);
    assert_eq!((report.rows, report.links, report.open, report.unsigned), (1, 2, 0, 0));
    assert_eq!(store.row("other").unwrap(), None);
    assert_eq!(store.schema().unwrap(), 1);
}

fn every_commit_may_be_repeated(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let row = request(1);
    for step in [row.clone(), tokens(&row, 3), tokens(&row, 9), closed(&row, 10)] {
        let first = store.commit(&me, LEASE, &[new(step.clone())]).unwrap();
        assert_eq!(first.inserted + first.updated, 1);
        for entry in [new(step.clone()), old(step.clone()), new(tokens(&row, 0)), old(tokens(&row, 0))] {
            let before = (store.row(&row.id).unwrap(), store.chains().unwrap());
            let again = store.commit(&me, LEASE, &[entry]).unwrap();
            assert_eq!(again.inserted, 0);
            assert_eq!((store.row(&row.id).unwrap(), store.chains().unwrap()).0, before.0);
            assert_eq!(store.chains().unwrap(), before.1, "no link twice");
        }
    }
    assert_eq!(sound(&mut store).links, 2);
}

fn a_row_closed_at_once_has_both_links(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    store.commit(&me, LEASE, &[new(closed(&request(1), 4))]).unwrap();
    let report = sound(&mut store);
    assert_eq!((report.rows, report.links), (1, 2));
}

fn a_good_end_gives_way_to_an_error_and_never_the_reverse(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let good = closed(&request(1), 4);
    let failed = Row { finish: Finish::Error, status: 503, ..good.clone() };
    for step in [&good, &failed, &good, &failed, &good] {
        store.commit(&me, LEASE, &[old(step.clone())]).unwrap();
        sound(&mut store);
    }
    let row = store.row(&good.id).unwrap().unwrap();
    assert_eq!((row.finish, row.status, row.completion_tokens), (Finish::Error, 503, 4));
    assert_eq!(sound(&mut store).links, 3, "each end that changed something has a link");
}

fn recovery_closes_at_the_last_checkpoint_and_only_once(db: &impl Database) {
    let (mut dead, mut store) = (db.connect(), db.connect());
    let victim = dead.register("dead", LEASE, false).unwrap();
    let rows: Vec<Row> = (0..5).map(request).collect();
    let entries: Vec<Entry> = rows.iter().map(|row| new(tokens(row, row.queued_at as u64))).collect();
    dead.commit(&victim, LEASE, &entries).unwrap();
    dead.commit(&victim, LEASE, &[old(closed(&rows[4], 2000))]).unwrap();
    let me = store.register("me", LEASE, false).unwrap();
    assert_eq!(store.recover(&me, 10).unwrap(), Recovered::default(), "its lease holds");
    expire(&mut store, &victim);
    expire(&mut store, &me);
    // In rounds of three; never one's own.
    assert_eq!(store.recover(&me, 3).unwrap(), Recovered { rows: 3, epochs: 0, more: true });
    assert!(matches!(dead.heartbeat(&victim, LEASE), Err(StoreError::Fenced(e)) if e == victim));
    assert_eq!(store.recover(&me, 3).unwrap(), Recovered { rows: 1, epochs: 1, more: true });
    let before = (store.rows("", 10).unwrap(), store.chains().unwrap());
    for _ in 0..2 {
        assert_eq!(store.recover(&me, 3).unwrap(), Recovered::default());
    }
    assert_eq!((store.rows("", 10).unwrap(), store.chains().unwrap()), before);
    for row in &before.0[..4] {
        assert!(row.is_crashed());
        assert_eq!(row.completion_tokens, row.queued_at as u64);
    }
    assert_eq!(before.0[4].finish, Finish::Stop);
    assert!(store.chains().unwrap()[0].ended);
    assert_eq!(sound(&mut store).links, 10);
}

fn a_writer_that_was_given_up_is_refused_and_may_come_back(db: &impl Database) {
    let (mut slow, mut other) = (db.connect(), db.connect());
    let first = slow.register("slow", LEASE, false).unwrap();
    let row = request(1);
    slow.commit(&first, LEASE, &[new(tokens(&row, 8))]).unwrap();
    let by = other.register("other", LEASE, false).unwrap();
    expire(&mut other, &first);
    assert_eq!(other.recover(&by, 10).unwrap().rows, 1);
    let refused = slow.commit(&first, LEASE, &[old(tokens(&row, 20))]);
    assert_eq!(refused, Err(StoreError::Fenced(first.clone())));
    assert_eq!(slow.row(&row.id).unwrap().unwrap().completion_tokens, 8);
    let second = slow.register("slow", LEASE, false).unwrap();
    assert_eq!(second.epoch, 2);
    slow.commit(&second, LEASE, &[old(tokens(&row, 20))]).unwrap();
    let stored = slow.row(&row.id).unwrap().unwrap();
    assert_eq!((stored.state, stored.epoch, stored.completion_tokens), (State::Open, 2, 20));
    sound(&mut slow);
    slow.commit(&second, LEASE, &[old(closed(&row, 21))]).unwrap();
    assert_eq!(sound(&mut slow).links, 4);
    slow.release(&second).unwrap();
    assert!(slow.chains().unwrap().iter().filter(|chain| chain.chain.writer == "slow").all(|c| c.ended));
    assert!(matches!(slow.release(&second), Err(StoreError::Fenced(_))));
}

fn what_an_owner_knows_replaces_what_recovery_guessed(db: &impl Database) {
    let mut store = db.connect();
    let first = store.register("w", LEASE, false).unwrap();
    let rows: Vec<Row> = (0..3).map(request).collect();
    let entries: Vec<Entry> = rows.iter().map(|row| new(tokens(row, 8))).collect();
    store.commit(&first, LEASE, &entries).unwrap();
    let second = store.register("w", LEASE, true).unwrap();
    store.recover(&second, 10).unwrap();
    // From the spool of the dead process: an end, a later checkpoint, an earlier one.
    let crashed = |row: &Row, n| Row { state: State::Closed, finish: Finish::Crashed, ..tokens(row, n) };
    let entries = [new(closed(&rows[0], 12)), new(crashed(&rows[1], 16)), new(crashed(&rows[2], 4))];
    for changed in [2, 0] {
        assert_eq!(store.commit(&second, LEASE, &entries).unwrap().updated, changed);
        let now: Vec<_> = rows.iter().map(|row| store.row(&row.id).unwrap().unwrap()).collect();
        let tokens: Vec<_> = now.iter().map(|row| row.completion_tokens).collect();
        assert_eq!(tokens, [12, 16, 8]);
        assert_eq!(now[0].finish, Finish::Stop);
        assert!(now[1].is_crashed() && now[2].is_crashed());
        sound(&mut store);
    }
}

fn another_request_of_the_same_id_is_reported(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let row = request(1);
    store.commit(&me, LEASE, &[new(row.clone())]).unwrap();
    let other = Row { application: "else".into(), ..row.clone() };
    let done = store.commit(&me, LEASE, &[new(other), new(request(2))]).unwrap();
    assert_eq!((done.conflicts, done.inserted), (vec![row.id.clone()], 1));
    assert_eq!(store.row(&row.id).unwrap().unwrap().application, row.application);
    sound(&mut store);
}

fn a_database_set_back_gets_its_rows_again(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    assert_eq!(store.commit(&me, LEASE, &[old(tokens(&request(1), 5))]).unwrap().inserted, 1);
    sound(&mut store);
}

fn takeover_gives_up_earlier_runs_at_once(db: &impl Database) {
    let mut store = db.connect();
    let first = store.register("a", LEASE, false).unwrap();
    store.commit(&first, LEASE, &[new(request(1))]).unwrap();
    let patient = store.register("a", LEASE, false).unwrap();
    assert_eq!(store.recover(&patient, 10).unwrap().rows, 0);
    let second = store.register("a", LEASE, true).unwrap();
    assert_eq!(second.epoch, 3);
    let mut rows = 0;
    while let done @ Recovered { more: true, .. } = store.recover(&second, 10).unwrap() {
        rows += done.rows;
    }
    assert_eq!(rows, 1);
    assert!(store.heartbeat(&patient, LEASE).is_err());
    store.heartbeat(&second, LEASE).unwrap();
    sound(&mut store);
}

fn release_leaves_open_rows_to_others(db: &impl Database) {
    let mut store = db.connect();
    let first = store.register("a", LEASE, false).unwrap();
    store.commit(&first, LEASE, &[new(tokens(&request(1), 3))]).unwrap();
    store.release(&first).unwrap();
    let second = store.register("b", LEASE, false).unwrap();
    assert_eq!(store.recover(&second, 10).unwrap().rows, 1);
    assert!(store.row("R000001").unwrap().unwrap().is_crashed());
    sound(&mut store);
}

fn pseudonyms_are_erased_and_the_chain_holds(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let rows: Vec<Row> = (0..4).map(request).collect();
    let mut entries: Vec<Entry> = rows[..3].iter().map(|row| new(closed(row, 1))).collect();
    entries.push(new(rows[3].clone()));
    store.commit(&me, LEASE, &entries).unwrap();
    // The last of the closed ones ended at 1003; the open one stays.
    assert_eq!(store.anonymize(1003, 1).unwrap(), 1);
    assert_eq!(store.anonymize(1003, 10).unwrap(), 1);
    assert_eq!(store.anonymize(1003, 10).unwrap(), 0);
    assert_eq!(store.anonymize(9999, 10).unwrap(), 1);
    let stored = store.rows("", 10).unwrap();
    for row in &stored[..3] {
        assert_eq!((&row.user, row.user_salt), (&None, None));
        assert!(row.user_commitment.is_some() && row.user_anon == UserKind::Present);
    }
    assert!(stored[3].user.is_some());
    // What is said again later does not bring it back.
    store.commit(&me, LEASE, &[new(closed(&rows[0], 1))]).unwrap();
    assert_eq!(store.row(&rows[0].id).unwrap().unwrap().user, None);
    sound(&mut store);
}

fn a_purge_leaves_a_signed_head(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    for n in 0..6 {
        store.commit(&me, LEASE, &[new(request(n))]).unwrap();
        store.commit(&me, LEASE, &[old(closed(&request(n), 0))]).unwrap();
    }
    // Ended before 1004: four rows, eight links; three links at a time.
    let mut all = Purged::default();
    let mut rounds = 0;
    loop {
        let done = store.purge(1004, 3).unwrap();
        sound(&mut store);
        (all.rows, all.links, rounds) = (all.rows + done.rows, all.links + done.links, rounds + 1);
        if !done.more {
            break;
        }
    }
    assert_eq!((all.rows, all.links, rounds), (4, 8, 3));
    assert_eq!(store.rows("", 10).unwrap().len(), 2);
    let report = sound(&mut store);
    assert_eq!((report.rows, report.purged), (2, 4));
    let record = store.purges().unwrap().pop().unwrap();
    assert!(key().signed(&record.chain, record.seq, record.head, &record.signature.1));
    assert_eq!((record.seq, record.rows), (8, 4));
    // The chain goes on, and may be purged to its end.
    store.commit(&me, LEASE, &[new(closed(&request(7), 0))]).unwrap();
    assert_eq!(store.purge(i64::MAX, 1000).unwrap(), Purged { rows: 3, links: 6, more: false });
    assert_eq!(store.purge(i64::MAX, 1000).unwrap(), Purged::default());
    assert_eq!(sound(&mut store).purged, 7);
    store.key = None;
    assert_eq!(store.purge(i64::MAX, 1), Err(StoreError::NoKey));
}

fn a_purge_waits_for_what_runs(db: &impl Database) {
    let mut store = db.connect();
    let first = store.register("a", LEASE, false).unwrap();
    let rows: Vec<Row> = (0..4).map(request).collect();
    let open: Vec<Entry> = rows.iter().cloned().map(new).collect();
    store.commit(&first, LEASE, &open).unwrap();
    let close = |n: usize| old(closed(&rows[n], 1));
    store.commit(&first, LEASE, &[close(0), close(3)]).unwrap();
    // The second still runs: the first goes, the fourth waits though it has ended.
    assert_eq!(store.purge(i64::MAX, 100).unwrap(), Purged { rows: 1, links: 1, more: false });
    sound(&mut store);
    // A row that moves to a later run keeps both chains from its links on.
    let second = store.register("a", LEASE, true).unwrap();
    store.recover(&second, 10).unwrap();
    store.commit(&second, LEASE, &[old(tokens(&rows[1], 2))]).unwrap();
    assert_eq!(store.purge(i64::MAX, 100).unwrap().rows, 0);
    sound(&mut store);
    store.commit(&second, LEASE, &[close(1), new(request(9))]).unwrap();
    assert_eq!(store.purge(i64::MAX, 100).unwrap().rows, 3);
    let report = sound(&mut store);
    assert_eq!((report.rows, report.open, report.purged), (1, 1, 4));
}

fn sums_are_by_bucket_application_key_and_model(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let rows: Vec<Entry> = (0..6).map(|n| new(closed(&request(n), 10 + n))).collect();
    store.commit(&me, LEASE, &rows).unwrap();
    store.commit(&me, LEASE, &[new(tokens(&request(6), 100))]).unwrap();
    let all = store.usage(&UsageQuery::ALL).unwrap();
    assert_eq!(all.len(), 3);
    assert_eq!((all[0].application.as_str(), all[0].start), ("app-0", 0));
    assert_eq!((all[0].requests, all[0].open, all[0].completion_tokens), (3, 1, 10 + 13 + 100));
    assert_eq!((all[0].prompt_tokens, all[0].key_id.as_str(), all[0].model.as_str()), (15, "k", "demo"));
    let query = UsageQuery { from: 1000, to: 1006, bucket: 2, ..UsageQuery::ALL };
    let buckets = store.usage(&query).unwrap();
    let starts: Vec<i64> = buckets.iter().map(|row| row.start).collect();
    assert_eq!(starts, [1000, 1000, 1002, 1002, 1004, 1004]);
    assert_eq!(buckets.iter().map(|row| row.completion_tokens).sum::<u64>(), 75);
    assert!(store.usage(&UsageQuery { from: 0, to: 10, bucket: 0, ..UsageQuery::ALL }).unwrap().is_empty());
}

fn rows_are_read_in_pages(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let rows: Vec<Entry> = (0..5).map(|n| new(request(n))).collect();
    store.commit(&me, LEASE, &rows).unwrap();
    let (mut after, mut seen) = (String::new(), 0);
    loop {
        let page = store.rows(&after, 2).unwrap();
        let Some(last) = page.last() else { break };
        last.id.clone_into(&mut after);
        seen += page.len();
    }
    assert_eq!((seen, store.count().unwrap()), (5, 5));
}

fn sums_are_filtered_grouped_and_read_in_pages(db: &impl Database) {
    let mut store = db.connect();
    let me = store.register("a", LEASE, false).unwrap();
    let row = |n: u64| Row {
        queued_at: 10 * n as i64 + n as i64 % 7,
        key_id: format!("k{}", n % 4),
        model: format!("m{}", n % 2),
        price_version: (!n.is_multiple_of(5)).then(|| format!("p{}", n % 5)),
        energy_microjoules: n,
        energy_method: if n.is_multiple_of(2) {
            crate::EnergyMethod::Nvml
        } else {
            crate::EnergyMethod::Estimated
        },
        ..request(n)
    };
    let rows: Vec<Entry> = (0..60).map(|n| new(if n < 50 { closed(&row(n), n) } else { row(n) })).collect();
    store.commit(&me, LEASE, &rows).unwrap();
    let total = |rows: &[UsageRow]| {
        let mut sum = UsageRow::default();
        rows.iter().for_each(|row| sum.add(row));
        (sum.requests, sum.open, sum.completion_tokens, sum.energy_microjoules, sum.measured_microjoules)
    };
    let closed_only = UsageQuery { closed_only: true, ..UsageQuery::ALL };
    for bits in 0..16_u8 {
        let group_by = Grouping {
            application: bits & 1 > 0,
            key_id: bits & 2 > 0,
            model: bits & 4 > 0,
            price_version: bits & 8 > 0,
        };
        let query = UsageQuery { group_by, bucket: 100, from: 3, to: 597, ..closed_only.clone() };
        let whole = store.usage(&query).unwrap();
        assert_eq!(total(&whole), (49, 10, 49 * 50 / 2, 49 * 50 / 2, 24 * 25));
        let keys: Vec<_> =
            whole.iter().map(|r| (r.start, &r.application, &r.key_id, &r.model, &r.price_version)).collect();
        assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "in order, and none twice");
        assert_eq!(whole[0].start, 3, "the first bucket begins with the query");
        assert!(bits & 1 > 0 || whole.iter().all(|row| row.application.is_empty()));
        for page in [1, 3, 1000] {
            let mut paged = Vec::new();
            for_each_usage::<StoreError>(&mut store, &query, page, |row| {
                paged.push(row);
                Ok(())
            })
            .unwrap();
            assert_eq!(paged, whole, "pages of {page}");
        }
    }
    let filtered = UsageQuery {
        applications: vec!["app-0".into(), "app-1".into(), "no'body".into()],
        key_ids: vec!["k1".into()],
        models: vec!["m1".into()],
        ..UsageQuery::ALL
    };
    let expected = (0..60).filter(|n| n % 3 < 2 && n % 4 == 1).count() as u64;
    assert_eq!(total(&store.usage(&filtered).unwrap()).0, expected);
    // What names no list gets the one that was in force when it came.
    let lists = vec![(100, "p1".to_owned()), (300, "late".to_owned())];
    let by_list = Grouping { price_version: true, ..Grouping::default() };
    let query = UsageQuery { group_by: by_list, price_lists: lists, ..UsageQuery::ALL };
    let by_list = store.usage(&query).unwrap();
    let by_list: Vec<_> = by_list.iter().map(|row| (row.price_version.as_str(), row.requests)).collect();
    assert_eq!(by_list, [("", 2), ("late", 6), ("p1", 12 + 4), ("p2", 12), ("p3", 12), ("p4", 12)]);
    let capped = UsageQuery { limit: 2, bucket: 10, ..UsageQuery::ALL };
    assert_eq!(store.usage(&capped).unwrap().len(), 2);
    // What still runs is a line of its own where nothing has ended.
    let late = UsageQuery { from: 500, bucket: 1000, group_by: Grouping::default(), ..closed_only };
    assert_eq!(total(&store.usage(&late).unwrap()), (0, 10, 0, 0, 0));
}

fn told(store: &mut impl Outbox, limit: usize) -> Vec<String> {
    let mut out = Vec::new();
    loop {
        let batch = store.next("billing", limit).unwrap();
        if batch.is_empty() {
            return out;
        }
        out.extend(batch.rows.iter().map(|(row, _)| format!("{} {}", row.id, row.finish.as_str())));
        assert!(store.told("billing", "me", &batch).unwrap());
    }
}

fn ended_rows_are_told_once_and_again_after_a_fault(db: &impl Database) {
    let mut store = db.connect();
    let (a, b) = (store.register("a", LEASE, false).unwrap(), store.register("b", LEASE, false).unwrap());
    assert!(store.hold("billing", "me", LEASE).unwrap());
    assert_eq!((told(&mut store, 5).len(), store.pending("billing").unwrap()), (0, 0));
    let rows: Vec<Entry> = (0..5).map(|n| new(request(n))).collect();
    store.commit(&a, LEASE, &rows).unwrap();
    store.commit(&b, LEASE, &[new(closed(&request(10), 1))]).unwrap();
    // In the order in which they end, not in that of their ids.
    let end = |n| old(closed(&request(n), 2));
    store.commit(&a, LEASE, &[end(3), end(1)]).unwrap();
    assert_eq!(store.pending("billing").unwrap(), 5 + 2 + 2);
    let first = store.next("billing", 100).unwrap();
    assert_eq!(first.rows.len(), 3);
    assert_eq!(store.next("billing", 100).unwrap(), first, "until it is told, it is to be told");
    assert_eq!(told(&mut store, 2), ["R000003 stop", "R000001 stop", "R000010 stop"]);
    // A batch of which nobody remembers whether it was told does not set the place back.
    assert!(store.told("billing", "me", &first).unwrap());
    assert_eq!((told(&mut store, 2).len(), store.pending("billing").unwrap()), (0, 0));
    // Recovery ends a row, and its owner comes back with what it knows: two events, with two digests.
    expire(&mut store, &a);
    store.recover(&b, 100).unwrap();
    assert_eq!(told(&mut store, 3), ["R000000 crashed", "R000002 crashed", "R000004 crashed"]);
    let again = store.register("a", LEASE, false).unwrap();
    store.commit(&again, LEASE, &[new(closed(&request(2), 9))]).unwrap();
    assert_eq!(told(&mut store, 3), ["R000002 stop"]);
    // Another consumer hears of everything, each request once as it is now.
    let all = store.next("other", 100).unwrap();
    assert_eq!(all.rows.len(), 6);
    // What was purged is gone for those who were not told.
    store.purge(i64::MAX, 100).unwrap();
    assert_eq!(store.next("third", 100).unwrap().rows.len(), 0);
    sound(&mut store);
}

fn one_replica_tells(db: &impl Database) {
    let (mut one, mut two) = (db.connect(), db.connect());
    let me = one.register("a", LEASE, false).unwrap();
    one.commit(&me, LEASE, &[new(closed(&request(1), 1))]).unwrap();
    assert!(one.hold("billing", "me", LEASE).unwrap());
    assert!(one.hold("billing", "me", LEASE).unwrap());
    assert!(!two.hold("billing", "you", LEASE).unwrap());
    assert!(two.hold("other", "you", LEASE).unwrap());
    let batch = two.next("billing", 10).unwrap();
    assert!(!two.told("billing", "you", &batch).unwrap(), "without the right nothing is remembered");
    assert_eq!(one.next("billing", 10).unwrap(), batch);
    // A lease that is over is anybody's; who had it is refused.
    one.sql.execute("UPDATE mirai_outbox_lease SET lease_until = 0", &[]).unwrap();
    assert!(two.hold("billing", "you", LEASE).unwrap());
    assert!(!one.told("billing", "me", &batch).unwrap());
    assert!(two.told("billing", "you", &batch).unwrap());
    one.let_go("billing", "me").unwrap();
    assert!(!one.hold("billing", "me", LEASE).unwrap());
    two.let_go("billing", "you").unwrap();
    assert!(one.hold("billing", "me", LEASE).unwrap());
}
