//! The OpenAPI 3.1 document, from the types of `api`.
//!
//! Owns the description of paths; schemas and bounds come from the types. The committed file is what is
//! served, and a test holds both together.

use serde_json::{Value, json};
use utoipa::OpenApi;

use crate::api::bounds;
use crate::api::chat::{ChatChunk, ChatRequest, ChatResponse};
use crate::api::common::ErrorResponse;
use crate::api::completions::{CompletionChunk, CompletionRequest, CompletionResponse};
use crate::api::models::{Health, ModelCard, ModelList, Version};
use crate::api::pooling::{
    EmbeddingRequest, EmbeddingResponse, RerankRequest, RerankResponse, ScoreRequest, ScoreResponse,
};
use crate::api::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
use crate::api::usage::UsagePage;
use crate::error::ERROR_TABLE;
use crate::routes::{Access, ROUTES, Target};

/// The committed document.
pub const COMMITTED: &str = include_str!("../openapi.json");

#[derive(OpenApi)]
#[openapi(components(schemas(
    ChatRequest,
    ChatResponse,
    ChatChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionChunk,
    EmbeddingRequest,
    EmbeddingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    UsagePage,
    ModelList,
    ModelCard,
    Version,
    Health,
    ErrorResponse,
)))]
struct Schemas;

/// What a route takes and gives, beside its row in the table.
struct Operation {
    summary: &'static str,
    request: Option<&'static str>,
    response: Option<&'static str>,
    /// Of a stream's events.
    chunk: Option<&'static str>,
}

fn operation(target: Target) -> Operation {
    let op = |summary, request, response, chunk| Operation { summary, request, response, chunk };
    match target {
        Target::Chat => op(
            "Continues a conversation.",
            Some("ChatCompletionRequest"),
            Some("ChatCompletion"),
            Some("ChatCompletionChunk"),
        ),
        Target::Completion => {
            op("Continues text.", Some("CompletionRequest"), Some("Completion"), Some("CompletionChunk"))
        }
        Target::Embeddings => op("Embeds texts.", Some("EmbeddingRequest"), Some("EmbeddingResponse"), None),
        Target::Rerank | Target::RerankV2 => op(
            "Puts documents in the order of their relevance for a query.",
            Some("RerankRequest"),
            Some("RerankResponse"),
            None,
        ),
        Target::Score => op("Scores pairs of texts.", Some("ScoreRequest"), Some("ScoreResponse"), None),
        Target::Models => {
            op("Lists the served names; 503 until the model is loaded.", None, Some("ModelList"), None)
        }
        Target::Model => op("Describes one served name.", None, Some("ModelCard"), None),
        Target::Tokenize => {
            op("Tokenizes text or a conversation.", Some("TokenizeRequest"), Some("TokenizeResponse"), None)
        }
        Target::Detokenize => {
            op("Turns tokens into text.", Some("DetokenizeRequest"), Some("DetokenizeResponse"), None)
        }
        Target::Usage => {
            op("Sums of requests that have ended, by buckets of time.", None, Some("UsagePage"), None)
        }
        Target::Version => op("Version of the server.", None, Some("Version"), None),
        Target::OpenApi => op("This document.", None, None, None),
        Target::Health => op("Alive: the same as /health/live.", None, Some("Health"), None),
        Target::HealthLive => op("Loaded, and the engine moves or is idle.", None, Some("Health"), None),
        Target::HealthReady => op("Alive, and taking requests.", None, Some("Health"), None),
        Target::HealthStartup => op("Loaded.", None, Some("Health"), None),
        Target::Metrics => op("Metrics in Prometheus' text format 0.0.4.", None, None, None),
        Target::AdminApplications => op("Applications, without secrets.", None, None, None),
        Target::AdminReload => op("Reads applications and secrets again.", None, None, None),
    }
}

