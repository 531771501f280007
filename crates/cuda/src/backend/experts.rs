//! Mixtures of experts: the choice, the experts' products, and their sum.
//!
//! Owns the order of launches: route, first products with their gate, second products, sum. The order of rows, and which
//! experts have any, stay on the device.

use mirai_model::backend::{
    Activation, BackendError, BlockIo, Experts, MlpBlock, MoeBlock, Result, RouteSpec, Rows, Scoring,
};

use super::linear::{Many, Product, gate_spec};
use super::{CudaBackend, expect_width};
use crate::args::{CombineArgs, EmitArgs, GateSpec, RouteArgs};
use crate::buffer::{CudaBuffer, CudaRouting, CudaStack, CudaVector};
use crate::driver::DevicePtr;
use crate::error::device;
use crate::kernels::Kernel;
use crate::products::SKINNY_ROWS;
use crate::weights::padded;

/// Tokens of a block of the router.
const ROUTE_TOKENS: usize = 16;
/// Most experts and groups of the router.
const MOST_EXPERTS: usize = 512;
const MOST_GROUPS: usize = 32;

/// The gate that a matmul applies itself, where halves of its rows are multiples of 8.
pub(super) fn fused_gate(gated: bool, activation: Activation, inner: usize) -> Option<GateSpec> {
    (gated && inner.is_multiple_of(8)).then(|| gate_spec(activation)).flatten()
}

impl CudaBackend {
    /// A feed-forward block whose gate is applied by the first product, up to 64 rows.
    pub(super) fn mlp(
        &mut self,
        block: &MlpBlock<'_, Self>,
        BlockIo { x, scratch, out }: BlockIo<'_, CudaBuffer>,
    ) -> Result<()> {
        let [wide, inner, ..] = scratch else {
            let message = "too few scratch buffers".to_owned();
            return Err(BackendError::Device { operation: "mlp_block", message });
        };
        let rows = self.rows(x.rows);
        let width = block.gate_up.shape.rows / 2;
        let gate = fused_gate(block.gated, block.activation, width)
            .filter(|_| rows <= SKINNY_ROWS || self.options.batch_invariant);
        if gate.is_some() {
            expect_width("mlp_block", x.width(), block.gate_up.shape.columns)?;
            inner.write("mlp_block", width)?;
            let (x, y) = ((x.at, x.stride()), (inner.at, inner.stride()));
            let bias = block.gate_up_bias.copied();
            self.product(&Product { w: *block.gate_up, bias, x, y, rows, single: false, gate })?;
        } else {
            self.multiply(block.gate_up, block.gate_up_bias, x, wide)?;
            if block.gated {
                self.glu_rows(block.activation, wide, inner)?;
            } else {
                self.activate_rows(block.activation, wide, inner)?;
            }
        }
        self.multiply(block.down, block.down_bias, inner, out)
    }

    /// As the trait's own, with router logits in single precision.
    pub(super) fn moe(
        &mut self,
        block: &MoeBlock<'_, Self>,
        router_x: Option<&CudaBuffer>,
        routing: &CudaRouting,
        io: BlockIo<'_, CudaBuffer>,
    ) -> Result<()> {
        let BlockIo { x, scratch, out } = io;
        let [wide_and_inner @ .., shared, logits] = scratch else {
            let message = "too few scratch buffers".to_owned();
            return Err(BackendError::Device { operation: "moe_block", message });
        };
        let (router, from) = (block.router, router_x.unwrap_or(x));
        expect_width("moe_block", from.width(), router.shape.columns)?;
        expect_width("moe_block", router.shape.rows, block.route.experts)?;
        let stride = router.shape.out();
        self.product(&Product {
            w: *router,
            bias: block.router_bias.copied(),
            x: (from.at, from.stride()),
            y: (routing.logits, stride),
            rows: self.rows(from.rows),
            single: true,
            gate: None,
        })?;
        self.choose(block.route, block.correction, block.expert_scale, stride, routing)?;
        self.run_experts(&block.experts, routing, x, out)?;
        if let Some(mlp) = &block.shared {
            self.mlp(mlp, BlockIo { x, scratch: wide_and_inner, out: shared })?;
            if let Some(gate) = block.shared_gate {
                self.multiply(gate, None, x, logits)?;
                self.gate_rows(logits, 0, 1, shared)?;
            }
            self.add_rows(out, shared, 1.0)?;
        }
        Ok(())
    }

    /// The choice from logits in a buffer, which are widened first.
    pub(super) fn choose_from_rows(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&CudaVector>,
        expert_scale: Option<&CudaVector>,
        logits: &CudaBuffer,
        routing: &CudaRouting,
    ) -> Result<()> {
        expect_width("route", logits.width(), spec.experts)?;
        // Places are written by the router itself, after it has read the logits.
        let args = EmitArgs {
            x: logits.at,
            out: routing.logits,
            finite: routing.places,
            width: logits.width() as i32,
        };
        self.launch_rows(Kernel::EmitRows, self.rows(Rows::Tokens), &args)?;
        self.choose(spec, correction, expert_scale, spec.experts, routing)
    }

