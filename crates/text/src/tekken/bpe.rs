//! Byte pair encoding by rank, as tiktoken does it: of all neighbours whose bytes together are an entry, the ones
//! with the lowest rank are merged, leftmost first, until none are.
//!
//! Owns the table from bytes to rank. O(n log n) with a heap over a linked list, so that a piece of a megabyte is no
//! weapon.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::TokenizerError;

/// Ranks of all entries.
pub(super) struct Ranks {
    by_bytes: HashMap<Box<[u8]>, u32>,
    /// Bytes of the longest entry: what is longer need not be looked up.
    longest: usize,
}

/// A stretch of the piece. `len` 0 means that it was merged into its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    len: u32,
    prev: u32,
    next: u32,
}

/// No neighbour.
const NONE: u32 = u32::MAX;

impl Ranks {
    /// Entries in the order of their ranks; the first 256 are the bytes.
    pub(super) fn new(tokens: &[Box<[u8]>]) -> Result<Self, TokenizerError> {
        let mut by_bytes = HashMap::with_capacity(tokens.len());
        for (rank, bytes) in (0u32..).zip(tokens) {
            if by_bytes.insert(bytes.clone(), rank).is_some() {
                return Err(super::invalid(format!("vocab[{rank}] has the bytes of an earlier entry")));
            }
        }
        let longest = tokens.iter().map(|bytes| bytes.len()).max().unwrap_or(0);
        Ok(Self { by_bytes, longest })
    }

    pub(super) fn get(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.len() > self.longest {
            return None;
        }
        self.by_bytes.get(bytes).copied()
    }

    /// Calls `out` with the ranks of a piece, in order.
    pub(super) fn encode(&self, piece: &[u8], mut out: impl FnMut(u32)) {
        // An entry is itself, whatever merges would make of it.
        if let Some(rank) = self.get(piece) {
            return out(rank);
        }
        // The input limit keeps positions far below 2^32.
        let count = u32::try_from(piece.len()).unwrap_or(NONE);
        let mut symbols: Vec<Symbol> = (0..count)
            .map(|i| Symbol {
                len: 1,
                prev: i.wrapping_sub(1),
                next: if i + 1 < count { i + 1 } else { NONE },
            })
            .collect();
        let mut heap = BinaryHeap::with_capacity(symbols.len());
        for left in 0..count.saturating_sub(1) {
            self.offer(piece, &symbols, left, &mut heap);
        }
        while let Some(Reverse((_, left, len))) = heap.pop() {
            let Symbol { len: left_len, prev, next, .. } = symbols[left as usize];
            // A candidate is stale if either of its two has changed since: then their length differs.
            if left_len == 0 || next == NONE || left_len + symbols[next as usize].len != len {
                continue;
            }
            let after = symbols[next as usize].next;
            symbols[next as usize].len = 0;
            symbols[left as usize].len = len;
            symbols[left as usize].next = after;
            if after != NONE {
                symbols[after as usize].prev = left;
                self.offer(piece, &symbols, left, &mut heap);
            }
            if prev != NONE {
                self.offer(piece, &symbols, prev, &mut heap);
            }
        }
        let mut at = 0;
        while at != NONE && (at as usize) < symbols.len() {
            let symbol = symbols[at as usize];
            // Every byte is an entry, and every merge made one.
            if let Some(rank) = self.get(&piece[at as usize..(at + symbol.len) as usize]) {
                out(rank);
            }
            at = symbol.next;
        }
    }

    /// Puts the merge of the symbol at `left` with its right neighbour onto the heap, if there is one.
    fn offer(
        &self,
        piece: &[u8],
        symbols: &[Symbol],
        left: u32,
        heap: &mut BinaryHeap<Reverse<(u32, u32, u32)>>,
    ) {
        let Symbol { len, next, .. } = symbols[left as usize];
        if next == NONE {
            return;
        }
        let len = len + symbols[next as usize].len;
        if let Some(rank) = self.get(&piece[left as usize..(left + len) as usize]) {
            heap.push(Reverse((rank, left, len)));
        }
    }
}
