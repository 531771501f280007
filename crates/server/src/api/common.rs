//! What both generation endpoints understand, and the shapes their answers share.
//!
//! Owns the list of common fields, once; it never gives a default (`validate` does).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::wire::Presence;

/// Declares a generation body: its own fields, and after them every common one.
macro_rules! generation_body {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        #[derive(Clone, Debug, Default, serde::Deserialize, utoipa::ToSchema)]
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// A served name. Default: the first one.
            pub model: Option<String>,
            /// Send tokens as server-sent events while they are made. Default false.
            pub stream: Option<bool>,
            /// Only with `stream`.
            pub stream_options: Option<$crate::api::common::StreamOptions>,
            /// Choices for each prompt. Default 1.
            #[schema(minimum = 1, maximum = 128)]
            pub n: Option<u32>,
            /// Most output tokens of each choice. Default: what the context leaves. Prompt and cap together
            /// must fit into the context.
            pub max_tokens: Option<u32>,
            /// Fewest output tokens before a stop token. Default 0.
            pub min_tokens: Option<u32>,
            /// 0 is greedy. Default: the model's, else 1.
            #[schema(minimum = 0, maximum = 2)]
            pub temperature: Option<f64>,
            /// Nucleus, in (0, 1]. Default: the model's, else 1.
            #[schema(exclusive_minimum = 0, maximum = 1)]
            pub top_p: Option<f64>,
            /// Most likely tokens kept; 0 or -1 keeps all. Default: the model's, else all.
            #[schema(minimum = -1)]
            pub top_k: Option<i64>,
            /// Smallest probability kept, relative to the largest. Default: the model's, else 0.
            #[schema(minimum = 0, maximum = 1)]
            pub min_p: Option<f64>,
            /// Makes the drawn numbers repeatable. Default: drawn at random.
            pub seed: Option<i64>,
            /// Default 0.
            #[schema(minimum = -2, maximum = 2)]
            pub presence_penalty: Option<f64>,
            /// Default 0.
            #[schema(minimum = -2, maximum = 2)]
            pub frequency_penalty: Option<f64>,
            /// Default: the model's, else 1.
            #[schema(exclusive_minimum = 0, maximum = 10)]
            pub repetition_penalty: Option<f64>,
            /// Token id (as text) to a number in [-100, 100]; at most 1024 entries.
            #[schema(value_type = Option<std::collections::BTreeMap<String, f64>>)]
            pub logit_bias: Option<$crate::api::wire::LogitBias>,
            /// One stop string or up to 16; the output ends before the first that occurs.
            #[schema(value_type = Option<$crate::api::common::StopSchema>)]
            pub stop: Option<$crate::api::wire::OneOrMany>,
            /// Tokens that end the output, beside the model's own.
            #[schema(value_type = Option<Vec<u32>>, max_items = 1024)]
            pub stop_token_ids: Option<$crate::api::wire::Bounded<u32, { $crate::api::bounds::STOP_TOKEN_IDS }>>,
            /// Keep the stop string in the output. Default false.
            pub include_stop_str_in_output: Option<bool>,
            /// The model's own end does not end the output. Default false.
            pub ignore_eos: Option<bool>,
            /// Every other token is impossible.
            #[schema(value_type = Option<Vec<u32>>, max_items = 262144)]
            pub allowed_token_ids:
                Option<$crate::api::wire::Bounded<u32, { $crate::api::bounds::ALLOWED_TOKEN_IDS }>>,
            /// Words that must not occur.
            #[schema(value_type = Option<Vec<String>>, max_items = 128)]
            pub bad_words: Option<$crate::api::wire::Bounded<String, { $crate::api::bounds::BAD_WORDS }>>,
            /// Leave special tokens out of the text. Default true.
            pub skip_special_tokens: Option<bool>,
            /// Only `true` is served, and changes nothing for byte-level vocabularies.
            pub spaces_between_special_tokens: Option<bool>,
            /// Log-probabilities of the prompt's tokens, and of this many of the most likely beside each. Not
            /// with `stream`.
            #[schema(maximum = 20)]
            pub prompt_logprobs: Option<u32>,
            /// Add the token ids of prompt and output to the answer. Default false.
            pub return_token_ids: Option<bool>,
            /// In log-probabilities, write a token as `token_id:<id>`. Default false.
            pub return_tokens_as_token_ids: Option<bool>,
            /// Separates the prefix cache from that of other salts; at most 128 characters.
            #[schema(max_length = 128)]
            pub cache_salt: Option<String>,
            /// On whose behalf; recorded as a pseudonym, if at all.
            #[serde(default)]
            #[schema(value_type = Option<String>)]
            pub user: $crate::api::wire::Name,
            /// The same under its newer name.
            #[serde(default)]
            #[schema(value_type = Option<String>)]
            pub safety_identifier: $crate::api::wire::Name,
            /// Texts by name. A gateway may name the application in it.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub metadata: $crate::api::wire::Metadata,
            /// Only 0 is served: priorities are given by the server.
            #[serde(default)]
            #[schema(value_type = Option<i64>)]
            pub priority: $crate::api::wire::Presence,
            /// Only `{"type": "text"}` is served.
            pub response_format: Option<$crate::api::common::ResponseFormat>,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub structured_outputs: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub guided_json: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<String>)]
            pub guided_regex: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<Vec<String>>)]
            pub guided_choice: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<String>)]
            pub guided_grammar: $crate::api::wire::Presence,
            /// Not served.
            #[serde(default)]
            #[schema(value_type = Option<bool>)]
            pub use_beam_search: $crate::api::wire::Presence,
            /// Only 1 is served.
            #[serde(default)]
            #[schema(value_type = Option<f64>)]
            pub length_penalty: $crate::api::wire::Presence,
            /// Not served.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub logits_processors: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub lora_request: $crate::api::wire::Presence,
            /// Not served.
            #[serde(default)]
            #[schema(value_type = Option<String>)]
            pub prompt_embeds: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<i64>)]
            pub truncate_prompt_tokens: $crate::api::wire::Presence,
            /// Not served.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub kv_transfer_params: $crate::api::wire::Presence,
            /// Not served.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub vllm_xargs: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<Object>)]
            pub repetition_detection: $crate::api::wire::Presence,
            /// Not served yet.
            #[serde(default)]
            #[schema(value_type = Option<Vec<u32>>)]
            pub logprob_token_ids: $crate::api::wire::Presence,
        }

        impl $name {
            /// Moves the common fields out.
            #[allow(dead_code, reason = "the common fields themselves have no use for it")]
            pub(crate) fn take_common(&mut self) -> $crate::api::common::Common {
                $crate::api::common::generation_body!(@move self:
                    model stream stream_options n max_tokens min_tokens temperature top_p top_k min_p seed
                    presence_penalty frequency_penalty repetition_penalty logit_bias stop stop_token_ids
                    include_stop_str_in_output ignore_eos allowed_token_ids bad_words skip_special_tokens
                    spaces_between_special_tokens prompt_logprobs return_token_ids
                    return_tokens_as_token_ids cache_salt user safety_identifier metadata priority response_format structured_outputs
                    guided_json guided_regex guided_choice guided_grammar use_beam_search length_penalty
                    logits_processors lora_request prompt_embeds truncate_prompt_tokens kv_transfer_params
                    vllm_xargs repetition_detection logprob_token_ids)
            }
        }
    };
    (@move $self:ident: $($field:ident)*) => {
        $crate::api::common::Common { $($field: std::mem::take(&mut $self.$field),)* }
    };
}
pub(crate) use generation_body;

