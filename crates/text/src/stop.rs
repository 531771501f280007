//! Stop strings over a stream of text.
//!
//! Owns the text that may still become a stop string, and nothing else. An Aho-Corasick automaton
//! gives, after each byte, the longest suffix that is a prefix of some stop string: exactly that
//! much is held back. The result does not depend on how the text is cut into pieces.

/// What one piece of text led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that is certain to be part of the answer.
    pub emit: String,
    /// Index of the stop string that ended the answer. From then on nothing more is emitted.
    pub stopped: Option<usize>,
}

/// Finds the first stop string in a stream.
///
/// The first to *end* wins; among stop strings that end at the same byte, the longest. Empty stop
/// strings are ignored. Time is linear in the text and independent of its chunking.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    nodes: Vec<Node>,
    /// Bytes that leave the root, to skip ordinary text quickly.
    starts: [bool; 256],
    state: usize,
    include_stop: bool,
    stopped: Option<usize>,
    /// Text seen; `buffer[emitted..]` is held back.
    buffer: String,
    emitted: usize,
}

#[derive(Debug, Clone, Default)]
struct Node {
    children: Vec<(u8, u32)>,
    fail: usize,
    /// Bytes from the root: the length of the suffix that this state stands for.
    depth: usize,
    /// (index of the stop string, its length) of the longest stop string that ends here.
    found: Option<(usize, usize)>,
}

const ROOT: usize = 0;
/// The buffer is cut when this much of it has been emitted.
const COMPACT_BYTES: usize = 4096;

impl StopMatcher {
    /// Builds the automaton: O(total bytes of `stops`) memory. With `include_stop` the stop string
    /// itself is part of the answer.
    #[must_use]
    pub fn new(stops: &[String], include_stop: bool) -> Self {
        let mut this = Self {
            nodes: vec![Node::default()],
            starts: [false; 256],
            state: ROOT,
            include_stop,
            stopped: None,
            buffer: String::new(),
            emitted: 0,
        };
        for (index, stop) in stops.iter().enumerate() {
            this.insert(index, stop.as_bytes());
        }
        for (byte, _) in &this.nodes[ROOT].children {
            this.starts[usize::from(*byte)] = true;
        }
        this.link();
        this
    }

    fn insert(&mut self, index: usize, stop: &[u8]) {
        if stop.is_empty() {
            return;
        }
        let mut node = ROOT;
        for (offset, byte) in stop.iter().enumerate() {
            node = match self.child(node, *byte) {
                Some(next) => next,
                None => {
                    let next = self.nodes.len();
                    self.nodes.push(Node { depth: offset + 1, ..Node::default() });
                    // The caller's body limit keeps the node count far below 2^32.
                    self.nodes[node].children.push((*byte, u32::try_from(next).unwrap_or(u32::MAX)));
                    next
                }
            };
        }
        // Of equal stop strings the first is reported.
        self.nodes[node].found.get_or_insert((index, stop.len()));
    }

    /// Sets the failure links, breadth first.
    fn link(&mut self) {
        let mut queue: std::collections::VecDeque<usize> =
            self.nodes[ROOT].children.iter().map(|c| c.1 as usize).collect();
        while let Some(node) = queue.pop_front() {
            for (byte, child) in self.nodes[node].children.clone() {
                let child = child as usize;
                let fail = self.next_state(self.nodes[node].fail, byte);
                self.nodes[child].fail = fail;
                // A string that ends here is longer than one that ends at the failure state.
                if self.nodes[child].found.is_none() {
                    self.nodes[child].found = self.nodes[fail].found;
                }
                queue.push_back(child);
            }
        }
    }

    fn child(&self, node: usize, byte: u8) -> Option<usize> {
        let children = &self.nodes[node].children;
        children.iter().find(|(b, _)| *b == byte).map(|(_, next)| *next as usize)
    }

    fn next_state(&self, mut node: usize, byte: u8) -> usize {
        loop {
            if let Some(next) = self.child(node, byte) {
                return next;
            }
            if node == ROOT {
                return ROOT;
            }
            node = self.nodes[node].fail;
        }
    }

