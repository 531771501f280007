//! `GET /v1/models`, `/version` and the health endpoints: answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What is served.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// One for each served name.
    pub data: Vec<ModelCard>,
}

/// One served name.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct ModelCard {
    /// The name.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Unix seconds of the load.
    pub created: u64,
    /// `mirai`.
    pub owned_by: String,
    /// The canonical name.
    pub root: String,
    /// Always null: no adapter.
    pub parent: Option<String>,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
}

/// What is running.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct Version {
    /// Of the server.
    pub version: String,
}

/// What a probe found. A problem document (RFC 9457) where it is not healthy.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
pub struct Health {
    /// `ok`, or the state in one word.
    pub status: HealthStatus,
    /// Phase of the load, while loading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// How far the load is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// Whether the server is draining.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// RFC 9457: the kind of problem.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// RFC 9457: the same in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// RFC 9457: this case in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// RFC 9457 wants the HTTP status as a number in `status`; a healthy answer says `ok`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(untagged)]
pub enum HealthStatus {
    /// `ok`.
    Word(String),
    /// HTTP status of a problem.
    Code(u16),
}
