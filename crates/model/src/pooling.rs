//! What a model is loaded for, and what its repository says about pooling.
//!
//! Owns the change from a causal model to an embedder or a reranker, and the files that sentence-transformers writes
//! beside a model (`modules.json` and the pooling module's `config.json`). Computes nothing.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::backend::Pooling;
use crate::config::{Config, MAX_CONFIG_BYTES, parse_object};
use crate::error::{ModelError, Result};
use crate::mmap::FileSource;
use crate::spec::{Head, ModelSpec, PoolHead, PoolOutput};

/// Modules that a list may have; published ones have at most four.
const MAX_MODULES: usize = 16;
/// Lengths that a configuration may list.
const MAX_DIMENSIONS: usize = 256;

/// What a model is loaded for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// What its folder says: embeddings where sentence-transformers' files lie beside a model that can, else what the
    /// architecture is made for.
    #[default]
    Native,
    /// To generate, or what the architecture is made for, whatever lies beside it.
    Plain,
    /// Embeddings: the final norm's rows, without a head.
    Embed(Pooling),
    /// Relevance: the last token's logits of two tokens, in this order.
    Rerank {
        /// Token of irrelevance.
        no: u32,
        /// Token of relevance.
        yes: u32,
    },
}

impl Task {
    /// Gives the model the head that the task needs.
    ///
    /// # Errors
    /// The model cannot do that.
    pub fn apply(self, spec: &mut ModelSpec, published: Option<&PublishedPooling>) -> Result<()> {
        let refuse = |why: String| Err(ModelError::Option { option: "task", why });
        match (self, &spec.head, published) {
            (
                Self::Native,
                Head::Logits { .. } | Head::Pool(PoolHead { output: PoolOutput::Embedding, .. }),
                Some(published),
            ) => Self::Embed(published.pooling).apply(spec, None),
            (Self::Native | Self::Plain, ..) => Ok(()),
            (
                Self::Embed(pooling),
                Head::Logits { .. } | Head::Pool(PoolHead { output: PoolOutput::Embedding, .. }),
                _,
            ) => {
                if pooling == Pooling::First && !spec.is_bidirectional() {
                    let why = "the first token of a causal model has seen nothing of the text".to_owned();
                    return refuse(why);
                }
                spec.head = Head::Pool(PoolHead { pooling, output: PoolOutput::Embedding });
                Ok(())
            }
            (Self::Rerank { no, yes }, Head::Logits { tied, .. }, _) => {
                if no.max(yes) as usize >= spec.vocab {
                    return refuse(format!("tokens {no} and {yes}, expected ids below {}", spec.vocab));
                }
                let output = PoolOutput::Tokens { ids: vec![no, yes], tied: *tied };
                spec.head = Head::Pool(PoolHead { pooling: Pooling::Last, output });
                Ok(())
            }
            (task, head, _) => refuse(format!("{task:?}, but {} ends in {head:?}", spec.architecture)),
        }
    }
}

/// To how many numbers a vector may be cut (Matryoshka representation learning, arXiv 2205.13147).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Matryoshka {
    /// Nobody says that it may.
    #[default]
    Unknown,
    /// Any.
    Any,
    /// These.
    Dimensions(Vec<usize>),
}

/// What a repository says about its embeddings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedPooling {
    /// Which row stands for a text.
    pub pooling: Pooling,
    /// Whether vectors are divided by their length.
    pub normalized: bool,
    /// Lengths that vectors may be cut to: fields `is_matryoshka` and `matryoshka_dimensions` of `config.json`.
    pub matryoshka: Matryoshka,
}

