//! The files of every golden model against its configuration: all tensors are there, and no other is.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mirai_model::FileSource;
use mirai_model::arch::{Description, describe};
use mirai_model::safetensors::{SafetensorsSource, Unused};
use mirai_model::weights::{TensorId, WeightSource, embedding_id, shape, tensors};
use serde_json::{Map, Value};

fn goldens() -> Vec<PathBuf> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    let entries = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<_> = entries.filter(|p| p.join("config.json").is_file()).collect();
    found.sort();
    assert!(found.len() >= 12, "only {} goldens", found.len());
    found
}

fn files(directory: &Path) -> BTreeMap<String, FileSource> {
    let entries = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path());
    entries.map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), FileSource::Path(p))).collect()
}

fn config(directory: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(directory.join("config.json")).unwrap()).unwrap()
}

fn open(directory: &Path) -> Result<(Description, SafetensorsSource), String> {
    let described = describe("config.json", &config(directory)).map_err(|e| e.to_string())?;
    let place = directory.display().to_string();
    let source = SafetensorsSource::open(&place, &files(directory), described.checkpoint);
    Ok((described, source.map_err(|e| e.to_string())?))
}

fn check(directory: &Path) -> Result<(), String> {
    let (Description { spec, .. }, source) = open(directory)?;
    let Unused { names, ignored } = source.unused(&spec).map_err(|e| e.to_string())?;
    // Wrappers come with a part of another modality, Apertus with constants.
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let has_more = ["-wrapper", "mistral3", "gemma4", "apertus"].iter().any(|part| name.contains(part));
    if !names.is_empty() || (ignored > 0 && !has_more) {
        return Err(format!("unused: {names:?}, {ignored} ignored"));
    }
    for id in tensors(&spec) {
        // A tied model may store its table as the head alone.
        let id = if id == TensorId::Embedding { embedding_id(&spec, &source).unwrap() } else { id };
        if !source.has(&spec, id) {
            return Err(format!("{id:?} is missing"));
        }
        let tensor = source.tensor(&spec, id).map_err(|e| e.to_string())?;
        if tensor.shape != shape(&spec, id) || tensor.shape.is_empty() {
            return Err(format!("{id:?} has shape {:?}", tensor.shape));
        }
        if tensor.storage.tensor_bytes(&tensor.shape) != Some(tensor.bytes.len()) {
            return Err(format!("{id:?}: {} bytes for {:?}", tensor.bytes.len(), tensor.shape));
        }
    }
    Ok(())
}

#[test]
fn every_tensor_of_every_golden_is_found_and_none_is_left() {
    let wrong: Vec<_> = goldens()
        .iter()
        .filter_map(|d| Some(format!("{}: {}", d.file_name()?.to_str()?, check(d).err()?)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
