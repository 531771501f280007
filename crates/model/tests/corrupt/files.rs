//! Small valid files, made by hand so that any byte can be wrong.

use std::collections::BTreeMap;

use mirai_model::{FileSource, ModelSource};
use serde_json::{Value, json};

pub(crate) const HIDDEN: usize = 8;
pub(crate) const INTERMEDIATE: usize = 12;
pub(crate) const VOCAB: usize = 16;

pub(crate) fn leak(bytes: Vec<u8>) -> &'static [u8] {
    Box::leak(bytes.into_boxed_slice())
}

/// A valid configuration: two heads, one key head, one layer.
pub(crate) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": true, "torch_dtype": "float32", "eos_token_id": 2,
    })
}

/// Names and shapes of the configuration's tensors.
pub(crate) fn tensors() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("model.embed_tokens.weight", vec![VOCAB, HIDDEN]),
        ("model.layers.0.input_layernorm.weight", vec![HIDDEN]),
        ("model.layers.0.self_attn.q_proj.weight", vec![8, HIDDEN]),
        ("model.layers.0.self_attn.k_proj.weight", vec![4, HIDDEN]),
        ("model.layers.0.self_attn.v_proj.weight", vec![4, HIDDEN]),
        ("model.layers.0.self_attn.o_proj.weight", vec![HIDDEN, 8]),
        ("model.layers.0.post_attention_layernorm.weight", vec![HIDDEN]),
        ("model.layers.0.mlp.gate_proj.weight", vec![INTERMEDIATE, HIDDEN]),
        ("model.layers.0.mlp.up_proj.weight", vec![INTERMEDIATE, HIDDEN]),
        ("model.layers.0.mlp.down_proj.weight", vec![HIDDEN, INTERMEDIATE]),
        ("model.norm.weight", vec![HIDDEN]),
    ]
}

/// A safetensors file: its header as JSON, and this many bytes of data.
pub(crate) fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    out.resize(out.len() + data, 0);
    out
}

/// Header of valid f32 tensors, and the length of their data.
pub(crate) fn header(tensors: &[(&str, Vec<usize>)]) -> (Value, usize) {
    let mut object = serde_json::Map::new();
    let mut at = 0;
    for (name, shape) in tensors {
        let end = at + 4 * shape.iter().product::<usize>();
        object.insert((*name).to_owned(), json!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    (Value::Object(object), at)
}

pub(crate) fn valid_safetensors() -> Vec<u8> {
    let (header, len) = header(&tensors());
    safetensors(&header.to_string(), len)
}

/// A model's directory.
pub(crate) fn directory(files: Vec<(&str, Vec<u8>)>) -> ModelSource {
    let files = files.into_iter().map(|(n, b)| (n.to_owned(), FileSource::Static(leak(b))));
    ModelSource::Files { place: "dir".into(), files: files.collect::<BTreeMap<_, _>>() }
}

/// A GGUF file under construction.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) keys: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<GgufTensor>,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    /// Bytes after the tensor table, padding not included.
    pub(crate) data: usize,
}

#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) dim_count: Option<u32>,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

pub(crate) fn text(value: &str) -> Vec<u8> {
    let mut out = (value.len() as u64).to_le_bytes().to_vec();
    out.extend(value.bytes());
    out
}

/// A value with its type's code.
pub(crate) fn typed(code: u32, bytes: &[u8]) -> Vec<u8> {
    [&code.to_le_bytes(), bytes].concat()
}

pub(crate) fn u32_value(v: u32) -> Vec<u8> {
    typed(4, &v.to_le_bytes())
}

pub(crate) fn f32_value(v: f32) -> Vec<u8> {
    typed(6, &v.to_le_bytes())
}

pub(crate) fn text_value(v: &str) -> Vec<u8> {
    typed(8, &text(v))
}

pub(crate) fn array(code: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    typed(9, &[&code.to_le_bytes()[..], &count.to_le_bytes(), elements].concat())
}

impl Gguf {
    /// The same model as [`config`] and [`tensors`].
    pub(crate) fn valid() -> Self {
        let mut out =
            Self { version: 3, keys: vec![], tensors: vec![], tensor_count: None, key_count: None, data: 0 };
        out.set("general.architecture", text_value("llama"));
        for (key, value) in [
            ("context_length", 64),
            ("embedding_length", HIDDEN as u32),
            ("block_count", 1),
            ("feed_forward_length", INTERMEDIATE as u32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            out.set(&format!("llama.{key}"), u32_value(value));
        }
        out.set("llama.attention.layer_norm_rms_epsilon", f32_value(1e-5));
        out.set("tokenizer.ggml.model", text_value("llama"));
        let tokens: Vec<u8> = (0..VOCAB).flat_map(|i| text(&format!("t{i}"))).collect();
        out.set("tokenizer.ggml.tokens", array(8, VOCAB as u64, &tokens));
        out.set("tokenizer.ggml.scores", array(6, VOCAB as u64, &[0; 4 * VOCAB]));
        out.set("tokenizer.ggml.token_type", array(5, VOCAB as u64, &[0; 4 * VOCAB]));
        out.set("tokenizer.ggml.eos_token_id", u32_value(2));
        for (name, shape) in tensors() {
            out.push(&gguf_name(name), &shape, 0);
        }
        out
    }

    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) {
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, v)) => *v = value,
            None => self.keys.push((key.to_owned(), value)),
        }
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key);
    }

    /// Adds a tensor of f32 after the others.
    pub(crate) fn push(&mut self, name: &str, shape: &[usize], kind: u32) {
        let dims: Vec<u64> = shape.iter().rev().map(|&d| d as u64).collect();
        let offset = self.data.next_multiple_of(32);
        self.tensors.push(GgufTensor {
            name: name.into(),
            dims,
            dim_count: None,
            kind,
            offset: offset as u64,
        });
        self.data = offset + 4 * shape.iter().product::<usize>();
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|t| t.name == name).expect("the tensor is there")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(text(key));
            out.extend(value);
        }
        for t in &self.tensors {
            out.extend(text(&t.name));
            out.extend(t.dim_count.unwrap_or(t.dims.len() as u32).to_le_bytes());
            out.extend(t.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }

    pub(crate) fn source(&self) -> ModelSource {
        gguf(self.bytes())
    }
}

pub(crate) fn gguf(bytes: Vec<u8>) -> ModelSource {
    ModelSource::Gguf { name: "m.gguf".into(), file: FileSource::Static(leak(bytes)) }
}

fn gguf_name(hf: &str) -> String {
    let part = hf.replace("model.layers.0.", "blk.0.");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        if part.contains(from) {
            return part.replace(from, to);
        }
    }
    part
}
