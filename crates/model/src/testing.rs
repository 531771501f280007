//! Runs scripted sequences through an executor, without an engine, for tests of numbers.
//!
//! Owns a bump allocator of blocks and the golden files' format. Behind the feature `test-support`.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use mirai_engine::{
    BLOCK_TOKENS, BlockAppend, BlockId, Executor, GroupKind, Row, RowInput, RowOutcome, RowOutput,
    SamplingParams, SeqId, SlotId, SlotOpen, StepOutcome, StepPlan, TokenLogprobs,
};
use serde_json::Value;

use crate::backend::{
    Activation, AttentionSpec, Backend, Batch, CacheLayout, HostTensor, LogitsHead, Norm,
    Result as DeviceResult, RopeTable, Rows, StepLimits, StepShape,
};

/// One prompt of a golden file.
#[derive(Clone, Debug)]
pub struct GoldenPrompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Log-probability of each token but the first.
    pub logprobs: Vec<f32>,
}

/// Reads `golden.json` of a case.
///
/// # Panics
/// The file is not what `golden/make.py` writes.
#[must_use]
pub fn read_golden(case: &Path) -> Vec<GoldenPrompt> {
    let text = std::fs::read_to_string(case.join("golden.json")).expect("a case has a golden.json");
    let json: Value = serde_json::from_str(&text).expect("make.py writes JSON");
    let list = |v: &Value| v.as_array().cloned().expect("make.py writes lists");
    let prompts = list(&json["prompts"]);
    prompts
        .iter()
        .map(|p| GoldenPrompt {
            ids: list(&p["ids"]).iter().map(|v| v.as_u64().expect("ids are numbers") as u32).collect(),
            logprobs: list(&p["logprobs"])
                .iter()
                .map(|v| v.as_f64().expect("log-probabilities are numbers") as f32)
                .collect(),
        })
        .collect()
}

/// Largest difference between expected and computed log-probabilities; infinite where lengths differ or a value
/// is not a number.
#[must_use]
pub fn largest_difference(expected: &[f32], got: &[f32]) -> f32 {
    if expected.len() != got.len() {
        return f32::INFINITY;
    }
    let differences = expected.iter().zip(got).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) })
}

/// A sequence of a script.
#[derive(Clone, Debug)]
pub struct Script {
    /// Its prompt.
    pub prompt: Vec<u32>,
    /// Prompt tokens a step.
    pub chunk: usize,
    /// Tokens to draw after it.
    pub draw: usize,
    /// How.
    pub sampling: SamplingParams,
}

impl Script {
    /// Computes the prompt's log-probabilities, and draws one token.
    #[must_use]
    pub fn teacher_forced(prompt: &[u32], chunk: usize) -> Self {
        let sampling = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::default() };
        Self { prompt: prompt.to_vec(), chunk, draw: 1, sampling }
    }

    /// Draws greedily, with the log-probabilities of the most likely tokens.
    #[must_use]
    pub fn greedy(prompt: &[u32], draw: usize, top: u32) -> Self {
        let sampling = SamplingParams { logprobs: Some(top), ..SamplingParams::default() };
        Self { prompt: prompt.to_vec(), chunk: usize::MAX, draw, sampling }
    }
}

/// What became of a sequence.
#[derive(Clone, Debug, Default)]
pub struct Played {
    /// Of the prompt's tokens but the first.
    pub prompt: Vec<TokenLogprobs>,
    /// Of the drawn tokens, if asked for.
    pub drawn: Vec<TokenLogprobs>,
    /// Drawn tokens.
    pub tokens: Vec<u32>,
}

impl Played {
    /// Log-probabilities of the prompt.
    #[must_use]
    pub fn prompt_logprobs(&self) -> Vec<f32> {
        self.prompt.iter().map(|t| t.logprob).collect()
    }
}

struct Actor<'a> {
    script: &'a Script,
    slot: u32,
    computed: usize,
    played: Played,
}

impl Actor<'_> {
    /// Tokens of its next row; none when it is done.
    fn next_len(&self) -> usize {
        let left = self.script.prompt.len().saturating_sub(self.computed);
        match left {
            0 if self.played.tokens.len() < self.script.draw => 1,
            0 => 0,
            n => n.min(self.script.chunk),
        }
    }
}

/// Plays scripts side by side: in every step each unfinished one has a row.
pub struct Driver<E> {
    /// The executor.
    pub executor: E,
    step: u64,
    next_block: u32,
}

impl<E: Executor> Driver<E> {
    /// Takes an executor that nobody used yet.
    pub fn new(executor: E) -> Self {
        Self { executor, step: 0, next_block: 1 }
    }

