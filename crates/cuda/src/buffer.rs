//! What the backend hands to the model: activations, weights, tables and routings in device memory.
//!
//! Owns their addresses and sizes; the arena owns the memory. Rows of activations are [`padded`] apart, and what lies
//! between is zero.

use mirai_model::backend::{Pairing, Result, Rows};

use crate::args::{HeadNorm, Rotation};
use crate::driver::DevicePtr;
use crate::error::device;
use crate::weights::{Kind, Shape, padded};

/// Activations, `[rows, width]` in bf16.
#[derive(Debug)]
pub struct CudaBuffer {
    pub(crate) at: DevicePtr,
    pub(crate) rows: Rows,
    /// Widest row that was asked for.
    capacity: usize,
    /// Width of the rows that were last written.
    width: usize,
}

impl CudaBuffer {
    pub(crate) fn new(at: DevicePtr, rows: Rows, capacity: usize) -> Self {
        Self { at, rows, capacity, width: capacity }
    }

    /// Width of its rows.
    pub(crate) const fn width(&self) -> usize {
        self.width
    }

    /// Elements from a row to the next.
    pub(crate) const fn stride(&self) -> usize {
        padded(self.width)
    }

    /// Makes it hold rows of `width`.
    pub(crate) fn write(&mut self, operation: &'static str, width: usize) -> Result<()> {
        if width > self.capacity {
            let message = format!("rows of {width} into a buffer of {}", self.capacity);
            return Err(device(operation, message));
        }
        self.width = width;
        Ok(())
    }
}

/// A weight `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct CudaLinear {
    pub(crate) at: DevicePtr,
    /// Null where there are none.
    pub(crate) scales: DevicePtr,
    pub(crate) shape: Shape,
}

/// Weights of one shape, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct CudaStack {
    pub(crate) first: CudaLinear,
    pub(crate) count: usize,
}

impl CudaStack {
    /// Whether its elements are bf16.
    pub(crate) fn is_bf16(&self) -> bool {
        self.first.shape.kind == Kind::Bf16
    }
}

/// A vector of parameters, twice: as bf16 for what is added and multiplied in rows, as singles for everything else.
#[derive(Clone, Copy, Debug)]
pub struct CudaVector {
    pub(crate) bf16: DevicePtr,
    pub(crate) single: DevicePtr,
    pub(crate) len: usize,
}

/// Rotary tables.
#[derive(Clone, Copy, Debug)]
pub struct CudaRope {
    pub(crate) rotation: Rotation,
}

impl CudaRope {
    /// Step between pairs and distance within one, in elements.
    pub(crate) const fn pairs(pairing: Pairing, rotary: usize) -> (i32, i32) {
        match pairing {
            Pairing::Halves => (1, rotary as i32 / 2),
            Pairing::Adjacent => (2, 1),
            Pairing::Apart(distance) => (1, distance as i32),
        }
    }
}

/// Where the experts of each token go, and the rows between their two products.
#[derive(Debug)]
pub struct CudaRouting {
    /// Experts of a token.
    pub(crate) top_k: usize,
    /// Of the largest router.
    pub(crate) experts: usize,
    /// `[tokens, experts]` in single precision.
    pub(crate) logits: DevicePtr,
    pub(crate) chosen: DevicePtr,
    pub(crate) weights: DevicePtr,
    pub(crate) places: DevicePtr,
    pub(crate) pairs: DevicePtr,
    pub(crate) offsets: DevicePtr,
    pub(crate) active: DevicePtr,
    pub(crate) tiles: DevicePtr,
    pub(crate) counter: DevicePtr,
    /// `[pairs, gate | up]`, where the gate is not applied at once.
    pub(crate) wide: DevicePtr,
    /// `[pairs, intermediate]`.
    pub(crate) inner: DevicePtr,
    /// `[pairs, hidden]`.
    pub(crate) out: DevicePtr,
    /// Elements of a row of each.
    pub(crate) widths: [usize; 3],
}

/// A norm in the kernels' words, over vectors of `width`.
pub(crate) fn head_norm(
    operation: &'static str,
    norm: &mirai_model::backend::Norm<CudaVector>,
    width: usize,
) -> Result<HeadNorm> {
    use mirai_model::backend::NormKind;
    for part in [&norm.weight, &norm.bias].into_iter().flatten() {
        if part.len != width {
            return Err(device(operation, format!("a norm of {} over rows of {width}", part.len)));
        }
    }
    let at = |part: &Option<CudaVector>| part.as_ref().map_or(DevicePtr::NULL, |v| v.bf16);
    Ok(HeadNorm {
        weight: at(&norm.weight),
        bias: at(&norm.bias),
        offset: norm.offset,
        eps: norm.eps,
        kind: match norm.kind {
            NormKind::Rms => 1,
            NormKind::Layer => 2,
        },
    })
}
