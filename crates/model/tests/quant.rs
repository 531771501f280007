//! Checkpoints of every quantized form against the same model in plain f32, through the whole loader.
//!
//! The numbers are encoded here by the formats' own descriptions, one value at a time, and the plain twin holds what
//! those descriptions say they decode to.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::HashMap;
use std::path::Path;

use mirai_model::backend::CacheDtype;
use mirai_model::reference::Reference;
use mirai_model::testing::{Driver, Script, largest_difference};
use mirai_model::{CacheBudget, LoadOptions, ModelSource, load};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Largest relative difference between the logits of a quantized checkpoint and its plain twin.
const TOLERANCE: f32 = 1e-5;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// In -1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Tensors of a checkpoint: name, type, shape, bytes.
#[derive(Default)]
struct Checkpoint(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Checkpoint {
    fn push(&mut self, name: impl Into<String>, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.0.push((name.into(), dtype, shape.to_vec(), bytes));
    }

    fn floats(&mut self, name: impl Into<String>, shape: &[usize], values: &[f32]) {
        self.push(name, Dtype::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }

    fn words(&mut self, name: impl Into<String>, shape: &[usize], words: &[u32]) {
        self.push(name, Dtype::I32, shape, words.iter().flat_map(|w| w.to_le_bytes()).collect());
    }

    fn write(&self, directory: &Path, config: &Value) {
        let views: HashMap<&str, TensorView<'_>> = self
            .0
            .iter()
            .map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()))
            .collect();
        safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
        std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Fp8Tensor,
    Fp8Channel,
    Fp8Blocks,
    Packed { zeros: bool },
    Gptq { reordered: bool, v2: bool },
    Awq,
}

impl Form {
    fn config(self) -> Value {
        let compressed = |format: &str, weights: Value| {
            json!({"quant_method": "compressed-tensors", "format": format,
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]})
        };
        match self {
            Self::Fp8Tensor => json!({"quant_method": "fp8", "activation_scheme": "static"}),
            Self::Fp8Channel => compressed(
                "float-quantized",
                json!({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}),
            ),
            Self::Fp8Blocks => json!({"quant_method": "fp8", "weight_block_size": [24, 20]}),
            Self::Packed { zeros } => compressed(
                "pack-quantized",
                json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": !zeros}),
            ),
            Self::Gptq { reordered, v2 } => json!({"quant_method": "gptq", "bits": 4, "group_size": 16,
                "desc_act": reordered, "checkpoint_format": if v2 { "gptq_v2" } else { "gptq" }}),
            Self::Awq => json!({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
        }
    }

    /// Adds a random weight `[rows, columns]` and returns the values that it stands for.
    fn encode(
        self,
        out: &mut Checkpoint,
        name: &str,
        rows: usize,
        columns: usize,
        r: &mut Random,
    ) -> Vec<f32> {
        let base = name.strip_suffix(".weight").unwrap();
        match self {
            Self::Fp8Tensor => fp8(out, base, (rows, columns), (rows, columns), "weight_scale", &[], r),
            Self::Fp8Channel => fp8(out, base, (rows, columns), (1, columns), "weight_scale", &[rows, 1], r),
            Self::Fp8Blocks => {
                let shape = [rows.div_ceil(24), columns.div_ceil(20)];
                fp8(out, base, (rows, columns), (24, 20), "weight_scale_inv", &shape, r)
            }
            Self::Packed { .. } | Self::Gptq { .. } | Self::Awq => {
                let numbers = Numbers::random(self, rows, columns, r);
                numbers.store(self, out, base);
                numbers.values()
            }
        }
    }
}

fn fp8(
    out: &mut Checkpoint,
    base: &str,
    (rows, columns): (usize, usize),
    block: (usize, usize),
    scale_name: &str,
    scale_shape: &[usize],
    r: &mut Random,
) -> Vec<f32> {
    let across = columns.div_ceil(block.1);
    let scales: Vec<f32> =
        (0..rows.div_ceil(block.0) * across).map(|_| 0.01 + 0.01 * r.unit().abs()).collect();
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            // Any finite number: sign, exponent up to 2^3, mantissa.
            let (sign, exponent, mantissa) = (r.below(2), r.below(11), r.below(8));
            bytes.push((sign << 7 | exponent << 3 | mantissa) as u8);
            let size = match exponent {
                0 => mantissa as f32 / 8.0 / 64.0,
                e => (8.0 + mantissa as f32) / 8.0 * 2f32.powi(e as i32 - 7),
            };
            let number = if sign == 1 { -size } else { size };
            values.push(number * scales[row / block.0 * across + column / block.1]);
        }
    }
    out.push(format!("{base}.weight"), Dtype::F8_E4M3, &[rows, columns], bytes);
    out.floats(format!("{base}.{scale_name}"), scale_shape, &scales);
    values
}

