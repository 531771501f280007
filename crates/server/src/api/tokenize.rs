//! `POST /tokenize` and `/detokenize`: bodies and answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::bounds;
use super::chat::Message;
use super::wire::{Bounded, Kwargs, Presence};

/// Text or a conversation to tokenize, exactly as generation would.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// A served name. Default: the first one.
    pub model: Option<String>,
    /// Text; or `messages`.
    pub prompt: Option<String>,
    /// Conversation; or `prompt`.
    #[schema(value_type = Option<Vec<Message>>, max_items = 2048)]
    pub messages: Option<Bounded<Message, { bounds::MESSAGES }>>,
    /// Let the tokenizer add its special tokens. Default: true for `prompt`, false for `messages`.
    pub add_special_tokens: Option<bool>,
    /// Let the template open the assistant's turn. Default true.
    pub add_generation_prompt: Option<bool>,
    /// Continue the last message. Default false.
    pub continue_final_message: Option<bool>,
    /// Add each token's text to the answer. Default false.
    pub return_token_strs: Option<bool>,
    /// Values for the template; only names that the server knows.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Kwargs>,
    /// Refused: templates come with the model.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub chat_template: Presence,
    /// Not served yet.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Presence,
}

/// Its tokens.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
    /// The ids.
    pub tokens: Vec<u32>,
    /// With `return_token_strs`.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens to turn into text.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// A served name. Default: the first one.
    pub model: Option<String>,
    /// The ids.
    #[schema(value_type = Vec<u32>)]
    pub tokens: Option<Bounded<u32, { bounds::PROMPT_TOKENS }>>,
}

/// Their text, special tokens included.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct DetokenizeResponse {
    /// The text.
    pub prompt: String,
}
