use std::sync::Arc;

use mirai_engine::{BlockId, Row, RowOutcome, SamplingParams, SeqId, SlotId, SlotOpen};

use super::*;
use crate::budget::CacheBudget;
use crate::loader::{LoadOptions, load};
use crate::reference::Reference;
use crate::source::ModelSource;

const CONFIG: &[u8] = br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 64}"#;

fn executor() -> ModelExecutor<Reference> {
    let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
    let options = LoadOptions {
        dummy: Some(1),
        cache: CacheBudget::Tokens(256),
        max_slots: 3,
        max_step_tokens: 20,
        ..LoadOptions::default()
    };
    load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap().executor
}

#[test]
fn a_device_without_a_budget_of_its_own_needs_one() {
    let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
    let options = LoadOptions { dummy: Some(1), cache: CacheBudget::Device, ..LoadOptions::default() };
    let mut phases = Vec::new();
    let loaded = load(&source, &options, Reference::default(), &mut |phase, _| phases.push(phase));
    let error = loaded.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("what the device has left"), "{error}");
    assert!(phases.contains(&crate::loader::Phase::Cache), "weights come first: {phases:?}");
    let longer = LoadOptions { max_model_len: Some(65), ..options };
    let loaded = load(&source, &longer, Reference::default(), &mut |_, _| {});
    let error = loaded.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("the model's context is 64"), "{error}");
}

#[test]
fn a_device_that_records_nothing_is_warm_at_once() {
    let mut told = Vec::new();
    executor().warm_up(&mut |share| told.push(share)).unwrap();
    assert_eq!(told, [1.0]);
}

fn open(slot: u32) -> SlotOpen {
    SlotOpen {
        slot: SlotId(slot),
        seq: SeqId(slot.into()),
        choice: 0,
        sampling: Arc::new(SamplingParams::default()),
        prompt: Arc::from([1, 2, 3]),
        output: vec![],
        computed: 0,
        blocks: vec![(0..4).map(|b| BlockId(1 + slot * 4 + b)).collect()],
        restore: None,
    }
}

fn row(slot: u32, start: u32, len: u32, input: RowInput) -> Row {
    let seq = SeqId(slot.into());
    Row { seq, slot: SlotId(slot), start, len, input, output: RowOutput::Sample }
}

#[test]
fn a_bad_row_fails_alone() {
    let mut e = executor();
    let plan = |opens, tokens: Vec<u32>| StepPlan {
        step: 5,
        opens,
        rows: (0..3).map(|s| row(s, 0, 3, RowInput::Tokens(3 * s))).collect(),
        tokens,
        ..StepPlan::default()
    };
    let mut good = StepOutcome::default();
    e.submit(&plan((0..3).map(open).collect(), vec![1, 2, 3, 4, 5, 6, 7, 8, 9])).unwrap();
    e.collect(&mut good).unwrap();
    let mut out = StepOutcome::default();
    e.submit(&plan((0..3).map(open).collect(), vec![1, 2, 3, 4, 20, 6, 7, 8, 9])).unwrap();
    e.collect(&mut out).unwrap();
    assert_eq!(out.tokens, [good.tokens[0], good.tokens[2]]);
    let ranges: Vec<_> = out.rows.iter().map(|r| r.tokens.clone()).collect();
    assert_eq!(ranges, [0..1, 1..1, 1..2]);
    assert!(matches!(&out.rows[1].fault, Some(RowFault::Panic(why)) if why.contains("20")));
    assert!(out.rows[0].fault.is_none() && out.rows[2].fault.is_none());
}

#[test]
fn plans_beyond_the_geometry_are_device_faults() {
    let table = [
        (row(3, 0, 1, RowInput::Tokens(0)), "slot 3 of 3"),
        (row(0, 64, 1, RowInput::Tokens(0)), "the context is 64"),
        (row(0, 0, 0, RowInput::Tokens(0)), "positions 0 + 0"),
        (row(0, 0, 21, RowInput::Tokens(0)), "at most 20"),
        (row(0, 0, 2, RowInput::Tokens(20)), "tokens 20 + 2 of 21"),
        (row(0, 0, 2, RowInput::LastDrawn), "one was drawn"),
    ];
    for (row, words) in table {
        let plan = StepPlan {
            step: 9,
            opens: vec![open(0)],
            rows: vec![row],
            tokens: vec![1; 21],
            ..StepPlan::default()
        };
        let fault = executor().submit(&plan).unwrap_err();
        assert_eq!(fault.step, 9);
        assert!(fault.message.contains(words), "{fault}");
    }
    let plan = StepPlan { opens: vec![open(7)], ..StepPlan::default() };
    assert!(executor().submit(&plan).unwrap_err().message.contains("slot 7 of 3"));
}

