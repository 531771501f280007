//! From texts and pairs of texts to token ids that fit.
//!
//! Owns where a text is cut. What a client writes is never taken for a special token.

use crate::error::ApiError;
use crate::prompt::encoding;
use crate::rules::Rules;
use crate::task::PairFormat;

/// What becomes of items that are too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Truncation {
    /// They are refused.
    Refuse,
    /// Their end is cut so that so many tokens are left, special ones included.
    To(u32),
}

impl Truncation {
    /// Most tokens of an item, and whether longer ones are cut.
    fn limit(self, rules: Rules<'_>) -> (usize, bool) {
        match self {
            Self::Refuse => (rules.model.max_model_len as usize, false),
            Self::To(most) => (most as usize, true),
        }
    }
}

/// Tokens that the items of one call may still have together. Counted while items are made, so that no more is
/// ever held than may be computed. A call of one item is limited by the model alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// `None`: no limit.
    left: Option<usize>,
    limit: usize,
    items: usize,
    /// Field that the items come from.
    param: &'static str,
}

impl Budget {
    pub(super) fn new(param: &'static str, items: usize, rules: Rules<'_>) -> Self {
        let limit = rules.limits.max_item_tokens;
        Self { left: (items > 1).then_some(limit), limit, items, param }
    }

    /// Takes `tokens` of it.
    fn take(&mut self, tokens: usize) -> Result<(), ApiError> {
        if let Some(left) = self.left {
            self.left = Some(left.checked_sub(tokens).ok_or_else(|| self.exceeded())?);
        }
        Ok(())
    }

    /// Refuses items that cannot fit, because each has at least so many tokens.
    fn check_least(&self, tokens: usize) -> Result<(), ApiError> {
        match self.left {
            Some(left) if tokens.saturating_mul(self.items) > left => Err(self.exceeded()),
            _ => Ok(()),
        }
    }

    fn exceeded(&self) -> ApiError {
        let Self { limit, items, param, .. } = *self;
        let text =
            format!("the {items} items of `{param}` have more than {limit} tokens, which is the limit");
        ApiError::invalid_value(text).param(param)
    }
}

/// Texts alone, each between the special tokens that the tokenizer adds.
pub(super) fn texts(
    texts: &[String],
    special: bool,
    truncation: Truncation,
    rules: Rules<'_>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let one = |(index, item): (usize, &String)| text(index, item, special, truncation, rules);
    within(Budget::new("input", texts.len(), rules), texts.iter().enumerate().map(one))
}

/// Token ids as a client sent them.
pub(super) fn id_lists(
    lists: Vec<Vec<u32>>,
    truncation: Truncation,
    rules: Rules<'_>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let budget = Budget::new("input", lists.len(), rules);
    within(budget, lists.into_iter().enumerate().map(|(index, list)| ids(index, list, truncation, rules)))
}

/// The items one after the other, as long as they stay within the budget.
fn within(
    mut budget: Budget,
    items: impl Iterator<Item = Result<Vec<u32>, ApiError>>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    items.map(|item| item.and_then(|ids| budget.take(ids.len()).map(|()| ids))).collect()
}

/// A text alone, between the special tokens that the tokenizer adds.
fn text(
    index: usize,
    text: &str,
    special: bool,
    truncation: Truncation,
    rules: Rules<'_>,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = &rules.model.tokenizer;
    let encode = |text: &str| tokenizer.encode(text, special, false);
    let (limit, cuts) = truncation.limit(rules);
    let text = if cuts { beginning(text, rules) } else { text };
    let mut ids = encode(text).map_err(|error| at(index, encoding("input", &error)))?;
    if cuts && ids.len() > limit {
        let around = encode("").map_err(|error| at(index, encoding("input", &error)))?;
        ids = cut(ids, &around, limit).ok_or_else(|| {
            let text = format!("{limit} tokens leave no room beside {} special ones", around.len());
            ApiError::invalid_value(text).param("truncate_prompt_tokens")
        })?;
    }
    check(index, "input", ids, rules)
}

