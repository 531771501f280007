//! Times the kernels of a whole step of the SmolLM2-135M shape (hidden 576, 30 layers, 9 query and 3 kv heads of 64,
//! feed-forward 1,536, vocabulary 49,152, tied head) with random weights, and the memory's read bandwidth.
//!
//! It sums what a step costs in matrix products, attention, norms and gates, without a model around them:
//! `cargo bench -p mirai-cpu --bench step -- [threads] [context]`. Best of several runs: on a shared machine the least
//! disturbed run says most about the code.
#![allow(missing_docs, clippy::print_stdout)]

use half::bf16;
use mirai_cpu::pool::Pool;
use mirai_cpu::simd::ops::{self, Activation, Glu, Heads, NormParams, Pairs, RopeTables};
use mirai_cpu::simd::{
    AttnParams, AttnRow, Isa, KvData, KvDataMut, KvLayout, KvView, KvViewMut, PackedMatrix, Scratch,
    kv_append, paged_attention,
};
use std::time::{Duration, Instant};

const HIDDEN: usize = 576;
const LAYERS: usize = 30;
const Q_HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const FFN: usize = 1536;
const VOCAB: usize = 49_152;
const QKV: usize = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM;

/// Storages to measure.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Bf16,
    Q8_0,
}

struct Layer {
    qkv: PackedMatrix,
    output: PackedMatrix,
    gate_up: PackedMatrix,
    down: PackedMatrix,
}

/// Small pseudo-random weights; their values do not matter, but denormals and infinities would.
fn weight(kind: Kind, n: usize, k: usize, isa: Isa) -> PackedMatrix {
    let mut state = (n * 31 + k) as u32;
    let data: Vec<f32> = (0..n * k)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 0.1 - 0.05
        })
        .collect();
    match kind {
        Kind::Bf16 => {
            let data: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
            PackedMatrix::from_bf16(&data, n, k, isa)
        }
        Kind::Q8_0 => PackedMatrix::quantize_q8_0(&data, n, k, isa),
    }
    .expect("the shape is made of whole blocks")
}

/// Times of the parts of one step.
#[derive(Clone, Copy, Default)]
struct Times {
    matmul: Duration,
    head: Duration,
    attention: Duration,
    rest: Duration,
}

impl Times {
    fn total(self) -> Duration {
        self.matmul + self.head + self.attention + self.rest
    }
}

struct Model {
    pool: Pool,
    isa: Isa,
    layers: Vec<Layer>,
    head: PackedMatrix,
    cache: Vec<bf16>,
    pages: usize,
    scratch: Scratch,
}

impl Model {
    fn new(kind: Kind, threads: usize, tokens: usize) -> Self {
        let isa = Isa::detect();
        let layer = || Layer {
            qkv: weight(kind, QKV, HIDDEN, isa),
            output: weight(kind, HIDDEN, Q_HEADS * HEAD_DIM, isa),
            gate_up: weight(kind, 2 * FFN, HIDDEN, isa),
            down: weight(kind, HIDDEN, FFN, isa),
        };
        let pages = tokens.div_ceil(16);
        let layers = (0..LAYERS).map(|_| layer()).collect();
        let head = weight(kind, VOCAB, HIDDEN, isa);
        let cache = vec![bf16::ZERO; pages * LAYERS * 2 * KV_HEADS * 16 * HEAD_DIM];
        Self { pool: Pool::new(threads), isa, layers, head, cache, pages, scratch: Scratch::default() }
    }

