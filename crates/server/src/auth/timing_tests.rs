//! Whether the time of an answer tells how much of a key was right.
//!
//! After dudect (Reparaz, Balasch, Verbauwhede, 2017): two classes of wrong keys of one length, one that shares all but
//! its end with a real key and one that shares nothing, in random order; Welch's t between their times, slow ones
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

/// Welch's t between the times of two inputs.
fn t_between(samples: usize, seed: u64, mut work: impl FnMut(usize)) -> f64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut times: [Vec<f64>; 2] = Default::default();
    // The first calls pay for cold caches, whichever class they are of.
    for i in 0..samples + samples / 10 {
        let class = usize::from(random.random::<bool>());
        let start = std::time::Instant::now();
        for _ in 0..BATCH {
            work(class);
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

/// The same length: all but the last byte right, and no byte right.
fn wrong_keys(key: &str) -> [String; 2] {
    let last = if key.ends_with('0') { '1' } else { '0' };
    [
        format!("{}{last}", &key[..key.len() - 1]),
        key.bytes().map(|b| char::from(if b == b'~' { b'!' } else { b'~' })).collect(),
    ]
}

fn measure(samples: usize, limit: f64) {
    let seed = rand::random();
    println!("seed {seed}");
    let directory = tempfile::tempdir().unwrap();
    let (auth, keys) = with_keys(directory.path());
    for (kind, key) in ["plain", "application"].iter().zip(keys) {
        let wrong = wrong_keys(&key);
        let t = t_between(samples, seed, |class| {
            let key = black_box(&wrong[class]);
            let found = (auth.plain.caller(key.as_bytes()), auth.registry.key(key));
            assert!(black_box(found.0.is_none() && found.1.is_none()));
        });
        println!("{kind} key: t = {t:.2} over {samples} measurements of {BATCH} tries");
        assert!(t.abs() < limit, "{kind} key: t = {t:.2}, the limit is {limit}");
    }
    // What must be found: a comparison that stops where the keys differ.
    let key = "0123456789abcdef".repeat(4);
    let wrong = wrong_keys(&key);
    let t = t_between(samples, seed, |class| {
        let presented = black_box(&wrong[class]).as_bytes();
        let differs = key.as_bytes().iter().zip(presented).position(|(a, b)| black_box(a) != black_box(b));
        assert!(black_box(differs).is_some());
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
