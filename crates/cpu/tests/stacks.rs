//! Stacks of weights, experts and pooling on the backend: the same bits however rows are put together, and errors with
//! numbers where things do not fit.
#![allow(clippy::unwrap_used)]

mod rig;

use mirai_cpu::{CpuBackend, CpuBuffer, CpuOptions};
use mirai_engine::{RowFault, SlotId, StepOutcome, StepPlan};
use mirai_model::backend::{
    Activation, Backend, BackendError, Batch, BatchRow, CacheLayout, Experts, HeadView, HostTensor,
    RouteSpec, Rows, Scoring, Storage,
};
use rig::{Rng, tensor};

const HIDDEN: usize = 32;
const INNER: usize = 64;
const EXPERTS: usize = 7;
const TOP_K: usize = 3;

fn backend(threads: usize) -> CpuBackend {
    let mut b = CpuBackend::new(&CpuOptions { threads: Some(threads), ..Default::default() });
    let layout = CacheLayout { groups: vec![], blocks: 0, slots: 2, snapshots: 0, table_len: 0 };
    b.allocate_cache(&layout).unwrap();
    b
}

/// Begins a step of tokens whose ids are given, one sequence of whole prompts each.
fn begin(b: &mut CpuBackend, ids: &[u32], lens: &[usize], pool: bool) {
    let mut first = 0;
    let mut batch = Batch { ids: ids.to_vec(), ..Batch::default() };
    let mut plan = StepPlan::default();
    for (index, &len) in lens.iter().enumerate() {
        batch.positions.extend(0..len as u32);
        batch.outputs.push((first + len - 1) as u32);
        let row = BatchRow {
            slot: SlotId(index as u32),
            first,
            len,
            start: 0,
            last_drawn: false,
            sample: false,
            pool,
            outputs: (index, index + 1),
        };
        batch.rows.push(row);
        plan.rows.push(mirai_engine::Row {
            seq: mirai_engine::SeqId(index as u64),
            slot: SlotId(index as u32),
            start: 0,
            len: len as u32,
            input: mirai_engine::RowInput::Tokens(first as u32),
            output: mirai_engine::RowOutput::Pool,
        });
        first += len;
    }
    b.begin(&plan, &batch).unwrap();
}

fn matrix(rng: &mut Rng, rows: usize, columns: usize, storage: Storage) -> HostTensor<'static> {
    tensor("w", &[rows, columns], &rng.values(rows * columns, 0.4), storage).0
}

fn fails<T>(result: Result<T, BackendError>, words: &str) {
    let error = result.err().unwrap().to_string();
    assert!(error.contains(words), "`{error}` should say `{words}`");
}

/// A table whose row is a token's embedding.
fn embedded(b: &mut CpuBackend, table: &HostTensor<'static>) -> CpuBuffer {
    let width = table.shape[1];
    let table = b.load_linear(vec![table.clone()]).unwrap();
    let mut x = b.buffer(Rows::Tokens, width).unwrap();
    b.embed(&table, 1.0, &mut x).unwrap();
    x
}

#[test]
fn heads_of_mixed_storages_multiply_as_each_alone() {
    const WIDTH: usize = 64;
    const STRIDE: usize = WIDTH + 8;
    let mut rng = Rng::new(3);
    // Two parts each, of which one has no kernel of ours.
    let weights: Vec<Vec<HostTensor<'_>>> = (0..3)
        .map(|_| vec![matrix(&mut rng, 5, WIDTH, Storage::Q8_0), matrix(&mut rng, 6, WIDTH, Storage::Q5_0)])
        .collect();
    let table = matrix(&mut rng, 9, 3 * STRIDE, Storage::F32);
    let mut b = backend(2);
    let stack = b.load_stack(weights.clone()).unwrap();
    assert_eq!((stack.len(), stack.rows(), stack.columns(), stack.is_empty()), (3, 11, WIDTH, false));
    assert!(stack.bytes() > 3 * 11 * WIDTH / 2 && format!("{stack:?}").contains("CpuStack"));
    begin(&mut b, &[8, 1, 4, 0], &[4], false);
    let x = embedded(&mut b, &table);
    let mut out = b.buffer(Rows::Tokens, 50).unwrap();
    let (from, to) =
        (HeadView { first: 5, stride: STRIDE, width: WIDTH }, HeadView { first: 2, stride: 15, width: 11 });
    b.head_linear(&stack, (&x, from), (&mut out, to), 50).unwrap();
    let got = out.values(4).unwrap().to_vec();
    for (head, parts) in weights.into_iter().enumerate() {
        let alone = b.load_linear(parts).unwrap();
        for token in 0..4 {
            let values = &x.values(4).unwrap()[(token * 3 + head) * STRIDE + 5..][..WIDTH];
            b.collect(&mut StepOutcome::default()).unwrap();
            let (one, _) = tensor("x", &[1, WIDTH], values, Storage::F32);
            begin(&mut b, &[0], &[1], false);
            let one = embedded(&mut b, &one);
            let mut want = b.buffer(Rows::Tokens, 11).unwrap();
            b.linear(&alone, None, &one, &mut want).unwrap();
            assert_eq!(got[token * 50 + 2 + head * 15..][..11], want.values(1).unwrap()[..], "head {head}");
        }
    }
    let wide = HeadView { stride: 25, ..to };
    fails(b.head_linear(&stack, (&x, from), (&mut out, wide), 50), "3 heads of 11 x 64");
    fails(b.load_stack(vec![]), "no weights");
    let other = matrix(&mut rng, 4, 32, Storage::F32);
    fails(b.load_stack(vec![vec![matrix(&mut rng, 5, 32, Storage::F32)], vec![other]]), "weight 1 is 4 x 32");
}

