//! Which blocks hold which prefix.
//!
//! Owns the tree of full blocks of committed tokens: one node for each (room, parent, 16 tokens), with one block
//! for each paged group and perhaps a snapshot. It never counts references and never evicts on its own: the
//! pool decides what is given up and tells.
//!
//! A node is found by a keyed hash of (room, parent, tokens) and then *compared*, so that a collision costs time
//! and never an answer. A parent is named by its index; a node lives as long as it has a child, so that an index
//! is never reused under a child that means another parent. By induction a node's path is exactly one prefix.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::ids::{BLOCK_TOKENS, BlockId, SnapshotId, TokenId};
use crate::step::GroupKind;

/// Index of a node.
pub(crate) type NodeId = u32;
/// The empty prefix: parent of first blocks.
pub(crate) const ROOT: NodeId = u32::MAX;
/// The tokens of one block.
pub(crate) type BlockKey = [TokenId; BLOCK_TOKENS];

/// What separates prefixes with equal tokens. Blocks are never shared between rooms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Room {
    /// The tenant's salt.
    pub(crate) salt: u64,
    /// Which adapter computed the keys and values; 0 is the model itself.
    pub(crate) adapter: u64,
    /// 0 for everybody; else the one request that shares with nobody but its own choices.
    pub(crate) private: u64,
}

#[derive(Debug)]
struct Node {
    room: Room,
    parent: NodeId,
    tokens: BlockKey,
    hash: u64,
    /// Next node with the same (perhaps truncated) hash.
    next_same: NodeId,
    children: u32,
    /// Sequences whose next block will be a child of this node.
    pins: u32,
    /// Blocks and snapshots that this node finds.
    holds: u32,
    snapshot: Option<SnapshotId>,
}

/// Keys are hashes already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are hashed");
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// The tree. See the module's documentation.
#[derive(Debug)]
pub(crate) struct PrefixIndex {
    groups: Vec<GroupKind>,
    nodes: Vec<Option<Node>>,
    /// `groups.len()` entries for each node; [`BlockId::NULL`] where there is none.
    blocks: Vec<BlockId>,
    free: Vec<NodeId>,
    heads: HashMap<u64, NodeId, BuildHasherDefault<Identity>>,
    key: (u64, u64),
    /// All ones, or fewer bits in a test that wants collisions.
    hash_mask: u64,
    /// Nodes without blocks (behind windows) must not grow without limit.
    max_nodes: usize,
}

