//! Broken model files: each ends in an error that names the file, the item and the reason. No panic, no long
//! wait, no memory that a lie in the file asked for.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod configurations;
mod families;
mod files;

use std::time::{Duration, Instant};

use files::*;
use mirai_model::reference::Reference;
use mirai_model::{CacheBudget, LoadOptions, ModelError, ModelSource, load};
use serde_json::{Value, json};

/// A broken source, and words that its error must have.
type Case = (&'static str, ModelSource, &'static [&'static str]);

fn try_load(source: &ModelSource) -> Result<(), ModelError> {
    let options = LoadOptions { cache: CacheBudget::Tokens(64), max_slots: 2, ..LoadOptions::default() };
    load(source, &options, Reference::default(), &mut |_, _| {}).map(|_| ())
}

/// Loads every case and returns all that went wrong.
fn check(cases: Vec<Case>) {
    let mut wrong = Vec::new();
    let count = cases.len();
    for (name, source, words) in cases {
        let started = Instant::now();
        match try_load(&source) {
            Ok(()) => wrong.push(format!("{name}: loaded")),
            Err(e) => {
                let text = e.to_string();
                for word in words {
                    if !text.contains(word) {
                        wrong.push(format!("{name}: `{text}` does not say `{word}`"));
                    }
                }
                if e.exit_code() != 4 {
                    wrong.push(format!("{name}: exit code {}", e.exit_code()));
                }
            }
        }
        // What trusts a corrupt length runs for minutes; a busy machine may take seconds.
        if started.elapsed() > Duration::from_secs(20) {
            wrong.push(format!("{name}: took {:?}", started.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{} of {count} cases:\n{}", wrong.len(), wrong.join("\n"));
}

/// The valid directory with fields of its configuration replaced; `null` removes one.
fn with_fields(fields: &Value) -> ModelSource {
    let mut config = config();
    for (key, value) in fields.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            v => config[key] = v.clone(),
        }
    }
    with_config(config.to_string().into_bytes())
}

fn with_config(config: Vec<u8>) -> ModelSource {
    directory(vec![("config.json", config), ("model.safetensors", valid_safetensors())])
}

fn with_weights(weights: Vec<u8>) -> ModelSource {
    directory(vec![("config.json", config().to_string().into_bytes()), ("model.safetensors", weights)])
}

/// The valid weights with a change of the header.
fn with_header(change: impl FnOnce(&mut Value)) -> ModelSource {
    let (mut header, len) = header(&tensors());
    change(&mut header);
    with_weights(safetensors(&header.to_string(), len))
}

fn with_index(index: &str, mut files: Vec<(&'static str, Vec<u8>)>) -> ModelSource {
    files.push(("config.json", config().to_string().into_bytes()));
    files.push(("model.safetensors.index.json", index.as_bytes().to_vec()));
    directory(files)
}

fn with_gguf(change: impl FnOnce(&mut Gguf)) -> ModelSource {
    let mut file = Gguf::valid();
    change(&mut file);
    file.source()
}

#[test]
fn the_valid_files_load() {
    try_load(&with_fields(&json!({}))).unwrap();
    try_load(&Gguf::valid().source()).unwrap();
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn safetensors_files() {
    const FILE: &str = "model.safetensors";
    const NORM: &str = "model.norm.weight";
    let raw = |header: &str, data| with_weights(safetensors(header, data));
    let length = |n: u64| with_weights([&n.to_le_bytes()[..], b"{}"].concat());
    let one = |dtype: &str, shape: Value, offsets: Value, data| {
        let header = json!({ NORM: {"dtype": dtype, "shape": shape, "data_offsets": offsets} });
        with_weights(safetensors(&header.to_string(), data))
    };
    let mut long = valid_safetensors();
    long.push(0);
    let mut short = valid_safetensors();
    short.truncate(short.len() - 100);
    let (part, part_len) = header(&tensors()[..3]);
    let shard = safetensors(&part.to_string(), part_len);
    let all: serde_json::Map<_, _> =
        tensors().iter().map(|(n, _)| ((*n).into(), json!("a.safetensors"))).collect();
    let index = |map: Value| json!({ "weight_map": map }).to_string();
    check(vec![
        ("empty", with_weights(vec![]), &[FILE, "header", "0 bytes"]),
        ("7 bytes", with_weights(vec![0; 7]), &[FILE, "header", "7 bytes"]),
        ("length 2^63", length(1 << 63), &[FILE, "header", "9223372036854775808"]),
        ("length 100 MB + 1", length(100_000_001), &[FILE, "100000001"]),
        ("length beyond the file", length(100), &[FILE, "header", "100 bytes", "has 2"]),
        ("length 0", length(0), &[FILE, "header"]),
        ("not UTF-8", with_weights([&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()), &[FILE, "UTF-8"]),
        ("not JSON", raw("{\"a\":", 0), &[FILE, "JSON"]),
        ("a list", raw("[1]", 0), &[FILE, "header"]),
        ("unknown type", one("F12", json!([8]), json!([0, 32]), 32), &[FILE, "F12"]),
        (
            "shape overflows",
            one("F32", json!([4_194_305, 4_194_305, 211_106_198_978_564u64]), json!([0, 32]), 32),
            &[FILE, "overflow"],
        ),
        (
            "shape times type is not the range",
            one("F32", json!([9]), json!([0, 32]), 32),
            &[FILE, "contradict"],
        ),
        ("begin after end", one("F32", json!([8]), json!([32, 0]), 32), &[FILE, NORM]),
        ("first offset is not 0", one("F32", json!([8]), json!([4, 36]), 36), &[FILE, NORM, "gap"]),
        ("offset 2^63", one("F32", json!([8]), json!([0, 1u64 << 63]), 32), &[FILE]),
        ("negative shape", one("F32", json!([-8]), json!([0, 32]), 32), &[FILE, "JSON"]),
        ("half a byte", one("F4", json!([3]), json!([0, 1]), 1), &[FILE]),
        ("bytes after the last tensor", with_weights(long), &[FILE, "data", "bytes"]),
        ("truncated", with_weights(short), &[FILE, "data", "truncated"]),
        (
            "overlap",
            with_header(|h| h["model.layers.0.input_layernorm.weight"]["data_offsets"] = json!([500, 532])),
            &[FILE, "overlap"],
        ),
        (
            "integers",
            with_header(|h| h[NORM]["dtype"] = json!("I32")),
            &[FILE, NORM, "I32", "F32, F16 or BF16"],
        ),
        (
            "transposed",
            with_header(|h| h["model.layers.0.mlp.down_proj.weight"]["shape"] = json!([12, 8])),
            &[FILE, "down_proj", "[12, 8]", "[8, 12]"],
        ),
        (
            "flattened",
            with_header(|h| h["model.layers.0.mlp.down_proj.weight"]["shape"] = json!([96])),
            &[FILE, "down_proj", "[96]"],
        ),
        ("missing tensor", raw(&part.to_string(), part_len), &[FILE, "model.layers.0.", "missing"]),
        (
            "tensor of a layer that is not there",
            with_header(|h| {
                h["model.layers.7.mlp.up_proj.weight"] =
                    json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]});
            }),
            &[FILE, "model.layers.7.", "1 layers"],
        ),
        ("no weights", directory(vec![("config.json", config().to_string().into_bytes())]), &["dir", FILE]),
        (
            "pickled",
            directory(vec![
                ("config.json", config().to_string().into_bytes()),
                ("pytorch_model.bin", vec![1, 2, 3]),
            ]),
            &["pytorch_model.bin", "safetensors"],
        ),
        ("index is no JSON", with_index("{", vec![]), &["index.json", "JSON"]),
        ("index without map", with_index("{}", vec![]), &["index.json", "`weight_map`"]),
        ("index with empty map", with_index(&index(json!({})), vec![]), &["index.json", "0 shards"]),
        (
            "shard is missing",
            with_index(&index(json!({"x": "a.safetensors"})), vec![]),
            &["index.json", "weight_map.x", "a.safetensors", "missing"],
        ),
        (
            "shard is absolute",
            with_index(&index(json!({"x": "/etc/passwd"})), vec![]),
            &["weight_map.x", "/etc/passwd"],
        ),
        (
            "shard is above",
            with_index(&index(json!({"x": "../a.safetensors"})), vec![]),
            &["weight_map.x", "../a.safetensors"],
        ),
        ("shard is a number", with_index(&index(json!({"x": 1})), vec![]), &["weight_map.x", "file name"]),
        ("shard is pickled", with_index(&index(json!({"x": "a.bin"})), vec![]), &["weight_map.x", "a.bin"]),
        (
            "tensor is not in its shard",
            with_index(&index(Value::Object(all)), vec![("a.safetensors", shard.clone())]),
            &["a.safetensors", "missing"],
        ),
        (
            "tensor is in two shards",
            with_index(
                &index(json!({NORM: "b.safetensors", "model.embed_tokens.weight": "a.safetensors"})),
                vec![("a.safetensors", shard.clone()), ("b.safetensors", valid_safetensors())],
            ),
            &["b.safetensors", "is also in `a.safetensors`"],
        ),
        (
            "shard is broken",
            with_index(&index(json!({"x": "a.safetensors"})), vec![("a.safetensors", vec![0; 5])]),
            &["a.safetensors", "5 bytes"],
        ),
    ]);
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn gguf_files() {
    use self::with_gguf as g;
    const FILE: &str = "m.gguf";
    let key = |k: &'static str, v: Vec<u8>| with_gguf(move |f| f.set(k, v));
    let without = |k: &'static str| with_gguf(move |f| f.remove(k));
    let dims = |d: Vec<u64>| with_gguf(move |f| f.tensor("output_norm.weight").dims = d);
    let align = |n| key("general.alignment", u32_value(n));
    check(vec![
        ("empty", gguf(vec![]), &[FILE, "magic", "4 bytes"]),
        ("magic", gguf(b"GGML\x03\0\0\0".to_vec()), &[FILE, "GGML"]),
        ("version 1", g(|f| f.version = 1), &[FILE, "version", "1"]),
        ("big-endian", g(|f| f.version = 3 << 24), &[FILE, "version", "little-endian"]),
        ("keys 2^64 - 1", g(|f| f.key_count = Some(u64::MAX)), &[FILE, "18446744073709551615 keys"]),
        ("keys one too many", g(|f| f.key_count = Some(f.keys.len() as u64 + 1)), &[FILE]),
        ("tensors 2^64 - 1", g(|f| f.tensor_count = Some(u64::MAX)), &[FILE, "18446744073709551615 tensors"]),
        ("tensors 100,000", g(|f| f.tensor_count = Some(100_000)), &[FILE, "tensor"]),
        (
            "text of 2^63 bytes",
            key("general.name", typed(8, &(1u64 << 63).to_le_bytes())),
            &[FILE, "`general.name`"],
        ),
        ("text beyond the file", key("general.name", typed(8, &(1u64 << 20).to_le_bytes())), &["more"]),
        ("text not UTF-8", key("general.name", typed(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), &["UTF-8"]),
        ("array of arrays", key("x", array(9, 1, &array(4, 0, &[]))), &["`x`", "arrays of arrays"]),
        ("array of 2^61 numbers", key("x", array(10, 1 << 61, &[])), &["`x`", "elements"]),
        ("array of 2^22 texts", key("x", array(8, 1 << 22, &[])), &["`x`", "elements", "left"]),
        ("array of unknown type", key("x", array(77, 1, &[])), &["`x`", "77"]),
        ("unknown value type", key("x", typed(13, &[])), &["`x`", "13"]),
        ("truth value 2", key("x", typed(7, &[2])), &["`x`", "truth value 2"]),
        ("key twice", g(|f| f.keys.push(("general.architecture".into(), text_value("llama")))), &["twice"]),
        ("alignment 0", align(0), &["`general.alignment`", "is 0"]),
        ("alignment 3", align(3), &["`general.alignment`", "is 3"]),
        ("alignment 2^31", align(1 << 31), &["`general.alignment`", "2147483648"]),
        ("alignment is a text", key("general.alignment", text_value("32")), &["`general.alignment`"]),
        ("0 dimensions", dims(vec![]), &["output_norm.weight", "0 dimensions"]),
        ("5 dimensions", dims(vec![1; 5]), &["output_norm.weight", "5 dimensions"]),
        (
            "2^32 - 1 dimensions",
            g(|f| f.tensor("output_norm.weight").dim_count = Some(u32::MAX)),
            &["4294967295 dimensions"],
        ),
        ("dimension 0", dims(vec![0]), &["output_norm.weight", "dimension is 0"]),
        ("shape overflows", dims(vec![1 << 40, 1 << 40]), &["output_norm.weight", "overflows"]),
        ("shape is SIZE_MAX / 4", dims(vec![u64::MAX / 4]), &["output_norm.weight"]),
        ("shape differs", dims(vec![4]), &["output_norm.weight", "[4]", "[8]"]),
        (
            "offset overflows",
            g(|f| f.tensor("output_norm.weight").offset = u64::MAX - 31),
            &["output_norm.weight"],
        ),
        (
            "past the end",
            g(|f| f.tensor("output_norm.weight").offset = 1 << 20),
            &["output_norm.weight", "file has"],
        ),
        ("truncated", g(|f| f.data -= 8), &["output_norm.weight", "needs 32 bytes"]),
        (
            "misaligned",
            g(|f| f.tensor("output_norm.weight").offset += 4),
            &["output_norm.weight", "alignment"],
        ),
        ("overlap", g(|f| f.tensor("output_norm.weight").offset = 0), &["inside another tensor"]),
        ("tensor twice", g(|f| f.push("output_norm.weight", &[8], 0)), &["output_norm.weight", "twice"]),
        (
            "unknown quantization",
            g(|f| f.tensor("output_norm.weight").kind = 99),
            &["output_norm.weight", "99"],
        ),
        (
            "not whole blocks",
            g(|f| f.tensor("blk.0.ffn_up.weight").kind = 8),
            &["blk.0.ffn_up.weight", "q8_0"],
        ),
        ("no architecture", without("general.architecture"), &["`general.architecture`", "missing"]),
        ("architecture is a number", key("general.architecture", u32_value(1)), &["text"]),
        ("unknown architecture", key("general.architecture", text_value("mamba")), &["mamba", "llama, "]),
        (
            "heads 0",
            key("llama.attention.head_count", u32_value(0)),
            &["`llama.attention.head_count`", "is 0"],
        ),
        ("heads missing", without("llama.attention.head_count"), &["head_count`", "missing"]),
        (
            "heads do not divide",
            key("llama.attention.head_count", u32_value(3)),
            &["`llama.attention.head_count`"],
        ),
        ("kv heads do not divide", key("llama.attention.head_count_kv", u32_value(3)), &["head_count_kv`"]),
        (
            "rotation of half a head",
            key("llama.rope.dimension_count", u32_value(2)),
            &["rope.dimension_count`"],
        ),
        ("odd head", key("llama.attention.key_length", u32_value(5)), &["key_length`", "even"]),
        ("layers 10^9", key("llama.block_count", u32_value(1_000_000_000)), &["block_count`", "1000000000"]),
        ("layers 2", key("llama.block_count", u32_value(2)), &["blk.1.", "missing"]),
        (
            "layers negative",
            key("llama.block_count", typed(5, &(-1i32).to_le_bytes())),
            &["block_count`", "-1"],
        ),
        ("context missing", without("llama.context_length"), &["`llama.context_length`", "missing"]),
        (
            "epsilon NaN",
            key("llama.attention.layer_norm_rms_epsilon", f32_value(f32::NAN)),
            &["epsilon`", "finite"],
        ),
        ("epsilon missing", without("llama.attention.layer_norm_rms_epsilon"), &["epsilon`", "missing"]),
        ("theta 0", key("llama.rope.freq_base", f32_value(0.0)), &["`llama.rope.freq_base`"]),
        (
            "theta infinite",
            key("llama.rope.freq_base", f32_value(f32::INFINITY)),
            &["`llama.rope.freq_base`"],
        ),
        (
            "rope longrope",
            key("llama.rope.scaling.type", text_value("longrope")),
            &["scaling.type`", "longrope"],
        ),
        ("rope without factor", key("llama.rope.scaling.type", text_value("linear")), &["scaling.factor`"]),
        ("rope divisors too many", g(|f| f.push("rope_freqs.weight", &[8], 0)), &["rope_freqs.weight"]),
        (
            "rope divisors 0",
            g(|f| f.push("rope_freqs.weight", &[2], 0)),
            &["rope_freqs.weight", "divisor is 0"],
        ),
        ("experts", key("llama.expert_count", u32_value(8)), &["`llama.expert_count`", "8"]),
        ("split", key("split.count", typed(2, &2u16.to_le_bytes())), &["`split.count`", "2"]),
        ("vocabulary differs", key("llama.vocab_size", u32_value(17)), &["`llama.vocab_size`", "17", "16"]),
        (
            "more tokens than rows",
            key("tokenizer.ggml.tokens", array(8, 17, &text("t").repeat(17))),
            &["17 entries"],
        ),
        ("no tokens", without("tokenizer.ggml.tokens"), &["`tokenizer.ggml.tokens`", "missing"]),
        ("tokens are numbers", key("tokenizer.ggml.tokens", array(4, 2, &[0; 8])), &["tokens`", "integers"]),
        ("scores too few", key("tokenizer.ggml.scores", array(6, 3, &[0; 12])), &["scores`", "3 entries"]),
        ("eos beyond", key("tokenizer.ggml.eos_token_id", u32_value(16)), &["eos_token_id`", "16"]),
        ("no tokenizer model", without("tokenizer.ggml.model"), &["`tokenizer.ggml.model`", "missing"]),
        ("no table", g(|f| f.tensors.remove(0).offset = 0), &["token_embd.weight", "missing"]),
        (
            "tensor of a layer that is not there",
            g(|f| f.push("blk.9.ffn_up.weight", &[1], 0)),
            &["blk.9.", "1 layers"],
        ),
        (
            "layers 2 with tensors of 1 beyond",
            g(|f| f.tensor("blk.0.attn_q.weight").name = "blk.0.attn_z.weight".into()),
            &["blk.0.attn_q.weight", "missing"],
        ),
    ]);
}

/// Every prefix of a valid file is an error, and none takes the process down.
#[test]
fn every_truncation_is_an_error() {
    let whole = valid_safetensors();
    for n in 0..whole.len() {
        assert!(try_load(&with_weights(whole[..n].to_vec())).is_err(), "safetensors of {n} bytes");
    }
    let whole = Gguf::valid().bytes();
    for n in 0..whole.len() {
        assert!(try_load(&gguf(whole[..n].to_vec())).is_err(), "GGUF of {n} bytes");
    }
}

/// Random bytes in random places: any outcome but a panic.
#[test]
fn random_damage_never_panics() {
    let seed = 0x5eed_u64;
    println!("seed {seed:#x}");
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let (st, gg) = (valid_safetensors(), Gguf::valid().bytes());
    let mut refused = 0;
    for round in 0..6_000 {
        let whole = if round % 2 == 0 { &st } else { &gg };
        let mut bytes = whole.clone();
        for _ in 0..=next() % 4 {
            let at = next() as usize % 1_400.min(bytes.len());
            bytes[at] = next() as u8;
        }
        let source = if round % 2 == 0 { with_weights(bytes) } else { gguf(bytes) };
        refused += usize::from(try_load(&source).is_err());
    }
    assert!(refused > 3_000, "only {refused} of 6000 damaged files were refused");
}

/// No case above makes the process take memory for what a file merely claims.
#[test]
#[cfg(target_os = "linux")]
fn claims_take_no_memory() {
    let peak = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    configurations::configurations();
    families::shapes();
    safetensors_files();
    gguf_files();
    let kib = peak();
    assert!(kib < 200 * 1024, "peak resident memory {kib} KiB");
}
