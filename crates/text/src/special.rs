//! `tokenizer_config.json` and `chat_template.jinja`: special tokens and which template to use.
//!
//! Owns the reading of these files' many historical shapes; compiles and renders nothing.

use serde_json::Value;

use crate::{TemplateError, TokenizerError};

const FILE: &str = "tokenizer_config.json";
/// The largest published ones (with a list of all added tokens) have about 200 KB.
const MAX_BYTES: usize = 16 << 20;

/// The special tokens that templates and encoders name, as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of a text.
    pub bos: Option<String>,
    /// End of a text or of a turn.
    pub eos: Option<String>,
    /// Unknown character.
    pub unk: Option<String>,
    /// Padding.
    pub pad: Option<String>,
}

/// What the server needs of `tokenizer_config.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Special tokens by role.
    pub special: SpecialTokens,
    /// `add_bos_token`, where the file has it.
    pub add_bos: Option<bool>,
    /// `add_eos_token`, where the file has it.
    pub add_eos: Option<bool>,
    /// Chat templates by name. A single unnamed template has the name `default`.
    pub templates: Vec<(String, String)>,
}

impl TokenizerConfig {
    /// Reads the contents of a `tokenizer_config.json`. Unknown fields are ignored.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`] naming the field.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let invalid = |reason: String| TokenizerError::Invalid { file: FILE, reason };
        if bytes.len() > MAX_BYTES {
            return Err(invalid(format!("{} bytes, the limit is {MAX_BYTES}", bytes.len())));
        }
        let json: Value = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        if !json.is_object() {
            return Err(invalid("not an object".to_owned()));
        }
        let token = |field: &str| match &json[field] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            // An AddedToken, written out.
            Value::Object(object) => match object.get("content") {
                Some(Value::String(text)) => Ok(Some(text.clone())),
                _ => Err(invalid(format!("{field}: object without `content`"))),
            },
            _ => Err(invalid(format!("{field}: neither a string nor an object"))),
        };
        let flag = |field: &str| match &json[field] {
            Value::Null => Ok(None),
            Value::Bool(value) => Ok(Some(*value)),
            _ => Err(invalid(format!("{field}: not a boolean"))),
        };
        Ok(Self {
            special: SpecialTokens {
                bos: token("bos_token")?,
                eos: token("eos_token")?,
                unk: token("unk_token")?,
                pad: token("pad_token")?,
            },
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            templates: templates(&json["chat_template"]).map_err(invalid)?,
        })
    }

    /// Adds the contents of `chat_template.jinja`, which takes precedence over a template in
    /// `tokenizer_config.json`.
    pub fn set_template_file(&mut self, source: String) {
        self.templates.retain(|(name, _)| name != "default");
        self.templates.push(("default".to_owned(), source));
    }

    /// Chooses a template: the one named `name`; else, with tools, `tool_use` where there is one;
    /// else `default`. `Ok(None)` where the model has no template at all.
    ///
    /// # Errors
    /// [`TemplateError::NoSuchTemplate`] for an unknown name, or for a list without a default.
    pub fn template(&self, name: Option<&str>, with_tools: bool) -> Result<Option<&str>, TemplateError> {
        let find = |wanted: &str| {
            let found = self.templates.iter().find(|(name, _)| name == wanted);
            found.map(|(_, source)| source.as_str())
        };
        let (wanted, found) = match name {
            Some(name) => (name, find(name)),
            None if self.templates.is_empty() => return Ok(None),
            None => {
                let tool_use = if with_tools { find("tool_use") } else { None };
                ("default", tool_use.or_else(|| find("default")))
            }
        };
        match found {
            Some(source) => Ok(Some(source)),
            None => Err(TemplateError::NoSuchTemplate {
                name: wanted.to_owned(),
                available: self
                    .templates
                    .iter()
                    .map(|(name, _)| name.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        }
    }
}

fn templates(value: &Value) -> Result<Vec<(String, String)>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(vec![("default".to_owned(), source.clone())]),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .map(|(index, entry)| match (entry["name"].as_str(), entry["template"].as_str()) {
                (Some(name), Some(source)) => Ok((name.to_owned(), source.to_owned())),
                _ => Err(format!("chat_template[{index}]: needs `name` and `template`")),
            })
            .collect(),
        _ => Err("chat_template: neither a string nor a list".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<TokenizerConfig, TokenizerError> {
        TokenizerConfig::from_json_bytes(json.as_bytes())
    }

    #[test]
    fn tokens_as_strings_and_as_objects() {
        let config = read(
            r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>",
                "unk_token": null, "add_bos_token": true, "chat_template": "x"}"#,
        )
        .unwrap();
        assert_eq!(config.special.bos.as_deref(), Some("<s>"));
        assert_eq!(config.special.eos.as_deref(), Some("</s>"));
        assert_eq!(config.special.unk, None);
        assert_eq!((config.add_bos, config.add_eos), (Some(true), None));
        assert_eq!(config.template(None, true).unwrap(), Some("x"));
    }

    #[test]
    fn named_templates_and_the_separate_file() {
        let mut config = read(
            r#"{"chat_template": [{"name": "default", "template": "d"},
                {"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}]}"#,
        )
        .unwrap();
        assert_eq!(config.template(None, false).unwrap(), Some("d"));
        assert_eq!(config.template(None, true).unwrap(), Some("t"));
        assert_eq!(config.template(Some("rag"), true).unwrap(), Some("r"));
        let message = config.template(Some("no"), false).unwrap_err().to_string();
        assert!(message.contains("default, tool_use, rag"), "{message}");
        config.set_template_file("f".to_owned());
        assert_eq!(config.template(None, false).unwrap(), Some("f"));
    }

    #[test]
    fn no_template_is_not_an_error_but_a_list_without_default_is() {
        assert_eq!(read("{}").unwrap().template(None, false).unwrap(), None);
        let only_rag = read(r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#).unwrap();
        assert!(only_rag.template(None, false).is_err());
    }

    #[test]
    fn wrong_shapes_name_their_field() {
        for (json, field) in [
            (r#"{"bos_token": 1}"#, "bos_token"),
            (r#"{"eos_token": {}}"#, "eos_token"),
            (r#"{"add_bos_token": "yes"}"#, "add_bos_token"),
            (r#"{"chat_template": 3}"#, "chat_template"),
            (r#"{"chat_template": [{"name": "a"}]}"#, "chat_template[0]"),
            ("[]", "not an object"),
            ("{", "EOF"),
        ] {
            let message = read(json).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }
}
