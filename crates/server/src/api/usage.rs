//! `GET /v1/organization/usage/completions`: the answer, in OpenAI's shape.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Buckets of time, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct UsagePage {
    /// `page`.
    pub object: String,
    /// The buckets, the earliest first; one without requests has no results.
    pub data: Vec<UsageBucket>,
    /// Whether there are buckets after these.
    pub has_more: bool,
    /// What to send as `page` to get them.
    pub next_page: Option<String>,
}

/// One bucket.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct UsageBucket {
    /// `bucket`.
    pub object: String,
    /// Unix seconds at which it begins.
    pub start_time: i64,
    /// Unix seconds at which it ends.
    pub end_time: i64,
    /// A sum for each group.
    pub results: Vec<UsageResult>,
}

/// Sums over requests that arrived in the bucket and have ended. A name is null unless `group_by` asks for it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct UsageResult {
    /// `organization.usage.completions.result`.
    pub object: String,
    /// Tokens of prompts, cached ones too.
    pub input_tokens: u64,
    /// Those of them that were not computed again.
    pub input_cached_tokens: u64,
    /// The others.
    pub input_uncached_tokens: u64,
    /// Tokens of answers.
    pub output_tokens: u64,
    /// Always 0: this server takes no audio.
    pub input_audio_tokens: u64,
    /// Always 0: this server makes no audio.
    pub output_audio_tokens: u64,
    /// Requests.
    pub num_model_requests: u64,
    /// The application.
    pub project_id: Option<String>,
    /// Always null: users are pseudonyms, and no dimension.
    pub user_id: Option<String>,
    /// The key's id, which is no secret.
    pub api_key_id: Option<String>,
    /// The served model.
    pub model: Option<String>,
    /// Always null: there are no batches.
    pub batch: Option<bool>,
}
