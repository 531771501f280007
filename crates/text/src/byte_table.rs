//! The exact bytes that each token stands for, as one flat table.
//!
//! Owns the answer to "what does id N add to the output"; never looks at more than one token.
//! What depends on the neighbours (a leading space that vanishes) is in [`crate::decode_rule`].

use crate::TokenId;

const EXISTS: u8 = 1;
const SPECIAL: u8 = 2;
const WHOLE_UTF8: u8 = 4;

/// Bytes and flags of every id from 0 to the largest of the vocabulary.
#[derive(Debug, Default)]
pub(crate) struct ByteTable {
    /// `ends[i]` is where the bytes of id `i` end in `data`; they begin at `ends[i - 1]`.
    ends: Vec<u32>,
    flags: Vec<u8>,
    data: Vec<u8>,
}

/// One entry of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenBytes<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) special: bool,
    /// Set where `bytes` is valid UTF-8 by itself, so that the common case needs no check.
    pub(crate) text: Option<&'a str>,
}

impl ByteTable {
    /// Builds the table from entries in the order of their ids; `None` is a hole.
    pub(crate) fn from_entries(entries: impl Iterator<Item = Option<(Vec<u8>, bool)>>) -> Self {
        let mut table = Self::default();
        for entry in entries {
            let mut flags = 0;
            if let Some((bytes, special)) = entry {
                flags |= EXISTS;
                if special {
                    flags |= SPECIAL;
                }
                if std::str::from_utf8(&bytes).is_ok() {
                    flags |= WHOLE_UTF8;
                }
                table.data.extend_from_slice(&bytes);
            }
            table.flags.push(flags);
            // The loaders cap their input far below 4 GiB.
            table.ends.push(u32::try_from(table.data.len()).unwrap_or(u32::MAX));
        }
        table
    }

    /// One more than the largest id.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The entry of `id`, or `None` beyond the vocabulary and in its holes.
    pub(crate) fn get(&self, id: TokenId) -> Option<TokenBytes<'_>> {
        let index = usize::try_from(id).ok()?;
        let flags = *self.flags.get(index)?;
        if flags & EXISTS == 0 {
            return None;
        }
        let begin = match index.checked_sub(1) {
            Some(before) => self.ends[before] as usize,
            None => 0,
        };
        let bytes = &self.data[begin..self.ends[index] as usize];
        Some(TokenBytes {
            bytes,
            special: flags & SPECIAL != 0,
            text: if flags & WHOLE_UTF8 != 0 { std::str::from_utf8(bytes).ok() } else { None },
        })
    }
}
