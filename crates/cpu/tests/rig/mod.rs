//! A small transformer over [`CpuBackend`], the same in double precision, and an engine just clever enough to
//! drive both.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    clippy::unwrap_used,
    reason = "each test file uses its part"
)]

mod oracle;

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use mirai_cpu::simd::Isa;
use mirai_cpu::{CpuBackend, CpuBuffer, CpuLinear, CpuOptions, CpuRope, CpuVector};
use mirai_engine::{
    BlockAppend, BlockId, Row, RowInput, RowOutput, SamplingParams, SeqId, SlotId, SlotOpen, StepOutcome,
    StepPlan,
};
use mirai_model::backend::{
    Activation, AttentionBlock, AttentionSpec, Backend, Batch, BatchRow, BlockIo, CacheDtype, CacheLayout,
    GroupLayout, HeadNorms, HostTensor, LogitsHead, MlpBlock, Norm, NormKind, PageLayout, Pairing, RopeTable,
    Rows, StepShape, Storage, Stored, Visibility,
};

pub use oracle::log_softmax;

/// Deterministic test data (Knuth's MMIX generator).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next()) * n as u64) >> 32) as usize
    }
    /// In `[-scale, scale)`.
    pub fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| (self.next() as f32 / 2_147_483_648.0 - 1.0) * scale).collect()
    }
}

/// A tensor in some storage, and the numbers it stands for.
pub fn tensor(
    name: &str,
    shape: &[usize],
    values: &[f32],
    storage: Storage,
) -> (HostTensor<'static>, Vec<f32>) {
    let (bytes, values): (Vec<u8>, Vec<f32>) = match storage {
        Storage::F32 => (values.iter().flat_map(|x| x.to_le_bytes()).collect(), values.to_vec()),
        Storage::F16 => {
            let half: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
            (half.iter().flat_map(|x| x.to_le_bytes()).collect(), half.iter().map(|x| x.to_f32()).collect())
        }
        Storage::Bf16 => {
            let half: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            (half.iter().flat_map(|x| x.to_le_bytes()).collect(), half.iter().map(|x| x.to_f32()).collect())
        }
        quantized => {
            let source = Tensor::from_slice(values, shape.to_vec(), &Device::Cpu).unwrap();
            let quantized = QTensor::quantize(&source, ggml(quantized)).unwrap();
            let back = quantized.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            (quantized.data().unwrap().into_owned(), back)
        }
    };
    let bytes = Cow::Owned(bytes);
    (HostTensor { name: name.to_owned(), shape: shape.to_vec(), storage, bytes, scales: None }, values)
}

fn ggml(storage: Storage) -> GgmlDType {
    match storage {
        Storage::Q4_0 => GgmlDType::Q4_0,
        Storage::Q4_1 => GgmlDType::Q4_1,
        Storage::Q5_0 => GgmlDType::Q5_0,
        Storage::Q5_1 => GgmlDType::Q5_1,
        Storage::Q8_0 => GgmlDType::Q8_0,
        Storage::Q2K => GgmlDType::Q2K,
        Storage::Q3K => GgmlDType::Q3K,
        Storage::Q4K => GgmlDType::Q4K,
        Storage::Q5K => GgmlDType::Q5K,
        Storage::Q6K => GgmlDType::Q6K,
        _ => unreachable!("plain, or with scales"),
    }
}

/// Shape and peculiarities of the test's model.
#[derive(Clone, Debug)]
pub struct Shape {
    pub hidden: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rotary_dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub window: Option<u32>,
    pub soft_cap: Option<f32>,
    pub qk_norm: bool,
    pub bias: bool,
    pub activation: Activation,
    pub storage: Storage,
    pub logit_cap: Option<f32>,
}

impl Shape {
    /// Odd sizes everywhere.
    pub fn odd() -> Self {
        Self {
            hidden: 41,
            q_heads: 6,
            kv_heads: 2,
            head_dim: 10,
            rotary_dim: 6,
            ffn: 37,
            vocab: 131,
            window: None,
            soft_cap: None,
            qk_norm: true,
            bias: true,
            activation: Activation::Silu,
            storage: Storage::F32,
            logit_cap: None,
        }
    }

    /// Sizes that every block format can hold.
    pub fn blocks(storage: Storage) -> Self {
        Self {
            hidden: 256,
            q_heads: 8,
            kv_heads: 2,
            head_dim: 32,
            rotary_dim: 32,
            ffn: 256,
            vocab: 200,
            qk_norm: false,
            bias: false,
            storage,
            ..Self::odd()
        }
    }
}

