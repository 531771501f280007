//! Answers as bytes, written by hand because one chunk is written for each token.
//!
//! Owns the JSON of chunks and whole answers. The types in `api` document the same shapes; tests hold both
//! together.

pub(crate) mod chunk;
pub(crate) mod json;
pub(crate) mod logprobs;
pub(crate) mod whole;
