//! The file in which plans are kept, so that a restart computes the same bits.
//!
//! Owns its form and the judgement whether it fits: the same device, driver, library, shapes and limits. An algorithm
//! is opaque and means nothing to another version of the library.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::lt_product::{Algorithm, Library};
use super::lt_shape::{LtOptions, LtShape};

/// Of the file's form.
const VERSION: u32 = 1;
/// Most bytes that are read of a file: some hundred bytes a shape, thousands of shapes.
const MAX_BYTES: u64 = 16 << 20;

/// What plans depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PlanKey {
    version: u32,
    device: String,
    driver: u32,
    library: u64,
    /// SHA-256 of the shapes and of the limits under which their plans were chosen.
    digest: String,
}

impl PlanKey {
    pub(super) fn new(library: &Library, options: &LtOptions, shapes: &[LtShape]) -> Self {
        let facts = library.gpu().facts();
        Self {
            version: VERSION,
            device: facts.name.clone(),
            driver: facts.driver,
            library: library.version(),
            digest: digest(options, shapes),
        }
    }

    /// By the shapes alone: what else does not fit is remade in place.
    pub(super) fn file_name(&self) -> String {
        format!("matmul-{}.json", &self.digest[..16])
    }

    /// What differs, in words.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        if self.version != other.version {
            return Some("another form");
        }
        if self.device != other.device {
            return Some("another device");
        }
        if self.driver != other.driver {
            return Some("another driver");
        }
        if self.library != other.library {
            return Some("another version of cublasLt");
        }
        (self.digest != other.digest).then_some("other shapes")
    }
}

fn digest(options: &LtOptions, shapes: &[LtShape]) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{} bytes, {} candidates", options.workspace_bytes, options.candidates));
    for shape in shapes {
        hash.update(format!("\n{shape}"));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A plan as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct KeptPlan {
    #[serde(flatten)]
    pub(super) shape: LtShape,
    pub(super) algorithm: Algorithm,
    /// Bytes.
    pub(super) workspace: usize,
    /// As it was timed, for people; 0 if there was no choice.
    pub(super) microseconds: f64,
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct PlanFile {
    key: PlanKey,
    pub(super) plans: Vec<KeptPlan>,
}

impl PlanFile {
    pub(super) const fn new(key: PlanKey) -> Self {
        Self { key, plans: Vec::new() }
    }

    /// Reads a file. None, and a line in the log, if there is one that does not fit.
    pub(super) fn read(path: &Path, key: &PlanKey, shapes: &[LtShape]) -> Option<Self> {
        let text = match std::fs::metadata(path).map(|m| m.len()) {
            Ok(bytes) if bytes <= MAX_BYTES => std::fs::read_to_string(path).map_err(|e| e.to_string()),
            Ok(bytes) => Err(format!("{bytes} bytes")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => Err(error.to_string()),
        };
        let file = text.and_then(|text| serde_json::from_str::<Self>(&text).map_err(|e| e.to_string()));
        let why = match file {
            Ok(file) => {
                let same = file.plans.iter().map(|p| &p.shape).eq(shapes);
                match file.key.difference(key) {
                    None if same => return Some(file),
                    None => "other shapes".to_owned(),
                    Some(difference) => difference.to_owned(),
                }
            }
            Err(error) => error,
        };
        let file = path.display();
        tracing::info!(%file, why, "matmul plans are made anew: those that were kept do not fit");
        None
    }

    /// Writes the file in one piece: another process sees the old one or the new one.
    pub(super) fn write(&self, path: &Path) -> std::io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let mut file = std::fs::File::create(&temporary)?;
        let written = serde_json::to_writer_pretty(&file, self)
            .map_err(std::io::Error::from)
            .and_then(|()| file.write_all(b"\n"))
            .and_then(|()| std::fs::rename(&temporary, path));
        if written.is_err() {
            // The error above is the one to report.
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::lt_shape::{LtOutput, LtStorage};
    use super::super::memory::DevicePtr;
    use super::*;

    fn options() -> LtOptions {
        LtOptions { workspace: DevicePtr::NULL, workspace_bytes: 1 << 20, candidates: 8, plan_folder: None }
    }

    fn shapes() -> Vec<LtShape> {
        let (storage, output) = (LtStorage::Bf16, LtOutput::Bf16);
        [64, 80].map(|rows| LtShape { rows, outputs: 8, inner: 16, storage, output, bias: false }).to_vec()
    }

    fn file() -> PlanFile {
        let key = PlanKey {
            version: VERSION,
            device: "a device".to_owned(),
            driver: 13_000,
            library: 130_001,
            digest: digest(&options(), &shapes()),
        };
        let plan = |shape| KeptPlan { shape, algorithm: [u64::MAX; 8], workspace: 512, microseconds: 1.5 };
        PlanFile { key, plans: shapes().into_iter().map(plan).collect() }
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = file();
        let path = folder.path().join("plans").join(file.key.file_name());
        assert_eq!(PlanFile::read(&path, &file.key, &shapes()), None, "not there yet");
        file.write(&path).unwrap();
        assert_eq!(PlanFile::read(&path, &file.key, &shapes()), Some(file.clone()));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing left beside it");
    }

    #[test]
    fn what_does_not_fit_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plans.json");
        let file = file();
        file.write(&path).unwrap();
        let key = &file.key;
        let others = [
            ("another device", PlanKey { device: "another".to_owned(), ..key.clone() }),
            ("another driver", PlanKey { driver: key.driver + 10, ..key.clone() }),
            ("another version of cublasLt", PlanKey { library: key.library + 1, ..key.clone() }),
            ("another form", PlanKey { version: key.version + 1, ..key.clone() }),
        ];
        for (difference, key) in others {
            assert_eq!(PlanFile::read(&path, &key, &shapes()), None, "{difference}");
            assert_eq!(file.key.difference(&key), Some(difference));
        }
        assert_eq!(PlanFile::read(&path, &file.key, &shapes()[1..]), None, "fewer shapes");
        std::fs::write(&path, "{\"key\":").unwrap();
        assert_eq!(PlanFile::read(&path, &file.key, &shapes()), None, "cut off");
    }

    #[test]
    fn the_digest_tells_shapes_and_limits_apart() {
        let base = digest(&options(), &shapes());
        assert_eq!(base.len(), 64);
        assert_eq!(base, digest(&options(), &shapes()));
        assert_ne!(base, digest(&options(), &shapes()[1..]));
        assert_ne!(base, digest(&LtOptions { candidates: 9, ..options() }, &shapes()));
        let mut other = shapes();
        other[0].storage = LtStorage::E4m3Row;
        assert_ne!(base, digest(&options(), &other));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let blocked = folder.path().join("file");
        std::fs::write(&blocked, "").unwrap();
        assert!(file().write(&blocked.join("plans.json")).is_err());
    }
}
