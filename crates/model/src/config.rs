//! Reading `config.json`: typed access whose errors name the file and the field.
//!
//! Owns JSON and the spelling of values; never decides what a field means for a model.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::backend::{Activation, Storage};
use crate::error::{ModelError, Result};

/// Largest configuration that is read. Published ones have at most some tens of kilobytes.
pub const MAX_CONFIG_BYTES: usize = 4 << 20;

/// An object of the configuration, with the path that leads to it.
pub struct Config<'a> {
    file: &'a str,
    prefix: String,
    object: &'a Map<String, Value>,
    /// Fields that were asked for: the others mean nothing to us, and are listed.
    asked: RefCell<BTreeSet<String>>,
}

/// Parses a file into an object.
///
/// # Errors
/// More than `limit` bytes, not JSON (`NaN` is not), or not an object.
pub fn parse_object(file: &str, bytes: &[u8], limit: usize) -> Result<Map<String, Value>> {
    if bytes.len() > limit {
        let why = format!("{} bytes, at most {limit} are read", bytes.len());
        return Err(ModelError::corrupt(file, "file", why));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ModelError::corrupt(file, "file", "not a JSON object")),
        Err(e) => Err(ModelError::corrupt(file, "file", format!("not valid JSON: {e}"))),
    }
}

impl<'a> Config<'a> {
    /// The outermost object.
    #[must_use]
    pub fn new(file: &'a str, object: &'a Map<String, Value>) -> Self {
        Self { file, prefix: String::new(), object, asked: RefCell::default() }
    }

    /// An object inside of another, at this path.
    #[must_use]
    pub fn nested(file: &'a str, path: &str, object: &'a Map<String, Value>) -> Self {
        Self { file, prefix: format!("{path}."), object, asked: RefCell::default() }
    }

