//! The model inside the binary (cargo feature `demo-model`).
//!
//! Owns the embedded files; what they are is told in `models/demo/README.md`.

/// Files of a model, in memory.
pub(crate) struct Embedded {
    pub(crate) config: &'static [u8],
    pub(crate) generation_config: &'static [u8],
    pub(crate) tokenizer: &'static [u8],
    pub(crate) tokenizer_config: &'static [u8],
    pub(crate) weights: &'static [u8],
}

/// The name under which it is served.
pub(crate) const NAME: &str = "mirai-demo";

/// The demo model, if this build carries it.
#[cfg_attr(feature = "demo-model", allow(clippy::unnecessary_wraps, reason = "None without the feature"))]
pub(crate) const fn model() -> Option<Embedded> {
    #[cfg(feature = "demo-model")]
    {
        macro_rules! file {
            ($name:literal) => {
                include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/", $name))
            };
        }
        Some(Embedded {
            config: file!("config.json"),
            generation_config: file!("generation_config.json"),
            tokenizer: file!("tokenizer.json"),
            tokenizer_config: file!("tokenizer_config.json"),
            weights: file!("model.safetensors"),
        })
    }
    #[cfg(not(feature = "demo-model"))]
    {
        None
    }
}