impl PublishedPooling {
    /// Reads `modules.json` of a model's folder, and the configurations that it needs.
    ///
    /// # Errors
    /// A file that cannot be read or is no JSON; modules or a pooling that we do not have.
    pub fn read(files: &BTreeMap<String, FileSource>) -> Result<Option<Self>> {
        let file = "modules.json";
        let Some(modules) = files.get(file) else { return Ok(None) };
        let corrupt = |why: String| ModelError::corrupt(file, "modules", why);
        let bytes = modules.read(file, MAX_CONFIG_BYTES)?;
        let list = match serde_json::from_slice::<Value>(&bytes) {
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
                Some("Pooling") => found = Some(pooling(files, text("path").unwrap_or_default())?),
                Some("Normalize") => normalized = true,
                other => {
                    let other = other.unwrap_or("nothing").escape_default().to_string();
                    return Err(corrupt(format!("module `{other}` is not supported")));
                }
            }
        }
        let Some(pooling) = found else { return Ok(None) };
        Ok(Some(Self { pooling, normalized, matryoshka: matryoshka(files)? }))
    }
}

/// Whether vectors may be cut, as servers' configurations say it.
fn matryoshka(files: &BTreeMap<String, FileSource>) -> Result<Matryoshka> {
    let file = "config.json";
    let Some(source) = files.get(file) else { return Ok(Matryoshka::Unknown) };
    let object = parse_object(file, &source.read(file, MAX_CONFIG_BYTES)?, MAX_CONFIG_BYTES)?;
    let config = Config::new(file, &object);
    Ok(match config.opt_wholes("matryoshka_dimensions", MAX_DIMENSIONS)? {
        Some(list) => Matryoshka::Dimensions(list),
        None if config.flag("is_matryoshka", false)? => Matryoshka::Any,
        None => Matryoshka::Unknown,
    })
}