    /// Which stop string has ended the answer, if any.
    #[must_use]
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// Adds text and returns what of the answer is now certain.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.stopped.is_some() {
            return StopOutput { emit: String::new(), stopped: self.stopped };
        }
        let base = self.buffer.len();
        self.buffer.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            if self.state == ROOT && !self.starts[usize::from(byte)] {
                continue;
            }
            self.state = self.next_state(self.state, byte);
            if let Some((index, len)) = self.nodes[self.state].found {
                let end = base + offset + 1;
                self.stopped = Some(index);
                let until = if self.include_stop { end } else { end - len };
                let emit = self.take(until);
                self.buffer = String::new();
                self.emitted = 0;
                return StopOutput { emit, stopped: self.stopped };
            }
        }
        let until = self.buffer.len() - self.nodes[self.state].depth;
        StopOutput { emit: self.take(until), stopped: None }
    }

    /// Ends the text: what was held back is part of the answer after all, unless a stop string
    /// was found.
    pub fn finish(&mut self) -> String {
        self.state = ROOT;
        self.take(self.buffer.len())
    }

    /// Emits `buffer[emitted..until]`. Both ends lie between characters, because stop strings and
    /// text are whole characters. The buffer is compacted when most of it is gone, so that each
    /// byte is moved a constant number of times.
    fn take(&mut self, until: usize) -> String {
        let emit = self.buffer[self.emitted..until].to_owned();
        self.emitted = until;
        if self.emitted == self.buffer.len() {
            self.buffer.clear();
            self.emitted = 0;
        } else if self.emitted >= COMPACT_BYTES && self.emitted * 2 >= self.buffer.len() {
            self.buffer.drain(..self.emitted);
            self.emitted = 0;
        }
        emit
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    /// The definition, read off: after each byte, does a stop string end here?
    fn oracle(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let longest = stops
                .iter()
                .enumerate()
                .filter(|(_, s)| !s.is_empty() && text.as_bytes()[..end].ends_with(s.as_bytes()))
                .max_by_key(|(i, s)| (s.len(), std::cmp::Reverse(*i)));
            if let Some((index, stop)) = longest {
                let until = if include { end } else { end - stop.len() };
                return (text[..until].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    /// Longest suffix of `text` that is a proper prefix of a stop string.
    fn may_become(text: &str, stops: &[String]) -> usize {
        (0..=text.len())
            .filter(|n| text.is_char_boundary(text.len() - n))
            .filter(|n| {
                let tail = &text[text.len() - n..];
                stops.iter().any(|s| s.len() > *n && s.starts_with(tail))
            })
            .max()
            .unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn equals_the_oracle_under_any_chunking(
            chunks in proptest::collection::vec("[abé]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé]{0,4}", 0..5),
            include: bool,
        ) {
            let whole = chunks.concat();
            let (text, index) = oracle(&whole, &stops, include);
            let mut matcher = StopMatcher::new(&stops, include);
            let (mut seen, mut emitted) = (String::new(), String::new());
            for chunk in &chunks {
                let out = matcher.push(chunk);
                emitted.push_str(&out.emit);
                if out.stopped.is_some() {
                    break;
                }
                seen.push_str(chunk);
                prop_assert_eq!(emitted.len() + may_become(&seen, &stops), seen.len());
            }
            emitted.push_str(&matcher.finish());
            prop_assert_eq!(matcher.stopped(), index);
            prop_assert_eq!(emitted, text);
        }
    }

    #[test]
    fn after_the_stop_nothing_leaks() {
        let mut matcher = StopMatcher::new(&stops(&["\n\nUser:"]), false);
        assert_eq!(matcher.push("Hello\n").emit, "Hello");
        assert_eq!(matcher.push("\nUs"), StopOutput::default());
        let out = matcher.push("er: secret");
        assert_eq!((out.emit.as_str(), out.stopped), ("", Some(0)));
        assert_eq!(matcher.push("more"), StopOutput { emit: String::new(), stopped: Some(0) });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn a_false_start_is_released_at_once() {
        let mut matcher = StopMatcher::new(&stops(&["END"]), false);
        assert_eq!(matcher.push("xEN").emit, "x");
        assert_eq!(matcher.push("E").emit, "EN");
        assert_eq!(matcher.finish(), "E");
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn without_stops_text_passes_through() {
        let mut matcher = StopMatcher::new(&stops(&[""]), false);
        assert_eq!(matcher.push("abc"), StopOutput { emit: "abc".into(), stopped: None });
    }

    #[test]
    fn a_long_almost_match_is_linear() {
        // Quadratic work here would be 4e10 byte steps.
        let stop = format!("{}b", "a".repeat(200_000));
        let mut matcher = StopMatcher::new(&[stop], false);
        let mut emitted = 0;
        for _ in 0..600_000 {
            emitted += matcher.push("a").emit.len();
        }
        assert_eq!(emitted, 400_000);
        assert_eq!(matcher.finish().len(), 200_000);
    }
}
