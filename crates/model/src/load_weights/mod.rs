//! From a specification and a source of tensors to a model's weights on a device.
//!
//! Owns which tensors become which weight of an operation, and what is computed from them on the way (sums of tables,
//! parameters of activations). It runs nothing.

mod layers;
mod upload;

use std::borrow::Cow;

use crate::backend::{Backend, HostTensor, LinearUse, Norm, Storage};
use crate::cache::Grouping;
use crate::convert::{Conversion, float_bytes, to_f32};
use crate::error::{ModelError, Result};
use crate::spec::{Head, ModelSpec, NormSpec, PoolOutput};
use crate::weights::{TensorId, WeightSource, embedding_id};

pub(crate) use layers::{BothWeights, FfnWeights, Layer, MixerWeights};

/// Weights after the last layer, apart from its norm.
pub(crate) enum HeadWeights<B: Backend> {
    /// Logits; none: tied to the embedding.
    Logits(Option<B::Linear>),
    /// The row itself.
    Embedding,
    /// A classifier's two layers.
    Classifier { dense: B::Linear, dense_bias: B::Vector, labels: B::Linear, labels_bias: B::Vector },
    /// Rows of a head for logits.
    Tokens(B::Linear),
}

/// All weights of a model.
pub(crate) struct Weights<B: Backend> {
    pub embedding: B::Linear,
    /// Learned positions, with the row of the only token type added to each.
    pub positions: Option<B::Linear>,
    pub embed_norm: Option<Norm<B::Vector>>,
    pub layers: Vec<Layer<B>>,
    pub final_norm: Option<Norm<B::Vector>>,
    pub head: HeadWeights<B>,
    /// Bytes as they were handed to the device.
    pub bytes: u64,
}

/// Takes tensors from the source, converts them, and hands them to the backend.
pub(crate) struct Uploader<'a, B: Backend> {
    spec: &'a ModelSpec,
    grouping: &'a Grouping,
    source: &'a dyn WeightSource,
    conversion: Conversion,
    backend: &'a mut B,
    embedding: TensorId,
    bytes: u64,
}

impl<'a, B: Backend> Uploader<'a, B> {
    /// # Errors
    /// The source has no embedding table.
    pub(crate) fn new(
        spec: &'a ModelSpec,
        grouping: &'a Grouping,
        source: &'a dyn WeightSource,
        conversion: Conversion,
        backend: &'a mut B,
    ) -> Result<Self> {
        let embedding = embedding_id(spec, source)?;
        Ok(Self { spec, grouping, source, conversion, backend, embedding, bytes: 0 })
    }

    /// Loads everything; `progress` is told the share that is done.
    pub(crate) fn load(mut self, progress: &mut dyn FnMut(f32)) -> Result<Weights<B>> {
        let spec = self.spec;
        let steps = (spec.layers.len() + 2) as f32;
        let tied = matches!(spec.head, Head::Logits { tied: true, .. });
        let embedding =
            self.linear_for(&[self.embedding], if tied { LinearUse::Logits } else { LinearUse::Table })?;
        let positions = self.positions()?;
        let embed_norm = self.norm_if(
            spec.embed_norm.is_some(),
            spec.embed_norm,
            TensorId::EmbedNorm,
            TensorId::EmbedNormBias,
        )?;
        progress(1.0 / steps);
        let mut layers = Vec::with_capacity(spec.layers.len());
        for index in 0..spec.layers.len() {
            layers.push(self.layer(index)?);
            progress((index + 2) as f32 / steps);
        }
        let final_norm = self.norm_if(
            spec.final_norm.is_some(),
            spec.final_norm,
            TensorId::FinalNorm,
            TensorId::FinalNormBias,
        )?;
        let head = self.head()?;
        let bytes = self.bytes;
        Ok(Weights { embedding, positions, embed_norm, layers, final_norm, head, bytes })
    }