/// Token ids of one item.
fn ids(
    index: usize,
    mut ids: Vec<u32>,
    truncation: Truncation,
    rules: Rules<'_>,
) -> Result<Vec<u32>, ApiError> {
    if let (limit, true) = truncation.limit(rules) {
        ids.truncate(limit);
    }
    check(index, "input", ids, rules)
}

/// As much of a text as the tokenizer takes: what is behind it would be cut anyway, in tokens.
fn beginning<'t>(text: &'t str, rules: Rules<'_>) -> &'t str {
    &text[..text.floor_char_boundary(rules.model.tokenizer.max_input_bytes())]
}

/// Cuts what lies between the special tokens `around` a text, of which some come before it and the rest after.
/// `None` if they alone fill the limit.
fn cut(mut ids: Vec<u32>, around: &[u32], limit: usize) -> Option<Vec<u32>> {
    let before = (0..=around.len())
        .rev()
        .find(|&split| ids.starts_with(&around[..split]) && ids.ends_with(&around[split..]))
        .unwrap_or(0);
    let after = &around[before..];
    if limit <= around.len() {
        return None;
    }
    ids.truncate(limit - after.len());
    ids.extend_from_slice(after);
    Some(ids)
}

/// Names the item at fault.
fn at(index: usize, mut error: ApiError) -> ApiError {
    if let Some(param) = &error.param {
        let item = format!("{param}[{index}]");
        error.message = error.message.replacen(&format!("`{param}`"), &format!("`{item}`"), 1);
        error.param = Some(item);
    }
    error
}

/// What the engine could not take is refused before anything is handed to it.
fn check(index: usize, param: &'static str, ids: Vec<u32>, rules: Rules<'_>) -> Result<Vec<u32>, ApiError> {
    let (most, vocab) = (rules.model.max_model_len as usize, rules.model.vocab);
    let error = if ids.is_empty() {
        ApiError::invalid_value(format!("`{param}` has no tokens"))
    } else if ids.len() > most {
        let text =
            format!("`{param}` has {} tokens, this model takes {most}; `truncate` cuts them", ids.len());
        ApiError::context_length(text)
    } else if let Some(id) = ids.iter().find(|id| **id >= vocab) {
        let last = vocab.saturating_sub(1);
        ApiError::invalid_value(format!("`{param}` has token {id}, but ids end at {last}"))
    } else {
        return Ok(ids);
    };
    Err(at(index, error.param(param)))
}

/// Makes prompts of pairs.
pub(super) struct Pairs<'a> {
    format: &'a PairFormat,
    before: Vec<u32>,
    after: Vec<u32>,
    limit: usize,
    cuts: bool,
    /// Fields that query and document come from.
    params: (&'static str, &'static str),
    rules: Rules<'a>,
}

impl<'a> Pairs<'a> {
    pub(super) fn new(
        format: &'a PairFormat,
        truncation: Truncation,
        params: (&'static str, &'static str),
        rules: Rules<'a>,
    ) -> Result<Self, ApiError> {
        let (before, after) = match format {
            PairFormat::Tokens { before, after, .. } => (before.clone(), after.clone()),
            PairFormat::Text { before, after, .. } => {
                let encode = |text: &str| {
                    let ids = rules.model.tokenizer.encode(text, false, true);
                    ids.map_err(|_| ApiError::internal("this model's prompt cannot be tokenized"))
                };
                (encode(before)?, encode(after)?)
            }
        };
        let (limit, cuts) = truncation.limit(rules);
        Ok(Self { format, before, after, limit, cuts, params, rules })
    }

    fn budget(&self, documents: &[String]) -> Budget {
        Budget::new(self.params.1, documents.len(), self.rules)
    }

    /// The prompts of one query with each document.
    pub(super) fn one_with_each(&self, query: &str, documents: &[String]) -> Result<Vec<Vec<u32>>, ApiError> {
        let head = self.head(0, query)?;
        let budget = self.budget(documents);
        // A short body can ask for a long query over and over: that is seen before the first document is.
        budget.check_least(head.len() + self.after.len())?;
        let pair = |(index, document): (usize, &String)| self.pair(index, query, &head, document);
        within(budget, documents.iter().enumerate().map(pair))
    }

