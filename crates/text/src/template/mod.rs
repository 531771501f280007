//! Chat templates: a list of messages in, the prompt's text out.
//!
//! Owns compilation and rendering under limits, on a thread of known stack size. A template comes
//! from a model file and is not trusted: it sees the conversation, an injected clock and a fixed
//! list of variables, and nothing else (no files, no includes, no environment). What a template
//! can take is found out once, at load time, by rendering probe conversations ([`TemplateCaps`]).

mod caps;
mod environment;
mod json;
mod prepare;
mod sandbox;
mod strftime;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;
use std::time::SystemTime;

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::Value as Json;

pub use caps::{ArgumentStyle, ContentStyle, ReasoningStyle, TemplateCaps};

use crate::{SpecialTokens, TemplateError};

const NAME: &str = "chat";

/// Template variables that a request may set. Everything else is refused, so that no request can
/// replace what the server itself passes (`messages`, `tools`, the special tokens).
pub const ALLOWED_KWARGS: &[&str] = &[
    "add_vision_id",
    "builtin_tools",
    "controls",
    "custom_tools",
    "date_string",
    "deliberation",
    "documents",
    "enable_thinking",
    "keep_past_thinking",
    "model_identity",
    "preserve_thinking",
    "python_tools",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
    "tools_in_user_message",
    "xml_tools",
];

/// Bounds on the work of one template.
#[derive(Debug, Clone, Copy)]
pub struct TemplateLimits {
    /// Longest template, in bytes. Real ones have at most 30 KB.
    pub max_source_bytes: usize,
    /// Fuel for any rendering. One unit is one instruction, 64 bytes written, or the like.
    pub base_fuel: u64,
    /// Further fuel for each byte of the messages, tools and variables (as JSON).
    pub fuel_per_input_byte: u64,
    /// Longest rendered prompt, in bytes.
    pub max_output_bytes: usize,
    /// Nesting of macro calls, loops and blocks, in minijinja's units.
    pub max_depth: usize,
}

impl Default for TemplateLimits {
    fn default() -> Self {
        Self {
            max_source_bytes: 128 << 10,
            base_fuel: 1_000_000,
            fuel_per_input_byte: 8,
            max_output_bytes: 64 << 20,
            max_depth: 200,
        }
    }
}

/// What is to be rendered.
#[derive(Debug, Clone, Copy)]
pub struct RenderInput<'a> {
    /// A list of objects with `role` and `content`, in OpenAI's shape.
    pub messages: &'a Json,
    /// A list of tools in OpenAI's shape.
    pub tools: Option<&'a Json>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Whether the text ends inside the last message, so that the model continues it.
    pub continue_final_message: bool,
    /// Variables from the request; keys outside [`ALLOWED_KWARGS`] are an error.
    pub kwargs: &'a serde_json::Map<String, Json>,
    /// What `strftime_now` says (UTC).
    pub now: SystemTime,
}

