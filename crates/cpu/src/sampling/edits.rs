//! What a request changes in its logits: allowed ids, bad words, `min_tokens`, bias, and the three penalties.
//!
//! Owns the history that these need, kept only where a request uses it. Arithmetic is in double precision and
//! clamped to finite numbers, so that only a mask makes a token impossible.

use std::collections::HashMap;
use std::sync::Arc;

use mirai_engine::{SamplingParams, TokenId};

/// A token's past in one sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_prompt: bool,
    /// Occurrences in the output.
    count: u32,
}

/// Occurrences of tokens, for the penalties.
#[derive(Clone, Debug, Default)]
struct Counts {
    seen: HashMap<TokenId, Seen>,
}

/// One sequence's sampling parameters with the part of its history that they need.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) choice: u32,
    counts: Option<Counts>,
    /// Last drawn tokens, at most `tail_len`; a bad word of `n` tokens looks at the `n - 1` before it.
    tail: Vec<TokenId>,
    tail_len: usize,
}

impl History {
    /// Starts with a prompt and the tokens drawn before a preemption.
    pub(crate) fn new(
        params: Arc<SamplingParams>,
        prompt: Arc<[TokenId]>,
        choice: u32,
        output: &[TokenId],
    ) -> Self {
        let penalised = params.repetition_penalty != 1.0
            || params.frequency_penalty != 0.0
            || params.presence_penalty != 0.0;
        let mut counts = penalised.then(Counts::default);
        if let Some(counts) = &mut counts
            && params.repetition_penalty != 1.0
        {
            for &token in &*prompt {
                counts.seen.entry(token).or_default().in_prompt = true;
            }
        }
        let tail_len = params.bad_words.iter().map(|word| word.len().saturating_sub(1)).max().unwrap_or(0);
        let mut history =
            Self { params, prompt, choice, counts, tail: Vec::with_capacity(tail_len), tail_len };
        for &token in output {
            history.push(token);
        }
        history
    }

    /// Records a drawn token.
    pub(crate) fn push(&mut self, token: TokenId) {
        if let Some(counts) = &mut self.counts {
            counts.seen.entry(token).or_default().count += 1;
        }
        if self.tail_len > 0 {
            if self.tail.len() == self.tail_len {
                self.tail.remove(0);
            }
            self.tail.push(token);
        }
    }

    /// Whether [`History::edit`] would change anything at a position.
    pub(crate) fn edits(&self, position: u32) -> bool {
        let p = &*self.params;
        p.allowed_token_ids.is_some()
            || !p.bad_words.is_empty()
            || !p.logit_bias.is_empty()
            || self.counts.is_some()
            || (self.below_min_tokens(position) && !p.stop_token_ids.is_empty())
    }

