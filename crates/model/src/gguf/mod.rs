//! GGUF files: metadata, tensors and vocabulary in one.
//!
//! `parse` owns the format, `spec` the meaning of metadata, this module the tensors. Layout:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod parse;
mod spec;
mod tokenizer;

use std::borrow::Cow;
use std::collections::BTreeSet;

pub use parse::{GgufHeader, TensorInfo, Value};
pub use spec::spec_from_gguf;
pub use tokenizer::GgufTokenizer;

use crate::arch::{Architecture, REGISTRY};
use crate::backend::HostTensor;
use crate::error::{ModelError, Result};
use crate::mmap::{FileBytes, FileSource};
use crate::spec::ModelSpec;
use crate::weights::{Part, TensorId, WeightSource, pairs_to_halves, shape};

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
        let pairs = architecture(file, &header)?.traits.gguf_pairs;
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
    #[must_use]
    pub fn extra(&self, known: &BTreeSet<String>) -> Vec<String> {
        self.header.tensors.keys().filter(|n| !known.contains(*n) && *n != ROPE_FREQS).cloned().collect()
    }

    fn rope_divisors(&self) -> Result<Vec<f32>> {
        let info = &self.header.tensors[ROPE_FREQS];
        let bytes = Cow::Borrowed(self.header.data(info, self.bytes.as_ref()));
        let (name, shape) = (ROPE_FREQS.to_owned(), info.shape.clone());
        let divisors = crate::convert::to_f32(&HostTensor { name, shape, storage: info.storage, bytes, scales: None })?;
        if let Some(bad) = divisors.iter().find(|d| !d.is_finite() || **d <= 0.0) {
            let why = format!("a divisor is {bad}, expected a finite number above 0");
            return Err(ModelError::corrupt(&self.file, format!("tensor `{ROPE_FREQS}`"), why));
        }
        Ok(divisors)
    }
}

/// The registry's row for `general.architecture`.
fn architecture(file: &str, header: &GgufHeader) -> Result<&'static Architecture> {
    let name = header
        .text(file, "general.architecture")?
        .ok_or_else(|| ModelError::field(file, "general.architecture", "is missing"))?;
    REGISTRY.iter().find(|a| a.gguf == name).ok_or_else(|| ModelError::UnknownArchitecture {
        file: file.to_owned(),
        name: name.escape_default().to_string(),
        known: REGISTRY.iter().map(|a| a.gguf).collect::<Vec<_>>().join(", "),
    })
}

impl WeightSource for GgufSource {
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>> {
        let name = id.gguf_name();
        let Some(info) = self.header.tensors.get(&name) else {
            return Err(ModelError::MissingTensor { file: self.file.clone(), tensor: name });
        };
        let expected = shape(spec, id);
        if info.shape != expected {
            let got = info.shape.clone();
            return Err(ModelError::WrongShape { file: self.file.clone(), tensor: name, expected, got });
        }
        let data = self.header.data(info, self.bytes.as_ref());
        let bytes = match id {
            TensorId::Layer(i, part) if self.pairs => {
                let a = &spec.layers[i].attention;
                match part {
                    Part::Q | Part::QBias => pairs_to_halves(data, a.q_heads, a.head_dim),
                    Part::K | Part::KBias => pairs_to_halves(data, a.kv_heads, a.head_dim),
                    _ => Cow::Borrowed(data),
                }
            }
            _ => Cow::Borrowed(data),
        };
        Ok(HostTensor { name, shape: expected, storage: info.storage, bytes, scales: None })
    }

    fn has(&self, id: TensorId) -> bool {
        self.header.tensors.contains_key(&id.gguf_name())
    }

    fn label(&self) -> &str {
        &self.file
    }
}
