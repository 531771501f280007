//! What the product is made of, as CycloneDX 1.5: the crates that the server links, the Debian packages of its image,
//! and the CUDA libraries where they are added. Reads `cargo metadata`, the lock file, and package descriptions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::shell::{self, root};

/// The package whose binary is shipped.
const PACKAGE: &str = "mirai-cli";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The document for the binary, with the packages of an image's root where one is given.
pub(crate) fn document(image: Option<&Path>) -> Result<Value> {
    let metadata = shell::output(
        "cargo",
        &["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", TARGET],
    )?;
    let metadata: Value = serde_json::from_str(&metadata).context("output of cargo metadata")?;
    let lock = std::fs::read_to_string(root().join("Cargo.lock"))?;
    let mut components = crates(&metadata, &checksums(&lock)?)?;
    if let Some(image) = image {
        components.extend(debian(image)?);
        components.extend(wheels(image));
    }
    let version = env!("CARGO_PKG_VERSION");
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": { "type": "application", "name": "mirai", "version": version, "bom-ref": "mirai" } },
        "components": components,
    }))
}

/// Checksums of the lock file by name and version.
fn checksums(lock: &str) -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Table = lock.parse().context("Cargo.lock")?;
    let packages =
        lock.get("package").and_then(toml::Value::as_array).context("Cargo.lock has no packages")?;
    let text = |p: &toml::Value, key: &str| p.get(key).and_then(toml::Value::as_str).map(str::to_owned);
    let entry = |p| Some(((text(p, "name")?, text(p, "version")?), text(p, "checksum")?));
    Ok(packages.iter().filter_map(entry).collect())
}

/// What is linked: reached from the binary by dependencies that are neither for tests nor for build scripts.
fn crates(metadata: &Value, checksums: &BTreeMap<(String, String), String>) -> Result<Vec<Value>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages: BTreeMap<String, Value> =
        list(&metadata["packages"]).into_iter().map(|p| (word(&p["id"]), p)).collect();
    let nodes: BTreeMap<String, Value> =
        list(&metadata["resolve"]["nodes"]).into_iter().map(|n| (word(&n["id"]), n)).collect();
    let start = packages.iter().find(|(_, p)| p["name"] == PACKAGE).context("no package of the binary")?.0;
    let mut reached = BTreeSet::from([start.clone()]);
    let mut waiting = vec![start.clone()];
    while let Some(id) = waiting.pop() {
        for dependency in list(&nodes.get(&id).with_context(|| format!("{id} is not resolved"))?["deps"]) {
            let normal = list(&dependency["dep_kinds"]).iter().any(|k| k["kind"].is_null());
            let id = word(&dependency["pkg"]);
            if normal && reached.insert(id.clone()) {
                waiting.push(id);
            }
        }
    }
    Ok(reached.iter().filter_map(|id| packages.get(id)).map(|p| component(p, checksums)).collect())
}

fn component(package: &Value, checksums: &BTreeMap<(String, String), String>) -> Value {
    let (name, version) = (word(&package["name"]), word(&package["version"]));
    let purl = format!("pkg:cargo/{name}@{version}");
    let mut component =
        json!({ "type": "library", "bom-ref": purl, "purl": purl, "name": name, "version": version });
    if let Some(license) = package["license"].as_str() {
        component["licenses"] = json!([{ "expression": license.replace('/', " OR ") }]);
    }
    if let Some(sum) = checksums.get(&(name, version)) {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": sum }]);
    }
    component
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Packages of an image's root, from the descriptions that its recipe leaves for scanners.
fn debian(image: &Path) -> Result<Vec<Value>> {
    let folder = image.join("var/lib/dpkg/status.d");
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let text = std::fs::read_to_string(entry?.path())?;
        let field = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name))
                .map(|v| v.trim_start_matches(':').trim().to_owned())
        };
        let (name, version) = (field("Package").context("no name")?, field("Version").context("no version")?);
        let purl = format!("pkg:deb/debian/{name}@{}", version.replace('+', "%2B"));
        let component =
            json!({ "type": "library", "bom-ref": purl, "purl": purl, "name": name, "version": version });
        found.insert(name, component);
    }
    Ok(found.into_values().collect())
}

/// Libraries of CUDA in an image's root, where it has any.
fn wheels(image: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(image.join("usr/share/doc/cuda/wheels.txt")).unwrap_or_default();
    let parse = |line: &str| {
        let (name, rest) = line.split_once("==")?;
        let (version, hash) = rest.split_once(" --hash=sha256:")?;
        let purl = format!("pkg:pypi/{name}@{version}");
        let hashes = json!([{ "alg": "SHA-256", "content": hash }]);
        Some(
            json!({ "type": "library", "bom-ref": purl, "purl": purl, "name": name, "version": version, "hashes": hashes }),
        )
    };
    text.lines().filter_map(parse).collect()
}

/// How many components have which licence, most first.
pub(crate) fn licences(document: &Value) -> Vec<(String, usize)> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for component in document["components"].as_array().into_iter().flatten() {
        let licence = component["licenses"][0]["expression"].as_str().unwrap_or("see the package");
        *counts.entry(licence.to_owned()).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_what_is_linked_and_not_what_only_tests_use() {
        let document = document(None).unwrap();
        let components = document["components"].as_array().unwrap();
        let names: BTreeSet<&str> = components.iter().filter_map(|c| c["name"].as_str()).collect();
        assert!(names.contains("hyper") && names.contains("mirai-engine") && names.contains("rustls"));
        assert!(!names.contains("proptest") && !names.contains("criterion") && !names.contains("xtask"));
        let hyper = components.iter().find(|c| c["name"] == "hyper").unwrap();
        assert_eq!(hyper["hashes"][0]["content"].as_str().unwrap().len(), 64);
        assert_eq!(hyper["licenses"][0]["expression"], "MIT");
        let refs: BTreeSet<&str> = components.iter().filter_map(|c| c["bom-ref"].as_str()).collect();
        assert_eq!(refs.len(), components.len(), "references are unique");
        let licences = licences(&document);
        assert_eq!(licences.iter().map(|(_, n)| n).sum::<usize>(), components.len());
        assert!(licences[0].1 >= licences[1].1);
    }

    #[test]
    fn an_image_adds_its_packages() {
        let root = std::env::temp_dir().join(format!("mirai-sbom-{}", std::process::id()));
        let status = root.join("var/lib/dpkg/status.d");
        let cuda = root.join("usr/share/doc/cuda");
        std::fs::create_dir_all(&status).unwrap();
        std::fs::create_dir_all(&cuda).unwrap();
        std::fs::write(status.join("libc6"), "Package: libc6\nVersion: 2.36-9+deb12u14\n").unwrap();
        std::fs::write(cuda.join("wheels.txt"), "# c\nnvidia-cublas==13.1.0.3 --hash=sha256:ab\n").unwrap();
        let packages = debian(&root).unwrap();
        assert_eq!(packages[0]["purl"], "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14");
        assert_eq!(wheels(&root)[0]["purl"], "pkg:pypi/nvidia-cublas@13.1.0.3");
        assert_eq!(wheels(&root).len(), 1);
        std::fs::remove_dir_all(&root).unwrap();
        assert!(debian(&root).is_err() && wheels(&root).is_empty());
    }
}
