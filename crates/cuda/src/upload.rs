//! Where everything lies in a step's upload.
//!
//! Owns the offsets. They depend on the counts alone, so that those of a bucket are the same in every step and a captured
//! graph can name them. The upload is in two parts: what the forward pass reads, and what sampling reads. They go up
//! together, unless sampling has to wait for tokens of the step before or for masks. Masks and edits, of which there may be
//! many and mostly are none, share the end: as long as they are, so that only what is there is copied.

use mirai_engine::BLOCK_TOKENS;

use crate::records::Edit;
use crate::slots::GRANULE;
use crate::work::WorkClass;

/// Lists start on a multiple of this.
const ALIGNMENT: usize = 16;
/// Edits of logits that each row has room for: a bias of 1,024 tokens, 1,024 tokens that must not end the text yet, 128
/// forbidden words in two spellings, and the model's own ends of a text. No request can take a neighbour's room.
pub const EDITS_A_ROW: usize = 1024 + 1024 + 2 * 128 + 64;
/// Granules of block tables beside those that a step's tokens begin or fill in each group: for rows that touch one more, and
/// for pages that a sequence had before it was opened.
const GRANULES: usize = 64;
/// Tokens whose pages are one granule.
const GRANULE_TOKENS: usize = GRANULE * BLOCK_TOKENS;

/// An output that is not the mean of a row.
pub(crate) const NO_ROW: u32 = u32::MAX;

/// A list in the upload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Section {
    /// Bytes from the upload's start.
    pub(crate) offset: usize,
    /// Bytes that it may take.
    pub(crate) bytes: usize,
}

impl Section {
    /// Its bytes in a copy of the upload.
    pub(crate) fn of(self, upload: &mut [u8]) -> &mut [u8] {
        &mut upload[self.offset..self.offset + self.bytes]
    }
}

/// How long lists may get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Tokens of the step.
    pub(crate) tokens: usize,
    /// Its rows.
    pub(crate) rows: usize,
    /// Its outputs.
    pub(crate) outputs: usize,
    /// Rows that get masks.
    pub(crate) masks: usize,
    /// Words of a mask.
    pub(crate) mask_words: usize,
    /// Layer groups with block tables.
    pub(crate) groups: usize,
}

impl Counts {
    /// Bytes of the edits of logits that there is room for.
    pub(crate) const fn edit_bytes(&self) -> usize {
        EDITS_A_ROW * self.rows * Edit::BYTES
    }

    /// Granules of block tables that there is room for. More changes at once, as when a sequence begins behind a long prefix,
    /// go up before the step in pieces of their own, which may wait for the step before.
    pub(crate) const fn granules(&self) -> usize {
        GRANULES + self.groups * (self.rows + self.tokens.div_ceil(GRANULE_TOKENS))
    }
}

/// Work lists of one class of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkSections {
    /// `[grid + 1]` words.
    pub(crate) starts: Section,
    /// Decode items.
    pub(crate) items: Section,
    /// Prefill items.
    pub(crate) prefill: Section,
}

/// All lists of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// `[tokens]`: ids, or slots with bit 31.
    pub(crate) ids: Section,
    /// `[tokens]`.
    pub(crate) positions: Section,
    /// `[tokens]`: the row of each.
    pub(crate) token_rows: Section,
    /// `[rows]` of `RowInfo`.
    pub(crate) rows: Section,
    /// `[outputs]`: tokens.
    pub(crate) outputs: Section,
    /// `[outputs]`: the row that each pools, or [`NO_ROW`].
    pub(crate) output_rows: Section,
    /// One for each class.
    pub(crate) work: Vec<WorkSections>,
    /// Granules of tables: where from, where to, and what.
    pub(crate) granules: [Section; 3],
    /// `[outputs]` of `SampleRow`: here the sampling part begins.
    pub(crate) samples: Section,
    /// Masks `[mask rows][words]`, and behind the last of them on a multiple of 8 bytes `Edit`s; both are counted from
    /// here.
    pub(crate) lists: Section,
    /// Bytes of all.
    pub(crate) bytes: usize,
}

impl Layout {
    /// Lays out lists for `classes` with the grids of their decode kernels.
    pub(crate) fn new(counts: &Counts, classes: &[(WorkClass, usize)]) -> Self {
        let mut end = 0usize;
        let mut section = |items: usize, bytes: usize| {
            let offset = end.next_multiple_of(ALIGNMENT);
            end = offset + items * bytes;
            Section { offset, bytes: items * bytes }
        };
        let (tokens, rows, outputs) = (counts.tokens, counts.rows, counts.outputs);
        let granules = counts.granules();
        let mut layout = Self {
            ids: section(tokens, 4),
            positions: section(tokens, 4),
            token_rows: section(tokens, 4),
            rows: section(rows, 16),
            outputs: section(outputs, 4),
            output_rows: section(outputs, 4),
            ..Self::default()
        };
        for (class, grid) in classes {
            layout.work.push(WorkSections {
                starts: section(grid + 1, 4),
                items: section(class.most_items(rows, *grid), 32),
                prefill: section(class.most_prefill_items(tokens, rows), 12),
            });
        }
        layout.granules = [section(granules, 4), section(granules, 4), section(granules, 16)];
        layout.samples = section(outputs, 80);
        let masks = (counts.masks * counts.mask_words * 4).next_multiple_of(Edit::BYTES);
        layout.lists = section(masks + counts.edit_bytes(), 1);
        layout.bytes = end.next_multiple_of(ALIGNMENT);
        layout
    }

    /// Granules of tables that there is room for.
    pub(crate) const fn granule_room(&self) -> usize {
        self.granules[0].bytes / 4
    }

    /// Bytes of the part that the forward pass reads.
    pub(crate) const fn forward_bytes(&self) -> usize {
        self.samples.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sections(layout: &Layout) -> Vec<Section> {
        let mut all = vec![
            layout.ids,
            layout.positions,
            layout.token_rows,
            layout.rows,
            layout.outputs,
            layout.output_rows,
        ];
        all.extend(layout.work.iter().flat_map(|w| [w.starts, w.items, w.prefill]));
        all.extend(layout.granules);
        all.extend([layout.samples, layout.lists]);
        all
    }

    #[test]
    fn lists_do_not_meet_and_grow_with_their_counts() {
        let class = WorkClass { q_heads: 8, kv_heads: 2, window: None, causal: true };
        let classes = [(class, 132), (WorkClass { window: Some(64), ..class }, 264)];
        let mut before = 0;
        for n in [1, 3, 64, 1000] {
            let counts = Counts { tokens: 2 * n, rows: n, outputs: n, masks: n, mask_words: 33, groups: 2 };
            let layout = Layout::new(&counts, &classes);
            let all = sections(&layout);
            assert!(all.iter().all(|s| s.offset.is_multiple_of(ALIGNMENT)));
            assert!(all.windows(2).all(|w| w[0].offset + w[0].bytes <= w[1].offset));
            assert!(layout.lists.offset + layout.lists.bytes <= layout.bytes);
            assert_eq!(layout.ids.bytes, 8 * n);
            assert_eq!(layout.work[1].starts.bytes, 265 * 4);
            assert_eq!(layout.forward_bytes(), layout.samples.offset);
            assert!(layout.bytes > before);
            before = layout.bytes;
            let mut upload = vec![0u8; layout.bytes];
            layout.lists.of(&mut upload).fill(1);
            let masks = (33 * 4 * n).next_multiple_of(8);
            assert_eq!(upload.iter().filter(|b| **b == 1).count(), masks + EDITS_A_ROW * 8 * n);
        }
    }
}