const GROUP: usize = 16;

/// Four-bit numbers with a scale and a zero point for each group of columns.
struct Numbers {
    rows: usize,
    columns: usize,
    /// `[rows][columns]`
    q: Vec<u32>,
    /// `[rows][groups]`
    zeros: Vec<u32>,
    /// `[rows][groups]`
    scales: Vec<f32>,
    /// Group of each column.
    groups: Vec<usize>,
}

impl Numbers {
    fn random(form: Form, rows: usize, columns: usize, r: &mut Random) -> Self {
        let count = columns / GROUP;
        let mut groups: Vec<usize> = (0..columns).map(|c| c / GROUP).collect();
        if let Form::Gptq { reordered: true, .. } = form {
            for i in (1..columns).rev() {
                groups.swap(i, r.below(i as u64 + 1) as usize);
            }
        }
        let zero = |r: &mut Random| match form {
            Form::Packed { zeros: false } => 8,
            // Stored less one, so at least 1.
            Form::Gptq { v2: false, .. } => 1 + r.below(16) as u32,
            _ => r.below(16) as u32,
        };
        Self {
            rows,
            columns,
            q: (0..rows * columns).map(|_| r.below(16) as u32).collect(),
            zeros: (0..rows * count).map(|_| zero(r)).collect(),
            scales: (0..rows * count).map(|_| 0.01 + 0.01 * r.unit().abs()).collect(),
            groups,
        }
    }

    fn values(&self) -> Vec<f32> {
        let count = self.columns / GROUP;
        let value = |i: usize| {
            let at = i / self.columns * count + self.groups[i % self.columns];
            (self.q[i] as f32 - self.zeros[at] as f32) * self.scales[at]
        };
        (0..self.q.len()).map(value).collect()
    }

    fn q(&self, row: usize, column: usize) -> u32 {
        self.q[row * self.columns + column]
    }

    /// `[groups][rows]`, from `[rows][groups]`.
    fn by_group<T: Copy>(&self, values: &[T]) -> Vec<T> {
        let count = self.columns / GROUP;
        (0..count).flat_map(|g| (0..self.rows).map(move |row| values[row * count + g])).collect()
    }

