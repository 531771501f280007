//! The models whose steps are measured, at their true shapes, and tiny ones for an emulated device.

/// A model, how it is stored, and how near its floor it should be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    /// `config.json`.
    pub(super) config: &'static str,
    /// Weights and cache in 8-bit floats, else bf16.
    pub(super) e4m3: bool,
    pub(super) bars: Bars,
}

/// Most times the floor that a step should take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bars {
    /// Decode of one sequence, and of more.
    pub(super) decode: (f64, f64),
    pub(super) prefill: f64,
    pub(super) mixed: f64,
}

/// Sizes of the cases.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Sequences of the decode cases; the last is the most.
    pub(super) batches: [usize; 3],
    /// Tokens before a decode step, in the middle of the run.
    pub(super) context: usize,
    pub(super) prefill: usize,
    /// Rows that decode beside the piece of a prompt, and tokens of that piece.
    pub(super) mixed: (usize, usize),
    /// Steps that are timed, and of prompts, and those before that are not.
    pub(super) decode_steps: usize,
    pub(super) prefill_steps: usize,
    pub(super) warm: usize,
    /// Most bytes of the device.
    pub(super) memory: u64,
}

pub(super) const TRUE_SIZES: Sizes = Sizes {
    batches: [1, 32, 128],
    context: 1024,
    prefill: 4096,
    mixed: (64, 512),
    decode_steps: 192,
    prefill_steps: 12,
    warm: 6,
    memory: 120 << 30,
};

pub(super) const TINY_SIZES: Sizes = Sizes {
    batches: [1, 2, 3],
    context: 20,
    prefill: 40,
    mixed: (2, 9),
    decode_steps: 4,
    prefill_steps: 2,
    warm: 1,
    memory: 240 << 20,
};

const LLAMA_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "dtype": "bfloat16"}"#;
const QWEN_30B: &str = r#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "dtype": "bfloat16"}"#;
const TINY_LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300,
    "max_position_embeddings": 256, "dtype": "bfloat16"}"#;
const TINY_QWEN: &str = r#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "vocab_size": 300, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true,
    "max_position_embeddings": 256, "dtype": "bfloat16"}"#;

const DENSE_BARS: Bars = Bars { decode: (1.45, 1.35), prefill: 2.0, mixed: 1.5 };
const E4M3_BARS: Bars = Bars { decode: (1.6, 1.6), prefill: 2.0, mixed: 1.5 };
const EXPERT_BARS: Bars = Bars { decode: (2.0, 1.8), prefill: 2.5, mixed: 1.5 };

/// All shapes.
pub(super) fn shapes(tiny: bool) -> [Shape; 3] {
    let (llama, qwen) = if tiny { (TINY_LLAMA, TINY_QWEN) } else { (LLAMA_8B, QWEN_30B) };
    [
        Shape { name: "llama-3.1-8b-bf16", config: llama, e4m3: false, bars: DENSE_BARS },
        Shape { name: "llama-3.1-8b-fp8", config: llama, e4m3: true, bars: E4M3_BARS },
        Shape { name: "qwen3-30b-a3b-bf16", config: qwen, e4m3: false, bars: EXPERT_BARS },
    ]
}