impl PrefixIndex {
    pub(crate) fn new(groups: &[GroupKind], key: (u64, u64), hash_mask: u64, max_nodes: usize) -> Self {
        Self {
            groups: groups.to_vec(),
            nodes: Vec::new(),
            blocks: Vec::new(),
            free: Vec::new(),
            heads: HashMap::default(),
            key,
            hash_mask,
            max_nodes,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.max_nodes
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id as usize].as_ref().expect("a node lives while it is referred to")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id as usize].as_mut().expect("a node lives while it is referred to")
    }

    pub(crate) fn block(&self, node: NodeId, group: usize) -> BlockId {
        self.blocks[node as usize * self.groups.len() + group]
    }

    pub(crate) fn snapshot(&self, node: NodeId) -> Option<SnapshotId> {
        self.node(node).snapshot
    }

    pub(crate) fn room(&self, node: NodeId) -> Room {
        self.node(node).room
    }

    fn hash(&self, room: Room, parent: NodeId, tokens: &BlockKey) -> u64 {
        let mut hash = SipHash::new(self.key);
        hash.word(u64::from(parent));
        if parent == ROOT {
            // Deeper nodes have their parent's room.
            hash.word(room.salt);
            hash.word(room.adapter);
            hash.word(room.private);
        }
        for pair in tokens.chunks_exact(2) {
            hash.word(u64::from(pair[0]) << 32 | u64::from(pair[1]));
        }
        hash.finish() & self.hash_mask
    }

    fn find_hashed(&self, hash: u64, room: Room, parent: NodeId, tokens: &BlockKey) -> Option<NodeId> {
        let mut id = self.heads.get(&hash).copied().unwrap_or(ROOT);
        while id != ROOT {
            let node = self.node(id);
            if node.parent == parent && node.room == room && node.tokens == *tokens {
                return Some(id);
            }
            id = node.next_same;
        }
        None
    }

    /// The child of `parent` with these tokens.
    pub(crate) fn find(&self, room: Room, parent: NodeId, tokens: &BlockKey) -> Option<NodeId> {
        self.find_hashed(self.hash(room, parent, tokens), room, parent, tokens)
    }

    /// Finds or makes the child of `parent`. None if there is no room for another node.
    pub(crate) fn insert(&mut self, room: Room, parent: NodeId, tokens: &BlockKey) -> Option<NodeId> {
        let hash = self.hash(room, parent, tokens);
        if let Some(found) = self.find_hashed(hash, room, parent, tokens) {
            return Some(found);
        }
        if self.is_full() {
            return None;
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            self.blocks.resize(self.nodes.len() * self.groups.len(), BlockId::NULL);
            u32::try_from(self.nodes.len() - 1).expect("max_nodes is below 2^32")
        });
        let next_same = self.heads.insert(hash, id).unwrap_or(ROOT);
        self.nodes[id as usize] = Some(Node {
            room,
            parent,
            tokens: *tokens,
            hash,
            next_same,
            children: 0,
            pins: 0,
            holds: 0,
            snapshot: None,
        });
        if parent != ROOT {
            self.node_mut(parent).children += 1;
        }
        Some(id)
    }

    /// Lets a node find a group's block. False if it already finds another.
    pub(crate) fn attach(&mut self, node: NodeId, group: usize, block: BlockId) -> bool {
        let entry = &mut self.blocks[node as usize * self.groups.len() + group];
        if *entry != BlockId::NULL {
            return false;
        }
        *entry = block;
        self.node_mut(node).holds += 1;
        true
    }

    /// The pool gave a block up.
    pub(crate) fn detach(&mut self, node: NodeId, group: usize) {
        self.blocks[node as usize * self.groups.len() + group] = BlockId::NULL;
        self.node_mut(node).holds -= 1;
        self.prune(node);
    }

    /// Lets a node find a snapshot. False if it already finds another.
    pub(crate) fn attach_snapshot(&mut self, node: NodeId, snapshot: SnapshotId) -> bool {
        let entry = self.node_mut(node);
        if entry.snapshot.is_some() {
            return false;
        }
        entry.snapshot = Some(snapshot);
        entry.holds += 1;
        true
    }

    /// The snapshot was given up.
    pub(crate) fn detach_snapshot(&mut self, node: NodeId) {
        let entry = self.node_mut(node);
        entry.snapshot = None;
        entry.holds -= 1;
        self.prune(node);
    }

    /// Keeps a node alive for a sequence that will add a child. The root needs none.
    pub(crate) fn pin(&mut self, node: NodeId) {
        if node != ROOT {
            self.node_mut(node).pins += 1;
        }
    }

    pub(crate) fn unpin(&mut self, node: NodeId) {
        if node != ROOT {
            self.node_mut(node).pins -= 1;
            self.prune(node);
        }
    }

    /// Removes a node that nothing needs, and then its parents while nothing needs them.
    fn prune(&mut self, mut id: NodeId) {
        while id != ROOT {
            let node = self.node(id);
            if node.holds > 0 || node.children > 0 || node.pins > 0 {
                return;
            }
            let (parent, hash, next) = (node.parent, node.hash, node.next_same);
            let head = self.heads[&hash];
            if head != id {
                let mut before = head;
                while self.node(before).next_same != id {
                    before = self.node(before).next_same;
                }
                self.node_mut(before).next_same = next;
            } else if next == ROOT {
                self.heads.remove(&hash);
            } else {
                self.heads.insert(hash, next);
            }
            self.nodes[id as usize] = None;
            self.free.push(id);
            if parent != ROOT {
                self.node_mut(parent).children -= 1;
            }
            id = parent;
        }
    }

    /// Writes the longest prefix of at most `max_blocks` full blocks that every group can serve over `path`, as
    /// the nodes of its blocks. `block` gives the tokens of a block by its number.
    pub(crate) fn longest(
        &self,
        room: Room,
        max_blocks: u32,
        mut block: impl FnMut(u32) -> BlockKey,
        path: &mut Vec<NodeId>,
    ) {
        path.clear();
        let mut parent = ROOT;
        while (path.len() as u32) < max_blocks {
            let Some(node) = self.find(room, parent, &block(path.len() as u32)) else { break };
            path.push(node);
            parent = node;
        }
        let mut length = path.len();
        // A group may cut the length, which may cut what another can serve: repeat until all agree.
        let mut agreed = 0;
        let mut group = 0;
        while agreed < self.groups.len() && length > 0 {
            let served = self.served(&path[..length], group);
            agreed = if served == length { agreed + 1 } else { 1 };
            length = served;
            group = (group + 1) % self.groups.len();
        }
        path.truncate(length);
    }

    /// The longest prefix of `path` that one group can serve.
    fn served(&self, path: &[NodeId], group: usize) -> usize {
        let has = |node: &NodeId| self.block(*node, group) != BlockId::NULL;
        match self.groups[group] {
            GroupKind::Full => path.iter().position(|node| !has(node)).unwrap_or(path.len()),
            GroupKind::Recurrent => {
                path.iter().rposition(|node| self.node(*node).snapshot.is_some()).map_or(0, |last| last + 1)
            }
            GroupKind::Window(window) => {
                // Walks back from the end; a hole among the blocks needed moves the end to before the hole.
                let mut end = path.len();
                let mut first = end;
                while end > 0 && first > window_start(window, end) {
                    if has(&path[first - 1]) {
                        first -= 1;
                    } else {
                        end = first - 1;
                        first = end;
                    }
                }
                end
            }
        }
    }

    /// Every block that a node finds, and every snapshot, for the integrity check.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut children = vec![0u32; self.nodes.len()];
        for (id, node) in (0..).zip(&self.nodes) {
            let Some(node) = node else { continue };
            let blocks =
                (0..self.groups.len()).filter(|&group| self.block(id, group) != BlockId::NULL).count();
            if node.holds as usize != blocks + usize::from(node.snapshot.is_some()) {
                return Err(format!("node {id} counts {} things and finds others", node.holds));
            }
            if self.find(node.room, node.parent, &node.tokens) != Some(id) {
                return Err(format!("node {id} is not found by its own key"));
            }
            if node.parent != ROOT {
                children[node.parent as usize] += 1;
            }
        }
        for (id, (node, count)) in self.nodes.iter().zip(children).enumerate() {
            let expected = node.as_ref().map_or(0, |node| node.children);
            if expected != count {
                return Err(format!("node {id} counts {expected} children and has {count}"));
            }
            if node.as_ref().is_some_and(|node| node.holds == 0 && node.children == 0 && node.pins == 0) {
                return Err(format!("node {id} is of no use to anybody"));
            }
        }
        Ok(())
    }
}