    fn store(&self, form: Form, out: &mut Checkpoint, base: &str) {
        let (rows, columns, count) = (self.rows, self.columns, self.columns / GROUP);
        let join = |numbers: [u32; 8]| numbers.iter().rev().fold(0u32, |w, n| w << 4 | n);
        match form {
            Form::Packed { zeros } => {
                let words: Vec<u32> = self.q.chunks(8).map(|c| join(c.try_into().unwrap())).collect();
                out.words(format!("{base}.weight_packed"), &[rows, columns / 8], &words);
                out.floats(format!("{base}.weight_scale"), &[rows, count], &self.scales);
                if zeros {
                    let zero = |i: usize, k: usize| self.zeros[(i / count * 8 + k) * count + i % count];
                    let word = |i: usize| join(std::array::from_fn(|k| zero(i, k)));
                    let words: Vec<u32> = (0..rows / 8 * count).map(word).collect();
                    out.words(format!("{base}.weight_zero_point"), &[rows / 8, count], &words);
                }
            }
            Form::Gptq { v2, .. } => {
                let word = |i: usize| join(std::array::from_fn(|k| self.q(i % rows, i / rows * 8 + k)));
                let words: Vec<u32> = (0..columns / 8 * rows).map(word).collect();
                out.words(format!("{base}.qweight"), &[columns / 8, rows], &words);
                let zeros = self.by_group(&self.zeros);
                let less = u32::from(!v2);
                let words: Vec<u32> =
                    zeros.chunks(8).map(|c| join(std::array::from_fn(|k| c[k] - less))).collect();
                out.words(format!("{base}.qzeros"), &[count, rows / 8], &words);
                out.floats(format!("{base}.scales"), &[count, rows], &self.by_group(&self.scales));
                let groups: Vec<u32> = self.groups.iter().map(|g| *g as u32).collect();
                out.words(format!("{base}.g_idx"), &[columns], &groups);
            }
            Form::Awq => {
                // Bits 0 to 3 hold column 0, then come 2, 4, 6, 1, 3, 5, 7.
                let shuffle = |n: [u32; 8]| join([n[0], n[2], n[4], n[6], n[1], n[3], n[5], n[7]]);
                let word = |i: usize| {
                    let (column, first) = (i / (rows / 8), i % (rows / 8) * 8);
                    shuffle(std::array::from_fn(|k| self.q(first + k, column)))
                };
                let words: Vec<u32> = (0..columns * rows / 8).map(word).collect();
                out.words(format!("{base}.qweight"), &[columns, rows / 8], &words);
                let zeros = self.by_group(&self.zeros);
                let words: Vec<u32> = zeros.chunks(8).map(|c| shuffle(c.try_into().unwrap())).collect();
                out.words(format!("{base}.qzeros"), &[count, rows / 8], &words);
                out.floats(format!("{base}.scales"), &[count, rows], &self.by_group(&self.scales));
            }
            _ => unreachable!("a form of four bits"),
        }
    }
}

const HIDDEN: usize = 64;
const INNER: usize = 96;
const VOCAB: usize = 50;

fn config(quantization: Option<Value>) -> Value {
    let mut config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 64, "dtype": "float32"});
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    config
}

/// A quantized checkpoint and its plain twin.
fn pair(form: Form, seed: u64) -> (Checkpoint, Checkpoint) {
    let mut r = Random(seed);
    let (mut quantized, mut plain) = (Checkpoint::default(), Checkpoint::default());
    let both =
        |quantized: &mut Checkpoint, plain: &mut Checkpoint, name: &str, shape: &[usize], values: &[f32]| {
            quantized.floats(name, shape, values);
            plain.floats(name, shape, values);
        };
    let random = |n: usize, r: &mut Random| -> Vec<f32> { (0..n).map(|_| r.unit()).collect() };
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        both(&mut quantized, &mut plain, name, &[VOCAB, HIDDEN], &random(VOCAB * HIDDEN, &mut r));
    }
    both(&mut quantized, &mut plain, "model.norm.weight", &[HIDDEN], &random(HIDDEN, &mut r));
    for layer in 0..2 {
        for part in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("model.layers.{layer}.{part}.weight");
            both(&mut quantized, &mut plain, &name, &[HIDDEN], &random(HIDDEN, &mut r));
        }
        for (part, rows, columns) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN / 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            let name = format!("model.layers.{layer}.{part}.weight");
            let values = form.encode(&mut quantized, &name, rows, columns, &mut r);
            plain.floats(name, &[rows, columns], &values);
        }
    }
    (quantized, plain)
}

fn logprobs(directory: &Path) -> Vec<f32> {
    let options = LoadOptions {
        cache: CacheBudget::Tokens(64),
        cache_dtype: CacheDtype::F32,
        max_slots: 1,
        max_step_tokens: 64,
        ..LoadOptions::default()
    };
    let source = ModelSource::directory(directory).unwrap();
    let loaded = load(&source, &options, Reference::default(), &mut |_, _| {}).unwrap();
    assert!(loaded.unused_tensors.is_empty(), "{:?}", loaded.unused_tensors);
    let ids: Vec<u32> = (0..29).map(|i| (i * 7 + 3) % VOCAB as u32).collect();
    Driver::new(loaded.executor).play(&[Script::teacher_forced(&ids, usize::MAX)])[0].prompt_logprobs()
}

