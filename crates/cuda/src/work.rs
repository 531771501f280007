//! Which block of threads does what in attention: the work lists that a step uploads.
//!
//! Owns the cutting of rows into items, and their spread over the grid. A decode kernel's grid is fixed, so its items are
//! dealt out here: all pages that the step reads stand in one line, and each block of threads gets an equal stretch of
//! it. One row of 100,000 tokens among short ones is cut wherever a stretch ends, and so reaches every multiprocessor. A
//! prefill kernel's blocks take an item each, the longest first. Never: the layout of the upload.

use mirai_engine::BLOCK_TOKENS;

use crate::records::{DecodeItem, PrefillItem, RowInfo};

/// Query heads of a tile of the decode kernel.
pub(crate) const HEAD_TILE: usize = 16;
/// Queries of a block of the prefill kernel.
pub(crate) const PREFILL_QUERIES: usize = 64;
/// A stretch is at least so many pages: four warps take two each, and a shorter part costs more to merge than to read.
const MIN_STRETCH: u64 = 8;
/// What an item costs beside its pages (its queries, the meeting of its warps), in pages.
const ITEM_COST: u64 = 2;

/// What work lists depend on of a layer: layers that agree share theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WorkClass {
    /// Query heads.
    pub(crate) q_heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Tokens that a query sees at most.
    pub(crate) window: Option<u32>,
    /// Whether queries see only what stands before them.
    pub(crate) causal: bool,
}

impl WorkClass {
    /// Query heads of a kv head.
    const fn group(self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Tiles of query heads, over all kv heads.
    pub(crate) const fn head_tiles(self) -> usize {
        self.kv_heads * self.group().div_ceil(HEAD_TILE)
    }

    /// First page that a query with `context` keys reads, and one past the last.
    fn pages(self, context: u32) -> (u32, u32) {
        let first = self.window.map_or(0, |window| context.saturating_sub(window));
        (first / BLOCK_TOKENS as u32, context.div_ceil(BLOCK_TOKENS as u32))
    }

    /// Most decode items of a step of `rows` rows on a grid of `grid` blocks: every boundary between two blocks cuts one
    /// row.
    pub(crate) const fn most_items(self, rows: usize, grid: usize) -> usize {
        rows * self.head_tiles() + grid
    }

    /// Most parts that are merged: each cut makes two of one, or one more.
    pub(crate) const fn most_parts(grid: usize) -> usize {
        2 * grid
    }

    /// Most groups of parts.
    pub(crate) const fn most_groups(grid: usize) -> usize {
        grid
    }

    /// Prefill items of `rows` rows of one token.
    pub(crate) const fn one_token_items(self, rows: usize) -> usize {
        rows * self.kv_heads * self.group().div_ceil(PREFILL_QUERIES)
    }

    /// Most prefill items of a step of `tokens` tokens in `rows` rows.
    pub(crate) const fn most_prefill_items(self, tokens: usize, rows: usize) -> usize {
        self.kv_heads
            * (tokens * self.group() / PREFILL_QUERIES + rows * self.group().div_ceil(PREFILL_QUERIES))
    }
}

/// What each block of a decode kernel does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DecodeWork {
    /// `[grid + 1]`: block b does items `starts[b]..starts[b + 1]`.
    pub(crate) starts: Vec<u32>,
    /// All items, in the order of blocks.
    pub(crate) items: Vec<DecodeItem>,
}

/// Deals out the decode rows (those of one token) of a step; `grid` blocks.
pub(crate) fn decode_work(rows: &[RowInfo], class: WorkClass, grid: usize, work: &mut DecodeWork) {
    work.starts.clear();
    work.items.clear();
    let tiles = class.head_tiles() as u32;
    let decoding = || rows.iter().enumerate().filter(|(_, row)| row.tokens == 1);
    let pages_of = |row: &RowInfo| {
        let (first, end) = class.pages(row.context);
        u64::from(end - first)
    };
    let total: u64 = decoding().map(|(_, row)| (pages_of(row) + ITEM_COST) * u64::from(tiles)).sum();
    // Every cut costs one item more, and there are fewer cuts than blocks.
    let stretch = (total.div_ceil(grid as u64) + ITEM_COST).max(MIN_STRETCH + ITEM_COST);
    let mut cutter = Cutter { work, grid, stretch, room: 0, parts: 0, groups: 0 };
    for (index, row) in decoding() {
        let (first, end) = class.pages(row.context);
        for head_tile in 0..tiles {
            cutter.row(DecodeItem { row: index as u32, head_tile, first, end, ..DecodeItem::default() });
        }
    }
    work.starts.resize(grid + 1, work.items.len() as u32);
}

/// Cuts rows where stretches end.
struct Cutter<'a> {
    work: &'a mut DecodeWork,
    grid: usize,
    stretch: u64,
    /// What is left of the current block's stretch.
    room: u64,
    parts: u32,
    groups: u32,
}

