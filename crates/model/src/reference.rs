//! The oracle: a backend of plain loops in f64, for tests.
//!
//! Owns the plainest possible reading of [`Backend`]'s operations, paged cache included. It draws greedily and
//! refuses other sampling. Behind the feature `test-support`, which no release has.

use std::collections::VecDeque;
use std::sync::Arc;

use mirai_engine::{
    BLOCK_TOKENS, RowFault, RowLogprobs, RowOutcome, SamplingParams, SlotOpen, StepOutcome, StepPlan,
    TokenLogprobs,
};

use crate::backend::{
    Activation, AttentionSpec, Backend, BackendError, Batch, CacheLayout, HostTensor, LogitsHead, Norm,
    Result, RopeTable, Rows, StepShape,
};
use crate::convert::to_f32;

/// Activations, `[rows, width]`.
#[derive(Debug)]
pub struct Rows64 {
    kind: Rows,
    width: usize,
    data: Vec<f64>,
}

/// `[out, in]`.
#[derive(Debug)]
pub struct Weight {
    width: usize,
    data: Vec<f32>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    sampling: Option<Arc<SamplingParams>>,
    prompt: Option<Arc<[u32]>>,
    last: u32,
    tables: Vec<Vec<u32>>,
}

/// The oracle's state.
#[derive(Debug, Default)]
pub struct Reference {
    layout: Option<CacheLayout>,
    /// `[blocks][layers of the group][K|V][kv_heads][16][head_dim]`, one page after the other.
    pages: Vec<f64>,
    page_elements: usize,
    slots: Vec<Slot>,
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

impl Reference {
    fn rows(&self, kind: Rows) -> usize {
        match kind {
            Rows::Tokens => self.batch.ids.len(),
            Rows::Outputs => self.batch.outputs.len(),
        }
    }

    fn fit(&self, buffer: &mut Rows64) {
        buffer.data.clear();
        buffer.data.resize(self.rows(buffer.kind) * buffer.width, 0.0);
    }

    /// Where the elements of one head at one position lie.
    fn at(&self, spec: &AttentionSpec, slot: u32, position: usize, value: bool, head: usize) -> usize {
        let block = self.slots[slot as usize].tables[spec.group][position / BLOCK_TOKENS] as usize;
        let kv = usize::from(value) * spec.kv_heads + head;
        let layer = spec.layer_in_group * 2 * spec.kv_heads * BLOCK_TOKENS * spec.head_dim;
        block * self.page_elements + layer + (kv * BLOCK_TOKENS + position % BLOCK_TOKENS) * spec.head_dim
    }

    fn open(&mut self, open: &SlotOpen) {
        self.slots[open.slot.0 as usize] = Slot {
            sampling: Some(open.sampling.clone()),
            prompt: Some(open.prompt.clone()),
            last: open.output.last().copied().unwrap_or_default(),
            tables: open.blocks.iter().map(|t| t.iter().map(|b| b.0).collect()).collect(),
        };
    }

    fn outcome(&mut self, logits: &[Vec<f64>]) -> Result<StepOutcome> {
        let mut out = StepOutcome { step: self.step, ..StepOutcome::default() };
        for row in self.batch.rows.clone() {
            let from = out.tokens.len() as u32;
            let slot = &self.slots[row.slot.0 as usize];
            let params = slot.sampling.clone().ok_or_else(|| fault("sample", "the slot is closed"))?;
            if params.temperature != 0.0 {
                return Err(fault("sample", "the oracle draws greedily"));
            }
            let mut logprobs = RowLogprobs::default();
            let prompt = slot.prompt.clone().unwrap_or_else(|| Arc::from([]));
            let mut failed = None;
            let outputs = row.outputs.0..row.outputs.1;
            for (&token, logits) in self.batch.outputs[outputs.clone()].iter().zip(&logits[outputs]) {
                let token = token as usize;
                let next = self.batch.positions[token] as usize + 1;
                let values = log_softmax(logits);
                let Some(values) = values else {
                    failed = Some(RowFault::NonFinite);
                    break;
                };
                if let Some(top) = params.prompt_logprobs
                    && let Some(&id) = prompt.get(next)
                {
                    logprobs.prompt.push(entry(&values, id, top));
                }
                if row.sample && token + 1 == row.first + row.len {
                    let best = order(&values)[0];
                    if let Some(top) = params.logprobs {
                        logprobs.drawn.push(entry(&values, best, top));
                    }
                    out.tokens.push(best);
                    self.slots[row.slot.0 as usize].last = best;
                }
            }
            let wanted = params.logprobs.is_some() || params.prompt_logprobs.is_some();
            out.rows.push(RowOutcome {
                tokens: from..out.tokens.len() as u32,
                pooled: None,
                fault: failed,
                logprobs: wanted.then(|| Box::new(logprobs)),
            });
        }
        Ok(out)
    }
}

/// None where a logit is not finite.
fn log_softmax(logits: &[f64]) -> Option<Vec<f64>> {
    if logits.iter().any(|l| !l.is_finite()) {
        return None;
    }
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - largest).exp()).sum();
    Some(logits.iter().map(|l| l - largest - sum.ln()).collect())
}