#[test]
fn every_form_computes_what_its_plain_twin_does() {
    let forms = [
        Form::Fp8Tensor,
        Form::Fp8Channel,
        Form::Fp8Blocks,
        Form::Packed { zeros: false },
        Form::Packed { zeros: true },
        Form::Gptq { reordered: false, v2: false },
        Form::Gptq { reordered: true, v2: false },
        Form::Gptq { reordered: false, v2: true },
        Form::Awq,
    ];
    for (seed, form) in (7..).zip(forms) {
        let (quantized, plain) = pair(form, seed);
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        quantized.write(a.path(), &config(Some(form.config())));
        plain.write(b.path(), &config(None));
        let (got, expected) = (logprobs(a.path()), logprobs(b.path()));
        let spread = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        let worst = largest_difference(&expected, &got) / spread;
        println!("{form:?}: largest relative difference {worst:e}, log-probabilities down to -{spread}");
        assert!(spread > 3.0, "{form:?}: a distribution that tells nothing");
        assert!(worst < TOLERANCE, "{form:?} with seed {seed}: {worst:e}");
    }
}

/// gpt-oss with experts in MXFP4, and with the same numbers plainly, which lie the other way round there.
fn mxfp4_pair() -> (Checkpoint, Checkpoint, Value) {
    const EXPERTS: usize = 3;
    const WIDTH: usize = 32;
    let mut r = Random(11);
    let (mut quantized, mut plain) = (Checkpoint::default(), Checkpoint::default());
    let mut shared = |quantized: &mut Checkpoint, plain: &mut Checkpoint, name: String, shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| r.unit() * 0.5).collect();
        quantized.floats(name.clone(), shape, &values);
        plain.floats(name, shape, &values);
    };
    for (name, shape) in [
        ("model.embed_tokens.weight", vec![VOCAB, HIDDEN]),
        ("lm_head.weight", vec![VOCAB, HIDDEN]),
        ("model.norm.weight", vec![HIDDEN]),
    ] {
        shared(&mut quantized, &mut plain, name.to_owned(), &shape);
    }
    for layer in 0..2 {
        for (part, shape) in [
            ("input_layernorm.weight", vec![HIDDEN]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("self_attn.q_proj.weight", vec![HIDDEN, HIDDEN]),
            ("self_attn.q_proj.bias", vec![HIDDEN]),
            ("self_attn.k_proj.weight", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.k_proj.bias", vec![HIDDEN / 2]),
            ("self_attn.v_proj.weight", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj.bias", vec![HIDDEN / 2]),
            ("self_attn.o_proj.weight", vec![HIDDEN, HIDDEN]),
            ("self_attn.o_proj.bias", vec![HIDDEN]),
            ("self_attn.sinks", vec![4]),
            ("mlp.router.weight", vec![EXPERTS, HIDDEN]),
            ("mlp.router.bias", vec![EXPERTS]),
            ("mlp.experts.gate_up_proj_bias", vec![EXPERTS, 2 * WIDTH]),
            ("mlp.experts.down_proj_bias", vec![EXPERTS, HIDDEN]),
        ] {
            shared(&mut quantized, &mut plain, format!("model.layers.{layer}.{part}"), &shape);
        }
    }
    let mut r = Random(12);
    for layer in 0..2 {
        for (part, rows, columns) in [("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)] {
            let name = format!("model.layers.{layer}.mlp.experts.{part}");
            let (mut blocks, mut scales) = (Vec::new(), Vec::new());
            let mut turned = vec![0.0; EXPERTS * rows * columns];
            for (expert, row) in (0..EXPERTS).flat_map(|e| (0..rows).map(move |row| (e, row))) {
                for block in 0..columns / 32 {
                    let exponent = r.below(4) as i32 - 5;
                    scales.push((127 + exponent) as u8);
                    let numbers: [u8; 32] = std::array::from_fn(|_| r.below(16) as u8);
                    blocks.extend(numbers.chunks(2).map(|pair| pair[0] | pair[1] << 4));
                    for (i, number) in numbers.iter().enumerate() {
                        const SIZES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
                        let size = SIZES[usize::from(number & 7)] * 2f32.powi(exponent);
                        let at = (expert * columns + block * 32 + i) * rows + row;
                        turned[at] = if number & 8 == 0 { size } else { -size };
                    }
                }
            }
            quantized.push(format!("{name}_blocks"), Dtype::U8, &[EXPERTS, rows, columns / 32, 16], blocks);
            quantized.push(format!("{name}_scales"), Dtype::U8, &[EXPERTS, rows, columns / 32], scales);
            plain.floats(name, &[EXPERTS, columns, rows], &turned);
        }
    }
    let mut config = config(None);
    for (field, value) in [
        ("architectures", json!(["GptOssForCausalLM"])),
        ("intermediate_size", json!(WIDTH)),
        ("head_dim", json!(16)),
        ("num_local_experts", json!(EXPERTS)),
        ("num_experts_per_tok", json!(2)),
        ("sliding_window", json!(8)),
        ("swiglu_limit", json!(7.0)),
        ("attention_bias", json!(true)),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32,
            "truncate": false}),
        ),
    ] {
        config[field] = value;
    }
    (quantized, plain, config)
}