    fn tensor(&self, id: TensorId) -> Result<HostTensor<'a>> {
        let tensor = self.source.tensor(self.spec, id)?;
        let tied = matches!(self.spec.head, Head::Logits { tied: true, .. });
        let is_head = id == TensorId::Head || (tied && id == self.embedding);
        self.conversion.apply(id, is_head, tensor)
    }

    fn tensors(&mut self, ids: &[TensorId]) -> Result<Vec<HostTensor<'a>>> {
        let parts: Vec<_> = ids.iter().map(|&id| self.tensor(id)).collect::<Result<_>>()?;
        self.bytes += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
        Ok(parts)
    }

    fn upload_linear(&mut self, parts: Vec<HostTensor<'_>>, purpose: LinearUse) -> Result<B::Linear> {
        let what = names(&parts);
        self.backend.load_linear_for(parts, purpose).map_err(|source| ModelError::Backend { what, source })
    }

    fn linear(&mut self, ids: &[TensorId]) -> Result<B::Linear> {
        self.linear_for(ids, LinearUse::Activations)
    }

    fn linear_for(&mut self, ids: &[TensorId], purpose: LinearUse) -> Result<B::Linear> {
        let parts = self.tensors(ids)?;
        self.upload_linear(parts, purpose)
    }

    fn upload_vector(&mut self, parts: Vec<HostTensor<'_>>) -> Result<B::Vector> {
        let what = names(&parts);
        self.backend.load_vector(parts).map_err(|source| ModelError::Backend { what, source })
    }

    fn vector(&mut self, ids: &[TensorId]) -> Result<B::Vector> {
        let parts = self.tensors(ids)?;
        self.upload_vector(parts)
    }

    fn vector_if(&mut self, wanted: bool, ids: &[TensorId]) -> Result<Option<B::Vector>> {
        if wanted { self.vector(ids).map(Some) } else { Ok(None) }
    }

    fn stack(&mut self, weights: impl Iterator<Item = Vec<TensorId>>) -> Result<B::Stack> {
        let weights = weights.map(|ids| self.tensors(&ids)).collect::<Result<Vec<_>>>()?;
        let what = weights.first().map(|parts| names(parts) + " and those like it").unwrap_or_default();
        self.backend.load_stack(weights).map_err(|source| ModelError::Backend { what, source })
    }

    /// The only number of a tensor, for operations that take it as a parameter.
    fn number(&mut self, id: TensorId) -> Result<f32> {
        let tensor = self.source.tensor(self.spec, id)?;
        let values = to_f32(&tensor)?;
        self.bytes += tensor.bytes.len() as u64;
        values.first().copied().ok_or_else(|| {
            ModelError::corrupt(self.source.label(), format!("tensor `{}`", tensor.name), "has no number")
        })
    }

    fn norm(&mut self, norm: NormSpec, weight: TensorId, bias: Option<TensorId>) -> Result<Norm<B::Vector>> {
        Ok(Norm {
            kind: norm.kind,
            weight: Some(self.vector(&[weight])?),
            bias: match bias.filter(|_| norm.bias) {
                Some(id) => Some(self.vector(&[id])?),
                None => None,
            },
            offset: norm.offset,
            eps: norm.eps,
        })
    }

    fn norm_if(
        &mut self,
        wanted: bool,
        norm: Option<NormSpec>,
        weight: TensorId,
        bias: TensorId,
    ) -> Result<Option<Norm<B::Vector>>> {
        norm.filter(|_| wanted).map(|norm| self.norm(norm, weight, Some(bias))).transpose()
    }

    /// Every token has type 0, so that table's first row goes into all positions.
    fn positions(&mut self) -> Result<Option<B::Linear>> {
        let Some(learned) = self.spec.learned_positions else { return Ok(None) };
        let mut tensor = self.tensors(&[TensorId::Positions])?.remove(0);
        if learned.token_types > 0 {
            let types = to_f32(&self.tensors(&[TensorId::TokenTypes])?[0])?;
            let mut values = to_f32(&tensor)?;
            for row in values.chunks_mut(self.spec.hidden) {
                row.iter_mut().zip(&types).for_each(|(v, t)| *v += t);
            }
            tensor = host(tensor.name, tensor.shape, &values);
        }
        self.upload_linear(vec![tensor], LinearUse::Table).map(Some)
    }

    fn head(&mut self) -> Result<HeadWeights<B>> {
        let pool = match &self.spec.head {
            Head::Logits { tied: true, .. } => return Ok(HeadWeights::Logits(None)),
            Head::Logits { .. } => {
                let head = self.linear_for(&[TensorId::Head], LinearUse::Logits)?;
                return Ok(HeadWeights::Logits(Some(head)));
            }
            Head::Pool(pool) => pool,
        };
        Ok(match &pool.output {
            PoolOutput::Embedding => HeadWeights::Embedding,
            PoolOutput::Classifier { .. } => HeadWeights::Classifier {
                dense: self.linear(&[TensorId::Dense])?,
                dense_bias: self.vector(&[TensorId::DenseBias])?,
                labels: self.linear(&[TensorId::Labels])?,
                labels_bias: self.vector(&[TensorId::LabelsBias])?,
            },
            PoolOutput::Tokens { ids, tied } => {
                let id = if *tied { self.embedding } else { TensorId::Head };
                let rows = rows(&self.source.tensor(self.spec, id)?, ids)?;
                self.bytes += rows.bytes.len() as u64;
                HeadWeights::Tokens(self.upload_linear(vec![rows], LinearUse::Activations)?)
            }
        })
    }
}

fn names(parts: &[HostTensor<'_>]) -> String {
    parts.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(" + ")
}

/// A tensor of computed values.
fn host(name: String, shape: Vec<usize>, values: &[f32]) -> HostTensor<'static> {
    let bytes = Cow::Owned(float_bytes(values, Storage::F32));
    HostTensor { name, shape, storage: Storage::F32, bytes, scales: None }
}

/// Some rows of a matrix, in this order.
fn rows(tensor: &HostTensor<'_>, ids: &[u32]) -> Result<HostTensor<'static>> {
    let width = tensor.shape.last().copied().unwrap_or_default();
    let values = to_f32(tensor)?;
    let mut chosen = Vec::with_capacity(ids.len() * width);
    for &id in ids {
        let from = id as usize * width;
        let row = values.get(from..from + width).ok_or_else(|| {
            let why = format!("has no row {id}, its shape is {:?}", tensor.shape);
            ModelError::corrupt("weights", format!("tensor `{}`", tensor.name), why)
        })?;
        chosen.extend_from_slice(row);
    }
    Ok(host(tensor.name.clone(), vec![ids.len(), width], &chosen))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_taken_in_the_order_of_the_ids() {
        let table = host("table".into(), vec![3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let two = rows(&table, &[2, 0]).unwrap();
        assert_eq!((to_f32(&two).unwrap(), two.shape), (vec![4.0, 5.0, 0.0, 1.0], vec![2, 2]));
        assert!(rows(&table, &[3]).unwrap_err().to_string().contains("no row 3"));
    }
}