    /// The file, for errors.
    #[must_use]
    pub const fn file(&self) -> &'a str {
        self.file
    }

    /// Whether somebody asked for the field.
    #[must_use]
    pub fn was_asked(&self, field: &str) -> bool {
        self.asked.borrow().contains(field)
    }

    /// Fields that nobody asked for.
    #[must_use]
    pub fn unasked(&self) -> Vec<String> {
        let asked = self.asked.borrow();
        self.object.keys().filter(|k| !asked.contains(*k)).cloned().collect()
    }

    /// An error about a field of this object.
    #[must_use]
    pub fn error(&self, field: &str, why: impl Into<String>) -> ModelError {
        ModelError::field(self.file, format!("{}{field}", self.prefix), why)
    }

    /// A field's value; `null` is the same as absent.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(field.to_owned());
        self.object.get(field).filter(|v| !v.is_null())
    }

    /// Whether the field is written at all, be it as `null`.
    #[must_use]
    pub fn has(&self, field: &str) -> bool {
        self.object.contains_key(field)
    }

    /// A field that holds an object, if there is one.
    #[must_use]
    pub fn nested_field(&self) -> Option<&'a str> {
        self.object.iter().find(|(_, v)| v.is_object()).map(|(k, _)| k.as_str())
    }

    /// Names of its fields.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// The required field.
    ///
    /// # Errors
    /// It is absent.
    pub fn require(&self, field: &str) -> Result<&'a Value> {
        self.get(field).ok_or_else(|| self.error(field, "is missing"))
    }

    /// A nested object.
    ///
    /// # Errors
    /// The field is something else.
    pub fn object(&self, field: &str) -> Result<Option<Config<'a>>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Config {
                file: self.file,
                prefix: format!("{}{field}.", self.prefix),
                object,
                asked: RefCell::default(),
            })),
            Some(v) => Err(self.error(field, format!("expected an object, got {}", kind(v)))),
        }
    }

    /// A whole number, 0 included.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_whole(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let n = value.as_u64().and_then(|n| usize::try_from(n).ok());
        n.map(Some).ok_or_else(|| self.error(field, format!("expected a whole number, got {}", show(value))))
    }

    /// A whole number in `1..=max`, or none.
    ///
    /// # Errors
    /// Another type, or out of bounds.
    pub fn opt_count(&self, field: &str, max: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let n = value
            .as_u64()
            .ok_or_else(|| self.error(field, format!("expected a whole number, got {}", show(value))))?;
        if n == 0 || n > max {
            return Err(self.error(field, format!("is {n}, expected 1 to {max}")));
        }
        usize::try_from(n).map(Some).map_err(|_| self.error(field, format!("{n} is too large")))
    }

    /// A whole number in `1..=max`.
    ///
    /// # Errors
    /// Absent, another type, or out of bounds.
    pub fn count(&self, field: &str, max: u64) -> Result<usize> {
        self.opt_count(field, max)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// A whole number in `1..=max`, or what transformers takes where the field is absent.
    ///
    /// # Errors
    /// As [`Config::opt_count`].
    pub fn count_or(&self, field: &str, max: u64, default: usize) -> Result<usize> {
        Ok(self.opt_count(field, max)?.unwrap_or(default))
    }

    /// A list of whole numbers, of any length up to `most`.
    ///
    /// # Errors
    /// Another type, in the list or of it, or a longer list.
    pub fn opt_wholes(&self, field: &str, most: usize) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let wrong = || {
            let got = show(value);
            self.error(field, format!("expected a list of at most {most} whole numbers, got {got}"))
        };
        let list = value.as_array().filter(|l| l.len() <= most).ok_or_else(wrong)?;
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(wrong);
        list.iter().map(whole).collect::<Result<_>>().map(Some)
    }

    /// A list of exactly `len` finite numbers above zero.
    ///
    /// # Errors
    /// Absent, another type, another length, or a number that is not above zero.
    pub fn positives(&self, field: &str, len: usize) -> Result<Vec<f64>> {
        let value = self.require(field)?;
        let wrong = || {
            let got = show(value);
            self.error(field, format!("expected a list of {len} numbers above 0, got {got}"))
        };
        let list = value.as_array().filter(|l| l.len() == len).ok_or_else(wrong)?;
        let number = |v: &Value| v.as_f64().filter(|n| *n > 0.0 && n.is_finite()).ok_or_else(wrong);
        list.iter().map(number).collect()
    }

    /// A finite number.
    ///
    /// # Errors
    /// Another type, or beyond the range of f32.
    pub fn opt_number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let n = value
            .as_f64()
            .ok_or_else(|| self.error(field, format!("expected a number, got {}", show(value))))?;
        if !(n as f32).is_finite() {
            return Err(self.error(field, format!("{n} is not a finite number")));
        }
        Ok(Some(n))
    }

    /// A finite number above zero, or none.
    ///
    /// # Errors
    /// As [`Config::opt_number`], or not above zero.
    pub fn opt_positive(&self, field: &str) -> Result<Option<f64>> {
        match self.opt_number(field)? {
            Some(n) if n <= 0.0 => Err(self.error(field, format!("is {n}, expected more than 0"))),
            n => Ok(n),
        }
    }

    /// A finite number above zero, or what transformers takes where the field is absent.
    ///
    /// # Errors
    /// As [`Config::opt_positive`].
    pub fn positive_or(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.opt_positive(field)?.unwrap_or(default))
    }

    /// A finite number above zero.
    ///
    /// # Errors
    /// As [`Config::opt_positive`], or absent.
    pub fn positive(&self, field: &str) -> Result<f64> {
        self.opt_positive(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// A truth value, or the default.
    ///
    /// # Errors
    /// Another type.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(v) => Err(self.error(field, format!("expected true or false, got {}", show(v)))),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// Another type.
    pub fn opt_text(&self, field: &str) -> Result<Option<&'a str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => Err(self.error(field, format!("expected a text, got {}", show(v)))),
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// Another type, in the list or of it.
    pub fn opt_texts(&self, field: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let wrong = || self.error(field, format!("expected a list of texts, got {}", show(value)));
        let list = value.as_array().ok_or_else(wrong)?;
        list.iter().map(|v| v.as_str().ok_or_else(wrong)).collect::<Result<_>>().map(Some)
    }

    /// One of two spellings of the same field.
    ///
    /// # Errors
    /// Both are there and differ.
    pub fn either(&self, new: &'static str, old: &'static str) -> Result<Option<(&'static str, &'a Value)>> {
        match (self.get(new), self.get(old)) {
            (Some(a), Some(b)) if a != b => {
                Err(self.error(new, format!("is {}, but `{old}` is {}", show(a), show(b))))
            }
            (Some(a), _) => Ok(Some((new, a))),
            (None, Some(b)) => Ok(Some((old, b))),
            (None, None) => Ok(None),
        }
    }

    /// Token ids: one number, or a list, each below `vocab`.
    ///
    /// # Errors
    /// Another type, or an id beyond the vocabulary.
    pub fn token_ids(&self, field: &str, vocab: usize) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = |v: &Value| {
            let id = v.as_u64().filter(|&id| id < vocab as u64);
            id.map(|id| id as u32).ok_or_else(|| {
                self.error(field, format!("expected token ids below {vocab}, got {}", show(value)))
            })
        };
        match value {
            Value::Array(list) => list.iter().map(one).collect(),
            v => Ok(vec![one(v)?]),
        }
    }

    /// Declared type of the weights.
    ///
    /// # Errors
    /// `dtype` and `torch_dtype` differ, or neither is a type that we know.
    pub fn dtype(&self) -> Result<Option<Storage>> {
        let Some((field, value)) = self.either("dtype", "torch_dtype")? else { return Ok(None) };
        match value.as_str().map(|s| s.trim_start_matches("torch.")) {
            Some("float32") => Ok(Some(Storage::F32)),
            Some("float16") => Ok(Some(Storage::F16)),
            Some("bfloat16") => Ok(Some(Storage::Bf16)),
            _ => Err(self.error(
                field,
                format!("{} is not supported; supported: float32, float16, bfloat16", show(value)),
            )),
        }
    }

    /// The gate's activation.
    ///
    /// # Errors
    /// One that we have no operation for.
    pub fn activation(&self, field: &str) -> Result<Activation> {
        match self.opt_text(field)?.unwrap_or("silu") {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::Gelu),
            other => {
                let other = other.escape_default();
                let why = format!("`{other}` is not supported; supported: silu, gelu_pytorch_tanh, gelu");
                Err(self.error(field, why))
            }
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value for an error message: short, and free of control characters.
fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn with<T>(json: &str, f: impl FnOnce(&Config<'_>) -> T) -> T {
        let object = parse_object("config.json", json.as_bytes(), 9999).unwrap();
        f(&Config::new("config.json", &object))
    }

    #[test]
    fn errors_name_file_field_and_value() {
        let e = with(r#"{"a":{"b":-1}}"#, |c| c.object("a").unwrap().unwrap().count("b", 9).unwrap_err());
        assert_eq!(e.to_string(), "config.json: field `a.b`: expected a whole number, got -1");
        let e = with(r#"{"x":10}"#, |c| c.count("x", 9).unwrap_err());
        assert_eq!(e.to_string(), "config.json: field `x`: is 10, expected 1 to 9");
        let e = with(r#"{"x":1e39}"#, |c| c.opt_number("x").unwrap_err());
        assert!(e.to_string().contains("not a finite number"), "{e}");
        let long = format!(r#"{{"x":"{}"}}"#, "y".repeat(500));
        let e = with(&long, |c| c.flag("x", false).unwrap_err());
        assert!(e.to_string().len() < 160, "{e}");
    }

    #[test]
    fn both_spellings_must_agree() {
        with(r#"{"dtype":"bfloat16","torch_dtype":"bfloat16"}"#, |c| {
            assert_eq!(c.dtype().unwrap(), Some(Storage::Bf16));
        });
        let e = with(r#"{"dtype":"bfloat16","torch_dtype":"float32"}"#, |c| c.dtype().unwrap_err());
        assert!(e.to_string().contains("`dtype`: is \"bfloat16\", but `torch_dtype`"), "{e}");
        let e = with(r#"{"torch_dtype":"int8"}"#, |c| c.dtype().unwrap_err());
        assert!(e.to_string().contains("torch_dtype"), "{e}");
        with(r#"{"torch_dtype":"torch.float16"}"#, |c| assert_eq!(c.dtype().unwrap(), Some(Storage::F16)));
    }

    #[test]
    fn null_is_absent_and_unasked_fields_are_listed() {
        with(r#"{"a":null,"b":1,"c":[1,2],"d":["x"]}"#, |c| {
            assert!(c.get("a").is_none());
            assert_eq!(c.token_ids("c", 3).unwrap(), [1, 2]);
            assert!(c.token_ids("c", 2).is_err());
            assert_eq!(c.opt_texts("d").unwrap(), Some(vec!["x"]));
            assert!(c.opt_texts("c").is_err() && c.opt_texts("b").is_err() && c.object("b").is_err());
            assert_eq!(c.unasked(), Vec::<String>::new());
        });
        with(r#"{"q":1}"#, |c| assert_eq!(c.unasked(), ["q"]));
    }

    #[test]
    fn files_that_are_no_objects() {
        for bad in ["", "[]", "{", "{\"a\":NaN}", "\"x\""] {
            let e = parse_object("config.json", bad.as_bytes(), 9999).unwrap_err();
            assert!(matches!(e, ModelError::Corrupt { .. }), "{bad}: {e}");
        }
        let deep = "[".repeat(100_000);
        assert!(parse_object("config.json", deep.as_bytes(), usize::MAX).is_err());
        assert!(parse_object("config.json", b"{}  ", 3).is_err());
    }
}
