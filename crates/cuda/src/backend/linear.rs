//! Products of rows with weights: the choice of a kernel, and its launch.
//!
//! Owns which kernel multiplies how many rows: up to 64, the one that streams weights; above, cublasLt where it has a
//! plan, else the tiled kernel. Where a row must not depend on its neighbours, the tiled kernel has them all: it adds up
//! each row in one order, however many there are. Never: what the product is for.

use mirai_model::backend::{Activation, HeadView, Result};

use super::{CudaBackend, expect_width};
use crate::args::{GateSpec, GroupedArgs, HeadLinearArgs, MatmulArgs};
use crate::buffer::{CudaBuffer, CudaLinear, CudaRouting, CudaStack, CudaVector};
use crate::driver::{DevicePtr, LtOperands};
use crate::error::{device, driver};
use crate::kernels::Kernel;
use crate::products::{SKINNY_ROWS, lt_rows, lt_shape};
use crate::weights::Kind;
use crate::work::matmul_splits;

/// Outputs of a block.
const TILE: usize = 128;
/// Rows of a block of the tiled kernel.
const ROW_TILE: usize = 64;

/// Threads and shared memory of a kernel for few rows.
fn skinny(kind: Kind, rows: usize) -> (Kernel, u32, u32) {
    match (kind, rows) {
        (Kind::Bf16, ..=8) => (Kernel::MatmulSkinnyBf16X8, 256, 69_632),
        (Kind::Bf16, ..=16) => (Kernel::MatmulSkinnyBf16X16, 256, 73_728),
        (Kind::Bf16, ..=32) => (Kernel::MatmulSkinnyBf16X32, 256, 81_920),
        (Kind::Bf16, _) => (Kernel::MatmulSkinnyBf16X64, 128, 98_304),
        (Kind::E4m3 { .. }, ..=8) => (Kernel::MatmulSkinnyE4m3X8, 256, 55_296),
        (Kind::E4m3 { .. }, ..=16) => (Kernel::MatmulSkinnyE4m3X16, 256, 61_440),
        (Kind::E4m3 { .. }, ..=32) => (Kernel::MatmulSkinnyE4m3X32, 256, 73_728),
        (Kind::E4m3 { .. }, _) => (Kernel::MatmulSkinnyE4m3X64, 128, 98_304),
    }
}

/// A gate in the kernels' words, if they have it.
pub(super) fn gate_spec(activation: Activation) -> Option<GateSpec> {
    let plain = |kind| Some(GateSpec { kind, limit: 0.0, alpha: 0.0 });
    match activation {
        Activation::Silu => plain(0),
        Activation::GeluTanh => plain(1),
        Activation::ClampedSwiglu { alpha, limit } => Some(GateSpec { kind: 2, limit, alpha }),
        Activation::Gelu => plain(3),
        Activation::Tanh | Activation::Xielu { .. } => None,
    }
}

/// What is multiplied, and where it goes.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) w: CudaLinear,
    pub(super) bias: Option<CudaVector>,
    /// Rows, and elements from one to the next.
    pub(super) x: (DevicePtr, usize),
    pub(super) y: (DevicePtr, usize),
    pub(super) rows: usize,
    /// Singles are written.
    pub(super) single: bool,
    /// The weight is `[gate | up]`, and the gate is applied.
    pub(super) gate: Option<GateSpec>,
}

impl Product {
    /// Its arguments, for one dense weight.
    pub(super) fn args(&self) -> MatmulArgs {
        let shape = self.w.shape;
        let (scale_rows, scale_blocks) = match shape.kind {
            Kind::Bf16 => (1, 0),
            Kind::E4m3 { scale_rows, blocks } => (scale_rows as i32, i32::from(blocks)),
        };
        // Gates and ups are read in pairs, which padding would part.
        let out = if self.gate.is_some() { shape.rows } else { shape.out() };
        MatmulArgs {
            weight: self.w.at,
            scales: self.w.scales,
            x: self.x.0,
            bias: self.bias.map_or(DevicePtr::NULL, |b| b.bf16),
            y: self.y.0,
            partial: DevicePtr::NULL,
            counters: DevicePtr::NULL,
            experts: DevicePtr::NULL,
            offsets: DevicePtr::NULL,
            pairs: DevicePtr::NULL,
            weight_stride: shape.bytes() as u64,
            scale_stride: shape.scales() as u32,
            bias_stride: shape.rows as u32,
            x_stride: self.x.1 as i32,
            y_stride: self.y.1 as i32,
            x_head: 0,
            y_head: 0,
            rows: self.rows as i32,
            inner: shape.inner() as i32,
            out: out as i32,
            scale_rows,
            scale_blocks,
            top_k: 1,
            gather: 0,
            single_out: i32::from(self.single),
            gated: i32::from(self.gate.is_some()),
            scale: 1.0,
            cap: 0.0,
            gate: self.gate.unwrap_or(GateSpec { kind: 0, limit: 0.0, alpha: 0.0 }),
        }
    }
}

