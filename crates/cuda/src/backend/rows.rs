//! Operations on rows alone: embeddings, norms, sums, gates and activations.
//!
//! Owns their launches. Never: attention, products, sampling.

use mirai_model::backend::{Activation, Norm, NormKind, Result};

use super::linear::gate_spec;
use super::{CudaBackend, expect_width};
use crate::args::{
    ActivateArgs, AddArgs, AddNormArgs, EmbedArgs, GateArgs, GatherArgs, GluArgs, MeanArgs, NormArgs,
    PositionsArgs, ScaleArgs,
};
use crate::buffer::{CudaBuffer, CudaLinear, CudaVector, head_norm};
use crate::driver::DevicePtr;
use crate::error::device;
use crate::kernels::Kernel;
use crate::weights::{Kind, padded};

/// Threads of a block that walks a row.
const ROW_THREADS: u32 = 256;
/// Widest rows of the norm's kernel.
const WIDEST_NORM: usize = 8 * 512 * 4;

/// What is added to the residual stream on the way to a norm.
pub(super) struct Addend<'a> {
    pub(super) x: &'a CudaBuffer,
    pub(super) scale: f32,
    /// Weight and offset of a norm of x itself: root of the mean square, with the other norm's epsilon.
    pub(super) post: Option<(DevicePtr, f32)>,
}

/// Threads for a norm of rows of `width`: two pieces of 16 bytes each where that is enough.
fn norm_threads(width: usize) -> u32 {
    (width.div_ceil(16).next_multiple_of(32) as u32).clamp(32, 512)
}

/// A table whose rows are looked up must be bf16.
fn table(operation: &'static str, table: &CudaLinear, width: usize) -> Result<()> {
    expect_width(operation, width, table.shape.columns)?;
    match table.shape.kind {
        Kind::Bf16 => Ok(()),
        Kind::E4m3 { .. } => Err(device(operation, "a table in 8 bits".to_owned())),
    }
}

impl CudaBackend {
    pub(super) fn embed_rows(&mut self, w: &CudaLinear, scale: f32, out: &mut CudaBuffer) -> Result<()> {
        out.write("embed", w.shape.columns)?;
        table("embed", w, out.width())?;
        let args = EmbedArgs {
            table: w.at,
            ids: self.step.ids(),
            last_drawn: self.device()?.last_drawn,
            out: out.at,
            table_rows: w.shape.rows as u32,
            table_stride: w.shape.inner() as i32,
            width: out.width() as i32,
            scale,
        };
        self.launch_rows(Kernel::EmbedBf16, self.rows(out.rows), &args)
    }

    pub(super) fn position_rows(&mut self, w: &CudaLinear, offset: usize, x: &CudaBuffer) -> Result<()> {
        table("add_positions", w, x.width())?;
        let args = PositionsArgs {
            table: w.at,
            positions: self.step.positions(),
            x: x.at,
            table_rows: w.shape.rows as u32,
            offset: offset as u32,
            table_stride: w.shape.inner() as i32,
            width: x.width() as i32,
        };
        self.launch_rows(Kernel::AddPositionsBf16, self.rows(x.rows), &args)
    }

    /// Adds to the residual stream where something is given, then `out = norm(residual)`.
    pub(super) fn norm_rows(
        &mut self,
        residual: &CudaBuffer,
        add: Option<Addend<'_>>,
        norm: &Norm<CudaVector>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let width = residual.width();
        if let Some(add) = &add {
            expect_width("add_norm", add.x.width(), width)?;
        }
        if width > WIDEST_NORM {
            return Err(device("norm", format!("rows of {width}, at most {WIDEST_NORM}")));
        }
        let parts = head_norm("norm", norm, width)?;
        out.write("norm", width)?;
        let post = add.as_ref().and_then(|add| add.post);
        let norm = NormArgs {
            residual: residual.at,
            x: add.as_ref().map_or(DevicePtr::NULL, |add| add.x.at),
            post_weight: post.map_or(DevicePtr::NULL, |(weight, _)| weight),
            weight: parts.weight,
            bias: parts.bias,
            x_scale: add.map_or(1.0, |add| add.scale),
            offset: parts.offset,
            post_offset: post.map_or(0.0, |(_, offset)| offset),
            eps: parts.eps,
            width: width as i32,
            layer: i32::from(norm.kind == NormKind::Layer),
            group: 0,
        };
        let grid = (self.rows(residual.rows) as u32, 1, 1);
        let args = AddNormArgs { norm, out: out.at };
        self.launch(Kernel::AddNormBf16, grid, norm_threads(width), 0, &args)
    }

