//! Output of a choice that has not been sent yet.

use crate::format::logprobs::LogprobsBuffer;

/// Output that has not left yet.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Escaped for JSON.
    pub(crate) text: Vec<u8>,
    /// The same for the reasoning.
    pub(crate) reasoning: Vec<u8>,
    pub(crate) logprobs: LogprobsBuffer,
    pub(crate) token_ids: Vec<u32>,
}

impl Pending {
    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.reasoning.is_empty()
            && self.logprobs.is_empty()
            && self.token_ids.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.text.clear();
        self.reasoning.clear();
        self.logprobs.clear();
        self.token_ids.clear();
    }
}
