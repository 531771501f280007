//! Model files on this machine: which files make a model, where they lie, and whether they are intact.
//!
//! Owns: reading a `--model` argument ([`ModelRef`]), finding the files of a model in a directory or in the
//! local store in the Hugging Face cache layout ([`resolve`]), SHA-256 manifests ([`checksum`]), and, with
//! the cargo feature `download`, filling the store from a hub ([`pull`]).
//!
//! Never: parses `config.json`, a tensor or a template, opens pickled weights (`.bin`, `.pt`, `.pth`,
//! `.pkl`), or uses the network outside [`pull`]. [`resolve`] is offline by construction.

pub mod checksum;
#[cfg(feature = "download")]
mod download;
mod error;
mod files;
mod index;
mod local;
mod model_ref;
mod pull;
mod selection;
mod store;

pub use error::HubError;
pub use local::{LocalModel, TokenizerFiles, Weights, resolve};
pub use model_ref::ModelRef;
pub use pull::pull;
pub use selection::{PullProgress, is_wanted_file};
pub use store::StoreOptions;
