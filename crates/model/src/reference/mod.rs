//! The oracle: a backend of plain loops in f64, for tests.
//!
//! Owns the plainest possible reading of [`Backend`]'s operations, paged cache and recurrent states included. What nobody
//! wrote is NaN, so that a read of it does not go unseen: pages when they are given out, states that no snapshot
//! restores, elements beside a view. It draws greedily and refuses other sampling. Behind the feature `test-support`,
//! which no release has.

mod attention;
mod delta;
mod experts;
mod outcome;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use mirai_engine::{SamplingParams, SlotOpen, StepOutcome, StepPlan};

use crate::backend::{
    Activation, AttentionSpec, Backend, BackendError, Batch, CacheLayout, DeltaRule, Experts, GroupLayout,
    HeadNorms, HeadView, HostTensor, LatentShape, LogitsHead, Norm, NormKind, Result, RopeTable, RouteSpec,
    Rows, StateLayout, StepShape,
};
use crate::convert::to_f32;

/// Activations, `[rows, width]`.
#[derive(Debug)]
pub struct Rows64 {
    kind: Rows,
    /// Widest rows that may be written.
    most: usize,
    width: usize,
    data: Vec<f64>,
}

impl Rows64 {
    fn rows(&self) -> std::slice::Chunks<'_, f64> {
        self.data.chunks(self.width)
    }
}

/// `[out, in]`.
#[derive(Debug)]
pub struct Weight {
    width: usize,
    data: Vec<f32>,
}

impl Weight {
    fn new(parts: &[HostTensor<'_>]) -> Result<Self> {
        let width = parts.first().and_then(|p| p.shape.last().copied()).unwrap_or_default();
        if parts.iter().any(|p| p.shape.len() != 2 || p.shape[1] != width) {
            return Err(fault("load_linear", "stacked tensors differ in width"));
        }
        let parts = parts.iter().map(decode).collect::<Result<Vec<_>>>()?;
        Ok(Self { width, data: parts.concat() })
    }

    fn out(&self) -> usize {
        self.data.len() / self.width
    }

    fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..][..self.width]
    }

    /// `x w^T`.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        self.data.chunks(self.width).map(|w| dot(x, w)).collect()
    }
}

/// For each token, its experts and their weights.
#[derive(Debug, Default)]
pub struct Routing64(Vec<Vec<(usize, f64)>>);

#[derive(Clone, Debug, Default)]
struct Slot {
    sampling: Option<Arc<SamplingParams>>,
    prompt: Option<Arc<[u32]>>,
    last: u32,
    tables: Vec<Vec<u32>>,
    /// For each recurrent group `[layer][convolution | state]`; empty for others.
    states: Vec<Vec<f64>>,
}

/// The oracle's state.
#[derive(Debug, Default)]
pub struct Reference {
    layout: Option<CacheLayout>,
    /// One page after the other, each as the group that holds it lays it out.
    pages: Vec<f64>,
    page_elements: usize,
    slots: Vec<Slot>,
    snapshots: Vec<Vec<Vec<f64>>>,
    batch: Batch,
    step: u64,
    done: VecDeque<StepOutcome>,
}

fn fault(operation: &'static str, message: impl Into<String>) -> BackendError {
    BackendError::Device { operation, message: message.into() }
}

fn decode(part: &HostTensor<'_>) -> Result<Vec<f32>> {
    to_f32(part).map_err(|e| fault("load", e.to_string()))
}

fn dot(x: &[f64], w: &[f32]) -> f64 {
    x.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn norm_row(x: &[f64], norm: &Norm<Vec<f32>>, out: &mut [f64]) {
    let count = x.len() as f64;
    let mean = match norm.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => x.iter().sum::<f64>() / count,
    };
    let square = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (square + f64::from(norm.eps)).sqrt();
    for (i, (o, v)) in out.iter_mut().zip(x).enumerate() {
        let weight = norm.weight.as_ref().map_or(1.0, |w| f64::from(w[i]) + f64::from(norm.offset));
        *o = (v - mean) * scale * weight + norm.bias.as_ref().map_or(0.0, |b| f64::from(b[i]));
    }
}

