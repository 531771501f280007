//! Whether the time of an answer tells how much of a key was right.
//!
//! After dudect (Reparaz, Balasch, Verbauwhede, 2017): two classes of wrong keys of one length, those that share all but
//! their end with a real key and those that share nothing, in random order; Welch's t between their times, slow ones
//! cropped. The order being random, noise of the machine cannot favour a class: without a leak t is close to a standard
//! normal number, however loaded the machine. A comparison that stops at the first difference is measured beside it
//! and must be found out, or the test proves nothing.

use mirai_ledger::identity::{NewKey, Pepper};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::hint::black_box;

use super::*;

/// Calls of one measurement: a clock's tick is longer than a comparison.
const BATCH: usize = 8;

/// Welch's t between the times of wrong keys that share all but the last four characters with `key`, and of those
/// that share nothing but chance. Each is another, and all lie at one address: neither a place in memory nor the luck
/// of one hash is to be measured.
fn t_between(samples: usize, seed: u64, key: &str, mut work: impl FnMut(&str)) -> f64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut presented = key.to_owned();
    let mut times: [Vec<f64>; 2] = Default::default();
    // The first calls pay for cold caches, whichever class they are of.
    for i in 0..samples + samples / 10 {
        let class = usize::from(random.random::<bool>());
        // The same work before the clock starts, whichever class it is. Capitals: no key has one.
        let text: String = key.bytes().map(|_| char::from(random.random_range(b'A'..=b'P'))).collect();
        let beginnings = [key, &text];
        presented.clear();
        presented.push_str(&black_box(beginnings)[class][..key.len() - 4]);
        presented.push_str(&text[key.len() - 4..]);
        let start = std::time::Instant::now();
        for _ in 0..BATCH {
            work(black_box(&presented));
        }
        let nanos = start.elapsed().as_nanos() as f64;
        if i >= samples / 10 {
            times[class].push(nanos);
        }
    }
    let mut all: Vec<f64> = times.concat();
    all.sort_unstable_by(f64::total_cmp);
    let crop = all[all.len() * 9 / 10];
    let moments = times.map(|times| {
        let kept: Vec<f64> = times.into_iter().filter(|time| *time <= crop).collect();
        let n = kept.len() as f64;
        let mean = kept.iter().sum::<f64>() / n;
        let variance = kept.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (mean, variance / n)
    });
    (moments[0].0 - moments[1].0) / (moments[0].1 + moments[1].1).sqrt().max(f64::MIN_POSITIVE)
}

/// A server with a key of each kind, and both keys.
fn with_keys(directory: &std::path::Path) -> (Auth, [String; 2]) {
    let pepper = "p".repeat(32);
    let made = NewKey::new("k", &Pepper::new(1, pepper.as_bytes()).unwrap()).unwrap();
    let (applications, secrets) = (directory.join("applications"), directory.join("pepper"));
    std::fs::write(&applications, format!("[[application]]\nname = \"a\"\n{}", made.stanza)).unwrap();
    std::fs::write(&secrets, format!("1 {pepper}\n")).unwrap();
    let plain = "0123456789abcdef".repeat(4);
    let mut config = ServerConfig { api_keys: vec![plain.clone()], ..ServerConfig::default() };
    config.identity.applications_file = Some(applications);
    config.identity.pepper_file = Some(secrets);
    (Auth::load(&config, Arc::new(Metrics::new())).unwrap(), [plain, made.key])
}

fn measure(samples: usize, limit: f64) {
    let seed = rand::random();
    println!("seed {seed}");
    let directory = tempfile::tempdir().unwrap();
    let (auth, keys) = with_keys(directory.path());
    for (kind, key) in ["plain", "application"].iter().zip(keys) {
        let t = t_between(samples, seed, &key, |presented| {
            let found = (auth.plain.caller(presented.as_bytes()), auth.registry.key(presented));
            assert!(black_box(found.0.is_none() && found.1.is_none()));
        });
        println!("{kind} key: t = {t:.2} over {samples} measurements of {BATCH} tries");
        assert!(t.abs() < limit, "{kind} key: t = {t:.2}, the limit is {limit}");
    }
    // What must be found: a comparison that stops where the keys differ.
    let key = "0123456789abcdef".repeat(4);
    let t = t_between(samples, seed, &key, |presented| {
        let mut pairs = key.bytes().zip(presented.bytes());
        assert!(black_box(pairs.any(|(a, b)| black_box(a) != black_box(b))));
    });
    println!("a comparison that stops early: t = {t:.2}");
    assert!(t.abs() > limit.max(10.0), "the test would not see a leak: t = {t:.2}");
}

/// Few tries and a wide limit: a chance of 10^-23 to fail without a leak.
#[test]
fn time_does_not_tell_a_key() {
    measure(5_000, 10.0);
}

/// dudect's own limit, over a million tries.
#[test]
#[ignore = "long, and for an optimised build: cargo xtask full timing"]
fn time_does_not_tell_a_key_in_a_million_tries() {
    measure(1_000_000 / BATCH, 4.5);
}
