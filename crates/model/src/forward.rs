//! The forward pass: the order of operations, written once for every backend.
//!
//! Owns the buffers between operations and which of them an operation reads and writes. Knows no request: what the
//! rows of a step are is the backend's and the executor's business.

use crate::backend::{
    Activation, Backend, BlockIo, LogitsHead, Norm, Pooling, PostNormed, Result as DeviceResult, Rows,
};
use crate::cache::Grouping;
use crate::convert::Conversion;
use crate::error::{ModelError, Result};
use crate::load_weights::{BothWeights, FfnWeights, HeadWeights, Layer, MixerWeights, Uploader, Weights};
use crate::spec::{Ffn, Head, KvSource, LayerSpec, Mixer, MlpLayer, ModelSpec, Placement, PoolOutput};
use crate::weights::WeightSource;

/// Rows between operations; all layers share them.
struct Buffers<B: Backend> {
    /// `[tokens, hidden]`: the residual stream.
    residual: B::Buffer,
    /// `[tokens, hidden]`: normed.
    normed: B::Buffer,
    /// `[tokens, hidden]`: what a block adds to the residual stream.
    out: B::Buffer,
    /// `[tokens, hidden]`: what a block gives before its norm or sum, in models that have such.
    spare: Vec<B::Buffer>,
    /// Of blocks: the i-th is as wide as any block needs its i-th.
    scratch: Vec<B::Buffer>,
    /// Chosen experts, in models that have any.
    routing: Option<B::Routing>,
    /// `[outputs, hidden]`.
    gathered: B::Buffer,
    /// `[outputs, ..]`: between the layers of a pooling head; the last is what it gives.
    pooled: Vec<B::Buffer>,
}

/// A model on a device.
pub struct Model<B: Backend> {
    weights: Weights<B>,
    ropes: Vec<B::Rope>,
    embed_scale: f32,
    position_offset: usize,
    head: Head,
    vocab: usize,
    buffers: Buffers<B>,
}

impl<B: Backend> Model<B> {
    /// Loads weights and allocates buffers. `context` is the length of the rotary tables; `progress` is told the
    /// share of the weights that is loaded, from 0 to 1.
    ///
    /// # Errors
    /// A tensor is missing, wrong, or refused by the device.
    pub fn load(
        spec: &ModelSpec,
        grouping: &Grouping,
        source: &dyn WeightSource,
        conversion: Conversion,
        context: usize,
        backend: &mut B,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self> {
        let weights = Uploader::new(spec, grouping, source, conversion, backend)?.load(progress)?;
        let device = |source| ModelError::Backend { what: "rotary tables and buffers".into(), source };
        let ropes = spec.ropes.iter().map(|r| backend.load_rope(&r.table(context)));
        let ropes = ropes.collect::<DeviceResult<_>>().map_err(device)?;
        let buffers = Buffers::new(backend, spec).map_err(device)?;
        progress(1.0);
        Ok(Self {
            weights,
            ropes,
            embed_scale: spec.embed_scale,
            position_offset: spec.learned_positions.map_or(0, |p| p.offset),
            head: spec.head.clone(),
            vocab: spec.vocab,
            buffers,
        })
    }

    /// Bytes of the weights as they were handed to the device; it may have repacked them.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes
    }

    /// Which row stands for a sequence, in models that do not generate.
    #[must_use]
    pub fn pooling(&self) -> Option<Pooling> {
        match &self.head {
            Head::Logits { .. } => None,
            Head::Pool(pool) => Some(pool.pooling),
        }
    }

    /// From the step's ids to rows of its outputs: normed ones, or what the pooling head makes of them. Sees the step's
    /// shape and the device's handles only.
    ///
    /// # Errors
    /// The device failed.
    pub fn forward(&mut self, backend: &mut B) -> DeviceResult<()> {
        let pooling = self.pooling();
        let Self { weights, ropes, buffers, embed_scale, position_offset, .. } = self;
        backend.embed(&weights.embedding, *embed_scale, &mut buffers.residual)?;
        if let Some(table) = &weights.positions {
            backend.add_positions(table, *position_offset, &mut buffers.residual)?;
        }
        let mut pass = Pass { backend, ropes, buffers, due: None };
        if let Some(norm) = &weights.embed_norm {
            pass.norm_in_place(norm)?;
        }
        for layer in &weights.layers {
            pass.layer(layer)?;
        }
        let from = match &weights.final_norm {
            Some(norm) => {
                pass.enter(norm)?;
                From::Normed
            }
            None => {
                pass.settle()?;
                From::Residual
            }
        };
        let Buffers { residual, normed, gathered, pooled, .. } = buffers;
        let x = if from == From::Normed { normed } else { residual };
        if pooling == Some(Pooling::Mean) {
            backend.mean_outputs(x, gathered)?;
        } else {
            backend.gather_outputs(x, gathered)?;
        }
        match (&weights.head, &mut pooled[..]) {
            (HeadWeights::Classifier { dense, dense_bias, labels, labels_bias }, [linear, inner, out]) => {
                backend.linear(dense, Some(dense_bias), gathered, linear)?;
                backend.activate(Activation::Tanh, linear, inner)?;
                backend.linear(labels, Some(labels_bias), inner, out)
            }
            (HeadWeights::Tokens(rows), [out]) => backend.linear(rows, None, gathered, out),
            _ => Ok(()),
        }
    }

