//! Bytes in, whole characters out: the streaming form of [`String::from_utf8_lossy`].
//!
//! Owns at most three bytes of an unfinished character. Concatenated output equals the lossy
//! conversion of the concatenated input, whatever the chunking.

use std::str::from_utf8;

/// Streaming UTF-8 decoder with U+FFFD for each maximal invalid part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Utf8Stream {
    /// Bytes that may still become a character; empty or a proper prefix of one.
    pending: Vec<u8>,
    /// The pending bytes began in the prompt, whose own text already shows their U+FFFD.
    pending_is_prompt: bool,
}

impl Utf8Stream {
    /// Appends all characters that `bytes` completes to `out`.
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.pending.is_empty() {
            let rest = decode_prefix(bytes, out, false);
            self.pending.extend_from_slice(rest);
            return;
        }
        let begin = out.len();
        self.pending.extend_from_slice(bytes);
        let pending = std::mem::take(&mut self.pending);
        let rest = decode_prefix(&pending, out, self.pending_is_prompt);
        // Something was decided as soon as fewer bytes wait or text came out.
        if rest.len() < pending.len() || out.len() > begin {
            self.pending_is_prompt = false;
        }
        let keep_from = pending.len() - rest.len();
        self.pending = pending;
        self.pending.drain(..keep_from);
    }

    /// Appends text that is known to be whole characters.
    pub(crate) fn push_str(&mut self, text: &str, out: &mut String) {
        if self.pending.is_empty() {
            out.push_str(text);
        } else {
            self.push(text.as_bytes(), out);
        }
    }

    /// Declares everything so far to be prompt: nothing of it is ever reported.
    pub(crate) fn end_of_prompt(&mut self) {
        self.pending_is_prompt = !self.pending.is_empty();
    }

    /// Ends the stream: an unfinished character becomes U+FFFD.
    pub(crate) fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() && !self.pending_is_prompt {
            out.push(char::REPLACEMENT_CHARACTER);
        }
        self.pending.clear();
        self.pending_is_prompt = false;
    }
}

/// Decodes as much as is decided and returns the undecided tail. With `mute_first`, a replacement
/// at the very start is swallowed.
fn decode_prefix<'a>(mut bytes: &'a [u8], out: &mut String, mut mute_first: bool) -> &'a [u8] {
    loop {
        let error = match from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        if let Ok(text) = from_utf8(valid) {
            out.push_str(text);
        }
        let Some(invalid) = error.error_len() else {
            return rest;
        };
        if !(mute_first && valid.is_empty()) {
            out.push(char::REPLACEMENT_CHARACTER);
        }
        mute_first = false;
        bytes = &rest[invalid..];
    }
}

#[cfg(test)]
mod tests {
    use super::Utf8Stream;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_chunking_equals_the_lossy_whole(
            chunks in proptest::collection::vec(
                proptest::collection::vec(
                    prop_oneof![any::<u8>(), Just(0xE2), Just(0x82), Just(0xAC), Just(0xF0)], 0..5),
                0..20)
        ) {
            let whole: Vec<u8> = chunks.concat();
            let mut stream = Utf8Stream::default();
            let mut out = String::new();
            for chunk in &chunks {
                stream.push(chunk, &mut out);
                prop_assert!(stream.pending.len() < 4);
            }
            stream.finish(&mut out);
            prop_assert_eq!(out, String::from_utf8_lossy(&whole).into_owned());
        }
    }

    #[test]
    fn a_character_begun_in_the_prompt_is_reported_once_complete() {
        let mut stream = Utf8Stream::default();
        let mut out = String::new();
        stream.push(&[0xE2, 0x82], &mut out);
        stream.end_of_prompt();
        stream.push(&[0xAC, b'x'], &mut out);
        assert_eq!(out, "€x");
    }

    #[test]
    fn a_broken_character_of_the_prompt_belongs_to_the_prompt() {
        let mut stream = Utf8Stream::default();
        let mut out = String::new();
        stream.push(&[0xF0, 0x9F], &mut out);
        stream.end_of_prompt();
        stream.push(&[0xA6], &mut out);
        stream.push(b"x\xE2", &mut out);
        stream.finish(&mut out);
        assert_eq!(out, "x\u{FFFD}");
    }
}
