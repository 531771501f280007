//! Products that cublasLt computes: their shapes, and for how many rows there are plans.
//!
//! Owns the rounding of rows, which whoever gives a product its place needs to know: rows that are added are written too, and
//! nobody reads them. Never: plans, which the driver makes of shapes.

use std::collections::BTreeSet;

use mirai_model::backend::LinearUse;

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

/// What will be multiplied: collected while a model is loaded.
#[derive(Debug, Default)]
pub(crate) struct Products {
    /// Rows and columns of weights in bf16, and what for.
    weights: BTreeSet<(usize, usize, LinearUse)>,
    /// Lengths of vectors, any of which may be a bias.
    vectors: BTreeSet<usize>,
}

impl Products {
    /// A weight was loaded.
    pub(crate) fn add_weight(&mut self, shape: Shape, purpose: LinearUse) {
        if shape.kind == Kind::Bf16 && purpose != LinearUse::Table {
            self.weights.insert((shape.rows, shape.columns, purpose));
        }
    }

    /// A vector was loaded.
    pub(crate) fn add_vector(&mut self, len: usize) {
        self.vectors.insert(len);
    }

    /// Shapes of all products, where steps have `tokens` rows, and `logit_rows` rows of `vocab` logits exist at once. Logits
    /// and routers' are in single precision; a router's bias is the crate's own kernel's.
    pub(crate) fn shapes(&self, vocab: usize, logit_rows: usize, tokens: usize) -> Vec<LtShape> {
        let mut shapes = Vec::new();
        for &(rows, columns, purpose) in &self.weights {
            let (rows, most, single) = match purpose {
                LinearUse::Activations | LinearUse::Table => (rows, tokens, false),
                // The weight may have rows beyond the vocabulary, which are not computed.
                LinearUse::Logits => (vocab, tokens.min(logit_rows), true),
                LinearUse::Router => (rows, tokens, true),
            };
            let w = Shape { rows, columns, kind: Kind::Bf16 };
            for bucket in lt_buckets(most) {
                shapes.extend(lt_shape(&w, bucket, single, false));
                if !single && self.vectors.contains(&rows) {
                    shapes.extend(lt_shape(&w, bucket, single, true));
                }
            }
        }
        shapes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_as_wide_as_there_are_experts_or_tokens_has_its_own_plans() {
        let shape = |rows| Shape { rows, columns: 32, kind: Kind::Bf16 };
        let mut products = Products::default();
        products.add_weight(shape(128), LinearUse::Activations);
        products.add_weight(shape(128), LinearUse::Router);
        products.add_weight(shape(400), LinearUse::Activations);
        // A head with padding, and tables of which rows are looked up alone.
        products.add_weight(shape(416), LinearUse::Logits);
        products.add_weight(shape(400), LinearUse::Table);
        products.add_weight(shape(512), LinearUse::Table);
        products.add_vector(128);
        let shapes = products.shapes(400, 80, 100);
        let found: Vec<_> = shapes.iter().map(|s| (s.rows, s.outputs, s.output, s.bias)).collect();
        let (bf16, single) = (LtOutput::Bf16, LtOutput::F32);
        let of = |rows| [(rows, 128, bf16, false), (rows, 128, bf16, true)];
        let activations = [of(80), of(96), of(112)].concat();
        let router = [80, 96, 112].map(|rows| (rows, 128, single, false));
        let wide = [80, 96, 112].map(|rows| (rows, 400, bf16, false));
        assert_eq!(found, [&activations[..], &router, &wide, &[(80, 400, single, false)]].concat());
    }

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
