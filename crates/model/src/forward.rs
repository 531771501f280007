//! The forward pass: weights on a device, and the order of operations, written once for every backend.
//!
//! Owns loaded weights and the buffers between operations. Knows no request: what the rows of a step are is the
//! backend's and the executor's business.

use crate::backend::{
    AttentionBlock, AttentionSpec, Backend, BlockIo, HostTensor, LogitsHead, MlpBlock, Norm,
    Result as DeviceResult, Rows,
};
use crate::cache::Grouping;
use crate::convert::Conversion;
use crate::error::{ModelError, Result};
use crate::spec::{ModelSpec, NormSpec};
use crate::weights::{Part, TensorId, WeightSource, embedding_id};

/// Norms of each query head and of each key head.
type OwnedHeadNorms<V> = (Norm<V>, Norm<V>);

/// One layer on the device.
struct Layer<B: Backend> {
    attention_norm: Norm<B::Vector>,
    attention: AttentionSpec,
    rope: Option<usize>,
    qkv: B::Linear,
    qkv_bias: Option<B::Vector>,
    qk_norm: Option<OwnedHeadNorms<B::Vector>>,
    output: B::Linear,
    output_bias: Option<B::Vector>,
    mlp_norm: Norm<B::Vector>,
    gate_up: B::Linear,
    gate_up_bias: Option<B::Vector>,
    activation: crate::backend::Activation,
    down: B::Linear,
    down_bias: Option<B::Vector>,
    /// Its buffers in [`Buffers::inner`].
    attention_buffers: usize,
    mlp_buffers: usize,
}

/// Rows between operations. Layers of equal widths share.
struct Buffers<B: Backend> {
    /// `[tokens, hidden]`: the residual stream.
    residual: B::Buffer,
    /// `[tokens, hidden]`: normed.
    normed: B::Buffer,
    /// `[tokens, hidden]`: what a block gives.
    out: B::Buffer,
    /// `[outputs, hidden]`.
    gathered: B::Buffer,
    /// Pairs of a block's inner buffers.
    inner: Vec<(B::Buffer, B::Buffer)>,
}

/// A model on a device.
pub struct Model<B: Backend> {
    layers: Vec<Layer<B>>,
    ropes: Vec<B::Rope>,
    embedding: B::Linear,
    embed_scale: f32,
    final_norm: Norm<B::Vector>,
    /// None: tied to the embedding.
    head: Option<B::Linear>,
    logits_scale: f32,
    logits_soft_cap: Option<f32>,
    vocab: usize,
    weight_bytes: u64,
    buffers: Buffers<B>,
}

/// Takes tensors from the source, converts them, and hands them to the backend.
struct Uploader<'a, B: Backend> {
    spec: &'a ModelSpec,
    source: &'a dyn WeightSource,
    conversion: Conversion,
    backend: &'a mut B,
    embedding: TensorId,
    /// Bytes handed over so far.
    bytes: u64,
}

impl<'a, B: Backend> Uploader<'a, B> {
    fn tensor(&self, id: TensorId) -> Result<HostTensor<'a>> {
        let tensor = self.source.tensor(self.spec, id)?;
        let is_head = id == TensorId::Head || (self.spec.tied && id == self.embedding);
        self.conversion.apply(id, is_head, tensor)
    }

    fn parts(&mut self, ids: &[TensorId]) -> Result<(String, Vec<HostTensor<'a>>)> {
        let parts: Vec<_> = ids.iter().map(|&id| self.tensor(id)).collect::<Result<_>>()?;
        self.bytes += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
        let what = parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(" + ");
        Ok((what, parts))
    }

    fn linear(&mut self, ids: &[TensorId]) -> Result<B::Linear> {
        let (what, parts) = self.parts(ids)?;
        self.backend.load_linear(parts).map_err(|source| ModelError::Backend { what, source })
    }

    fn vector(&mut self, ids: &[TensorId]) -> Result<B::Vector> {
        let (what, parts) = self.parts(ids)?;
        self.backend.load_vector(parts).map_err(|source| ModelError::Backend { what, source })
    }

    fn vector_if(&mut self, wanted: bool, ids: &[TensorId]) -> Result<Option<B::Vector>> {
        if wanted { self.vector(ids).map(Some) } else { Ok(None) }
    }

    fn norm(&mut self, id: TensorId, norm: NormSpec) -> Result<Norm<B::Vector>> {
        Ok(Norm { weight: self.vector(&[id])?, offset: norm.offset, eps: norm.eps })
    }

    fn layer(&mut self, index: usize, attention: AttentionSpec, buffers: (usize, usize)) -> Result<Layer<B>> {
        let spec = &self.spec.layers[index];
        let id = |part| TensorId::Layer(index, part);
        let (a, mlp) = (&spec.attention, &spec.mlp);
        let qk_norm = match a.qk_norm {
            Some(norm) => Some((self.norm(id(Part::QNorm), norm)?, self.norm(id(Part::KNorm), norm)?)),
            None => None,
        };
        Ok(Layer {
            attention_norm: self.norm(id(Part::AttentionNorm), spec.attention_norm)?,
            attention,
            rope: a.rope,
            qkv: self.linear(&[id(Part::Q), id(Part::K), id(Part::V)])?,
            qkv_bias: self.vector_if(a.qkv_bias, &[id(Part::QBias), id(Part::KBias), id(Part::VBias)])?,
            qk_norm,
            output: self.linear(&[id(Part::O)])?,
            output_bias: self.vector_if(a.output_bias, &[id(Part::OBias)])?,
            mlp_norm: self.norm(id(Part::MlpNorm), spec.mlp_norm)?,
            gate_up: self.linear(&[id(Part::Gate), id(Part::Up)])?,
            gate_up_bias: self.vector_if(mlp.bias, &[id(Part::GateBias), id(Part::UpBias)])?,
            activation: mlp.activation,
            down: self.linear(&[id(Part::Down)])?,
            down_bias: self.vector_if(mlp.bias, &[id(Part::DownBias)])?,
            attention_buffers: buffers.0,
            mlp_buffers: buffers.1,
        })
    }
}

