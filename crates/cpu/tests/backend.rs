//! The backend as a whole: against double precision, under every batch composition, and when something is wrong.
#![allow(clippy::unwrap_used)]

mod rig;

use mirai_cpu::simd::Isa;
use mirai_cpu::{CpuBackend, CpuOptions, default_threads};
use mirai_engine::{
    BlockAppend, BlockId, RowFault, SamplingParams, SlotId, SnapshotId, SnapshotSave, StepOutcome,
    TokenLogprobs,
};
use mirai_model::backend::{
    Activation, Backend, BackendError, CacheDtype, CacheLayout, GroupLayout, LogitsHead, Norm, NormKind,
    PageLayout, Pairing, RopeTable, Rows, StepShape, Storage, Stored, Visibility,
};
use rig::{Feed, Rig, Rng, Shape, log_softmax, tensor};

fn tokens(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.below(vocab) as u32).collect()
}

fn scored() -> SamplingParams {
    SamplingParams { logprobs: Some(3), prompt_logprobs: Some(2), ..SamplingParams::default() }
}

/// Runs one sequence alone or beside others, its prompt cut into chunks; returns drawn tokens and all
/// log-probabilities.
struct Scenario<'a> {
    shape: &'a Shape,
    threads: usize,
    isa: Option<Isa>,
    dtype: CacheDtype,
    chunk: usize,
    neighbours: usize,
}

impl Scenario<'_> {
    fn play(&self, prompt: &[u32], params: &SamplingParams, draws: usize) -> (Vec<u32>, Vec<TokenLogprobs>) {
        let mut rig = Rig::new(self.shape, self.threads, self.isa, self.dtype);
        let (mut drawn, mut logprobs) = (Vec::new(), Vec::new());
        for n in 0..self.neighbours {
            let other = tokens(100 + n as u64, 5 + 9 * n, self.shape.vocab - 1);
            rig.open(
                n as u32,
                &other,
                &SamplingParams { temperature: 1.0, seed: n as u64, ..Default::default() },
                0,
                &[],
            );
        }
        let slot = self.neighbours as u32;
        rig.open(slot, prompt, params, 2, &[]);
        let (mut done, mut steps) = (0, 0);
        while drawn.len() < draws {
            // Neighbour n brings its prompt in step n, and later draws in two steps of three.
            let mut feeds: Vec<Feed> = (0..slot)
                .filter(|&n| steps == n || (steps > n && (steps + n) % 3 != 2))
                .map(|n| Feed { slot: n, len: if steps == n { 5 + 9 * n as usize } else { 1 } })
                .collect();
            let len = if done < prompt.len() { self.chunk.min(prompt.len() - done) } else { 1 };
            done += len;
            let at = if steps % 2 == 0 { feeds.len() } else { 0 };
            feeds.insert(at, Feed { slot, len });
            let outcome = rig.step(&feeds);
            let row = &outcome.rows[at];
            assert_eq!(row.fault, None);
            drawn.extend(&outcome.tokens[row.tokens.start as usize..row.tokens.end as usize]);
            if let Some(l) = &row.logprobs {
                logprobs.extend(l.prompt.iter().cloned());
                logprobs.extend(l.drawn.iter().cloned());
            }
            steps += 1;
        }
        (drawn, logprobs)
    }
}

fn shapes() -> Vec<(&'static str, Shape)> {
    vec![
        ("odd", Shape::odd()),
        ("window", Shape { window: Some(19), ..Shape::odd() }),
        (
            "capped",
            Shape {
                soft_cap: Some(2.0),
                logit_cap: Some(5.0),
                activation: Activation::GeluTanh,
                ..Shape::odd()
            },
        ),
        (
            "plain",
            Shape {
                qk_norm: false,
                bias: false,
                q_heads: 3,
                kv_heads: 1,
                head_dim: 16,
                rotary_dim: 16,
                ..Shape::odd()
            },
        ),
        ("wide heads", Shape { head_dim: 80, q_heads: 2, kv_heads: 2, ..Shape::odd() }),
    ]
}

