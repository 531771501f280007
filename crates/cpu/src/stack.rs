//! Several weights of one shape: experts, or heads.
//!
//! Owns the product of some of them with rows that are scattered. Never: which row goes to which.

use mirai_model::backend::{HostTensor, Result};

use crate::linear::{CpuLinear, LinearScratch, Part, device};
use crate::pool::Pool;
use crate::simd::{Isa, Job, Place, matmul_group};

/// Weights `[n][out, in]`.
#[derive(Debug)]
pub struct CpuStack {
    weights: Vec<CpuLinear>,
    rows: usize,
    columns: usize,
}

/// Rows that go to one weight of a stack.
#[derive(Clone, Copy)]
pub(crate) struct Pick<'a> {
    /// Which weight.
    pub(crate) index: usize,
    /// Where its rows are, and where their results go.
    pub(crate) rows: &'a [Place],
}

impl CpuStack {
    pub(crate) fn load(weights: Vec<Vec<HostTensor<'_>>>, isa: Isa) -> Result<Self> {
        let weights =
            weights.into_iter().map(|parts| CpuLinear::load(parts, isa)).collect::<Result<Vec<_>>>()?;
        let Some(first) = weights.first() else {
            return Err(device("load_stack", "a stack of no weights".to_owned()));
        };
        let (rows, columns) = (first.rows(), first.columns());
        if let Some(index) = weights.iter().position(|w| (w.rows(), w.columns()) != (rows, columns)) {
            let (r, c) = (weights[index].rows(), weights[index].columns());
            let message = format!("weight {index} is {r} x {c}, the first is {rows} x {columns}");
            return Err(device("load_stack", message));
        }
        Ok(Self { weights, rows, columns })
    }

    /// Weights.
    #[must_use]
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Whether there are none, which never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// Output features of each.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features of each.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of memory taken.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weights.iter().map(CpuLinear::bytes).sum()
    }

    /// For every pick and every row of it, `out[row.out ..] = x[row.x ..] w^T`. A row's result does not depend on the
    /// others. Only the picked weights are read.
    pub(crate) fn multiply(
        &self,
        pool: &Pool,
        picks: &[Pick<'_>],
        x: &[f32],
        out: &mut [f32],
        scratch: &mut LinearScratch,
    ) -> Result<()> {
        // Rows of parts that do not begin with the weight's first output.
        let mut shifted: Vec<Vec<Place>> = Vec::new();
        for pick in picks {
            self.parts(pick.index)
                .filter(|(first, _)| *first > 0)
                .for_each(|(first, _)| shifted.push(shift(pick.rows, first)));
        }
        let mut jobs = Vec::with_capacity(picks.len());
        let mut others = Vec::new();
        let mut next = shifted.iter();
        for pick in picks {
            for (first, part) in self.parts(pick.index) {
                let rows = if first == 0 { pick.rows } else { next.next().map_or(&[][..], Vec::as_slice) };
                match part {
                    Part::Packed(matrix) => jobs.push(Job { matrix, rows }),
                    Part::Blocks { .. } => others.push((part, rows)),
                }
            }
        }
        matmul_group(pool, &jobs, x, out, &mut scratch.packed);
        for (part, rows) in others {
            self.gathered(pool, part, rows, x, out, scratch)?;
        }
        Ok(())
    }

    /// Parts of a weight with their first outputs.
    fn parts(&self, index: usize) -> impl Iterator<Item = (usize, &Part)> {
        let mut next = 0;
        self.weights[index].parts().iter().map(move |part| {
            let first = next;
            next += part.rows();
            (first, part)
        })
    }

    /// The product of a part that wants its rows back to back.
    fn gathered(
        &self,
        pool: &Pool,
        part: &Part,
        rows: &[Place],
        x: &[f32],
        out: &mut [f32],
        scratch: &mut LinearScratch,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let LinearScratch { packed, part: product, rows: gathered } = scratch;
        gathered.clear();
        for row in rows {
            gathered.extend_from_slice(&x[row.x..row.x + self.columns]);
        }
        let len = rows.len() * part.rows();
        product.resize(product.len().max(len), 0.0);
        part.matmul(pool, gathered, rows.len(), &mut product[..len], packed)?;
        for (row, from) in rows.iter().zip(product.chunks_exact(part.rows())) {
            out[row.out..row.out + from.len()].copy_from_slice(from);
        }
        Ok(())
    }
}

fn shift(rows: &[Place], by: usize) -> Vec<Place> {
    rows.iter().map(|row| Place { x: row.x, out: row.out + by }).collect()
}