/// The pooling that a module's configuration names.
fn pooling(files: &BTreeMap<String, FileSource>, path: &str) -> Result<Pooling> {
    let file = format!("{path}/config.json");
    let Some(source) = files.get(&file) else {
        let file = file.escape_default().to_string();
        return Err(ModelError::corrupt(&file, "file", "is missing, but modules.json names it"));
    };
    let bytes = source.read(&file, MAX_CONFIG_BYTES)?;
    let object = parse_object(&file, &bytes, MAX_CONFIG_BYTES)?;
    let config = Config::new(&file, &object);
    // Newer files have one text, older ones a truth value for each.
    if let Some(mode) = config.opt_text("pooling_mode")? {
        return match mode {
            "cls" => Ok(Pooling::First),
            "mean" => Ok(Pooling::Mean),
            "lasttoken" => Ok(Pooling::Last),
            other => {
                let why =
                    format!("`{}` is not supported; supported: cls, mean, lasttoken", other.escape_default());
                Err(config.error("pooling_mode", why))
            }
        };
    }
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
        Task::Native.apply(&mut s, None).unwrap();
        assert_eq!(s, native);
        let last = Head::Pool(PoolHead { pooling: Pooling::Last, output: PoolOutput::Embedding });
        let published =
            PublishedPooling { pooling: Pooling::Last, normalized: true, matryoshka: Matryoshka::Unknown };
        Task::Plain.apply(&mut s, Some(&published)).unwrap();
        assert_eq!(s, native);
        Task::Native.apply(&mut s, Some(&published)).unwrap();
        assert_eq!(s.head, last);
        let mut s = native.clone();
        Task::Embed(Pooling::Last).apply(&mut s, None).unwrap();
        assert_eq!(s.head, last);
        let mut s = native;
        Task::Rerank { no: 9, yes: 7 }.apply(&mut s, None).unwrap();
        let output = PoolOutput::Tokens { ids: vec![9, 7], tied: true };
        assert_eq!(s.head, Head::Pool(PoolHead { pooling: Pooling::Last, output }));
        let mut encoder = spec("XLMRobertaModel");
        Task::Embed(Pooling::Mean).apply(&mut encoder, None).unwrap();
        assert!(matches!(encoder.head, Head::Pool(PoolHead { pooling: Pooling::Mean, .. })));
    }

    #[test]
    fn tasks_that_a_model_cannot_do_are_refused() {
        let table = [
            ("Qwen3ForCausalLM", Task::Embed(Pooling::First), "seen nothing"),
            ("Qwen3ForCausalLM", Task::Rerank { no: 1, yes: 100 }, "below 100"),
            ("XLMRobertaModel", Task::Rerank { no: 1, yes: 2 }, "ends in"),
            ("XLMRobertaForSequenceClassification", Task::Embed(Pooling::First), "Classifier"),
        ];
        for (name, task, words) in table {
            let e = task.apply(&mut spec(name), None).unwrap_err();
            assert!(e.to_string().contains(words) && e.exit_code() == 2, "{name} {task:?}: {e}");
        }
    }

    fn read(modules: &str, pooling: Option<&str>, config: &str) -> Result<Option<PublishedPooling>> {
        let mut files = vec![("modules.json", modules), ("config.json", config)];
        files.extend(pooling.map(|text| ("1_Pooling/config.json", text)));
        let file = |(name, text): (&str, &str)| {
            let bytes: &'static [u8] = Box::leak(text.as_bytes().to_vec().into_boxed_slice());
            (name.to_owned(), FileSource::Static(bytes))
        };
        PublishedPooling::read(&files.into_iter().map(file).collect())
    }

    const MODULES: &str = r#"[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;

    #[test]
    fn published_pooling_is_read() {
        let last = r#"{"pooling_mode_lasttoken": true, "pooling_mode_cls_token": false}"#;
        let unknown = Matryoshka::Unknown;
        let expected = PublishedPooling { pooling: Pooling::Last, normalized: false, matryoshka: unknown };
        assert_eq!(read(MODULES, Some(last), "{}").unwrap(), Some(expected.clone()));
        let any = read(MODULES, Some(last), r#"{"is_matryoshka": true}"#).unwrap();
        assert_eq!(any, Some(PublishedPooling { matryoshka: Matryoshka::Any, ..expected.clone() }));
        let listed = read(MODULES, Some(last), r#"{"matryoshka_dimensions": [64, 128]}"#).unwrap();
        assert_eq!(listed.unwrap().matryoshka, Matryoshka::Dimensions(vec![64, 128]));
        let normed = MODULES.replace("}]", r#"}, {"path": "2_Normalize", "type": "a.Normalize"}]"#);
        let cls = read(&normed, Some(r#"{"pooling_mode_cls_token": true}"#), "{}").unwrap();
        assert_eq!(cls, Some(PublishedPooling { pooling: Pooling::First, normalized: true, ..expected }));
        for (mode, pooling) in
            [("cls", Pooling::First), ("mean", Pooling::Mean), ("lasttoken", Pooling::Last)]
        {
            let text = format!(r#"{{"pooling_mode": "{mode}"}}"#);
            assert_eq!(read(MODULES, Some(&text), "{}").unwrap().unwrap().pooling, pooling);
        }
        assert_eq!(read("[]", None, "{}").unwrap(), None);
        assert_eq!(PublishedPooling::read(&BTreeMap::new()).unwrap(), None);
    }

    #[test]
    fn pooling_that_we_do_not_have_is_refused() {
        let dense = MODULES.replace("}]", r#"}, {"path": "2_Dense", "type": "a.Dense"}]"#);
        let two = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#;
        let table = [
            (MODULES, None, "is missing"),
            (MODULES, Some(r#"{"pooling_mode_max_tokens": true}"#), "not supported"),
            (MODULES, Some(two), "one is supported"),
            (MODULES, Some(r#"{"pooling_mode": "max"}"#), "`max` is not supported"),
            (MODULES, Some("{}"), "no pooling is true"),
            (&dense, Some(r#"{"pooling_mode_cls_token": true}"#), "`Dense`"),
            ("{}", None, "a list"),
            ("[", None, "not valid JSON"),
        ];
        for (modules, pooling, words) in table {
            let e = read(modules, pooling, "{}").unwrap_err();
            assert!(e.to_string().contains(words), "{e}");
        }
    }
}
