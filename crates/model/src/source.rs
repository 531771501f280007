//! Where a model's files are.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{ModelError, Result};
use crate::mmap::FileSource;

/// Most entries of a model's directory.
const MAX_ENTRIES: usize = 10_000;

/// Where a model is.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A directory's files by name (or files compiled into the program).
    Files {
        /// For messages.
        place: String,
        /// The listing.
        files: BTreeMap<String, FileSource>,
    },
    /// One GGUF file.
    Gguf {
        /// For messages.
        name: String,
        /// The file.
        file: FileSource,
    },
}

impl ModelSource {
    /// The regular files directly in a directory, and the `config.json` of each directory in it.
    ///
    /// # Errors
    /// It cannot be listed, or has too many entries.
    pub fn directory(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let io = |source| ModelError::Io { file: place.clone(), source };
        let mut files = BTreeMap::new();
        for (count, entry) in std::fs::read_dir(path).map_err(io)?.enumerate() {
            if count == MAX_ENTRIES {
                return Err(ModelError::corrupt(&place, "directory", format!("more than {count} entries")));
            }
            let path = entry.map_err(io)?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let inner = path.join("config.json");
            if path.is_file() {
                files.insert(name.to_owned(), FileSource::Path(path.clone()));
            } else if inner.is_file() {
                files.insert(format!("{name}/config.json"), FileSource::Path(inner));
            }
        }
        Ok(Self::Files { place, files })
    }

    /// A GGUF file.
    #[must_use]
    pub fn gguf(path: &Path) -> Self {
        Self::Gguf { name: path.display().to_string(), file: FileSource::Path(path.to_owned()) }
    }

    /// Files compiled into the program.
    #[must_use]
    pub fn memory(place: &str, files: &[(&str, &'static [u8])]) -> Self {
        let files = files.iter().map(|(n, b)| ((*n).to_owned(), FileSource::Static(b))).collect();
        Self::Files { place: place.to_owned(), files }
    }
}