#[test]
fn agrees_with_double_precision() {
    for (name, shape) in shapes() {
        for (isa, chunk) in [(Isa::Portable, 64), (Isa::Avx2, 7), (Isa::Avx512Bf16Vnni, 33)] {
            let prompt = tokens(3, 64, shape.vocab - 1);
            let scenario = Scenario {
                shape: &shape,
                threads: 2,
                isa: Some(isa),
                dtype: CacheDtype::F32,
                chunk,
                neighbours: 1,
            };
            let (drawn, got) = scenario.play(&prompt, &scored(), 6);
            let all: Vec<u32> = prompt.iter().chain(&drawn).copied().collect();
            let oracle = Rig::new(&shape, 1, None, CacheDtype::F32).oracle(&all);
            assert_eq!(got.len(), all.len() - 1);
            for (position, entry) in got.iter().enumerate() {
                let want = log_softmax(&oracle[position]);
                assert_eq!(entry.token, all[position + 1], "{name}, {isa:?}");
                let error = (f64::from(entry.logprob) - want[entry.token as usize]).abs();
                assert!(error < 1e-4, "{name}, {isa:?}, position {position}: off by {error}");
                for (token, logprob) in &entry.top {
                    let error = (f64::from(*logprob) - want[*token as usize]).abs();
                    assert!(
                        error < 1e-4,
                        "{name}, {isa:?}, position {position}, token {token}: off by {error}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_wrong_window_is_seen() {
    let shape = Shape { window: Some(19), ..Shape::odd() };
    let other = Shape { window: Some(20), ..Shape::odd() };
    let prompt = tokens(3, 64, shape.vocab - 1);
    let run = |shape: &Shape| {
        Scenario { shape, threads: 1, isa: None, dtype: CacheDtype::F32, chunk: 64, neighbours: 0 }
            .play(&prompt, &scored(), 1)
            .1
    };
    let (a, b) = (run(&shape), run(&other));
    let worst = a.iter().zip(&b).map(|(a, b)| (a.logprob - b.logprob).abs()).fold(0.0, f32::max);
    assert!(worst > 1e-2, "a window off by one changes log-probabilities by {worst} only");
    assert_eq!(a[..18], b[..18], "before the window is full, nothing changes");
}

#[test]
fn neighbours_chunks_and_threads_change_no_bit() {
    let mut cases =
        vec![(Shape::odd(), CacheDtype::F32), (Shape { window: Some(21), ..Shape::odd() }, CacheDtype::Bf16)];
    for storage in [
        Storage::F16,
        Storage::Bf16,
        Storage::Q8_0,
        Storage::Q4K,
        Storage::Q4_0,
        Storage::Q4_1,
        Storage::Q5_0,
        Storage::Q5_1,
        Storage::Q2K,
        Storage::Q3K,
        Storage::Q5K,
        Storage::Q6K,
    ] {
        cases.push((Shape::blocks(storage), CacheDtype::Bf16));
    }
    for (shape, dtype) in &cases {
        let prompt = tokens(9, 50, shape.vocab - 1);
        let params = SamplingParams { temperature: 0.9, seed: 4, ..scored() };
        let play = |threads, chunk, neighbours| {
            Scenario { shape, threads, isa: None, dtype: *dtype, chunk, neighbours }.play(&prompt, &params, 8)
        };
        let alone = play(1, 50, 0);
        for (threads, chunk, neighbours) in [(2, 50, 0), (1, 7, 1), (2, 16, 4), (2, 1, 2), (3, 49, 4)] {
            let beside = play(threads, chunk, neighbours);
            assert_eq!(
                alone.0, beside.0,
                "{:?}: tokens, {threads} threads, chunks of {chunk}",
                shape.storage
            );
            for (position, (a, b)) in alone.1.iter().zip(&beside.1).enumerate() {
                assert_eq!(
                    a, b,
                    "{:?}: position {position}, {threads} threads, chunks of {chunk}, {neighbours} neighbours",
                    shape.storage
                );
            }
        }
    }
}

#[test]
fn isas_agree_within_rounding() {
    for storage in [Storage::Bf16, Storage::Q8_0, Storage::Q4K] {
        let shape = Shape::blocks(storage);
        let prompt = tokens(9, 30, shape.vocab - 1);
        let play = |isa| {
            Scenario {
                shape: &shape,
                threads: 1,
                isa: Some(isa),
                dtype: CacheDtype::F32,
                chunk: 30,
                neighbours: 0,
            }
            .play(&prompt, &scored(), 1)
            .1
        };
        let plain = play(Isa::Portable);
        for isa in [Isa::Avx2, Isa::Avx512Bf16Vnni] {
            for (a, b) in plain.iter().zip(&play(isa)) {
                assert!(
                    (a.logprob - b.logprob).abs() < 0.1,
                    "{storage:?}, {isa:?}: {} and {}",
                    a.logprob,
                    b.logprob
                );
            }
        }
    }
}

#[test]
fn a_preempted_sequence_goes_on_as_before() {
    let shape = Shape::odd();
    let prompt = tokens(21, 37, shape.vocab - 1);
    let params = SamplingParams {
        temperature: 1.0,
        seed: 5,
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: 0.2,
        bad_words: vec![vec![1, 2], vec![7]],
        ..Default::default()
    };
    let mut rig = Rig::new(&shape, 2, None, CacheDtype::Bf16);
    rig.open(3, &prompt, &params, 1, &[]);
    let mut whole = Vec::new();
    for step in 0..12 {
        whole.extend(rig.step(&[Feed { slot: 3, len: if step == 0 { 37 } else { 1 } }]).tokens);
    }
    let mut rig = Rig::new(&shape, 2, None, CacheDtype::Bf16);
    rig.open(0, &prompt, &params, 1, &whole[..5]);
    let mut rest = Vec::new();
    for step in 0..8 {
        let lens = [30, 12];
        rest.extend(rig.step(&[Feed { slot: 0, len: if step < 2 { lens[step] } else { 1 } }]).tokens);
    }
    assert_eq!(rest, whole[5..12]);
}

#[test]
fn what_is_wrong_with_one_row_leaves_the_others_alone() {
    let shape = Shape::odd();
    let prompt = tokens(31, 20, shape.vocab - 1);
    // Ids beyond the embedding table stand for any source of NaN in one sequence.
    let mut poisoned = prompt.clone();
    poisoned[11] = 100_000;
    let run = |bad: &[u32], params: &SamplingParams| {
        let mut rig = Rig::new(&shape, 2, None, CacheDtype::Bf16);
        rig.open(0, &prompt, &scored(), 0, &[]);
        rig.open(1, bad, params, 0, &[]);
        rig.open(2, &prompt, &scored(), 0, &[]);
        let feeds = [0, 1, 2].map(|slot| Feed { slot, len: 20 });
        let first = rig.step(&feeds);
        let second = rig.step(&[0, 2].map(|slot| Feed { slot, len: 1 }));
        // The slot of the failed sequence is as good as new.
        rig.open(1, &prompt, &scored(), 0, &[]);
        let third = rig.step(&[Feed { slot: 1, len: 20 }]);
        (first, second, third)
    };
    let (good, good2, good3) = run(&prompt, &scored());
    let nothing = SamplingParams { allowed_token_ids: Some(vec![]), ..scored() };
    let panicking = SamplingParams { logit_bias: vec![(5_000_000, 1.0)], ..scored() };
    for (bad, params) in [(&poisoned, &scored()), (&prompt, &nothing), (&prompt, &panicking)] {
        let (first, second, third) = run(bad, params);
        match first.rows[1].fault.as_ref().unwrap() {
            RowFault::NonFinite => assert_eq!(bad, &poisoned),
            RowFault::NothingAllowed => assert_eq!(params, &nothing),
            RowFault::Panic(text) => assert!(text.contains("5000000"), "{text}"),
        }
        assert!(first.rows[1].tokens.is_empty() && first.rows[1].logprobs.is_none());
        assert_eq!(first.tokens, [good.tokens[0], good.tokens[2]]);
        for (got, want) in [(&first.rows[0], &good.rows[0]), (&first.rows[2], &good.rows[2])] {
            assert_eq!((&got.logprobs, &got.fault), (&want.logprobs, &None));
        }
        assert_eq!(second.tokens, good2.tokens);
        assert_eq!(third.rows[0].logprobs, good3.rows[0].logprobs);
    }
}

#[test]
fn choices_of_one_seed_differ() {
    let shape = Shape::odd();
    let prompt = tokens(41, 10, shape.vocab - 1);
    let params = SamplingParams { temperature: 8.0, seed: 9, ..Default::default() };
    let mut rig = Rig::new(&shape, 1, None, CacheDtype::F32);
    for choice in 0..3 {
        rig.open(choice, &prompt, &params, choice, &[]);
    }
    let mut runs = vec![Vec::new(); 3];
    for step in 0..12 {
        let outcome = rig.step(&[0, 1, 2].map(|slot| Feed { slot, len: if step == 0 { 10 } else { 1 } }));
        for (run, token) in runs.iter_mut().zip(&outcome.tokens) {
            run.push(*token);
        }
    }
    assert!(runs[0] != runs[1] && runs[1] != runs[2] && runs[0] != runs[2], "{runs:?}");
}

#[test]
fn long_prompts_with_log_probabilities_go_in_pieces() {
    // More output rows than logits exist at once.
    let shape = Shape::odd();
    let prompt = tokens(51, 150, shape.vocab - 1);
    let play =
        |chunk| {
            Scenario { shape: &shape, threads: 2, isa: None, dtype: CacheDtype::F32, chunk, neighbours: 0 }
                .play(&prompt, &scored(), 1)
        };
    let whole = play(150);
    assert_eq!(whole.1.len(), 150);
    assert_eq!(whole, play(40));
}

fn message(error: &BackendError) -> String {
    error.to_string()
}

#[test]
fn plans_that_do_not_fit_are_errors_with_numbers() {
    let shape = Shape::odd();
    let prompt = tokens(61, 20, shape.vocab - 1);
    let mut rig = Rig::new(&shape, 1, None, CacheDtype::F32);
    rig.open(0, &prompt, &scored(), 0, &[]);
    let (plan, batch) = rig.plan(&[Feed { slot: 0, len: 20 }]);
    let mut refused = |change: &dyn Fn(&mut mirai_engine::StepPlan, &mut mirai_model::backend::Batch),
                       words: &str| {
        let (mut plan, mut batch) = (plan.clone(), batch.clone());
        change(&mut plan, &mut batch);
        let error = message(&rig.backend.begin(&plan, &batch).unwrap_err());
        assert!(error.contains(words), "`{error}` should say `{words}`");
    };
    refused(&|p, _| p.saves.push(SnapshotSave { slot: SlotId(0), snapshot: SnapshotId(4) }), "snapshot 4");
    refused(&|p, _| p.opens[0].restore = Some(SnapshotId(7)), "snapshot 7");
    refused(&|p, _| p.opens[0].slot = SlotId(99), "slot 99 of 16");
    refused(&|p, _| p.opens[0].blocks.truncate(1), "1 block tables for 2");
    refused(&|p, _| p.opens[0].blocks[0] = vec![BlockId(1); 11], "11 blocks");
    refused(&|p, _| p.opens[0].blocks[0][0] = BlockId(400), "block 400 of 400");
    let append = |group, index, block| BlockAppend { slot: SlotId(0), group, index, block: BlockId(block) };
    refused(&|p, _| p.appends.push(append(2, 0, 1)), "group 2 of 2");
    refused(&|p, _| p.appends.push(append(0, 10, 1)), "entry 10 of a block table of 10");
    refused(&|p, _| p.appends.push(append(0, 1, 400)), "block 400 of 400");
    refused(&|_, b| b.rows[0].slot = SlotId(16), "slot 16 of 16");
    refused(&|_, b| b.rows[0].len = 21, "20");
    refused(&|_, b| b.rows[0].start = 150, "position 150 of 160");
    refused(&|_, b| b.outputs.push(20), "token 20 of 20");
    refused(&|_, b| b.ids.truncate(3), "3 ids for 20");
    refused(&|_, b| b.rows.clear(), "0 rows for 1");
    // A sound plan still runs.
    let outcome = rig.run(&plan, &batch);
    assert_eq!(outcome.tokens.len(), 1);
    let error = rig.backend.collect(&mut StepOutcome::default()).unwrap_err();
    assert!(message(&error).contains("no step"), "{error}");
    for _ in 0..4 {
        rig.backend.begin(&plan, &batch).unwrap();
    }
    assert!(message(&rig.backend.begin(&plan, &batch).unwrap_err()).contains("4 steps"));
}

fn pages(dtype: CacheDtype) -> PageLayout {
    PageLayout { layers: 1, kv_heads: 1, key_dim: 2, value_dim: 2, stored: Stored::KeysAndValues, dtype }
}

#[test]
fn operations_check_their_widths() {
    let mut b = CpuBackend::new(&CpuOptions { threads: Some(1), ..Default::default() });
    let (w, _) = tensor("w", &[6, 4], &[0.5; 24], Storage::F32);
    let w = b.load_linear(vec![w]).unwrap();
    assert_eq!((w.rows(), w.columns()), (6, 4));
    assert!(w.bytes() >= 24 * 4 && format!("{w:?}").contains("[6, 4; 1 parts]"));
    let (three, _) = tensor("v", &[3], &[1.0; 3], Storage::F32);
    let three = b.load_vector(vec![three]).unwrap();
    let mut four = b.buffer(Rows::Tokens, 4).unwrap();
    let mut six = b.buffer(Rows::Tokens, 6).unwrap();
    let norm = Norm { kind: NormKind::Rms, weight: Some(three.clone()), bias: None, offset: 0.0, eps: 1e-6 };
    let fails = |result: Result<(), BackendError>, words: &str| {
        let error = message(&result.unwrap_err());
        assert!(error.contains(words), "`{error}` should say `{words}`");
    };
    fails(b.norm(&four, &norm, &mut six), "a norm of 3 over rows of 4");
    let mut other = b.buffer(Rows::Tokens, 4).unwrap();
    fails(b.add_norm(&mut six, &four, 1.0, &norm, &mut other), "rows of 4, expected 6");
    fails(b.linear(&w, None, &six, &mut four), "rows of 6, expected 4");
    let mut small = b.buffer(Rows::Tokens, 5).unwrap();
    fails(b.linear(&w, None, &four, &mut small), "rows of 6 into a buffer of 5");
    fails(b.glu(Activation::Silu, &small, &mut six), "rows of 5");
    fails(b.add(&mut six, &four, 1.0), "rows of 4, expected 6");
    let head = LogitsHead { weight: &w, scale: 1.0, soft_cap: None, vocab: 7 };
    fails(b.sample(&head, &six), "rows of 6, expected 4");
    fails(b.sample(&head, &four), "no step was begun");
    let spec = mirai_model::backend::AttentionSpec {
        group: 0,
        layer_in_group: 0,
        q_heads: 1,
        kv_heads: 1,
        appends: true,
        key_dim: 2,
        value_dim: 2,
        stored: Stored::KeysAndValues,
        visibility: Visibility::Causal,
        scale: 1.0,
        window: None,
        soft_cap: None,
    };
    fails(b.attention(&spec, None, &six, &mut four), "not allocated");
    let mut four = b.buffer(Rows::Tokens, 4).unwrap();
    let wide = mirai_model::backend::AttentionSpec { key_dim: 7, ..spec.clone() };
    fails(b.attention(&wide, None, &four, &mut six), "rows of 4");
    fails(b.append(&spec, None, None, &mut four), "rows of 4, 6 are needed");
    fails(b.append(&spec, None, None, &mut six), "not allocated");
    fails(b.gate(&four, 2, 4, &mut other), "4 gates at 2 of rows of 4");
    let clamped = Activation::ClampedSwiglu { alpha: 1.0, limit: 1.0 };
    fails(b.activate(clamped, &four, &mut other), "needs a gate");
    fails(b.emit(&four), "no step was begun");
    let table = RopeTable {
        rotary_dim: 4,
        pairing: Pairing::Halves,
        cos: vec![1.0; 6],
        sin: vec![0.0; 4],
        q_scale: Vec::new(),
    };
    assert!(message(&b.load_rope(&table).unwrap_err()).contains("6 cosines, 4 sines"));
    // A step of nothing is a step.
    let shape = StepShape { tokens: 0, outputs: 0, decode_only: false };
    b.run(shape, &mut |b| b.linear(&w, Some(&three), &four, &mut six)).unwrap();
    assert!(!b.is_asynchronous());
}

#[test]
fn weights_that_do_not_fit_are_errors_with_numbers() {
    let mut b = CpuBackend::new(&CpuOptions { threads: Some(1), ..Default::default() });
    let mut refused = |parts: Vec<mirai_model::backend::HostTensor<'_>>, words: &str| {
        let error = message(&b.load_linear(parts).unwrap_err());
        assert!(error.contains(words), "`{error}` should say `{words}`");
    };
    let good = |shape: &[usize]| tensor("good", shape, &vec![0.1; shape.iter().product()], Storage::F32).0;
    refused(vec![], "no tensors");
    refused(vec![good(&[4])], "two dimensions");
    refused(vec![good(&[2, 4]), good(&[2, 5])], "stacked with tensors of width 4");
    let mut short = good(&[2, 4]);
    short.bytes.to_mut().pop();
    refused(vec![short], "takes 32 bytes, 31 are there");
    let mut ragged = good(&[2, 33]);
    ragged.storage = Storage::Q8_0;
    refused(vec![ragged], "no multiple of 32");
    let mut empty = good(&[2, 4]);
    empty.shape = vec![0, 4];
    refused(vec![empty], "no elements");
    let (quantized, _) = tensor("norm", &[1, 32], &[0.5; 32], Storage::Q8_0);
    assert!(message(&b.load_vector(vec![quantized]).unwrap_err()).contains("vectors are"));
}

#[test]
fn stacked_parts_of_mixed_storage_multiply_as_each_alone() {
    let mut b = CpuBackend::new(&CpuOptions { threads: Some(2), ..Default::default() });
    let mut rng = Rng::new(8);
    let kinds = [Storage::Q4K, Storage::Q6K, Storage::Q6K, Storage::Bf16, Storage::F32, Storage::Q5_0];
    let rows = [40, 33, 3, 5, 64, 7];
    let parts: Vec<_> = kinds
        .iter()
        .zip(rows)
        .map(|(kind, rows)| tensor("part", &[rows, 256], &rng.values(rows * 256, 1.0), *kind))
        .collect();
    let values: Vec<f32> = parts.iter().flat_map(|p| p.1.clone()).collect();
    // An odd address: bytes of a file lie anywhere.
    let shifted: Vec<Vec<u8>> = parts.iter().map(|p| [&[0u8], &*p.0.bytes].concat()).collect();
    let tensors = parts.iter().zip(&shifted).map(|(p, bytes)| mirai_model::backend::HostTensor {
        bytes: std::borrow::Cow::Borrowed(&bytes[1..]),
        ..p.0.clone()
    });
    let w = b.load_linear(tensors.collect()).unwrap();
    assert_eq!(w.rows(), 152);
    // The table's rows come back through `embed`, the products through a step of several tokens.
    let layout = CacheLayout {
        groups: vec![GroupLayout::Paged(pages(CacheDtype::F32))],
        blocks: 4,
        slots: 1,
        snapshots: 0,
        table_len: 1,
    };
    b.allocate_cache(&layout).unwrap();
    let mut embedded = b.buffer(Rows::Tokens, 256).unwrap();
    let mut out = b.buffer(Rows::Tokens, 152).unwrap();
    let picks = [0u32, 41, 75, 80, 100, 151];
    let plan = mirai_engine::StepPlan::default();
    let batch = mirai_model::backend::Batch {
        ids: picks.to_vec(),
        positions: vec![0; picks.len()],
        ..Default::default()
    };
    b.begin(&plan, &batch).unwrap();
    b.embed(&w, 1.0, &mut embedded).unwrap();
    b.linear(&w, None, &embedded, &mut out).unwrap();
    let got = out.values(picks.len()).unwrap().to_vec();
    for (index, pick) in picks.iter().enumerate() {
        let x = &values[*pick as usize * 256..(*pick as usize + 1) * 256];
        assert_eq!(&embedded.values(picks.len()).unwrap()[index * 256..(index + 1) * 256], x, "row {pick}");
        let scale: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        for r in 0..152 {
            let w = &values[r * 256..(r + 1) * 256];
            let want: f64 = w.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let error = (f64::from(got[index * 152 + r]) - want).abs() / scale;
            assert!(error < 0.01, "row {pick}, output {r}: {} for {want}", got[index * 152 + r]);
        }
    }
    // One row alone gives the same bits.
    let alone = mirai_model::backend::Batch { ids: vec![picks[2]], positions: vec![0], ..Default::default() };
    b.begin(&plan, &alone).unwrap();
    b.embed(&w, 1.0, &mut embedded).unwrap();
    b.linear(&w, None, &embedded, &mut out).unwrap();
    assert_eq!(out.values(1).unwrap(), &got[2 * 152..3 * 152]);
}

#[test]
fn caches_that_cannot_be_are_refused() {
    let mut b = CpuBackend::new(&CpuOptions::default());
    let group =
        PageLayout { layers: 4, kv_heads: 8, key_dim: 128, value_dim: 128, ..pages(CacheDtype::Bf16) };
    let layout = |groups: &[PageLayout], blocks| CacheLayout {
        groups: groups.iter().map(|group| GroupLayout::Paged(*group)).collect(),
        blocks,
        slots: 1,
        snapshots: 0,
        table_len: 1,
    };
    let error = b.allocate_cache(&layout(&[group], 1 << 40)).unwrap_err();
    let BackendError::OutOfMemory { need, .. } = &error else { panic!("{error}") };
    assert_eq!(*need, group.page_bytes() as u64 * (1 << 40));
    let mixed = PageLayout { dtype: CacheDtype::F32, ..group };
    assert!(message(&b.allocate_cache(&layout(&[group, mixed], 2)).unwrap_err()).contains("group 1 is F32"));
    b.allocate_cache(&layout(&[], 0)).unwrap();
    assert_eq!(b.threads(), default_threads());
    assert!(Isa::ALL.contains(&b.isa()) && format!("{b:?}").contains("CpuBackend"));
}