    /// Plays all scripts to their ends.
    ///
    /// # Panics
    /// The device or a row fails, or the pool is too small.
    pub fn play(&mut self, scripts: &[Script]) -> Vec<Played> {
        self.next_block = 1;
        let actor =
            |(slot, script)| Actor { script, slot: slot as u32, computed: 0, played: Played::default() };
        let mut actors: Vec<_> = scripts.iter().enumerate().map(actor).collect();
        let mut first = true;
        while actors.iter().any(|a| a.next_len() > 0) {
            let (plan, who) = self.plan(&actors, first);
            first = false;
            self.executor.submit(&plan).expect("the device works");
            let mut outcome = StepOutcome::default();
            self.executor.collect(&mut outcome).expect("the device works");
            assert_eq!((outcome.step, outcome.rows.len()), (plan.step, plan.rows.len()));
            for ((row, out), index) in plan.rows.iter().zip(&outcome.rows).zip(who) {
                take(&mut actors[index], row, out, &outcome.tokens);
            }
        }
        actors.into_iter().map(|a| a.played).collect()
    }

    fn plan(&mut self, actors: &[Actor<'_>], first: bool) -> (StepPlan, Vec<usize>) {
        let mut plan = StepPlan { step: self.step, ..StepPlan::default() };
        self.step += 1;
        let groups = self.executor.geometry().groups.len();
        if first {
            plan.opens.extend(actors.iter().map(|a| SlotOpen {
                slot: SlotId(a.slot),
                seq: SeqId(u64::from(a.slot)),
                choice: 0,
                sampling: Arc::new(a.script.sampling.clone()),
                prompt: a.script.prompt.clone().into(),
                output: Vec::new(),
                computed: 0,
                blocks: vec![Vec::new(); groups],
                restore: None,
            }));
        }
        let mut who = Vec::new();
        for (index, actor) in actors.iter().enumerate() {
            let (len, start) = (actor.next_len(), actor.computed);
            if len == 0 {
                continue;
            }
            for entry in start.div_ceil(BLOCK_TOKENS)..(start + len).div_ceil(BLOCK_TOKENS) {
                self.append(&mut plan, actor.slot, entry, groups);
            }
            let prefill = start < actor.script.prompt.len();
            let input = if prefill {
                let from = plan.tokens.len() as u32;
                plan.tokens.extend(&actor.script.prompt[start..start + len]);
                RowInput::Tokens(from)
            } else {
                RowInput::LastDrawn
            };
            let ends = start + len >= actor.script.prompt.len() && actor.script.draw > 0;
            plan.rows.push(Row {
                seq: SeqId(u64::from(actor.slot)),
                slot: SlotId(actor.slot),
                start: start as u32,
                len: len as u32,
                input,
                output: if ends { RowOutput::Sample } else { RowOutput::Nothing },
            });
            who.push(index);
        }
        (plan, who)
    }

    fn append(&mut self, plan: &mut StepPlan, slot: u32, entry: usize, groups: usize) {
        for group in 0..groups {
            assert!(
                self.next_block < self.executor.geometry().blocks,
                "the pool is too small for the script"
            );
            assert_ne!(self.executor.geometry().groups[group], GroupKind::Recurrent);
            let (group, index) = (group as u16, entry as u32);
            plan.appends.push(BlockAppend {
                slot: SlotId(slot),
                group,
                index,
                block: BlockId(self.next_block),
            });
            self.next_block += 1;
        }
    }
}

fn take(actor: &mut Actor<'_>, row: &Row, out: &RowOutcome, tokens: &[u32]) {
    assert_eq!(out.fault, None, "slot {}", actor.slot);
    actor.computed += row.len as usize;
    let drawn = &tokens[out.tokens.start as usize..out.tokens.end as usize];
    assert_eq!(drawn.len(), usize::from(row.output == RowOutput::Sample));
    actor.played.tokens.extend(drawn);
    if let Some(logprobs) = &out.logprobs {
        actor.played.prompt.extend(logprobs.prompt.iter().cloned());
        actor.played.drawn.extend(logprobs.drawn.iter().cloned());
    }
}

/// A fault of the kind that golden files must catch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Heads are not rotated.
    NoRope,
    /// Windows see one token more.
    WiderWindow,
    /// Windows see one token less.
    NarrowerWindow,
    /// Keys and values of each layer's heads are exchanged in a circle. Holds the size of a head.
    RotatedKvHeads(usize),
    /// Norms of query and key heads are left out.
    NoQkNorm,
    /// Biases of linears are left out.
    NoBias,
}

/// A backend with a fault built in: proves that the gate on numbers fails where it must.
#[derive(Debug)]
pub struct Mutant<B> {
    /// The backend that computes.
    pub inner: B,
    /// What it gets wrong.
    pub mutation: Mutation,
}

