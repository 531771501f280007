//! The one place where embedding, rerank and score bodies are judged: each becomes one [`PoolingRequest`], or a
//! 400 that names the field.
//!
//! Owns ranges, truncation and the pairing of texts. What the numbers of the answer are made of is in `answer`.
//! Runs on worker threads.

pub(crate) mod answer;
mod base64;
mod tokens;

use std::mem::take;
use std::sync::Arc;

use crate::api::pooling::{EmbeddingRequest, RerankRequest, ScoreRequest, Truncate};
use crate::api::wire::{OneOrMany, PromptInput};
use crate::auth::Attribution;
use crate::error::ApiError;
use crate::rules::Rules;
use crate::task::{EmbedSpec, ScoreSpec, Task, Wanted};
use crate::validate::resolve_model;
use answer::{Shape, Style};
use tokens::{Pairs, Truncation};

/// A body, as parsed.
#[derive(Debug)]
pub(crate) enum Body {
    Embeddings(EmbeddingRequest),
    Rerank(RerankRequest),
    Score(ScoreRequest),
}

/// A call that can be served: what goes to the engine, and how its answer is written.
#[derive(Debug)]
pub(crate) struct PoolingRequest {
    /// The served name asked for.
    pub(crate) model: Arc<str>,
    /// Each is one request of the engine. At least one, each with at least one token.
    pub(crate) items: Vec<Arc<[u32]>>,
    pub(crate) shape: Shape,
    /// Whom it says that it is for.
    pub(crate) attribution: Attribution,
}

/// Judges a body.
///
/// # Errors
/// 400 naming the field, 404 for another model.
pub(crate) fn judge(mut body: Body, rules: Rules<'_>, style: Style) -> Result<PoolingRequest, ApiError> {
    let (user, safety_identifier, metadata) = match &mut body {
        Body::Embeddings(body) => (&mut body.user, &mut body.safety_identifier, &mut body.metadata),
        Body::Rerank(body) => (&mut body.user, &mut body.safety_identifier, &mut body.metadata),
        Body::Score(body) => (&mut body.user, &mut body.safety_identifier, &mut body.metadata),
    };
    let attribution = Attribution::of(take(user), take(safety_identifier), take(metadata));
    let (name, wanted) = match &body {
        Body::Embeddings(body) => (&body.model, Wanted::Embeddings),
        Body::Rerank(body) => (&body.model, Wanted::Scores),
        Body::Score(body) => (&body.model, Wanted::Scores),
    };
    let model = resolve_model(name.as_deref(), rules.model)?.clone();
    rules.model.task.check(wanted)?;
    let (items, shape) = match (body, &rules.model.task) {
        (Body::Embeddings(body), Task::Embed(spec)) => embeddings(body, spec, rules)?,
        (Body::Rerank(body), Task::Score(spec)) => rerank(body, spec, rules, style)?,
        (Body::Score(body), Task::Score(spec)) => score(body, spec, rules)?,
        _ => return Err(ApiError::internal("this request failed; others are not affected")),
    };
    Ok(PoolingRequest { model, items: items.into_iter().map(Arc::from).collect(), shape, attribution })
}

type Judged = (Vec<Vec<u32>>, Shape);

fn missing(name: &'static str) -> ApiError {
    ApiError::missing_field(format!("`{name}` is missing or empty")).param(name)
}

/// Between one and the limit.
fn check_count(name: &'static str, count: usize, rules: Rules<'_>) -> Result<(), ApiError> {
    let limit = rules.limits.max_items;
    match count {
        0 => Err(missing(name)),
        _ if count > limit => {
            let text = format!("`{name}` has {count} items, the limit is {limit}");
            Err(ApiError::invalid_value(text).param(name))
        }
        _ => Ok(()),
    }
}

fn embeddings(body: EmbeddingRequest, spec: &EmbedSpec, rules: Rules<'_>) -> Result<Judged, ApiError> {
    let base64 = match body.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            let text = "`encoding_format` must be `float` or `base64`";
            return Err(ApiError::invalid_value(text).param("encoding_format"));
        }
    };
    let dimensions = dimensions(body.dimensions, spec)?;
    let truncation = truncation(body.truncate_prompt_tokens, body.truncate, rules)?;
    let special = body.add_special_tokens != Some(false);
    let input = body.input.ok_or_else(|| missing("input"))?;
    check_count("input", input.len(), rules)?;
    let items = match input {
        PromptInput::Texts(texts) => tokens::texts(&texts, special, truncation, rules)?,
        PromptInput::Ids(lists) => tokens::id_lists(lists, truncation, rules)?,
    };
    let normalize = body.normalize.unwrap_or(spec.normalize);
    Ok((items, Shape::Embeddings { base64, dimensions, normalize, width: spec.width }))
}

/// All dimensions may be asked for of every model, fewer only of those that were trained for it.
fn dimensions(wanted: Option<u32>, spec: &EmbedSpec) -> Result<Option<u32>, ApiError> {
    let error = |text: String| Err(ApiError::invalid_value(text).param("dimensions"));
    match wanted {
        Some(0) => error("`dimensions` is 0, but must be at least 1".to_owned()),
        Some(count) if count > spec.width => {
            error(format!("`dimensions` is {count}, but this model has {}", spec.width))
        }
        Some(count) if count < spec.width && !spec.matryoshka => {
            error(format!("this model has {} dimensions and was not trained for fewer", spec.width))
        }
        other => Ok(other),
    }
}

