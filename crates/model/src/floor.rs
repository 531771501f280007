//! The least time that a step can take: the bytes that it must move over the memory's rate, or the operations that it must
//! do over the arithmetic units' rate, whichever is longer.
//!
//! Owns the count of both from a specification: each weight read once, the keys and values that a row sees read once, its
//! own written once; activations are taken to stay on the chip. It knows no device and measures nothing: rates are given.

use crate::backend::{CacheDtype, Stored};
use crate::spec::{Ffn, Head, KvSource, Mixer, ModelSpec};
use crate::weights::{Part, TensorId, shape, tensors};

/// Bytes of a weight that is not quantized, and of an activation.
const WIDE: f64 = 2.0;

/// How a model is stored on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Whether linear weights are 8-bit floats with a scale for each row, else bf16.
    pub e4m3_weights: bool,
    /// Element of keys and values.
    pub cache: CacheDtype,
}

/// Rates of a device, best measured on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes a second that can be read.
    pub bytes: f64,
    /// Operations a second of dense bf16 products; a multiplication with its addition is two.
    pub bf16: f64,
    /// The same of e4m3 products.
    pub e4m3: f64,
}

/// Consecutive tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkRow {
    /// Tokens before them.
    pub start: usize,
    /// How many.
    pub len: usize,
    /// Rows of logits that are made of them.
    pub outputs: usize,
}

/// What a step must do at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of weights read.
    pub weight_bytes: f64,
    /// Bytes of keys, values and recurrent states read and written.
    pub cache_bytes: f64,
    /// Operations of products with bf16 weights.
    pub bf16: f64,
    /// Operations of products with e4m3 weights.
    pub e4m3: f64,
    /// Operations of attention.
    pub attention: f64,
}

/// The least time of some work, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// Seconds for the bytes.
    pub memory: f64,
    /// Seconds for the operations.
    pub compute: f64,
}

impl Work {
    /// The least time at these rates, everything overlapped.
    #[must_use]
    pub fn floor(&self, ceilings: &Ceilings) -> Floor {
        Floor {
            memory: (self.weight_bytes + self.cache_bytes) / ceilings.bytes,
            compute: (self.bf16 + self.attention) / ceilings.bf16 + self.e4m3 / ceilings.e4m3,
        }
    }
}

impl Floor {
    /// The least time, in seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.memory.max(self.compute)
    }

    /// What limits: `memory` or `compute`.
    #[must_use]
    pub fn bound(&self) -> &'static str {
        if self.memory >= self.compute { "memory" } else { "compute" }
    }
}

/// Attention of one layer.
#[derive(Clone, Copy, Debug)]
struct Attention {
    /// Bytes that one token has in the cache.
    token_bytes: f64,
    /// Whether they are this layer's own, so that it writes them.
    own: bool,
    /// Operations for one query token and one key.
    pair: f64,
    window: Option<usize>,
    /// Every token sees every other, and nothing is kept.
    whole: bool,
}

/// Experts of one layer.
#[derive(Clone, Copy, Debug)]
struct Experts {
    experts: f64,
    chosen: f64,
    /// Bytes of one.
    bytes: f64,
}

/// Counts of a model, from which those of a step follow.
#[derive(Clone, Debug)]
pub struct CostModel {
    /// Read by every step: all but the experts, the head and the embedding table.
    dense_bytes: f64,
    head_bytes: f64,
    /// A row of the embedding table.
    row_bytes: f64,
    /// Operations of a token.
    token_bf16: f64,
    token_e4m3: f64,
    /// Operations of a row of logits.
    head: f64,
    /// Bytes of recurrent state that a row reads and writes.
    state_bytes: f64,
    attention: Vec<Attention>,
    experts: Vec<Experts>,
}

impl CostModel {
    /// Counts a model.
    #[must_use]
    pub fn new(spec: &ModelSpec, precision: Precision) -> Self {
        let head = match spec.head {
            Head::Logits { .. } => (spec.vocab * spec.hidden) as f64,
            Head::Pool(_) => 0.0,
        };
        let mut cost = Self {
            dense_bytes: 0.0,
            head_bytes: head * WIDE,
            row_bytes: spec.hidden as f64 * WIDE,
            token_bf16: 0.0,
            token_e4m3: 0.0,
            head: 2.0 * head,
            state_bytes: 0.0,
            attention: Vec::new(),
            experts: Vec::new(),
        };
        cost.add_layers(spec, precision);
        for id in tensors(spec) {
            cost.add_tensor(spec, id, precision);
        }
        cost
    }

