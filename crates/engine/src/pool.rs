//! Pages of equal size with reference counts, and the order in which cached ones are given up.
//!
//! Owns who is free, used or cached. It never knows what a page holds: the prefix index gives a page an owner
//! while the page can be found again, and the scheduler counts the references. Every operation is O(1).
//!
//! A page is *free* (no reference, no owner), *used* (referenced) or *cached* (owner, no reference). Cached
//! pages stand in a doubly linked list through the pages themselves, least recently used first.

use crate::prefix::NodeId;

/// End of a list, or no owner.
const NONE: u32 = u32::MAX;

/// Where the prefix index refers to a page from: a node, and which of its groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) node: NodeId,
    pub(crate) group: u16,
}

#[derive(Clone, Debug)]
struct Page {
    refs: u32,
    /// The node that finds this page, or `NONE`.
    node: NodeId,
    group: u16,
    prev: u32,
    next: u32,
}

/// A pool of pages `first..first + count`.
#[derive(Debug)]
pub(crate) struct PagePool {
    pages: Vec<Page>,
    first: u32,
    free: Vec<u32>,
    /// Least recently used cached page.
    head: u32,
    /// Most recently used cached page.
    tail: u32,
    cached: u32,
}

impl PagePool {
    pub(crate) fn new(first: u32, count: u32) -> Self {
        let page = Page { refs: 0, node: NONE, group: 0, prev: NONE, next: NONE };
        Self {
            pages: vec![page; count as usize],
            first,
            // Popped from the end: low numbers go first, which keeps a lightly used pool dense.
            free: (0..count).rev().collect(),
            head: NONE,
            tail: NONE,
            cached: 0,
        }
    }

    pub(crate) fn total(&self) -> u32 {
        u32::try_from(self.pages.len()).expect("counted by a u32")
    }

    pub(crate) fn cached(&self) -> u32 {
        self.cached
    }

    /// Pages that an allocation could get.
    pub(crate) fn obtainable(&self) -> u32 {
        self.cached + u32::try_from(self.free.len()).expect("counted by a u32")
    }

    pub(crate) fn used(&self) -> u32 {
        self.total() - self.obtainable()
    }

    pub(crate) fn refs(&self, page: u32) -> u32 {
        self.pages[(page - self.first) as usize].refs
    }

    pub(crate) fn owner(&self, page: u32) -> Option<Owner> {
        let page = &self.pages[(page - self.first) as usize];
        (page.node != NONE).then_some(Owner { node: page.node, group: page.group })
    }

    /// Takes a page with one reference: a free one, else the least recently used cached one, whose former owner
    /// must forget it.
    pub(crate) fn alloc(&mut self) -> Option<(u32, Option<Owner>)> {
        let evicted = if self.free.is_empty() { Some(self.evict()?) } else { None };
        let index = self.free.pop()?;
        self.pages[index as usize].refs = 1;
        Some((index + self.first, evicted))
    }

    /// Makes the least recently used cached page free. Its owner must forget it.
    pub(crate) fn evict(&mut self) -> Option<Owner> {
        let index = self.head;
        if index == NONE {
            return None;
        }
        self.unlink(index);
        self.free.push(index);
        let page = &mut self.pages[index as usize];
        let owner = Owner { node: page.node, group: page.group };
        page.node = NONE;
        Some(owner)
    }

    /// One more reference to a used or cached page.
    pub(crate) fn retain(&mut self, page: u32) {
        let index = page - self.first;
        let entry = &mut self.pages[index as usize];
        assert!(entry.refs > 0 || entry.node != NONE, "page {page} is free and cannot be shared");
        entry.refs += 1;
        if entry.refs == 1 {
            self.unlink(index);
        }
    }

    /// One reference less. True if it was the last.
    pub(crate) fn release(&mut self, page: u32) -> bool {
        let index = page - self.first;
        let entry = &mut self.pages[index as usize];
        assert!(entry.refs > 0, "page {page} is released more often than it was taken");
        entry.refs -= 1;
        if entry.refs > 0 {
            return false;
        }
        if entry.node == NONE {
            self.free.push(index);
        } else {
            self.link_last(index);
        }
        true
    }

    /// The prefix index can find a used page from now on.
    pub(crate) fn set_owner(&mut self, page: u32, owner: Owner) {
        let entry = &mut self.pages[(page - self.first) as usize];
        assert!(entry.refs > 0 && entry.node == NONE, "page {page} is not used, or has an owner");
        entry.node = owner.node;
        entry.group = owner.group;
    }

    fn unlink(&mut self, index: u32) {
        let Page { prev, next, .. } = self.pages[index as usize];
        if prev == NONE {
            self.head = next;
        } else {
            self.pages[prev as usize].next = next;
        }
        if next == NONE {
            self.tail = prev;
        } else {
            self.pages[next as usize].prev = prev;
        }
        self.cached -= 1;
    }

    fn link_last(&mut self, index: u32) {
        let tail = self.tail;
        let entry = &mut self.pages[index as usize];
        entry.prev = tail;
        entry.next = NONE;
        if tail == NONE {
            self.head = index;
        } else {
            self.pages[tail as usize].next = index;
        }
        self.tail = index;
        self.cached += 1;
    }

