//! Which tokens are reasoning, where text is decided later than its tokens come.
//!
//! Owns the tokens whose text is still held back; no text.

use std::collections::VecDeque;

use super::Part;

/// Counts tokens by the part that their bytes turn out to belong to.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    /// Tokens with undecided bytes: where each ends, and whether it is counted already. Every one has at least one
    /// byte, so there are no more of them than bytes held back.
    waiting: VecDeque<(u64, bool)>,
    /// Bytes that have come.
    come: u64,
    /// Bytes that are decided.
    decided: u64,
    reasoning: u32,
}

impl Tally {
    /// A token of `bytes` bytes of text has come; one without text belongs to the part that is open.
    pub(super) fn token(&mut self, bytes: usize, open: Part) {
        if bytes > 0 {
            self.come += bytes as u64;
            self.waiting.push_back((self.come, false));
        } else if open == Part::Reasoning {
            self.reasoning += 1;
        }
    }

    /// Text has come of which every token is counted already (what is left of an unfinished character).
    pub(super) fn leftover(&mut self, bytes: usize) {
        if bytes > 0 {
            self.come += bytes as u64;
            self.waiting.push_back((self.come, true));
        }
    }

    /// The next `bytes` bytes are of this part, or of none.
    pub(super) fn decide(&mut self, bytes: usize, part: Option<Part>) {
        let from = self.decided;
        self.decided += bytes as u64;
        let mut begin = from;
        for (end, counted) in &mut self.waiting {
            if begin >= self.decided {
                break;
            }
            if part == Some(Part::Reasoning) && !*counted {
                *counted = true;
                self.reasoning += 1;
            }
            begin = *end;
        }
        while self.waiting.front().is_some_and(|(end, _)| *end <= self.decided) {
            self.waiting.pop_front();
        }
    }

    pub(super) fn reasoning(&self) -> u32 {
        self.reasoning
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_counts_once_if_any_of_its_bytes_is_reasoning() {
        let mut tally = Tally::default();
        tally.token(4, Part::Content);
        tally.token(3, Part::Content);
        tally.decide(2, None);
        assert_eq!(tally.reasoning(), 0);
        tally.decide(1, Some(Part::Reasoning));
        tally.decide(1, Some(Part::Reasoning));
        assert_eq!(tally.reasoning(), 1, "bytes three and four are of the same token");
        tally.decide(3, Some(Part::Content));
        assert_eq!((tally.reasoning(), tally.waiting.len()), (1, 0));
        tally.token(0, Part::Reasoning);
        tally.token(0, Part::Content);
        tally.leftover(3);
        tally.decide(3, Some(Part::Reasoning));
        assert_eq!(tally.reasoning(), 2);
    }
}
