//! Paged attention against an f64 reference, its independence of batch and threads, and the cache's layout.

use super::super::ops::Heads;
use super::super::{
    AttnParams, AttnRow, Isa, KvData, KvDataMut, KvLayout, KvView, KvViewMut, kv_append, paged_attention,
};
use super::{Rng, assert_close, bits, isas};
use crate::pool::Pool;
use half::bf16;

/// Shapes of a layer.
#[derive(Clone, Copy, Debug)]
struct Shape {
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
    v_dim: usize,
    /// Values are the beginnings of the keys.
    shared: bool,
}

/// One sequence: its keys and values in order, and its pages.
struct Sequence {
    k: Vec<f32>,
    v: Vec<f32>,
    table: Vec<u32>,
    len: usize,
}

/// A cache with some sequences whose pages are shuffled.
struct World {
    shape: Shape,
    layout: KvLayout,
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    sequences: Vec<Sequence>,
}

impl World {
    fn new(rng: &mut Rng, shape: Shape, lens: &[usize]) -> Self {
        let Shape { kv_heads, dim, v_dim, shared, .. } = shape;
        let elements = kv_heads * 16 * (dim + if shared { 0 } else { v_dim });
        // A gap before and between the layers' parts, to see that strides are honoured.
        let layout = KvLayout {
            kv_heads,
            head_dim: dim,
            v_head_dim: v_dim,
            value_in_key: shared,
            first: 5,
            page_stride: elements + 3,
        };
        assert_eq!(layout.page_elements(), elements);
        let pages: usize = lens.iter().map(|len| len.div_ceil(16)).sum();
        let mut free: Vec<u32> = (0..pages as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, rng.below(i + 1));
        }
        // What nobody wrote must not matter.
        let size = 5 + pages * layout.page_stride;
        let (mut f32s, mut bf16s) = (vec![f32::NAN; size], vec![bf16::NAN; size]);
        let mut sequences = Vec::new();
        for &len in lens {
            let table = free.split_off(free.len() - len.div_ceil(16));
            let exact = |v: Vec<f32>| v.into_iter().map(|v| bf16::from_f32(v).to_f32()).collect::<Vec<_>>();
            let k = exact(rng.normals(len * kv_heads * dim));
            let v = if shared {
                k.chunks(dim).flat_map(|k| &k[..v_dim]).copied().collect()
            } else {
                exact(rng.normals(len * kv_heads * v_dim))
            };
            let (hk, hv) = (Heads::contiguous(kv_heads, dim), Heads::contiguous(kv_heads, v_dim));
            // In two parts, as a chunked prefill writes it.
            let cut = rng.below(len);
            for part in [0..cut, cut..len] {
                let start = part.start;
                let mut view = KvViewMut { data: KvDataMut::F32(&mut f32s), layout };
                kv_append(&mut view, (&k, hk), (!shared).then_some((&v, hv)), part.clone(), start, &table);
                let mut view = KvViewMut { data: KvDataMut::Bf16(&mut bf16s), layout };
                kv_append(&mut view, (&k, hk), (!shared).then_some((&v, hv)), part, start, &table);
            }
            sequences.push(Sequence { k, v, table, len });
        }
        Self { shape, layout, f32s, bf16s, sequences }
    }

    fn view(&self, half: bool) -> KvView<'_> {
        let data = if half { KvData::Bf16(&self.bf16s) } else { KvData::F32(&self.f32s) };
        KvView { data, layout: self.layout }
    }

    /// Runs `rows` = (sequence, query tokens, keys) over the queries.
    fn run(
        &self,
        (pool, isa, half): (&Pool, Isa, bool),
        q: &[f32],
        rows: &[(usize, usize, usize)],
        params: &AttnParams<'_>,
    ) -> Vec<f32> {
        let mut q_start = 0;
        let rows: Vec<AttnRow<'_>> = rows
            .iter()
            .map(|&(s, q_len, kv_len)| {
                let row = AttnRow { q_start, q_len, kv_len, table: &self.sequences[s].table };
                q_start += q_len;
                row
            })
            .collect();
        let mut out = vec![f32::NAN; q_start * self.shape.q_heads * self.shape.v_dim];
        let heads = Heads::contiguous(self.shape.q_heads, self.shape.dim);
        paged_attention(pool, isa, q, heads, self.view(half), &rows, params, &mut out);
        out
    }

    /// One query head of one token in f64.
    fn reference(
        &self,
        s: usize,
        q: &[f32],
        head: usize,
        (position, kv_len): (usize, usize),
        p: &AttnParams<'_>,
    ) -> Vec<f64> {
        let Shape { q_heads, kv_heads, dim, v_dim, .. } = self.shape;
        let (sequence, kv) = (&self.sequences[s], head / (q_heads / kv_heads));
        let to = if p.causal { position + 1 } else { kv_len };
        let from = p.window.map_or(0, |n| (position + 1).saturating_sub(n));
        let score = |key: usize| {
            let k = &sequence.k[(key * kv_heads + kv) * dim..][..dim];
            let dot: f64 = q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let dot = dot * f64::from(p.scale);
            p.soft_cap.map_or(dot, |cap| f64::from(cap) * (dot / f64::from(cap)).tanh())
        };
        let weights: Vec<f64> = (from..to).map(|key| score(key).exp()).collect();
        let sink = p.sinks.map_or(0.0, |sinks| f64::from(sinks[head]).exp());
        let sum: f64 = weights.iter().sum::<f64>() + sink;
        let value = |d: usize, key: usize| f64::from(sequence.v[(key * kv_heads + kv) * v_dim + d]);
        (0..v_dim)
            .map(|d| weights.iter().zip(from..to).map(|(w, key)| w * value(d, key)).sum::<f64>() / sum)
            .collect()
    }
}

