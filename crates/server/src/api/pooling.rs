//! `POST /v1/embeddings`, `/v1/rerank`, `/v2/rerank` and `/v1/score`: bodies and answers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::bounds;
use super::common::Impacts;
use super::wire::{Bounded, Metadata, Name, OneOrMany, PromptInput};

/// Texts to embed.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(as = EmbeddingRequest)]
pub struct EmbeddingRequest {
    /// A served name. Default: the first one.
    pub model: Option<String>,
    /// Text, texts, token ids, or lists of token ids.
    #[schema(value_type = InputSchema)]
    pub input: Option<PromptInput<{ bounds::ITEMS }>>,
    /// `float`, or `base64` of little-endian 32-bit floats. Default `float`.
    pub encoding_format: Option<String>,
    /// Keep the first numbers only and scale them anew; only for models that were trained for it.
    #[schema(minimum = 1)]
    pub dimensions: Option<u32>,
    /// Scale to length 1. Default: as the model's author says.
    pub normalize: Option<bool>,
    /// Keep the first tokens of longer texts, special tokens included; -1 for as many as the model takes.
    #[schema(minimum = -1)]
    pub truncate_prompt_tokens: Option<i64>,
    /// Cut longer texts to what the model takes: `true` or `"END"`. Default: refuse them.
    #[schema(value_type = Option<Truncate>)]
    pub truncate: Option<Truncate>,
    /// Let the tokenizer add its special tokens to texts. Default true.
    pub add_special_tokens: Option<bool>,
    /// On whose behalf; recorded as a pseudonym, if at all.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub user: Name,
    /// The same under its newer name.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub safety_identifier: Name,
    /// Texts by name. A gateway may name the application in it.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub metadata: Metadata,
}

/// Whether longer texts are cut.
#[derive(Clone, Debug, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(untagged)]
pub enum Truncate {
    /// `true`: at their end.
    Flag(bool),
    /// `NONE` or `END`.
    Word(String),
}

/// Schema of `input`.
#[derive(ToSchema)]
#[schema(as = EmbeddingInput)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum InputSchema {
    /// One text.
    Text(String),
    /// Several.
    Texts(Vec<String>),
    /// One text of token ids.
    Ids(Vec<u32>),
    /// Several.
    ManyIds(Vec<Vec<u32>>),
}

/// The embeddings, in the order of the input.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[schema(as = EmbeddingResponse)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingResponse {
    /// `list`.
    pub object: String,
    /// One for each input.
    pub data: Vec<Embedding>,
    /// The served name that was asked for.
    pub model: String,
    /// Exact costs.
    pub usage: PoolingUsage,
}

/// One embedding.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// `embedding`.
    pub object: String,
    /// Which input.
    pub index: u32,
    /// Its numbers.
    pub embedding: EmbeddingValues,
}

/// Numbers, as `encoding_format` asked for them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(untagged)]
pub enum EmbeddingValues {
    /// `float`.
    Floats(Vec<f32>),
    /// `base64`.
    Base64(String),
}

/// Exact token counts of a call that generates nothing.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct PoolingUsage {
    /// Of all items.
    pub prompt_tokens: u64,
    /// The same.
    pub total_tokens: u64,
    /// In the currency of the server's price list; only where the model has a price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// Only where the server knows its site, and the call's energy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub impacts: Option<Impacts>,
}

/// Documents to put in the order of their relevance.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(as = RerankRequest)]
pub struct RerankRequest {
    /// A served name. Default: the first one.
    pub model: Option<String>,
    /// What is looked for.
    pub query: Option<String>,
    /// Where it is looked for.
    #[schema(value_type = Vec<Document>, max_items = 2048)]
    pub documents: Option<Bounded<Document, { bounds::ITEMS }>>,
    /// Answer with the best only; 0 for all, which is the default.
    pub top_n: Option<u32>,
    /// Repeat the documents in the answer. Default true.
    pub return_documents: Option<bool>,
    /// `false`: answer with the logit instead of a number from 0 to 1. Default true.
    pub use_activation: Option<bool>,
    /// The opposite of `use_activation`.
    pub raw_scores: Option<bool>,
    /// Tokens of query, document and what is between; the end of longer documents is cut. -1 for as many as
    /// the model takes.
    #[schema(minimum = -1)]
    pub truncate_prompt_tokens: Option<i64>,
    /// Cut the end of longer documents: `true` or `"END"`. Default: refuse them.
    #[schema(value_type = Option<Truncate>)]
    pub truncate: Option<Truncate>,
    /// On whose behalf; recorded as a pseudonym, if at all.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub user: Name,
    /// The same under its newer name.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub safety_identifier: Name,
    /// Texts by name. A gateway may name the application in it.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub metadata: Metadata,
}