    /// Walks everything: every page is in exactly one of the three states, and the lists say so.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut listed = vec![0u8; self.pages.len()];
        for &index in &self.free {
            listed[index as usize] += 1;
            let page = &self.pages[index as usize];
            if page.refs != 0 || page.node != NONE {
                return Err(format!("free page {} has a reference or an owner", index + self.first));
            }
        }
        let (mut index, mut prev, mut length) = (self.head, NONE, 0);
        while index != NONE {
            let page = &self.pages[index as usize];
            listed[index as usize] += 1;
            length += 1;
            if page.refs != 0 || page.node == NONE || page.prev != prev || length > self.cached {
                return Err(format!("cached page {} is listed wrongly", index + self.first));
            }
            (prev, index) = (index, page.next);
        }
        if length != self.cached || self.tail != prev {
            return Err(format!("{length} cached pages are listed, {} are counted", self.cached));
        }
        let lost = (0..)
            .zip(listed.iter().zip(&self.pages))
            .find(|(_, (times, page))| **times != u8::from(page.refs == 0));
        match lost {
            Some((index, _)) => Err(format!("page {} is lost or listed twice", index + self.first)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// The oracle: states in plain lists, everything by search.
    #[derive(Default)]
    struct Naive {
        free: Vec<u32>,
        refs: Vec<(u32, u32)>,
        cached: VecDeque<u32>,
        owned: Vec<u32>,
    }

    impl Naive {
        fn alloc(&mut self) -> Option<(u32, bool)> {
            let (page, evicted) = match self.free.pop() {
                Some(page) => (page, false),
                None => (self.cached.pop_front()?, true),
            };
            self.owned.retain(|&other| other != page || !evicted);
            self.refs.push((page, 1));
            Some((page, evicted))
        }

        fn retain(&mut self, page: u32) {
            self.cached.retain(|&other| other != page);
            match self.refs.iter_mut().find(|entry| entry.0 == page) {
                Some(entry) => entry.1 += 1,
                None => self.refs.push((page, 1)),
            }
        }

        fn release(&mut self, page: u32) {
            let at = self.refs.iter().position(|entry| entry.0 == page).unwrap();
            self.refs[at].1 -= 1;
            if self.refs[at].1 == 0 {
                self.refs.remove(at);
                if self.owned.contains(&page) {
                    self.cached.push_back(page);
                } else {
                    self.free.push(page);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_pool_is_the_naive_allocator(count in 1u32..12, moves in prop::collection::vec((0u8..5, 0u32..12), 0..200)) {
            let mut pool = PagePool::new(1, count);
            let mut naive = Naive { free: (1..=count).rev().collect(), ..Naive::default() };
            for (kind, pick) in moves {
                let page = pick % count + 1;
                let used = naive.refs.iter().any(|entry| entry.0 == page);
                match kind {
                    0 => prop_assert_eq!(pool.alloc().map(|(p, e)| (p, e.is_some())), naive.alloc()),
                    1 if used || naive.cached.contains(&page) => {
                        pool.retain(page);
                        naive.retain(page);
                    }
                    2 if used => {
                        let last = pool.release(page);
                        naive.release(page);
                        prop_assert_eq!(last, !naive.refs.iter().any(|entry| entry.0 == page));
                    }
                    3 if used && !naive.owned.contains(&page) => {
                        pool.set_owner(page, Owner { node: page + 100, group: 0 });
                        naive.owned.push(page);
                    }
                    4 => {
                        let oldest = naive.cached.pop_front();
                        prop_assert_eq!(pool.evict().map(|owner| owner.node), oldest.map(|p| p + 100));
                        if let Some(page) = oldest {
                            naive.owned.retain(|&other| other != page);
                            naive.free.push(page);
                        }
                    }
                    _ => {}
                }
                prop_assert_eq!(pool.check(), Ok(()));
                prop_assert_eq!(pool.cached() as usize, naive.cached.len());
                prop_assert_eq!(pool.used() as usize, naive.refs.len());
                for &(page, refs) in &naive.refs {
                    prop_assert_eq!(pool.refs(page), refs);
                }
            }
        }
    }

    #[test]
    fn while_anything_is_cached_an_allocation_succeeds() {
        let mut pool = PagePool::new(1, 3);
        for node in 0..3 {
            let (page, evicted) = pool.alloc().unwrap();
            assert_eq!(evicted, None);
            pool.set_owner(page, Owner { node, group: 0 });
        }
        assert_eq!(pool.alloc(), None);
        (1..=3).for_each(|page| assert!(pool.release(page)));
        assert_eq!((pool.cached(), pool.obtainable()), (3, 3));
        // Least recently used first: 2 is touched, so 1 and 3 go before it.
        pool.retain(2);
        pool.release(2);
        let order: Vec<u32> = (0..3).map(|_| pool.alloc().unwrap().1.unwrap().node).collect();
        assert_eq!(order, [0, 2, 1]);
    }

    #[test]
    fn a_broken_pool_is_noticed() {
        let mut pool = PagePool::new(1, 2);
        pool.alloc().unwrap();
        pool.pages[0].refs = 0;
        assert_eq!(pool.check(), Err(String::from("page 1 is lost or listed twice")));
    }

    #[test]
    #[should_panic(expected = "released more often")]
    fn a_double_release_is_a_bug() {
        let mut pool = PagePool::new(1, 1);
        let (page, _) = pool.alloc().unwrap();
        pool.release(page);
        pool.release(page);
    }
}
