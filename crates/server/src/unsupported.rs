//! Fields that exist elsewhere and are not served here: refused by name, never silently dropped.
//!
//! Owns that list. A field leaves it when it is served.

use crate::api::chat::ChatRequest;
use crate::api::common::Common;
use crate::api::completions::CompletionRequest;
use crate::api::wire::Presence;
use crate::error::ApiError;
use crate::rules::Body;

/// Refuses what asks for something that is not served.
///
/// # Errors
/// 400 `unsupported_parameter` naming the field.
pub(crate) fn check(common: &Common, body: &Body) -> Result<(), ApiError> {
    check_common(common)?;
    match body {
        Body::Chat(chat) => check_chat(chat),
        Body::Completion(completion) => check_completion(completion),
    }
}

fn refuse(name: &str) -> ApiError {
    ApiError::unsupported(format!("`{name}` is not served")).param(name)
}

fn absent(fields: &[(&str, &Presence)]) -> Result<(), ApiError> {
    match fields.iter().find(|(_, value)| value.is_present()) {
        Some((name, _)) => Err(refuse(name)),
        None => Ok(()),
    }
}

fn check_common(common: &Common) -> Result<(), ApiError> {
    absent(&[
        ("structured_outputs", &common.structured_outputs),
        ("guided_json", &common.guided_json),
        ("guided_regex", &common.guided_regex),
        ("guided_choice", &common.guided_choice),
        ("guided_grammar", &common.guided_grammar),
        ("use_beam_search", &common.use_beam_search),
        ("logits_processors", &common.logits_processors),
        ("lora_request", &common.lora_request),
        ("prompt_embeds", &common.prompt_embeds),
        ("truncate_prompt_tokens", &common.truncate_prompt_tokens),
        ("kv_transfer_params", &common.kv_transfer_params),
        ("vllm_xargs", &common.vllm_xargs),
        ("repetition_detection", &common.repetition_detection),
        ("logprob_token_ids", &common.logprob_token_ids),
    ])?;
    for (name, value, neutral) in
        [("priority", &common.priority, 0.0), ("length_penalty", &common.length_penalty, 1.0)]
    {
        if value.is_present() && *value != Presence::Number(neutral) {
            return Err(refuse(name));
        }
    }
    if common.spaces_between_special_tokens == Some(false) {
        return Err(refuse("spaces_between_special_tokens"));
    }
    if let Some(format) = &common.response_format
        && (format.kind.as_deref() != Some("text") || format.json_schema.is_present())
    {
        return Err(ApiError::unsupported("only `response_format` {\"type\": \"text\"} is served")
            .param("response_format"));
    }
    Ok(())
}

fn check_chat(chat: &ChatRequest) -> Result<(), ApiError> {
    absent(&[
        ("chat_template", &chat.chat_template),
        ("echo", &chat.echo),
        ("audio", &chat.audio),
        ("prediction", &chat.prediction),
        ("web_search_options", &chat.web_search_options),
        ("documents", &chat.documents),
        ("mm_processor_kwargs", &chat.mm_processor_kwargs),
        ("thinking_token_budget", &chat.thinking_token_budget),
    ])?;
    let none = chat.tool_choice.is_text("none");
    if chat.tools.is_present() && !none {
        let text = "`tools` are not served yet, unless `tool_choice` is `none`";
        return Err(ApiError::unsupported(text).param("tools"));
    }
    if chat.tool_choice.is_present() && !none && !chat.tool_choice.is_text("auto") {
        return Err(refuse("tool_choice"));
    }
    let none = chat.function_call.is_text("none");
    if chat.functions.is_present() && !none {
        return Err(refuse("functions"));
    }
    if chat.function_call.is_present() && !none && !chat.function_call.is_text("auto") {
        return Err(refuse("function_call"));
    }
    if chat.modalities.as_ref().is_some_and(|list| list.0.iter().any(|kind| kind != "text")) {
        return Err(refuse("modalities"));
    }
    Ok(())
}

fn check_completion(completion: &CompletionRequest) -> Result<(), ApiError> {
    absent(&[
        ("chat_template", &completion.chat_template),
        ("chat_template_kwargs", &completion.chat_template_kwargs),
        ("tools", &completion.tools),
    ])
}