/// Where rows of a product come from, beside one dense weight.
#[derive(Clone, Copy)]
pub(super) enum Many<'a> {
    /// One weight.
    Dense,
    /// A weight a head, with its own columns: elements from a head to the next in x and in y.
    Heads { count: usize, x: usize, y: usize },
    /// A weight an expert. `gather`: rows of x are tokens, not places.
    Experts { routing: &'a CudaRouting, count: usize, gather: bool },
}

impl CudaBackend {
    /// `out = x w^T + bias`.
    pub(super) fn multiply(
        &mut self,
        w: &CudaLinear,
        bias: Option<&CudaVector>,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        expect_width("linear", x.width(), w.shape.columns)?;
        if let Some(bias) = bias {
            expect_width("linear", bias.len, w.shape.rows)?;
        }
        out.write("linear", w.shape.rows)?;
        let (x_rows, y_rows) = ((x.at, x.stride()), (out.at, out.stride()));
        let rows = self.rows(x.rows);
        let bias = bias.copied();
        self.product(&Product { w: *w, bias, x: x_rows, y: y_rows, rows, single: false, gate: None })
    }

    /// A product with one weight.
    pub(super) fn product(&mut self, p: &Product) -> Result<()> {
        // Singles with a bias are the router's alone, which is small.
        let lt = p.gate.is_none() && !(p.single && p.bias.is_some());
        if p.rows > SKINNY_ROWS && lt && self.lt_product(p)? {
            return Ok(());
        }
        self.own_product(p, p.args(), Many::Dense)
    }

    /// Through cublasLt, if it has a plan.
    fn lt_product(&mut self, p: &Product) -> Result<bool> {
        let Some(lt) = &self.lt else { return Ok(false) };
        let shape = lt_shape(&p.w.shape, lt_rows(p.rows), p.single, p.bias.is_some());
        let Some(plan) = shape.and_then(|shape| lt.plan(&shape)) else { return Ok(false) };
        let operands = LtOperands {
            x: p.x.0,
            weight: p.w.at,
            bias: p.bias.map_or(DevicePtr::NULL, |b| b.bf16),
            y: p.y.0,
            ..LtOperands::default()
        };
        lt.run(plan, &operands).map_err(driver("linear"))?;
        Ok(true)
    }

    /// Through the crate's own kernels.
    pub(super) fn own_product(&mut self, p: &Product, mut args: MatmulArgs, many: Many<'_>) -> Result<()> {
        let (mut depth, mut tiles) = (1, DevicePtr::NULL);
        let mut row_tiles = p.rows.div_ceil(ROW_TILE);
        match many {
            Many::Dense => {}
            Many::Heads { count, x, y } => {
                (args.x_head, args.y_head) = (x as i32, y as i32);
                depth = count;
            }
            Many::Experts { routing, count, gather } => {
                let pairs = p.rows * routing.top_k;
                (args.experts, args.offsets) = (routing.active, routing.offsets);
                args.pairs = routing.pairs;
                (args.top_k, args.gather) = (routing.top_k as i32, i32::from(gather));
                depth = count.min(pairs);
                tiles = routing.tiles;
                row_tiles = pairs.div_ceil(ROW_TILE) + count;
            }
        }
        let outputs = (args.out as usize).div_ceil(TILE) as u32;
        if p.rows <= SKINNY_ROWS && !self.options.batch_invariant {
            let most = match many {
                Many::Experts { count, .. } => count,
                _ => depth,
            };
            let inner = args.inner as usize;
            let splits = matmul_splits(args.out as usize, inner, most, self.multiprocessors());
            (args.partial, args.counters) = (self.workspace.partial, self.workspace.counters);
            let (kernel, threads, shared) = skinny(p.w.shape.kind, p.rows);
            return self.launch(kernel, (outputs, splits as u32, depth as u32), threads, shared, &args);
        }
        let (kernel, shared) = match p.w.shape.kind {
            Kind::Bf16 => (Kernel::MatmulGroupedBf16, 82_944),
            Kind::E4m3 { .. } => (Kernel::MatmulGroupedE4m3, 70_656),
        };
        let depth = if tiles.is_null() { depth as u32 } else { 1 };
        let args = GroupedArgs { matmul: args, tiles };
        self.launch(kernel, (outputs, row_tiles as u32, depth), 256, shared, &args)
    }

