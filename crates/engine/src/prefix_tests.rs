//! The prefix index against a map from whole prefixes, and against hash collisions.

use std::collections::BTreeMap;
use std::hash::Hasher as _;

use proptest::prelude::*;

use super::*;

const SHARED: Room = Room { salt: 0, adapter: 0, private: 0 };

fn key(tag: u32) -> BlockKey {
    std::array::from_fn(|i| tag * 16 + i as u32)
}

fn found(index: &PrefixIndex, room: Room, tags: &[u32]) -> Vec<NodeId> {
    let mut path = Vec::new();
    index.longest(room, tags.len() as u32, |i| key(tags[i as usize]), &mut path);
    path
}

/// The oracle: whole prefixes (as tags of their blocks) to what each group has of their last block.
#[derive(Default)]
struct Naive {
    blocks: BTreeMap<(Room, Vec<u32>, usize), BlockId>,
    snapshots: BTreeMap<(Room, Vec<u32>), SnapshotId>,
}

impl Naive {
    /// By definition: tries every length from the longest.
    fn longest(&self, groups: &[GroupKind], room: Room, tags: &[u32]) -> usize {
        let has =
            |group: usize, block: usize| self.blocks.contains_key(&(room, tags[..=block].to_vec(), group));
        let serves = |length: usize| {
            groups.iter().enumerate().all(|(group, kind)| match *kind {
                GroupKind::Full => (0..length).all(|block| has(group, block)),
                GroupKind::Window(window) => {
                    let query = (length * BLOCK_TOKENS) as i64;
                    (0..length).all(|block| {
                        let last_token = (block * BLOCK_TOKENS + BLOCK_TOKENS - 1) as i64;
                        last_token < query - i64::from(window) + 1 || has(group, block)
                    })
                }
                GroupKind::Recurrent => self.snapshots.contains_key(&(room, tags[..length].to_vec())),
            })
        };
        (1..=tags.len()).rev().find(|&length| serves(length)).unwrap_or(0)
    }
}

fn groups_of(pick: u8) -> Vec<GroupKind> {
    match pick {
        0 => vec![GroupKind::Full],
        1 => vec![GroupKind::Window(20)],
        2 => vec![GroupKind::Full, GroupKind::Window(1)],
        3 => vec![GroupKind::Full, GroupKind::Recurrent],
        4 => vec![GroupKind::Recurrent],
        5 => vec![GroupKind::Window(17), GroupKind::Window(33)],
        _ => vec![GroupKind::Full, GroupKind::Window(40), GroupKind::Recurrent],
    }
}