    fn choose(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&CudaVector>,
        expert_scale: Option<&CudaVector>,
        stride: usize,
        routing: &CudaRouting,
    ) -> Result<()> {
        const NAME: &str = "route";
        for vector in [correction, expert_scale].into_iter().flatten() {
            expect_width(NAME, vector.len, spec.experts)?;
        }
        let groups_fit = spec.groups.is_none_or(|g| {
            (1..=MOST_GROUPS).contains(&g.count)
                && spec.experts.is_multiple_of(g.count)
                && g.chosen * (spec.experts / g.count) >= spec.top_k
        });
        let known =
            spec.scoring != Scoring::SoftmaxOfChosen || (correction.is_none() && spec.groups.is_none());
        let room = spec.experts <= routing.experts.min(MOST_EXPERTS) && spec.top_k == routing.top_k;
        if spec.top_k == 0 || spec.top_k > spec.experts || !room || !groups_fit || !known {
            let (top_k, experts) = (routing.top_k, routing.experts);
            return Err(device(NAME, format!("{spec:?} into room for {top_k} of {experts} experts")));
        }
        let tokens = self.rows(Rows::Tokens);
        let args = RouteArgs {
            logits: routing.logits,
            correction: correction.map_or(DevicePtr::NULL, |v| v.single),
            expert_scale: expert_scale.map_or(DevicePtr::NULL, |v| v.single),
            chosen: routing.chosen,
            weights: routing.weights,
            places: routing.places,
            pairs: routing.pairs,
            offsets: routing.offsets,
            active: routing.active,
            tiles: routing.tiles,
            counter: routing.counter,
            tokens: tokens as i32,
            experts: spec.experts as i32,
            stride: stride as i32,
            shared: 0,
            top_k: spec.top_k as i32,
            groups: spec.groups.map_or(0, |g| g.count as i32),
            groups_kept: spec.groups.map_or(0, |g| g.chosen as i32),
            sigmoid: i32::from(spec.scoring == Scoring::Sigmoid),
            // A softmax over the chosen is one over all, divided by the sum of the chosen.
            normalize: i32::from(spec.normalize || spec.scoring == Scoring::SoftmaxOfChosen),
            scale: spec.scale,
        };
        self.launch(Kernel::MoeRoute, (tokens.div_ceil(ROUTE_TOKENS) as u32, 1, 1), 512, 0, &args)
    }

    pub(super) fn run_experts(
        &mut self,
        experts: &Experts<'_, CudaStack, CudaVector>,
        routing: &CudaRouting,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        const NAME: &str = "experts";
        let (up, down, inner) = (experts.gate_up.first, experts.down.first, experts.intermediate);
        let count = experts.gate_up.count;
        expect_width(NAME, up.shape.columns, x.width())?;
        expect_width(NAME, down.shape.columns, inner)?;
        let gated = up.shape.rows == 2 * inner;
        let gate = fused_gate(gated, experts.activation, inner);
        let wide = if gate.is_some() { 0 } else { up.shape.out() };
        let needs = [wide, padded(inner), down.shape.out()];
        let room = needs.iter().zip(routing.widths).all(|(need, have)| *need <= have);
        if !(gated || up.shape.rows == inner)
            || experts.down.count != count
            || count > routing.experts
            || !room
        {
            let message =
                format!("{count} of {:?}, then {} of {:?}", up.shape, experts.down.count, down.shape);
            return Err(device(NAME, message));
        }
        for (bias, rows) in [(experts.gate_up_bias, up.shape.rows), (experts.down_bias, down.shape.rows)] {
            if let Some(bias) = bias {
                expect_width(NAME, bias.len, count * rows)?;
            }
        }
        let tokens = self.rows(x.rows);
        let pairs = tokens * routing.top_k;
        let first = Product {
            w: up,
            bias: experts.gate_up_bias.copied(),
            x: (x.at, x.stride()),
            y: match gate {
                Some(_) => (routing.inner, padded(inner)),
                None => (routing.wide, up.shape.out()),
            },
            rows: tokens,
            single: false,
            gate,
        };
        self.own_product(&first, first.args(), Many::Experts { routing, count, gather: true })?;
        if gate.is_none() && gated {
            self.glu_at(experts.activation, routing.wide, routing.inner, (pairs, inner))?;
        } else if gate.is_none() {
            self.activate_at(experts.activation, routing.wide, routing.inner, (pairs, inner))?;
        }
        let second = Product {
            w: down,
            bias: experts.down_bias.copied(),
            x: (routing.inner, padded(inner)),
            y: (routing.out, down.shape.out()),
            gate: None,
            ..first
        };
        self.own_product(&second, second.args(), Many::Experts { routing, count, gather: false })?;
        out.write(NAME, down.shape.rows)?;
        let args = CombineArgs {
            y: routing.out,
            weights: routing.weights,
            places: routing.places,
            out: out.at,
            slots: routing.top_k as i32,
            width: down.shape.out() as i32,
        };
        self.launch_rows(Kernel::MoeCombineBf16, tokens, &args)
    }
}