    pub(super) fn multiply_heads(
        &mut self,
        w: &CudaStack,
        (x, from): (&CudaBuffer, HeadView),
        (out, to): (&mut CudaBuffer, HeadView),
        width: usize,
    ) -> Result<()> {
        const NAME: &str = "head_linear";
        let (rows, count, shape) = (self.rows(x.rows), w.count, w.first.shape);
        let end = |view: HeadView| view.first + (count - 1) * view.stride + view.width;
        let fits = end(from) <= x.width() && end(to) <= width && (count == 1 || to.stride >= to.width);
        if !fits || (from.width, to.width) != (shape.columns, shape.rows) {
            let (out, inner, all) = (shape.rows, shape.columns, x.width());
            let message =
                format!("{count} heads of {out} x {inner} from {from:?} of {all} to {to:?} of {width}");
            return Err(device(NAME, message));
        }
        out.write(NAME, width)?;
        let eights = [from.first, from.stride, from.width, to.first, to.stride, to.width, width];
        if !w.is_bf16() || eights.iter().all(|n| n.is_multiple_of(8)) {
            if !eights.iter().all(|n| n.is_multiple_of(8)) {
                return Err(device(NAME, "8-bit weights of heads that are no multiples of 8".to_owned()));
            }
            let p = Product {
                w: w.first,
                bias: None,
                x: (x.at.add(from.first as u64 * 2), x.stride()),
                y: (out.at.add(to.first as u64 * 2), out.stride()),
                rows,
                single: false,
                gate: None,
            };
            return self.own_product(&p, p.args(), Many::Heads { count, x: from.stride, y: to.stride });
        }
        let args = HeadLinearArgs {
            weight: w.first.at,
            x: x.at,
            y: out.at,
            weight_stride: (shape.bytes() / 2) as u64,
            in_stride: shape.inner() as i32,
            rows: rows as i32,
            inner: shape.columns as i32,
            out: shape.rows as i32,
            width: width as i32,
            x_stride: x.stride() as i32,
            x_first: from.first as i32,
            x_head: from.stride as i32,
            y_stride: out.stride() as i32,
            y_first: to.first as i32,
            y_head: to.stride as i32,
        };
        let grid = (shape.rows.div_ceil(32) as u32, count as u32, rows.div_ceil(8) as u32);
        self.launch(Kernel::HeadLinearBf16, grid, 256, 0, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_have_kernels_of_their_own() {
        let e4m3 = Kind::E4m3 { scale_rows: 1, blocks: false };
        let names = [1, 8, 9, 17, 33, 64].map(|rows| skinny(Kind::Bf16, rows).0.name());
        assert_eq!(names.map(|n| &n[19..]), ["8", "8", "16", "32", "64", "64"]);
        assert_eq!(skinny(e4m3, 64).0.name(), "matmul_skinny_e4m3_64");
    }

    #[test]
    fn gates_that_kernels_have() {
        let kind = |activation| gate_spec(activation).map(|g| g.kind);
        assert_eq!(kind(Activation::Silu), Some(0));
        assert_eq!(kind(Activation::GeluTanh), Some(1));
        assert_eq!(kind(Activation::ClampedSwiglu { alpha: 1.7, limit: 7.0 }), Some(2));
        assert_eq!(kind(Activation::Gelu), Some(3));
        assert_eq!(kind(Activation::Tanh), None);
    }
}