/// Widths of the pairs of inner buffers, without repeats.
#[derive(Default)]
struct InnerWidths(Vec<(usize, usize)>);

impl InnerWidths {
    fn index(&mut self, widths: (usize, usize)) -> usize {
        self.0.iter().position(|w| *w == widths).unwrap_or_else(|| {
            self.0.push(widths);
            self.0.len() - 1
        })
    }
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
        let embedding = embedding_id(spec, source)?;
        let mut up = Uploader { spec, source, conversion, backend, embedding, bytes: 0 };
        let steps = (spec.layers.len() + 2) as f32;
        let table = up.linear(&[embedding])?;
        progress(1.0 / steps);
        let mut widths = InnerWidths::default();
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (index, layer) in spec.layers.iter().enumerate() {
            let (a, mlp) = (&layer.attention, &layer.mlp);
            let buffers = (
                widths.index((a.qkv_width(), a.q_width())),
                widths.index((2 * mlp.intermediate, mlp.intermediate)),
            );
            layers.push(up.layer(index, grouping.attention(spec, index), buffers)?);
            progress((index + 2) as f32 / steps);
        }
        let final_norm = up.norm(TensorId::FinalNorm, spec.final_norm)?;
        let head = if spec.tied { None } else { Some(up.linear(&[TensorId::Head])?) };
        let weight_bytes = up.bytes;
        let device = |source| ModelError::Backend { what: "rotary tables and buffers".into(), source };
        let ropes = spec.ropes.iter().map(|r| backend.load_rope(&r.table(context)));
        let ropes = ropes.collect::<DeviceResult<_>>().map_err(device)?;
        let buffers = Buffers::new(backend, spec.hidden, &widths.0).map_err(device)?;
        progress(1.0);
        Ok(Self {
            layers,
            ropes,
            embedding: table,
            embed_scale: spec.embed_scale,
            final_norm,
            head,
            logits_scale: spec.logits_scale,
            logits_soft_cap: spec.logits_soft_cap,
            vocab: spec.vocab,
            weight_bytes,
            buffers,
        })
    }

    /// Bytes of the weights as they were handed to the device; it may have repacked them.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// From the step's ids to normed rows of its outputs. Sees the step's shape and the device's handles only.
    ///
    /// # Errors
    /// The device failed.
    pub fn forward(&mut self, backend: &mut B) -> DeviceResult<()> {
        let Self { layers, ropes, buffers, .. } = self;
        let Buffers { residual, normed, out, gathered, inner } = buffers;
        backend.embed(&self.embedding, self.embed_scale, residual)?;
        for (index, layer) in layers.iter().enumerate() {
            if index == 0 {
                backend.rms_norm(residual, &layer.attention_norm, normed)?;
            } else {
                backend.add_rms_norm(residual, out, &layer.attention_norm, normed)?;
            }
            let block = AttentionBlock {
                spec: &layer.attention,
                qkv: &layer.qkv,
                qkv_bias: layer.qkv_bias.as_ref(),
                qk_norm: layer.qk_norm.as_ref().map(|(q, k)| (q, k)),
                rope: layer.rope.map(|r| &ropes[r]),
                output: &layer.output,
                output_bias: layer.output_bias.as_ref(),
            };
            let (wide, narrow) = &mut inner[layer.attention_buffers];
            backend.attention_block(&block, BlockIo { x: normed, wide, inner: narrow, out })?;
            backend.add_rms_norm(residual, out, &layer.mlp_norm, normed)?;
            let block = MlpBlock {
                gate_up: &layer.gate_up,
                gate_up_bias: layer.gate_up_bias.as_ref(),
                activation: layer.activation,
                down: &layer.down,
                down_bias: layer.down_bias.as_ref(),
            };
            let (wide, narrow) = &mut inner[layer.mlp_buffers];
            backend.mlp_block(&block, BlockIo { x: normed, wide, inner: narrow, out })?;
        }
        backend.add_rms_norm(residual, out, &self.final_norm, normed)?;
        backend.gather_outputs(normed, gathered)
    }

    /// From the outputs' rows to drawn tokens.
    ///
    /// # Errors
    /// The device failed.
    pub fn sample(&self, backend: &mut B) -> DeviceResult<()> {
        let head = LogitsHead {
            weight: self.head.as_ref().unwrap_or(&self.embedding),
            scale: self.logits_scale,
            soft_cap: self.logits_soft_cap,
            vocab: self.vocab,
        };
        backend.sample(&head, &self.buffers.gathered)
    }
}

impl<B: Backend> Buffers<B> {
    fn new(backend: &mut B, hidden: usize, inner: &[(usize, usize)]) -> DeviceResult<Self> {
        let mut tokens = |width| backend.buffer(Rows::Tokens, width);
        Ok(Self {
            residual: tokens(hidden)?,
            normed: tokens(hidden)?,
            out: tokens(hidden)?,
            inner: inner.iter().map(|&(a, b)| Ok((tokens(a)?, tokens(b)?))).collect::<DeviceResult<_>>()?,
            gathered: backend.buffer(Rows::Outputs, hidden)?,
        })
    }
}
