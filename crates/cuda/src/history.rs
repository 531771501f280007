//! How a sequence draws, and what the host has seen of what it drew.
//!
//! Owns the edits of logits that follow from both. Never: the rows of a step.

use std::sync::Arc;

use mirai_engine::{SamplingParams, TokenId};

use crate::records::Edit;

/// One sequence's sampling parameters with the part of its history that the host needs.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) choice: u32,
    /// Last drawn tokens that the host has seen, at most `tail_len`.
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
        let tail_len = params.bad_words.iter().map(|word| word.len().saturating_sub(1)).max().unwrap_or(0);
        let tail = output[output.len().saturating_sub(tail_len)..].to_vec();
        Self { params, prompt, choice, tail, tail_len }
    }

    /// Records a drawn token.
    pub(crate) fn push(&mut self, token: TokenId) {
        if self.tail_len > 0 {
            if self.tail.len() == self.tail_len {
                self.tail.remove(0);
            }
            self.tail.push(token);
        }
    }

    /// Whether edits depend on tokens that were just drawn.
    pub(crate) fn follows_output(&self) -> bool {
        self.tail_len > 0
    }

    /// Whether the device counts its tokens.
    pub(crate) fn counts(&self) -> bool {
        let p = &*self.params;
        p.repetition_penalty != 1.0 || p.frequency_penalty != 0.0 || p.presence_penalty != 0.0
    }

    /// Adds the edits of the logits from which the token at `position` is drawn: at most one a token, what is forbidden
    /// stays so whatever its bias.
    pub(crate) fn edits(&self, position: u32, out: &mut Vec<Edit>) {
        let p = &*self.params;
        let first = out.len();
        let forbid = |token: TokenId| Edit { token, bias: f32::NEG_INFINITY };
        for word in &p.bad_words {
            if let Some((last, before)) = word.split_last()
                && self.tail.ends_with(before)
            {
                out.push(forbid(*last));
            }
        }
        let drawn = (position as usize).saturating_sub(self.prompt.len());
        if drawn < p.min_tokens as usize {
            out.extend(p.stop_token_ids.iter().copied().map(forbid));
        }
        // A bias alone makes nothing impossible.
        out.extend(p.logit_bias.iter().map(|&(token, bias)| Edit { token, bias: bias.max(f32::MIN) }));
        out[first..].sort_by_key(|edit| edit.token);
        let mut kept = first;
        for index in first..out.len() {
            let edit = out[index];
            if kept > first && out[kept - 1].token == edit.token {
                out[kept - 1].bias += edit.bias;
            } else {
                out[kept] = edit;
                kept += 1;
            }
        }
        out.truncate(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(params: SamplingParams, prompt: &[u32], output: &[u32]) -> History {
        History::new(Arc::new(params), prompt.into(), 3, output)
    }

    fn edits(history: &History, position: u32) -> Vec<(u32, f32)> {
        let mut out = Vec::new();
        history.edits(position, &mut out);
        out.iter().map(|e| (e.token, e.bias)).collect()
    }

    const OUT: f32 = f32::NEG_INFINITY;

    #[test]
    fn bad_words_forbid_their_last_token_after_the_ones_before() {
        let bad_words = vec![vec![3], vec![0, 1, 2], vec![1, 0]];
        let mut h = history(SamplingParams { bad_words, ..Default::default() }, &[0, 1], &[]);
        assert!(h.follows_output());
        assert_eq!(edits(&h, 2), [(3, OUT)]);
        h.push(0);
        assert_eq!(edits(&h, 3), [(3, OUT)]);
        h.push(1);
        assert_eq!(edits(&h, 4), [(0, OUT), (2, OUT), (3, OUT)]);
        (0..100).for_each(|token| h.push(token));
        assert_eq!(h.tail, [98, 99], "the tail is bounded");
        let single = history(SamplingParams { bad_words: vec![vec![3]], ..Default::default() }, &[], &[]);
        assert!(!single.follows_output());
    }

    #[test]
    fn a_token_has_one_edit_and_what_is_forbidden_stays_so() {
        let params = SamplingParams {
            stop_token_ids: vec![4, 9],
            min_tokens: 2,
            logit_bias: vec![(9, 5.0), (1, -2.0), (1, 0.5), (2, OUT)],
            ..Default::default()
        };
        let h = history(params, &[0; 5], &[]);
        assert_eq!(edits(&h, 5), [(1, -1.5), (2, f32::MIN), (4, OUT), (9, OUT)]);
        assert_eq!(edits(&h, 7), [(1, -1.5), (2, f32::MIN), (9, 5.0)]);
    }

    #[test]
    fn a_history_resumes_with_what_was_drawn() {
        let bad_words = vec![vec![7, 8, 1]];
        let h = history(SamplingParams { bad_words, ..Default::default() }, &[0], &[5, 7, 8]);
        assert_eq!(edits(&h, 4), [(1, OUT)]);
        for (params, counts) in [
            (SamplingParams::default(), false),
            (SamplingParams { repetition_penalty: 1.5, ..Default::default() }, true),
            (SamplingParams { presence_penalty: 0.5, ..Default::default() }, true),
            (SamplingParams { frequency_penalty: 0.5, ..Default::default() }, true),
        ] {
            assert_eq!(history(params, &[], &[]).counts(), counts);
        }
    }
}