    /// The prompts of each query with the document of the same number.
    pub(super) fn each_with_its_own(
        &self,
        queries: &[String],
        documents: &[String],
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let pair = |(index, (query, document)): (usize, (&String, &String))| {
            let head = self.head(index, query)?;
            self.pair(index, query, &head, document)
        };
        within(self.budget(documents), queries.iter().zip(documents).enumerate().map(pair))
    }

    fn encode(&self, index: usize, param: &'static str, text: &str) -> Result<Vec<u32>, ApiError> {
        let ids = self.rules.model.tokenizer.encode(text, false, false);
        ids.map_err(|error| at(index, encoding(param, &error)))
    }

    /// The beginning of a text that ends in a document, if documents are cut.
    fn cut<'t>(&self, text: &'t str) -> &'t str {
        if self.cuts { beginning(text, self.rules) } else { text }
    }

    /// Everything before the document, which is never cut. Where query and document are encoded together, the
    /// tokens at their seam may differ; only the length of this is used then.
    fn head(&self, index: usize, query: &str) -> Result<Vec<u32>, ApiError> {
        let param = self.params.0;
        let mut head = self.before.clone();
        match self.format {
            PairFormat::Tokens { between, .. } => {
                head.extend(self.encode(index, param, query)?);
                head.extend_from_slice(between);
            }
            PairFormat::Text { query: label, document, .. } => {
                head.extend(self.encode(index, param, &format!("{label}{query}{document}"))?);
            }
        }
        if head.len() + self.after.len() >= self.limit {
            let text = format!(
                "`{param}` has {} tokens with what the model needs around it, the limit of {} leaves no room \
                 for a document",
                head.len() + self.after.len(),
                self.limit
            );
            return Err(at(index, ApiError::context_length(text).param(param)));
        }
        Ok(head)
    }

    fn pair(&self, index: usize, query: &str, head: &[u32], document: &str) -> Result<Vec<u32>, ApiError> {
        let param = self.params.1;
        let mut ids = match self.format {
            PairFormat::Tokens { .. } => {
                let mut ids = head.to_vec();
                ids.extend(self.encode(index, param, self.cut(document))?);
                ids
            }
            PairFormat::Text { query: query_label, document: document_label, .. } => {
                let mut ids = self.before.clone();
                let text = format!("{query_label}{query}{document_label}{document}");
                ids.extend(self.encode(index, param, self.cut(&text))?);
                ids
            }
        };
        if self.cuts {
            ids.truncate(self.limit - self.after.len());
        }
        ids.extend_from_slice(&self.after);
        check(index, param, ids, self.rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_survive_the_cut() {
        assert_eq!(cut(vec![0, 7, 8, 9, 2], &[0, 2], 4), Some(vec![0, 7, 8, 2]));
        assert_eq!(cut(vec![0, 7, 8, 9, 2], &[0, 2], 3), Some(vec![0, 7, 2]));
        assert_eq!(cut(vec![0, 7, 8, 9, 2], &[0, 2], 2), None);
        assert_eq!(cut(vec![7, 8, 9, 2], &[2], 2), Some(vec![7, 2]));
        assert_eq!(cut(vec![0, 7, 8, 9], &[0], 2), Some(vec![0, 7]));
        assert_eq!(cut(vec![7, 8, 9], &[], 1), Some(vec![7]));
        // The same token on both sides.
        assert_eq!(cut(vec![1, 7, 8, 1], &[1, 1], 3), Some(vec![1, 7, 1]));
    }

    #[test]
    fn items_at_fault_are_numbered() {
        let error = at(3, ApiError::invalid_value("`input` has no tokens").param("input"));
        assert_eq!(error.param.as_deref(), Some("input[3]"));
        assert_eq!(error.message, "`input[3]` has no tokens");
    }
}
