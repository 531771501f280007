//! The table of pre-tokenizers that GGUF files name in `tokenizer.ggml.pre`.
//!
//! GGUF stores only a name; the regular expressions are those of the models' own
//! `tokenizer.json` files (and, for `default`, llama.cpp's).

use crate::TokenizerError;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const GPT2_NO_TAIL: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// How a byte-level BPE cuts text before merging.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizer {
    /// Applied one after the other, each to the pieces of the one before.
    pub(super) patterns: &'static [&'static str],
    /// A piece that is itself in the vocabulary is one token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether BOS is added where the file does not say.
    pub(super) add_bos: bool,
    /// The model's own tokenizer composes characters first.
    pub(super) nfc: bool,
}

const PLAIN: PreTokenizer =
    PreTokenizer { patterns: &[GPT2], ignore_merges: false, add_bos: false, nfc: false };

/// All names accepted in `tokenizer.ggml.pre`, one family a line.
const FAMILIES: &[(&[&str], PreTokenizer)] = &[
    (
        &["default"],
        PreTokenizer {
            patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2_NO_TAIL, r"\p{N}+", r"[0-9][0-9][0-9]"],
            ..PLAIN
        },
    ),
    (
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        PLAIN,
    ),
    (
        &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"],
        PreTokenizer { patterns: &[LLAMA3], ignore_merges: true, add_bos: true, ..PLAIN },
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], PreTokenizer { patterns: &[LLAMA3], ..PLAIN }),
    (&["qwen2", "deepseek-r1-qwen"], PreTokenizer { patterns: &[QWEN2], nfc: true, ..PLAIN }),
    (&["stablelm2", "megrez", "hunyuan"], PreTokenizer { patterns: &[QWEN2], ..PLAIN }),
    (&["qwen35"], PreTokenizer { patterns: &[QWEN35], nfc: true, ..PLAIN }),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"],
        PreTokenizer { patterns: &[r"\p{N}", GPT2], ..PLAIN },
    ),
    (&["tekken"], PreTokenizer { patterns: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN }),
    (&["gpt-4o", "llama4", "minimax-m2"], PreTokenizer { patterns: &[O200K], ..PLAIN }),
    (
        &["deepseek-v3", "hunyuan-dense"],
        PreTokenizer { patterns: &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK3], ..PLAIN },
    ),
];

/// Names accepted in `tokenizer.ggml.pre`, one representative a family (aliases are accepted too).
pub const KNOWN_PRE_TOKENIZERS: &[&str] = &[
    "default",
    "gpt-2",
    "llama-bpe",
    "smaug-bpe",
    "qwen2",
    "stablelm2",
    "qwen35",
    "smollm",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
];

/// Looks a name up; a missing name is `default`, as in llama.cpp.
pub(super) fn find(name: Option<&str>) -> Result<PreTokenizer, TokenizerError> {
    let name = name.unwrap_or("default");
    FAMILIES.iter().find(|(names, _)| names.contains(&name)).map(|(_, pre)| *pre).ok_or_else(|| {
        TokenizerError::UnknownPreTokenizer {
            name: name.to_owned(),
            known: FAMILIES
                .iter()
                .flat_map(|(names, _)| names.iter().copied())
                .collect::<Vec<_>>()
                .join(", "),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn published_names_are_found_and_names_are_unique() {
        for name in KNOWN_PRE_TOKENIZERS {
            find(Some(name)).unwrap();
        }
        let mut all: Vec<&str> = FAMILIES.iter().flat_map(|f| f.0.iter().copied()).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = find(Some("klingon")).unwrap_err().to_string();
        assert!(message.contains("klingon") && message.contains("llama-bpe"), "{message}");
    }
}
