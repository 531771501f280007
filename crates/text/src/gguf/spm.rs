//! SentencePiece BPE as GGUF stores it: pieces with scores, no merge list.
//!
//! Neighbouring symbols are merged greedily: the pair whose merged piece has the highest score
//! first, the leftmost among equals, until no pair is a piece. What is left over becomes byte
//! tokens, or one unknown token a run. O(n log n) with a heap over a linked list.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};

use super::{GgufVocab, bad, kind};
use crate::byte_table::ByteTable;
use crate::decode_rule::{DecodeRule, fallback_byte};
use crate::parts::{Encoder, Parts};
use crate::{TokenId, TokenizerError};

const SPACE: &str = "▁";

pub(crate) struct SpmEncoder {
    tokens: Vec<String>,
    scores: Vec<f32>,
    ids: HashMap<String, TokenId>,
    /// What merges may produce: normal, user-defined and unused pieces.
    mergeable: Vec<bool>,
    /// Pieces that only occur on the way to longer ones.
    unused: Vec<bool>,
    /// Token of each byte, where the vocabulary has them.
    bytes: Vec<Option<TokenId>>,
    unk: Option<TokenId>,
    space_prefix: bool,
    /// Tokens cut out of a text before merging: the user-defined ones ...
    user_defined: Cutter,
    /// ... and with them the control tokens.
    all_special: Cutter,
}

/// Finds whole tokens in raw text, leftmost first, longest first.
struct Cutter {
    automaton: Option<AhoCorasick>,
    ids: Vec<TokenId>,
}

impl Cutter {
    fn new(tokens: &[String], wanted: impl Fn(usize) -> bool) -> Result<Self, TokenizerError> {
        let chosen: Vec<usize> = (0..tokens.len()).filter(|i| wanted(*i) && !tokens[*i].is_empty()).collect();
        if chosen.is_empty() {
            return Ok(Self { automaton: None, ids: Vec::new() });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(chosen.iter().map(|i| &tokens[*i]))
            .map_err(|e| bad("tokens", e.to_string()))?;
        Ok(Self { automaton: Some(automaton), ids: chosen.into_iter().map(as_id).collect() })
    }

    /// Calls `f` with each stretch of plain text (possibly empty) and the token that follows it.
    fn cut<E>(&self, text: &str, mut f: impl FnMut(&str, Option<TokenId>) -> Result<(), E>) -> Result<(), E> {
        let mut begin = 0;
        for found in self.automaton.iter().flat_map(|a| a.find_iter(text)) {
            f(&text[begin..found.start()], Some(self.ids[found.pattern().as_usize()]))?;
            begin = found.end();
        }
        f(&text[begin..], None)
    }
}

fn as_id(index: usize) -> TokenId {
    // The vocabulary's size has been checked against `MAX_VOCAB`.
    TokenId::try_from(index).unwrap_or(TokenId::MAX)
}

pub(super) fn load(vocab: GgufVocab) -> Result<Parts, TokenizerError> {
    let (prefix, suffix) = vocab.surrounding(true)?;
    if vocab.scores.is_none() {
        return Err(bad("scores", "missing; a llama vocabulary needs them"));
    }
    let size = vocab.tokens.len();
    let kinds: Vec<i32> = (0..size).map(|i| vocab.kind_of(i)).collect();
    let space_prefix = vocab.add_space_prefix.unwrap_or(true);
    let rule = DecodeRule::sentence_piece(space_prefix);
    let table = ByteTable::from_entries(vocab.tokens.iter().zip(&kinds).map(|(token, kind)| {
        let special = matches!(*kind, kind::CONTROL | kind::UNKNOWN);
        let bytes = if special { token.as_bytes().to_vec() } else { rule.bytes_of(token) };
        Some((bytes, special))
    }));
    let mut bytes = vec![None; 256];
    let mut ids = HashMap::with_capacity(size);
    for (index, token) in vocab.tokens.iter().enumerate() {
        match (kinds[index], fallback_byte(token)) {
            (kind::BYTE, Some(byte)) => bytes[usize::from(byte)] = Some(as_id(index)),
            (kind::BYTE, None) => {
                return Err(bad("tokens", format!("entry {index} is not `<0xNN>`")));
            }
            _ => {}
        }
        // Of two equal pieces the first counts.
        ids.entry(token.clone()).or_insert(as_id(index));
    }
    let user = |i: usize| kinds[i] == kind::USER_DEFINED;
    let encoder = SpmEncoder {
        user_defined: Cutter::new(&vocab.tokens, user)?,
        all_special: Cutter::new(&vocab.tokens, |i| {
            user(i) || matches!(kinds[i], kind::CONTROL | kind::UNKNOWN)
        })?,
        mergeable: kinds
            .iter()
            .map(|k| matches!(*k, kind::NORMAL | kind::USER_DEFINED | kind::UNUSED))
            .collect(),
        unused: kinds.iter().map(|k| *k == kind::UNUSED).collect(),
        scores: vocab.scores.unwrap_or_default(),
        unk: vocab.unk_id,
        tokens: vocab.tokens,
        ids,
        bytes,
        space_prefix,
    };
    Ok(Parts { encoder: Box::new(encoder), table, leading: rule.leading, prefix, suffix })
}

/// A stretch of the text during merging. `len` 0 means that it was merged into its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    begin: usize,
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

/// A possible merge; the greatest is done first.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Length of the merged piece: tells whether one of the two has changed since.
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl Encoder for SpmEncoder {
    fn encode(&self, text: &str, parse_special: bool, out: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let cutter = if parse_special { &self.all_special } else { &self.user_defined };
        cutter.cut(text, |plain, token| {
            if !plain.is_empty() {
                let mut escaped = String::with_capacity(plain.len() + plain.len() / 2);
                if self.space_prefix {
                    escaped.push_str(SPACE);
                }
                escaped.push_str(&plain.replace(' ', SPACE));
                self.encode_plain(&escaped, out)?;
            }
            out.extend(token);
            Ok(())
        })
    }

    fn token_text(&self, id: TokenId) -> Option<String> {
        self.tokens.get(id as usize).cloned()
    }

    fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.ids.get(token).copied()
    }
}