/// A document.
#[derive(Clone, Debug, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(untagged)]
pub enum Document {
    /// Its text.
    Text(String),
    /// The same, in an object; other fields are ignored.
    Object {
        /// Its text.
        text: String,
    },
}

impl Document {
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { text } => text,
        }
    }
}

/// The documents, most relevant first.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[schema(as = RerankResponse)]
#[serde(deny_unknown_fields)]
pub struct RerankResponse {
    /// Ours.
    pub id: String,
    /// The served name that was asked for.
    pub model: String,
    /// The best of them; equal ones in the order of the request.
    pub results: Vec<RerankResult>,
    /// Exact costs.
    pub usage: PoolingUsage,
}

/// One document's place.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RerankResult {
    /// Which of the documents.
    pub index: u32,
    /// From 0 to 1, unless the logit was asked for.
    pub relevance_score: f64,
    /// Unless `return_documents` is `false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<ReturnedDocument>,
}

/// A document, repeated.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(untagged)]
pub enum ReturnedDocument {
    /// As most clients expect it.
    Object {
        /// Its text.
        text: String,
    },
    /// With the server's setting `rerank_documents_as_text`.
    Text(String),
}

/// Pairs of texts to score: one with each of many, or one with one. Three pairs of names mean the same.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(as = ScoreRequest)]
pub struct ScoreRequest {
    /// A served name. Default: the first one.
    pub model: Option<String>,
    /// One text, or as many as the others.
    #[schema(value_type = Option<TextsSchema>)]
    pub text_1: Option<OneOrMany<{ bounds::ITEMS }>>,
    /// The others.
    #[schema(value_type = Option<TextsSchema>)]
    pub text_2: Option<OneOrMany<{ bounds::ITEMS }>>,
    /// Another name of `text_1`.
    #[schema(value_type = Option<TextsSchema>)]
    pub queries: Option<OneOrMany<{ bounds::ITEMS }>>,
    /// Another name of `text_2`.
    #[schema(value_type = Option<TextsSchema>)]
    pub documents: Option<OneOrMany<{ bounds::ITEMS }>>,
    /// Another name of `text_2`.
    #[schema(value_type = Option<TextsSchema>)]
    pub items: Option<OneOrMany<{ bounds::ITEMS }>>,
    /// `false`: answer with the logit instead of a number from 0 to 1. Default true.
    pub use_activation: Option<bool>,
    /// The opposite of `use_activation`.
    pub raw_scores: Option<bool>,
    /// See `RerankRequest`.
    #[schema(minimum = -1)]
    pub truncate_prompt_tokens: Option<i64>,
    /// See `RerankRequest`.
    #[schema(value_type = Option<Truncate>)]
    pub truncate: Option<Truncate>,
    /// On whose behalf; recorded as a pseudonym, if at all.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub user: Name,
    /// The same under its newer name.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub safety_identifier: Name,
    /// Texts by name. A gateway may name the application in it.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub metadata: Metadata,
}

/// Schema of the texts to score.
#[derive(ToSchema)]
#[schema(as = Texts)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum TextsSchema {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// The scores, in the order of the pairs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[schema(as = ScoreResponse)]
#[serde(deny_unknown_fields)]
pub struct ScoreResponse {
    /// Ours.
    pub id: String,
    /// `list`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// The served name that was asked for.
    pub model: String,
    /// One for each pair.
    pub data: Vec<Score>,
    /// Exact costs.
    pub usage: PoolingUsage,
}

/// One pair's score.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// Which pair.
    pub index: u32,
    /// `score`.
    pub object: String,
    /// From 0 to 1, unless the logit was asked for.
    pub score: f64,
}
