//! `POST /v1/completions`: body, answer, chunks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::common::{PromptLogprobs, Usage, generation_body};
use super::wire::{Presence, PromptInput};

generation_body! {
    /// Text to continue.
    #[schema(as = CompletionRequest)]
    CompletionRequest {
        /// Text, texts, token ids, or lists of token ids; at most 128 prompts.
        #[schema(value_type = PromptSchema)]
        prompt: Option<PromptInput>,
        /// Text after the gap to fill; only for models with fill-in-the-middle tokens.
        suffix: Option<String>,
        /// Put the prompt in front of the output. Default false. With `max_tokens` 0, nothing else.
        echo: Option<bool>,
        /// Log-probabilities, of this many of the most likely tokens beside each.
        #[schema(maximum = 20)]
        logprobs: Option<u32>,
        /// Only values up to `n` are served.
        best_of: Option<u32>,
        /// Let the tokenizer add its special tokens. Default true.
        add_special_tokens: Option<bool>,
        /// Not served: this endpoint renders no template.
        #[serde(default)]
        #[schema(value_type = Option<String>)]
        chat_template: Presence,
        /// Not served: this endpoint renders no template.
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Presence,
        /// Not served on this endpoint.
        #[serde(default)]
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Presence,
    }
}

/// Schema of `prompt`.
#[derive(ToSchema)]
#[schema(as = Prompt)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum PromptSchema {
    /// One text.
    Text(String),
    /// Several.
    Texts(Vec<String>),
    /// One prompt of token ids.
    Ids(Vec<u32>),
    /// Several.
    ManyIds(Vec<Vec<u32>>),
}

/// The whole answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[schema(as = Completion)]
#[serde(deny_unknown_fields)]
pub struct CompletionResponse {
    /// Ours.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The served name that was asked for.
    pub model: String,
    /// Prompt by prompt, `n` each.
    pub choices: Vec<CompletionChoice>,
    /// Exact costs.
    pub usage: Usage,
}

/// One event of a stream.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CompletionChunk {
    /// The same in every chunk.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Unix seconds, the same in every chunk.
    pub created: u64,
    /// The served name that was asked for.
    pub model: String,
    /// One choice; none in the usage chunk.
    pub choices: Vec<CompletionChoice>,
    /// As `stream_options` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One continuation, or a step of it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CompletionChoice {
    /// `prompt number * n + choice`.
    pub index: u32,
    /// The text.
    pub text: String,
    /// With `logprobs`.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`, at the end.
    pub finish_reason: Option<String>,
    /// The stop string or stop token id that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<serde_json::Value>,
    /// With `prompt_logprobs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// With `return_token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// With `return_token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// Four lists of equal length.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CompletionLogprobs {
    /// Where each token's text begins, in characters of prompt (if echoed) and output.
    pub text_offset: Vec<u32>,
    /// Natural logarithms; null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f64>>,
    /// Texts.
    pub tokens: Vec<String>,
    /// The most likely tokens at each place.
    pub top_logprobs: Vec<Option<std::collections::BTreeMap<String, f64>>>,
}
