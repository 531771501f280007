//! What a loaded model answers with, and what its numbers mean.
//!
//! Owns normalisation of embeddings and the way from logits to a score, each in one place; it never sees a
//! request.

use mirai_engine::TokenId;

use crate::error::ApiError;

/// What a model is served for.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Task {
    /// Chats and completions.
    #[default]
    Generate,
    /// Embeddings.
    Embed(EmbedSpec),
    /// Scores of pairs of texts: rerankers and cross-encoders.
    Score(ScoreSpec),
}

/// An embedding model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbedSpec {
    /// Numbers of an embedding.
    pub width: u32,
    /// Whether its first numbers are an embedding by themselves (trained with Matryoshka representation
    /// learning), so that requests may ask for fewer `dimensions`.
    pub matryoshka: bool,
    /// Whether embeddings are scaled to length 1 unless a request says otherwise.
    pub normalize: bool,
}

/// A model that scores a document for a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoreSpec {
    /// How both become one prompt.
    pub pair: PairFormat,
    /// What its logits mean.
    pub rule: ScoreRule,
}

/// How a query and a document become one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PairFormat {
    /// Tokens around both, each encoded alone: what a tokenizer's post-processor does with a pair.
    /// XLM-RoBERTa: `<s> query </s></s> document </s>`.
    Tokens {
        /// Before the query.
        before: Vec<TokenId>,
        /// Between both.
        between: Vec<TokenId>,
        /// After the document.
        after: Vec<TokenId>,
    },
    /// Text around both, for models that were taught with a chat template. The names of special tokens count
    /// as such in `before` and `after` only, never in what clients send.
    Text {
        /// Before everything.
        before: String,
        /// Right before the query, encoded together with it.
        query: String,
        /// Between query and document, encoded together with both.
        document: String,
        /// After everything.
        after: String,
    },
}

/// From logits to a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreRule {
    /// The logistic function of the only logit.
    Sigmoid,
    /// The probability of one of two logits: with `[no, yes]`, index 1 is "yes".
    Softmax {
        /// The logit that speaks for the document: 0 or 1.
        index: usize,
    },
}

/// What a request wants of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Text,
    Embeddings,
    Scores,
}

impl Task {
    /// Refuses what this model cannot do, and says where it is served instead.
    pub(crate) fn check(&self, wanted: Wanted) -> Result<(), ApiError> {
        let text = match (self, wanted) {
            (Self::Generate, Wanted::Text)
            | (Self::Embed(_), Wanted::Embeddings)
            | (Self::Score(_), Wanted::Scores) => return Ok(()),
            (Self::Generate, _) => "this model generates text: POST /v1/chat/completions or /v1/completions",
            (Self::Embed(_), _) => "this model embeds texts: POST /v1/embeddings",
            (Self::Score(_), _) => "this model scores pairs of texts: POST /v1/rerank or /v1/score",
        };
        Err(ApiError::wrong_task(text).param("model"))
    }
}

/// The first `dimensions` numbers of an embedding, scaled to length 1 if asked for. Zeros stay zeros.
pub(crate) fn embedding(values: &[f32], dimensions: Option<u32>, normalize: bool) -> Vec<f32> {
    let count = dimensions.map_or(values.len(), |count| values.len().min(count as usize));
    let values = &values[..count];
    let length = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
    if !normalize || length == 0.0 {
        return values.to_vec();
    }
    values.iter().map(|&value| (f64::from(value) / length) as f32).collect()
}

impl ScoreRule {
    /// The score, from 0 to 1; or the logit behind it if `raw`. `None` if the model gives another number of
    /// logits than the rule is for.
    pub(crate) fn score(self, logits: &[f32], raw: bool) -> Option<f64> {
        let logit = match (self, logits) {
            (Self::Sigmoid, &[only]) => f64::from(only),
            // The softmax of two is the logistic function of their difference.
            (Self::Softmax { index: 0 }, &[own, other]) | (Self::Softmax { index: 1 }, &[other, own]) => {
                f64::from(own) - f64::from(other)
            }
            _ => return None,
        };
        Some(if raw { logit } else { 1.0 / (1.0 + (-logit).exp()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_summed_in_double_precision() {
        // 2^26 squares of 1e-3 beside 1: in f32 the small ones would vanish one by one.
        let mut values = vec![1e-3f32; 1 << 20];
        values[0] = 1.0;
        let scaled = embedding(&values, None, true);
        let length: f64 = scaled.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
        assert!(embedding(&[3e38, 3e38], None, true).iter().all(|v| (v - 0.5f32.sqrt()).abs() < 1e-6));
    }

    #[test]
    fn fewer_dimensions_are_scaled_anew() {
        assert_eq!(embedding(&[3.0, 4.0, 12.0], Some(2), true), [0.6, 0.8]);
        assert_eq!(embedding(&[3.0, 4.0, 12.0], Some(2), false), [3.0, 4.0]);
        assert_eq!(embedding(&[3.0, 4.0], None, false), [3.0, 4.0]);
        assert_eq!(embedding(&[0.0, 0.0], None, true), [0.0, 0.0]);
    }

    #[test]
    fn scores_are_probabilities() {
        assert_eq!(ScoreRule::Sigmoid.score(&[0.0], false), Some(0.5));
        assert_eq!(ScoreRule::Sigmoid.score(&[-3.5], true), Some(-3.5));
        assert_eq!(ScoreRule::Sigmoid.score(&[-1e38], false), Some(0.0));
        assert_eq!(ScoreRule::Sigmoid.score(&[1e38], false), Some(1.0));
        let yes = ScoreRule::Softmax { index: 1 };
        let (no, other) = (ScoreRule::Softmax { index: 0 }, [1.0, 3.0]);
        let probability = 3f64.exp() / (1f64.exp() + 3f64.exp());
        assert!(yes.score(&other, false).is_some_and(|score| (score - probability).abs() < 1e-12));
        assert!(no.score(&other, false).is_some_and(|score| (score - 1.0 + probability).abs() < 1e-12));
        assert_eq!(yes.score(&other, true), Some(2.0));
        for (rule, logits) in
            [(ScoreRule::Sigmoid, &other[..]), (yes, &other[..1]), (ScoreRule::Softmax { index: 2 }, &other)]
        {
            assert_eq!(rule.score(logits, false), None);
        }
    }
}
