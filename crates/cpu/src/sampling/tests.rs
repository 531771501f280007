//! The sampler as a whole: order of operations, faults, distributions, independence of the batch.

use std::sync::Arc;

use mirai_engine::SamplingParams;

use super::*;
use crate::test_support::Lcg;

fn history(params: &SamplingParams, choice: u32) -> History {
    History::new(Arc::new(params.clone()), Arc::from([0u32, 1]), choice, &[])
}

fn token(params: &SamplingParams, choice: u32, position: u32, logits: &[f32]) -> Result<Drawn, RowFault> {
    sample(&history(params, choice), position, &mut logits.to_vec(), &mut Scratch::default())
}

fn normal_logits(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = Lcg::new(seed);
    (0..len).map(|_| rng.normal() * 2.0).collect()
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let greedy = SamplingParams::default();
    let mut logits = normal_logits(1, 1000);
    logits[777] = 50.0;
    logits[333] = 50.0;
    assert_eq!(token(&greedy, 0, 2, &logits).unwrap().token, 333);
    let hot = SamplingParams { temperature: 1.7, top_k: 1, ..Default::default() };
    assert_eq!(token(&hot, 0, 2, &logits).unwrap().token, 333);
    let cold = SamplingParams { temperature: 9e-6, ..Default::default() };
    assert_eq!(token(&cold, 0, 2, &logits).unwrap().token, 333);
}

#[test]
fn a_bad_logit_faults_the_row() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = normal_logits(2, 100);
        logits[57] = bad;
        // Not even where the request masks that token: what comes from the model must be sound.
        let params = SamplingParams { allowed_token_ids: Some(vec![3]), ..Default::default() };
        assert_eq!(token(&SamplingParams::default(), 0, 2, &logits), Err(RowFault::NonFinite));
        assert_eq!(token(&params, 0, 2, &logits), Err(RowFault::NonFinite));
        assert_eq!(score(&logits, 3, 2, &mut Scratch::default()), Err(RowFault::NonFinite));
    }
}

#[test]
fn nothing_allowed_is_a_fault() {
    let params = SamplingParams {
        allowed_token_ids: Some(vec![3, 4]),
        bad_words: vec![vec![3], vec![4]],
        temperature: 1.0,
        ..Default::default()
    };
    assert_eq!(token(&params, 0, 2, &normal_logits(3, 10)), Err(RowFault::NothingAllowed));
}

#[test]
fn a_panic_ends_its_row_alone() {
    let params = SamplingParams { logit_bias: vec![(10_000, 1.0)], ..Default::default() };
    let logits = normal_logits(4, 10);
    let Err(RowFault::Panic(text)) = token(&params, 0, 2, &logits) else {
        panic!("an id beyond the vocabulary is a panic of its row");
    };
    assert!(text.contains("10000"), "{text}");
    assert!(token(&SamplingParams::default(), 0, 2, &logits).is_ok());
    let fault: Result<(), RowFault> = guarded(|| std::panic::panic_any(7u8));
    assert_eq!(fault, Err(RowFault::Panic("a value that is not text".into())));
    let fault: Result<(), RowFault> = guarded(|| panic!("static text"));
    assert_eq!(fault, Err(RowFault::Panic("static text".into())));
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let logits = normal_logits(5, 300);
    let plain = SamplingParams { logprobs: Some(4), ..Default::default() };
    let want = token(&plain, 0, 2, &logits).unwrap();
    let raw = want.logprobs.clone().unwrap();
    assert_eq!((raw.rank, raw.top[0].0), (1, want.token));
    // Forbid the best token: another one is drawn, and its log-probability still counts the forbidden one.
    let edited = SamplingParams { bad_words: vec![vec![want.token]], temperature: 0.7, top_k: 1, ..plain };
    let got = token(&edited, 0, 2, &logits).unwrap();
    let got_raw = got.logprobs.unwrap();
    assert_eq!((got.token, got_raw.rank), (raw.top[1].0, 2));
    assert_eq!(got_raw.logprob.to_bits(), raw.top[1].1.to_bits());
    assert_eq!(got_raw.top, raw.top);
}

#[test]
fn draws_follow_the_distribution() {
    const DRAWS: u32 = 40_000;
    let logits = normal_logits(6, 30);
    for seed in [1u64, 99, 123_456_789_012] {
        let params = SamplingParams {
            temperature: 0.8,
            seed,
            min_p: 0.02,
            top_k: 20,
            top_p: 0.97,
            ..Default::default()
        };
        let history = history(&params, 0);
        let mut counts = vec![0f64; logits.len()];
        let mut scratch = Scratch::default();
        for position in 2..2 + DRAWS {
            let drawn = sample(&history, position, &mut logits.clone(), &mut scratch).unwrap();
            counts[drawn.token as usize] += 1.0;
        }
        // The same distribution, by a sort and in double precision.
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let weight = |id: usize| ((f64::from(logits[id]) - f64::from(logits[order[0]])) / 0.8).exp();
        let mut kept: Vec<usize> = order.iter().copied().filter(|&id| weight(id) >= 0.02).take(20).collect();
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let mut before = 0.0;
        kept.retain(|&id| {
            let keep = before < 0.97 * total;
            before += weight(id);
            keep
        });
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let mut chi2 = 0.0;
        for (id, count) in counts.iter().enumerate() {
            if kept.contains(&id) {
                let expected = weight(id) / total * f64::from(DRAWS);
                chi2 += (count - expected).powi(2) / expected;
            } else {
                assert_eq!(*count, 0.0, "seed {seed}: token {id} was cut and drawn");
            }
        }
        let freedom = kept.len() as f64 - 1.0;
        let limit = freedom + 5.0 * (2.0 * freedom).sqrt();
        assert!(chi2 < limit, "seed {seed}: chi-square {chi2} over {limit}");
    }
}

#[test]
fn choices_of_one_seed_differ_and_repeat() {
    let logits = normal_logits(7, 5000);
    let params = SamplingParams { temperature: 1.0, seed: 11, ..Default::default() };
    let run = |choice: u32| -> Vec<u32> {
        (2..34).map(|position| token(&params, choice, position, &logits).unwrap().token).collect()
    };
    let runs: Vec<Vec<u32>> = (0..4).map(run).collect();
    for a in 0..4usize {
        assert_eq!(runs[a], run(a as u32));
        for b in 0..a {
            assert_ne!(runs[a], runs[b]);
        }
    }
}

#[test]
fn buffers_of_other_rows_leave_no_trace() {
    let mut scratch = Scratch::default();
    for seed in 0..200u64 {
        let mut rng = Lcg::new(seed);
        let len = 5 + rng.below(2000);
        let logits = normal_logits(seed, len);
        let params = SamplingParams {
            temperature: [0.0, 0.5, 1.0][rng.below(3)],
            top_p: [1.0, 0.8][rng.below(2)],
            top_k: [0, 10][rng.below(2)],
            min_p: [0.0, 0.1][rng.below(2)],
            logprobs: [None, Some(3)][rng.below(2)],
            logit_bias: if rng.below(2) == 0 { vec![(2, 1.5)] } else { Vec::new() },
            seed,
            ..Default::default()
        };
        let shared = sample(&history(&params, 0), 9, &mut logits.clone(), &mut scratch);
        assert_eq!(shared, token(&params, 0, 9, &logits), "seed {seed}");
    }
}
