//! From conversation or text to token ids.
//!
//! Owns the shape of messages that templates see, and the tokenization of prompts; it never decides how long a
//! prompt may be (`validate` does). Runs on worker threads.

use std::time::SystemTime;

use mirai_text::{ReasoningStart, RenderInput, TemplateError, TokenizerError};
use serde_json::{Map, Value, json};

use crate::api::chat::{ChatRequest, Content, Message};
use crate::api::completions::CompletionRequest;
use crate::api::tokenize::TokenizeRequest;
use crate::api::wire::{Kwargs, PromptInput};
use crate::error::ApiError;
use crate::rules::Rules;

/// A prompt in tokens.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) ids: Vec<u32>,
    /// As text, where that is known or wanted.
    pub(crate) text: Option<String>,
    /// The field it came from.
    pub(crate) param: &'static str,
    /// Where it leaves the model, if it is a chat with a model that marks its reasoning.
    pub(crate) reasoning: Option<ReasoningStart>,
}

/// What of a chat body the template sees.
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Message>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) continue_final_message: Option<bool>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) kwargs: Option<Kwargs>,
    pub(crate) reasoning_effort: Option<String>,
}

/// Renders and tokenizes a chat.
pub(crate) fn chat(chat: ChatRequest, rules: Rules<'_>) -> Result<Input, ApiError> {
    let conversation = Conversation {
        messages: chat.messages.map(|list| list.0).unwrap_or_default(),
        add_generation_prompt: chat.add_generation_prompt,
        continue_final_message: chat.continue_final_message,
        add_special_tokens: chat.add_special_tokens,
        kwargs: chat.chat_template_kwargs,
        reasoning_effort: chat.reasoning_effort,
    };
    conversation.tokenize(rules)
}

impl Conversation {
    fn tokenize(self, rules: Rules<'_>) -> Result<Input, ApiError> {
        let Some(template) = &rules.model.template else {
            return Err(ApiError::unsupported("this model has no chat template; use /v1/completions")
                .param("messages"));
        };
        if self.messages.is_empty() {
            return Err(
                ApiError::missing_field("`messages` must have at least one message").param("messages")
            );
        }
        if self.messages.len() > rules.limits.max_messages {
            let text =
                format!("{} messages, the limit is {}", self.messages.len(), rules.limits.max_messages);
            return Err(ApiError::invalid_value(text).param("messages"));
        }
        let continues = self.continue_final_message == Some(true);
        let opens = self.add_generation_prompt.unwrap_or(!continues);
        if continues && opens {
            let text = "`continue_final_message` and `add_generation_prompt` exclude each other";
            return Err(ApiError::invalid_value(text).param("continue_final_message"));
        }
        let kwargs = kwargs(self.kwargs, self.reasoning_effort)?;
        let continued = continues.then(|| self.messages.last().map(text_of_message).unwrap_or_default());
        let messages = self
            .messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| to_json(i, message))
            .collect::<Result<Vec<_>, _>>()?;
        let text = template
            .render(&RenderInput {
                messages: &Value::Array(messages),
                tools: None,
                add_generation_prompt: opens,
                continue_final_message: continues,
                kwargs: &kwargs,
                now: SystemTime::now(),
            })
            .map_err(|e| rendering(&e))?;
        let special = self.add_special_tokens == Some(true);
        let ids = rules.model.tokenizer.encode(&text, special, true).map_err(|e| encoding("messages", &e))?;
        let reasoning = rules.model.reasoning.as_ref().map(|f| f.start(&text, continued.as_deref()));
        Ok(Input { reasoning, ..finish(ids, None, "messages", rules)? })
    }
}

/// What a message says, its parts put together.
fn text_of_message(message: &Message) -> String {
    match &message.content {
        None => String::new(),
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Parts(parts)) => parts.iter().filter_map(|part| part.text.as_deref()).collect(),
    }
}