#[test]
fn outputs_follow_what_slots_want() {
    let mut e = executor();
    let mut wants = open(1);
    let sampling = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::default() };
    wants.sampling = Arc::new(sampling);
    let mut quiet = row(0, 0, 3, RowInput::Tokens(0));
    quiet.output = RowOutput::Nothing;
    let plan = StepPlan {
        opens: vec![open(0), wants, open(2)],
        rows: vec![quiet, row(1, 0, 2, RowInput::Tokens(3)), row(2, 0, 2, RowInput::Tokens(5))],
        tokens: vec![1; 7],
        ..StepPlan::default()
    };
    assert!(e.flatten(&plan).unwrap().is_empty());
    assert_eq!(e.batch.outputs, [3, 4, 6]);
    let outputs: Vec<_> = e.batch.rows.iter().map(|r| r.outputs).collect();
    assert_eq!(outputs, [(0, 0), (0, 2), (2, 3)]);
    assert_eq!(e.batch.positions, [0, 1, 2, 0, 1, 0, 1]);
}

fn pooling_executor(pooling: Pooling) -> ModelExecutor<Reference> {
    let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
    let options = LoadOptions {
        dummy: Some(1),
        cache: CacheBudget::Tokens(256),
        task: crate::pooling::Task::Embed(pooling),
        max_slots: 3,
        max_step_tokens: 20,
        ..LoadOptions::default()
    };
    load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap().executor
}

#[test]
fn pooling_rows_have_one_output() {
    let mut e = pooling_executor(Pooling::Mean);
    assert!(e.geometry.pools && !e.geometry.generates && e.geometry.whole_prompts);
    let mut pools = row(0, 0, 3, RowInput::Tokens(0));
    pools.output = RowOutput::Pool;
    let mut quiet = row(1, 0, 2, RowInput::Tokens(3));
    quiet.output = RowOutput::Nothing;
    let plan = StepPlan {
        opens: vec![open(0), open(1)],
        rows: vec![pools, quiet],
        tokens: vec![1, 2, 3, 4, 5],
        ..StepPlan::default()
    };
    e.submit(&plan).unwrap();
    assert_eq!((e.batch.outputs.clone(), e.batch.rows[0].pool, e.batch.rows[1].pool), (vec![2], true, false));
    let mut out = StepOutcome::default();
    e.collect(&mut out).unwrap();
    let pooled = out.rows[0].pooled.clone().unwrap();
    assert_eq!((pooled.len(), out.rows[1].pooled.clone()), (16, None));
    // A row that fails before it reaches the device has no numbers either.
    let plan = StepPlan { step: 1, tokens: vec![1, 2, 20, 4, 5], ..plan };
    e.submit(&plan).unwrap();
    e.collect(&mut out).unwrap();
    assert!(out.rows[0].fault.is_some() && out.rows[0].pooled.is_none());
    // The last token's row is another vector.
    let mut last = pooling_executor(Pooling::Last);
    assert!(!last.geometry.whole_prompts);
    last.submit(&StepPlan { step: 0, tokens: vec![1, 2, 3, 4, 5], ..plan }).unwrap();
    last.collect(&mut out).unwrap();
    assert_ne!(out.rows[0].pooled.clone().unwrap(), pooled);
}

#[test]
fn a_row_that_the_head_cannot_answer_is_refused() {
    let mut pools = row(0, 0, 1, RowInput::Tokens(0));
    let plan =
        |row| StepPlan { opens: vec![open(0)], rows: vec![row], tokens: vec![1], ..StepPlan::default() };
    let fault = pooling_executor(Pooling::Last).submit(&plan(pools)).unwrap_err();
    assert!(fault.message.contains("does not generate"), "{fault}");
    pools.output = RowOutput::Pool;
    let fault = executor().submit(&plan(pools)).unwrap_err();
    assert!(fault.message.contains("no pooling head"), "{fault}");
}

#[test]
fn an_empty_step_has_an_empty_outcome() {
    let mut e = executor();
    e.submit(&StepPlan { step: 2, ..StepPlan::default() }).unwrap();
    let mut out = StepOutcome { rows: vec![RowOutcome::default()], ..StepOutcome::default() };
    e.collect(&mut out).unwrap();
    assert_eq!((out.step, out.rows.len()), (2, 0));
    assert!(e.collect(&mut out).is_err(), "nothing was submitted");
    assert!(!e.is_asynchronous());
    assert!(format!("{:?}", e.backend()).contains("Reference"));
    assert!(e.backend_mut().collect(&mut out).is_err());
}
