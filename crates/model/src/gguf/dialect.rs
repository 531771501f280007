//! What the files of a family leave open. Reads nothing.

/// What GGUF files of a family look like: what their metadata leaves open.
#[derive(Clone, Copy, Debug)]
pub struct Dialect {
    /// Its name in `general.architecture`. Mistral's files are usually called `llama`.
    pub name: &'static str,
    /// Rows of q and k are stored pairwise, for another way to rotate.
    pub pairs: bool,
    /// Heads of q and k are normed.
    pub qk_norm: bool,
    /// q, k and v have biases in any case; else where there are such tensors.
    pub qkv_bias: bool,
}

impl Dialect {
    /// Llama.
    pub const LLAMA: Self = Self { name: "llama", pairs: true, qk_norm: false, qkv_bias: false };
    /// Mistral.
    pub const MISTRAL: Self = Self { name: "mistral", ..Self::LLAMA };
    /// Qwen 2.
    pub const QWEN2: Self = Self { name: "qwen2", pairs: false, qk_norm: false, qkv_bias: true };
    /// Qwen 3.
    pub const QWEN3: Self = Self { name: "qwen3", pairs: false, qk_norm: true, qkv_bias: false };
}