impl Reference {
    fn row_count(&self, kind: Rows) -> usize {
        match kind {
            Rows::Tokens => self.batch.ids.len(),
            Rows::Outputs => self.batch.outputs.len(),
        }
    }

    /// Empties a buffer for this step's rows of `width`.
    fn fit(&self, buffer: &mut Rows64, width: usize) -> Result<()> {
        if width > buffer.most {
            return Err(fault("fit", format!("rows of {width} in a buffer for {}", buffer.most)));
        }
        buffer.width = width;
        buffer.data.clear();
        buffer.data.resize(self.row_count(buffer.kind) * width, 0.0);
        Ok(())
    }

    fn group(&self, group: usize) -> Option<&GroupLayout> {
        self.layout.as_ref().and_then(|l| l.groups.get(group))
    }

    fn state_layout(&self, group: usize) -> Result<StateLayout> {
        match self.group(group) {
            Some(GroupLayout::Recurrent(state)) => Ok(*state),
            _ => Err(fault("state", format!("group {group} has no states"))),
        }
    }

    /// States of a slot as a sequence finds them: zero at its start, NaN where it goes on without a snapshot.
    fn fresh_states(&self, computed: u32) -> Vec<Vec<f64>> {
        let fill = if computed == 0 { 0.0 } else { f64::NAN };
        let groups = self.layout.as_ref().map_or(&[][..], |l| &l.groups);
        let state = |group: &GroupLayout| match group {
            GroupLayout::Recurrent(state) => vec![fill; state.elements()],
            GroupLayout::Paged(_) => Vec::new(),
        };
        groups.iter().map(state).collect()
    }

    fn open(&mut self, open: &SlotOpen) -> Result<()> {
        let states = match open.restore {
            None => self.fresh_states(open.computed),
            Some(id) => {
                let found = self.snapshots.get(id.0 as usize).cloned();
                found.ok_or_else(|| fault("begin", format!("snapshot {} does not exist", id.0)))?
            }
        };
        self.slots[open.slot.0 as usize] = Slot {
            sampling: Some(open.sampling.clone()),
            prompt: Some(open.prompt.clone()),
            last: open.output.last().copied().unwrap_or_default(),
            tables: open.blocks.iter().map(|t| t.iter().map(|b| b.0).collect()).collect(),
            states,
        };
        Ok(())
    }
}

impl Backend for Reference {
    type Buffer = Rows64;
    type Linear = Weight;
    type Vector = Vec<f32>;
    type Rope = RopeTable;
    type Stack = Vec<Weight>;
    type Routing = Routing64;

    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Weight> {
        Weight::new(&parts)
    }

    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Vec<f32>> {
        let parts = parts.iter().map(decode).collect::<Result<Vec<_>>>()?;
        Ok(parts.concat())
    }

    fn load_stack(&mut self, weights: Vec<Vec<HostTensor<'_>>>) -> Result<Vec<Weight>> {
        weights.iter().map(|parts| Weight::new(parts)).collect()
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<RopeTable> {
        Ok(table.clone())
    }

    fn buffer(&mut self, kind: Rows, width: usize) -> Result<Rows64> {
        Ok(Rows64 { kind, most: width, width, data: Vec::new() })
    }

    fn routing(&mut self, _: usize) -> Result<Routing64> {
        Ok(Routing64::default())
    }

    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()> {
        let elements = |group: &GroupLayout| match group {
            GroupLayout::Paged(pages) => pages.layers * pages.layer_elements(),
            GroupLayout::Recurrent(_) => 0,
        };
        self.page_elements = layout.groups.iter().map(elements).max().unwrap_or(0);
        self.pages = vec![f64::NAN; layout.blocks * self.page_elements];
        self.slots = vec![Slot::default(); layout.slots];
        self.layout = Some(layout.clone());
        self.snapshots = vec![self.fresh_states(1); layout.snapshots];
        Ok(())
    }

    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        for save in &plan.saves {
            let states = self.slots[save.slot.0 as usize].states.clone();
            let snapshot = self.snapshots.get_mut(save.snapshot.0 as usize);
            let why = || fault("begin", format!("snapshot {} does not exist", save.snapshot.0));
            *snapshot.ok_or_else(why)? = states;
        }
        plan.opens.iter().try_for_each(|open| self.open(open))?;
        for append in &plan.appends {
            let table = &mut self.slots[append.slot.0 as usize].tables[append.group as usize];
            let index = append.index as usize;
            if table.len() <= index {
                table.resize(index + 1, 0);
            }
            table[index] = append.block.0;
            // What the page's last owner wrote is nobody's business any more.
            let from = append.block.0 as usize * self.page_elements;
            self.pages[from..from + self.page_elements].fill(f64::NAN);
        }
        self.batch = batch.clone();
        self.step = plan.step;
        for row in &batch.rows {
            if row.last_drawn {
                self.batch.ids[row.first] = self.slots[row.slot.0 as usize].last;
            }
        }
        Ok(())
    }