    pub(super) fn add_rows(&mut self, residual: &CudaBuffer, x: &CudaBuffer, scale: f32) -> Result<()> {
        expect_width("add", x.width(), residual.width())?;
        let args = AddArgs { x: residual.at, y: x.at, width: x.stride() as i32, scale };
        self.launch_rows(Kernel::AddBf16, self.rows(x.rows), &args)
    }

    pub(super) fn scale_rows(&mut self, x: &CudaBuffer, factor: f32) -> Result<()> {
        let args = ScaleArgs { x: x.at, width: x.stride() as i32, factor };
        self.launch_rows(Kernel::ScaleBf16, self.rows(x.rows), &args)
    }

    pub(super) fn gate_rows(
        &mut self,
        gates: &CudaBuffer,
        at: usize,
        width: usize,
        x: &CudaBuffer,
    ) -> Result<()> {
        if !(width == 1 || width == x.width()) || at + width > gates.width() {
            let (all, rows) = (gates.width(), x.width());
            return Err(device(
                "gate",
                format!("{width} gates at {at} of rows of {all}, for rows of {rows}"),
            ));
        }
        let args = GateArgs {
            gates: gates.at,
            x: x.at,
            gates_stride: gates.stride() as i32,
            at: at as i32,
            width: x.width() as i32,
            one: i32::from(width == 1),
        };
        self.launch_rows(Kernel::GateBf16, self.rows(x.rows), &args)
    }

    pub(super) fn glu_rows(
        &mut self,
        activation: Activation,
        gate_up: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        if !gate_up.width().is_multiple_of(2) {
            return Err(device("glu", format!("rows of {} are no gate and up", gate_up.width())));
        }
        let width = gate_up.width() / 2;
        out.write("glu", width)?;
        self.glu_at(activation, gate_up.at, out.at, (self.rows(gate_up.rows), width))
    }

    /// `rows` rows of a gated activation of `width`.
    pub(super) fn glu_at(
        &mut self,
        activation: Activation,
        x: DevicePtr,
        out: DevicePtr,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        let gate =
            gate_spec(activation).ok_or_else(|| device("glu", format!("{activation:?} does not gate")))?;
        self.launch_rows(Kernel::GluBf16, rows, &GluArgs { x, out, width: width as i32, gate })
    }

    pub(super) fn activate_rows(
        &mut self,
        activation: Activation,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        out.write("activate", x.width())?;
        self.activate_at(activation, x.at, out.at, (self.rows(x.rows), x.width()))
    }

    /// `rows` rows of an activation of `width`.
    pub(super) fn activate_at(
        &mut self,
        activation: Activation,
        x: DevicePtr,
        out: DevicePtr,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        let plain = |kind| (kind, [0.0; 4]);
        let (kind, [alpha_p, alpha_n, beta, eps]) = match activation {
            Activation::Silu => plain(0),
            Activation::GeluTanh => plain(1),
            Activation::Gelu => plain(3),
            Activation::Tanh => plain(4),
            Activation::Xielu { alpha_p, alpha_n, beta, eps } => (5, [alpha_p, alpha_n, beta, eps]),
            Activation::ClampedSwiglu { .. } => {
                return Err(device("activate", format!("{activation:?} needs a gate")));
            }
        };
        let args = ActivateArgs { x, out, width: width as i32, kind, alpha_p, alpha_n, beta, eps };
        self.launch_rows(Kernel::ActivateBf16, rows, &args)
    }

    pub(super) fn gather_rows(&mut self, x: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        out.write("gather_outputs", x.width())?;
        let args = GatherArgs {
            x: x.at,
            outputs: self.step.outputs_at(),
            out: out.at,
            width: padded(x.width()) as i32,
        };
        self.launch_rows(Kernel::GatherRowsBf16, self.rows(out.rows), &args)
    }

    pub(super) fn mean_rows(&mut self, x: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        out.write("mean_outputs", x.width())?;
        let args = MeanArgs {
            x: x.at,
            out: out.at,
            rows: self.step.rows_at(),
            output_rows: self.step.output_rows(),
            width: x.width() as i32,
        };
        let grid = (self.rows(out.rows) as u32, x.stride().div_ceil(ROW_THREADS as usize) as u32, 1);
        self.launch(Kernel::MeanOutputsBf16, grid, ROW_THREADS, 0, &args)
    }

    /// One block a row.
    pub(super) fn launch_rows<A: crate::KernelArgs>(
        &self,
        kernel: Kernel,
        rows: usize,
        args: &A,
    ) -> Result<()> {
        self.launch(kernel, (rows as u32, 1, 1), ROW_THREADS, 0, args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_have_threads_for_every_width() {
        for width in [1, 8, 28, 512, 2880, 4096, 8192, WIDEST_NORM] {
            let threads = norm_threads(width) as usize;
            assert!(threads.is_multiple_of(32) && threads * 4 >= padded(width) / 8, "{width}: {threads}");
        }
    }
}
