//! Loading: from tensors of a file to device memory.
//!
//! Owns where weights, tables and buffers go. Never: how they are stored, which is `weights.rs`.

use mirai_model::backend::{HostTensor, LinearUse, Result, RopeTable, Rows};

use super::CudaBackend;
use crate::args::Rotation;
use crate::buffer::{CudaBuffer, CudaLinear, CudaRope, CudaRouting, CudaStack, CudaVector};
use crate::driver::{DevicePtr, Part};
use crate::error::device;
use crate::weights::{self, Kind, Matrix, padded};

/// Rows of a tile in the grouped matmul.
pub(super) const TILE_ROWS: usize = 64;

impl CudaBackend {
    pub(super) fn put_linear(&mut self, parts: &[HostTensor<'_>], purpose: LinearUse) -> Result<CudaLinear> {
        let matrix = weights::stack(parts, true)?;
        self.products.add_weight(matrix.shape, purpose);
        self.put_matrices(std::slice::from_ref(&matrix))
    }

    /// Matrices of one shape, one behind the other; the first of them.
    fn put_matrices(&mut self, matrices: &[Matrix<'_>]) -> Result<CudaLinear> {
        let Some(first) = matrices.first() else {
            return Err(device("load_stack", "a stack of no weights"));
        };
        let shape = first.shape;
        let scales: Vec<f32> = matrices.iter().flat_map(|m| m.scales.iter().copied()).collect();
        let at = self.memory.take(Part::Weights, (shape.bytes() * matrices.len()) as u64)?;
        let mut to = at;
        for matrix in matrices {
            for chunk in &matrix.chunks {
                self.memory.write(to, chunk)?;
                to = to.add(chunk.len() as u64);
            }
            self.widened.extend(matrix.widened.iter().copied());
        }
        let scales = match shape.kind {
            Kind::Bf16 => DevicePtr::NULL,
            Kind::E4m3 { .. } => self.memory.put(Part::Weights, &[weights::f32_bytes(&scales)])?,
        };
        Ok(CudaLinear { at, scales, shape })
    }

    pub(super) fn put_stack(&mut self, stacks: &[Vec<HostTensor<'_>>]) -> Result<CudaStack> {
        let load = |allow| stacks.iter().map(|s| weights::stack(s, allow)).collect::<Result<Vec<_>>>();
        let mut matrices = load(true)?;
        let same_size = |matrices: &[Matrix<'_>]| {
            let size = |m: &Matrix<'_>| (m.shape.rows, m.shape.columns);
            matrices.iter().all(|m| size(m) == size(&matrices[0]))
        };
        if !same_size(&matrices) {
            return Err(device("load_stack", "weights of different sizes in one stack"));
        }
        // Storages are equal, or all are widened.
        if matrices.iter().any(|m| m.shape != matrices[0].shape) {
            matrices = load(false)?;
        }
        let first = self.put_matrices(&matrices)?;
        self.most_experts = self.most_experts.max(matrices.len());
        Ok(CudaStack { first, count: matrices.len() })
    }

    pub(super) fn put_vector(&mut self, parts: &[HostTensor<'_>]) -> Result<CudaVector> {
        let values = weights::vector(parts)?;
        let bf16 = self.memory.put(Part::Weights, &[weights::bf16_bytes(&values)])?;
        let single = self.memory.put(Part::Weights, &[weights::f32_bytes(&values)])?;
        self.products.add_vector(values.len());
        Ok(CudaVector { bf16, single, len: values.len() })
    }

    pub(super) fn put_rope(&mut self, table: &RopeTable) -> Result<CudaRope> {
        let half = table.rotary_dim / 2;
        let positions = table.cos.len().checked_div(half).unwrap_or(0);
        let fits = table.cos.len() == table.sin.len()
            && table.cos.len() == positions * half
            && (table.q_scale.is_empty() || table.q_scale.len() >= positions);
        if half == 0 || !fits {
            let (cos, sin, scale) = (table.cos.len(), table.sin.len(), table.q_scale.len());
            let message = format!("{cos} cosines, {sin} sines and {scale} scales for {half} pairs");
            return Err(device("load_rope", message));
        }
        let mut put = |values: &[f32]| self.memory.put(Part::Weights, &[weights::f32_bytes(values)]);
        let (cos, sin) = (put(&table.cos)?, put(&table.sin)?);
        let q_scale = if table.q_scale.is_empty() { DevicePtr::NULL } else { put(&table.q_scale)? };
        let (step, distance) = CudaRope::pairs(table.pairing, table.rotary_dim);
        let rotation = Rotation { cos, sin, q_scale, rotary: table.rotary_dim as i32, step, distance };
        self.rope_positions = self.rope_positions.min(positions);
        Ok(CudaRope { rotation })
    }

    pub(super) fn take_buffer(&mut self, rows: Rows, width: usize) -> Result<CudaBuffer> {
        let bytes = self.capacity() * padded(width) * 2;
        if rows == Rows::Outputs {
            self.widest_output = self.widest_output.max(width);
        }
        Ok(CudaBuffer::new(self.memory.take(Part::Activations, bytes as u64)?, rows, width))
    }

    pub(super) fn take_routing(&mut self, top_k: usize) -> Result<CudaRouting> {
        let (tokens, experts) = (self.capacity(), self.most_experts);
        let pairs = tokens * top_k;
        let widths = self.expert_widths();
        let mut words = |count: usize| self.memory.take(Part::Activations, count as u64 * 4);
        let routing = CudaRouting {
            top_k,
            experts,
            logits: words(tokens * padded(experts))?,
            chosen: words(pairs)?,
            weights: words(pairs)?,
            places: words(pairs)?,
            pairs: words(pairs)?,
            offsets: words(experts + 1)?,
            active: words(experts + 1)?,
            tiles: words(1 + 2 * (pairs / TILE_ROWS + experts))?,
            counter: words(1)?,
            wide: words(pairs * widths[0] / 2)?,
            inner: words(pairs * widths[1] / 2)?,
            out: words(pairs * widths[2] / 2)?,
            widths,
        };
        self.zero(routing.counter, 4)?;
        Ok(routing)
    }
}