impl<B> Mutant<B> {
    fn spec(&self, spec: &AttentionSpec) -> AttentionSpec {
        let change = match self.mutation {
            Mutation::WiderWindow => 1,
            Mutation::NarrowerWindow => -1,
            _ => 0,
        };
        AttentionSpec { window: spec.window.map(|w| w.saturating_add_signed(change)), ..spec.clone() }
    }
}

impl<B: Backend> Backend for Mutant<B> {
    type Buffer = B::Buffer;
    type Linear = B::Linear;
    type Vector = B::Vector;
    type Rope = B::Rope;

    fn limits(&mut self, limits: StepLimits) -> DeviceResult<()> {
        self.inner.limits(limits)
    }
    fn load_linear(&mut self, mut parts: Vec<HostTensor<'_>>) -> DeviceResult<B::Linear> {
        if let (Mutation::RotatedKvHeads(head_dim), [_, kv @ ..]) = (self.mutation, &mut parts[..])
            && kv.len() == 2
        {
            for part in kv {
                let rows = part.shape[0];
                let mut bytes = part.bytes.to_vec();
                bytes.rotate_left(part.bytes.len() / rows * head_dim);
                part.bytes = Cow::Owned(bytes);
            }
        }
        self.inner.load_linear(parts)
    }
    fn load_vector(&mut self, parts: Vec<HostTensor<'_>>) -> DeviceResult<B::Vector> {
        self.inner.load_vector(parts)
    }
    fn load_rope(&mut self, table: &RopeTable) -> DeviceResult<B::Rope> {
        self.inner.load_rope(table)
    }
    fn buffer(&mut self, rows: Rows, width: usize) -> DeviceResult<B::Buffer> {
        self.inner.buffer(rows, width)
    }
    fn allocate_cache(&mut self, layout: &CacheLayout) -> DeviceResult<()> {
        self.inner.allocate_cache(layout)
    }
    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> DeviceResult<()> {
        self.inner.begin(plan, batch)
    }
    fn run(
        &mut self,
        _: StepShape,
        record: &mut dyn FnMut(&mut Self) -> DeviceResult<()>,
    ) -> DeviceResult<()> {
        record(self)
    }
    fn embed(&mut self, table: &B::Linear, scale: f32, out: &mut B::Buffer) -> DeviceResult<()> {
        self.inner.embed(table, scale, out)
    }
    fn rms_norm(&mut self, x: &B::Buffer, norm: &Norm<B::Vector>, out: &mut B::Buffer) -> DeviceResult<()> {
        self.inner.rms_norm(x, norm, out)
    }
    fn add_rms_norm(
        &mut self,
        residual: &mut B::Buffer,
        x: &B::Buffer,
        norm: &Norm<B::Vector>,
        out: &mut B::Buffer,
    ) -> DeviceResult<()> {
        self.inner.add_rms_norm(residual, x, norm, out)
    }
    fn linear(
        &mut self,
        w: &B::Linear,
        bias: Option<&B::Vector>,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> DeviceResult<()> {
        let bias = bias.filter(|_| self.mutation != Mutation::NoBias);
        self.inner.linear(w, bias, x, out)
    }
    fn rope_append(
        &mut self,
        spec: &AttentionSpec,
        qk_norm: Option<(&Norm<B::Vector>, &Norm<B::Vector>)>,
        rope: Option<&B::Rope>,
        qkv: &mut B::Buffer,
    ) -> DeviceResult<()> {
        let rope = rope.filter(|_| self.mutation != Mutation::NoRope);
        let qk_norm = qk_norm.filter(|_| self.mutation != Mutation::NoQkNorm);
        self.inner.rope_append(&self.spec(spec), qk_norm, rope, qkv)
    }
    fn attention(&mut self, spec: &AttentionSpec, qkv: &B::Buffer, out: &mut B::Buffer) -> DeviceResult<()> {
        self.inner.attention(&self.spec(spec), qkv, out)
    }
    fn glu(&mut self, activation: Activation, gate_up: &B::Buffer, out: &mut B::Buffer) -> DeviceResult<()> {
        self.inner.glu(activation, gate_up, out)
    }
    fn add(&mut self, residual: &mut B::Buffer, x: &B::Buffer) -> DeviceResult<()> {
        self.inner.add(residual, x)
    }
    fn gather_outputs(&mut self, x: &B::Buffer, out: &mut B::Buffer) -> DeviceResult<()> {
        self.inner.gather_outputs(x, out)
    }
    fn sample(&mut self, head: &LogitsHead<'_, B::Linear>, hidden: &B::Buffer) -> DeviceResult<()> {
        self.inner.sample(head, hidden)
    }
    fn collect(&mut self, outcome: &mut StepOutcome) -> DeviceResult<()> {
        self.inner.collect(outcome)
    }
    fn is_asynchronous(&self) -> bool {
        self.inner.is_asynchronous()
    }
}