fn params(shape: Shape) -> AttnParams<'static> {
    AttnParams {
        q_heads: shape.q_heads,
        scale: 1.0 / (shape.dim as f32).sqrt(),
        causal: true,
        window: None,
        soft_cap: None,
        sinks: None,
    }
}

/// Compares a ragged batch over several sequences with the reference.
fn check(rng: &mut Rng, shape: Shape, p: &AttnParams<'_>, what: &str) {
    let world = World::new(rng, shape, &[300, 1, 17, 129]);
    // Decode, first token, a chunk in the middle, a whole prompt.
    let rows = [(0, 1, 300), (1, 1, 1), (2, 5, 12), (3, 129, 129), (0, 9, 150)];
    let tokens: usize = rows.iter().map(|r| r.1).sum();
    let width = shape.q_heads * shape.dim;
    let q = rng.normals(tokens * width);
    let pool = Pool::new(2);
    let mut want = Vec::new();
    for &(s, q_len, kv_len) in &rows {
        assert!(kv_len <= world.sequences[s].len);
        for i in 0..q_len {
            let at = want.len() / (shape.q_heads * shape.v_dim) * width;
            let position = (kv_len - q_len + i, kv_len);
            let heads = q[at..at + width].chunks(shape.dim).enumerate();
            let heads: Vec<f64> =
                heads.flat_map(|(head, q)| world.reference(s, q, head, position, p)).collect();
            want.extend(heads);
        }
    }
    for isa in isas() {
        for half in [false, true] {
            let got = world.run((&pool, isa, half), &q, &rows, p);
            // Weights sum to 1 and values are about 1: f32 rounding over the scores and the sums.
            assert_close(&got, &want, |_| 2e-5, &format!("{what} {shape:?} {isa:?} bf16 {half}"));
        }
    }
}

#[test]
fn attention_keeps_its_error_bound() {
    let seed = 41;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let shape = |q_heads, kv_heads, dim, v_dim| Shape { q_heads, kv_heads, dim, v_dim, shared: false };
    let shared = |q_heads, kv_heads, dim, v_dim| Shape { q_heads, kv_heads, dim, v_dim, shared: true };
    for shape in [
        shape(9, 3, 64, 64),
        shape(2, 1, 100, 100),
        shape(4, 2, 72, 40),
        shape(2, 2, 8, 8),
        shape(32, 1, 32, 32),
        // Keys that are values, latents, and more query heads than a tile has rows.
        shared(4, 2, 80, 64),
        shared(50, 1, 45, 37),
        shared(2, 1, 640, 512),
    ] {
        check(&mut rng, shape, &params(shape), "plain");
    }
}

