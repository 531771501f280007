//! Weights from safetensors files: one, or shards with an index.
//!
//! Owns the file format's checks beyond those of the `safetensors` crate. Every length is held against the
//! file's before anything is allocated for it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::backend::{HostTensor, Storage};
use crate::config::parse_object;
use crate::error::{ModelError, Result};
use crate::mmap::{FileBytes, FileSource};
use crate::spec::ModelSpec;
use crate::weights::{TensorId, WeightSource, shape};

/// Largest header that is read. The largest published models stay below a tenth of it.
const MAX_HEADER: u64 = 16 << 20;
/// Largest index that is read.
const MAX_INDEX: usize = 64 << 20;
/// Most shards.
const MAX_SHARDS: usize = 4_096;
/// The only file of a model that is not sharded.
pub const SINGLE: &str = "model.safetensors";
/// The list of shards.
pub const INDEX: &str = "model.safetensors.index.json";

/// A checked entry of a header.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    start: usize,
    end: usize,
}

/// Opened files and the tensors in them.
#[derive(Debug)]
pub struct SafetensorsSource {
    label: String,
    files: Vec<(String, FileBytes)>,
    entries: BTreeMap<String, Entry>,
}

impl SafetensorsSource {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Neither is there, a shard is missing, or a header is broken.
    pub fn open(place: &str, files: &BTreeMap<String, FileSource>) -> Result<Self> {
        // The single file first, as transformers does.
        if let Some(single) = files.get(SINGLE) {
            let mut source = Self::empty(SINGLE);
            source.add(SINGLE, single)?;
            return Ok(source);
        }
        if let Some(index) = files.get(INDEX) {
            return Self::open_sharded(index, files);
        }
        let pickled = files.keys().find(|f| {
            let ext = f.rsplit('.').next().unwrap_or_default();
            matches!(ext, "bin" | "pt" | "pth" | "pkl")
        });
        let why = match pickled {
            Some(f) => format!("has `{f}`, which is never opened: weights must be safetensors or GGUF"),
            None => format!("has neither `{SINGLE}` nor `{INDEX}`"),
        };
        Err(ModelError::MissingFile { place: place.to_owned(), why })
    }

    fn empty(label: &str) -> Self {
        Self { label: label.to_owned(), files: Vec::new(), entries: BTreeMap::new() }
    }

    fn open_sharded(index: &FileSource, files: &BTreeMap<String, FileSource>) -> Result<Self> {
        let bytes = index.open(INDEX)?;
        let object = parse_object(INDEX, bytes.as_ref(), MAX_INDEX)?;
        let map = object
            .get("weight_map")
            .and_then(|m| m.as_object())
            .ok_or_else(|| ModelError::field(INDEX, "weight_map", "expected an object"))?;
        let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (tensor, shard) in map {
            let field = || format!("weight_map.{tensor}");
            let shard =
                shard.as_str().ok_or_else(|| ModelError::field(INDEX, field(), "expected a file name"))?;
            if shard.contains(['/', '\\', '\0']) || !shard.ends_with(".safetensors") {
                let why = format!("`{}` is not the name of a safetensors file", shard.escape_default());
                return Err(ModelError::field(INDEX, field(), why));
            }
            shards.entry(shard).or_default().insert(tensor);
        }
        if shards.is_empty() || shards.len() > MAX_SHARDS {
            let why = format!("names {} shards, expected 1 to {MAX_SHARDS}", shards.len());
            return Err(ModelError::field(INDEX, "weight_map", why));
        }
        let mut source = Self::empty(INDEX);
        for (shard, tensors) in shards {
            let file = files.get(shard).ok_or_else(|| {
                let field = format!("weight_map.{}", tensors.first().unwrap_or(&""));
                ModelError::field(INDEX, field, format!("shard `{shard}` is missing"))
            })?;
            source.add(shard, file)?;
            let number = source.files.len() - 1;
            let lost = tensors.iter().find(|t| source.entries.get(**t).is_none_or(|e| e.file != number));
            if let Some(lost) = lost {
                let tensor = (*lost).to_owned();
                return Err(ModelError::MissingTensor { file: shard.to_owned(), tensor });
            }
        }
        Ok(source)
    }

