//! [`CpuBackend`]: the operations of [`Backend`] on host memory.
//!
//! Owns the state between operations of a step. Every operation runs before its call returns, so a step is over when
//! [`Backend::sample`] is, and `collect` only hands out what is already there.

use std::collections::VecDeque;
use std::time::Instant;

use mirai_engine::{BLOCK_TOKENS, RowOutcome, StepOutcome, StepPlan};
use mirai_model::backend::{
    Activation, AttentionSpec, Backend, Batch, CacheLayout, HostTensor, LogitsHead, Norm, Result, RopeTable,
    Rows, StepShape,
};

use crate::buffer::{CpuBuffer, CpuRope, CpuVector};
use crate::cache::Cache;
use crate::draws::Sampler;
use crate::linear::{CpuLinear, LinearScratch, device, load_vector};
use crate::options::{CpuOptions, default_threads};
use crate::pool::Pool;
use crate::rows::for_each_row;
use crate::simd::ops::{self, Heads, NormWeight, RopeTables};
use crate::simd::{AttnParams, AttnRow, Isa, kv_append, paged_attention};
use crate::slots::Slots;

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

    /// Checks a step against the layout and takes it over.
    fn take_batch(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        let tokens = batch.positions.len();
        if batch.ids.len() != tokens || plan.rows.len() != batch.rows.len() {
            let message = format!(
                "{} ids for {tokens} positions, {} rows for {} of the plan",
                batch.ids.len(),
                batch.rows.len(),
                plan.rows.len()
            );
            return Err(device("begin", message));
        }
        if let Some(output) = batch.outputs.iter().find(|o| **o as usize >= tokens) {
            return Err(device("begin", format!("output of token {output} of {tokens}")));
        }
        self.batch.clone_from(batch);
        let mut next = 0;
        for row in &batch.rows {
            let slot = self.slots.get(row.slot)?;
            let room = slot.tables.iter().map(Vec::len).min().unwrap_or(0) * BLOCK_TOKENS;
            if row.first != next || row.len == 0 || row.start + row.len > room || row.first + row.len > tokens
            {
                let message = format!(
                    "row of slot {}: tokens {}..+{} of {tokens} after {next}, from position {} of {room}",
                    row.slot, row.first, row.len, row.start
                );
                return Err(device("begin", message));
            }
            next += row.len;
            if row.last_drawn {
                self.batch.ids[row.first] = slot.last_drawn;
            }
        }
        Ok(())
    }

    /// Adds an empty outcome for the plan.
    fn expect_outcome(&mut self, plan: &StepPlan) -> Result<()> {
        if self.pending.len() >= MAX_PENDING {
            return Err(device("begin", format!("{} steps are not yet collected", self.pending.len())));
        }
        let mut outcome = self.spare.pop().unwrap_or_default();
        outcome.step = plan.step;
        outcome.tokens.clear();
        outcome.rows.clear();
        outcome.rows.resize_with(plan.rows.len(), RowOutcome::default);
        outcome.device_time = std::time::Duration::ZERO;
        self.pending.push_back(outcome);
        Ok(())
    }

    /// Notes how long the step in progress has taken so far.
    fn stamp(&mut self) {
        if let Some(outcome) = self.pending.back_mut() {
            outcome.device_time = self.started.elapsed();
        }
    }
}

fn norm_weight<'a>(
    norm: &'a Norm<CpuVector>,
    width: usize,
    operation: &'static str,
) -> Result<NormWeight<'a>> {
    let weight = &norm.weight.0;
    if weight.len() != width {
        return Err(device(operation, format!("a norm of {} over rows of {width}", weight.len())));
    }
    Ok(NormWeight { weight, offset: norm.offset, eps: norm.eps })
}

fn expect_width(operation: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(device(operation, format!("rows of {found}, expected {expected}")))
    }
}