impl Cutter<'_> {
    /// Begins the next block's stretch; the last block takes what is left.
    fn next_block(&mut self) {
        self.work.starts.push(self.work.items.len() as u32);
        let last = self.work.starts.len() == self.grid;
        self.room = if last { u64::MAX } else { self.room + self.stretch };
    }

    /// One row and tile, in as many items as stretches it touches.
    fn row(&mut self, whole: DecodeItem) {
        let from = self.work.items.len();
        let mut next = whole.first;
        while next < whole.end {
            // A stretch with no room for a page worth reading ends.
            if self.room < ITEM_COST + MIN_STRETCH.min(u64::from(whole.end - next)) {
                self.next_block();
            }
            let left = u64::from(whole.end - next);
            let mut pages = left.min(self.room - ITEM_COST);
            // A rest too short to be worth a merge stays with this block.
            if left - pages < MIN_STRETCH / 2 {
                pages = left;
            }
            self.room = self.room.saturating_sub(pages + ITEM_COST);
            let end = next + pages as u32;
            self.work.items.push(DecodeItem { first: next, end, partial: -1, ..whole });
            next = end;
        }
        let items = &mut self.work.items[from..];
        if items.len() > 1 {
            let count = items.len() as u32;
            for (place, item) in (self.parts..).zip(items) {
                item.partial = place as i32;
                item.group = self.groups;
                item.group_first = self.parts;
                item.group_parts = count;
            }
            self.parts += count;
            self.groups += 1;
        }
    }
}

/// Cuts the rows of more than one token into blocks of queries, those that see most keys first. With `all`, rows of one
/// token too.
pub(crate) fn prefill_work(rows: &[RowInfo], class: WorkClass, all: bool, items: &mut Vec<PrefillItem>) {
    items.clear();
    let group = class.group();
    let mut sized = Vec::new();
    for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.tokens > 1 || (all && row.tokens == 1))
    {
        let (queries, start) = (row.tokens as usize * group, (row.context - row.tokens) as usize);
        for first in (0..queries).step_by(PREFILL_QUERIES) {
            let last_token = ((first + PREFILL_QUERIES).min(queries) - 1) / group;
            let seen = if class.causal { start + last_token + 1 } else { row.context as usize };
            let cost = class.window.map_or(seen, |w| seen.min(w as usize + PREFILL_QUERIES));
            for kv_head in 0..class.kv_heads as u32 {
                let item = PrefillItem { row: index as u32, kv_head, first: first as u32 };
                sized.push((cost, item));
            }
        }
    }
    // Stable, so that the same step gives the same list.
    sized.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
    items.extend(sized.into_iter().map(|(_, item)| item));
}