/// A compiled template with the special tokens of its model.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    limits: TemplateLimits,
    caps: TemplateCaps,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("special", &self.special)
            .field("limits", &self.limits)
            .field("caps", &self.caps)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template with the default limits and probes what it can take.
    ///
    /// # Errors
    /// As [`Self::compile_with`].
    pub fn compile(source: &str, special: SpecialTokens) -> Result<Self, TemplateError> {
        Self::compile_with(source, special, TemplateLimits::default())
    }

    /// Compiles a template under the given limits and probes what it can take.
    ///
    /// # Errors
    /// A source that is too long, does not compile, is nested too deeply, or cannot render even
    /// one short user message within the limits.
    pub fn compile_with(
        source: &str,
        special: SpecialTokens,
        limits: TemplateLimits,
    ) -> Result<Self, TemplateError> {
        if source.len() > limits.max_source_bytes {
            return Err(TemplateError::SourceTooLarge {
                bytes: source.len(),
                limit: limits.max_source_bytes,
            });
        }
        sandbox::run(|| {
            let environment = environment::build(NAME, source, limits.max_depth)
                .map_err(|e| TemplateError::Syntax(message_of(&e)))?;
            let mut template = Self { environment, special, limits, caps: TemplateCaps::default() };
            template.caps = caps::probe(&template, source)?;
            Ok(template)
        })
    }

    /// What the template can take, as found at load time.
    #[must_use]
    pub fn caps(&self) -> &TemplateCaps {
        &self.caps
    }

    /// Renders a conversation after adapting it to what the template can take: system messages
    /// merged, the `developer` role renamed, content as text or parts, tool-call arguments as an
    /// object or as text, earlier reasoning where the template looks for it.
    ///
    /// # Errors
    /// Every variant of [`TemplateError`] except those of compiling.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        let messages = prepare::prepare(input.messages, &self.caps)?;
        self.render_verbatim(&RenderInput { messages: &messages, ..*input })
    }

    /// Renders a conversation exactly as given.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_verbatim(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        if let Some(name) = input.kwargs.keys().find(|key| !ALLOWED_KWARGS.contains(&key.as_str())) {
            return Err(TemplateError::KwargNotAllowed {
                name: name.clone(),
                allowed: ALLOWED_KWARGS.join(", "),
            });
        }
        if input.continue_final_message && input.add_generation_prompt {
            return Err(TemplateError::CannotContinue("cannot be combined with add_generation_prompt"));
        }
        let fuel = self.fuel_for(input);
        let rendered = sandbox::run(|| self.render_here(input, fuel))?;
        if input.continue_final_message {
            return cut_after_final_message(rendered, input.messages);
        }
        Ok(rendered)
    }

    fn fuel_for(&self, input: &RenderInput<'_>) -> u64 {
        let bytes = json::size(input.messages)
            + input.tools.map_or(0, json::size)
            + input.kwargs.values().map(json::size).sum::<u64>();
        self.limits.base_fuel.saturating_add(self.limits.fuel_per_input_byte.saturating_mul(bytes))
    }

    /// Renders on the current thread, which must be the sandbox's.
    fn render_here(&self, input: &RenderInput<'_>, fuel: u64) -> Result<String, TemplateError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let now = input.now;
        environment.add_function("strftime_now", move |format: &str| strftime::format(now, format));
        let template = environment.get_template(NAME).map_err(|e| TemplateError::Syntax(message_of(&e)))?;
        let mut output = Limited { bytes: Vec::new(), limit: self.limits.max_output_bytes, exceeded: false };
        let result = template.render_captured_to(self.context(input), &mut output);
        if output.exceeded {
            return Err(TemplateError::OutputTooLarge { limit: self.limits.max_output_bytes });
        }
        if let Err(error) = result {
            return Err(typed(&error, fuel));
        }
        String::from_utf8(output.bytes).map_err(|e| TemplateError::Render(e.to_string()))
    }

    fn context(&self, input: &RenderInput<'_>) -> Value {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (key, value) in input.kwargs {
            context.insert(key, Value::from(Serde(value)));
        }
        let special = &self.special;
        let tokens = [
            ("bos_token", &special.bos),
            ("eos_token", &special.eos),
            ("unk_token", &special.unk),
            ("pad_token", &special.pad),
        ];
        for (key, token) in tokens {
            if let Some(token) = token {
                context.insert(key, Value::from(token.as_str()));
            }
        }
        context.insert("messages", Value::from(Serde(input.messages)));
        let tools = match input.tools {
            Some(tools) => Value::from(Serde(tools)),
            None if self.caps.empty_tools => Value::from(Vec::<Value>::new()),
            None => Value::from(()),
        };
        context.insert("tools", tools);
        context.entry("documents").or_insert_with(|| Value::from(()));
        context.insert("add_generation_prompt", input.add_generation_prompt.into());
        Value::from_pairs(context)
    }
}

/// A writer that refuses to grow beyond its limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    exceeded: bool,
}

impl io::Write for Limited {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.len() > self.limit - self.bytes.len() {
            self.exceeded = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn typed(error: &minijinja::Error, fuel: u64) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::OutOfFuel { fuel };
    }
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(raised) = inner.downcast_ref::<environment::Raised>() {
            return TemplateError::Raised(raised.0.clone());
        }
        if let Some(inner) = inner.downcast_ref::<minijinja::Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            return TemplateError::OutOfFuel { fuel };
        }
        source = inner.source();
    }
    TemplateError::Render(message_of(error))
}

/// Kind, detail and line, without the values of any variable.
fn message_of(error: &minijinja::Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        text.push_str(": ");
        text.push_str(detail);
    }
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line})"));
    }
    text
}

/// Ends the text right after the last message's content, as HF transformers does.
fn cut_after_final_message(mut rendered: String, messages: &Json) -> Result<String, TemplateError> {
    let last = messages.as_array().and_then(|list| list.last());
    let content = match last.map(|message| &message["content"]) {
        Some(Json::String(text)) => text.as_str(),
        Some(Json::Array(parts)) => {
            parts.iter().rev().find_map(|part| part["text"].as_str()).unwrap_or_default()
        }
        _ => "",
    };
    let trimmed = content.trim();
    if trimmed.is_empty() {
        return Err(TemplateError::CannotContinue("the last message has no text"));
    }
    let Some(begin) = rendered.rfind(trimmed) else {
        return Err(TemplateError::CannotContinue(
            "the template does not render the last message's text unchanged",
        ));
    };
    // Keep trailing white space where the template kept it.
    let untrimmed = content.trim_start();
    let end = if rendered[begin..].starts_with(untrimmed) {
        begin + untrimmed.len()
    } else {
        begin + trimmed.len()
    };
    rendered.truncate(end);
    Ok(rendered)
}

#[cfg(test)]
mod tests;