/// Generates the document.
pub fn document() -> Value {
    let mut schemas = serde_json::to_value(Schemas::openapi()).unwrap_or_default();
    let schemas = &mut schemas["components"]["schemas"];
    // Bounds inside of unions, which the derive cannot express.
    for (name, variant, bound) in [
        ("Stop", 1, bounds::STOP),
        ("MessageContent", 1, bounds::PARTS),
        ("Prompt", 1, bounds::PROMPTS),
        ("Prompt", 3, bounds::PROMPTS),
        ("EmbeddingInput", 1, bounds::ITEMS),
        ("EmbeddingInput", 3, bounds::ITEMS),
        ("Texts", 1, bounds::ITEMS),
    ] {
        schemas[name]["oneOf"][variant]["maxItems"] = bound.into();
    }
    let mut paths = serde_json::Map::new();
    // Administrators' routes have a listener of their own, and no place in what clients read.
    for route in ROUTES.iter().filter(|route| !route.access.is_admin()) {
        let entry = paths.entry(route.name()).or_insert_with(|| json!({}));
        entry[route.method.to_lowercase()] = describe(route.target, route.access);
    }
    let codes: Vec<Value> = ERROR_TABLE
        .iter()
        .map(|(status, kind, code)| json!({"status": status, "type": kind, "code": code}))
        .collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mirai",
            "description": "OpenAI-compatible inference. Paths under /v1 answer without /v1 too.",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "x-errors": codes,
    })
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn describe(target: Target, access: Access) -> Value {
    let operation = operation(target);
    let mut ok = json!({"description": "Success."});
    match (target, operation.response) {
        (Target::Metrics, _) => ok["content"]["text/plain"]["schema"] = json!({"type": "string"}),
        (_, Some(name)) => ok["content"]["application/json"]["schema"] = reference(name),
        (_, None) => ok["content"]["application/json"]["schema"] = json!({"type": "object"}),
    }
    if let Some(name) = operation.chunk {
        ok["content"]["text/event-stream"]["schema"] = reference(name);
    }
    let error = |description: &str| {
        json!({"description": description,
               "content": {"application/json": {"schema": reference("ErrorResponse")}}})
    };
    let mut responses = serde_json::Map::new();
    responses.insert("200".to_owned(), ok);
    if access != Access::Open {
        responses.insert("401".to_owned(), error("No key, or a wrong one."));
    }
    if matches!(access, Access::Needs(_)) {
        responses.insert("403".to_owned(), error("The key may not do this."));
    }
    if operation.request.is_some() {
        responses
            .insert("400".to_owned(), error("A field is wrong, missing or not served; `param` names it."));
        responses.insert("404".to_owned(), error("This model is not served here."));
        responses.insert("408".to_owned(), error("The body came too slowly."));
        responses.insert("413".to_owned(), error("The body is too large."));
        responses.insert("415".to_owned(), error("The body is compressed, or not JSON."));
        let text = "A limit of the caller's application is reached; `Retry-After` says when to come back.";
        responses.insert("429".to_owned(), error(text));
    }
    match target {
        Target::Health | Target::HealthLive | Target::HealthReady | Target::HealthStartup => {
            let problem = json!({"description": "Not so; a problem document.",
                "content": {"application/problem+json": {"schema": reference("Health")}}});
            responses.insert("503".to_owned(), problem);
        }
        Target::Metrics | Target::Version | Target::OpenApi => {}
        Target::Model => {
            responses.insert("404".to_owned(), error("This model is not served here."));
            responses.insert("503".to_owned(), error("Loading; `Retry-After` says when to come back."));
        }
        _ => {
            let text = "Loading, saturated or draining; `Retry-After` says when to come back.";
            responses.insert("503".to_owned(), error(text));
        }
    }
    let mut value = json!({"summary": operation.summary, "responses": responses});
    if let Some(name) = operation.request {
        value["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": reference(name)}}});
    }
    if target == Target::Usage {
        value["parameters"] = usage_parameters();
        value["responses"]["400"] = error("A parameter is wrong, missing or not served; `param` names it.");
        value["responses"]["404"] = error("This server keeps no ledger.");
        value["responses"]["503"] = error("The ledger cannot be read now, or not in time.");
    }
    if target == Target::Model {
        value["parameters"] =
            json!([{"name": "model", "in": "path", "required": true, "schema": {"type": "string"}}]);
    }
    if access != Access::Open {
        value["security"] = json!([{"key": []}]);
    }
    value
}

