//! What a model is loaded for, and what its repository says about pooling.
//!
//! Owns the change from a causal model to an embedder or a reranker, and the files that sentence-transformers writes
//! beside a model (`modules.json` and the pooling module's `config.json`). Computes nothing.

use std::path::Path;

use serde_json::Value;

use crate::backend::Pooling;
use crate::config::{Config, MAX_CONFIG_BYTES, parse_object};
use crate::error::{ModelError, Result};
use crate::spec::{Head, ModelSpec, PoolHead, PoolOutput};

/// Modules that a list may have; published ones have at most four.
const MAX_MODULES: usize = 16;

/// What a model is loaded for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// What its architecture is made for.
    #[default]
    Native,
    /// Embeddings: the final norm's rows, without a head.
    Embed(Pooling),
    /// Relevance: the last token's logits of these tokens ("no" and "yes", say), in this order.
    Rerank {
        /// Token ids.
        tokens: Vec<u32>,
    },
}

impl Task {
    /// Gives the model the head that the task needs.
    ///
    /// # Errors
    /// The model cannot do that.
    pub fn apply(&self, spec: &mut ModelSpec) -> Result<()> {
        let refuse = |why: String| Err(ModelError::Option { option: "task", why });
        match (self, &spec.head) {
            (Self::Native, _) => Ok(()),
            (
                Self::Embed(pooling),
                Head::Logits { .. } | Head::Pool(PoolHead { output: PoolOutput::Embedding, .. }),
            ) => {
                if *pooling == Pooling::First && !spec.is_bidirectional() {
                    let why = "the first token of a causal model has seen nothing of the text".to_owned();
                    return refuse(why);
                }
                spec.head = Head::Pool(PoolHead { pooling: *pooling, output: PoolOutput::Embedding });
                Ok(())
            }
            (Self::Rerank { tokens }, Head::Logits { tied, .. }) => {
                if tokens.is_empty() || tokens.iter().any(|&id| id as usize >= spec.vocab) {
                    return refuse(format!("tokens {tokens:?}, expected at least one, below {}", spec.vocab));
                }
                let output = PoolOutput::Tokens { ids: tokens.clone(), tied: *tied };
                spec.head = Head::Pool(PoolHead { pooling: Pooling::Last, output });
                Ok(())
            }
            (task, head) => refuse(format!("{task:?}, but {} ends in {head:?}", spec.architecture)),
        }
    }
}

/// What a repository says about its embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedPooling {
    /// Which row stands for a text.
    pub pooling: Pooling,
    /// Whether vectors are divided by their length.
    pub normalized: bool,
}

impl PublishedPooling {
    /// Reads `modules.json` of a model's folder, and the pooling module's configuration.
    ///
    /// # Errors
    /// A file that cannot be read or is no JSON; modules or a pooling that we do not have.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let Some(modules) = read(&folder.join("modules.json"))? else { return Ok(None) };
        let file = "modules.json";
        let corrupt = |why: String| ModelError::corrupt(file, "modules", why);
        let list = match serde_json::from_slice::<Value>(&modules) {
            Ok(Value::Array(list)) if list.len() <= MAX_MODULES => list,
            Ok(_) => return Err(corrupt(format!("expected a list of at most {MAX_MODULES} modules"))),
            Err(e) => return Err(corrupt(format!("not valid JSON: {e}"))),
        };
        let (mut found, mut normalized) = (None, false);
        for module in &list {
            let text = |field: &str| module.get(field).and_then(Value::as_str);
            let kind = text("type").and_then(|kind| kind.rsplit('.').next());
            match kind {
                Some("Transformer") => {}
                Some("Pooling") => found = Some(pooling(folder, text("path").unwrap_or_default())?),
                Some("Normalize") => normalized = true,
                other => {
                    let other = other.unwrap_or("nothing").escape_default().to_string();
                    return Err(corrupt(format!("module `{other}` is not supported")));
                }
            }
        }
        Ok(found.map(|pooling| Self { pooling, normalized }))
    }
}

/// The pooling that a module's configuration names.
fn pooling(folder: &Path, path: &str) -> Result<Pooling> {
    let inside =
        !path.is_empty() && path.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if !inside {
        let why = format!("path `{}` is no plain name", path.escape_default());
        return Err(ModelError::corrupt("modules.json", "path", why));
    }
    let file = format!("{path}/config.json");
    let Some(bytes) = read(&folder.join(path).join("config.json"))? else {
        return Err(ModelError::corrupt(&file, "file", "is missing, but modules.json names it"));
    };
    let object = parse_object(&file, &bytes, MAX_CONFIG_BYTES)?;
    let config = Config::new(&file, &object);
    let modes = [
        ("pooling_mode_cls_token", Some(Pooling::First)),
        ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("pooling_mode_lasttoken", Some(Pooling::Last)),
        ("pooling_mode_max_tokens", None),
        ("pooling_mode_mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", None),
    ];
    let mut chosen = None;
    for (field, mode) in modes {
        if !config.flag(field, false)? {
            continue;
        }
        match (chosen, mode) {
            (None, Some(mode)) => chosen = Some(mode),
            (_, None) => return Err(config.error(field, "is true, which is not supported")),
            (Some(_), _) => return Err(config.error(field, "is true beside another one; one is supported")),
        }
    }
    chosen.ok_or_else(|| config.error("pooling_mode_cls_token", "no pooling is true"))
}

