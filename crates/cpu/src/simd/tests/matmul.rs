//! Products against an f64 reference, and their independence of batch, place and threads.

use super::super::matrix::Panels;
use super::super::{Isa, Job, PackedMatrix, Place, Scratch, Storage, matmul_group};
use super::{Rng, assert_close, bits, isas};
use crate::pool::Pool;
use half::{bf16, f16};

const STORAGES: [Storage; 5] = [Storage::F32, Storage::F16, Storage::Bf16, Storage::Q8_0, Storage::Q4K];

/// A random weight of a storage, and its exact values.
fn weight(rng: &mut Rng, storage: Storage, n: usize, k: usize, isa: Isa) -> (PackedMatrix, Vec<f32>) {
    let data = rng.normals(n * k);
    let matrix = match storage {
        Storage::F32 => PackedMatrix::from_f32(&data, n, k, isa),
        Storage::F16 => {
            PackedMatrix::from_f16(&data.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), n, k, isa)
        }
        Storage::Bf16 => {
            PackedMatrix::from_bf16(&data.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), n, k, isa)
        }
        Storage::Q8_0 => PackedMatrix::quantize_q8_0(&data, n, k, isa),
        Storage::Q4K => PackedMatrix::quantize_q4_k(&data, n, k, isa),
    }
    .unwrap();
    assert_eq!((matrix.n(), matrix.k(), matrix.storage()), (n, k, storage));
    let mut exact = vec![0.0; n * k];
    for (i, row) in exact.chunks_mut(k).enumerate() {
        matrix.row(i, row);
    }
    (matrix, exact)
}

fn product(matrix: &PackedMatrix, pool: &Pool, x: &[f32], m: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; m * matrix.n()];
    matrix.matmul(pool, x, m, &mut out, &mut Scratch::default());
    out
}

/// Largest error of a sum of products relative to the sum of their magnitudes, or, for int8 activations, to the
/// weights' magnitudes times half a quantization step of the block.
fn bound(storage: Storage, w: &[f32], x: &[f32]) -> f64 {
    let magnitude: f64 = w.iter().zip(x).map(|(&w, &x)| f64::from(w * x).abs()).sum();
    match storage {
        Storage::F32 | Storage::F16 | Storage::Bf16 => 1e-5 * magnitude + 1e-30,
        Storage::Q8_0 | Storage::Q4K => {
            w.chunks(32)
                .zip(x.chunks(32))
                .map(|(w, x)| {
                    let step = f64::from(x.iter().fold(0.0_f32, |m, v| m.max(v.abs()))) / 127.0;
                    0.501 * step * w.iter().map(|v| f64::from(v.abs())).sum::<f64>()
                })
                .sum::<f64>()
                + 1e-5 * magnitude
        }
    }
}

#[test]
fn products_keep_their_error_bound() {
    let seed = 21;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let pool = Pool::new(2);
    for storage in STORAGES {
        // Odd sizes on purpose: a short last panel, an odd k, one column.
        let shapes: &[(usize, usize)] = match storage {
            Storage::Q8_0 => &[(1, 32), (33, 96), (40, 576)],
            Storage::Q4K => &[(1, 256), (33, 512)],
            _ => &[(1, 1), (31, 7), (33, 65), (70, 323)],
        };
        for &(n, k) in shapes {
            let (matrix, exact) = weight(&mut rng, storage, n, k, Isa::Portable);
            let x = rng.normals(31 * k);
            let rows = x.chunks(k).map(|x| {
                let sum = |w: &[f32]| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                exact.chunks(k).map(sum).collect::<Vec<f64>>()
            });
            let want: Vec<Vec<f64>> = rows.collect();
            for isa in isas() {
                let matrix = PackedMatrix { isa, ..copy(&matrix) };
                for m in [1, 2, 3, 5, 7, 12, 13, 31] {
                    let got = product(&matrix, &pool, &x[..m * k], m);
                    for (row, (x, got)) in x.chunks(k).zip(got.chunks(n)).enumerate() {
                        let what = format!("{storage:?} {isa:?} n {n} k {k} m {m} row {row}");
                        let bound = |c: usize| bound(storage, &exact[c * k..(c + 1) * k], x);
                        assert_close(got, &want[row], bound, &what);
                    }
                }
            }
        }
    }
}

/// The same weight again: layouts do not depend on the instruction set.
fn copy(matrix: &PackedMatrix) -> PackedMatrix {
    let panels = match &matrix.panels {
        Panels::F32(p) => Panels::F32(p.clone()),
        Panels::F16(p) => Panels::F16(p.clone()),
        Panels::Bf16(p) => Panels::Bf16(p.clone()),
        Panels::Q8_0(p) => Panels::Q8_0(p.clone()),
        Panels::Q4K(p) => Panels::Q4K(p.clone()),
    };
    PackedMatrix { panels, ..*matrix }
}

