//! Tests of the crate's public surface on real inputs.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod bpe_gguf;
mod corrupt;
mod data;
mod detokenizer;
mod limits;
mod llama3;
mod reasoning;
mod round_trips;
mod spm_gguf;
mod tekken;
mod templates;
mod unigram;
