//! GGUF files: metadata, tensors and vocabulary in one.
//!
//! `parse` owns the format, `spec` the meaning of metadata, this module the tensors. Layout:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

pub(crate) mod dialect;
mod names;
mod parse;
mod spec;
mod tokenizer;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

pub use dialect::Dialect;
pub use names::name_of;
pub use parse::{GgufHeader, TensorInfo, Value};
pub use spec::spec_from_gguf;
pub use tokenizer::GgufTokenizer;

use crate::arch::REGISTRY;
use crate::backend::{HostTensor, Storage};
use crate::error::{ModelError, Result};
use crate::mmap::{FileBytes, FileSource};
use crate::names::{Cut, Run};
use crate::spec::{Mixer, ModelSpec};
use crate::weights::{Part, TensorId, WeightSource, shape, tensors};

/// Per-frequency divisors of the rotary embedding (Llama 3 scaling, precomputed).
const ROPE_FREQS: &str = "rope_freqs.weight";

/// An opened GGUF file.
#[derive(Debug)]
pub struct GgufSource {
    file: String,
    bytes: FileBytes,
    header: GgufHeader,
    /// Whether rows of q and k are stored pairwise.
    pairs: bool,
}

impl GgufSource {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// The header is broken, or the architecture is not in the registry.
    pub fn open(file: &str, source: &FileSource) -> Result<Self> {
        let bytes = source.open(file)?;
        let header = GgufHeader::parse(file, bytes.as_ref())?;
        let pairs = architecture(file, &header)?.1.pairs;
        Ok(Self { file: file.to_owned(), bytes, header, pairs })
    }

    /// Metadata and tensor table.
    #[must_use]
    pub fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// The model's specification.
    ///
    /// # Errors
    /// A key is missing, of the wrong type, out of bounds, or contradicts another or a tensor.
    pub fn spec(&self) -> Result<ModelSpec> {
        let divisors =
            self.header.tensors.contains_key(ROPE_FREQS).then(|| self.rope_divisors()).transpose()?;
        spec_from_gguf(&self.file, &self.header, divisors)
    }

    /// The vocabulary.
    ///
    /// # Errors
    /// As [`GgufSource::spec`].
    pub fn tokenizer(&self) -> Result<GgufTokenizer> {
        GgufTokenizer::read(&self.file, &self.header)
    }

    /// Tensors in the file that the specification has no place for.
    ///
    /// # Errors
    /// One is of a layer that the metadata does not have: the two contradict each other.
    pub fn unused(&self, spec: &ModelSpec) -> Result<Vec<String>> {
        // The head of a tied model may be stored too.
        let known: BTreeSet<String> =
            tensors(spec).into_iter().chain([TensorId::Head]).filter_map(name_of).collect();
        let names = self.header.tensors.keys().filter(|n| !known.contains(*n) && *n != ROPE_FREQS);
        for name in names.clone() {
            let number =
                name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            if let Some(layer) = number.filter(|layer| *layer >= spec.layers.len()) {
                let why = format!("is of layer {layer}, the metadata has {} layers", spec.layers.len());
                let item = format!("tensor `{}`", name.escape_default());
                return Err(ModelError::corrupt(&self.file, item, why));
            }
        }
        Ok(names.cloned().collect())
    }

    /// Bytes in the file by type of element.
    #[must_use]
    pub fn bytes_by_type(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for info in self.header.tensors.values() {
            let bytes = info.storage.tensor_bytes(&info.shape).unwrap_or_default();
            *sums.entry(info.storage.name().to_owned()).or_insert(0) += bytes as u64;
        }
        sums
    }

    fn rope_divisors(&self) -> Result<Vec<f32>> {
        let info = &self.header.tensors[ROPE_FREQS];
        let bytes = Cow::Borrowed(self.header.data(info, self.bytes.as_ref()));
        let (name, shape) = (ROPE_FREQS.to_owned(), info.shape.clone());
        let divisors =
            crate::convert::to_f32(&HostTensor { name, shape, storage: info.storage, bytes, scales: None })?;
        if let Some(bad) = divisors.iter().find(|d| !d.is_finite() || **d <= 0.0) {
            let why = format!("a divisor is {bad}, expected a finite number above 0");
            return Err(ModelError::corrupt(&self.file, format!("tensor `{ROPE_FREQS}`"), why));
        }
        Ok(divisors)
    }
}

