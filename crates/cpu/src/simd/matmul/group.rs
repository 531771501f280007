//! Many products in one dispatch: each of its own weight, over rows that lie anywhere.
//!
//! Owns: the splitting of a group of products over threads. Experts and heads are multiplied this way: one of them alone
//! has too few rows and columns to keep the threads busy. Never: why a row goes to a weight.

use super::convert::{Pack, Rows, Scratch, Source};
use super::units::Unit;
use super::{PARALLEL_PACK, PIECE_BYTES, PanelRange, Product, height, limit, padded_rows};
use crate::pool::Pool;
use crate::simd::matrix::{PANEL, PackedMatrix, Panels};
use crate::simd::shared::SharedMut;
use std::ops::Range;

/// Where a row of activations begins, and where its result does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First value among the activations.
    pub x: usize,
    /// First value of the result.
    pub out: usize,
}

/// One product of a group.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The weight.
    pub matrix: &'a PackedMatrix,
    /// Its rows.
    pub rows: &'a [Place],
}

/// For every job and every row of it: `out[row.out .. + n] = x[row.x .. + k] * w^T`, with the same bits as
/// [`PackedMatrix::matmul`] gives. Weights may differ in shape and storage.
///
/// # Panics
/// When a row lies outside its slice, when results overlap, or when weights are of different instruction sets.
pub fn matmul_group(pool: &Pool, jobs: &[Job<'_>], x: &[f32], out: &mut [f32], scratch: &mut Scratch) {
    check(jobs, out.len());
    let out = SharedMut::new(out);
    // One pass for each storage; nearly always that is one pass.
    macro_rules! pass {
        ($($kind:ident),*) => {
            $(
                let some: Vec<_> = jobs
                    .iter()
                    .filter(|job| !job.rows.is_empty())
                    .filter_map(|job| match &job.matrix.panels {
                        Panels::$kind(panels) => Some((*job, panels.as_slice())),
                        _ => None,
                    })
                    .collect();
                pass(pool, &some, x, &out, scratch);
            )*
        };
    }
    pass!(F32, F16, Bf16, Q8_0, Q4K);
}

/// Results must not overlap: several threads write them.
fn check(jobs: &[Job<'_>], len: usize) {
    let mut ranges: Vec<Range<usize>> =
        jobs.iter().flat_map(|job| job.rows.iter().map(|row| row.out..row.out + job.matrix.n())).collect();
    // The stable sort merges runs, and that is what these are.
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "results {:?} and {:?} overlap", pair[0], pair[1]);
    }
    if let Some(last) = ranges.last() {
        assert!(last.end <= len, "results end at {} of {len}", last.end);
    }
    if let Some(first) = jobs.first() {
        assert!(jobs.iter().all(|job| job.matrix.isa == first.matrix.isa), "several instruction sets");
    }
}

/// A tile of activations to convert.
#[derive(Clone, Copy)]
struct TileOf<'a> {
    k: usize,
    rows: &'a [Place],
    height: usize,
    /// Where it goes in the scratch: first word, first scale.
    words: usize,
    blocks: usize,
}

fn pass<U: Unit>(
    pool: &Pool,
    jobs: &[(Job<'_>, &[U])],
    x: &[f32],
    out: &SharedMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let Some(&(Job { matrix: first, .. }, _)) = jobs.first() else { return };
    let isa = first.isa;
    let limit = limit::<U>(isa);
    let mut tiles = Vec::new();
    // Of each job: first word, first block, first panel in the order of all.
    let mut starts = Vec::with_capacity(jobs.len());
    let (mut words, mut blocks, mut panels) = (0, 0, 0);
    for (job, _) in jobs {
        starts.push((words, blocks, panels));
        let (k, m) = (job.matrix.k, job.rows.len());
        let (row_words, row_blocks) = (U::CONVERT.words(k), U::CONVERT.blocks(k));
        for start in (0..m).step_by(limit) {
            let height = height(limit, m - start);
            let rows = &job.rows[start..m.min(start + height)];
            let (words, blocks) = (words + start * row_words, blocks + start * row_blocks);
            tiles.push(TileOf { k, rows, height, words, blocks });
        }
        words += padded_rows(limit, m) * row_words;
        blocks += padded_rows(limit, m) * row_blocks;
        panels += job.matrix.n.div_ceil(PANEL);
    }
    scratch.words.resize(scratch.words.len().max(words), 0);
    scratch.scales.resize(scratch.scales.len().max(blocks), 0.0);
    scratch.sums.resize(scratch.sums.len().max(blocks), 0);
    let all_words = SharedMut::new(&mut scratch.words);
    let all_scales = SharedMut::new(&mut scratch.scales);
    let all_sums = SharedMut::new(&mut scratch.sums);
    let chunk = if words < PARALLEL_PACK { tiles.len() } else { tiles.len().div_ceil(pool.threads() * 4) };
    pool.chunks(tiles.len(), chunk, &|_, range| {
        for tile in &tiles[range] {
            let (row_words, row_blocks) = (U::CONVERT.words(tile.k), U::CONVERT.blocks(tile.k));
            let at = tile.words..tile.words + tile.height * row_words;
            let blocks = tile.blocks..tile.blocks + tile.height * row_blocks;
            // SAFETY: tiles have disjoint places, and each is converted by one thread.
            let (words, scales, sums) =
                unsafe { (all_words.range(at), all_scales.range(blocks.clone()), all_sums.range(blocks)) };
            let x = Source { x, rows: Rows::At(tile.rows) };
            isa.run(Pack { convert: U::CONVERT, x, k: tile.k, height: tile.height, words, scales, sums });
        }
    });
    let products: Vec<Product<'_, U>> = jobs
        .iter()
        .zip(&starts)
        .map(|((job, panels), &(words, blocks, _))| Product {
            panels,
            units: panels.len() / job.matrix.n.div_ceil(PANEL),
            words: &scratch.words[words..],
            scales: &scratch.scales[blocks..],
            sums: &scratch.sums[blocks..],
            m: job.rows.len(),
            n: job.matrix.n,
            k: job.matrix.k,
            out,
            places: Some(job.rows),
        })
        .collect();
    let bytes = products[0].units * size_of::<U>();
    let chunk = panels.div_ceil(pool.threads() * 8).max(PIECE_BYTES.div_ceil(bytes));
    let chunk = chunk.min(panels.div_ceil(pool.threads()));
    pool.chunks(panels, chunk, &|_, range| {
        for (product, &(.., first)) in products.iter().zip(&starts) {
            let count = product.n.div_ceil(PANEL);
            let from = range.start.max(first);
            let to = range.end.min(first + count);
            if from < to {
                isa.run(PanelRange { product, range: from - first..to - first });
            }
        }
    });
}
