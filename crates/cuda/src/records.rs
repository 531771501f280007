//! What a step's upload and read-back are made of: the kernels' structs of 32-bit words, in the order of their fields.
//!
//! Owns their layout, which `kernels/tile.cuh`, `kernels/sample.cuh` and the attention kernels define. Never: where a
//! list of them lies.

/// A struct of `N` 32-bit words, little-endian as the device is.
pub(crate) trait Record<const N: usize>: Copy {
    /// Its words in the order of the fields.
    fn words(self) -> [u32; N];
}

/// Writes records back to back.
///
/// # Panics
/// `out` is shorter than they are.
pub(crate) fn write_records<R: Record<N>, const N: usize>(
    out: &mut [u8],
    records: impl IntoIterator<Item = R>,
) {
    let mut words = out.as_chunks_mut::<4>().0.iter_mut();
    for word in records.into_iter().flat_map(Record::words) {
        *words.next().expect("the list has room for its records") = word.to_le_bytes();
    }
}

/// One word of a read-back; 0 beyond its end.
pub(crate) fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.as_chunks::<4>().0.get(index).map_or(0, |word| u32::from_le_bytes(*word))
}

impl Record<1> for u32 {
    fn words(self) -> [u32; 1] {
        [self]
    }
}

/// `RowInfo`: one sequence of the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RowInfo {
    /// Whose block table applies.
    pub(crate) slot: u32,
    /// Its first token in the step.
    pub(crate) first: u32,
    /// Its tokens in the step.
    pub(crate) tokens: u32,
    /// Keys that its last token sees, that token included.
    pub(crate) context: u32,
}

impl Record<4> for RowInfo {
    fn words(self) -> [u32; 4] {
        [self.slot, self.first, self.tokens, self.context]
    }
}

/// `DecodeItem`: pages of one row for one tile of query heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DecodeItem {
    /// Of the step's rows.
    pub(crate) row: u32,
    /// kv head times tiles of a group, plus the tile.
    pub(crate) head_tile: u32,
    /// First page, counted from the start of the sequence.
    pub(crate) first: u32,
    /// One past the last.
    pub(crate) end: u32,
    /// Place of its part; negative: it is the whole row.
    pub(crate) partial: i32,
    /// Counter of the parts that belong together.
    pub(crate) group: u32,
    /// Place of their first; they are consecutive.
    pub(crate) group_first: u32,
    /// How many they are.
    pub(crate) group_parts: u32,
}

impl Record<8> for DecodeItem {
    fn words(self) -> [u32; 8] {
        let Self { row, head_tile, first, end, partial, group, group_first, group_parts } = self;
        [row, head_tile, first, end, partial.cast_unsigned(), group, group_first, group_parts]
    }
}

/// `PrefillItem`: 64 queries of one row and kv head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrefillItem {
    /// Of the step's rows.
    pub(crate) row: u32,
    /// Key and value head.
    pub(crate) kv_head: u32,
    /// First query: token of the row times the group's heads, plus the head.
    pub(crate) first: u32,
}

impl Record<3> for PrefillItem {
    fn words(self) -> [u32; 3] {
        [self.row, self.kv_head, self.first]
    }
}

/// `SampleRow`: how one row of logits becomes a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SampleRow {
    /// Reciprocal of the temperature.
    pub(crate) inverse_temperature: f32,
    /// 1: all.
    pub(crate) top_p: f32,
    /// 0: none.
    pub(crate) min_p: f32,
    /// 0: all.
    pub(crate) top_k: u32,
    /// Key of the random stream.
    pub(crate) seed: u64,
    /// Part of the key.
    pub(crate) choice: u32,
    /// Position that is drawn; part of the key.
    pub(crate) position: u32,
    /// [`GREEDY`], [`SCORE`], [`WANT_LOGPROBS`].
    pub(crate) flags: u32,
    /// Of a score.
    pub(crate) token: u32,
    /// Most likely tokens that are wanted.
    pub(crate) top: u32,
    /// That gets the token; [`NO_SLOT`]: none.
    pub(crate) slot: u32,
    /// Penalties, as in the request.
    pub(crate) repetition: f32,
    /// Likewise.
    pub(crate) frequency: f32,
    /// Likewise.
    pub(crate) presence: f32,
    /// Row of counts; -1: none.
    pub(crate) counts_row: i32,
    /// Row of masks; -1: none.
    pub(crate) mask_row: i32,
    /// Row of unedited logits; -1: none.
    pub(crate) raw_row: i32,
    /// First of its edits.
    pub(crate) edits_first: u32,
    /// How many.
    pub(crate) edits_count: u32,
}