/// First of the blocks that a window needs to go on after `blocks` full blocks: the query at position
/// `16 blocks` sees `window - 1` tokens before it.
pub(crate) fn window_start(window: u32, blocks: usize) -> usize {
    (blocks * BLOCK_TOKENS + 1).saturating_sub(window as usize) / BLOCK_TOKENS
}

/// SipHash-1-3 over 64-bit words (Aumasson and Bernstein, 2012): keyed, so that nobody outside can aim for
/// collisions.
struct SipHash {
    v: [u64; 4],
    words: u64,
}

impl SipHash {
    fn new((k0, k1): (u64, u64)) -> Self {
        let v = [
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ];
        Self { v, words: 0 }
    }

    fn round(&mut self) {
        let v = &mut self.v;
        v[0] = v[0].wrapping_add(v[1]);
        v[2] = v[2].wrapping_add(v[3]);
        v[1] = v[1].rotate_left(13) ^ v[0];
        v[3] = v[3].rotate_left(16) ^ v[2];
        v[0] = v[0].rotate_left(32);
        v[2] = v[2].wrapping_add(v[1]);
        v[0] = v[0].wrapping_add(v[3]);
        v[1] = v[1].rotate_left(17) ^ v[2];
        v[3] = v[3].rotate_left(21) ^ v[0];
        v[2] = v[2].rotate_left(32);
    }

    fn word(&mut self, word: u64) {
        self.v[3] ^= word;
        self.round();
        self.v[0] ^= word;
        self.words += 1;
    }

    fn finish(mut self) -> u64 {
        self.word((self.words * 8) << 56);
        self.v[2] ^= 0xff;
        (0..3).for_each(|_| self.round());
        self.v[0] ^ self.v[1] ^ self.v[2] ^ self.v[3]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "prefix_tests.rs"]
mod tests;
