//! Weights from safetensors files: one, or shards with an index.
//!
//! Owns the file format's checks beyond those of the `safetensors` crate. Every length is held against the
//! file's before anything is allocated for it. What a tensor is called is told by [`crate::names`], and what those
//! of a quantized weight mean by [`crate::quant`].

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::backend::{HostTensor, Storage};
use crate::config::parse_object;
use crate::error::{ModelError, Result};
use crate::mmap::{FileBytes, FileSource};
use crate::names::{Checkpoint, Naming, Stored};
use crate::quant::{RawTensor, RawTensors, assemble, names_of};
use crate::spec::ModelSpec;
use crate::weights::{TensorId, WeightSource, shape, tensors};

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
    checkpoint: Checkpoint,
    /// What comes before every name in these files.
    prefix: &'static str,
}

/// Tensors in the files that the specification has no place for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    /// Those that nobody expected.
    pub names: Vec<String>,
    /// How many belong to parts that are known and never run: other modalities, draft heads, buffers.
    pub ignored: usize,
}

impl SafetensorsSource {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names. The configuration tells how
    /// tensors are spelled and quantized.
    ///
    /// # Errors
    /// Neither is there, a shard is missing, or a header is broken.
    pub fn open(place: &str, files: &BTreeMap<String, FileSource>, checkpoint: Checkpoint) -> Result<Self> {
        let mut source = Self::open_files(place, files, checkpoint)?;
        source.prefix = checkpoint.naming.prefix(source.entries.keys().map(String::as_str));
        Ok(source)
    }

    fn open_files(place: &str, files: &BTreeMap<String, FileSource>, checkpoint: Checkpoint) -> Result<Self> {
        // The single file first, as transformers does.
        if let Some(single) = files.get(SINGLE) {
            let mut source = Self::empty(SINGLE, checkpoint);
            source.add(SINGLE, single)?;
            return Ok(source);
        }
        if let Some(index) = files.get(INDEX) {
            return Self::open_sharded(index, files, checkpoint);
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

    fn empty(label: &str, checkpoint: Checkpoint) -> Self {
        let (files, entries) = (Vec::new(), BTreeMap::new());
        Self { label: label.to_owned(), files, entries, checkpoint, prefix: "" }
    }

    fn open_sharded(
        index: &FileSource,
        files: &BTreeMap<String, FileSource>,
        checkpoint: Checkpoint,
    ) -> Result<Self> {
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
        let mut source = Self::empty(INDEX, checkpoint);
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

    /// Tensors in the files that the specification has no place for.
    ///
    /// # Errors
    /// One is of a layer that the configuration does not have: the two contradict each other.
    pub fn unused(&self, spec: &ModelSpec) -> Result<Unused> {
        let Checkpoint { naming, quantized, draft_layers } = self.checkpoint;
        let layers = spec.layers.len();
        let mut known = BTreeSet::new();
        // The head of a tied model may be stored too.
        for id in tensors(spec).into_iter().chain([TensorId::Head]) {
            for stored in naming.spell(self.prefix, spec, id) {
                let names = if quantized.is_some() { names_of(&stored.name) } else { vec![stored.name] };
                // Of a table of many spellings few are in the files.
                known.extend(names.into_iter().filter(|name| self.entries.contains_key(name)));
            }
        }
        let mut unused = Unused::default();
        for (name, entry) in self.entries.iter().filter(|(name, _)| !known.contains(*name)) {
            match naming.layer_number(self.prefix, name) {
                _ if Naming::is_ignored(name) => unused.ignored += 1,
                Some(layer) if (layers..layers + draft_layers).contains(&layer) => unused.ignored += 1,
                Some(layer) if layer >= layers => {
                    let why = format!("is of layer {layer}, the configuration has {layers} layers");
                    let item = format!("tensor `{}`", name.escape_default());
                    return Err(ModelError::corrupt(&self.files[entry.file].0, item, why));
                }
                _ => unused.names.push(name.clone()),
            }
        }
        Ok(unused)
    }

    /// What the files hold under one spelling, if they have it.
    fn find(&self, stored: &Stored) -> Result<Option<HostTensor<'_>>> {
        if let Some(quantized) = self.checkpoint.quantized
            && let Some(tensor) = assemble(quantized, self, &stored.name, &stored.shape)?
        {
            return Ok(Some(tensor));
        }
        let Some(entry) = self.entries.get(&stored.name).filter(|_| !stored.packed) else { return Ok(None) };
        let (file, bytes) = &self.files[entry.file];
        let tensor = || stored.name.clone();
        let storage = match entry.dtype {
            Dtype::F32 => Storage::F32,
            Dtype::F16 => Storage::F16,
            Dtype::BF16 => Storage::Bf16,
            other => {
                let (expected, got) = ("F32, F16 or BF16", other.to_string());
                return Err(ModelError::WrongType { file: file.clone(), tensor: tensor(), expected, got });
            }
        };
        // One number may be stored with or without a dimension.
        let is_one = |shape: &[usize]| shape.iter().all(|&d| d == 1);
        if entry.shape != stored.shape && !(is_one(&entry.shape) && is_one(&stored.shape)) {
            let (expected, got) = (stored.shape.clone(), entry.shape.clone());
            return Err(ModelError::WrongShape { file: file.clone(), tensor: tensor(), expected, got });
        }
        let bytes = Cow::Borrowed(&bytes.as_ref()[entry.start..entry.end]);
        let (name, shape) = (tensor(), stored.shape.clone());
        Ok(Some(HostTensor { name, shape, storage, bytes, scales: None }))
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

impl RawTensors for SafetensorsSource {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let entry = self.entries.get(name)?;
        let (file, bytes) = &self.files[entry.file];
        let bytes = &bytes.as_ref()[entry.start..entry.end];
        Some(RawTensor { file, dtype: entry.dtype, shape: &entry.shape, bytes })
    }
}

impl WeightSource for SafetensorsSource {
    fn tensor(&self, spec: &ModelSpec, id: TensorId) -> Result<HostTensor<'_>> {
        let spellings = self.checkpoint.naming.spell(self.prefix, spec, id);
        for stored in &spellings {
            if let Some(tensor) = self.find(stored)? {
                return stored.cut.apply(tensor, &shape(spec, id));
            }
        }
        let tensor = spellings.into_iter().next().map_or_else(|| format!("{id:?}"), |stored| stored.name);
        Err(ModelError::MissingTensor { file: self.label.clone(), tensor })
    }

    fn has(&self, spec: &ModelSpec, id: TensorId) -> bool {
        let there = |name: &String| self.entries.contains_key(name);
        let spellings = self.checkpoint.naming.spell(self.prefix, spec, id);
        spellings.iter().any(|stored| match self.checkpoint.quantized {
            Some(_) => names_of(&stored.name).iter().any(there),
            None => there(&stored.name) && !stored.packed,
        })
    }

    fn label(&self) -> &str {
        &self.label
    }
}