/// What a mixture makes of some tokens, by token.
fn mixture(threads: usize, ids: &[u32], storage: Storage, activation: Activation, gated: bool) -> Vec<f32> {
    let mut rng = Rng::new(11);
    let mut b = backend(threads);
    let wide = if gated { 2 * INNER } else { INNER };
    let mut stack = |b: &mut CpuBackend, rows, columns| {
        let weights = (0..EXPERTS).map(|_| vec![matrix(&mut rng, rows, columns, storage)]).collect();
        b.load_stack(weights).unwrap()
    };
    let (up, down) = (stack(&mut b, wide, HIDDEN), stack(&mut b, HIDDEN, INNER));
    let mut rng = Rng::new(12);
    let mut vector = |b: &mut CpuBackend, n: usize| {
        b.load_vector(vec![tensor("b", &[n], &rng.values(n, 0.5), Storage::F32).0]).unwrap()
    };
    let (up_bias, down_bias) = (vector(&mut b, EXPERTS * wide), vector(&mut b, EXPERTS * HIDDEN));
    let mut rng = Rng::new(13);
    let table = matrix(&mut rng, 50, HIDDEN, Storage::F32);
    let router = b.load_linear(vec![matrix(&mut rng, EXPERTS, HIDDEN, Storage::F32)]).unwrap();
    begin(&mut b, ids, &[ids.len()], false);
    let x = embedded(&mut b, &table);
    let spec = RouteSpec {
        experts: EXPERTS,
        top_k: TOP_K,
        scoring: Scoring::Softmax,
        normalize: true,
        scale: 1.5,
        groups: None,
    };
    let mut logits = b.buffer(Rows::Tokens, EXPERTS).unwrap();
    let mut out = b.buffer(Rows::Tokens, HIDDEN).unwrap();
    b.linear(&router, None, &x, &mut logits).unwrap();
    let mut routing = b.routing(TOP_K).unwrap();
    let experts = Experts {
        gate_up: &up,
        gate_up_bias: Some(&up_bias),
        activation,
        intermediate: INNER,
        down: &down,
        down_bias: Some(&down_bias),
    };
    fails(b.experts(&experts, &routing, &x, &mut out), "nothing was routed");
    b.route(&spec, None, None, &logits, &mut routing).unwrap();
    let sums = routing.choices(ids.len()).unwrap().chunks(TOP_K);
    for choices in sums {
        assert!((choices.iter().map(|c| c.weight).sum::<f32>() - 1.5).abs() < 1e-5);
        assert!(choices[0].weight >= choices[1].weight && choices[1].weight >= choices[2].weight);
    }
    b.experts(&experts, &routing, &x, &mut out).unwrap();
    let wrong = Experts { intermediate: INNER - 1, ..experts };
    let mut other = b.buffer(Rows::Tokens, HIDDEN).unwrap();
    fails(b.experts(&wrong, &routing, &x, &mut other), "rows of 64, expected 63");
    let more = RouteSpec { top_k: EXPERTS + 1, ..spec };
    fails(b.route(&more, None, None, &logits, &mut routing), "into room for 3 experts");
    out.values(ids.len()).unwrap().to_vec()
}

#[test]
fn a_token_of_a_mixture_does_not_depend_on_the_others() {
    // More tokens than are worked on together.
    let ids: Vec<u32> = (0..530).map(|i| i * 7 % 50).collect();
    let clamped = Activation::ClampedSwiglu { alpha: 1.7, limit: 2.0 };
    for (storage, activation, gated) in [
        (Storage::Bf16, Activation::Silu, true),
        (Storage::Q8_0, clamped, true),
        // Its rows of `HIDDEN` are an odd number of blocks.
        (Storage::Q5_0, Activation::GeluTanh, false),
    ] {
        let all = mixture(3, &ids, storage, activation, gated);
        assert!(all.iter().all(|v| v.is_finite()));
        for at in [0, 13, 511, 512, 529] {
            let alone = mixture(1, &ids[at..=at], storage, activation, gated);
            assert_eq!(all[at * HIDDEN..(at + 1) * HIDDEN], alone, "{storage:?}, token {at}");
        }
        let distinct = (0..50).filter(|i| all[i * HIDDEN] != all[(i + 1) * HIDDEN]).count();
        assert!(distinct > 40, "tokens differ");
    }
}

#[test]
fn pooled_rows_and_their_faults() {
    let mut b = backend(2);
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let (table, _) = tensor("t", &[4, 3], &values, Storage::F32);
    // Ids beyond the table stand for any source of NaN in one sequence.
    begin(&mut b, &[0, 3, 2, 1, 99], &[3, 2], true);
    let x = embedded(&mut b, &table);
    let mut out = b.buffer(Rows::Outputs, 3).unwrap();
    b.mean_outputs(&x, &mut out).unwrap();
    b.emit(&out).unwrap();
    let mut outcome = StepOutcome::default();
    b.collect(&mut outcome).unwrap();
    assert_eq!(outcome.rows[0].pooled.as_deref(), Some(&[5.0, 6.0, 7.0][..]));
    assert_eq!((&outcome.rows[1].pooled, &outcome.rows[1].fault), (&None, &Some(RowFault::NonFinite)));
    // The same rows through the last token's.
    begin(&mut b, &[0, 3, 2, 1, 1], &[3, 2], true);
    let x = embedded(&mut b, &table);
    b.gather_outputs(&x, &mut out).unwrap();
    b.emit(&out).unwrap();
    b.collect(&mut outcome).unwrap();
    assert_eq!(outcome.rows[0].pooled.as_deref(), Some(&[6.0, 7.0, 8.0][..]));
    assert_eq!(outcome.rows[1].pooled.as_deref(), Some(&[3.0, 4.0, 5.0][..]));
}