    /// Opens one file and takes its header in.
    fn add(&mut self, name: &str, source: &FileSource) -> Result<()> {
        let bytes = source.open(name)?;
        let header = header_length(name, bytes.as_ref())?;
        let (n, metadata) =
            SafeTensors::read_metadata(bytes.as_ref()).map_err(|e| explain(name, bytes.as_ref(), &e))?;
        debug_assert_eq!(n as u64, header);
        let data = n + 8;
        for (tensor, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            if let Some(other) = self.entries.insert(tensor.clone(), entry) {
                let why = format!("is also in `{}`", self.files[other.file].0);
                return Err(ModelError::corrupt(name, format!("tensor `{tensor}`"), why));
            }
        }
        self.files.push((name.to_owned(), bytes));
        Ok(())
    }

    /// Tensors in the files that the specification has no place for. Buffers that older exports store are not
    /// worth a word.
    #[must_use]
    pub fn extra(&self, known: &BTreeSet<String>) -> Vec<String> {
        let silent = |name: &str| name.ends_with("rotary_emb.inv_freq") || name.ends_with(".attn.bias");
        self.entries.keys().filter(|n| !known.contains(*n) && !silent(n)).cloned().collect()
    }
}

/// The header's length, held against the limit and the file's length.
fn header_length(name: &str, bytes: &[u8]) -> Result<u64> {
    let Some(first) = bytes.first_chunk::<8>() else {
        let why = format!("the file has {} bytes, the length of the header takes 8", bytes.len());
        return Err(ModelError::corrupt(name, "header", why));
    };
    let n = u64::from_le_bytes(*first);
    if n > MAX_HEADER {
        let why = format!("its length is given as {n} bytes, at most {MAX_HEADER} are read");
        return Err(ModelError::corrupt(name, "header", why));
    }
    let have = bytes.len() as u64 - 8;
    if n > have {
        let why = format!("its length is given as {n} bytes, the file has {have} after the length");
        return Err(ModelError::corrupt(name, "header", why));
    }
    Ok(n)
}

/// Puts the crate's error into our words, with the numbers that it leaves out.
fn explain(name: &str, bytes: &[u8], error: &SafeTensorError) -> ModelError {
    match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            let why = format!(
                "the file has {} bytes, its header accounts for another number (truncated or padded file)",
                bytes.len()
            );
            ModelError::corrupt(name, "data", why)
        }
        SafeTensorError::InvalidOffset(tensor) => {
            ModelError::corrupt(name, format!("tensor `{tensor}`"), "data offsets overlap, or leave a gap")
        }
        SafeTensorError::TensorInvalidInfo => {
            ModelError::corrupt(name, "header", "a tensor's offsets contradict its shape and type")
        }
        other => ModelError::corrupt(name, "header", other.to_string()),
    }
}

impl WeightSource for SafetensorsSource {
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>> {
        let name = id.hf_name();
        let Some(entry) = self.entries.get(&name) else {
            return Err(ModelError::MissingTensor { file: self.label.clone(), tensor: name });
        };
        let (file, bytes) = &self.files[entry.file];
        let storage = match entry.dtype {
            Dtype::F32 => Storage::F32,
            Dtype::F16 => Storage::F16,
            Dtype::BF16 => Storage::Bf16,
            other => {
                return Err(ModelError::WrongType {
                    file: file.clone(),
                    tensor: name,
                    expected: "F32, F16 or BF16",
                    got: other.to_string(),
                });
            }
        };
        let expected = shape(spec, id);
        if entry.shape != expected {
            let got = entry.shape.clone();
            return Err(ModelError::WrongShape { file: file.clone(), tensor: name, expected, got });
        }
        let bytes = Cow::Borrowed(&bytes.as_ref()[entry.start..entry.end]);
        Ok(HostTensor { name, shape: expected, storage, bytes, scales: None })
    }

    fn has(&self, id: TensorId) -> bool {
        self.entries.contains_key(&id.hf_name())
    }

    fn label(&self) -> &str {
        &self.label
    }
}
