//! [`CpuBackend`]: the operations of [`Backend`] on host memory.
//!
//! Owns the state between operations of a step. Every operation runs before its call returns, so a step is over when
//! [`Backend::sample`] is, and `collect` only hands out what is already there. What takes more than a few lines is in
//! this module's files: attention, the delta rule and experts, and what happens at both ends of a step.

mod attend;
mod experts;
mod steps;

use std::collections::VecDeque;
use std::time::Instant;

use mirai_engine::{StepOutcome, StepPlan};
use mirai_model::backend::{
    Activation, AttentionSpec, Backend, BackendError, Batch, CacheLayout, DeltaRule, Experts, HeadNorms,
    HeadView, HostTensor, LatentShape, LogitsHead, Norm, NormKind, Result, RopeTable, RouteSpec, Rows,
    StepShape,
};

use crate::buffer::{CpuBuffer, CpuRope, CpuRouting, CpuVector};
use crate::cache::Cache;
use crate::draws::Sampler;
use crate::linear::{CpuLinear, LinearScratch, device, load_vector};
use crate::options::{CpuOptions, default_threads};
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::ops::{self, Glu, Heads, NormParams};
use crate::slots::Slots;
use crate::stack::CpuStack;

/// Steps that may wait for `collect`; the engine has at most two.
const MAX_PENDING: usize = 4;

/// The CPU as a device.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
    poison_cache: bool,
    cache: Option<Cache>,
    slots: Slots,
    /// The step in progress, ids of drawn tokens filled in.
    batch: Batch,
    started: Instant,
    /// Outcomes in order of submission; the last one is the step in progress.
    pending: VecDeque<StepOutcome>,
    /// Outcomes whose allocations wait to be used again.
    spare: Vec<StepOutcome>,
    linear: LinearScratch,
    attend: attend::Scratch,
    experts: experts::Scratch,
    sampler: Sampler,
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuBackend").field("pool", &self.pool).field("isa", &self.isa).finish_non_exhaustive()
    }
}

impl CpuBackend {
    /// Starts the threads.
    #[must_use]
    pub fn new(options: &CpuOptions) -> Self {
        let pool = Pool::new(options.threads.unwrap_or_else(default_threads));
        let sampler = Sampler::new(pool.threads());
        Self {
            pool,
            isa: options.isa.map_or_else(Isa::detect, Isa::available),
            poison_cache: options.poison_cache,
            cache: None,
            slots: Slots::default(),
            batch: Batch::default(),
            started: Instant::now(),
            pending: VecDeque::new(),
            spare: Vec::new(),
            linear: LinearScratch::default(),
            attend: attend::Scratch::default(),
            experts: experts::Scratch::default(),
            sampler,
        }
    }

    /// Threads that compute.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Instruction set of the kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Rows of a kind in this step.
    fn live(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.batch.positions.len(),
            Rows::Outputs => self.batch.outputs.len(),
        }
    }

    /// Notes how long the step in progress has taken so far.
    fn stamp(&mut self) {
        if let Some(outcome) = self.pending.back_mut() {
            outcome.device_time = self.started.elapsed();
        }
    }
}

fn norm_params<'a>(
    norm: &'a Norm<CpuVector>,
    width: usize,
    operation: &'static str,
) -> Result<NormParams<'a>> {
    let part = |vector: &'a Option<CpuVector>| match vector {
        Some(v) if v.values().len() != width => {
            Err(device(operation, format!("a norm of {} over rows of {width}", v.values().len())))
        }
        vector => Ok(vector.as_ref().map(CpuVector::values)),
    };
    Ok(NormParams {
        center: norm.kind == NormKind::Layer,
        weight: part(&norm.weight)?,
        bias: part(&norm.bias)?,
        offset: norm.offset,
        eps: norm.eps,
    })
}

/// A function of one value, in the kernels' words.
fn unary(operation: &'static str, activation: Activation) -> Result<ops::Activation> {
    Ok(match activation {
        Activation::Silu => ops::Activation::Silu,
        Activation::GeluTanh => ops::Activation::GeluTanh,
        Activation::Gelu => ops::Activation::Gelu,
        Activation::Tanh => ops::Activation::Tanh,
        Activation::Xielu { alpha_p, alpha_n, beta, eps } => {
            ops::Activation::Xielu { alpha_p, alpha_n, beta, eps }
        }
        Activation::ClampedSwiglu { .. } => {
            return Err(device(operation, format!("{activation:?} needs a gate")));
        }
    })
}

