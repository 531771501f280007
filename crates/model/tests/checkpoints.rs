//! The files of every golden model against its configuration: all tensors are there, no other is, and none may be
//! missing or of another shape.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mirai_model::FileSource;
use mirai_model::arch::{Description, describe};
use mirai_model::names::Naming;
use mirai_model::safetensors::{SINGLE, SafetensorsSource, Unused};
use mirai_model::spec::ModelSpec;
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

/// A file's header, and the rest of it.
fn split(bytes: &[u8]) -> (Map<String, Value>, &[u8]) {
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), &bytes[8 + length..])
}

fn join(header: &Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let header = Value::Object(header.clone()).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The same numbers under another shape; none where the shape says nothing.
fn reshaped(entry: &Value) -> Option<Value> {
    let shape: Vec<u64> = serde_json::from_value(entry["shape"].clone()).unwrap();
    let count: u64 = shape.iter().product();
    let other = if shape.len() == 1 { vec![1, count] } else { vec![count] };
    let mut entry = entry.clone();
    entry["shape"] = other.into();
    (count > 1).then_some(entry)
}

/// Reads every tensor until one fails.
fn read_all(spec: &ModelSpec, source: &SafetensorsSource) -> Result<(), String> {
    for id in tensors(spec) {
        let id = if id == TensorId::Embedding {
            embedding_id(spec, source).map_err(|e| e.to_string())?
        } else {
            id
        };
        source.tensor(spec, id).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Every tensor of a file in turn is renamed, then given another shape: both are errors, the second naming it.
fn damage(directory: &Path, scratch: &Path) -> Vec<String> {
    let bytes = std::fs::read(directory.join(SINGLE)).unwrap();
    let (header, data) = split(&bytes);
    let Description { spec, checkpoint } = describe("config.json", &config(directory)).unwrap();
    let mut all = files(directory);
    all.insert(SINGLE.to_owned(), FileSource::Path(scratch.to_owned()));
    let read = |header: &Map<String, Value>| {
        // Another file each time: the one before may still be mapped.
        std::fs::remove_file(scratch).ok();
        std::fs::write(scratch, join(header, data)).unwrap();
        let source = SafetensorsSource::open("dir", &all, checkpoint).map_err(|e| e.to_string())?;
        read_all(&spec, &source)
    };
    let mut wrong = Vec::new();
    if let Err(e) = read(&header) {
        wrong.push(format!("undamaged: {e}"));
    }
    // Of many experts the first two stand for all.
    let is_one_of_many = |name: &str| {
        let number =
            name.split_once("experts.").and_then(|(_, rest)| rest.split('.').next()?.parse::<u32>().ok());
        number.is_some_and(|n| n > 1)
    };
    let skip = |name: &str| name == "__metadata__" || Naming::is_ignored(name) || is_one_of_many(name);
    for (name, entry) in header.iter().filter(|(name, _)| !skip(name)) {
        let mut renamed = header.clone();
        renamed.remove(name);
        renamed.insert("renamed".to_owned(), entry.clone());
        if read(&renamed).is_ok() {
            wrong.push(format!("without `{name}`: read"));
        }
        let Some(other) = reshaped(entry) else { continue };
        let mut changed = header.clone();
        changed.insert(name.clone(), other);
        match read(&changed) {
            Ok(()) => wrong.push(format!("`{name}` of another shape: read")),
            Err(e) if !e.contains(name.as_str()) => wrong.push(format!("`{name}` of another shape: {e}")),
            Err(_) => {}
        }
    }
    wrong
}

#[test]
fn no_tensor_may_be_missing_or_of_another_shape() {
    let scratch = tempfile::tempdir().unwrap();
    let scratch = scratch.path().join(SINGLE);
    let mut wrong = Vec::new();
    for directory in goldens().iter().filter(|d| d.join(SINGLE).is_file()) {
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        wrong.extend(damage(directory, &scratch).into_iter().map(|w| format!("{name}: {w}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