proptest! {
    /// Random trees over two tags (many shared prefixes), with a hash of 8 bits, of 0 bits, and whole.
    #[test]
    fn the_index_is_the_naive_map(
        pick in 0u8..7,
        mask in prop::sample::select(vec![0u64, 0xff, u64::MAX]),
        moves in prop::collection::vec((0u64..2, prop::collection::vec(0u32..2, 1..6), 0usize..4, 0u8..4), 1..120),
    ) {
        let groups = groups_of(pick);
        let mut index = PrefixIndex::new(&groups, (1, 2), mask, 10_000);
        let mut naive = Naive::default();
        let mut pinned: BTreeMap<(Room, Vec<u32>), NodeId> = BTreeMap::new();
        for (number, (salt, tags, group, kind)) in (1..).zip(moves) {
            let room = Room { salt, ..SHARED };
            let group = group % groups.len();
            // The whole path exists and is pinned while this oracle talks about it.
            let mut parent = ROOT;
            for end in 1..=tags.len() {
                let node = index.insert(room, parent, &key(tags[end - 1])).unwrap();
                let before = pinned.insert((room, tags[..end].to_vec()), node);
                prop_assert!(before.is_none_or(|before| before == node), "a prefix moved");
                if before.is_none() {
                    index.pin(node);
                }
                parent = node;
            }
            let place = (room, tags.clone(), group);
            let recurrent = groups[group] == GroupKind::Recurrent;
            match (kind, recurrent) {
                (0 | 1, false) => {
                    let fresh = index.attach(parent, group, BlockId(number));
                    prop_assert_eq!(fresh, !naive.blocks.contains_key(&place));
                    naive.blocks.entry(place).or_insert(BlockId(number));
                }
                (2, false) => if naive.blocks.remove(&place).is_some() {
                    index.detach(parent, group);
                },
                (0 | 1, true) => {
                    let fresh = index.attach_snapshot(parent, SnapshotId(number));
                    prop_assert_eq!(fresh, !naive.snapshots.contains_key(&(room, tags.clone())));
                    naive.snapshots.entry((room, tags.clone())).or_insert(SnapshotId(number));
                }
                (2, true) => if naive.snapshots.remove(&(room, tags.clone())).is_some() {
                    index.detach_snapshot(parent);
                },
                _ => {
                    let expected = naive.longest(&groups, room, &tags);
                    let path = found(&index, room, &tags);
                    prop_assert_eq!(path.len(), expected);
                    for (end, node) in (1..).zip(path) {
                        for group in 0..groups.len() {
                            let known = naive.blocks.get(&(room, tags[..end].to_vec(), group));
                            prop_assert_eq!(index.block(node, group), known.copied().unwrap_or(BlockId::NULL));
                        }
                    }
                }
            }
            prop_assert_eq!(index.check(), Ok(()));
        }
        // Everything let go leaves nothing behind.
        for (room, tags, group) in naive.blocks.into_keys() {
            index.detach(pinned[&(room, tags)], group);
        }
        for (room, tags) in naive.snapshots.into_keys() {
            index.detach_snapshot(pinned[&(room, tags)]);
        }
        for node in pinned.into_values() {
            index.unpin(node);
        }
        prop_assert_eq!(index.len(), 0);
    }
}

#[test]
fn with_one_hash_for_all_rooms_and_prefixes_stay_apart() {
    let mut index = PrefixIndex::new(&[GroupKind::Full], (0, 0), 0, 100);
    let other_adapter = Room { adapter: 1, ..SHARED };
    let private = Room { private: 1, ..SHARED };
    let mut nodes = Vec::new();
    for room in [SHARED, Room { salt: 1, ..SHARED }, other_adapter, private] {
        let first = index.insert(room, ROOT, &key(1)).unwrap();
        index.attach(first, 0, BlockId(nodes.len() as u32 + 1));
        nodes.push(first);
    }
    nodes.sort_unstable();
    nodes.dedup();
    assert_eq!(nodes.len(), 4);
    assert_eq!(found(&index, Room { salt: 2, ..SHARED }, &[1]), []);
    assert_eq!(found(&index, SHARED, &[2]), []);
}

#[test]
fn a_full_index_takes_no_more() {
    let mut index = PrefixIndex::new(&[GroupKind::Full], (0, 0), u64::MAX, 1);
    let node = index.insert(SHARED, ROOT, &key(1)).unwrap();
    index.pin(node);
    assert!(index.is_full());
    assert_eq!(index.insert(SHARED, node, &key(2)), None);
    assert_eq!(index.insert(SHARED, ROOT, &key(1)), Some(node));
}

#[test]
fn the_hash_is_siphash_1_3() {
    // The standard library's hasher is SipHash-1-3 with a zero key; both see the same bytes.
    let mut ours = SipHash::new((0, 0));
    let mut theirs = std::collections::hash_map::DefaultHasher::new();
    for word in [3u64, u64::MAX, 0x0123_4567_89ab_cdef] {
        ours.word(word);
        theirs.write(&word.to_le_bytes());
    }
    assert_eq!(ours.finish(), theirs.finish());
}

#[test]
fn window_start_is_the_first_visible_block() {
    // After 4 blocks the query stands at 64; a window of 17 sees 48..=64, one of 18 sees 47..=64.
    assert_eq!(window_start(17, 4), 3);
    assert_eq!(window_start(18, 4), 2);
    assert_eq!(window_start(1, 4), 4);
    assert_eq!(window_start(1000, 4), 0);
}