fn usage_parameters() -> Value {
    let one = |name: &str, required: bool, schema: Value, text: &str| json!({"name": name, "in": "query", "required": required, "schema": schema, "description": text});
    let many = |name: &str, items: Value, text: &str| {
        one(name, false, json!({"type": "array", "items": items}), text)
    };
    let (integer, string) = (json!({"type": "integer", "minimum": 0}), json!({"type": "string"}));
    json!([
        one("start_time", true, integer.clone(), "Unix seconds; requests that arrived at it or later."),
        one(
            "end_time",
            false,
            integer.clone(),
            "Unix seconds; requests that arrived before it. Default: now."
        ),
        one(
            "bucket_width",
            false,
            json!({"type": "string", "enum": ["1m", "1h", "1d"], "default": "1d"}),
            "Width of a bucket; days begin at midnight UTC."
        ),
        one(
            "limit",
            false,
            json!({"type": "integer", "minimum": 1, "maximum": 1440}),
            "Buckets of a page: 7 of 31 for days, 24 of 168 for hours, 60 of 1440 for minutes."
        ),
        one("page", false, string.clone(), "`next_page` of the page before."),
        many(
            "group_by",
            json!({"type": "string", "enum": ["project_id", "api_key_id", "model"]}),
            "What results are kept apart by."
        ),
        many("project_ids", string.clone(), "Only these applications."),
        many("api_key_ids", string.clone(), "Only these keys, by their ids."),
        many("models", string, "Only these models."),
    ])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// `MIRAI_BLESS=1 cargo test -p mirai-server openapi` writes the file anew.
    #[test]
    fn committed_document_is_the_generated_one() {
        let mut text = serde_json::to_string_pretty(&document()).unwrap();
        text.push('\n');
        if std::env::var_os("MIRAI_BLESS").is_some() {
            std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"), &text).unwrap();
            return;
        }
        assert!(text == COMMITTED, "openapi.json is not what the types say; see this test's comment");
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(value: &Value, schemas: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                        let name = target.strip_prefix("#/components/schemas/").unwrap();
                        assert!(schemas.get(name).is_some(), "{name} is not defined");
                    }
                    map.values().for_each(|v| walk(v, schemas));
                }
                Value::Array(list) => list.iter().for_each(|v| walk(v, schemas)),
                _ => {}
            }
        }
        let document = document();
        walk(&document, &document["components"]["schemas"]);
        for route in ROUTES.iter().filter(|route| !route.access.is_admin()) {
            assert!(
                document["paths"][route.name()][route.method.to_lowercase()].is_object(),
                "{}",
                route.name()
            );
        }
    }

    #[test]
    fn published_bounds_are_the_ones_in_force() {
        let document = document();
        let chat = &document["components"]["schemas"]["ChatCompletionRequest"]["properties"];
        assert_eq!(chat["stop_token_ids"]["maxItems"], bounds::STOP_TOKEN_IDS);
        assert_eq!(chat["allowed_token_ids"]["maxItems"], bounds::ALLOWED_TOKEN_IDS);
        assert_eq!(chat["bad_words"]["maxItems"], bounds::BAD_WORDS);
        assert_eq!(chat["top_logprobs"]["maximum"], bounds::LOGPROBS);
        assert_eq!(chat["messages"]["maxItems"], bounds::MESSAGES);
        assert_eq!(chat["n"]["maximum"], 128);
        let rerank = &document["components"]["schemas"]["RerankRequest"]["properties"];
        assert_eq!(rerank["documents"]["maxItems"], bounds::ITEMS);
        assert_eq!(
            document["components"]["schemas"]["EmbeddingInput"]["oneOf"][1]["maxItems"],
            bounds::ITEMS
        );
        let stop = &document["components"]["schemas"]["Stop"]["oneOf"];
        assert!(stop.to_string().contains(&format!("\"maxItems\":{}", bounds::STOP)), "{stop}");
    }
}
