//! From pooled numbers to an answer.
//!
//! Owns the shapes of the answers; scaling and scores come from `task`.

use std::time::{SystemTime, UNIX_EPOCH};

use super::base64;
use crate::api::pooling::{
    Embedding, EmbeddingResponse, EmbeddingValues, PoolingUsage, RerankResponse, RerankResult,
    ReturnedDocument, Score, ScoreResponse,
};
use mirai_ledger::Endpoint;

use crate::error::ApiError;
use crate::http::reply::Reply;
use crate::task::{ScoreRule, embedding};

/// What the answer of one call looks like.
#[derive(Debug)]
pub(crate) enum Shape {
    Embeddings {
        base64: bool,
        dimensions: Option<u32>,
        normalize: bool,
        /// Numbers that the model says it gives.
        width: u32,
    },
    Rerank {
        rule: ScoreRule,
        raw: bool,
        /// Most results.
        top: usize,
        /// If they are to be repeated.
        documents: Option<Vec<String>>,
        style: Style,
    },
    Scores {
        rule: ScoreRule,
        raw: bool,
    },
}

/// Bytes that JSON takes for a number of an embedding, and for a result beside its document.
const NUMBER_BYTES: usize = 12;
const RESULT_BYTES: usize = 64;

impl Shape {
    /// The kind of work, for the ledger.
    pub(crate) fn endpoint(&self) -> Endpoint {
        match self {
            Self::Embeddings { .. } => Endpoint::Embeddings,
            Self::Rerank { .. } => Endpoint::Rerank,
            Self::Scores { .. } => Endpoint::Score,
        }
    }

    /// Bytes of the request that the answer repeats.
    pub(crate) fn repeated_bytes(&self) -> usize {
        match self {
            Self::Rerank { documents: Some(documents), .. } => documents.iter().map(String::len).sum(),
            _ => 0,
        }
    }

    /// About how many bytes the answer to `values` has.
    pub(crate) fn answer_bytes(&self, values: &[Box<[f32]>]) -> usize {
        let each = match self {
            Self::Embeddings { .. } => values.first().map_or(0, |values| values.len() * NUMBER_BYTES),
            Self::Rerank { .. } | Self::Scores { .. } => 0,
        };
        self.repeated_bytes() + values.len() * (each + RESULT_BYTES)
    }
}

/// How documents are repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Objects,
    Texts,
}

/// What stands on an answer beside its numbers.
#[derive(Clone, Debug)]
pub(crate) struct Identity<'a> {
    /// Without a prefix.
    pub(crate) id: &'a str,
    pub(crate) model: &'a str,
    pub(crate) usage: PoolingUsage,
}

/// Another number of values than the model was loaded with: nothing that a client could mend.
fn unexpected(index: usize, count: usize) -> ApiError {
    tracing::error!(index, count, "the model pooled another number of values than it is served with");
    ApiError::internal("the model's answer has another form than it should")
}

/// Writes the answer of a call whose items gave `values`, in their order.
pub(crate) fn write(shape: Shape, values: &[Box<[f32]>], identity: Identity<'_>) -> Result<Reply, ApiError> {
    let Identity { id, model, usage } = identity;
    let model = model.to_owned();
    match shape {
        Shape::Embeddings { base64, dimensions, normalize, width } => {
            let one = |(index, values): (usize, &[f32])| {
                if values.len() != width as usize {
                    return Err(unexpected(index, values.len()));
                }
                let values = embedding(values, dimensions, normalize);
                let embedding = if base64 {
                    EmbeddingValues::Base64(base64::floats(&values))
                } else {
                    EmbeddingValues::Floats(values)
                };
                Ok(Embedding { object: "embedding".to_owned(), index: index as u32, embedding })
            };
            let data =
                values.iter().map(AsRef::as_ref).enumerate().map(one).collect::<Result<Vec<_>, _>>()?;
            Ok(Reply::json(&EmbeddingResponse { object: "list".to_owned(), data, model, usage }))
        }
        Shape::Rerank { rule, raw, top, documents, style } => {
            let scores = scores(rule, raw, values)?;
            let results = ranked(&scores, top, documents, style);
            Ok(Reply::json(&RerankResponse { id: format!("rerank-{id}"), model, results, usage }))
        }
        Shape::Scores { rule, raw } => {
            let data = scores(rule, raw, values)?
                .into_iter()
                .zip(0..)
                .map(|(score, index)| Score { index, object: "score".to_owned(), score })
                .collect();
            let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let (id, object) = (format!("score-{id}"), "list".to_owned());
            Ok(Reply::json(&ScoreResponse { id, object, created, model, data, usage }))
        }
    }
}

