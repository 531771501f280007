//! Tests of the crate's public surface on real inputs.
#![allow(clippy::unwrap_used)]

mod bpe_gguf;
mod corrupt;
mod data;
mod detokenizer;
mod limits;
mod llama3;
mod spm_gguf;
mod templates;
