//! Whole histories of the scheduler against a simulated device, with a virtual clock.
//!
//! Each world has its own seed: sizes, groups of layers, tenants, arrivals, cancels, stops, deadlines and faults
//! follow from it. After every step everything is checked. `MIRAI_SIM_STEPS` sets how many steps are simulated
//! (200,000 unless told), `MIRAI_SIM_SEED` runs one world alone.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub, missing_docs)]

mod world;

use world::{Options, World};

/// Injected panics are caught; their messages would bury everything else.
fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<&str>() != Some(&"injected") {
                before(info);
            }
        }));
    });
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs worlds from `first` until `steps` steps are done.
fn simulate(first: u64, steps: u64) -> u64 {
    let (mut seed, mut done) = (first, 0);
    let mut seen = world::Seen::default();
    while done < steps {
        println!("seed {seed}");
        let mut world = World::new(seed, Options::default());
        done += world.run();
        seen.add(&world.seen);
        seed += 1;
    }
    println!("{done} steps in worlds {first}..{seed}: {seen:?}");
    seen.assert_everything_happened();
    done
}

#[test]
fn histories_keep_every_invariant() {
    quiet();
    if let Ok(seed) = std::env::var("MIRAI_SIM_SEED") {
        let mut world = World::new(seed.parse().unwrap(), Options::default());
        println!("{} steps: {:?}", world.run(), world.seen);
        return;
    }
    let steps = number("MIRAI_SIM_STEPS", 200_000);
    // Two threads of worlds with seeds of their own, for machines with as many cores.
    let other = std::thread::spawn(move || simulate(1_000_000_000, steps / 2));
    let done = simulate(0, steps.div_ceil(2)) + other.join().unwrap();
    assert!(done >= steps);
}

#[test]
fn the_same_seed_has_the_same_history() {
    quiet();
    for seed in 0..20 {
        let mut first = World::new(seed, Options::default());
        let mut second = World::new(seed, Options::default());
        assert_eq!(first.run(), second.run(), "seed {seed}");
        assert_eq!(first.history(), second.history(), "seed {seed}");
    }
    let (mut one, mut other) = (World::new(1, Options::default()), World::new(2, Options::default()));
    one.run();
    other.run();
    assert_ne!(one.history(), other.history(), "the hash of a history depends on the history");
}

/// A snapshot was being saved of a sequence without a row in that step, which ended before the step did; its
/// place was taken for the next sequence's.
#[test]
fn a_snapshot_of_a_sequence_that_is_gone_is_given_back() {
    quiet();
    World::new(1_000_000_115, Options::default()).run();
}

#[test]
fn plain_and_look_ahead_give_the_same_tokens() {
    for seed in 0..40 {
        let mut plain = World::new(seed, Options { look_ahead: Some(false), calm: true });
        let mut ahead = World::new(seed, Options { look_ahead: Some(true), calm: true });
        plain.run();
        ahead.run();
        assert!(!plain.tapes().is_empty());
        assert_eq!(plain.tapes(), ahead.tapes(), "seed {seed}");
    }
}