/// Ids from the most likely; equal ones by id.
fn order(values: &[f64]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    ids.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
    ids
}

fn entry(values: &[f64], token: u32, top: u32) -> TokenLogprobs {
    let ids = order(values);
    let rank = ids.iter().position(|&id| id == token).map_or(0, |r| r as u32 + 1);
    let value = |id: u32| values[id as usize] as f32;
    let top = ids.iter().take(top as usize).map(|&id| (id, value(id))).collect();
    TokenLogprobs { token, logprob: value(token), rank, top }
}

fn norm_row(x: &[f64], norm: &Norm<Vec<f32>>, out: &mut [f64]) {
    let square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (square + f64::from(norm.eps)).sqrt();
    for ((o, v), w) in out.iter_mut().zip(x).zip(&norm.weight) {
        *o = v * scale * (f64::from(*w) + f64::from(norm.offset));
    }
}

fn rotate(head: &mut [f64], table: &RopeTable, position: usize) {
    let half = table.rotary_dim / 2;
    for i in 0..half {
        let (cos, sin) = (table.cos[position * half + i], table.sin[position * half + i]);
        let (cos, sin) = (f64::from(cos), f64::from(sin));
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

impl Backend for Reference {
    type Buffer = Rows64;
    type Linear = Weight;
    type Vector = Vec<f32>;
    type Rope = RopeTable;

    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Weight> {
        let width = parts.first().and_then(|p| p.shape.last().copied()).unwrap_or_default();
        if parts.iter().any(|p| p.shape.len() != 2 || p.shape[1] != width) {
            return Err(fault("load_linear", "stacked tensors differ in width"));
        }
        let mut data = Vec::new();
        for part in &parts {
            data.extend(decode(part)?);
        }
        Ok(Weight { width, data })
    }

    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<Vec<f32>> {
        let parts = parts.iter().map(decode).collect::<Result<Vec<_>>>()?;
        Ok(parts.concat())
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<RopeTable> {
        Ok(table.clone())
    }

    fn buffer(&mut self, kind: Rows, width: usize) -> Result<Rows64> {
        Ok(Rows64 { kind, width, data: Vec::new() })
    }

    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()> {
        self.page_elements = layout.groups.iter().map(|g| g.layers * g.layer_elements()).max().unwrap_or(0);
        // NaN: a read of what nobody wrote must not go unseen.
        self.pages = vec![f64::NAN; layout.blocks * self.page_elements];
        self.slots = vec![Slot::default(); layout.slots];
        self.layout = Some(layout.clone());
        Ok(())
    }

    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        plan.opens.iter().for_each(|open| self.open(open));
        for append in &plan.appends {
            let table = &mut self.slots[append.slot.0 as usize].tables[append.group as usize];
            let index = append.index as usize;
            if table.len() <= index {
                table.resize(index + 1, 0);
            }
            table[index] = append.block.0;
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
        self.fit(out);
        for (row, &id) in out.data.chunks_mut(table.width).zip(&self.batch.ids) {
            let from = id as usize * table.width;
            for (o, v) in row.iter_mut().zip(&table.data[from..from + table.width]) {
                *o = f64::from(*v) * f64::from(scale);
            }
        }
        Ok(())
    }

    fn rms_norm(&mut self, x: &Rows64, norm: &Norm<Vec<f32>>, out: &mut Rows64) -> Result<()> {
        self.fit(out);
        let width = x.width;
        x.data.chunks(width).zip(out.data.chunks_mut(width)).for_each(|(x, o)| norm_row(x, norm, o));
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Rows64,
        x: &Rows64,
        norm: &Norm<Vec<f32>>,
        out: &mut Rows64,
    ) -> Result<()> {
        self.add(residual, x)?;
        self.rms_norm(residual, norm, out)
    }

    fn linear(&mut self, w: &Weight, bias: Option<&Vec<f32>>, x: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out);
        for (x, o) in x.data.chunks(x.width).zip(out.data.chunks_mut(out.width)) {
            for (i, (o, w)) in o.iter_mut().zip(w.data.chunks(w.width)).enumerate() {
                let dot: f64 = x.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum();
                *o = dot + bias.map_or(0.0, |b| f64::from(b[i]));
            }
        }
        Ok(())
    }

    fn rope_append(
        &mut self,
        spec: &AttentionSpec,
        qk_norm: Option<(&Norm<Vec<f32>>, &Norm<Vec<f32>>)>,
        rope: Option<&RopeTable>,
        qkv: &mut Rows64,
    ) -> Result<()> {
        let (dim, width) = (spec.head_dim, qkv.width);
        for row in self.batch.rows.clone() {
            for t in 0..row.len {
                let values = &mut qkv.data[(row.first + t) * width..][..width];
                for head in 0..spec.q_heads + spec.kv_heads {
                    let part = &mut values[head * dim..(head + 1) * dim];
                    if let Some((q, k)) = qk_norm {
                        let norm = if head < spec.q_heads { q } else { k };
                        let head = part.to_vec();
                        norm_row(&head, norm, part);
                    }
                    if let Some(table) = rope {
                        rotate(part, table, row.start + t);
                    }
                }
                for head in 0..2 * spec.kv_heads {
                    let (value, head) = (head >= spec.kv_heads, head % spec.kv_heads);
                    let at = self.at(spec, row.slot.0, row.start + t, value, head);
                    let from = (spec.q_heads + usize::from(value) * spec.kv_heads + head) * dim;
                    self.pages[at..at + dim].copy_from_slice(&values[from..from + dim]);
                }
            }
        }
        Ok(())
    }

    fn attention(&mut self, spec: &AttentionSpec, qkv: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out);
        let dim = spec.head_dim;
        for row in &self.batch.rows {
            for t in 0..row.len {
                let last = row.start + t;
                let first = spec.window.map_or(0, |w| (last + 1).saturating_sub(w as usize));
                for head in 0..spec.q_heads {
                    let kv = head / (spec.q_heads / spec.kv_heads);
                    let q = &qkv.data[(row.first + t) * qkv.width + head * dim..][..dim];
                    let score = |p: usize| {
                        let k = &self.pages[self.at(spec, row.slot.0, p, false, kv)..][..dim];
                        let s = q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * f64::from(spec.scale);
                        spec.soft_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
                    };
                    let scores: Vec<f64> = (first..=last).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                    let o = &mut out.data[(row.first + t) * out.width + head * dim..][..dim];
                    for (p, s) in (first..=last).zip(&scores) {
                        let v = &self.pages[self.at(spec, row.slot.0, p, true, kv)..][..dim];
                        let share = (s - largest).exp() / sum;
                        o.iter_mut().zip(v).for_each(|(o, v)| *o += share * v);
                    }
                }
            }
        }
        Ok(())
    }

    fn glu(&mut self, activation: Activation, gate_up: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out);
        let gate = |x: f64| match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
        };
        for (x, o) in gate_up.data.chunks(gate_up.width).zip(out.data.chunks_mut(out.width)) {
            let (g, u) = x.split_at(gate_up.width / 2);
            for ((o, g), u) in o.iter_mut().zip(g).zip(u) {
                *o = gate(*g) * u;
            }
        }
        Ok(())
    }

    fn add(&mut self, residual: &mut Rows64, x: &Rows64) -> Result<()> {
        residual.data.iter_mut().zip(&x.data).for_each(|(r, x)| *r += x);
        Ok(())
    }

    fn gather_outputs(&mut self, x: &Rows64, out: &mut Rows64) -> Result<()> {
        self.fit(out);
        for (o, &t) in out.data.chunks_mut(x.width).zip(&self.batch.outputs) {
            o.copy_from_slice(&x.data[t as usize * x.width..][..x.width]);
        }
        Ok(())
    }

    fn sample(&mut self, head: &LogitsHead<'_, Weight>, hidden: &Rows64) -> Result<()> {
        let logit = |x: &[f64], w: &[f32]| {
            let dot = x.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum::<f64>() * f64::from(head.scale);
            head.soft_cap.map_or(dot, |cap| f64::from(cap) * (dot / f64::from(cap)).tanh())
        };
        let rows = head.weight.data.chunks(head.weight.width).take(head.vocab);
        let logits: Vec<Vec<f64>> =
            hidden.data.chunks(hidden.width).map(|x| rows.clone().map(|w| logit(x, w)).collect()).collect();
        let outcome = self.outcome(&logits)?;
        self.done.push_back(outcome);
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
