//! Backends with a fault built in: they prove that the gate on numbers fails where it must.

use std::borrow::Cow;

use mirai_engine::{StepOutcome, StepPlan};

use crate::backend::{
    Activation, AttentionSpec, Backend, Batch, CacheLayout, DeltaRule, Experts, HeadNorms, HeadView,
    HostTensor, LatentShape, LinearUse, LogitsHead, Norm, Outline, Pairing, Result, RopeTable, RouteSpec,
    Rows, Scoring, StepLimits, StepShape,
};

/// A fault of the kind that golden files must catch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Heads are not rotated.
    NoRope,
    /// Neighbours are rotated instead of halves, or the reverse.
    WrongPairing,
    /// Queries do not grow with their position.
    NoQueryScale,
    /// Windows see one token more.
    WiderWindow,
    /// Windows see one token less.
    NarrowerWindow,
    /// Keys and values of each layer's heads are exchanged in a circle. Holds the size of a head.
    RotatedKvHeads(usize),
    /// Norms of query and key heads are left out.
    NoQkNorm,
    /// Norms of value heads are left out.
    NoValueNorm,
    /// Values that come from keys keep the keys' weights.
    WeighedValues,
    /// Biases of linears are left out.
    NoBias,
    /// Sinks are left out.
    NoSinks,
    /// Soft caps are left out.
    NoSoftCap,
    /// Gates of attention, or of shared experts, are left out.
    NoGate,
    /// The n-th norm of the hidden width (from 0, in the order of a forward pass) does not divide.
    LostNorm(usize),
    /// Embedded rows are not scaled.
    NoEmbedScale,
    /// What blocks add to the residual stream is not scaled.
    NoResidualScale,
    /// The residual stream is not scaled after layers.
    NoOutputScale,
    /// Logits are not scaled.
    NoLogitsScale,
    /// No learned positions.
    NoPositions,
    /// Two weights of each stack (experts, heads of latent attention) are exchanged.
    SwappedExperts,
    /// Routers' weights are normed where they are not, and the reverse.
    WrongRouterNorm,
    /// The correction of routers' scores is left out.
    NoCorrection,
    /// Experts of all groups may be chosen.
    NoRouteGroups,
    /// The scale of the chosen experts is left out.
    NoExpertScale,
    /// A delta net's decay is that of another rate.
    WrongDecay,
    /// A delta net's taps are in the reverse order.
    ReversedTaps,
    /// The classifier's activation is left out.
    WrongActivation,
}

/// A backend with a fault built in.
#[derive(Debug)]
pub struct Mutant<B> {
    inner: B,
    mutation: Mutation,
    /// Norms since the pass began.
    norms: usize,
}

/// Times which rows nearly vanish under a norm that does not divide; it is undone at once.
const TINY: f32 = 1e-6;

impl<B> Mutant<B> {
    /// Builds a fault into a backend.
    pub fn new(inner: B, mutation: Mutation) -> Self {
        Self { inner, mutation, norms: 0 }
    }

    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == mutation
    }

    fn spec(&self, spec: &AttentionSpec) -> AttentionSpec {
        let change = match self.mutation {
            Mutation::WiderWindow => 1,
            Mutation::NarrowerWindow => -1,
            _ => 0,
        };
        AttentionSpec {
            window: spec.window.map(|w| w.saturating_add_signed(change)),
            soft_cap: spec.soft_cap.filter(|_| !self.is(Mutation::NoSoftCap)),
            ..spec.clone()
        }
    }

    fn head_norms<'a, V>(&self, norms: HeadNorms<'a, V>) -> HeadNorms<'a, V> {
        match self.mutation {
            Mutation::NoValueNorm => HeadNorms { v: None, ..norms },
            Mutation::WeighedValues => HeadNorms { v: norms.k, ..norms },
            _ => norms,
        }
    }

    /// A norm without its division, where this one is to be lost.
    fn lost<V: Clone>(&mut self, norm: &Norm<V>) -> Option<Norm<V>> {
        let index = self.norms;
        self.norms += 1;
        let wide = || Norm { eps: TINY.powi(-2), bias: None, ..norm.clone() };
        self.is(Mutation::LostNorm(index)).then(wide)
    }
}