    /// From the outputs' rows to drawn tokens, or to the answer of the pooling head.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(&self, backend: &mut B) -> DeviceResult<()> {
        let Buffers { gathered, pooled, .. } = &self.buffers;
        let (Head::Logits { scale, soft_cap, .. }, HeadWeights::Logits(weight)) =
            (&self.head, &self.weights.head)
        else {
            return backend.emit(pooled.last().unwrap_or(gathered));
        };
        let weight = weight.as_ref().unwrap_or(&self.weights.embedding);
        let head = LogitsHead { weight, scale: *scale, soft_cap: *soft_cap, vocab: self.vocab };
        backend.sample(&head, gathered)
    }
}

/// Rows that a block sees.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Residual,
    Normed,
}

/// Where its rows go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    Out,
    /// The first spare buffer, because a norm or a sum follows.
    Spare,
}

/// One run through the layers.
struct Pass<'a, B: Backend> {
    backend: &'a mut B,
    ropes: &'a [B::Rope],
    buffers: &'a mut Buffers<B>,
    /// What the residual stream still lacks: the next norm adds it on the way.
    due: Option<Due<'a, B::Vector>>,
}

/// A block's output that is not yet in the residual stream.
struct Due<'a, V> {
    /// Multiplies it.
    scale: f32,
    /// Its norm, if it has one: then it is in the first spare buffer, else in [`Buffers::out`].
    norm: Option<&'a Norm<V>>,
}

impl<'a, B: Backend> Pass<'a, B> {
    /// Adds what is due.
    fn settle(&mut self) -> DeviceResult<()> {
        let Some(Due { scale, norm }) = self.due.take() else { return Ok(()) };
        let Buffers { residual, out, spare, .. } = &mut *self.buffers;
        if let Some(norm) = norm {
            self.backend.norm(&spare[0], norm, out)?;
        }
        self.backend.add(residual, out, scale)
    }

    /// Adds what is due, and norms the residual stream beside itself.
    fn enter(&mut self, norm: &Norm<B::Vector>) -> DeviceResult<()> {
        let Buffers { residual, normed, out, spare, .. } = &mut *self.buffers;
        match self.due.take() {
            Some(Due { scale, norm: Some(post) }) => {
                let add = PostNormed { x: &spare[0], norm: post, scale, scratch: out };
                self.backend.add_post_norm(residual, add, norm, normed)
            }
            Some(Due { scale, norm: None }) => self.backend.add_norm(residual, out, scale, norm, normed),
            None => self.backend.norm(residual, norm, normed),
        }
    }

    /// The same where the norm's rows are the residual stream from now on.
    fn norm_in_place(&mut self, norm: &Norm<B::Vector>) -> DeviceResult<()> {
        self.enter(norm)?;
        std::mem::swap(&mut self.buffers.residual, &mut self.buffers.normed);
        Ok(())
    }

