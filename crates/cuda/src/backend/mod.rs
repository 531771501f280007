//! [`CudaBackend`]: the operations of [`Backend`] on a GPU.
//!
//! Owns the state between operations of a step. Operations are launches on one stream and return before they have run; a
//! step is over when its results were read back. What takes more than a few lines is in this module's files.

mod attend;
mod begin;
mod experts;
mod linear;
mod load;
mod record;
mod rows;
mod sample;
mod setup;

use std::collections::VecDeque;

use mirai_engine::{StepOutcome, StepPlan};
use mirai_model::backend::{
    Activation, AttentionSpec, Backend, Batch, BlockIo, CacheLayout, DeltaRule, Experts, HeadNorms, HeadView,
    HostTensor, LatentShape, LinearUse, LogitsHead, MlpBlock, MoeBlock, Norm, NormKind, Outline, PostNormed,
    Result, RopeTable, RouteSpec, Rows, StepLimits, StepShape, Storage,
};

use self::begin::Rings;
use self::record::{Mode, Recorded};
use self::rows::Addend;
use self::sample::Pending;
use crate::args::KvLayer;
use crate::buffer::{CudaBuffer, CudaLinear, CudaRope, CudaRouting, CudaStack, CudaVector};
use crate::device::Device;
use crate::driver::{DevicePtr, Gpu, Kernels, Lt};
use crate::error::{device, driver};
use crate::kernels::Kernel;
use crate::memory::Memory;
use crate::options::CudaOptions;
use crate::products::Products;
use crate::sampling::Draws;
use crate::slots::Slots;
use crate::steps::{Step, StepBuilder};

/// Steps that may wait for `collect`: one runs while the host looks at another.
const MAX_PENDING: usize = 2;

/// Scratch of kernels that add up parts.
struct Workspace {
    /// Of matmuls.
    partial: DevicePtr,
    /// Of split attention.
    attention: DevicePtr,
    /// Zero before and after each kernel.
    counters: DevicePtr,
}

/// A GPU as a device.
pub struct CudaBackend {
    // Graphs go before the memory that they name.
    recorded: Vec<Recorded>,
    rings: Option<Rings>,
    lt: Option<Lt>,
    kernels: Kernels,
    device: Option<Device>,
    memory: Memory,
    gpu: Gpu,
    options: CudaOptions,
    limits: StepLimits,
    outline: Outline,
    workspace: Workspace,
    builder: StepBuilder,
    slots: Slots,
    step: Step,
    mode: Mode,
    /// The step in progress.
    batch: Batch,
    /// Whether what sampling reads is still to be sent.
    late: bool,
    /// In order of submission; the last one is the step in progress.
    pending: VecDeque<Pending>,
    /// Allocations that wait to be used again.
    spare: Option<Draws>,
    /// Positions that every rotary table has. Held against a step where it begins: a recorded one runs no operation that
    /// could.
    rope_positions: usize,
    /// Storages that were widened at load.
    widened: Vec<Storage>,
    /// What cublasLt multiplies.
    products: Products,
    /// Most experts, and widest rows of outputs so far.
    most_experts: usize,
    widest_output: usize,
}

impl std::fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaBackend").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}

impl CudaBackend {
    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Steps that were recorded: the rows of each, and the kernels in it.
    #[must_use]
    pub fn recorded(&self) -> Vec<(usize, usize)> {
        self.recorded.iter().map(Recorded::size).collect()
    }

    fn device(&self) -> Result<&Device> {
        self.device.as_ref().ok_or_else(|| device("cache", "was not allocated"))
    }

    fn multiprocessors(&self) -> usize {
        self.gpu.facts().multiprocessors as usize
    }

    /// Rows of a kind in this step, padding included.
    fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.step.tokens,
            Rows::Outputs => self.step.outputs,
        }
    }

    fn kv_layer(&self, spec: &AttentionSpec) -> Result<(KvLayer, bool)> {
        self.device()?.layer(spec)
    }

    fn states_of(&self, rule: &DeltaRule<'_, CudaVector>) -> Result<(DevicePtr, u64)> {
        self.device()?.states(rule)
    }

    fn launch<A: crate::KernelArgs>(
        &self,
        kernel: Kernel,
        grid: (u32, u32, u32),
        threads: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        self.kernels.launch(&self.gpu, kernel, grid, threads, shared, args).map_err(driver("launch"))
    }

    fn zero(&self, at: DevicePtr, bytes: u64) -> Result<()> {
        self.gpu.fill(at, 0, bytes).map_err(driver("allocate"))
    }
}

