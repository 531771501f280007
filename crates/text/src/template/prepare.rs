//! Adapts a conversation in OpenAI's shape to what a template can take.
//!
//! Owns the rewriting only; what a template can take is decided in [`super::caps`]. A conversation
//! that fits is passed through unchanged.

use serde_json::{Map, Value as Json};

use super::caps::{ArgumentStyle, ContentStyle, REASONING_FIELDS, ReasoningStyle, TemplateCaps};
use crate::TemplateError;

/// Between two system messages that become one.
const SYSTEM_SEPARATOR: &str = "\n\n";

/// The adapted list of messages.
pub(super) fn prepare(messages: &Json, caps: &TemplateCaps) -> Result<Json, TemplateError> {
    let bad = |index, reason| TemplateError::BadMessage { index, reason };
    let list = messages.as_array().ok_or_else(|| bad(0, "the messages are not a list"))?;
    let mut out: Vec<Map<String, Json>> = Vec::with_capacity(list.len());
    for (index, message) in list.iter().enumerate() {
        let mut message = message.as_object().cloned().ok_or_else(|| bad(index, "not an object"))?;
        let role = message
            .get("role")
            .and_then(Json::as_str)
            .ok_or_else(|| bad(index, "`role` is missing or not a string"))?;
        if role == "developer" && !caps.developer {
            message.insert("role".to_owned(), "system".into());
        }
        flatten_content(&mut message, caps).map_err(|reason| bad(index, reason))?;
        convert_arguments(&mut message, caps.arguments);
        place_reasoning(&mut message, caps.reasoning);
        out.push(message);
    }
    if !caps.multiple_system {
        merge_system(&mut out);
    }
    if !caps.system {
        fold_system_into_user(&mut out);
    }
    if caps.content == ContentStyle::Parts {
        out.iter_mut().for_each(|message| into_parts(message, None));
    }
    Ok(out.into_iter().map(Json::Object).collect())
}

/// Makes the content one string. Parts of text are put on lines of their own.
fn flatten_content(message: &mut Map<String, Json>, caps: &TemplateCaps) -> Result<(), &'static str> {
    match message.get("content") {
        Some(Json::String(_)) => Ok(()),
        Some(Json::Array(parts)) => {
            let mut texts = Vec::with_capacity(parts.len());
            for part in parts {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text" | "input_text" | "output_text") | None, Some(text)) => {
                        texts.push(text);
                    }
                    (Some("refusal"), _) if part["refusal"].is_string() => {
                        texts.push(part["refusal"].as_str().unwrap_or_default());
                    }
                    _ => return Err("only text parts are supported in `content`"),
                }
            }
            let text = texts.join("\n");
            message.insert("content".to_owned(), text.into());
            Ok(())
        }
        None | Some(Json::Null) => {
            if !caps.null_content {
                message.insert("content".to_owned(), "".into());
            }
            Ok(())
        }
        Some(_) => Err("`content` is neither a string nor a list of parts"),
    }
}

/// OpenAI sends tool-call arguments as JSON text; most templates want the object.
fn convert_arguments(message: &mut Map<String, Json>, style: ArgumentStyle) {
    let Some(Json::Array(calls)) = message.get_mut("tool_calls") else {
        return;
    };
    for call in calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        match (style, &*arguments) {
            (ArgumentStyle::Object, Json::String(text)) => {
                let text = if text.trim().is_empty() { "{}" } else { text };
                // Text that is no JSON object is history from a model; it is passed on as it is.
                if let Ok(object @ Json::Object(_)) = serde_json::from_str(text) {
                    *arguments = object;
                }
            }
            (ArgumentStyle::Text, Json::Object(_)) => {
                *arguments = arguments.to_string().into();
            }
            _ => {}
        }
    }
}

/// Clients give reasoning back under the names that servers have for it; the template sees it under its own.
fn place_reasoning(message: &mut Map<String, Json>, style: ReasoningStyle) {
    let mut given = None;
    for field in REASONING_FIELDS {
        match message.shift_remove(field) {
            Some(Json::String(text)) if !text.is_empty() && given.is_none() => given = Some(text),
            _ => {}
        }
    }
    let Some(text) = given.filter(|_| message.get("role").and_then(Json::as_str) == Some("assistant")) else {
        return;
    };
    match style {
        ReasoningStyle::Dropped => {}
        // gpt-oss, the one that names it so, refuses both before a tool call; what the user has seen stays.
        ReasoningStyle::Field("thinking") if calls_tools(message) && !text_of(message).is_empty() => {}
        ReasoningStyle::Field(field) => {
            message.insert(field.to_owned(), text.into());
        }
        ReasoningStyle::Part => into_parts(message, Some(text)),
    }
}

fn calls_tools(message: &Map<String, Json>) -> bool {
    message.get("tool_calls").and_then(Json::as_array).is_some_and(|calls| !calls.is_empty())
}

/// Makes a text a list: the reasoning, and the text behind it.
fn into_parts(message: &mut Map<String, Json>, reasoning: Option<String>) {
    let Some(Json::String(text)) = message.get_mut("content") else { return };
    let text = std::mem::take(text);
    let mut parts = Vec::with_capacity(2);
    if let Some(reasoning) = reasoning {
        parts.push(serde_json::json!({"type": "thinking", "thinking": reasoning}));
    }
    if parts.is_empty() || !text.is_empty() {
        parts.push(serde_json::json!({"type": "text", "text": text}));
    }
    message.insert("content".to_owned(), Json::Array(parts));
}

fn is_system(message: &Map<String, Json>) -> bool {
    let role = message.get("role").and_then(Json::as_str);
    matches!(role, Some("system" | "developer"))
}

fn text_of(message: &Map<String, Json>) -> &str {
    let content = message.get("content").and_then(Json::as_str);
    content.unwrap_or_default()
}

/// Puts the text of all system messages into one, at the start.
fn merge_system(messages: &mut Vec<Map<String, Json>>) {
    let at_start = messages.first().is_some_and(is_system);
    let count = messages.iter().filter(|m| is_system(m)).count();
    if count == 0 || (count == 1 && at_start) {
        return;
    }
    let (system, mut others): (Vec<_>, Vec<_>) = messages.drain(..).partition(is_system);
    let text = system.iter().map(text_of).collect::<Vec<_>>().join(SYSTEM_SEPARATOR);
    if let Some(mut first) = system.into_iter().next() {
        first.insert("content".to_owned(), text.into());
        messages.push(first);
    }
    messages.append(&mut others);
}

/// For templates without a system role: its text goes before the first user message's.
fn fold_system_into_user(messages: &mut Vec<Map<String, Json>>) {
    merge_system(messages);
    if !messages.first().is_some_and(is_system) {
        return;
    }
    let mut system = messages.remove(0);
    let text = text_of(&system).to_owned();
    let user = messages.first_mut().filter(|m| m.get("role") == Some(&"user".into()));
    match user {
        Some(user) => {
            let text = format!("{text}{SYSTEM_SEPARATOR}{}", text_of(user));
            user.insert("content".to_owned(), text.into());
        }
        None => {
            system.insert("role".to_owned(), "user".into());
            messages.insert(0, system);
        }
    }
}