#[test]
fn windows_caps_sinks_and_full_attention() {
    let seed = 42;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let shape = Shape { q_heads: 6, kv_heads: 2, dim: 40, v_dim: 40, shared: false };
    let sinks = rng.normals(6);
    for window in [1, 16, 100] {
        check(&mut rng, shape, &AttnParams { window: Some(window), ..params(shape) }, "window");
    }
    check(&mut rng, shape, &AttnParams { soft_cap: Some(2.0), ..params(shape) }, "cap");
    check(&mut rng, shape, &AttnParams { sinks: Some(&sinks), ..params(shape) }, "sinks");
    check(&mut rng, shape, &AttnParams { causal: false, ..params(shape) }, "full");
    let all = AttnParams { window: Some(40), soft_cap: Some(3.0), sinks: Some(&sinks), ..params(shape) };
    check(&mut rng, shape, &all, "all");
}

#[test]
fn a_query_does_not_depend_on_the_batch_the_chunk_or_the_threads() {
    let seed = 43;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let shape = Shape { q_heads: 9, kv_heads: 3, dim: 24, v_dim: 20, shared: false };
    let (width, out_width) = (9 * 24, 9 * 20);
    let len = 170;
    let world = World::new(&mut rng, shape, &[len, 40]);
    let q = rng.normals(len * width);
    let other = rng.normals(40 * width);
    // Counters in the innermost loops make kernels twenty times slower: then only chunks with a rest, and all.
    let chunks: &[usize] = if cfg!(coverage) { &[50, 170] } else { &[3, 16, 170] };
    for window in [None, Some(33)] {
        let p = AttnParams { window, ..params(shape) };
        for isa in isas() {
            for half in [false, true] {
                let one = Pool::new(1);
                let alone: Vec<Vec<u32>> = (0..len)
                    .map(|t| {
                        bits(&world.run(
                            (&one, isa, half),
                            &q[t * width..(t + 1) * width],
                            &[(0, 1, t + 1)],
                            &p,
                        ))
                    })
                    .collect();
                for threads in [1, 3] {
                    let pool = Pool::new(threads);
                    for &chunk in chunks {
                        // Another sequence first, so that rows change their place.
                        let mut start = 0;
                        while start < len {
                            let n = chunk.min(len - start);
                            let mixed =
                                [&other[..7 * width], &q[start * width..(start + n) * width]].concat();
                            let rows = [(1, 7, 30), (0, n, start + n)];
                            let got = world.run((&pool, isa, half), &mixed, &rows, &p);
                            for (i, got) in got[7 * out_width..].chunks(out_width).enumerate() {
                                let t = start + i;
                                assert_eq!(
                                    bits(got),
                                    alone[t],
                                    "{isa:?} {threads} threads chunk {chunk} token {t}"
                                );
                            }
                            start += n;
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn pages_have_the_documented_layout() {
    let layout =
        KvLayout { kv_heads: 2, head_dim: 3, v_head_dim: 4, value_in_key: false, first: 1, page_stride: 300 };
    let mut data = vec![0.0; 900];
    let k: Vec<f32> = (0..18).map(|i| i as f32 + 1.0).collect();
    let v: Vec<f32> = (0..24).map(|i| i as f32 + 101.0).collect();
    let mut view = KvViewMut { data: KvDataMut::F32(&mut data), layout };
    let heads = (Heads::contiguous(2, 3), Heads::contiguous(2, 4));
    kv_append(&mut view, (&k, heads.0), Some((&v, heads.1)), 1..3, 15, &[2, 0]);
    // Token 1 at position 15: block 2, slot 15. Token 2 at position 16: block 0, slot 0.
    let key = |block: usize, head: usize, slot: usize| 1 + block * 300 + (head * 16 + slot) * 3;
    let value = |block: usize, head: usize, slot: usize| 1 + block * 300 + 96 + (head * 16 + slot) * 4;
    assert_eq!(data[key(2, 1, 15)..][..3], [10.0, 11.0, 12.0]);
    assert_eq!(data[key(0, 0, 0)..][..3], [13.0, 14.0, 15.0]);
    assert_eq!(data[value(2, 0, 15)..][..4], [109.0, 110.0, 111.0, 112.0]);
    assert_eq!(data[value(0, 1, 0)..][..4], [121.0, 122.0, 123.0, 124.0]);
    assert_eq!(data.iter().filter(|v| **v != 0.0).count(), 28);
}

#[test]
#[should_panic(expected = "a table of 1 blocks for 17 keys")]
fn a_short_table_is_named() {
    let shape = Shape { q_heads: 1, kv_heads: 1, dim: 8, v_dim: 8, shared: false };
    let world = World::new(&mut Rng(44), shape, &[16]);
    world.run((&Pool::new(1), Isa::Portable, false), &[0.0; 8], &[(0, 1, 17)], &params(shape));
}