/// The largest logit, no draw.
pub(crate) const GREEDY: u32 = 1;
/// The log-probability of a given token, no draw.
pub(crate) const SCORE: u32 = 2;
/// Log-probabilities are wanted.
pub(crate) const WANT_LOGPROBS: u32 = 4;
/// No slot gets the token.
pub(crate) const NO_SLOT: u32 = u32::MAX;

impl SampleRow {
    /// A row whose result nobody reads.
    pub(crate) const IDLE: Self = Self {
        inverse_temperature: 1.0,
        top_p: 1.0,
        min_p: 0.0,
        top_k: 0,
        seed: 0,
        choice: 0,
        position: 0,
        flags: SCORE,
        token: 0,
        top: 0,
        slot: NO_SLOT,
        repetition: 1.0,
        frequency: 0.0,
        presence: 0.0,
        counts_row: -1,
        mask_row: -1,
        raw_row: -1,
        edits_first: 0,
        edits_count: 0,
    };
}

impl Record<20> for SampleRow {
    fn words(self) -> [u32; 20] {
        [
            self.inverse_temperature.to_bits(),
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.top_k,
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.choice,
            self.position,
            self.flags,
            self.token,
            self.top,
            self.slot,
            self.repetition.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            self.counts_row.cast_unsigned(),
            self.mask_row.cast_unsigned(),
            self.raw_row.cast_unsigned(),
            self.edits_first,
            self.edits_count,
        ]
    }
}

/// `Edit`: a bias on one token's logit; minus infinity forbids it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Edit {
    /// Whose.
    pub(crate) token: u32,
    /// Added.
    pub(crate) bias: f32,
}

impl Edit {
    /// Bytes of one.
    pub(crate) const BYTES: usize = 8;
}

impl Record<2> for Edit {
    fn words(self) -> [u32; 2] {
        [self.token, self.bias.to_bits()]
    }
}

/// `SampleResult`: what came of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SampleResult {
    /// Drawn or scored.
    pub(crate) token: u32,
    /// 0: none; 1: a logit that is not finite; 2: nothing was allowed.
    pub(crate) fault: u32,
    /// Of the token.
    pub(crate) logprob: f32,
    /// Of the token, from 1.
    pub(crate) rank: u32,
}

impl SampleResult {
    /// Bytes of one.
    pub(crate) const BYTES: usize = 16;

    /// The `index`-th of a list.
    pub(crate) fn read(list: &[u8], index: usize) -> Self {
        let at = |field| word(list, index * 4 + field);
        Self { token: at(0), fault: at(1), logprob: f32::from_bits(at(2)), rank: at(3) }
    }
}

/// `TopToken`s: bytes of one.
pub(crate) const TOP_BYTES: usize = 8;

/// The `index`-th `TopToken` of a list: token and log-probability.
pub(crate) fn read_top(list: &[u8], index: usize) -> (u32, f32) {
    (word(list, index * 2), f32::from_bits(word(list, index * 2 + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_their_fields_in_order() {
        let mut out = [0u8; 40];
        let rows = [1, 5].map(|n| RowInfo { slot: n, first: n + 1, tokens: n + 2, context: n + 3 });
        write_records(&mut out, rows);
        assert_eq!((0..10).map(|i| word(&out, i)).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
        let item = DecodeItem { partial: -1, group_parts: 9, ..DecodeItem::default() };
        assert_eq!((item.words()[4], item.words()[7]), (u32::MAX, 9));
        let row = SampleRow { seed: 0x1_0000_0002, edits_count: 7, slot: 3, ..SampleRow::IDLE };
        let words = row.words();
        assert_eq!((words[0], words[4], words[5], words[11], words[19]), (0x3f80_0000, 2, 1, 3, 7));
        assert_eq!(Edit { token: 4, bias: 1.0 }.words(), [4, 0x3f80_0000]);
        assert_eq!(PrefillItem { row: 1, kv_head: 2, first: 3 }.words(), [1, 2, 3]);
    }

    #[test]
    fn results_are_read_back() {
        let mut list = [0u8; 32];
        write_records(&mut list, [0, 0, 0, 0, 7, 1, 0x3f80_0000, 2]);
        let want = SampleResult { token: 7, fault: 1, logprob: 1.0, rank: 2 };
        assert_eq!(SampleResult::read(&list, 1), want);
        assert_eq!(read_top(&list, 3), (0x3f80_0000, f32::from_bits(2)));
        assert_eq!(word(&list, 8), 0);
    }
}
