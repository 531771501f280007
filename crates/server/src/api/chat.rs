//! `POST /v1/chat/completions`: body, answer, chunks.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::bounds;
use super::common::{PromptLogprobs, Usage, generation_body};
use super::wire::{Bounded, Kwargs, Presence};

generation_body! {
    /// A conversation to continue.
    #[schema(as = ChatCompletionRequest)]
    ChatRequest {
        /// The conversation so far; at least one message, at most 2048.
        #[schema(value_type = Vec<Message>, min_items = 1, max_items = 2048)]
        messages: Option<Bounded<Message, { bounds::MESSAGES }>>,
        /// Newer name of `max_tokens`; it wins if both are there.
        max_completion_tokens: Option<u32>,
        /// Log-probabilities of the output's tokens. Default false.
        logprobs: Option<bool>,
        /// Most likely tokens beside each, with `logprobs`. Default 0.
        #[schema(maximum = 20)]
        top_logprobs: Option<u32>,
        /// Let the template open the assistant's turn. Default true.
        add_generation_prompt: Option<bool>,
        /// Continue the last message instead of answering it. Default false.
        continue_final_message: Option<bool>,
        /// Let the tokenizer add its special tokens too (most templates write them). Default false.
        add_special_tokens: Option<bool>,
        /// Values for the template; only names that the server knows.
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Option<Kwargs>,
        /// Handed to the template.
        #[schema(max_length = 32)]
        reasoning_effort: Option<String>,
        /// Whether the answer shows the reasoning. It is made, and counted, either way. Default true.
        include_reasoning: Option<bool>,
        /// Refused: templates come with the model.
        #[serde(default)]
        #[schema(value_type = Option<String>)]
        chat_template: Presence,
        /// Not served yet, unless `tool_choice` is `none`.
        #[serde(default)]
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Presence,
        /// Only `none` is served yet (and `auto` without tools).
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        tool_choice: Presence,
        /// Not served yet.
        #[serde(default)]
        #[schema(value_type = Option<Vec<Object>>)]
        functions: Presence,
        /// Not served yet, unless `none`.
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        function_call: Presence,
        /// Not served.
        #[serde(default)]
        #[schema(value_type = Option<bool>)]
        echo: Presence,
        /// Only `["text"]` is served.
        #[schema(value_type = Option<Vec<String>>)]
        modalities: Option<Bounded<String, 8>>,
        /// Not served.
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        audio: Presence,
        /// Not served.
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        prediction: Presence,
        /// Not served.
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        web_search_options: Presence,
        /// Not served.
        #[serde(default)]
        #[schema(value_type = Option<Vec<Object>>)]
        documents: Presence,
        /// Not served.
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        mm_processor_kwargs: Presence,
        /// Not served yet.
        #[serde(default)]
        #[schema(value_type = Option<i64>)]
        thinking_token_budget: Presence,
    }
}

/// One turn.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, PartialEq)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: Option<String>,
    /// Text, or parts of text.
    #[schema(value_type = Option<ContentSchema>)]
    pub content: Option<Content>,
    /// Who speaks, for templates that use it.
    pub name: Option<String>,
    /// Calls that the assistant made.
    #[schema(value_type = Option<Vec<ToolCall>>, max_items = 128)]
    pub tool_calls: Option<Bounded<ToolCall, { bounds::TOOL_CALLS }>>,
    /// Which call a `tool` message answers.
    pub tool_call_id: Option<String>,
    /// The assistant's reasoning, as an answer gave it; left out for templates that do not use it.
    pub reasoning: Option<String>,
    /// Older name of `reasoning`.
    pub reasoning_content: Option<String>,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// As one text.
    Text(String),
    /// In parts.
    Parts(Vec<Part>),
}

/// Schema of a message's content.
#[derive(ToSchema)]
#[schema(as = MessageContent)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum ContentSchema {
    /// As one text.
    Text(String),
    /// In parts.
    Parts(Vec<Part>),
}

/// One part of a message.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, PartialEq)]
pub struct Part {
    /// Only `text` is served yet.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The text.
    pub text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of parts")
            }
            fn visit_str<E>(self, value: &str) -> Result<Content, E> {
                Ok(Content::Text(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Content, E> {
                Ok(Content::Text(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                let list = serde::de::value::SeqAccessDeserializer::new(seq);
                Bounded::<Part, { bounds::PARTS }>::deserialize(list).map(|parts| Content::Parts(parts.0))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A call that the assistant made.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct ToolCall {
    /// Its name in the conversation.
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// What was called.
    #[serde(default)]
    pub function: FunctionCall,
}

/// A function and its arguments.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct FunctionCall {
    /// The function.
    pub name: Option<String>,
    /// JSON text.
    pub arguments: Option<String>,
}

/// The whole answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[schema(as = ChatCompletion)]
#[serde(deny_unknown_fields)]
pub struct ChatResponse {
    /// Ours.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The served name that was asked for.
    pub model: String,
    /// In order of `index`.
    pub choices: Vec<ChatChoice>,
    /// Exact costs.
    pub usage: Usage,
    /// With `prompt_logprobs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// With `return_token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// One answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ChatChoice {
    /// From 0.
    pub index: u32,
    /// The answer.
    pub message: AnswerMessage,
    /// With `logprobs`.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<String>,
    /// The stop string or stop token id that ended it; null for the model's own end.
    pub stop_reason: Option<serde_json::Value>,
    /// With `return_token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// The assistant's turn.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct AnswerMessage {
    /// `assistant`.
    pub role: String,
    /// The text; null if nothing but reasoning was made.
    pub content: Option<String>,
    /// What the model thought before it, where the model marks that; else null.
    pub reasoning: Option<String>,
    /// The same, under its older name.
    pub reasoning_content: Option<String>,
    /// Always null.
    pub refusal: Option<String>,
}

/// Log-probabilities of the output.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ChatLogprobs {
    /// One for each token, those of the reasoning included.
    pub content: Vec<TokenLogprob>,
    /// Always null.
    pub refusal: Option<Vec<TokenLogprob>>,
}

/// One token's log-probability, and the most likely ones' beside it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct TokenLogprob {
    /// Its text; bytes that are no text are shown as U+FFFD.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f64,
    /// Its bytes.
    pub bytes: Option<Vec<u8>>,
    /// Most likely first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One of the most likely tokens.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f64,
    /// Its bytes.
    pub bytes: Option<Vec<u8>>,
}

/// One event of a stream.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[schema(as = ChatCompletionChunk)]
#[serde(deny_unknown_fields)]
pub struct ChatChunk {
    /// The same in every chunk.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: String,
    /// Unix seconds, the same in every chunk.
    pub created: u64,
    /// The served name that was asked for.
    pub model: String,
    /// One choice; none in the usage chunk.
    pub choices: Vec<ChatChunkChoice>,
    /// As `stream_options` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// In the first chunk of each choice, with `return_token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// A step of one choice.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ChatChunkChoice {
    /// Which choice.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// With `logprobs`.
    pub logprobs: Option<ChatLogprobs>,
    /// In the choice's last chunk.
    pub finish_reason: Option<String>,
    /// In the choice's last chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<serde_json::Value>,
    /// With `return_token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What is new.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// `assistant`, in the choice's first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Reasoning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The same, under its older name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}
