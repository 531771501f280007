//! Model specifications, weights, and the forward pass, written once over [`backend::Backend`].
//!
//! Knows architectures and tensors' names; never HTTP, never a request.

pub mod backend;