/// Parts that `in` is split into for a matmul of few rows: as many blocks as the device runs at once, each with at least
/// four pieces of 128 k. Depends on the weight's shape alone, so that a row's sums do not depend on its neighbours.
pub(crate) fn matmul_splits(outputs: usize, inputs: usize, experts: usize, multiprocessors: usize) -> usize {
    let tiles = outputs.div_ceil(128) * experts.max(1);
    let pieces = inputs.div_ceil(128);
    (multiprocessors / tiles.max(1)).clamp(1, (pieces / 4).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASS: WorkClass = WorkClass { q_heads: 32, kv_heads: 8, window: None, causal: true };
    const GRID: usize = 132;

    fn decode_rows(contexts: impl IntoIterator<Item = u32>) -> Vec<RowInfo> {
        let row = |(i, context)| RowInfo { slot: i as u32, first: i as u32, tokens: 1, context };
        contexts.into_iter().enumerate().map(row).collect()
    }

    fn load(items: &[DecodeItem]) -> u64 {
        items.iter().map(|item| u64::from(item.end - item.first)).sum()
    }

    /// Every page of every row and tile exactly once, groups consistent, limits kept.
    fn check(rows: &[RowInfo], class: WorkClass, grid: usize) -> DecodeWork {
        let mut work = DecodeWork::default();
        decode_work(rows, class, grid, &mut work);
        assert_eq!(work.starts.len(), grid + 1);
        assert_eq!((work.starts[0], *work.starts.last().unwrap_or(&0)), (0, work.items.len() as u32));
        assert!(work.starts.windows(2).all(|w| w[0] <= w[1]));
        assert!(work.items.len() <= class.most_items(rows.len(), grid));
        let mut expected = Vec::new();
        for (index, row) in rows.iter().enumerate().filter(|(_, r)| r.tokens == 1) {
            let (first, end) = class.pages(row.context);
            for tile in 0..class.head_tiles() as u32 {
                expected.extend((first..end).map(|page| (index as u32, tile, page)));
            }
        }
        let covered: Vec<_> =
            work.items.iter().flat_map(|i| (i.first..i.end).map(|page| (i.row, i.head_tile, page))).collect();
        assert_eq!(covered, expected);
        let parts: Vec<_> = work.items.iter().filter(|i| i.partial >= 0).collect();
        assert!(parts.len() <= WorkClass::most_parts(grid), "{} parts", parts.len());
        for (place, item) in parts.iter().enumerate() {
            assert_eq!(item.partial as usize, place);
            let group = item.group_first..item.group_first + item.group_parts;
            assert!(group.contains(&(place as u32)) && item.group_parts > 1);
            let others = parts.iter().filter(|o| o.group == item.group).count();
            assert_eq!(others as u32, item.group_parts);
            assert!((item.group as usize) < WorkClass::most_groups(grid));
        }
        work
    }

    #[test]
    fn one_long_row_among_short_ones_reaches_every_block() {
        let rows = decode_rows(std::iter::once(100_000).chain((0..31).map(|i| 40 + i * 7)));
        let work = check(&rows, CLASS, GRID);
        let loads: Vec<u64> =
            work.starts.windows(2).map(|w| load(&work.items[w[0] as usize..w[1] as usize])).collect();
        let (most, total): (u64, u64) = (*loads.iter().max().unwrap_or(&0), loads.iter().sum());
        assert!(loads.iter().all(|l| *l > 0), "{loads:?}");
        assert!(most * GRID as u64 <= total * 21 / 20, "at most 5 % above the mean: {most} of {total}");
        let has_long = |w: &&[u32]| work.items[w[0] as usize..w[1] as usize].iter().any(|i| i.row == 0);
        let owners = work.starts.windows(2).filter(has_long).count();
        // The short ones are a twentieth of the work.
        assert!(owners >= GRID * 15 / 16, "the long row is on {owners} blocks");
    }

    #[test]
    fn every_page_is_read_once_whatever_the_rows() {
        let windowed = WorkClass { window: Some(100), ..CLASS };
        let wide = WorkClass { q_heads: 40, kv_heads: 1, ..CLASS };
        for class in [CLASS, windowed, wide] {
            for grid in [1, 2, 132, 264] {
                check(&[], class, grid);
                check(&decode_rows([1]), class, grid);
                check(&decode_rows([16, 17, 15, 1, 160]), class, grid);
                check(&decode_rows((0..64).map(|i| 1 + i * 37)), class, grid);
                check(&decode_rows((0..256).map(|i| 1 + i * i % 5000)), class, grid);
                check(&decode_rows((0..1024).map(|_| 2048)), class, grid);
            }
        }
        let mut rows = decode_rows([33, 65]);
        rows[0].tokens = 20;
        assert!(check(&rows, CLASS, GRID).items.iter().all(|i| i.row == 1));
    }

    #[test]
    fn short_rows_are_not_cut() {
        let work = check(&decode_rows([100; 16]), CLASS, GRID);
        assert!(work.items.iter().all(|i| i.partial < 0), "seven pages are not worth a merge");
        assert_eq!(work.items.len(), 16 * 8);
        let one = check(&decode_rows([4096]), CLASS, GRID);
        assert!(one.items.len() > 100, "one row of 256 pages has {} items", one.items.len());
    }

    #[test]
    fn equal_rows_give_equal_loads() {
        let work = check(&decode_rows([2048; 64]), CLASS, GRID);
        let loads: Vec<u64> =
            work.starts.windows(2).map(|w| load(&work.items[w[0] as usize..w[1] as usize])).collect();
        let total: u64 = loads.iter().sum();
        assert!(loads.iter().all(|l| l * GRID as u64 <= total * 21 / 20), "{loads:?}");
    }

    #[test]
    fn prefill_items_cover_all_queries_longest_first() {
        let mut rows = decode_rows([50, 300, 7]);
        rows[1].tokens = 40;
        rows[2].tokens = 7;
        let mut items = Vec::new();
        prefill_work(&rows, CLASS, false, &mut items);
        let mut found: Vec<_> = items.iter().map(|i| (i.row, i.kv_head, i.first)).collect();
        assert_eq!(found[0].0, 1, "the row that sees most keys");
        assert!(found.len() <= CLASS.most_prefill_items(47, 2));
        found.sort_unstable();
        // 160 queries a kv head make three blocks, 28 make one.
        let expected = (0..8).flat_map(|h| [0, 64, 128].map(|f| (1, h, f))).chain((0..8).map(|h| (2, h, 0)));
        assert_eq!(found, expected.collect::<Vec<_>>());
        prefill_work(&rows, CLASS, true, &mut items);
        assert_eq!(items.iter().filter(|i| i.row == 0).count(), 8);
    }

    #[test]
    fn splits_fill_the_device() {
        assert_eq!(matmul_splits(6144, 4096, 1, 132), 2);
        assert_eq!(matmul_splits(4096, 14336, 1, 132), 4);
        assert_eq!(matmul_splits(128, 512, 1, 132), 1);
        assert_eq!(matmul_splits(128, 1 << 20, 1, 132), 132);
        assert_eq!(matmul_splits(151_936, 4096, 1, 132), 1);
        assert_eq!(matmul_splits(1536, 2048, 8, 132), 1);
        assert_eq!(matmul_splits(1, 8, 0, 132), 1);
    }
}