#[test]
fn a_row_does_not_depend_on_the_batch_or_the_threads() {
    let seed = 22;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let pools = [Pool::new(1), Pool::new(3)];
    const ROWS: usize = 130;
    let (n, k) = (70, 256);
    // Counters in the innermost loops make kernels twenty times slower: then only sizes around some tiles' edges.
    let batches: &[usize] =
        if cfg!(coverage) { &[2, 5, 9, 64] } else { &[2, 3, 4, 5, 6, 8, 9, 12, 13, 25, 64, ROWS] };
    for isa in isas() {
        for storage in STORAGES {
            let (matrix, _) = weight(&mut rng, storage, n, k, isa);
            let x = rng.normals(ROWS * k);
            let alone: Vec<Vec<u32>> =
                x.chunks(k).map(|x| bits(&product(&matrix, &pools[0], x, 1))).collect();
            for pool in &pools {
                for &m in batches {
                    // The batch starts somewhere else each time, so that rows change their place.
                    let first = if m == ROWS { 0 } else { rng.below(ROWS - m) };
                    let got = product(&matrix, pool, &x[first * k..(first + m) * k], m);
                    for (row, got) in got.chunks(n).enumerate() {
                        let what =
                            || format!("{storage:?} {isa:?} {} threads m {m} row {row}", pool.threads());
                        assert_eq!(bits(got), alone[first + row], "{}", what());
                    }
                }
            }
        }
    }
}

#[test]
fn a_poisoned_row_stays_alone_and_visible() {
    let mut rng = Rng(23);
    let pool = Pool::new(2);
    let (n, k) = (40, 256);
    for isa in isas() {
        for storage in STORAGES {
            let (matrix, _) = weight(&mut rng, storage, n, k, isa);
            let clean = rng.normals(3 * k);
            for poison in [f32::NAN, f32::INFINITY] {
                let mut x = clean.clone();
                x[k + 100] = poison;
                let (got, want) = (product(&matrix, &pool, &x, 3), product(&matrix, &pool, &clean, 3));
                assert_eq!(bits(&got[..n]), bits(&want[..n]), "{storage:?} {isa:?}");
                assert_eq!(bits(&got[2 * n..]), bits(&want[2 * n..]), "{storage:?} {isa:?}");
                // A weight of exactly zero hides an infinity in a float product, but not in all columns.
                assert!(got[n..2 * n].iter().any(|v| !v.is_finite()), "{storage:?} {isa:?} {poison}");
            }
        }
    }
}

#[test]
fn a_scratch_serves_products_of_any_order_and_size() {
    let mut rng = Rng(24);
    let pool = Pool::new(2);
    let mut scratch = Scratch::default();
    for _ in 0..40 {
        let storage = STORAGES[rng.below(STORAGES.len())];
        let (n, k, m) = (1 + rng.below(80), 256 * (1 + rng.below(2)), 1 + rng.below(40));
        let (matrix, _) = weight(&mut rng, storage, n, k, Isa::detect());
        let x = rng.normals(m * k);
        let mut out = vec![f32::NAN; m * n];
        matrix.matmul(&pool, &x, m, &mut out, &mut scratch);
        assert_eq!(bits(&out), bits(&product(&matrix, &pool, &x, m)), "{storage:?} n {n} k {k} m {m}");
    }
}

#[test]
fn a_group_gives_the_bits_of_single_products() {
    let seed = 25;
    println!("seed {seed}");
    let mut rng = Rng(seed);
    let mut scratch = Scratch::default();
    for isa in isas() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            // Weights of several storages and shapes, some without rows, rows in disorder and shared by weights.
            let weights: Vec<PackedMatrix> = (0..10)
                .map(|i| {
                    let n = [33, 64, 5, 130][i % 4];
                    weight(&mut rng, STORAGES[i % 5], n, 256, isa).0
                })
                .collect();
            let x = rng.normals(20 * 300);
            let mut out_at = 7;
            let mut rows: Vec<Vec<Place>> = Vec::new();
            for (i, w) in weights.iter().enumerate() {
                let mut places = Vec::new();
                for _ in 0..[0, 1, 3, 14][(i * 7) % 4] {
                    places.push(Place { x: rng.below(20) * 300 + 11, out: out_at });
                    out_at += w.n() + rng.below(3);
                }
                places.reverse();
                rows.push(places);
            }
            let mut out = vec![f32::NAN; out_at + 9];
            let jobs: Vec<Job<'_>> =
                weights.iter().zip(&rows).map(|(matrix, rows)| Job { matrix, rows }).collect();
            matmul_group(&pool, &jobs, &x, &mut out, &mut scratch);
            let mut written = 0;
            for (w, rows) in weights.iter().zip(&rows) {
                for row in rows {
                    let alone = product(w, &pool, &x[row.x..row.x + 256], 1);
                    assert_eq!(bits(&out[row.out..row.out + w.n()]), bits(&alone), "{w:?} {row:?}");
                    written += w.n();
                }
            }
            assert_eq!(out.iter().filter(|v| !v.is_nan()).count(), written, "nothing else is written");
        }
    }
}

#[test]
#[should_panic(expected = "results 0..2 and 1..3 overlap")]
fn overlapping_results_are_named() {
    let matrix = PackedMatrix::from_f32(&[1.0; 6], 2, 3, Isa::Portable).unwrap();
    let jobs = [Job { matrix: &matrix, rows: &[Place { x: 0, out: 1 }, Place { x: 0, out: 0 }] }];
    matmul_group(&Pool::new(1), &jobs, &[0.0; 3], &mut [0.0; 4], &mut Scratch::default());
}

#[test]
fn no_rows_is_no_work() {
    let matrix = PackedMatrix::from_f32(&[1.0; 6], 2, 3, Isa::detect()).unwrap();
    assert!(product(&matrix, &Pool::new(2), &[], 0).is_empty());
}

#[test]
#[should_panic(expected = "activations of 2 x 3 in a slice of 5")]
fn a_wrong_activation_length_is_named() {
    let matrix = PackedMatrix::from_f32(&[1.0; 6], 2, 3, Isa::detect()).unwrap();
    product(&matrix, &Pool::new(1), &[0.0; 5], 2);
}