    fn add_layers(&mut self, spec: &ModelSpec, precision: Precision) {
        for layer in &spec.layers {
            match &layer.mixer {
                Mixer::Attention(a) => {
                    let (key, stored) = spec.stored(a);
                    let width = if stored == Stored::KeysAndValues { key + a.head_dim } else { key };
                    self.attention.push(Attention {
                        token_bytes: (a.kv_heads * width) as f64 * element(precision.cache),
                        own: !matches!(a.kv, KvSource::Layer(_)),
                        pair: 2.0 * (a.q_heads * (key + a.head_dim)) as f64,
                        window: a.window.map(|w| w as usize),
                        whole: a.bidirectional,
                    });
                }
                Mixer::Latent(l) => {
                    let key = l.shape.latent + l.shape.rope;
                    self.attention.push(Attention {
                        token_bytes: key as f64 * element(precision.cache),
                        own: true,
                        pair: 2.0 * (l.heads * (key + l.shape.latent)) as f64,
                        window: None,
                        whole: false,
                    });
                }
                Mixer::Delta(d) => {
                    let elements = d.shape.conv_elements() + d.shape.state_elements();
                    self.state_bytes += 2.0 * 4.0 * elements as f64;
                }
            }
            let moe = match &layer.ffn {
                Ffn::Moe(moe) | Ffn::DenseAndMoe(_, moe) => Some(moe),
                Ffn::Dense(_) => None,
            };
            // Their bytes are added with their tensors.
            self.experts.push(Experts {
                experts: moe.map_or(0.0, |m| m.route.experts as f64),
                chosen: moe.map_or(0.0, |m| m.route.top_k as f64),
                bytes: 0.0,
            });
        }
    }

    fn add_tensor(&mut self, spec: &ModelSpec, id: TensorId, precision: Precision) {
        let shape = shape(spec, id);
        let count = shape.iter().product::<usize>() as f64;
        let (part, layer) = match id {
            TensorId::Embedding | TensorId::Head | TensorId::Positions | TensorId::TokenTypes => return,
            TensorId::Layer(layer, part) => (Some(part), layer),
            _ => (None, 0),
        };
        let narrow = precision.e4m3_weights && part.is_some_and(Part::is_linear);
        let bytes = if narrow { count + 4.0 * shape[0] as f64 } else { count * WIDE };
        let expert = matches!(part, Some(Part::Expert(..)));
        if matches!(part, Some(Part::Expert(index, _)) if index > 0) {
            return;
        }
        let times = if expert { self.experts[layer].chosen } else { 1.0 };
        if expert {
            self.experts[layer].bytes += bytes;
        } else {
            self.dense_bytes += bytes;
        }
        // Convolutions have rows too, but each of their numbers meets one number of the token as well.
        if shape.len() == 2 {
            let operations = 2.0 * count * times;
            if narrow { self.token_e4m3 += operations } else { self.token_bf16 += operations }
        }
    }

    /// Counts a step. Experts are taken to be chosen uniformly and independently.
    #[must_use]
    pub fn step(&self, rows: &[WorkRow]) -> Work {
        let tokens = rows.iter().map(|row| row.len).sum::<usize>() as f64;
        let outputs = rows.iter().map(|row| row.outputs).sum::<usize>() as f64;
        let mut work = Work {
            weight_bytes: self.dense_bytes + tokens * self.row_bytes,
            cache_bytes: rows.len() as f64 * self.state_bytes,
            bf16: tokens * self.token_bf16 + outputs * self.head,
            e4m3: tokens * self.token_e4m3,
            attention: 0.0,
        };
        if outputs > 0.0 {
            work.weight_bytes += self.head_bytes;
        }
        for layer in &self.experts {
            if layer.experts > 0.0 {
                let spared = (1.0 - layer.chosen / layer.experts).powf(tokens);
                work.weight_bytes += layer.experts * (1.0 - spared) * layer.bytes;
            }
        }
        for layer in &self.attention {
            for row in rows {
                work.attention += layer.pair * layer.pairs(row);
                work.cache_bytes += layer.token_bytes * layer.moved(row);
            }
        }
        work
    }
}

impl Attention {
    /// Pairs of a query token and a key that it sees.
    fn pairs(&self, row: &WorkRow) -> f64 {
        let (start, len) = (row.start as f64, row.len as f64);
        if self.whole {
            return len * len;
        }
        // Of the query at position p: p + 1, or the window.
        let triangle = |from: f64, count: f64| count * from + count * (count + 1.0) / 2.0;
        match self.window {
            None => triangle(start, len),
            Some(window) => {
                let window = window as f64;
                let growing = (window - start).clamp(0.0, len);
                triangle(start, growing) + (len - growing) * window
            }
        }
    }

    /// Tokens whose keys and values are read from the cache or written to it.
    fn moved(&self, row: &WorkRow) -> f64 {
        if self.whole {
            return 0.0;
        }
        let seen = self.window.map_or(row.start, |w| row.start.min(w.saturating_sub(1)));
        seen as f64 + if self.own { row.len as f64 } else { 0.0 }
    }
}

