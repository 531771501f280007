//! The file of prices.

use std::path::Path;

use mirai_ledger::price::PriceBook;

use crate::exit::Failure;

/// Reads it; a message names the file.
pub(crate) fn read(path: &Path) -> Result<PriceBook, Failure> {
    let failure = |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| failure(&error))?;
    PriceBook::parse(&text).map_err(|error| failure(&error))
}