struct Matrix {
    w: CpuLinear,
    values: Vec<f32>,
    rows: usize,
}

struct Layer {
    attn_norm: Norm<CpuVector>,
    mlp_norm: Norm<CpuVector>,
    qkv: Matrix,
    qkv_bias: Option<(CpuVector, Vec<f32>)>,
    q_norm: Norm<CpuVector>,
    k_norm: Norm<CpuVector>,
    output: Matrix,
    gate_up: Matrix,
    down: Matrix,
    spec: AttentionSpec,
    norms: [Vec<f32>; 4],
}

struct Buffers {
    residual: CpuBuffer,
    normed: CpuBuffer,
    /// The blocks' scratch.
    scratch: [CpuBuffer; 3],
    out: CpuBuffer,
    last: CpuBuffer,
}

/// The model on a backend.
pub struct Rig {
    pub backend: CpuBackend,
    shape: Shape,
    embed: Matrix,
    layers: Vec<Layer>,
    rope: CpuRope,
    table: RopeTable,
    buffers: Buffers,
    sequences: Vec<Option<Sequence>>,
    next_block: u32,
    step: u64,
}

/// What the small engine knows of a slot.
struct Sequence {
    prompt: Arc<[u32]>,
    params: Arc<SamplingParams>,
    choice: u32,
    output: Vec<u32>,
    computed: usize,
    blocks: usize,
    opened: bool,
}

/// A row of a step: `len` tokens of the slot's sequence, or its last drawn one.
#[derive(Clone, Copy, Debug)]
pub struct Feed {
    pub slot: u32,
    pub len: usize,
}

pub const EPS: f32 = 1e-6;
const LAYERS: usize = 2;
pub const CONTEXT: usize = 160;

impl Rig {
    pub fn new(shape: &Shape, threads: usize, isa: Option<Isa>, dtype: CacheDtype) -> Self {
        let options = CpuOptions { threads: Some(threads), isa, poison_cache: true };
        let mut backend = CpuBackend::new(&options);
        let mut rng = Rng::new(77);
        let s = shape.clone();
        let mut matrix = |backend: &mut CpuBackend, rows: &[usize], columns: usize, gain: f32| {
            let mut parts = Vec::new();
            let mut all = Vec::new();
            for rows in rows {
                let values = rng.values(rows * columns, gain * (3.0 / columns as f32).sqrt());
                let (part, values) = tensor("w", &[*rows, columns], &values, s.storage);
                parts.push(part);
                all.extend(values);
            }
            Matrix { w: backend.load_linear(parts).unwrap(), values: all, rows: rows.iter().sum() }
        };
        let embed = matrix(&mut backend, &[s.vocab], s.hidden, 4.0);
        let mut small = Rng::new(5);
        let mut vector = |backend: &mut CpuBackend, n: usize, scale: f32| {
            let (part, values) = tensor("v", &[n], &small.values(n, scale), Storage::F32);
            (backend.load_vector(vec![part]).unwrap(), values)
        };
        let (q, kv) = (s.q_heads * s.head_dim, s.kv_heads * s.head_dim);
        let layers = (0..LAYERS)
            .map(|index| {
                let mut norm = |n: usize, backend: &mut CpuBackend| {
                    let (weight, values) = vector(backend, n, 0.3);
                    (
                        Norm { kind: NormKind::Rms, weight: Some(weight), bias: None, offset: 1.0, eps: EPS },
                        values,
                    )
                };
                let (attn_norm, n0) = norm(s.hidden, &mut backend);
                let (mlp_norm, n1) = norm(s.hidden, &mut backend);
                let (q_norm, n2) = norm(s.head_dim, &mut backend);
                let (k_norm, n3) = norm(s.head_dim, &mut backend);
                Layer {
                    attn_norm,
                    mlp_norm,
                    q_norm,
                    k_norm,
                    qkv: matrix(&mut backend, &[q, kv, kv], s.hidden, 2.0),
                    qkv_bias: s.bias.then(|| vector(&mut backend, q + 2 * kv, 0.5)),
                    output: matrix(&mut backend, &[s.hidden], q, 1.0),
                    gate_up: matrix(&mut backend, &[s.ffn, s.ffn], s.hidden, 1.0),
                    down: matrix(&mut backend, &[s.hidden], s.ffn, 1.0),
                    spec: AttentionSpec {
                        group: index % 2,
                        layer_in_group: index / 2,
                        q_heads: s.q_heads,
                        kv_heads: s.kv_heads,
                        appends: true,
                        key_dim: s.head_dim,
                        value_dim: s.head_dim,
                        stored: Stored::KeysAndValues,
                        visibility: Visibility::Causal,
                        scale: 1.0 / (s.head_dim as f32).sqrt(),
                        window: if index == 1 { s.window } else { None },
                        soft_cap: s.soft_cap,
                    },
                    norms: [n0, n1, n2, n3],
                }
            })
            .collect();
        let half = s.rotary_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
        let table = RopeTable {
            rotary_dim: s.rotary_dim,
            pairing: Pairing::Halves,
            q_scale: Vec::new(),
            cos: (0..CONTEXT * half).map(|i| angle(i).cos()).collect(),
            sin: (0..CONTEXT * half).map(|i| angle(i).sin()).collect(),
        };
        let rope = backend.load_rope(&table).unwrap();
        let wide = (q + 2 * kv).max(2 * s.ffn);
        let mut buffer = |rows, width| backend.buffer(rows, width).unwrap();
        let buffers = Buffers {
            residual: buffer(Rows::Tokens, s.hidden),
            normed: buffer(Rows::Tokens, s.hidden),
            scratch: [
                buffer(Rows::Tokens, wide),
                buffer(Rows::Tokens, q.max(s.ffn)),
                buffer(Rows::Tokens, 1),
            ],
            out: buffer(Rows::Tokens, s.hidden),
            last: buffer(Rows::Outputs, s.hidden),
        };
        let group = GroupLayout::Paged(PageLayout {
            layers: 1,
            kv_heads: s.kv_heads,
            key_dim: s.head_dim,
            value_dim: s.head_dim,
            stored: Stored::KeysAndValues,
            dtype,
        });
        let layout = CacheLayout {
            groups: vec![group; LAYERS],
            blocks: 400,
            slots: 16,
            snapshots: 0,
            table_len: CONTEXT / 16,
        };
        backend.allocate_cache(&layout).unwrap();
        let sequences = (0..layout.slots).map(|_| None).collect();
        Self { backend, shape: s, embed, layers, rope, table, buffers, sequences, next_block: 1, step: 0 }
    }

