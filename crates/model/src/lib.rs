//! Model specifications, weights, and the forward pass, written once over [`backend::Backend`].
//!
//! Knows architectures and tensors' names; never HTTP, never a request.
//!
//! [`loader::load`] is the way in: from files to a [`executor::ModelExecutor`] that the engine drives.

pub mod arch;
pub mod backend;
pub mod budget;
pub mod cache;
pub mod config;
pub mod convert;
pub mod dummy;
pub mod error;
pub mod executor;
pub mod floor;
pub mod forward;
pub mod gguf;
pub mod inspect;
mod load_weights;
pub mod loader;
pub mod mmap;
pub mod names;
pub mod pooling;
pub mod quant;
#[cfg(feature = "test-support")]
pub mod reference;
pub mod rope;
pub mod safetensors;
pub mod source;
pub mod spec;
mod storage;
#[cfg(feature = "test-support")]
pub mod testing;
pub mod texts;
pub mod weights;

pub use budget::CacheBudget;
pub use cache::CacheReport;
pub use convert::Quantization;
pub use error::ModelError;
pub use executor::ModelExecutor;
pub use loader::{LoadOptions, LoadedModel, load};
pub use mmap::FileSource;
pub use source::ModelSource;
pub use spec::ModelSpec;