impl<B: Backend> Backend for Mutant<B>
where
    B::Vector: Clone,
{
    type Buffer = B::Buffer;
    type Linear = B::Linear;
    type Vector = B::Vector;
    type Rope = B::Rope;
    type Stack = B::Stack;
    type Routing = B::Routing;

    fn limits(&mut self, limits: StepLimits) -> Result<()> {
        self.inner.limits(limits)
    }
    fn outline(&mut self, outline: &Outline) -> Result<()> {
        let attentions = outline.attentions.iter().map(|spec| self.spec(spec)).collect();
        self.inner.outline(&Outline { attentions, ..outline.clone() })
    }
    fn cache_room(&mut self, draft: &CacheLayout) -> Result<Option<u64>> {
        self.inner.cache_room(draft)
    }
    fn load_linear(&mut self, parts: Vec<HostTensor<'_>>) -> Result<B::Linear> {
        self.load_linear_for(parts, LinearUse::Activations)
    }
    fn load_linear_for(&mut self, mut parts: Vec<HostTensor<'_>>, purpose: LinearUse) -> Result<B::Linear> {
        if let (Mutation::RotatedKvHeads(head_dim), [_, k, v, ..]) = (self.mutation, &mut parts[..]) {
            for part in [k, v] {
                let rows = part.shape[0];
                let mut bytes = part.bytes.to_vec();
                bytes.rotate_left(part.bytes.len() / rows * head_dim);
                part.bytes = Cow::Owned(bytes);
            }
        }
        self.inner.load_linear_for(parts, purpose)
    }
    fn load_vector(&mut self, mut parts: Vec<HostTensor<'_>>) -> Result<B::Vector> {
        if self.is(Mutation::ReversedTaps) {
            for part in parts.iter_mut().filter(|p| p.shape.len() == 2) {
                let element = part.bytes.len() / part.shape.iter().product::<usize>();
                let mut taps: Vec<&[u8]> = part.bytes.chunks(element).collect();
                taps.chunks_mut(part.shape[1]).for_each(<[_]>::reverse);
                part.bytes = Cow::Owned(taps.concat());
            }
        }
        self.inner.load_vector(parts)
    }
    fn load_stack(&mut self, mut weights: Vec<Vec<HostTensor<'_>>>) -> Result<B::Stack> {
        if self.is(Mutation::SwappedExperts) {
            weights.swap(0, 1);
        }
        self.inner.load_stack(weights)
    }
    fn load_rope(&mut self, table: &RopeTable) -> Result<B::Rope> {
        let mut table = table.clone();
        match self.mutation {
            Mutation::NoQueryScale => table.q_scale.clear(),
            Mutation::WrongPairing => {
                table.pairing = match table.pairing {
                    Pairing::Halves => Pairing::Adjacent,
                    Pairing::Adjacent | Pairing::Apart(_) => Pairing::Halves,
                };
            }
            Mutation::NoRope => {
                table.cos.fill(1.0);
                table.sin.fill(0.0);
            }
            _ => {}
        }
        self.inner.load_rope(&table)
    }
    fn buffer(&mut self, rows: Rows, width: usize) -> Result<B::Buffer> {
        self.inner.buffer(rows, width)
    }
    fn routing(&mut self, top_k: usize) -> Result<B::Routing> {
        self.inner.routing(top_k)
    }
    fn allocate_cache(&mut self, layout: &CacheLayout) -> Result<()> {
        self.inner.allocate_cache(layout)
    }
    fn begin(&mut self, plan: &StepPlan, batch: &Batch) -> Result<()> {
        self.inner.begin(plan, batch)
    }
    fn run(&mut self, _: StepShape, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        record(self)
    }
    fn embed(&mut self, table: &B::Linear, scale: f32, out: &mut B::Buffer) -> Result<()> {
        self.norms = 0;
        self.inner.embed(table, if self.is(Mutation::NoEmbedScale) { 1.0 } else { scale }, out)
    }
    fn add_positions(&mut self, table: &B::Linear, offset: usize, x: &mut B::Buffer) -> Result<()> {
        if self.is(Mutation::NoPositions) { Ok(()) } else { self.inner.add_positions(table, offset, x) }
    }
    fn norm(&mut self, x: &B::Buffer, norm: &Norm<B::Vector>, out: &mut B::Buffer) -> Result<()> {
        match self.lost(norm) {
            None => self.inner.norm(x, norm, out),
            Some(wide) => {
                self.inner.norm(x, &wide, out)?;
                self.inner.scale(out, TINY.recip())
            }
        }
    }
    fn add_norm(
        &mut self,
        residual: &mut B::Buffer,
        x: &B::Buffer,
        scale: f32,
        norm: &Norm<B::Vector>,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let scale = if self.is(Mutation::NoResidualScale) { 1.0 } else { scale };
        match self.lost(norm) {
            None => self.inner.add_norm(residual, x, scale, norm, out),
            Some(wide) => {
                self.inner.add_norm(residual, x, scale, &wide, out)?;
                self.inner.scale(out, TINY.recip())
            }
        }
    }
    fn linear(
        &mut self,
        w: &B::Linear,
        bias: Option<&B::Vector>,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let bias = bias.filter(|_| !self.is(Mutation::NoBias));
        self.inner.linear(w, bias, x, out)
    }
    fn append(
        &mut self,
        spec: &AttentionSpec,
        norms: Option<HeadNorms<'_, B::Vector>>,
        rope: Option<&B::Rope>,
        qkv: &mut B::Buffer,
    ) -> Result<()> {
        let norms = norms.filter(|_| !self.is(Mutation::NoQkNorm)).map(|n| self.head_norms(n));
        self.inner.append(&self.spec(spec), norms, rope, qkv)
    }
    fn append_shared(
        &mut self,
        spec: &AttentionSpec,
        dim: usize,
        norms: HeadNorms<'_, B::Vector>,
        rope: &B::Rope,
        qk: &B::Buffer,
        q_out: &mut B::Buffer,
    ) -> Result<()> {
        let norms = self.head_norms(norms);
        self.inner.append_shared(&self.spec(spec), dim, norms, rope, qk, q_out)
    }
    fn append_latent(
        &mut self,
        spec: &AttentionSpec,
        shape: LatentShape,
        norm: &Norm<B::Vector>,
        rope: &B::Rope,
        io: (&B::Buffer, &B::Buffer, &mut B::Buffer),
    ) -> Result<()> {
        self.inner.append_latent(&self.spec(spec), shape, norm, rope, io)
    }
    fn head_linear(
        &mut self,
        w: &B::Stack,
        x: (&B::Buffer, HeadView),
        out: (&mut B::Buffer, HeadView),
        width: usize,
    ) -> Result<()> {
        self.inner.head_linear(w, x, out, width)
    }
    fn attention(
        &mut self,
        spec: &AttentionSpec,
        sinks: Option<&B::Vector>,
        q: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let sinks = sinks.filter(|_| !self.is(Mutation::NoSinks));
        self.inner.attention(&self.spec(spec), sinks, q, out)
    }
    fn gate(&mut self, gates: &B::Buffer, at: usize, width: usize, x: &mut B::Buffer) -> Result<()> {
        if self.is(Mutation::NoGate) { Ok(()) } else { self.inner.gate(gates, at, width, x) }
    }
    fn delta_rule(
        &mut self,
        rule: &DeltaRule<'_, B::Vector>,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let a_log = if self.is(Mutation::WrongDecay) { rule.dt_bias } else { rule.a_log };
        self.inner.delta_rule(&DeltaRule { a_log, ..*rule }, x, out)
    }
    fn glu(&mut self, activation: Activation, gate_up: &B::Buffer, out: &mut B::Buffer) -> Result<()> {
        self.inner.glu(activation, gate_up, out)
    }
    fn activate(&mut self, activation: Activation, x: &B::Buffer, out: &mut B::Buffer) -> Result<()> {
        let activation = if self.is(Mutation::WrongActivation) { Activation::Silu } else { activation };
        self.inner.activate(activation, x, out)
    }
    fn route(
        &mut self,
        spec: &RouteSpec,
        correction: Option<&B::Vector>,
        expert_scale: Option<&B::Vector>,
        logits: &B::Buffer,
        routing: &mut B::Routing,
    ) -> Result<()> {
        let mut spec = spec.clone();
        match (self.mutation, spec.scoring) {
            (Mutation::WrongRouterNorm, Scoring::SoftmaxOfChosen) => spec.scoring = Scoring::Softmax,
            (Mutation::WrongRouterNorm, _) => spec.normalize = !spec.normalize,
            (Mutation::NoRouteGroups, _) => spec.groups = None,
            _ => {}
        }
        let correction = correction.filter(|_| !self.is(Mutation::NoCorrection));
        let expert_scale = expert_scale.filter(|_| !self.is(Mutation::NoExpertScale));
        self.inner.route(&spec, correction, expert_scale, logits, routing)
    }
    fn experts(
        &mut self,
        experts: &Experts<'_, B::Stack, B::Vector>,
        routing: &B::Routing,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let keep = !self.is(Mutation::NoBias);
        let experts = Experts {
            gate_up_bias: experts.gate_up_bias.filter(|_| keep),
            down_bias: experts.down_bias.filter(|_| keep),
            ..*experts
        };
        self.inner.experts(&experts, routing, x, out)
    }
    fn add(&mut self, residual: &mut B::Buffer, x: &B::Buffer, scale: f32) -> Result<()> {
        let scale = if self.is(Mutation::NoResidualScale) { 1.0 } else { scale };
        self.inner.add(residual, x, scale)
    }
    fn scale(&mut self, x: &mut B::Buffer, factor: f32) -> Result<()> {
        if self.is(Mutation::NoOutputScale) { Ok(()) } else { self.inner.scale(x, factor) }
    }
    fn gather_outputs(&mut self, x: &B::Buffer, out: &mut B::Buffer) -> Result<()> {
        self.inner.gather_outputs(x, out)
    }
    fn sample(&mut self, head: &LogitsHead<'_, B::Linear>, hidden: &B::Buffer) -> Result<()> {
        let scale = if self.is(Mutation::NoLogitsScale) { 1.0 } else { head.scale };
        let soft_cap = head.soft_cap.filter(|_| !self.is(Mutation::NoSoftCap));
        self.inner.sample(&LogitsHead { scale, soft_cap, ..*head }, hidden)
    }
    fn mean_outputs(&mut self, x: &B::Buffer, out: &mut B::Buffer) -> Result<()> {
        self.inner.mean_outputs(x, out)
    }
    fn emit(&mut self, pooled: &B::Buffer) -> Result<()> {
        self.inner.emit(pooled)
    }
    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<()> {
        self.inner.collect(outcome)
    }
    fn is_asynchronous(&self) -> bool {
        self.inner.is_asynchronous()
    }
}
