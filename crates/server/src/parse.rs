//! Bytes of a body into a typed body.
//!
//! Owns the nesting limit, the naming of the field at fault, and the counting of unknown fields. Its messages
//! never repeat text that a client sent.

use serde::de::DeserializeOwned;

use crate::error::ApiError;

/// A parsed body.
#[derive(Debug)]
pub(crate) struct Parsed<T> {
    pub(crate) body: T,
    /// Fields that no type knows. They are ignored, and counted.
    pub(crate) unknown_fields: u64,
}

/// Parses a JSON object.
///
/// # Errors
/// 400 naming the field, for anything but JSON of the right shape.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8], max_depth: usize) -> Result<Parsed<T>, ApiError> {
    check_depth(bytes, max_depth)?;
    let first = bytes.iter().find(|b| !b.is_ascii_whitespace());
    if first.is_some_and(|b| *b != b'{') {
        return Err(ApiError::invalid_json("the body must be a JSON object"));
    }
    let mut unknown_fields = 0;
    let mut count = |_: serde_ignored::Path<'_>| unknown_fields += 1;
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let body = match serde_ignored::deserialize(tracked, &mut count) {
        Ok(body) => body,
        Err(error) => return Err(explain(&error, &track.path().to_string())),
    };
    if let Err(error) = json.end() {
        return Err(explain(&error, "."));
    }
    Ok(Parsed { body, unknown_fields })
}

/// Fails where brackets nest deeper than `max`. Looks at brackets outside of strings only.
fn check_depth(bytes: &[u8], max: usize) -> Result<(), ApiError> {
    let mut depth = 0usize;
    let mut in_string = false;
    let mut escaped = false;
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > max {
                    return Err(ApiError::invalid_json(format!("the body nests deeper than {max} levels")));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// serde's reason, without what the client wrote.
fn explain(error: &serde_json::Error, path: &str) -> ApiError {
    use serde_json::error::Category;
    let place = format!("line {} column {}", error.line(), error.column());
    match error.classify() {
        Category::Eof => return ApiError::invalid_json(format!("the body ends too early, at {place}")),
        Category::Syntax | Category::Io => {
            let text = error.to_string();
            let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
            return ApiError::invalid_json(format!("the body is not valid JSON: {reason} at {place}"));
        }
        Category::Data => {}
    }
    let text = error.to_string();
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
    let reason = hide_strings(reason);
    match field(path) {
        Some(field) => ApiError::invalid_value(format!("`{field}`: {reason}")).param(field),
        None => ApiError::invalid_json(reason),
    }
}

/// `invalid type: string "...", expected u32` without the dots.
fn hide_strings(reason: &str) -> String {
    match (reason.find("string \""), reason.rfind("\", expected")) {
        (Some(start), Some(end)) if start < end => {
            format!("{}{}", &reason[..start + "string".len()], &reason[end + 1..])
        }
        _ => reason.to_owned(),
    }
}

/// The path, cut before the first name that a client chose.
fn field(path: &str) -> Option<String> {
    let free = ["logit_bias", "chat_template_kwargs"];
    let path = free.into_iter().find(|name| path.starts_with(name)).unwrap_or(path);
    let known = path.len() <= 128 && path.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.[]".contains(&b));
    (known && path != "." && !path.is_empty()).then(|| path.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::api::chat::ChatRequest;
    use crate::api::completions::CompletionRequest;

    fn chat(text: &str) -> Result<Parsed<ChatRequest>, ApiError> {
        parse(text.as_bytes(), 64)
    }

    #[test]
    fn fields_at_fault_are_named() {
        let cases = [
            (r#"{"n": "5"}"#, "n"),
            (r#"{"n": 1.0}"#, "n"),
            (r#"{"n": -1}"#, "n"),
            (r#"{"max_tokens": 18446744073709551616}"#, "max_tokens"),
            (r#"{"messages": 3}"#, "messages"),
            (r#"{"messages": [{"content": 3}]}"#, "messages[0].content"),
            (
                r#"{"messages": [{"role":"user","content": [{"type":"text","text":4}]}]}"#,
                "messages[0].content[0].text",
            ),
            (r#"{"logit_bias": {"canary": 3}}"#, "logit_bias"),
            (r#"{"chat_template_kwargs": {"canary": []}}"#, "chat_template_kwargs"),
            (r#"{"stream_options": {"include_usage": "yes"}}"#, "stream_options.include_usage"),
        ];
        for (body, param) in cases {
            let error = chat(body).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
            assert_eq!(error.status, 400);
            assert!(!error.to_string().contains("canary"), "{error}");
        }
    }

    #[test]
    fn malformed_bodies_are_explained() {
        for body in [
            "",
            " ",
            "{",
            "nul",
            "[]",
            "3",
            "\"x\"",
            "{} x",
            "{\"a\":}",
            "{\"temperature\": NaN}",
            "{\"temperature\": 1e400}",
            "{\"n\":1,\"n\":2}",
            "{\"n\":01}",
            "\u{feff}{}",
        ] {
            let error = chat(body).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.kind),
                (400, "invalid_request_error"),
                "{body}: {error}"
            );
        }
        let error = parse::<ChatRequest>(b"{\"user\": \"\xff\"}", 64).unwrap_err();
        assert_eq!(error.code, "invalid_json");
    }

    #[test]
    fn what_a_client_wrote_is_not_repeated() {
        let error = chat(r#"{"n": "canary\", expected canary"}"#).unwrap_err();
        assert!(!error.to_string().contains("canary"), "{error}");
        assert!(error.to_string().contains("expected u32"), "{error}");
        let error = parse::<CompletionRequest>(b"{\"echo\": \"canary\"}", 64).unwrap_err();
        assert!(!error.to_string().contains("canary"), "{error}");
    }

    #[test]
    fn unknown_fields_are_counted() {
        let parsed = chat(r#"{"zzz": [1,{"a":2}], "messages": [{"role":"user","content":"x","weight":1}]}"#);
        assert_eq!(parsed.unwrap().unknown_fields, 2);
    }

    #[test]
    fn nesting_is_limited_before_parsing() {
        let deep = |n: usize| format!("{{\"zzz\": {}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(chat(&deep(63)).is_ok());
        assert!(chat(&deep(64)).unwrap_err().message.contains("deeper than 64"));
        assert_eq!(chat(&deep(100_000)).unwrap_err().status, 400);
        assert!(
            chat(r#"{"user": "[[[[[[[\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}"#)
                .is_ok()
        );
    }
}
