#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use mirai_engine::{BlockId, SamplingParams, SeqId, SlotId, SlotOpen, StepPlan};
use mirai_model::backend::CacheLayout;

use super::*;
use crate::records::{SampleResult, write_records};
use crate::upload::EDITS_A_ROW;

const LIMITS: SampleLimits = SampleLimits { vocab: 70, chunk: 2, edits: 8, masks: 1 };

fn slots(params: Vec<SamplingParams>, prompt: &[u32]) -> Slots {
    let layout = CacheLayout { groups: vec![], blocks: 0, slots: params.len(), snapshots: 0, table_len: 0 };
    let mut slots = Slots::new(&layout);
    let open = |(slot, params)| SlotOpen {
        slot: SlotId(slot as u32),
        seq: SeqId(0),
        choice: 3,
        sampling: Arc::new(params),
        prompt: prompt.into(),
        output: vec![],
        computed: 0,
        blocks: Vec::<Vec<BlockId>>::new(),
        restore: None,
    };
    let opens = params.into_iter().enumerate().map(open).collect();
    slots.apply(&StepPlan { opens, ..StepPlan::default() }, &mut Vec::new()).unwrap();
    slots
}

fn row(slot: u32, first: usize, len: usize, start: usize, outputs: (usize, usize)) -> BatchRow {
    let sample = outputs.1 > outputs.0;
    BatchRow { slot: SlotId(slot), first, len, start, last_drawn: false, sample, pool: false, outputs }
}

#[test]
fn rows_say_how_their_token_is_drawn() {
    let random = SamplingParams {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.1,
        seed: 77,
        logprobs: Some(5),
        repetition_penalty: 1.2,
        ..Default::default()
    };
    let prompted =
        SamplingParams { prompt_logprobs: Some(2), temperature: 1.0, top_k: 1, ..Default::default() };
    let slots = slots(vec![random, prompted], &[10, 11, 12, 13]);
    let batch = Batch {
        ids: vec![0; 5],
        positions: vec![3, 1, 2, 3, 4],
        rows: vec![row(0, 0, 1, 3, (0, 1)), row(1, 1, 3, 1, (1, 4))],
        outputs: vec![0, 1, 2, 3],
    };
    let mut draws = Draws::default();
    draws.plan(&batch, &slots, LIMITS.vocab).unwrap();
    draws.edit(&batch, &slots, LIMITS).unwrap();
    assert!(draws.tops && !draws.follows_output);
    let first = draws.rows[0];
    assert_eq!((first.inverse_temperature, first.top_p, first.min_p, first.top_k), (2.0, 0.9, 0.1, 40));
    assert_eq!((first.seed, first.choice, first.position, first.slot), (77, 3, 4, 0));
    assert_eq!((first.flags, first.top, first.counts_row, first.raw_row), (WANT_LOGPROBS, 5, 0, 0));
    let scored = draws.rows[1];
    assert_eq!((scored.flags, scored.token, scored.top), (SCORE | WANT_LOGPROBS, 12, 2));
    assert_eq!(draws.rows[2].token, 13);
    let last = draws.rows[3];
    assert_eq!((last.flags, last.position, last.slot, last.raw_row), (GREEDY, 4, 1, -1));

    let mut results = vec![0u8; 4 * SampleResult::BYTES];
    let mut tops = vec![0u8; 4 * MAX_TOP * 8];
    write_records(
        &mut results,
        [20, 0, (-0.5f32).to_bits(), 1, 12, 0, (-1.0f32).to_bits(), 2, 13, 0, 0, 3, 33, 0, 0, 0],
    );
    write_records(&mut tops[MAX_TOP * 8..], [40, (-0.25f32).to_bits(), 12, (-1.0f32).to_bits()]);
    let (mut tokens, mut rows) = (Vec::new(), Vec::new());
    draws.read(&batch.rows, &results, &tops, &mut tokens, &mut rows);
    assert_eq!(tokens, [20, 33]);
    assert_eq!((rows[0].tokens.clone(), rows[1].tokens.clone()), (0..1, 1..2));
    let drawn = &rows[0].logprobs.as_ref().unwrap().drawn[0];
    assert_eq!((drawn.token, drawn.logprob, drawn.rank, drawn.top.len()), (20, -0.5, 1, 5));
    let prompt = &rows[1].logprobs.as_ref().unwrap().prompt;
    assert_eq!(prompt[0].top, [(40, -0.25), (12, -1.0)]);
    assert_eq!((prompt[1].token, prompt[1].rank, prompt.len()), (13, 3, 2));
}