/// What becomes of items that are too long. A limit of tokens that is named wins over a mere yes.
fn truncation(
    tokens: Option<i64>,
    truncate: Option<Truncate>,
    rules: Rules<'_>,
) -> Result<Truncation, ApiError> {
    let most = rules.model.max_model_len;
    let whole = match truncate {
        None | Some(Truncate::Flag(false)) => Truncation::Refuse,
        Some(Truncate::Flag(true)) => Truncation::To(most),
        Some(Truncate::Word(word)) => match word.as_str() {
            "NONE" => Truncation::Refuse,
            "END" => Truncation::To(most),
            "START" => {
                let text = "`truncate` at the start is not served";
                return Err(ApiError::unsupported(text).param("truncate"));
            }
            _ => {
                let text = "`truncate` must be a boolean, `NONE` or `END`";
                return Err(ApiError::invalid_value(text).param("truncate"));
            }
        },
    };
    match tokens {
        None => Ok(whole),
        Some(-1) => Ok(Truncation::To(most)),
        Some(count) => match u32::try_from(count) {
            Ok(count) if (1..=most).contains(&count) => Ok(Truncation::To(count)),
            _ => {
                let text = format!("`truncate_prompt_tokens` is {count}, but must be -1 or from 1 to {most}");
                Err(ApiError::invalid_value(text).param("truncate_prompt_tokens"))
            }
        },
    }
}

/// Whether logits are wanted instead of scores. Two names say the same, with opposite signs.
fn raw(use_activation: Option<bool>, raw_scores: Option<bool>) -> Result<bool, ApiError> {
    match (use_activation, raw_scores) {
        (Some(activation), Some(raw)) if activation == raw => {
            let text = "`use_activation` and `raw_scores` contradict each other";
            Err(ApiError::invalid_value(text).param("raw_scores"))
        }
        (activation, raw) => Ok(raw.unwrap_or(activation == Some(false))),
    }
}

fn rerank(body: RerankRequest, spec: &ScoreSpec, rules: Rules<'_>, style: Style) -> Result<Judged, ApiError> {
    let raw = raw(body.use_activation, body.raw_scores)?;
    let truncation = truncation(body.truncate_prompt_tokens, body.truncate, rules)?;
    let query = body.query.filter(|query| !query.is_empty()).ok_or_else(|| missing("query"))?;
    let documents = body.documents.ok_or_else(|| missing("documents"))?.0;
    check_count("documents", documents.len(), rules)?;
    let documents: Vec<String> =
        documents.into_iter().map(crate::api::pooling::Document::into_text).collect();
    let pairs = Pairs::new(&spec.pair, truncation, ("query", "documents"), rules)?;
    let items = pairs.one_with_each(&query, &documents)?;
    let top = body.top_n.filter(|&top| top > 0).map_or(documents.len(), |top| top as usize);
    let shown = (body.return_documents != Some(false)).then_some(documents);
    Ok((items, Shape::Rerank { rule: spec.rule, raw, top, documents: shown, style }))
}

/// The first of the alternative names that is there.
fn texts<const N: usize>(
    names: [(&'static str, Option<OneOrMany<{ crate::api::bounds::ITEMS }>>); N],
) -> Result<(&'static str, Vec<String>), ApiError> {
    let first = names[0].0;
    let mut given = names.into_iter().filter_map(|(name, texts)| texts.map(|texts| (name, texts.0)));
    let found = given.next().ok_or_else(|| missing(first))?;
    match given.next() {
        Some((other, _)) => {
            let text = format!("`{}` and `{other}` are names of the same field", found.0);
            Err(ApiError::invalid_value(text).param(other))
        }
        None => Ok(found),
    }
}

fn score(body: ScoreRequest, spec: &ScoreSpec, rules: Rules<'_>) -> Result<Judged, ApiError> {
    let raw = raw(body.use_activation, body.raw_scores)?;
    let truncation = truncation(body.truncate_prompt_tokens, body.truncate, rules)?;
    let (query, queries) = texts([("text_1", body.text_1), ("queries", body.queries)])?;
    let (document, documents) =
        texts([("text_2", body.text_2), ("documents", body.documents), ("items", body.items)])?;
    check_count(query, queries.len(), rules)?;
    check_count(document, documents.len(), rules)?;
    let pairs = Pairs::new(&spec.pair, truncation, (query, document), rules)?;
    let items = match queries.as_slice() {
        [only] => pairs.one_with_each(only, &documents)?,
        many if many.len() == documents.len() => pairs.each_with_its_own(many, &documents)?,
        many => {
            let text = format!(
                "`{query}` has {} texts and `{document}` {}: one with each, or as many as the others",
                many.len(),
                documents.len()
            );
            return Err(ApiError::invalid_value(text).param(query));
        }
    };
    Ok((items, Shape::Scores { rule: spec.rule, raw }))
}