impl SpmEncoder {
    fn encode_plain(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let (symbols, parts) = self.merge(text);
        let mut previous_unknown = false;
        let mut at = Some(0);
        while let Some(symbol) = at.and_then(|i| symbols.get(i)) {
            let piece = &text[symbol.begin..symbol.begin + symbol.len];
            self.emit(piece, &parts, &mut previous_unknown, out)?;
            at = symbol.next;
        }
        Ok(())
    }

    fn merge<'t>(&self, text: &'t str) -> (Vec<Symbol>, HashMap<&'t str, usize>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (begin, c))| Symbol {
                begin,
                len: c.len_utf8(),
                prev: index.checked_sub(1),
                next: Some(index + 1),
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let mut heap = BinaryHeap::with_capacity(symbols.len());
        // For unused pieces: the length of the left part that they were merged from.
        let mut parts = HashMap::new();
        for right in 1..symbols.len() {
            self.propose(text, &symbols, right - 1, right, &mut heap, &mut parts);
        }
        while let Some(candidate) = heap.pop() {
            let (left, right) = (symbols[candidate.left], symbols[candidate.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != candidate.len {
                continue;
            }
            symbols[candidate.left].len = candidate.len;
            symbols[candidate.left].next = right.next;
            symbols[candidate.right].len = 0;
            if let Some(next) = right.next {
                symbols[next].prev = Some(candidate.left);
                self.propose(text, &symbols, candidate.left, next, &mut heap, &mut parts);
            }
            if let Some(prev) = left.prev {
                self.propose(text, &symbols, prev, candidate.left, &mut heap, &mut parts);
            }
        }
        (symbols, parts)
    }

    fn propose<'t>(
        &self,
        text: &'t str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        heap: &mut BinaryHeap<Candidate>,
        parts: &mut HashMap<&'t str, usize>,
    ) {
        let len = symbols[left].len + symbols[right].len;
        let piece = &text[symbols[left].begin..symbols[left].begin + len];
        let Some(id) = self.ids.get(piece).map(|id| *id as usize) else {
            return;
        };
        if !self.mergeable[id] {
            return;
        }
        if self.unused[id] {
            parts.insert(piece, symbols[left].len);
        }
        heap.push(Candidate { score: self.scores[id], left, right, len });
    }

    /// Emits one merged piece. Each recursion takes a strictly shorter piece, and pieces are at
    /// most as long as a vocabulary entry.
    fn emit(
        &self,
        piece: &str,
        parts: &HashMap<&str, usize>,
        previous_unknown: &mut bool,
        out: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let id = self.ids.get(piece).copied();
        if let Some(id) = id.filter(|id| self.mergeable[*id as usize]) {
            match parts.get(piece).filter(|_| self.unused[id as usize]) {
                Some(left) => {
                    let (left, right) = piece.split_at(*left);
                    self.emit(left, parts, previous_unknown, out)?;
                    return self.emit(right, parts, previous_unknown, out);
                }
                None => out.push(id),
            }
            *previous_unknown = false;
            return Ok(());
        }
        let as_bytes: Option<Vec<TokenId>> = piece.bytes().map(|b| self.bytes[usize::from(b)]).collect();
        if let Some(ids) = as_bytes {
            out.extend(ids);
            *previous_unknown = false;
            return Ok(());
        }
        let unk = self.unk.ok_or_else(|| {
            TokenizerError::Encode("the vocabulary has no token for a character of the text, no byte tokens and no unknown token".to_owned())
        })?;
        if !*previous_unknown {
            out.push(unk);
        }
        *previous_unknown = true;
        Ok(())
    }
}
