//! The block bookkeeping once more, by searching lists: slow and plain, to compare with.

use crate::{BlockAllocator, BlockHash, BlockId, CacheSalt, PrefixCache};

use super::Rng;

/// What [`BlockAllocator`] and [`PrefixCache`] do together.
#[derive(Debug)]
pub struct NaiveBlocks {
    /// (references, hash under which it can be hit)
    blocks: Vec<(u32, Option<BlockHash>)>,
    /// Without holder and hash; the last is taken first.
    free: Vec<BlockId>,
    /// Without holder, with hash; the first is evicted first.
    cached: Vec<BlockId>,
}

/// A step of [`compare_blocks`].
#[derive(Clone, Copy, Debug)]
pub enum BlockOperation {
    /// Take a block.
    Allocate,
    /// Look up a hash, and hold what is found.
    Acquire(u32),
    /// Give back one of the references held, by index modulo their number.
    Release(u32),
    /// Register a block that is held, by index, under a hash.
    Publish(u32, u32),
    /// Forget a hash.
    Forget(u32),
}

impl NaiveBlocks {
    /// All free, block 0 first.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        Self {
            blocks: vec![(0, None); num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            cached: Vec::new(),
        }
    }

    /// As [`BlockAllocator::allocate`].
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None if self.cached.is_empty() => return None,
            None => self.cached.remove(0),
        };
        self.blocks[block.0 as usize] = (1, None);
        Some(block)
    }

    /// As [`PrefixCache::get`].
    #[must_use]
    pub fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        let found = self.blocks.iter().position(|(_, other)| other.as_ref() == Some(hash))?;
        Some(BlockId(found as u32))
    }

    /// As [`BlockAllocator::acquire`].
    pub fn acquire(&mut self, block: BlockId) {
        self.cached.retain(|&other| other != block);
        self.blocks[block.0 as usize].0 += 1;
    }

    /// As [`BlockAllocator::release`].
    pub fn release(&mut self, block: BlockId) {
        let (count, hash) = &mut self.blocks[block.0 as usize];
        *count -= 1;
        match (*count, hash) {
            (0, None) => self.free.push(block),
            (0, Some(_)) => self.cached.push(block),
            _ => {}
        }
    }

    /// As [`PrefixCache::insert`].
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) {
        if self.find(&hash).is_none() {
            self.blocks[block.0 as usize].1 = Some(hash);
        }
    }

    /// As [`PrefixCache::remove`].
    pub fn forget(&mut self, hash: &BlockHash) {
        if let Some(block) = self.find(hash) {
            self.blocks[block.0 as usize].1 = None;
            if self.blocks[block.0 as usize].0 == 0 {
                self.cached.retain(|&other| other != block);
                self.free.push(block);
            }
        }
    }
}

/// Plays the operations on the real bookkeeping and on the naive one, and says where they first differ.
pub fn compare_blocks(num_blocks: u32, operations: impl Iterator<Item = BlockOperation>) -> Result<(), String> {
    let mut allocator = BlockAllocator::new(num_blocks);
    let mut cache = PrefixCache::new(num_blocks);
    let mut naive = NaiveBlocks::new(num_blocks);
    let root = BlockHash::root(&CacheSalt::default(), None);
    let hash_of = |key: u32| root.child([&[key], &[]]);
    let mut held: Vec<BlockId> = Vec::new();
    for (index, operation) in operations.enumerate() {
        let fail = |what: String| Err(format!("operation {index} {operation:?}: {what}"));
        match operation {
            BlockOperation::Allocate => {
                let allocation = allocator.allocate();
                let expected = naive.allocate();
                if allocation.map(|allocation| allocation.block) != expected {
                    return fail(format!("{allocation:?} instead of {expected:?}"));
                }
                if let Some(allocation) = allocation {
                    if allocation.evicted {
                        cache.remove(allocation.block);
                    }
                    held.push(allocation.block);
                }
            }
            BlockOperation::Acquire(key) => {
                let (found, expected) = (cache.get(&hash_of(key)), naive.find(&hash_of(key)));
                if found != expected {
                    return fail(format!("{found:?} instead of {expected:?}"));
                }
                if let Some(block) = found {
                    allocator.acquire(block);
                    naive.acquire(block);
                    held.push(block);
                }
            }
            BlockOperation::Release(choice) if !held.is_empty() => {
                let block = held.swap_remove(choice as usize % held.len());
                allocator.release(block);
                naive.release(block);
            }
            BlockOperation::Publish(choice, key) if !held.is_empty() => {
                let block = held[choice as usize % held.len()];
                if cache.hash_of(block).is_none() {
                    if cache.insert(hash_of(key), block) {
                        allocator.set_keep(block);
                    }
                    naive.publish(block, hash_of(key));
                }
            }
            BlockOperation::Forget(key) => {
                if let Some(block) = cache.get(&hash_of(key)) {
                    cache.remove(block);
                    allocator.clear_keep(block);
                }
                naive.forget(&hash_of(key));
            }
            BlockOperation::Release(_) | BlockOperation::Publish(..) => {}
        }
        if allocator.num_free() as usize != naive.free.len() {
            return fail(format!("{} free instead of {}", allocator.num_free(), naive.free.len()));
        }
        if allocator.num_cached() as usize != naive.cached.len() {
            return fail(format!("{} cached instead of {}", allocator.num_cached(), naive.cached.len()));
        }
        if index % 64 == 0 {
            allocator.check_invariants();
            cache.check_invariants();
            if !allocator.eviction_order().eq(naive.cached.iter().copied()) {
                return fail("another order of eviction".to_owned());
            }
        }
    }
    Ok(())
}

impl BlockOperation {
    /// A random operation over so many different hashes.
    pub fn random(rng: &mut Rng, num_hashes: u32) -> Self {
        match rng.below(10) {
            0..=2 => Self::Allocate,
            3 | 4 => Self::Acquire(rng.below(num_hashes)),
            5..=7 => Self::Release(rng.below(1 << 20)),
            8 => Self::Publish(rng.below(1 << 20), rng.below(num_hashes)),
            _ if rng.chance(100) => Self::Forget(rng.below(num_hashes)),
            _ => Self::Publish(rng.below(1 << 20), rng.below(num_hashes)),
        }
    }
}
