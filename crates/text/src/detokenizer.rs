//! Token ids in, text out, one id at a time.
//!
//! Owns the state that a decoder needs between two tokens: an unfinished character and whether the
//! text has begun. Never decodes a token twice, so a stream of n tokens costs O(bytes).

use crate::decode_rule::Leading;
use crate::utf8_stream::Utf8Stream;
use crate::{TokenId, Tokenizer, TokenizerError};

/// Incremental form of [`Tokenizer::decode`].
///
/// All text returned by [`push`](Self::push) and [`finish`](Self::finish), concatenated, is
/// `decode(prompt ++ pushed)` without the text of the prompt. A character whose first bytes lie in
/// the prompt is returned when it is complete; where it never completes, its U+FFFD belongs to the
/// prompt.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    utf8: Utf8Stream,
    leading: Leading,
    text: String,
}

impl Detokenizer {
    /// Starts after a prompt of which `prompt_tail` is the end.
    ///
    /// The tail decides two things: whether the text has begun (some tokenizers drop the first
    /// space of a text) and whether a character is half written. The last four ids are enough,
    /// unless all of them are special; an empty slice means that the text begins here.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary.
    pub fn new(
        tokenizer: &Tokenizer,
        prompt_tail: &[TokenId],
        skip_special: bool,
    ) -> Result<Self, TokenizerError> {
        let mut this = Self {
            tokenizer: tokenizer.clone(),
            skip_special,
            utf8: Utf8Stream::default(),
            leading: tokenizer.leading(),
            text: String::new(),
        };
        for &id in prompt_tail {
            this.push(id)?;
        }
        this.utf8.end_of_prompt();
        this.text.clear();
        Ok(this)
    }

    /// Adds one id and returns the characters that it completes (often all of its text, sometimes
    /// nothing).
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id outside the vocabulary; the state is unchanged.
    pub fn push(&mut self, id: TokenId) -> Result<&str, TokenizerError> {
        self.text.clear();
        let token = self.tokenizer.entry(id)?;
        if token.special && self.skip_special {
            return Ok("");
        }
        if self.leading.is_done() {
            match token.text {
                Some(text) => self.utf8.push_str(text, &mut self.text),
                None => self.utf8.push(token.bytes, &mut self.text),
            }
        } else {
            let bytes = self.leading.apply(token.bytes);
            self.utf8.push(&bytes, &mut self.text);
        }
        Ok(&self.text)
    }

    /// Ends the stream and returns what was held back: U+FFFD for an unfinished character, else
    /// nothing. Calling it again returns nothing.
    pub fn finish(&mut self) -> String {
        let mut rest = String::new();
        self.utf8.finish(&mut rest);
        rest
    }
}
