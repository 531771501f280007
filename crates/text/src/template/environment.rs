//! The Jinja dialect of Hugging Face templates on minijinja.
//!
//! Owns what transformers adds to Jinja: `trim_blocks` and `lstrip_blocks`, Python's methods on
//! strings and maps, `tojson` in Python's format, `raise_exception`, `{% generation %}` blocks, and
//! loop controls. `strftime_now` is added for each rendering, with its clock.

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

use super::json;

/// The message of `raise_exception`, carried as the source of minijinja's error.
#[derive(Debug)]
pub(super) struct Raised(pub(super) String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// Longest message of `raise_exception` that is passed on, in characters.
const MAX_RAISED_CHARS: usize = 500;

/// minijinja joins constants at compile time, so a chain of n `~` copies O(n^2) bytes before any
/// fuel is counted. Real templates have at most a few hundred.
const MAX_CONCATENATIONS: usize = 2_000;

/// An environment with one compiled template.
pub(super) fn build(
    name: &'static str,
    source: &str,
    max_depth: usize,
) -> Result<Environment<'static>, Error> {
    let concatenations = source.bytes().filter(|b| *b == b'~').count();
    if concatenations > MAX_CONCATENATIONS {
        return Err(Error::new(
            ErrorKind::SyntaxError,
            format!("{concatenations} `~` operators, the limit is {MAX_CONCATENATIONS}"),
        ));
    }
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_recursion_limit(max_depth);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.remove_global("debug");
    environment.add_template_owned(name, tolerate_generation(source))?;
    Ok(environment)
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message: String = message.to_string().chars().take(MAX_RAISED_CHARS).collect();
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// Rewrites `{% generation %}` and `{% endgeneration %}`, which mark the assistant's text for
/// training and mean nothing here, to `{% if true %}` and `{% endif %}`. White-space control is
/// kept, so the text around them does not change.
fn tolerate_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[..end];
        let (open, inner) = split_control(inner, |s| s.strip_prefix(['-', '+']));
        let (close, word) = split_control(inner, |s| s.strip_suffix(['-', '+']));
        let replacement = match word.trim() {
            "generation" => " if true ",
            "endgeneration" => " endif ",
            _ => continue,
        };
        out.push_str(open);
        out.push_str(replacement);
        out.push_str(close);
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// Splits a white-space control character off one end, by `strip`.
fn split_control<'a>(text: &'a str, strip: impl Fn(&'a str) -> Option<&'a str>) -> (&'a str, &'a str) {
    match strip(text) {
        Some(rest) if text.starts_with(rest) => (&text[rest.len()..], rest),
        Some(rest) => (&text[..text.len() - rest.len()], rest),
        None => ("", text),
    }
}

#[cfg(test)]
mod tests {
    use super::tolerate_generation;

    #[test]
    fn generation_tags_keep_their_white_space_control() {
        assert_eq!(
            tolerate_generation("a{%- generation -%}b{% endgeneration +%}c{% if x %}d{% endif %}"),
            "a{%- if true -%}b{% endif +%}c{% if x %}d{% endif %}"
        );
        assert_eq!(tolerate_generation("{% generation"), "{% generation");
        assert_eq!(tolerate_generation("{%%}{{ '{%' }}"), "{%%}{{ '{%' }}");
    }
}
