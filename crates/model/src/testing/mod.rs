//! Tools for tests of numbers: golden files, a driver that plays sequences through an executor without an engine, and
//! backends with a fault built in.
//!
//! Behind the feature `test-support`.

mod difference;
mod driver;
mod golden;
mod mutant;

pub use difference::Difference;
pub use driver::{Driver, Played, Prefix, Script};
pub use golden::{GoldenCase, GoldenPrompt, GoldenTask, cosine, largest_difference, read_golden};
pub use mutant::{Mutant, Mutation};