    fn run(&mut self, _: StepShape, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        record(self)
    }

    fn embed(&mut self, table: &Weight, scale: f32, out: &mut Rows64) -> Result<()> {
        self.fit(out, table.width)?;
        for (row, &id) in out.data.chunks_mut(table.width).zip(&self.batch.ids) {
            let values = table.row(id as usize);
            row.iter_mut().zip(values).for_each(|(o, v)| *o = f64::from(*v) * f64::from(scale));
        }
        Ok(())
    }

    fn add_positions(&mut self, table: &Weight, offset: usize, x: &mut Rows64) -> Result<()> {
        for (row, &position) in x.data.chunks_mut(table.width).zip(&self.batch.positions) {
            let values = table.row(position as usize + offset);
            row.iter_mut().zip(values).for_each(|(o, v)| *o += f64::from(*v));
        }
        Ok(())
    }

    fn norm(&mut self, x: &Rows64, norm: &Norm<Vec<f32>>, out: &mut Rows64) -> Result<()> {
        self.fit(out, x.width)?;
        x.rows().zip(out.data.chunks_mut(x.width)).for_each(|(x, o)| norm_row(x, norm, o));
        Ok(())
    }

    fn add_norm(
        &mut self,
        residual: &mut Rows64,
        x: &Rows64,
        scale: f32,
        norm: &Norm<Vec<f32>>,
        out: &mut Rows64,
    ) -> Result<()> {
        self.add(residual, x, scale)?;
        self.norm(residual, norm, out)
    }

    fn linear(&mut self, w: &Weight, bias: Option<&Vec<f32>>, x: &Rows64, out: &mut Rows64) -> Result<()> {
        if x.width != w.width {
            return Err(fault("linear", format!("rows of {} for a weight of {}", x.width, w.width)));
        }
        self.fit(out, w.out())?;
        for (x, o) in x.rows().zip(out.data.chunks_mut(w.out())) {
            o.copy_from_slice(&w.times(x));
            if let Some(bias) = bias {
                o.iter_mut().zip(bias).for_each(|(o, b)| *o += f64::from(*b));
            }
        }
        Ok(())
    }

    fn append(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, Vec<f32>>>,
        rope: Option<&RopeTable>,
        qkv: &mut Rows64,
    ) -> Result<()> {
        self.append_rows(spec, norms, rope, qkv)
    }

    fn append_shared(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, Vec<f32>>,
        rope: &RopeTable,
        qk: &Rows64,
        q_out: &mut Rows64,
    ) -> Result<()> {
        self.append_shared_rows(spec, dim, norms, rope, qk, q_out)
    }

    fn append_latent(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<Vec<f32>>,
        rope: &RopeTable,
        io: (&Rows64, &Rows64, &mut Rows64),
    ) -> Result<()> {
        self.append_latent_rows(spec, shape, norm, rope, io)
    }

    fn head_linear(
        &mut self,
        w: &Vec<Weight>,
        (x, from): (&Rows64, HeadView),
        (out, to): (&mut Rows64, HeadView),
        width: usize,
    ) -> Result<()> {
        if out.width != width || out.data.len() != self.row_count(out.kind) * width {
            self.fit(out, width)?;
            out.data.fill(f64::NAN);
        }
        for (x, o) in x.rows().zip(out.data.chunks_mut(width)) {
            for (head, w) in w.iter().enumerate() {
                let x = &x[from.first + head * from.stride..][..from.width];
                o[to.first + head * to.stride..][..to.width].copy_from_slice(&w.times(x));
            }
        }
        Ok(())
    }