    fn layer(&mut self, layer: &'a Layer<B>) -> DeviceResult<()> {
        let (norms, scale) = (&layer.norms, layer.residual_scale);
        let plain = || Some(Due { scale, norm: None });
        let normed = |norm: &'a Option<Norm<B::Vector>>| Some(Due { scale, norm: norm.as_ref() });
        match layer.placement {
            Placement::Before => {
                self.enter_if(norms.mixer.as_ref())?;
                self.mixer(layer, From::Normed, To::Out)?;
                if layer.parallel {
                    self.ffn(layer, From::Normed, To::Spare)?;
                    let Buffers { out, spare, .. } = &mut *self.buffers;
                    self.backend.add(out, &spare[0], 1.0)?;
                } else {
                    self.due = plain();
                    self.enter_if(norms.ffn.as_ref())?;
                    self.ffn(layer, From::Normed, To::Out)?;
                }
                self.due = plain();
            }
            Placement::Around => {
                self.enter_if(norms.mixer.as_ref())?;
                self.mixer(layer, From::Normed, To::Spare)?;
                self.due = normed(&norms.mixer_post);
                self.enter_if(norms.ffn.as_ref())?;
                self.ffn(layer, From::Normed, To::Spare)?;
                self.due = normed(&norms.ffn_post);
            }
            Placement::After => {
                self.settle()?;
                self.mixer(layer, From::Residual, To::Spare)?;
                self.due = normed(&norms.mixer_post);
                self.settle()?;
                self.ffn(layer, From::Residual, To::Spare)?;
                self.due = normed(&norms.ffn_post);
            }
            Placement::Outside => {
                self.settle()?;
                self.mixer(layer, From::Residual, To::Out)?;
                self.due = plain();
                self.outside(norms.mixer_post.as_ref())?;
                self.ffn(layer, From::Residual, To::Out)?;
                self.due = plain();
                self.outside(norms.ffn_post.as_ref())?;
            }
        }
        if let Some(factor) = layer.output_scale {
            self.settle()?;
            self.backend.scale(&mut self.buffers.residual, factor)?;
        }
        Ok(())
    }

    fn enter_if(&mut self, norm: Option<&Norm<B::Vector>>) -> DeviceResult<()> {
        norm.map_or(Ok(()), |norm| self.enter(norm))
    }

    fn outside(&mut self, norm: Option<&Norm<B::Vector>>) -> DeviceResult<()> {
        norm.map_or(Ok(()), |norm| self.norm_in_place(norm))
    }

    fn mixer(&mut self, layer: &Layer<B>, from: From, to: To) -> DeviceResult<()> {
        let (io, _) = self.buffers.block(from, to);
        match &layer.mixer {
            MixerWeights::Attention(a) => self.backend.attention_block(&a.block(self.ropes), io),
            MixerWeights::Latent(l) => self.backend.latent_block(&l.block(self.ropes), io),
            MixerWeights::Delta(d) => self.backend.delta_block(&d.block(), io),
        }
    }

    fn ffn(&mut self, layer: &Layer<B>, from: From, to: To) -> DeviceResult<()> {
        let (io, routing) = self.buffers.block(from, to);
        match (&layer.ffn, routing) {
            (FfnWeights::Dense(mlp), _) => self.backend.mlp_block(&mlp.block(), io),
            (FfnWeights::Moe(moe), Some(routing)) => {
                self.backend.moe_block(&moe.block(), None, routing, moe_scratch(io))
            }
            (FfnWeights::DenseAndMoe(both), Some(_)) => self.dense_and_moe(both, to),
            _ => unreachable!("a model with experts has room for their choice"),
        }
    }

    /// The dense block sees the rows of the layer's norm; experts and router see the residual stream under norms of
    /// their own.
    fn dense_and_moe(&mut self, both: &BothWeights<B>, to: To) -> DeviceResult<()> {
        let Buffers { residual, normed, out, spare, scratch, routing, .. } = &mut *self.buffers;
        let ([first, inner, router, ..], Some(routing)) = (&mut spare[..], routing) else {
            unreachable!("a model with experts beside a dense block has room for both");
        };
        let sum = if to == To::Out { out } else { first };
        self.backend.mlp_block(&both.mlp.block(), BlockIo { x: normed, scratch, out: inner })?;
        self.backend.norm(inner, &both.mlp_post, sum)?;
        self.backend.norm(residual, &both.experts_norm, normed)?;
        self.backend.norm(residual, &both.router_norm, router)?;
        let io = moe_scratch(BlockIo { x: normed, scratch, out: inner });
        self.backend.moe_block(&both.moe.block(), Some(router), routing, io)?;
        self.backend.norm(inner, &both.experts_post, normed)?;
        self.backend.add(sum, normed, 1.0)
    }
}

/// Scratch buffers of a mixture of experts.
const MOE_SCRATCH: usize = 4;