fn scores(rule: ScoreRule, raw: bool, values: &[Box<[f32]>]) -> Result<Vec<f64>, ApiError> {
    let one = |(index, logits): (usize, &[f32])| {
        rule.score(logits, raw).ok_or_else(|| unexpected(index, logits.len()))
    };
    values.iter().map(AsRef::as_ref).enumerate().map(one).collect()
}

/// The best first; of equal ones the earlier.
fn ranked(scores: &[f64], top: usize, documents: Option<Vec<String>>, style: Style) -> Vec<RerankResult> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut documents = documents;
    let mut text = |index: usize| {
        let text = documents.as_mut()?.get_mut(index).map(std::mem::take)?;
        Some(match style {
            Style::Objects => ReturnedDocument::Object { text },
            Style::Texts => ReturnedDocument::Text(text),
        })
    };
    let result = |index: usize| RerankResult {
        index: index as u32,
        relevance_score: scores[index],
        document: text(index),
    };
    order.into_iter().take(top).map(result).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::http::reply::Content;

    #[test]
    fn equal_scores_keep_their_order() {
        let results = ranked(&[0.5, 0.9, 0.5, 0.1], 3, None, Style::Objects);
        let order: Vec<u32> = results.iter().map(|result| result.index).collect();
        assert_eq!(order, [1, 0, 2]);
        assert!(results.iter().all(|result| result.document.is_none()));
    }

    #[test]
    fn the_size_of_an_answer_is_known_before_it_is_written() {
        let identity = || Identity { id: "x", model: "m", usage: PoolingUsage::default() };
        let rerank = |documents| Shape::Rerank {
            rule: ScoreRule::Sigmoid,
            raw: false,
            top: 64,
            documents,
            style: Style::Objects,
        };
        let embeddings =
            |base64| Shape::Embeddings { base64, dimensions: None, normalize: true, width: 1024 };
        let vector: Box<[f32]> = (0..1024).map(|i| (i as f32).sin()).collect();
        let (vectors, logits) = (vec![vector; 8], vec![Box::from([0.3f32]); 64]);
        for (name, shape, values) in [
            ("documents", rerank(Some(vec!["document ".repeat(1000); 64])), &logits),
            ("scores", rerank(None), &logits),
            ("floats", embeddings(false), &vectors),
            ("base64", embeddings(true), &vectors),
        ] {
            let guess = shape.answer_bytes(values);
            let Content::Bytes(bytes) = write(shape, values, identity()).unwrap().content else {
                panic!("answers are whole")
            };
            assert!((bytes.len() / 2..3 * bytes.len()).contains(&guess), "{name}: {guess}, {}", bytes.len());
        }
    }

    #[test]
    fn an_answer_of_another_form_is_our_fault() {
        let identity = || Identity { id: "x", model: "m", usage: PoolingUsage::default() };
        let shape = Shape::Embeddings { base64: false, dimensions: None, normalize: true, width: 3 };
        let values: [Box<[f32]>; 1] = [Box::new([1.0, 2.0])];
        assert_eq!(write(shape, &values, identity()).unwrap_err().status, 500);
        let shape = Shape::Scores { rule: ScoreRule::Sigmoid, raw: false };
        assert_eq!(write(shape, &values, identity()).unwrap_err().status, 500);
    }
}