fn expect_width(operation: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(device(operation, format!("rows of {found}, expected {expected}")))
    }
}

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Linear = CudaLinear;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Stack = CudaStack;
    type Routing = CudaRouting;

    fn limits(&mut self, limits: StepLimits) -> Result<()> {
        self.limits = limits;
        Ok(())
    }

    fn outline(&mut self, outline: &Outline) -> Result<()> {
        self.take_outline(outline);
        Ok(())
    }

    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<CudaLinear> {
        self.put_linear(&parts, LinearUse::Activations)
    }

    fn load_linear_for(&mut self, parts: Vec<HostTensor<'_>>, purpose: LinearUse) -> Result<CudaLinear> {
        self.put_linear(&parts, purpose)
    }

    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<CudaVector> {
        self.put_vector(&parts)
    }

    fn load_stack(&mut self, weights: Vec<Vec<HostTensor<'_>>>) -> Result<CudaStack> {
        self.put_stack(&weights)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<CudaRope> {
        self.put_rope(table)
    }

    fn buffer(&mut self, rows: Rows, width: usize) -> Result<CudaBuffer> {
        self.take_buffer(rows, width)
    }

    fn routing(&mut self, top_k: usize) -> Result<CudaRouting> {
        self.take_routing(top_k)
    }

    fn cache_room(&mut self, draft: &CacheLayout) -> Result<Option<u64>> {
        self.room_for_cache(draft).map(Some)
    }

    fn memory_table(&self) -> Option<String> {
        Some(self.memory.table())
    }

    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()> {
        self.allocate(layout)
    }

    fn buckets(&self) -> Vec<StepShape> {
        let rows = self.builder.buckets.iter().filter(|_| self.options.graphs).map(|(rows, _)| *rows);
        rows.map(|rows| StepShape { tokens: rows, outputs: rows, decode_only: true }).collect()
    }

    fn record(
        &mut self,
        shape: StepShape,
        forward: &mut dyn FnMut(&mut Self) -> Result<()>,
        finish: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.record_bucket(shape, forward, finish)
    }

    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        self.begin_step(plan, batch)
    }

    fn run(&mut self, _: StepShape, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        if self.replay_forward()? { Ok(()) } else { record(self) }
    }

    fn embed(&mut self, table: &CudaLinear, scale: f32, out: &mut CudaBuffer) -> Result<()> {
        self.embed_rows(table, scale, out)
    }

    fn add_positions(&mut self, table: &CudaLinear, offset: usize, x: &mut CudaBuffer) -> Result<()> {
        self.position_rows(table, offset, x)
    }

    fn norm(&mut self, x: &CudaBuffer, norm: &Norm<CudaVector>, out: &mut CudaBuffer) -> Result<()> {
        self.norm_rows(x, None, norm, out)
    }

    fn add_norm(
        &mut self,
        residual: &mut CudaBuffer,
        x: &CudaBuffer,
        scale: f32,
        norm: &Norm<CudaVector>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.norm_rows(residual, Some(Addend { x, scale, post: None }), norm, out)
    }

    fn linear(
        &mut self,
        w: &CudaLinear,
        bias: Option<&CudaVector>,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.multiply(w, bias, x, out)
    }

    fn append(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, CudaVector>>,
        rope: Option<&CudaRope>,
        qkv: &mut CudaBuffer,
    ) -> Result<()> {
        self.append_rows(spec, norms, rope, qkv)
    }

    fn append_shared(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, CudaVector>,
        rope: &CudaRope,
        qk: &CudaBuffer,
        q_out: &mut CudaBuffer,
    ) -> Result<()> {
        self.append_shared_rows(spec, dim, norms, rope, qk, q_out)
    }

    fn append_latent(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<CudaVector>,
        rope: &CudaRope,
        (q, kv, q_out): (&CudaBuffer, &CudaBuffer, &mut CudaBuffer),
    ) -> Result<()> {
        self.append_latent_rows(spec, shape, norm, rope, (q, kv, q_out))
    }

    fn head_linear(
        &mut self,
        w: &CudaStack,
        x: (&CudaBuffer, HeadView),
        out: (&mut CudaBuffer, HeadView),
        width: usize,
    ) -> Result<()> {
        self.multiply_heads(w, x, out, width)
    }

    fn attention(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        q: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.attend(spec, sinks, q, out)
    }

    fn gate(&mut self, gates: &CudaBuffer, at: usize, width: usize, x: &mut CudaBuffer) -> Result<()> {
        self.gate_rows(gates, at, width, x)
    }

    fn delta_rule(
        &mut self,
        rule: &DeltaRule<'_, CudaVector>,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.run_delta_rule(rule, x, out)
    }

    fn glu(&mut self, activation: Activation, gate_up: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        self.glu_rows(activation, gate_up, out)
    }

    fn activate(&mut self, activation: Activation, x: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        self.activate_rows(activation, x, out)
    }

    fn route(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&CudaVector>,
        expert_scale: Option<&CudaVector>,
        logits: &CudaBuffer,
        routing: &mut CudaRouting,
    ) -> Result<()> {
        self.choose_from_rows(spec, correction, expert_scale, logits, routing)
    }

    fn experts(
        &mut self,
        experts: &Experts<'_, CudaStack, CudaVector>,
        routing: &CudaRouting,
        x: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.run_experts(experts, routing, x, out)
    }

    fn add(&mut self, residual: &mut CudaBuffer, x: &CudaBuffer, scale: f32) -> Result<()> {
        self.add_rows(residual, x, scale)
    }

    fn scale(&mut self, x: &mut CudaBuffer, factor: f32) -> Result<()> {
        self.scale_rows(x, factor)
    }

    fn gather_outputs(&mut self, x: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        self.gather_rows(x, out)
    }

    fn sample(&mut self, head: &LogitsHead<'_, CudaLinear>, hidden: &CudaBuffer) -> Result<()> {
        if self.mode == Mode::Rehearsal {
            return self.launch_sampling(head, hidden);
        }
        self.send_late()?;
        if !self.replay_finish()? {
            self.launch_sampling(head, hidden)?;
        }
        self.answer_tokens()
    }

    fn mean_outputs(&mut self, x: &CudaBuffer, out: &mut CudaBuffer) -> Result<()> {
        self.mean_rows(x, out)
    }

    fn emit(&mut self, pooled: &CudaBuffer) -> Result<()> {
        self.emit_rows(pooled)
    }

    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<()> {
        self.collect_step(outcome)
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn add_post_norm(
        &mut self,
        residual: &mut CudaBuffer,
        add: PostNormed<'_, CudaBuffer, CudaVector>,
        norm: &Norm<CudaVector>,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        let PostNormed { x, norm: post, scale, scratch } = add;
        // The kernel knows this one kind of norm before the sum.
        let fused = post.kind == NormKind::Rms && post.bias.is_none() && post.eps == norm.eps;
        match post.weight.filter(|_| fused) {
            Some(weight) => {
                expect_width("add_post_norm", weight.len, x.width())?;
                let post = Some((weight.bf16, post.offset));
                self.norm_rows(residual, Some(Addend { x, scale, post }), norm, out)
            }
            None => {
                self.norm_rows(x, None, post, scratch)?;
                self.norm_rows(residual, Some(Addend { x: scratch, scale, post: None }), norm, out)
            }
        }
    }

    fn mlp_block(&mut self, block: &MlpBlock<'_, Self>, io: BlockIo<'_, CudaBuffer>) -> Result<()> {
        self.mlp(block, io)
    }

    fn moe_block(
        &mut self,
        block: &MoeBlock<'_, Self>,
        router_x: Option<&CudaBuffer>,
        routing: &mut CudaRouting,
        io: BlockIo<'_, CudaBuffer>,
    ) -> Result<()> {
        self.moe(block, router_x, routing, io)
    }
}