    fn attention(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&Vec<f32>>,
        q: &Rows64,
        out: &mut Rows64,
    ) -> Result<()> {
        self.attend(spec, sinks, q, out)
    }

    fn gate(&mut self, gates: &Rows64, at: usize, width: usize, x: &mut Rows64) -> Result<()> {
        for (x, gates) in x.data.chunks_mut(x.width).zip(gates.rows()) {
            for (i, x) in x.iter_mut().enumerate() {
                *x *= sigmoid(gates[at + if width == 1 { 0 } else { i }]);
            }
        }
        Ok(())
    }

    fn delta_rule(&mut self, rule: &DeltaRule<'_, Vec<f32>>, x: &Rows64, out: &mut Rows64) -> Result<()> {
        self.delta_rows(rule, x, out)
    }

    fn glu(&mut self, activation: Activation, gate_up: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out, gate_up.width / 2)?;
        for (x, o) in gate_up.rows().zip(out.data.chunks_mut(gate_up.width / 2)) {
            o.copy_from_slice(&experts::glu(activation, x)?);
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation, x: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out, x.width)?;
        for (o, x) in out.data.iter_mut().zip(&x.data) {
            *o = experts::activate(activation, *x)?;
        }
        Ok(())
    }

    fn route(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&Vec<f32>>,
        expert_scale: Option<&Vec<f32>>,
        logits: &Rows64,
        routing: &mut Routing64,
    ) -> Result<()> {
        let choose = |logits: &[f64]| experts::choose(spec, correction, expert_scale, logits);
        routing.0 = logits.rows().map(choose).collect();
        Ok(())
    }

    fn experts(
        &mut self,
        weights: &Experts<'_, Vec<Weight>, Vec<f32>>,
        routing: &Routing64,
        x: &Rows64,
        out: &mut Rows64,
    ) -> Result<()> {
        let width = weights.down.first().map_or(0, Weight::out);
        self.fit(out, width)?;
        for ((x, chosen), o) in x.rows().zip(&routing.0).zip(out.data.chunks_mut(width.max(1))) {
            experts::mix(weights, chosen, x, o)?;
        }
        Ok(())
    }

    fn add(&mut self, residual: &mut Rows64, x: &Rows64, scale: f32) -> Result<()> {
        residual.data.iter_mut().zip(&x.data).for_each(|(r, x)| *r += f64::from(scale) * x);
        Ok(())
    }

    fn scale(&mut self, x: &mut Rows64, factor: f32) -> Result<()> {
        x.data.iter_mut().for_each(|x| *x *= f64::from(factor));
        Ok(())
    }

    fn gather_outputs(&mut self, x: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out, x.width)?;
        for (o, &t) in out.data.chunks_mut(x.width).zip(&self.batch.outputs) {
            o.copy_from_slice(&x.data[t as usize * x.width..][..x.width]);
        }
        Ok(())
    }

    fn sample(&mut self, head: &LogitsHead<'_, Weight>, hidden: &Rows64) -> Result<()> {
        self.sample_rows(head, hidden)
    }

    fn mean_outputs(&mut self, x: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out, x.width)?;
        for row in self.batch.rows.iter().filter(|r| r.pool) {
            let o = &mut out.data[row.outputs.0 * x.width..][..x.width];
            for token in x.rows().skip(row.first).take(row.len) {
                o.iter_mut().zip(token).for_each(|(o, x)| *o += x / row.len as f64);
            }
        }
        Ok(())
    }

    fn emit(&mut self, pooled: &Rows64) -> Result<()> {
        self.emit_rows(pooled);
        Ok(())
    }

    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<()> {
        *outcome = self.done.pop_front().ok_or_else(|| fault("collect", "nothing was submitted"))?;
        Ok(())
    }

    fn is_asynchronous(&self) -> bool {
        false
    }
}