generation_body! {
    /// The fields that every generation endpoint has.
    Common {}
}

/// What a stream carries beside text.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema, PartialEq, Eq)]
pub struct StreamOptions {
    /// A last chunk with empty `choices` and the usage. Default false.
    pub include_usage: Option<bool>,
    /// The usage so far in every chunk. Default false.
    pub continuous_usage_stats: Option<bool>,
}

/// The kind of output asked for.
#[derive(Clone, Debug, Default, Deserialize, ToSchema, PartialEq)]
pub struct ResponseFormat {
    /// Only `text` is served yet.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Not served yet.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub json_schema: Presence,
}

/// Schema of `stop`.
#[derive(ToSchema)]
#[schema(as = Stop)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum StopSchema {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// Exact token counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Of all prompts.
    pub prompt_tokens: u64,
    /// Of all choices.
    pub completion_tokens: u64,
    /// Their sum.
    pub total_tokens: u64,
    /// Parts of `prompt_tokens`.
    pub prompt_tokens_details: PromptTokensDetails,
    /// Parts of `completion_tokens`.
    pub completion_tokens_details: CompletionTokensDetails,
    /// In the currency of the server's price list; only where the model has a price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// Only where the server knows its site, and the request's energy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub impacts: Option<Impacts>,
}

/// What an answer took from the world, as OpenGateLLM names it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Impacts {
    /// Energy at the site's meter.
    #[serde(rename = "kWh")]
    pub kwh: f64,
    /// What the grid emitted for it.
    #[serde(rename = "kgCO2eq")]
    pub kgco2eq: f64,
}

/// Parts of the prompt.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct PromptTokensDetails {
    /// Taken from the prefix cache.
    pub cached_tokens: u64,
}

/// Parts of the output.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CompletionTokensDetails {
    /// Spent on reasoning.
    pub reasoning_tokens: u64,
}

/// One of `prompt_logprobs`: by token id.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PromptLogprob {
    /// Natural logarithm of the probability.
    pub logprob: f64,
    /// Place in the order of probability, from 1.
    pub rank: u32,
    /// The token's text.
    pub decoded_token: String,
}

/// For each prompt token, its and the most likely tokens' log-probabilities by token id; `null` for the first.
pub type PromptLogprobs = Vec<Option<std::collections::BTreeMap<String, PromptLogprob>>>;

/// Every error looks like this.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ErrorResponse {
    /// The error.
    pub error: ErrorBody,
    /// The error's message once more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ErrorBody {
    /// For people.
    pub message: String,
    /// Coarse class.
    #[serde(rename = "type")]
    pub kind: String,
    /// Field at fault.
    pub param: Option<String>,
    /// For programs.
    pub code: String,
}