    /// Gives a slot to a new sequence, opened with its first row.
    pub fn open(&mut self, slot: u32, prompt: &[u32], params: &SamplingParams, choice: u32, output: &[u32]) {
        self.sequences[slot as usize] = Some(Sequence {
            prompt: prompt.into(),
            params: Arc::new(params.clone()),
            choice,
            output: output.to_vec(),
            computed: 0,
            blocks: 0,
            opened: false,
        });
    }

    /// Runs a step; the outcome's tokens are recorded in the sequences.
    pub fn step(&mut self, feeds: &[Feed]) -> StepOutcome {
        let (plan, batch) = self.plan(feeds);
        let outcome = self.run(&plan, &batch);
        assert_eq!(outcome.step, plan.step);
        for (feed, row) in feeds.iter().zip(&outcome.rows) {
            let sequence = self.sequences[feed.slot as usize].as_mut().unwrap();
            let range = row.tokens.start as usize..row.tokens.end as usize;
            sequence.output.extend(&outcome.tokens[range]);
        }
        outcome
    }

    /// The plan of a step, with the blocks it needs.
    pub fn plan(&mut self, feeds: &[Feed]) -> (StepPlan, Batch) {
        self.step += 1;
        let mut plan = StepPlan { step: self.step, ..StepPlan::default() };
        let mut batch = Batch::default();
        for feed in feeds {
            let sequence = self.sequences[feed.slot as usize].as_mut().unwrap();
            let slot = SlotId(feed.slot);
            let start = sequence.computed;
            let known = sequence.prompt.len() + sequence.output.len();
            let mut blocks = Vec::new();
            while sequence.blocks * 16 < start + feed.len {
                // Scattered, so that the order of blocks is not the order of memory.
                blocks.push(BlockId(1 + (self.next_block * 97) % 399));
                self.next_block += 1;
                sequence.blocks += 1;
            }
            let second = |b: &BlockId| BlockId(1 + (b.0 + 199 - 1) % 399);
            if sequence.opened {
                for (i, block) in blocks.iter().enumerate() {
                    let index = (sequence.blocks - blocks.len() + i) as u32;
                    plan.appends.push(BlockAppend { slot, group: 0, index, block: *block });
                    plan.appends.push(BlockAppend { slot, group: 1, index, block: second(block) });
                }
            } else {
                sequence.opened = true;
                plan.opens.push(SlotOpen {
                    slot,
                    seq: SeqId(u64::from(feed.slot)),
                    choice: sequence.choice,
                    sampling: sequence.params.clone(),
                    prompt: sequence.prompt.clone(),
                    output: sequence.output.clone(),
                    computed: 0,
                    blocks: vec![blocks.clone(), blocks.iter().map(second).collect()],
                    restore: None,
                });
            }
            let drawn = feed.len == 1 && start + 1 == known && !sequence.output.is_empty();
            let sample = start + feed.len == known;
            let first = batch.ids.len();
            let token = |p: usize| match p.checked_sub(sequence.prompt.len()) {
                None => sequence.prompt[p],
                Some(p) => sequence.output[p],
            };
            for p in start..start + feed.len {
                batch.ids.push(if drawn { u32::MAX } else { token(p) });
                batch.positions.push(p as u32);
            }
            let from = batch.outputs.len();
            if sequence.params.prompt_logprobs.is_some() {
                batch.outputs.extend((first..first + feed.len).map(|t| t as u32));
            } else if sample {
                batch.outputs.push((first + feed.len - 1) as u32);
            }
            sequence.computed += feed.len;
            batch.rows.push(BatchRow {
                slot,
                first,
                len: feed.len,
                start,
                last_drawn: drawn,
                sample,
                pool: false,
                outputs: (from, batch.outputs.len()),
            });
            plan.rows.push(Row {
                seq: SeqId(u64::from(feed.slot)),
                slot,
                start: start as u32,
                len: feed.len as u32,
                input: if drawn { RowInput::LastDrawn } else { RowInput::Tokens(first as u32) },
                output: if sample { RowOutput::Sample } else { RowOutput::Nothing },
            });
        }
        plan.tokens = batch.ids.clone();
        (plan, batch)
    }