fn no_cache() -> mirai_model::backend::BackendError {
    device("attention", "the cache was not allocated".to_owned())
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Linear = CpuLinear;
    type Vector = CpuVector;
    type Rope = CpuRope;

    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<CpuLinear> {
        CpuLinear::load(parts, self.isa)
    }

    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<CpuVector> {
        load_vector(&parts).map(CpuVector)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<CpuRope> {
        let half = table.rotary_dim / 2;
        if half == 0 || table.cos.len() != table.sin.len() || !table.cos.len().is_multiple_of(half) {
            let (cos, sin) = (table.cos.len(), table.sin.len());
            return Err(device("load_rope", format!("{cos} cosines and {sin} sines for {half} pairs")));
        }
        Ok(CpuRope(table.clone()))
    }

    fn buffer(&mut self, rows: Rows, width: usize) -> Result<CpuBuffer> {
        Ok(CpuBuffer::new(rows, width))
    }

    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()> {
        self.cache = Some(Cache::new(layout, self.poison_cache)?);
        self.slots = Slots::new(layout);
        Ok(())
    }

    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        self.started = Instant::now();
        self.slots.apply(plan)?;
        self.take_batch(plan, batch)?;
        self.expect_outcome(plan)
    }

    fn run(&mut self, _: StepShape, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        record(self)?;
        self.stamp();
        Ok(())
    }

    /// An id beyond the table gives a row of NaN, so that only the sequence it belongs to fails.
    fn embed(&mut self, table: &CpuLinear, scale: f32, out: &mut CpuBuffer) -> Result<()> {
        let ids = &self.batch.ids;
        let width = table.columns();
        let out = out.write("embed", ids.len(), width)?;
        for_each_row(&self.pool, out, width, &|index, row| {
            if table.row(ids[index] as usize, row).is_err() {
                row.fill(f32::NAN);
            }
            if scale != 1.0 {
                for x in row {
                    *x *= scale;
                }
            }
        });
        Ok(())
    }

    fn rms_norm(&mut self, x: &CpuBuffer, norm: &Norm<CpuVector>, out: &mut CpuBuffer) -> Result<()> {
        let rows = self.live(x.kind());
        let norm = norm_weight(norm, x.width(), "rms_norm")?;
        let out = out.write("rms_norm", rows, x.width())?;
        ops::rms_norm(&self.pool, self.isa, x.read("rms_norm", rows)?, norm, out);
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CpuBuffer,
        x: &CpuBuffer,
        norm: &Norm<CpuVector>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let rows = self.live(x.kind());
        expect_width("add_rms_norm", x.width(), residual.width())?;
        let norm = norm_weight(norm, x.width(), "add_rms_norm")?;
        let out = out.write("add_rms_norm", rows, x.width())?;
        let residual = residual.update("add_rms_norm", rows)?;
        ops::add_rms_norm(&self.pool, self.isa, residual, x.read("add_rms_norm", rows)?, norm, out);
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
            expect_width("linear", bias.0.len(), w.rows())?;
            ops::add(&self.pool, self.isa, out, &bias.0);
        }
        Ok(())
    }

    fn rope_append(
        &mut self,
        spec: &AttentionSpec,
        qk_norm: Option<(&Norm<CpuVector>, &Norm<CpuVector>)>,
        rope: Option<&CpuRope>,
        qkv: &mut CpuBuffer,
    ) -> Result<()> {
        let rows = self.live(qkv.kind());
        let [q, k, v] = heads(spec);
        expect_width("rope_append", qkv.width(), q.stride)?;
        let qkv = qkv.update("rope_append", rows)?;
        if let Some((q_norm, k_norm)) = qk_norm {
            let q_norm = norm_weight(q_norm, spec.head_dim, "rope_append")?;
            let k_norm = norm_weight(k_norm, spec.head_dim, "rope_append")?;
            ops::head_rms_norm(&self.pool, self.isa, qkv, q, rows, q_norm);
            ops::head_rms_norm(&self.pool, self.isa, qkv, k, rows, k_norm);
        }
        if let Some(CpuRope(table)) = rope {
            let positions = table.cos.len() / (table.rotary_dim / 2);
            if let Some(position) = self.batch.positions.iter().find(|p| **p as usize >= positions) {
                return Err(device("rope_append", format!("position {position} of a table of {positions}")));
            }
            let tables = RopeTables { rotary_dim: table.rotary_dim, cos: &table.cos, sin: &table.sin };
            let both = Heads { heads: q.heads + k.heads, ..q };
            ops::rope(&self.pool, self.isa, qkv, both, &self.batch.positions, tables);
        }
        let mut pages = self.cache.as_mut().ok_or_else(no_cache)?.view_mut(spec)?;
        for row in &self.batch.rows {
            let table = &self.slots.get(row.slot)?.tables[spec.group];
            kv_append(&mut pages, (qkv, k), (qkv, v), row.first..row.first + row.len, row.start, table);
        }
        Ok(())
    }

    fn attention(&mut self, spec: &AttentionSpec, qkv: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        let rows = self.live(qkv.kind());
        let [q, ..] = heads(spec);
        expect_width("attention", qkv.width(), q.stride)?;
        let pages = self.cache.as_ref().ok_or_else(no_cache)?.view(spec)?;
        let batch = &self.batch;
        let sequences = batch.rows.iter().map(|row| {
            let table = self.slots.get(row.slot)?.tables[spec.group].as_slice();
            Ok(AttnRow { q_start: row.first, q_len: row.len, kv_len: row.start + row.len, table })
        });
        let sequences = sequences.collect::<Result<Vec<_>>>()?;
        let params = AttnParams {
            q_heads: spec.q_heads,
            scale: spec.scale,
            causal: true,
            window: spec.window.map(|n| n as usize),
            soft_cap: spec.soft_cap,
            sinks: None,
        };
        let out = out.write("attention", rows, spec.q_heads * spec.head_dim)?;
        let qkv = qkv.read("attention", rows)?;
        paged_attention(&self.pool, self.isa, qkv, q, pages, &sequences, &params, out);
        Ok(())
    }

    fn glu(&mut self, activation: Activation, gate_up: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        let rows = self.live(gate_up.kind());
        if !gate_up.width().is_multiple_of(2) {
            return Err(device("glu", format!("rows of {} are no gate and up", gate_up.width())));
        }
        let width = gate_up.width() / 2;
        let out = out.write("glu", rows, width)?;
        let gate_up = gate_up.read("glu", rows)?;
        match activation {
            Activation::Silu => ops::silu_mul(&self.pool, self.isa, gate_up, width, out),
            Activation::GeluTanh => ops::gelu_tanh_mul(&self.pool, self.isa, gate_up, width, out),
        }
        Ok(())
    }

    fn add(&mut self, residual: &mut CpuBuffer, x: &CpuBuffer) -> Result<()> {
        let rows = self.live(x.kind());
        expect_width("add", x.width(), residual.width())?;
        if rows > 0 {
            ops::add(&self.pool, self.isa, residual.update("add", rows)?, x.read("add", rows)?);
        }
        Ok(())
    }

    fn gather_outputs(&mut self, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        let width = x.width();
        let x = x.read("gather_outputs", self.live(Rows::Tokens))?;
        let out = out.write("gather_outputs", self.batch.outputs.len(), width)?;
        for (to, &token) in out.chunks_exact_mut(width).zip(&self.batch.outputs) {
            let at = token as usize * width;
            to.copy_from_slice(&x[at..at + width]);
        }
        Ok(())
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

/// Where the heads of q, k and v lie in rows `[q | k | v]`.
fn heads(spec: &AttentionSpec) -> [Heads; 3] {
    let (dim, q, kv) = (spec.head_dim, spec.q_heads, spec.kv_heads);
    let stride = (q + 2 * kv) * dim;
    let at = |first: usize, heads: usize| Heads { stride, first: first * dim, heads, head_dim: dim };
    [at(0, q), at(q, kv), at(q + kv, kv)]
}
