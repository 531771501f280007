//! Reads `model.safetensors.index.json`: which shards a model has. Owns the checks on that file; never opens
//! a shard.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::HubError;
use crate::files::{Bounds, not_plain, read_small};

/// Name of the index beside the shards.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The largest models known have indexes of about 10 MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Most shards of one model.
const MAX_SHARDS: usize = 4096;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The shards that the index names, each once, sorted by name, each checked to be a file within `bounds`.
pub(crate) fn shards(index: &Path, bounds: &Bounds) -> Result<Vec<PathBuf>, HubError> {
    let bad = |field: String, reason: String| HubError::BadIndex { path: index.to_owned(), field, reason };
    let text = read_small(index, MAX_INDEX_BYTES)?;
    let parsed: Index =
        serde_json::from_str(&text).map_err(|error| bad("weight_map".into(), error.to_string()))?;
    if parsed.weight_map.is_empty() {
        return Err(bad("weight_map".into(), "names no tensor".into()));
    }
    // File name -> first tensor in it, so that errors can name the field.
    let mut files = BTreeMap::<&str, &str>::new();
    for (tensor, file) in &parsed.weight_map {
        files.entry(file).or_insert(tensor);
    }
    if files.len() > MAX_SHARDS {
        return Err(bad("weight_map".into(), format!("names {} files, more than {MAX_SHARDS}", files.len())));
    }
    let mut shards = Vec::with_capacity(files.len());
    for (file, tensor) in files {
        let field = || format!("weight_map[{tensor:?}]");
        if let Some(reason) = not_plain(file) {
            return Err(bad(field(), format!("{file:?}: {reason}")));
        }
        if !file.ends_with(".safetensors") {
            return Err(bad(field(), format!("{file:?}: safetensors/GGUF only")));
        }
        let shard = bounds.optional(file)?.ok_or_else(|| HubError::MissingFile {
            dir: bounds.root().to_owned(),
            file: file.to_owned(),
            reason: format!("{INDEX_NAME} names it in {}", field()),
        })?;
        shards.push(shard);
    }
    Ok(shards)
}