    /// Edits the logits from which the token at `position` is drawn, in the order of the module
    /// [`super`](crate::sampling).
    ///
    /// # Panics
    /// An id is beyond the vocabulary: the server refuses such requests.
    pub(crate) fn edit(&self, position: u32, logits: &mut [f32]) {
        let p = &*self.params;
        if let Some(allowed) = &p.allowed_token_ids {
            keep_only(allowed, logits);
        }
        for word in &p.bad_words {
            if let Some((last, before)) = word.split_last()
                && self.tail.ends_with(before)
            {
                logits[*last as usize] = f32::NEG_INFINITY;
            }
        }
        if self.below_min_tokens(position) {
            for &stop in &p.stop_token_ids {
                // Ids of other models' stop tokens may come with `generation_config.json`.
                if let Some(logit) = logits.get_mut(stop as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        for &(token, bias) in &p.logit_bias {
            let logit = &mut logits[token as usize];
            *logit = adjusted(*logit, |x| x + f64::from(bias));
        }
        if let Some(counts) = &self.counts {
            counts.penalise(p, logits);
        }
    }

    fn below_min_tokens(&self, position: u32) -> bool {
        let drawn = (position as usize).saturating_sub(self.prompt.len());
        drawn < self.params.min_tokens as usize
    }
}

impl Counts {
    fn penalise(&self, p: &SamplingParams, logits: &mut [f32]) {
        let repetition = f64::from(p.repetition_penalty);
        let frequency = f64::from(p.frequency_penalty);
        let presence = f64::from(p.presence_penalty);
        // The order of the map does not matter: each token is edited once.
        for (&token, seen) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = adjusted(*logit, |x| {
                let x = if x > 0.0 { x / repetition } else { x * repetition };
                let once = if seen.count > 0 { presence } else { 0.0 };
                x - frequency * f64::from(seen.count) - once
            });
        }
    }
}

/// Applies `f` to a logit that is not masked; the result is finite again.
fn adjusted(logit: f32, f: impl Fn(f64) -> f64) -> f32 {
    if logit == f32::NEG_INFINITY {
        return logit;
    }
    f(f64::from(logit)).clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

/// Masks all but the given ids, which are sorted.
fn keep_only(allowed: &[TokenId], logits: &mut [f32]) {
    let mut next = 0;
    for &id in allowed {
        let id = id as usize;
        logits[next..id].fill(f32::NEG_INFINITY);
        next = id + 1;
    }
    logits[next..].fill(f32::NEG_INFINITY);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn history(params: SamplingParams, prompt: &[u32], output: &[u32]) -> History {
        History::new(Arc::new(params), prompt.into(), 0, output)
    }

    fn edited(history: &History, position: u32, logits: &[f32]) -> Vec<f32> {
        let mut logits = logits.to_vec();
        history.edit(position, &mut logits);
        logits
    }

    const OUT: f32 = f32::NEG_INFINITY;

    #[test]
    fn allowed_ids_mask_the_rest() {
        for (allowed, want) in [
            (vec![1, 3], vec![OUT, 2.0, OUT, 4.0]),
            (vec![0], vec![1.0, OUT, OUT, OUT]),
            (vec![], vec![OUT; 4]),
            (vec![0, 1, 2, 3], vec![1.0, 2.0, 3.0, 4.0]),
        ] {
            let h =
                history(SamplingParams { allowed_token_ids: Some(allowed), ..Default::default() }, &[0], &[]);
            assert!(h.edits(1));
            assert_eq!(edited(&h, 1, &[1.0, 2.0, 3.0, 4.0]), want);
        }
    }

    #[test]
    fn bad_words_forbid_their_last_token_after_the_ones_before() {
        let words = vec![vec![3], vec![0, 1, 2], vec![1, 0]];
        let params = SamplingParams { bad_words: words, ..Default::default() };
        let mut h = history(params, &[0, 1], &[]);
        // The prompt ends like the second word begins, but only drawn tokens count.
        assert_eq!(edited(&h, 2, &[1.0; 4]), [1.0, 1.0, 1.0, OUT]);
        h.push(0);
        assert_eq!(edited(&h, 3, &[1.0; 4]), [1.0, 1.0, 1.0, OUT]);
        h.push(1);
        assert_eq!(edited(&h, 4, &[1.0; 4]), [OUT, 1.0, OUT, OUT]);
        h.push(1);
        assert_eq!(edited(&h, 5, &[1.0; 4]), [OUT, 1.0, 1.0, OUT]);
        for token in 0..100 {
            h.push(token);
        }
        assert_eq!(h.tail, [98, 99], "the tail is bounded");
    }

    #[test]
    fn stop_tokens_are_impossible_before_min_tokens() {
        let params = SamplingParams { stop_token_ids: vec![1, 900], min_tokens: 2, ..Default::default() };
        let h = history(params, &[0; 5], &[]);
        assert_eq!(edited(&h, 5, &[1.0; 3]), [1.0, OUT, 1.0]);
        assert_eq!(edited(&h, 6, &[1.0; 3]), [1.0, OUT, 1.0]);
        assert_eq!(edited(&h, 7, &[1.0; 3]), [1.0; 3]);
        assert!(h.edits(6) && !h.edits(7));
    }

    #[test]
    fn penalties_follow_prompt_and_output() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..Default::default()
        };
        // Token 0 in the prompt alone, 1 drawn twice, 2 in both, 3 in neither.
        let h = history(params, &[0, 2, 2], &[1, 2, 1]);
        let want = [2.0, 1.0 - 1.0 - 0.25, -8.0 - 0.5 - 0.25, 4.0];
        assert_eq!(edited(&h, 6, &[4.0, 2.0, -4.0, 4.0]), want);
    }

    #[test]
    fn frequency_alone_ignores_the_prompt() {
        let params = SamplingParams { frequency_penalty: 1.0, ..Default::default() };
        let h = history(params, &[0, 0], &[1]);
        assert_eq!(edited(&h, 3, &[4.0, 4.0]), [4.0, 3.0]);
    }

    #[test]
    fn bias_comes_before_penalties_and_never_unmasks() {
        let params = SamplingParams {
            logit_bias: vec![(0, 3.0), (1, 100.0), (2, -1e38)],
            allowed_token_ids: Some(vec![0, 2]),
            repetition_penalty: 2.0,
            ..Default::default()
        };
        let h = history(params, &[0, 1, 2], &[]);
        let got = edited(&h, 3, &[1.0, 1.0, -3e38]);
        assert_eq!(got[0], 2.0);
        assert_eq!(got[1], OUT);
        assert_eq!(got[2], f32::MIN, "clamped, not infinite");
    }

    #[test]
    fn a_plain_request_edits_nothing() {
        let h = history(SamplingParams { min_tokens: 4, ..Default::default() }, &[0], &[]);
        assert!(!h.edits(1));
    }
}
