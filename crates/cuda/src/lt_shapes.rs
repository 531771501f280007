//! Products that cublasLt computes: their shapes, and for how many rows there are plans.
//!
//! Owns the rounding of rows, which whoever gives a product its place needs to know: rows that are added are written too, and
//! nobody reads them. Never: plans, which the driver makes of shapes.

use crate::driver::{LtOutput, LtShape, LtStorage};
use crate::weights::{Kind, Shape};

/// Most rows of the kernels that stream weights; more are cublasLt's.
pub(crate) const SKINNY_ROWS: usize = 64;

/// What numbers of rows are rounded to.
const fn step(rows: usize) -> usize {
    match rows {
        0..=128 => 16,
        129..=256 => 32,
        257..=512 => 64,
        513..=1024 => 128,
        _ => 256,
    }
}

/// Rows that cublasLt computes for so many.
pub(crate) const fn lt_rows(rows: usize) -> usize {
    rows.next_multiple_of(step(rows))
}

/// The most rows, at most so many, that are computed as they are.
pub(crate) const fn lt_rows_within(rows: usize) -> usize {
    rows - rows % step(rows)
}

/// All numbers of rows for which cublasLt has plans, where steps have at most `most`.
pub(crate) fn lt_buckets(most: usize) -> Vec<usize> {
    let mut buckets = Vec::new();
    let mut rows = SKINNY_ROWS + 1;
    while rows <= most {
        let bucket = lt_rows(rows);
        buckets.push(bucket);
        rows = bucket + 1;
    }
    buckets
}

/// What cublasLt calls a product with a weight; none where it does not multiply such weights. Activations are bf16 and it
/// wants both alike, so those of 8 bits are the crate's own kernels'.
pub(crate) fn lt_shape(w: &Shape, rows: usize, single: bool, bias: bool) -> Option<LtShape> {
    (w.kind == Kind::Bf16).then(|| LtShape {
        rows: rows as u32,
        outputs: w.out() as u32,
        inner: w.inner() as u32,
        storage: LtStorage::Bf16,
        output: if single { LtOutput::F32 } else { LtOutput::Bf16 },
        bias,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fall_into_buckets() {
        assert_eq!(
            [65, 80, 81, 129, 300, 513, 1025, 1300].map(lt_rows),
            [80, 80, 96, 160, 320, 640, 1280, 1536]
        );
        assert_eq!(
            [64, 79, 135, 260, 523, 640, 1024].map(lt_rows_within),
            [64, 64, 128, 256, 512, 640, 1024]
        );
        assert_eq!(lt_buckets(64), [0; 0]);
        assert_eq!(lt_buckets(130), [80, 96, 112, 128, 160]);
        assert!(lt_buckets(8192).len() < 64);
        for rows in 65..3000 {
            assert!(lt_buckets(3000).contains(&lt_rows(rows)), "{rows}");
            let within = lt_rows_within(rows);
            assert!(within <= rows && lt_rows(within) == within, "{rows}");
        }
    }

    #[test]
    fn a_weight_of_8_bits_has_no_plan_however_alike_its_shape() {
        let bf16 = Shape { rows: 130, columns: 64, kind: Kind::Bf16 };
        let found = lt_shape(&bf16, 80, true, false).map(|s| (s.rows, s.outputs, s.inner, s.output));
        assert_eq!(found, Some((80, 136, 64, LtOutput::F32)));
        for (scale_rows, blocks) in [(1, false), (136, false), (128, true)] {
            let e4m3 = Shape { kind: Kind::E4m3 { scale_rows, blocks }, ..bf16 };
            assert_eq!(lt_shape(&e4m3, 80, true, false), None);
        }
    }
}