    /// Submits and collects.
    pub fn run(&mut self, plan: &StepPlan, batch: &Batch) -> StepOutcome {
        self.backend.begin(plan, batch).unwrap();
        self.forward(batch);
        let mut outcome = StepOutcome::default();
        self.backend.collect(&mut outcome).unwrap();
        outcome
    }

    fn forward(&mut self, batch: &Batch) {
        let shape = StepShape {
            tokens: batch.ids.len(),
            outputs: batch.outputs.len(),
            decode_only: batch.rows.iter().all(|r| r.len == 1),
        };
        let Self { backend, embed, layers, rope, buffers: b, shape: s, .. } = self;
        let head = LogitsHead { weight: &embed.w, scale: 1.0, soft_cap: s.logit_cap, vocab: s.vocab - 1 };
        backend
            .run(shape, &mut |backend| {
                backend.embed(&embed.w, 1.5, &mut b.residual)?;
                backend.norm(&b.residual, &layers[0].attn_norm, &mut b.normed)?;
                for (index, layer) in layers.iter().enumerate() {
                    let io = BlockIo { x: &b.normed, scratch: &mut b.scratch, out: &mut b.out };
                    let block = AttentionBlock {
                        spec: &layer.spec,
                        qkv: &layer.qkv.w,
                        qkv_bias: layer.qkv_bias.as_ref().map(|b| &b.0),
                        norms: s.qk_norm.then_some(HeadNorms {
                            q: &layer.q_norm,
                            k: Some(&layer.k_norm),
                            v: None,
                            across_heads: false,
                        }),
                        rope: Some(rope),
                        sinks: None,
                        gated: false,
                        shared_dim: None,
                        output: &layer.output.w,
                        output_bias: None,
                    };
                    backend.attention_block(&block, io)?;
                    backend.add_norm(&mut b.residual, &b.out, 1.0, &layer.mlp_norm, &mut b.normed)?;
                    let io = BlockIo { x: &b.normed, scratch: &mut b.scratch, out: &mut b.out };
                    let block = MlpBlock {
                        gate_up: &layer.gate_up.w,
                        gate_up_bias: None,
                        activation: s.activation,
                        gated: true,
                        down: &layer.down.w,
                        down_bias: None,
                    };
                    backend.mlp_block(&block, io)?;
                    match layers.get(index + 1) {
                        Some(next) => {
                            backend.add_norm(&mut b.residual, &b.out, 1.0, &next.attn_norm, &mut b.normed)?;
                        }
                        None => backend.add(&mut b.residual, &b.out, 1.0)?,
                    }
                }
                backend.gather_outputs(&b.residual, &mut b.last)
            })
            .unwrap();
        backend.sample(&head, &b.last).unwrap();
    }
}
