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
use crate::quant::{Depth, RawTensor, RawTensors, assemble, names_of};
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
        source.prefix = checkpoint.naming.prefix(|start| {
            let mut after = source.entries.range(start.to_owned()..);
            after.next().is_some_and(|(name, _)| name.starts_with(start))
        });
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

    /// Bytes in the files by type of element, those of parts that are not run included.
    #[must_use]
    pub fn bytes_by_type(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for entry in self.entries.values() {
            *sums.entry(entry.dtype.to_string().to_lowercase()).or_insert(0) +=
                (entry.end - entry.start) as u64;
        }
        sums
    }

    fn missing(&self, id: TensorId, spellings: Vec<Stored>) -> ModelError {
        let tensor = spellings.into_iter().next().map_or_else(|| format!("{id:?}"), |stored| stored.name);
        ModelError::MissingTensor { file: self.label.clone(), tensor }
    }

    /// What the files hold under one spelling, if they have it.
    fn find(&self, stored: &Stored, depth: Depth) -> Result<Option<HostTensor<'_>>> {
        if let Some(quantized) = self.checkpoint.quantized
            && let Some(tensor) = assemble(quantized, self, &stored.name, &stored.shape, depth)?
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
            if let Some(tensor) = self.find(stored, Depth::Data)? {
                return stored.cut.apply(tensor, &shape(spec, id));
            }
        }
        Err(self.missing(id, spellings))
    }

    fn check(&self, spec: &ModelSpec, id: TensorId) -> Result<Storage> {
        let spellings = self.checkpoint.naming.spell(self.prefix, spec, id);
        for stored in &spellings {
            if let Some(tensor) = self.find(stored, Depth::Headers)? {
                return Ok(tensor.storage);
            }
        }
        Err(self.missing(id, spellings))
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::arch::{Description, describe};
    use crate::convert::to_f32;
    use crate::weights::{MlpPart, Part};

    /// A tensor of a file under construction.
    type Tensor = (&'static str, &'static str, Vec<usize>, Vec<u8>);

    fn floats(name: &'static str, shape: &[usize]) -> Tensor {
        let count = shape.iter().product::<usize>();
        let bytes = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
        (name, "F32", shape.to_vec(), bytes)
    }

    fn file(tensors: &[Tensor]) -> FileSource {
        let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
        for (name, dtype, shape, bytes) in tensors {
            let range = [data.len(), data.len() + bytes.len()];
            header.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": range}));
            data.extend(bytes);
        }
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(data);
        FileSource::Static(Box::leak(bytes.into_boxed_slice()))
    }

    fn open(config: &Value, tensors: &[Tensor]) -> (ModelSpec, SafetensorsSource) {
        let Description { spec, checkpoint } = describe("config.json", config.as_object().unwrap()).unwrap();
        let files = BTreeMap::from([(SINGLE.to_owned(), file(tensors))]);
        (spec, SafetensorsSource::open("dir", &files, checkpoint).unwrap())
    }

    fn config(architecture: &str, extra: &Value) -> Value {
        let mut config = json!({"architectures": [architecture], "hidden_size": 4, "intermediate_size": 6,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "vocab_size": 8, "max_position_embeddings": 16});
        config.as_object_mut().unwrap().extend(extra.as_object().cloned().unwrap());
        config
    }

    #[test]
    fn what_is_unused_is_told_apart() {
        let llama = config("LlamaForCausalLM", &json!({"num_nextn_predict_layers": 1}));
        let tensors = |last: &'static str| {
            vec![
                floats("language_model.model.layers.0.input_layernorm.weight", &[4]),
                floats("language_model.lm_head.weight", &[8, 4]),
                floats("vision_tower.blocks.0.weight", &[1]),
                floats("language_model.model.layers.1.mlp.up_proj.weight", &[1]),
                floats("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", &[1]),
                floats(last, &[1]),
            ]
        };
        let (spec, source) = open(&llama, &tensors("something.else"));
        let unused = source.unused(&spec).unwrap();
        assert_eq!((&unused.names[..], unused.ignored), (&["something.else".to_owned()][..], 3));
        assert!(source.has(&spec, TensorId::Head) && !source.has(&spec, TensorId::Embedding));
        let norm = source.tensor(&spec, TensorId::Layer(0, Part::AttentionNorm)).unwrap();
        assert_eq!(norm.name, "language_model.model.layers.0.input_layernorm.weight");
        let missing = source.tensor(&spec, TensorId::Layer(0, Part::Q)).unwrap_err().to_string();
        let name = "language_model.model.layers.0.self_attn.q_proj.weight";
        assert_eq!(missing, format!("model.safetensors: tensor `{name}` is missing"));
        let (spec, source) = open(&llama, &tensors("language_model.model.layers.2.norm"));
        let error = source.unused(&spec).unwrap_err().to_string();
        assert!(error.contains("is of layer 2, the configuration has 1 layers"), "{error}");
    }

    #[test]
    fn parts_of_quantized_projections_keep_their_scales() {
        let fp8 = json!({"quantization_config": {"quant_method": "fp8"}});
        let numbers = |name, rows: usize| (name, "F8_E4M3", vec![rows, 4], vec![0x38; rows * 4]);
        let (spec, source) = open(
            &config("Phi3ForCausalLM", &fp8),
            &[
                floats("model.layers.0.input_layernorm.weight", &[4]),
                numbers("model.layers.0.self_attn.qkv_proj.weight", 16),
                floats("model.layers.0.self_attn.qkv_proj.weight_scale", &[16, 1]),
                numbers("model.layers.0.mlp.gate_up_proj.weight", 12),
            ],
        );
        let v = source.tensor(&spec, TensorId::Layer(0, Part::V)).unwrap();
        assert_eq!((v.storage, &v.shape[..]), (Storage::F8E4M3, &[4, 4][..]));
        let expected = [12.0, 13.0, 14.0, 15.0].map(|scale| [scale; 4]);
        assert_eq!(to_f32(&v).unwrap(), expected.as_flattened());
        assert!(source.has(&spec, TensorId::Layer(0, Part::Q)));
        let error = source.tensor(&spec, TensorId::Layer(0, Part::Mlp(MlpPart::Up))).unwrap_err().to_string();
        assert!(error.contains("gate_up_proj.weight_scale` is missing"), "{error}");
        assert_eq!(source.unused(&spec).unwrap(), Unused::default());
    }

    #[test]
    fn experts_in_four_bits_and_in_plain_numbers_are_cut_alike() {
        let (experts, hidden, inner) = (2, 32, 32);
        let sizes = json!({"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": experts,
            "num_experts_per_tok": 1});
        let up = TensorId::Layer(0, Part::Expert(1, MlpPart::Up));
        let gate_bias = TensorId::Layer(0, Part::Expert(1, MlpPart::GateBias));
        // Row r of an expert has the number r % 2 + 1 in every place: gates 1, ups 2; scales 2^expert.
        let rows = experts * 2 * inner;
        let blocks: Vec<u8> = (0..rows).flat_map(|r| [[0x22, 0x44][r % 2]; 16]).collect();
        let scales = (0..rows).map(|r| 127 + (r / (2 * inner)) as u8).collect();
        let base = "model.layers.0.mlp.experts.gate_up_proj";
        let packed = [
            (
                "model.layers.0.mlp.experts.gate_up_proj_blocks",
                "U8",
                vec![experts, 2 * inner, hidden / 32, 16],
                blocks,
            ),
            (
                "model.layers.0.mlp.experts.gate_up_proj_scales",
                "U8",
                vec![experts, 2 * inner, hidden / 32],
                scales,
            ),
            floats("model.layers.0.mlp.experts.gate_up_proj_bias", &[experts, 2 * inner]),
        ];
        let mut mxfp4 = config("GptOssForCausalLM", &sizes);
        mxfp4["quantization_config"] = json!({"quant_method": "mxfp4"});
        let (spec, source) = open(&mxfp4, &packed);
        let tensor = source.tensor(&spec, up).unwrap();
        assert_eq!((tensor.storage, &tensor.shape[..]), (Storage::F4E2M1, &[inner, hidden][..]));
        assert_eq!(to_f32(&tensor).unwrap(), vec![4.0; inner * hidden], "2 times the scale of expert 1");
        assert!(source.has(&spec, up) && source.unused(&spec).unwrap() == Unused::default());
        let bias = to_f32(&source.tensor(&spec, gate_bias).unwrap()).unwrap();
        assert!(bias.iter().enumerate().all(|(i, b)| *b == (2 * inner + 2 * i) as f32), "{bias:?}");

        let plain = (base, "F32", vec![experts, hidden, 2 * inner], floats(base, &[rows * hidden]).3);
        let (spec, source) = open(&config("GptOssForCausalLM", &sizes), &[plain]);
        let tensor = to_f32(&source.tensor(&spec, up).unwrap()).unwrap();
        // Element (out, in) of expert 1 is stored at (expert, in, 2 out + 1).
        let at = |o: usize, i: usize| ((hidden + i) * 2 * inner + 2 * o + 1) as f32;
        assert_eq!((tensor[0], tensor[1], tensor[hidden]), (at(0, 0), at(0, 1), at(1, 0)));
        assert_eq!(tensor.last().copied(), Some(at(inner - 1, hidden - 1)));
    }

    #[test]
    fn one_number_may_have_no_dimension() {
        let sizes = json!({"num_hidden_layers": 1});
        let scalar = ("model.layers.0.mlp.act_fn.alpha_p", "F32", vec![], 0.5f32.to_le_bytes().to_vec());
        let (spec, source) = open(&config("ApertusForCausalLM", &sizes), &[scalar]);
        let alpha = source.tensor(&spec, TensorId::Layer(0, Part::XieluP)).unwrap();
        assert_eq!((&alpha.shape[..], to_f32(&alpha).unwrap()), (&[1][..], vec![0.5]));
    }
}
