//! What of a repository is downloaded, and how far that is. Opens no file and no socket.

use crate::HubError;
use crate::local::has_extension;

/// How far a download is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullProgress {
    /// The file, where the report is about one.
    pub file: Option<String>,
    /// Bytes of that file, or of all files, that are here.
    pub bytes_done: u64,
    /// Bytes of that file, or of all files; 0 where unknown.
    pub bytes_total: u64,
}

/// Whether a file of a repository is downloaded: safetensors, GGUF, JSON, Jinja, text, and the vocabularies
/// `tokenizer.model` and `tekken.json`, all at the top of the repository; and the `config.json` of
/// sentence-transformers' pooling module, without which an embedder does not know its vectors. Pickled weights
/// never are.
pub fn is_wanted_file(path: &str) -> bool {
    if let Some((folder, "config.json")) = path.split_once('/') {
        return is_pooling_folder(folder);
    }
    if path.contains(['/', '\\']) || path.starts_with('.') {
        return false;
    }
    path == "tokenizer.model"
        || ["safetensors", "gguf", "json", "jinja", "txt"].iter().any(|ext| has_extension(path, ext))
}

/// The name that sentence-transformers gives a pooling module's folder: `1_Pooling`, by its place in
/// `modules.json`.
pub(crate) fn is_pooling_folder(name: &str) -> bool {
    let place = name.strip_suffix("_Pooling").unwrap_or_default();
    (1..=2).contains(&place.len()) && place.bytes().all(|byte| byte.is_ascii_digit())
}

/// The files to download out of a repository's listing, sorted.
///
/// GGUF files only where there are no safetensors, and Mistral's `consolidated` duplicate only where it is
/// the only weights: the same model is not downloaded twice.
#[cfg_attr(not(feature = "download"), allow(dead_code))]
pub(crate) fn select_files(repo: &str, listing: Vec<String>) -> Result<Vec<String>, HubError> {
    let mut files: Vec<String> = listing.into_iter().filter(|file| is_wanted_file(file)).collect();
    files.sort_unstable();
    let is_plain = |file: &String| has_extension(file, "safetensors") && !file.starts_with("consolidated");
    if files.iter().any(is_plain) {
        files.retain(|file| !file.starts_with("consolidated"));
    }
    if files.iter().any(|file| has_extension(file, "safetensors")) {
        files.retain(|file| !has_extension(file, "gguf"));
        return Ok(files);
    }
    let gguf: Vec<&str> =
        files.iter().map(String::as_str).filter(|file| has_extension(file, "gguf")).collect();
    match gguf.as_slice() {
        [] => Err(HubError::NoWeights { dir: repo.into() }),
        [_] => Ok(files),
        several => Err(HubError::Ambiguous {
            dir: repo.into(),
            count: several.len(),
            examples: several.iter().take(4).copied().collect::<Vec<_>>().join(", "),
            hint: "download the one wanted by hand and give its path",
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn select(files: &[&str]) -> Result<Vec<String>, HubError> {
        select_files("a/b", files.iter().map(|file| (*file).to_owned()).collect())
    }

    #[test]
    fn wanted() {
        for file in
            ["model.safetensors", "x.gguf", "config.json", "chat_template.jinja", "merges.txt", "tekken.json"]
        {
            assert!(is_wanted_file(file), "{file}");
        }
        assert!(is_wanted_file("tokenizer.model"));
        for file in [
            "pytorch_model.bin",
            "x.pt",
            "x.pkl",
            "README.md",
            "onnx/model.safetensors",
            ".x.json",
            "a.py",
            "..\\x.json",
        ] {
            assert!(!is_wanted_file(file), "{file}");
        }
    }

    #[test]
    fn the_pooling_modules_configuration_is_pulled_and_nothing_else_of_a_folder() {
        let files = select(&[
            "1_Pooling/config.json",
            "1_Pooling/model.safetensors",
            "2_Dense/config.json",
            "model.safetensors",
            "modules.json",
            "onnx/config.json",
        ]);
        assert_eq!(files.unwrap(), ["1_Pooling/config.json", "model.safetensors", "modules.json"]);
        assert!(is_wanted_file("12_Pooling/config.json"));
        for path in [
            "_Pooling/config.json",
            "x_Pooling/config.json",
            "../config.json",
            "1_Pooling/../config.json",
            "1_Pooling/1_Pooling/config.json",
            "/1_Pooling/config.json",
            "1_Pooling\\config.json",
            "1_Pooling/tokenizer.json",
            "123_Pooling/config.json",
            "1_pooling/config.json",
        ] {
            assert!(!is_wanted_file(path), "{path}");
        }
    }

    #[test]
    fn selection_downloads_a_model_once() {
        let files =
            select(&["model.safetensors", "config.json", "x.gguf", "y.gguf", "consolidated.safetensors"]);
        assert_eq!(files.unwrap(), ["config.json", "model.safetensors"]);
        assert_eq!(select(&["consolidated.safetensors"]).unwrap(), ["consolidated.safetensors"]);
        assert_eq!(select(&["x.gguf", "a.bin"]).unwrap(), ["x.gguf"]);
        let error = select(&["x.gguf", "y.gguf"]).unwrap_err().to_string();
        assert!(error.contains("x.gguf, y.gguf"), "{error}");
        assert!(matches!(select(&["pytorch_model.bin", "config.json"]), Err(HubError::NoWeights { .. })));
    }
}