#[test]
fn a_row_with_a_fault_fails_alone() {
    let slots = slots(vec![SamplingParams::default(); 3], &[1]);
    let batch = Batch {
        ids: vec![0; 3],
        positions: vec![1; 3],
        rows: (0..3).map(|s| row(s, s as usize, 1, 1, (s as usize, s as usize + 1))).collect(),
        outputs: vec![0, 1, 2],
    };
    let mut draws = Draws::default();
    draws.plan(&batch, &slots, LIMITS.vocab).unwrap();
    draws.edit(&batch, &slots, LIMITS).unwrap();
    let mut results = vec![0u8; 3 * SampleResult::BYTES];
    write_records(&mut results, [7, 1, 0, 0, 8, 0, 0, 0, 9, 2, 0, 0]);
    let (mut tokens, mut rows) = (Vec::new(), Vec::new());
    draws.read(&batch.rows, &results, &[], &mut tokens, &mut rows);
    assert_eq!(tokens, [8]);
    let faults: Vec<_> = rows.iter().map(|r| r.fault.clone()).collect();
    assert_eq!(faults, [Some(RowFault::NonFinite), None, Some(RowFault::NothingAllowed)]);
}

#[test]
fn masks_and_edits_beyond_the_room_fail_their_rows() {
    let masked = SamplingParams {
        allowed_token_ids: Some(vec![0, 33, 69, 70]),
        logprobs: Some(0),
        ..Default::default()
    };
    let many = SamplingParams { logit_bias: (0..9).map(|t| (t, 1.0)).collect(), ..Default::default() };
    let slots = slots(vec![masked.clone(), masked, many, SamplingParams::default()], &[1]);
    let batch = Batch {
        ids: vec![0; 4],
        positions: vec![1; 4],
        rows: (0..4).map(|s| row(s, s as usize, 1, 1, (s as usize, s as usize + 1))).collect(),
        outputs: vec![0, 1, 2, 3],
    };
    let mut draws = Draws::default();
    draws.plan(&batch, &slots, LIMITS.vocab).unwrap();
    draws.edit(&batch, &slots, LIMITS).unwrap();
    assert_eq!(draws.masks, [1, 2, 32]);
    assert_eq!((draws.rows[0].mask_row, draws.rows[1].mask_row, draws.rows[0].raw_row), (0, -1, 0));
    assert_eq!(draws.edits, []);
    let (mut tokens, mut rows) = (Vec::new(), Vec::new());
    draws.read(&batch.rows, &[0; 64], &[0; 4096], &mut tokens, &mut rows);
    assert_eq!((tokens.len(), rows[0].fault.is_some(), rows[3].tokens.clone()), (2, false, 1..2));
    assert!(matches!(&rows[1].fault, Some(RowFault::Panic(why)) if why.contains("masks")));
    assert!(matches!(&rows[2].fault, Some(RowFault::Panic(why)) if why.contains("edits")));
}

#[test]
fn three_rows_with_a_thousand_biases_each_have_room() {
    let biased = |seed: u32| SamplingParams {
        logit_bias: (0..1024).map(|t| (t * 3 + seed, 1.0)).collect(),
        stop_token_ids: (0..1024).map(|t| t * 3 + (seed + 1) % 3).collect(),
        min_tokens: 9,
        bad_words: (0..256).map(|t| vec![4000 + t]).collect(),
        allowed_token_ids: (seed == 1).then(|| vec![5, 64]),
        ..Default::default()
    };
    let limits = SampleLimits { vocab: 5000, chunk: 4, edits: EDITS_A_ROW, masks: 3 };
    let slots = slots((0..3).map(biased).collect(), &[1]);
    let batch = Batch {
        ids: vec![0; 3],
        positions: vec![1; 3],
        rows: (0..3).map(|s| row(s, s as usize, 1, 1, (s as usize, s as usize + 1))).collect(),
        outputs: vec![0, 1, 2],
    };
    let mut draws = Draws::default();
    draws.plan(&batch, &slots, limits.vocab).unwrap();
    draws.edit(&batch, &slots, limits).unwrap();
    assert_eq!(draws.faults, []);
    // 157 words of one mask, then edits on a multiple of 8 bytes.
    assert_eq!((draws.masks.len(), draws.mask_bytes()), (157, 632));
    let places: Vec<_> = draws.rows.iter().map(|row| (row.edits_first, row.edits_count)).collect();
    let count = 1024 + 1024 + 256;
    assert_eq!(places, [(79, count), (79 + count, count), (79 + 2 * count, count)]);
    assert_eq!(draws.list_bytes(), 632 + 3 * count as usize * 8);
}

#[test]
fn batches_that_contradict_themselves_are_errors() {
    let slots = slots(vec![SamplingParams::default()], &[1]);
    let mut draws = Draws::default();
    let batch = |row, outputs| Batch { ids: vec![0], positions: vec![1], rows: vec![row], outputs };
    let mut none = row(0, 0, 1, 1, (0, 0));
    none.sample = true;
    let table = [
        (batch(row(0, 0, 1, 1, (0, 2)), vec![0]), "outputs 0..2 of 1"),
        (batch(row(0, 0, 1, 1, (1, 1)), vec![0]), "outputs 1..1 after 0"),
        (batch(none, vec![]), "outputs 0..0 after 0"),
        (batch(row(0, 0, 1, 1, (0, 1)), vec![4]), "output token 4 outside its row 0..1"),
    ];
    for (batch, words) in table {
        let error = draws.plan(&batch, &slots, LIMITS.vocab).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