const fn element(cache: CacheDtype) -> f64 {
    match cache {
        CacheDtype::F32 => 4.0,
        CacheDtype::Bf16 => 2.0,
        CacheDtype::F8E4M3 => 1.0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::loader::read_spec;
    use crate::source::ModelSource;

    /// Rates of one H200 at which the table of published floors was made.
    const H200: Ceilings = Ceilings { bytes: 4.3e12, bf16: 790e12, e4m3: 1580e12 };
    const LLAMA: &[u8] =
        br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072}"#;
    const QWEN: &[u8] = br#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
        "max_position_embeddings": 40960}"#;
    const WINDOWED: &[u8] =
        br#"{"architectures": ["MistralForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
        "max_position_embeddings": 96, "sliding_window": 7}"#;

    fn cost(config: &'static [u8], e4m3: bool) -> CostModel {
        let spec = read_spec(&ModelSource::memory("test", &[("config.json", config)])).unwrap();
        let cache = if e4m3 { CacheDtype::F8E4M3 } else { CacheDtype::Bf16 };
        CostModel::new(&spec, Precision { e4m3_weights: e4m3, cache })
    }

    fn decode(batch: usize) -> Vec<WorkRow> {
        vec![WorkRow { start: 1024, len: 1, outputs: 1 }; batch]
    }

    fn milliseconds(cost: &CostModel, rows: &[WorkRow]) -> f64 {
        cost.step(rows).floor(&H200).seconds() * 1e3
    }

    fn near(got: f64, want: f64) {
        assert!((got / want - 1.0).abs() < 0.01, "{got}, not {want}");
    }

    #[test]
    fn decode_floors_are_those_of_the_published_table() {
        let (bf16, e4m3, experts) = (cost(LLAMA, false), cost(LLAMA, true), cost(QWEN, false));
        for (batch, wide, narrow, moe) in
            [(1, 3.52, 1.88, 1.44), (32, 4.49, 2.37, 13.10), (128, 7.49, 3.87, 17.05)]
        {
            near(milliseconds(&bf16, &decode(batch)), wide);
            near(milliseconds(&e4m3, &decode(batch)), narrow);
            near(milliseconds(&experts, &decode(batch)), moe);
            assert_eq!(bf16.step(&decode(batch)).floor(&H200).bound(), "memory");
        }
    }

    #[test]
    fn prefill_is_bound_by_arithmetic() {
        let prompt = [WorkRow { start: 0, len: 4096, outputs: 1 }];
        let work = cost(LLAMA, false).step(&prompt);
        // 2 * 4,096 * 6.98e9 for the layers, and half of 4 * 32 * 4,096 * 4,096^2 for attention.
        near(work.bf16, 2.0 * 4096.0 * 6.979e9 + 2.0 * 0.525e9);
        near(work.attention, 2.0 * 32.0 * 4096.0 * 4096.0 * 4097.0);
        let floor = work.floor(&H200);
        assert_eq!(floor.bound(), "compute");
        near(floor.seconds(), floor.compute);
        let narrow = cost(LLAMA, true).step(&prompt);
        near(narrow.e4m3, 2.0 * 4096.0 * 6.979e9);
        assert!(narrow.bf16 < 1.2e10, "the head and norms: {}", narrow.bf16);
    }

    #[test]
    fn a_prompt_in_two_pieces_has_the_same_attention() {
        for config in [LLAMA, WINDOWED] {
            let cost = cost(config, false);
            let piece = |start, len| cost.step(&[WorkRow { start, len, outputs: 0 }]);
            let whole = piece(0, 40).attention;
            for cut in [1, 5, 6, 7, 8, 30] {
                near(piece(0, cut).attention + piece(cut, 40 - cut).attention, whole);
            }
        }
    }

    #[test]
    fn a_window_bounds_what_is_read() {
        let cost = cost(WINDOWED, false);
        let at = |start| cost.step(&[WorkRow { start, len: 1, outputs: 1 }]);
        assert!(at(3).cache_bytes < at(6).cache_bytes);
        assert!((at(6).cache_bytes - at(60).cache_bytes).abs() < 1e-9);
        // Two layers, two heads of 8 for keys and for values, six earlier tokens and its own, bf16.
        assert!((at(60).cache_bytes - 2.0 * 2.0 * 16.0 * 7.0 * 2.0).abs() < 1e-9, "{}", at(60).cache_bytes);
        assert!((at(60).attention - at(6).attention).abs() < 1e-9);
        let quiet = cost.step(&[WorkRow { start: 0, len: 1, outputs: 0 }]);
        assert!(quiet.weight_bytes < at(0).weight_bytes, "no logits, no head");
    }
}