    /// One step: `rows` sequences of `q_len` tokens each, whose last token sees `kv_len` keys.
    fn step(&mut self, rows: usize, q_len: usize, kv_len: usize, times: &mut Times) {
        let m = rows * q_len;
        let per_row = kv_len.div_ceil(16);
        assert!(rows * per_row <= self.pages, "{rows} rows of {per_row} pages, {} exist", self.pages);
        let table: Vec<u32> = (0..(rows * per_row) as u32).collect();
        let attn_rows: Vec<AttnRow<'_>> = (0..rows)
            .map(|r| AttnRow {
                q_start: r * q_len,
                q_len,
                kv_len,
                table: &table[r * per_row..(r + 1) * per_row],
            })
            .collect();
        let positions: Vec<u32> = (0..m).map(|t| (kv_len - q_len + t % q_len) as u32).collect();
        let cosines = vec![0.6; (kv_len + 1) * HEAD_DIM / 2];
        let sines = vec![0.8; (kv_len + 1) * HEAD_DIM / 2];
        let tables = RopeTables {
            rotary_dim: HEAD_DIM,
            pairs: Pairs::Apart(HEAD_DIM / 2),
            cos: &cosines,
            sin: &sines,
        };
        let ones = vec![1.0; HIDDEN];
        let norm = NormParams { center: false, weight: Some(&ones), bias: None, offset: 0.0, eps: 1e-5 };
        let mut x = vec![0.5_f32; m * HIDDEN];
        let (mut normed, mut qkv) = (vec![0.0; m * HIDDEN], vec![0.0; m * QKV]);
        let (mut attn, mut proj) = (vec![0.0; m * HIDDEN], vec![0.0; m * HIDDEN]);
        let (mut wide, mut inner) = (vec![0.0; m * 2 * FFN], vec![0.0; m * FFN]);
        let mut logits = vec![0.0; rows * VOCAB];
        let part = 2 * KV_HEADS * 16 * HEAD_DIM;
        let heads = |first, heads| Heads { stride: QKV, first, heads, head_dim: HEAD_DIM };
        let (q, k) = (heads(0, Q_HEADS), heads(Q_HEADS * HEAD_DIM, KV_HEADS));
        let v = heads((Q_HEADS + KV_HEADS) * HEAD_DIM, KV_HEADS);
        let params = AttnParams {
            q_heads: Q_HEADS,
            scale: 0.125,
            causal: true,
            window: None,
            soft_cap: None,
            sinks: None,
        };
        let (pool, isa) = (&self.pool, self.isa);
        let mut at = Instant::now();
        let mut lap = |part: &mut Duration| {
            let now = Instant::now();
            *part += now - at;
            at = now;
        };
        for (l, layer) in self.layers.iter().enumerate() {
            ops::add_norm(pool, isa, &mut x, (&proj, 1.0), HIDDEN, norm, &mut normed);
            lap(&mut times.rest);
            layer.qkv.matmul(pool, &normed, m, &mut qkv, &mut self.scratch);
            lap(&mut times.matmul);
            ops::rope(pool, isa, &mut qkv, q, &positions, tables);
            ops::rope(pool, isa, &mut qkv, k, &positions, tables);
            let layout = KvLayout {
                kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                v_head_dim: HEAD_DIM,
                value_in_key: false,
                first: l * part,
                page_stride: LAYERS * part,
            };
            let mut view = KvViewMut { data: KvDataMut::Bf16(&mut self.cache), layout };
            for row in &attn_rows {
                let tokens = row.q_start..row.q_start + q_len;
                kv_append(&mut view, (&qkv, k), Some((&qkv, v)), tokens, kv_len - q_len, row.table);
            }
            lap(&mut times.rest);
            let view = KvView { data: KvData::Bf16(&self.cache), layout };
            paged_attention(pool, isa, &qkv, q, view, &attn_rows, &params, &mut attn);
            lap(&mut times.attention);
            layer.output.matmul(pool, &attn, m, &mut proj, &mut self.scratch);
            lap(&mut times.matmul);
            ops::add_norm(pool, isa, &mut x, (&proj, 1.0), HIDDEN, norm, &mut normed);
            lap(&mut times.rest);
            layer.gate_up.matmul(pool, &normed, m, &mut wide, &mut self.scratch);
            lap(&mut times.matmul);
            ops::glu(pool, isa, Glu::Gated(Activation::Silu), &wide, FFN, &mut inner);
            lap(&mut times.rest);
            layer.down.matmul(pool, &inner, m, &mut proj, &mut self.scratch);
            lap(&mut times.matmul);
        }
        // Logits of the last token of each row.
        self.head.matmul(pool, &normed[..rows * HIDDEN], rows, &mut logits, &mut self.scratch);
        lap(&mut times.head);
        std::hint::black_box(&logits);
    }
}

/// Bytes per second that all threads together read from a buffer far larger than the caches near them.
fn read_bandwidth(threads: usize) -> f64 {
    let pool = Pool::new(threads);
    let data = vec![1_u64; (1 << 30) / 8];
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        pool.chunks(data.len(), 1 << 17, &|_, range| {
            let (lines, _) = data[range].as_chunks::<32>();
            let mut sums = [0_u64; 32];
            for line in lines {
                for (sum, v) in sums.iter_mut().zip(line) {
                    *sum ^= v;
                }
            }
            std::hint::black_box(sums);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (1_u64 << 30) as f64 / best
}

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let threads = numbers.first().copied().unwrap_or(2);
    let context = numbers.get(1).copied().unwrap_or(192);
    println!("{:?}, {threads} threads, context {context}", Isa::detect());
    println!("read bandwidth {:.1} GB/s", read_bandwidth(threads) / 1e9);
    for kind in [Kind::Bf16, Kind::Q8_0] {
        let mut model = Model::new(kind, threads, (32 * (context + 16)).max(512));
        let bytes: usize = model.head.bytes()
            + model
                .layers
                .iter()
                .map(|l| l.qkv.bytes() + l.output.bytes() + l.gate_up.bytes() + l.down.bytes())
                .sum::<usize>();
        println!("{kind:?}: {:.0} MB of weights", bytes as f64 / 1e6);
        for (rows, q_len, kv_len, runs) in
            [(1, 1, context, 40), (8, 1, context, 20), (32, 1, context, 10), (1, 512, 512, 5)]
        {
            let mut best = Times { matmul: Duration::MAX / 8, ..Times::default() };
            for _ in 0..runs {
                let mut times = Times::default();
                model.step(rows, q_len, kv_len, &mut times);
                if times.total() < best.total() {
                    best = times;
                }
            }
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            let total = best.total().as_secs_f64();
            println!(
                "  {:>3} x {q_len:>3}: {:>8.1} tokens/s, {:>7.2} ms (matmul {:.2}, head {:.2}, attention {:.2}, rest {:.2}), weights at {:.1} GB/s",
                rows,
                (rows * q_len) as f64 / total,
                total * 1e3,
                ms(best.matmul),
                ms(best.head),
                ms(best.attention),
                ms(best.rest),
                bytes as f64 / total / 1e9,
            );
        }
    }
}