/// A function of gate and up, in the kernels' words.
fn gated(operation: &'static str, activation: Activation) -> Result<Glu> {
    match activation {
        Activation::ClampedSwiglu { alpha, limit } => Ok(Glu::ClampedSwiglu { alpha, limit }),
        other => unary(operation, other).map(Glu::Gated),
    }
}

fn expect_width(operation: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(device(operation, format!("rows of {found}, expected {expected}")))
    }
}

fn no_cache() -> BackendError {
    device("cache", "was not allocated".to_owned())
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Linear = CpuLinear;
    type Vector = CpuVector;
    type Rope = CpuRope;
    type Stack = CpuStack;
    type Routing = CpuRouting;

    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<CpuLinear> {
        CpuLinear::load(parts, self.isa)
    }

    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<CpuVector> {
        load_vector(&parts).map(CpuVector::new)
    }

    fn load_stack(&mut self, weights: Vec<Vec<HostTensor<'_>>>) -> Result<CpuStack> {
        CpuStack::load(weights, self.isa)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<CpuRope> {
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
        Ok(CpuRope(table.clone()))
    }

    fn buffer(&mut self, rows: Rows, width: usize) -> Result<CpuBuffer> {
        Ok(CpuBuffer::new(rows, width))
    }

    fn routing(&mut self, top_k: usize) -> Result<CpuRouting> {
        Ok(CpuRouting::new(top_k))
    }

    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()> {
        self.cache = Some(Cache::new(layout, self.poison_cache)?);
        self.slots = Slots::new(layout);
        Ok(())
    }

    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        self.started = Instant::now();
        self.slots.apply(plan, self.cache.as_mut().ok_or_else(no_cache)?)?;
        self.take_batch(plan, batch)?;
        self.expect_outcome(plan)
    }

    fn run(&mut self, _: StepShape, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        record(self)?;
        self.stamp();
        Ok(())
    }

    fn embed(&mut self, table: &CpuLinear, scale: f32, out: &mut CpuBuffer) -> Result<()> {
        self.embed_tokens(table, scale, out)
    }

    fn add_positions(&mut self, table: &CpuLinear, offset: usize, x: &mut CpuBuffer) -> Result<()> {
        self.embed_positions(table, offset, x)
    }

    fn norm(&mut self, x: &CpuBuffer, norm: &Norm<CpuVector>, out: &mut CpuBuffer) -> Result<()> {
        let (rows, width) = (self.live(x.kind()), x.width());
        let norm = norm_params(norm, width, "norm")?;
        let out = out.write("norm", rows, width)?;
        ops::norm(&self.pool, self.isa, x.read("norm", rows)?, width, norm, out);
        Ok(())
    }

    fn add_norm(
        &mut self,
        residual: &mut CpuBuffer,
        x: &CpuBuffer,
        scale: f32,
        norm: &Norm<CpuVector>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let (rows, width) = (self.live(x.kind()), x.width());
        expect_width("add_norm", width, residual.width())?;
        let norm = norm_params(norm, width, "add_norm")?;
        let out = out.write("add_norm", rows, width)?;
        let residual = residual.update("add_norm", rows)?;
        let x = (x.read("add_norm", rows)?, scale);
        ops::add_norm(&self.pool, self.isa, residual, x, width, norm, out);
        Ok(())
    }

    fn linear(
        &mut self,
        w: &CpuLinear,
        bias: Option<&CpuVector>,
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let rows = self.live(x.kind());
        expect_width("linear", x.width(), w.columns())?;
        let out = out.write("linear", rows, w.rows())?;
        w.matmul(&self.pool, x.read("linear", rows)?, rows, out, &mut self.linear)?;
        if let Some(bias) = bias
            && rows > 0
        {
            expect_width("linear", bias.values().len(), w.rows())?;
            ops::add(&self.pool, self.isa, out, bias.values(), 1.0);
        }
        Ok(())
    }

    fn append(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, CpuVector>>,
        rope: Option<&CpuRope>,
        qkv: &mut CpuBuffer,
    ) -> Result<()> {
        self.append_rows(spec, norms, rope, qkv)
    }

    fn append_shared(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, CpuVector>,
        rope: &CpuRope,
        qk: &CpuBuffer,
        q_out: &mut CpuBuffer,
    ) -> Result<()> {
        self.append_shared_rows(spec, dim, norms, rope, qk, q_out)
    }

    fn append_latent(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<CpuVector>,
        rope: &CpuRope,
        io: (&CpuBuffer, &CpuBuffer, &mut CpuBuffer),
    ) -> Result<()> {
        self.append_latent_rows(spec, shape, norm, rope, io)
    }

    fn head_linear(
        &mut self,
        w: &CpuStack,
        x: (&CpuBuffer, HeadView),
        out: (&mut CpuBuffer, HeadView),
        width: usize,
    ) -> Result<()> {
        self.multiply_heads(w, x, out, width)
    }

    fn attention(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&CpuVector>,
        q: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.attend(spec, sinks, q, out)
    }

    fn gate(&mut self, gates: &CpuBuffer, at: usize, width: usize, x: &mut CpuBuffer) -> Result<()> {
        let (rows, x_width) = (self.live(x.kind()), x.width());
        if !(width == 1 || width == x_width) || at + width > gates.width() {
            let message =
                format!("{width} gates at {at} of rows of {}, for rows of {x_width}", gates.width());
            return Err(device("gate", message));
        }
        let place = Heads { stride: gates.width(), first: at, heads: 1, head_dim: width };
        let x = x.update("gate", rows)?;
        ops::gate(&self.pool, self.isa, x, x_width, gates.read("gate", rows)?, place);
        Ok(())
    }

    fn delta_rule(
        &mut self,
        rule: &DeltaRule<'_, CpuVector>,
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.run_delta_rule(rule, x, out)
    }

    fn glu(&mut self, activation: Activation, gate_up: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        let rows = self.live(gate_up.kind());
        if !gate_up.width().is_multiple_of(2) {
            return Err(device("glu", format!("rows of {} are no gate and up", gate_up.width())));
        }
        let width = gate_up.width() / 2;
        let out = out.write("glu", rows, width)?;
        let gate_up = gate_up.read("glu", rows)?;
        ops::glu(&self.pool, self.isa, gated("glu", activation)?, gate_up, width, out);
        Ok(())
    }

    fn activate(&mut self, activation: Activation, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        let (rows, width) = (self.live(x.kind()), x.width());
        let out = out.write("activate", rows, width)?;
        let x = x.read("activate", rows)?;
        ops::activate(&self.pool, self.isa, unary("activate", activation)?, x, width, out);
        Ok(())
    }

    fn route(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&CpuVector>,
        expert_scale: Option<&CpuVector>,
        logits: &CpuBuffer,
        routing: &mut CpuRouting,
    ) -> Result<()> {
        self.choose_experts(spec, correction, expert_scale, logits, routing)
    }

    fn experts(
        &mut self,
        experts: &Experts<'_, CpuStack, CpuVector>,
        routing: &CpuRouting,
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        self.run_experts(experts, routing, x, out)
    }

    fn add(&mut self, residual: &mut CpuBuffer, x: &CpuBuffer, scale: f32) -> Result<()> {
        let rows = self.live(x.kind());
        expect_width("add", x.width(), residual.width())?;
        if rows > 0 {
            ops::add(&self.pool, self.isa, residual.update("add", rows)?, x.read("add", rows)?, scale);
        }
        Ok(())
    }

    fn scale(&mut self, x: &mut CpuBuffer, factor: f32) -> Result<()> {
        let rows = self.live(x.kind());
        ops::scale(x.update("scale", rows)?, factor);
        Ok(())
    }

    fn gather_outputs(&mut self, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        self.gather(x, out)
    }

    fn sample(&mut self, head: &LogitsHead<'_, CpuLinear>, hidden: &CpuBuffer) -> Result<()> {
        let outputs = self.live(Rows::Outputs);
        expect_width("sample", hidden.width(), head.weight.columns())?;
        let hidden = hidden.read("sample", outputs)?;
        let outcome =
            self.pending.back_mut().ok_or_else(|| device("sample", "no step was begun".to_owned()))?;
        let (pool, linear) = (&self.pool, &mut self.linear);
        self.sampler.run(pool, head, hidden, &self.batch, &mut self.slots, linear, outcome)?;
        self.stamp();
        Ok(())
    }

    fn mean_outputs(&mut self, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        self.mean_of_rows(x, out)
    }

    fn emit(&mut self, pooled: &CpuBuffer) -> Result<()> {
        self.emit_rows(pooled)?;
        self.stamp();
        Ok(())
    }

    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<()> {
        let done =
            self.pending.pop_front().ok_or_else(|| device("collect", "no step was submitted".to_owned()))?;
        self.spare.push(std::mem::replace(outcome, done));
        self.spare.truncate(MAX_PENDING);
        Ok(())
    }

    fn is_asynchronous(&self) -> bool {
        false
    }
}