/// A mixture of experts takes its last two scratch buffers from the end.
fn moe_scratch<T>(io: BlockIo<'_, T>) -> BlockIo<'_, T> {
    BlockIo { scratch: &mut io.scratch[..MOE_SCRATCH], ..io }
}

impl<B: Backend> Buffers<B> {
    fn new(backend: &mut B, spec: &ModelSpec) -> DeviceResult<Self> {
        let hidden = spec.hidden;
        let mut widths = Vec::new();
        for layer in &spec.layers {
            widest(&mut widths, &mixer_widths(spec, layer));
            widest(&mut widths, &ffn_widths(layer, hidden));
        }
        let spare = spec.layers.iter().map(spare_buffers).max().unwrap_or(0);
        let top_k = spec.layers.iter().filter_map(|l| match &l.ffn {
            Ffn::Dense(_) => None,
            Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe) => Some(moe.route.top_k),
        });
        let routing = top_k.max().map(|top_k| backend.routing(top_k)).transpose()?;
        let mut outputs = |width| backend.buffer(Rows::Outputs, width);
        let pooled = match &spec.head {
            Head::Logits { .. } => Vec::new(),
            Head::Pool(pool) => pooled_widths(&pool.output, hidden)
                .into_iter()
                .map(&mut outputs)
                .collect::<DeviceResult<_>>()?,
        };
        let gathered = outputs(hidden)?;
        let mut tokens = |width| backend.buffer(Rows::Tokens, width);
        Ok(Self {
            residual: tokens(hidden)?,
            normed: tokens(hidden)?,
            out: tokens(hidden)?,
            spare: (0..spare).map(|_| tokens(hidden)).collect::<DeviceResult<_>>()?,
            scratch: widths.into_iter().map(tokens).collect::<DeviceResult<_>>()?,
            routing,
            gathered,
            pooled,
        })
    }

    fn block(&mut self, from: From, to: To) -> (BlockIo<'_, B::Buffer>, Option<&mut B::Routing>) {
        let x = if from == From::Normed { &self.normed } else { &self.residual };
        let out = if to == To::Out { &mut self.out } else { &mut self.spare[0] };
        (BlockIo { x, scratch: &mut self.scratch, out }, self.routing.as_mut())
    }
}

/// Spare buffers that a layer needs.
fn spare_buffers(layer: &LayerSpec) -> usize {
    match (&layer.ffn, layer.placement) {
        (Ffn::DenseAndMoe(..), _) => 3,
        (_, Placement::Around | Placement::After) => 1,
        _ => usize::from(layer.parallel),
    }
}

/// Widths of [`Buffers::pooled`].
fn pooled_widths(output: &PoolOutput, hidden: usize) -> Vec<usize> {
    match output {
        PoolOutput::Embedding => Vec::new(),
        PoolOutput::Classifier { labels } => vec![hidden, hidden, *labels],
        PoolOutput::Tokens { ids, .. } => vec![ids.len()],
    }
}

/// Makes each width at least as large as another block's.
fn widest(widths: &mut Vec<usize>, others: &[usize]) {
    widths.resize(widths.len().max(others.len()), 1);
    widths.iter_mut().zip(others).for_each(|(w, o)| *w = (*w).max(*o));
}

/// Scratch that [`Backend::attention_block`], [`Backend::latent_block`] or [`Backend::delta_block`] asks for.
fn mixer_widths(spec: &ModelSpec, layer: &LayerSpec) -> Vec<usize> {
    match &layer.mixer {
        Mixer::Attention(a) => {
            let shared = if a.kv == KvSource::KeysAreValues { a.q_heads * spec.stored(a).0 } else { 1 };
            vec![a.input_width(), a.q_width(), shared]
        }
        Mixer::Latent(l) => {
            let (s, rank) = (&l.shape, l.q_rank.unwrap_or(1));
            let (q, stored) = (s.nope + s.rope, s.latent + s.rope);
            vec![rank, rank, l.heads * q, stored, l.heads * stored, l.heads * s.latent, l.heads * s.value]
        }
        Mixer::Delta(d) => vec![d.shape.in_width(), d.shape.v_heads * d.shape.v_dim],
    }
}

/// Scratch that [`Backend::mlp_block`] or [`Backend::moe_block`] asks for.
fn ffn_widths(layer: &LayerSpec, hidden: usize) -> Vec<usize> {
    let dense = |mlp: &MlpLayer| vec![if mlp.gated { 2 } else { 1 } * mlp.intermediate, mlp.intermediate];
    let moe = |shared: Option<&MlpLayer>, experts| {
        let mut widths = shared.map_or_else(|| vec![1, 1], dense);
        widths.extend([if shared.is_some() { hidden } else { 1 }, experts]);
        widths
    };
    match &layer.ffn {
        Ffn::Dense(mlp) => dense(mlp),
        Ffn::Moe(m) => moe(m.shared.as_ref(), m.route.experts),
        Ffn::DenseAndMoe(mlp, m) => {
            let mut widths = moe(m.shared.as_ref(), m.route.experts);
            widest(&mut widths, &dense(mlp));
            widths
        }
    }
}