/// A small file, if there is one.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let name = || path.display().to_string();
    let io = |source| ModelError::Io { file: name(), source };
    let length = match std::fs::metadata(path) {
        Ok(data) => data.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    if length > MAX_CONFIG_BYTES as u64 {
        let why = format!("{length} bytes, at most {MAX_CONFIG_BYTES} are read");
        return Err(ModelError::corrupt(&name(), "file", why));
    }
    std::fs::read(path).map(Some).map_err(io)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::arch::spec_from_config;

    fn spec(name: &str) -> ModelSpec {
        let config = json!({"architectures": [name], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 514,
            "tie_word_embeddings": true, "num_key_value_heads": 2});
        spec_from_config("config.json", config.as_object().unwrap()).unwrap()
    }

    #[test]
    fn causal_models_become_embedders_and_rerankers() {
        let mut s = spec("Qwen3ForCausalLM");
        let native = s.clone();
        Task::Native.apply(&mut s).unwrap();
        assert_eq!(s, native);
        Task::Embed(Pooling::Last).apply(&mut s).unwrap();
        assert_eq!(s.head, Head::Pool(PoolHead { pooling: Pooling::Last, output: PoolOutput::Embedding }));
        let mut s = native;
        Task::Rerank { tokens: vec![9, 7] }.apply(&mut s).unwrap();
        let output = PoolOutput::Tokens { ids: vec![9, 7], tied: true };
        assert_eq!(s.head, Head::Pool(PoolHead { pooling: Pooling::Last, output }));
        let mut encoder = spec("XLMRobertaModel");
        Task::Embed(Pooling::Mean).apply(&mut encoder).unwrap();
        assert!(matches!(encoder.head, Head::Pool(PoolHead { pooling: Pooling::Mean, .. })));
    }

    #[test]
    fn tasks_that_a_model_cannot_do_are_refused() {
        let table = [
            ("Qwen3ForCausalLM", Task::Embed(Pooling::First), "seen nothing"),
            ("Qwen3ForCausalLM", Task::Rerank { tokens: vec![] }, "at least one"),
            ("Qwen3ForCausalLM", Task::Rerank { tokens: vec![100] }, "below 100"),
            ("XLMRobertaModel", Task::Rerank { tokens: vec![1] }, "ends in"),
            ("XLMRobertaForSequenceClassification", Task::Embed(Pooling::First), "Classifier"),
        ];
        for (name, task, words) in table {
            let e = task.apply(&mut spec(name)).unwrap_err();
            assert!(e.to_string().contains(words) && e.exit_code() == 2, "{name} {task:?}: {e}");
        }
    }

    fn folder(modules: &str, pooling: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("modules.json"), modules).unwrap();
        if let Some(pooling) = pooling {
            std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
            std::fs::write(folder.path().join("1_Pooling/config.json"), pooling).unwrap();
        }
        folder
    }

    const MODULES: &str = r#"[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;

    #[test]
    fn published_pooling_is_read() {
        let read = |f: &tempfile::TempDir| PublishedPooling::read(f.path());
        let last =
            folder(MODULES, Some(r#"{"pooling_mode_lasttoken": true, "pooling_mode_cls_token": false}"#));
        let expected = PublishedPooling { pooling: Pooling::Last, normalized: false };
        assert_eq!(read(&last).unwrap(), Some(expected));
        let normed = MODULES.replace("}]", r#"}, {"path": "2_Normalize", "type": "a.Normalize"}]"#);
        let cls = folder(&normed, Some(r#"{"pooling_mode_cls_token": true}"#));
        assert_eq!(read(&cls).unwrap(), Some(PublishedPooling { pooling: Pooling::First, normalized: true }));
        let none = folder("[]", None);
        assert_eq!(read(&none).unwrap(), None);
        assert_eq!(PublishedPooling::read(&none.path().join("nowhere")).unwrap(), None);
    }

    #[test]
    fn pooling_that_we_do_not_have_is_refused() {
        let dense = MODULES.replace("}]", r#"}, {"path": "2_Dense", "type": "a.Dense"}]"#);
        let escape = MODULES.replace("1_Pooling", "../x");
        let table = [
            (MODULES, None, "is missing"),
            (MODULES, Some(r#"{"pooling_mode_max_tokens": true}"#), "not supported"),
            (
                MODULES,
                Some(r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#),
                "one is supported",
            ),
            (MODULES, Some("{}"), "no pooling is true"),
            (&dense, Some(r#"{"pooling_mode_cls_token": true}"#), "`Dense`"),
            (&escape, None, "no plain name"),
            ("{}", None, "a list"),
            ("[", None, "not valid JSON"),
        ];
        for (modules, pooling, words) in table {
            let e = PublishedPooling::read(folder(modules, pooling).path()).unwrap_err();
            assert!(e.to_string().contains(words), "{e}");
        }
    }
}
