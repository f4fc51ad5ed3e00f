//! Who holds which block: free list, reference counts and eviction order of one KV group. Integers only, no memory.
//!
//! A block is in one of three states:
//!
//! ```text
//!  free    nobody holds it, nothing worth keeping   stack: the last one given back is the next one used
//!  used    `refcount` tables hold it
//!  cached  nobody holds it, its content may be hit   list in order of release: the oldest is evicted first
//! ```
//! `free + used + cached = num_blocks`. Whoever gives back a chain of blocks does it last block first; as holders of a
//! child hold its parent too, the eviction order is then leaf first and least recently used.

use crate::BlockId;

const NIL: u32 = u32::MAX;

/// A block taken by [`BlockAllocator::allocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Now held once.
    pub block: BlockId,
    /// It was cached until now: its hash must be forgotten.
    pub evicted: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct BlockAllocator {
    refcounts: Vec<u32>,
    /// Content is registered for reuse; set while the block is used or cached.
    keep: Vec<bool>,
    free: Vec<u32>,
    /// Intrusive list of cached blocks, oldest first.
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
    num_cached: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
}

impl BlockAllocator {
    /// All of `num_blocks` are free; block 0 is the first to be used. Nothing is allocated after this.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        let count = num_blocks as usize;
        Self {
            refcounts: vec![0; count],
            keep: vec![false; count],
            free: (0..num_blocks).rev().collect(),
            links: vec![Link { older: NIL, newer: NIL }; count],
            oldest: NIL,
            newest: NIL,
            num_cached: 0,
        }
    }

    /// Blocks in all states.
    #[must_use]
    pub fn num_blocks(&self) -> u32 {
        self.refcounts.len() as u32
    }

    /// Blocks without holder and without content worth keeping.
    #[must_use]
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks without holder whose content may be hit.
    #[must_use]
    pub fn num_cached(&self) -> u32 {
        self.num_cached
    }

    /// Blocks that somebody holds.
    #[must_use]
    pub fn num_used(&self) -> u32 {
        self.num_blocks() - self.num_available()
    }

    /// How many calls of [`BlockAllocator::allocate`] would succeed now.
    #[must_use]
    pub fn num_available(&self) -> u32 {
        self.num_free() + self.num_cached
    }

    /// How many tables hold the block.
    #[must_use]
    pub fn refcount(&self, block: BlockId) -> u32 {
        self.refcounts[block.0 as usize]
    }

    /// Takes a free block, or evicts the cached one that was released longest ago. `None` when all are used.
    pub fn allocate(&mut self) -> Option<Allocation> {
        if let Some(id) = self.free.pop() {
            self.refcounts[id as usize] = 1;
            return Some(Allocation { block: BlockId(id), evicted: false });
        }
        let id = self.oldest;
        if id == NIL {
            return None;
        }
        self.unlink(id);
        self.keep[id as usize] = false;
        self.refcounts[id as usize] = 1;
        Some(Allocation { block: BlockId(id), evicted: true })
    }

    /// One more table holds the block, which is used or cached.
    pub fn acquire(&mut self, block: BlockId) {
        let count = &mut self.refcounts[block.0 as usize];
        *count += 1;
        if *count == 1 {
            assert!(self.keep[block.0 as usize], "{block:?} is free: nobody can know its content");
            self.unlink(block.0);
        }
    }

    /// One table less holds the block; true when it was the last.
    pub fn release(&mut self, block: BlockId) -> bool {
        let count = &mut self.refcounts[block.0 as usize];
        assert!(*count > 0, "{block:?} was released more often than acquired");
        *count -= 1;
        if *count > 0 {
            return false;
        }
        if self.keep[block.0 as usize] {
            self.link_newest(block.0);
        } else {
            self.free.push(block.0);
        }
        true
    }

    /// The content of a used block may be hit from now on: when its last holder leaves, it becomes cached, not free.
    pub fn set_keep(&mut self, block: BlockId) {
        assert!(self.refcount(block) > 0, "{block:?} has no holder that could have computed it");
        self.keep[block.0 as usize] = true;
    }

    /// The content cannot be hit any more. A cached block becomes free.
    pub fn clear_keep(&mut self, block: BlockId) {
        if !std::mem::replace(&mut self.keep[block.0 as usize], false) {
            return;
        }
        if self.refcount(block) == 0 {
            self.unlink(block.0);
            self.free.push(block.0);
        }
    }

    /// Whether the block's content may be hit.
    #[must_use]
    pub fn is_kept(&self, block: BlockId) -> bool {
        self.keep[block.0 as usize]
    }

    /// Cached blocks in the order in which they would be evicted.
    pub fn eviction_order(&self) -> impl Iterator<Item = BlockId> + '_ {
        let first = Some(self.oldest).filter(|&id| id != NIL);
        std::iter::successors(first, |&id| Some(self.links[id as usize].newer).filter(|&id| id != NIL)).map(BlockId)
    }

    /// Free blocks; the last is the next one used.
    pub(crate) fn free_list(&self) -> &[u32] {
        &self.free
    }

    /// The cached block that is evicted after this one; the first one behind none.
    pub(crate) fn newer_than(&self, block: Option<BlockId>) -> Option<BlockId> {
        let id = block.map_or(self.oldest, |block| self.links[block.0 as usize].newer);
        Some(id).filter(|&id| id != NIL).map(BlockId)
    }

    /// The cached block that is evicted before this one.
    pub(crate) fn older_than(&self, block: BlockId) -> Option<BlockId> {
        Some(self.links[block.0 as usize].older).filter(|&id| id != NIL).map(BlockId)
    }

    /// Panics unless every block is in exactly one state and the list is sound.
    pub fn check_invariants(&self) {
        let mut seen = vec![false; self.refcounts.len()];
        for &id in &self.free {
            assert!(!std::mem::replace(&mut seen[id as usize], true), "block {id} is free twice");
            assert!(!self.keep[id as usize] && self.refcounts[id as usize] == 0, "free block {id} is held or kept");
        }
        let mut previous = NIL;
        let mut num_cached = 0;
        for BlockId(id) in self.eviction_order() {
            assert!(!std::mem::replace(&mut seen[id as usize], true), "block {id} is free and cached");
            assert!(
                self.keep[id as usize] && self.refcounts[id as usize] == 0,
                "cached block {id} is held or not kept"
            );
            assert_eq!(self.links[id as usize].older, previous);
            previous = id;
            num_cached += 1;
        }
        assert_eq!((previous, num_cached), (self.newest, self.num_cached));
        let num_used = self.refcounts.iter().filter(|&&count| count > 0).count() as u32;
        assert_eq!(num_used + self.num_free() + self.num_cached, self.num_blocks(), "a block is lost");
    }

    fn link_newest(&mut self, id: u32) {
        self.links[id as usize] = Link { older: self.newest, newer: NIL };
        match self.newest {
            NIL => self.oldest = id,
            newest => self.links[newest as usize].newer = id,
        }
        self.newest = id;
        self.num_cached += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Link { older, newer } = self.links[id as usize];
        match older {
            NIL => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        self.num_cached -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(allocator: &mut BlockAllocator) -> (u32, bool) {
        let allocation = allocator.allocate().unwrap();
        (allocation.block.0, allocation.evicted)
    }

    #[test]
    fn free_blocks_go_before_cached_ones_and_the_oldest_cached_first() {
        let mut allocator = BlockAllocator::new(3);
        for id in 0..3 {
            assert_eq!(take(&mut allocator), (id, false));
        }
        assert_eq!(allocator.allocate(), None);
        allocator.set_keep(BlockId(0));
        allocator.set_keep(BlockId(2));
        for id in [2, 1, 0] {
            assert!(allocator.release(BlockId(id)));
        }
        assert_eq!((allocator.num_free(), allocator.num_cached(), allocator.num_used()), (1, 2, 0));
        allocator.check_invariants();
        assert_eq!(take(&mut allocator), (1, false));
        assert_eq!(take(&mut allocator), (2, true));
        assert_eq!(take(&mut allocator), (0, true));
        allocator.check_invariants();
    }

    #[test]
    fn a_hit_saves_a_block_from_eviction() {
        let mut allocator = BlockAllocator::new(2);
        for id in [0, 1] {
            take(&mut allocator);
            allocator.set_keep(BlockId(id));
        }
        allocator.release(BlockId(0));
        allocator.release(BlockId(1));
        allocator.acquire(BlockId(0));
        allocator.acquire(BlockId(0));
        assert!(!allocator.release(BlockId(0)));
        assert_eq!(allocator.refcount(BlockId(0)), 1);
        allocator.release(BlockId(0));
        assert_eq!(allocator.eviction_order().collect::<Vec<_>>(), [BlockId(1), BlockId(0)]);
        allocator.clear_keep(BlockId(1));
        allocator.clear_keep(BlockId(1));
        assert_eq!((allocator.num_free(), allocator.num_cached()), (1, 1));
        allocator.check_invariants();
    }

    #[test]
    #[should_panic(expected = "released more often than acquired")]
    fn a_double_release_ends_the_process() {
        let mut allocator = BlockAllocator::new(1);
        take(&mut allocator);
        allocator.release(BlockId(0));
        allocator.release(BlockId(0));
    }

    #[test]
    #[should_panic(expected = "is free: nobody can know its content")]
    fn a_free_block_cannot_be_shared() {
        BlockAllocator::new(1).acquire(BlockId(0));
    }
}