#[test]
fn experts_of_four_bits_compute_what_their_plain_twins_do() {
    let (quantized, plain, config) = mxfp4_pair();
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    plain.write(b.path(), &config);
    let mut with_method = config;
    with_method["quantization_config"] = json!({"quant_method": "mxfp4"});
    quantized.write(a.path(), &with_method);
    let (got, expected) = (logprobs(a.path()), logprobs(b.path()));
    let spread = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = largest_difference(&expected, &got) / spread;
    println!("mxfp4: largest relative difference {worst:e}, log-probabilities down to -{spread}");
    assert!(spread > 3.0 && worst < TOLERANCE, "mxfp4: {worst:e}");
}

#[test]
fn broken_parts_are_named() {
    type Edit = fn(&mut Checkpoint);
    fn drop_part(c: &mut Checkpoint, part: &str) {
        c.0.retain(|(name, ..)| name != &format!("model.layers.1.mlp.up_proj.{part}"));
    }
    fn reshape(c: &mut Checkpoint, part: &str) {
        let name = format!("model.layers.1.mlp.up_proj.{part}");
        let tensor = c.0.iter_mut().find(|(n, ..)| *n == name).unwrap();
        tensor.2 = vec![1, tensor.2.iter().product()];
    }
    let table: [(Form, Edit, &str); 9] = [
        (Form::Fp8Channel, |c| drop_part(c, "weight_scale"), "up_proj.weight_scale` is missing"),
        (Form::Fp8Blocks, |c| reshape(c, "weight_scale_inv"), "up_proj.weight_scale_inv` has shape [1, 16]"),
        (Form::Fp8Blocks, |c| reshape(c, "weight"), "up_proj.weight` has shape [1, 6144]"),
        (Form::Packed { zeros: false }, |c| drop_part(c, "weight_scale"), "up_proj.weight_scale` is missing"),
        (
            Form::Packed { zeros: true },
            |c| reshape(c, "weight_zero_point"),
            "weight_zero_point` has shape [1, 48]",
        ),
        (
            Form::Gptq { reordered: false, v2: false },
            |c| drop_part(c, "qzeros"),
            "up_proj.qzeros` is missing",
        ),
        (Form::Gptq { reordered: false, v2: false }, |c| reshape(c, "scales"), "up_proj.scales` has shape"),
        (Form::Awq, |c| reshape(c, "qweight"), "up_proj.qweight` has shape"),
        (Form::Awq, |c| drop_part(c, "qweight"), "up_proj.weight` is missing"),
    ];
    for (form, edit, words) in table {
        let (mut quantized, _) = pair(form, 1);
        edit(&mut quantized);
        let directory = tempfile::tempdir().unwrap();
        quantized.write(directory.path(), &config(Some(form.config())));
        let source = ModelSource::directory(directory.path()).unwrap();
        let result = load(&source, &LoadOptions::default(), Reference::default(), &mut |_, _| {});
        let error = result.err().unwrap();
        assert!(
            error.to_string().contains("model.safetensors") && error.to_string().contains(words),
            "{error}"
        );
        assert_eq!(error.exit_code(), 4);
    }
}