/// The registry's name for `general.architecture`, and what its files look like.
fn architecture(file: &str, header: &GgufHeader) -> Result<(&'static str, Dialect)> {
    let name = header
        .text(file, "general.architecture")?
        .ok_or_else(|| ModelError::field(file, "general.architecture", "is missing"))?;
    let known = || REGISTRY.iter().filter_map(|a| Some((a.name, a.gguf?)));
    known().find(|(_, dialect)| dialect.name == name).ok_or_else(|| ModelError::UnknownArchitecture {
        file: file.to_owned(),
        name: name.escape_default().to_string(),
        known: known().map(|(_, dialect)| dialect.name).collect::<Vec<_>>().join(", "),
    })
}

/// Rows of q and k of a pairwise file (element i of the first half beside element i of the second) by halves, within
/// each head.
fn halves(spec: &ModelSpec, id: TensorId) -> Option<Cut> {
    let TensorId::Layer(layer, part) = id else { return None };
    let Mixer::Attention(a) = &spec.layers[layer].mixer else { return None };
    let heads = match part {
        Part::Q | Part::QBias => a.q_heads,
        Part::K | Part::KBias => a.kv_heads,
        _ => return None,
    };
    let half = |first| Run { first, len: 1, stride: 2, times: a.head_dim / 2 };
    let head = |h: usize| [half(h * a.head_dim), half(h * a.head_dim + 1)];
    Some(Cut::Rows((0..heads).flat_map(head).collect()))
}

impl GgufSource {
    /// The tensor's entry of the header, held against the specification.
    fn entry(&self, spec: &ModelSpec, id: TensorId) -> Result<(String, &TensorInfo)> {
        let name = name_of(id).unwrap_or_else(|| format!("{id:?}"));
        let Some(info) = self.header.tensors.get(&name) else {
            return Err(ModelError::MissingTensor { file: self.file.clone(), tensor: name });
        };
        let expected = shape(spec, id);
        if info.shape != expected {
            let got = info.shape.clone();
            return Err(ModelError::WrongShape { file: self.file.clone(), tensor: name, expected, got });
        }
        Ok((name, info))
    }
}

impl WeightSource for GgufSource {
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>> {
        let (name, info) = self.entry(spec, id)?;
        let expected = info.shape.clone();
        let bytes = Cow::Borrowed(self.header.data(info, self.bytes.as_ref()));
        let cut = halves(spec, id).filter(|_| self.pairs).unwrap_or(Cut::Whole);
        let storage = info.storage;
        let tensor = HostTensor { name, shape: expected.clone(), storage, bytes, scales: None };
        cut.apply(tensor, &expected)
    }

    fn check(&self, spec: &ModelSpec, id: TensorId) -> Result<Storage> {
        self.entry(spec, id).map(|(_, info)| info.storage)
    }

    fn has(&self, _spec: &ModelSpec, id: TensorId) -> bool {
        name_of(id).is_some_and(|name| self.header.tensors.contains_key(&name))
    }

    fn label(&self) -> &str {
        &self.file
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::arch::spec_from_config;

    #[test]
    fn pairs_become_halves_within_each_head() {
        let config = serde_json::json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 1,
            "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4,
            "vocab_size": 3, "max_position_embeddings": 8});
        let spec = spec_from_config("config.json", config.as_object().unwrap()).unwrap();
        let cut = halves(&spec, TensorId::Layer(0, Part::Q)).unwrap();
        // Two heads of four rows: stored x0 y0 x1 y1, wanted x0 x1 y0 y1.
        let numbers = [0u8, 2, 1, 3, 10, 12, 11, 13];
        let bytes = numbers.iter().flat_map(|n| f32::from(*n).to_le_bytes()).collect();
        let (name, shape) = ("t".to_owned(), vec![8, 1]);
        let stored =
            HostTensor { name, shape, storage: Storage::F32, bytes: Cow::Owned(bytes), scales: None };
        let part = cut.apply(stored, &[8, 1]).unwrap();
        let numbers = part.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        assert_eq!(numbers.collect::<Vec<_>>(), [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]);
        assert!(
            halves(&spec, TensorId::Layer(0, Part::V)).is_none() && halves(&spec, TensorId::Head).is_none()
        );
    }
}