/// Template variables that a request sets; only scalars, under names that the text crate lists.
fn kwargs(kwargs: Option<Kwargs>, effort: Option<String>) -> Result<Map<String, Value>, ApiError> {
    let mut map = Map::new();
    for (key, value) in kwargs.unwrap_or_default().0 {
        if !mirai_text::ALLOWED_KWARGS.contains(&key.as_str()) {
            let allowed = mirai_text::ALLOWED_KWARGS.join(", ");
            let text =
                format!("`chat_template_kwargs` has a name that requests may not set; allowed: {allowed}");
            return Err(ApiError::invalid_value(text).param("chat_template_kwargs"));
        }
        map.insert(key, value);
    }
    if let Some(effort) = effort {
        if effort.is_empty() || effort.len() > 32 || !effort.bytes().all(|b| b.is_ascii_alphanumeric()) {
            let text = "`reasoning_effort` must be a word of at most 32 letters";
            return Err(ApiError::invalid_value(text).param("reasoning_effort"));
        }
        map.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(map)
}

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A message as templates know it.
fn to_json(index: usize, message: Message) -> Result<Value, ApiError> {
    let field = |name: &str| format!("messages[{index}].{name}");
    let Some(role) = message.role else {
        let name = field("role");
        return Err(ApiError::missing_field(format!("`{name}` is missing")).param(name));
    };
    if !ROLES.contains(&role.as_str()) {
        let name = field("role");
        return Err(
            ApiError::invalid_value(format!("`{name}` must be one of {}", ROLES.join(", "))).param(name)
        );
    }
    let calls = message.tool_calls.map(|list| list.0).unwrap_or_default();
    let content = match message.content {
        Some(Content::Text(text)) => Value::String(text),
        Some(Content::Parts(parts)) => {
            let mut list = Vec::with_capacity(parts.len());
            for (i, part) in parts.into_iter().enumerate() {
                match (part.kind.as_deref(), part.text) {
                    (Some("text"), Some(text)) => list.push(json!({"type": "text", "text": text})),
                    (Some("text"), None) => {
                        let name = field(&format!("content[{i}].text"));
                        return Err(ApiError::missing_field(format!("`{name}` is missing")).param(name));
                    }
                    _ => {
                        let name = field(&format!("content[{i}].type"));
                        return Err(ApiError::unsupported("only parts of type `text` are served").param(name));
                    }
                }
            }
            Value::Array(list)
        }
        None if role == "assistant" => Value::Null,
        None => {
            let name = field("content");
            return Err(ApiError::missing_field(format!("`{name}` is missing")).param(name));
        }
    };
    let mut object = Map::new();
    object.insert("role".to_owned(), Value::String(role));
    object.insert("content".to_owned(), content);
    // The text crate knows under which name the template looks for it.
    let reasoning = message.reasoning.or(message.reasoning_content);
    for (key, value) in
        [("name", message.name), ("tool_call_id", message.tool_call_id), ("reasoning_content", reasoning)]
    {
        if let Some(value) = value {
            object.insert(key.to_owned(), Value::String(value));
        }
    }
    if !calls.is_empty() {
        let mut list = Vec::with_capacity(calls.len());
        for (i, call) in calls.into_iter().enumerate() {
            let Some(function) = call.function.name else {
                let name = field(&format!("tool_calls[{i}].function.name"));
                return Err(ApiError::missing_field(format!("`{name}` is missing")).param(name));
            };
            let arguments = call.function.arguments.unwrap_or_else(|| "{}".to_owned());
            list.push(json!({
                "id": call.id.unwrap_or_default(),
                "type": "function",
                "function": {"name": function, "arguments": arguments},
            }));
        }
        object.insert("tool_calls".to_owned(), Value::Array(list));
    }
    Ok(Value::Object(object))
}

/// Tokenizes the prompts of a completion.
pub(crate) fn completion(body: CompletionRequest, rules: Rules<'_>) -> Result<Vec<Input>, ApiError> {
    let special = body.add_special_tokens != Some(false);
    let prompts = match body.prompt {
        None => return Err(ApiError::missing_field("`prompt` is missing").param("prompt")),
        Some(prompts) if prompts.is_empty() => {
            return Err(ApiError::missing_field("`prompt` is an empty list").param("prompt"));
        }
        Some(prompts) => prompts,
    };
    if let Some(suffix) = body.suffix.filter(|suffix| !suffix.is_empty()) {
        return fill_in(prompts, &suffix, special, body.echo == Some(true), rules);
    }
    match prompts {
        PromptInput::Texts(texts) => texts
            .into_iter()
            .map(|text| {
                let ids =
                    rules.model.tokenizer.encode(&text, special, true).map_err(|e| encoding("prompt", &e))?;
                finish(ids, Some(text), "prompt", rules)
            })
            .collect(),
        PromptInput::Ids(lists) => lists
            .into_iter()
            .map(|ids| {
                let text = if body.echo == Some(true) { Some(text_of(&ids, rules)) } else { None };
                finish(ids, text, "prompt", rules)
            })
            .collect(),
    }
}

/// Prompts with a gap, between `prompt` and `suffix`.
fn fill_in(
    prompts: PromptInput,
    suffix: &str,
    special: bool,
    echo: bool,
    rules: Rules<'_>,
) -> Result<Vec<Input>, ApiError> {
    let Some(fim) = rules.model.fim else {
        let text = "`suffix` needs a model with fill-in-the-middle tokens, which this one has not";
        return Err(ApiError::unsupported(text).param("suffix"));
    };
    let (PromptInput::Texts(texts), false) = (prompts, echo) else {
        let text = "`suffix` is served for text prompts without `echo`";
        return Err(ApiError::unsupported(text).param("suffix"));
    };
    let tokenizer = &rules.model.tokenizer;
    let after = tokenizer.encode(suffix, false, false).map_err(|e| encoding("suffix", &e))?;
    texts
        .into_iter()
        .map(|text| {
            let mut ids: Vec<u32> = rules.model.bos_token_id.filter(|_| special).into_iter().collect();
            ids.push(fim.prefix);
            ids.extend(tokenizer.encode(&text, false, false).map_err(|e| encoding("prompt", &e))?);
            ids.push(fim.suffix);
            ids.extend_from_slice(&after);
            ids.push(fim.middle);
            finish(ids, None, "prompt", rules)
        })
        .collect()
}

/// An empty prompt becomes the token that begins a text; ids outside the logits are refused.
fn finish(
    mut ids: Vec<u32>,
    text: Option<String>,
    param: &'static str,
    rules: Rules<'_>,
) -> Result<Input, ApiError> {
    if ids.is_empty() {
        match rules.model.bos_token_id {
            Some(bos) => ids.push(bos),
            None => return Err(ApiError::invalid_value(format!("`{param}` has no tokens")).param(param)),
        }
    }
    let vocab = rules.model.vocab;
    if let Some(id) = ids.iter().find(|id| **id >= vocab) {
        let text = format!("`{param}` has token {id}, but ids end at {}", vocab.saturating_sub(1));
        return Err(ApiError::invalid_value(text).param(param));
    }
    Ok(Input { ids, text, param, reasoning: None })
}

/// Text of ids of which some may lie outside the tokenizer's vocabulary (padded logits).
pub(crate) fn text_of(ids: &[u32], rules: Rules<'_>) -> String {
    let tokenizer = &rules.model.tokenizer;
    let known: Vec<u32> = ids.iter().copied().filter(|id| tokenizer.token_bytes(*id).is_some()).collect();
    tokenizer.decode(&known, false).unwrap_or_default()
}

/// `/tokenize`.
pub(crate) fn tokenize(body: TokenizeRequest, rules: Rules<'_>) -> Result<Vec<u32>, ApiError> {
    for (name, value) in [("chat_template", &body.chat_template), ("tools", &body.tools)] {
        if value.is_present() {
            return Err(ApiError::unsupported(format!("`{name}` is not served")).param(name));
        }
    }
    match (body.prompt, body.messages) {
        (Some(_), Some(_)) => {
            Err(ApiError::invalid_value("`prompt` and `messages` exclude each other").param("messages"))
        }
        (None, None) => Err(ApiError::missing_field("`prompt` or `messages` is missing").param("prompt")),
        (Some(text), None) => {
            let special = body.add_special_tokens != Some(false);
            rules.model.tokenizer.encode(&text, special, true).map_err(|e| encoding("prompt", &e))
        }
        (None, Some(messages)) => {
            let conversation = Conversation {
                messages: messages.0,
                add_generation_prompt: body.add_generation_prompt,
                continue_final_message: body.continue_final_message,
                add_special_tokens: body.add_special_tokens,
                kwargs: body.chat_template_kwargs,
                reasoning_effort: None,
            };
            conversation.tokenize(rules).map(|input| input.ids)
        }
    }
}

/// Why text could not be tokenized, without the text.
pub(crate) fn encoding(param: &'static str, error: &TokenizerError) -> ApiError {
    match error {
        TokenizerError::InputTooLong { bytes, limit } => {
            let text =
                format!("`{param}` has {bytes} bytes of text, more than the context can hold ({limit})");
            ApiError::context_length(text).param(param)
        }
        _ => ApiError::invalid_value(format!("`{param}` cannot be expressed in this model's vocabulary"))
            .param(param),
    }
}

/// Why a conversation could not be rendered. What the model's author wrote may be shown, what a client wrote not.
fn rendering(error: &TemplateError) -> ApiError {
    let error = match error {
        TemplateError::Raised(reason) => {
            let reason: String = reason.chars().take(300).collect();
            ApiError::template(format!("the chat template refuses this conversation: {reason}"))
        }
        TemplateError::OutputTooLarge { .. }
        | TemplateError::CannotContinue(_)
        | TemplateError::BadMessage { .. } => ApiError::template(error.to_string()),
        TemplateError::Render(_) => ApiError::template("the chat template cannot render this conversation"),
        TemplateError::OutOfFuel { .. } => ApiError::internal("the chat template takes too long"),
        _ => ApiError::internal("the chat template failed"),
    };
    error.param("messages")
}
