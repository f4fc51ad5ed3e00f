//! Chained block hash -> block: finds full blocks that hold the K and V of a token prefix already.
//!
//! A block's hash covers its parent's hash and its own tokens, so equal hashes mean equal prefixes from the first token
//! on. The first parent is the request's [`CacheSalt`] (with its adapter mixed in): whoever has another salt can
//! neither hit a block nor learn from timing that it exists. The hash is SHA-256 in full length: a collision would
//! serve one caller's K and V to another, and at two rounds per block there is no speed to be gained from less.

use sha2::{Digest, Sha256};

use crate::{AdapterId, BlockId, CacheSalt};

/// Hash of a full block and of everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u64; 4]);

impl BlockHash {
    /// Parent of a sequence's first block.
    ///
    /// The salt should be derived from the adapter already; mixing its id in once more costs one hash a request and
    /// keeps a forgetful caller from sharing blocks between adapters.
    #[must_use]
    pub fn root(salt: &CacheSalt, adapter: Option<AdapterId>) -> Self {
        match adapter {
            None => Self::from_bytes(&salt.0),
            Some(AdapterId(id)) => {
                let digest = Sha256::new().chain_update(salt.0).chain_update(id.to_le_bytes()).finalize();
                Self::from_bytes(&digest.into())
            }
        }
    }

    /// Hash of the block that follows this one and holds the tokens of `parts`, one after the other.
    #[must_use]
    pub fn child(&self, parts: [&[u32]; 2]) -> Self {
        let mut hasher = Sha256::new();
        let mut bytes = [0; 64];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        hasher.update(&bytes[..32]);
        for part in parts {
            for tokens in part.chunks(16) {
                for (chunk, token) in bytes.chunks_exact_mut(4).zip(tokens) {
                    chunk.copy_from_slice(&token.to_le_bytes());
                }
                hasher.update(&bytes[..4 * tokens.len()]);
            }
        }
        Self::from_bytes(&hasher.finalize().into())
    }

    fn from_bytes(bytes: &[u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = chunk.iter().rev().fold(0, |sum, &byte| (sum << 8) | u64::from(byte));
        }
        Self(words)
    }
}

const VACANT: u32 = u32::MAX;

/// Map of one KV group from block hash to the block that holds the content. At most one block per hash and one hash
/// per block; never grows after it was made.
///
/// Open addressing with linear probing. The hash itself is the probe's start: it is uniform, and nobody can aim at one
/// place without knowing the salt.
#[derive(Debug)]
pub struct PrefixCache {
    /// Block ids; a power of two at least twice the number of blocks, so probes end soon.
    places: Vec<u32>,
    hashes: Vec<Option<BlockHash>>,
    len: u32,
}

impl PrefixCache {
    /// An empty map for blocks 0 to `num_blocks - 1`.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        let num_places = (2 * num_blocks as usize).next_power_of_two().max(2);
        Self { places: vec![VACANT; num_places], hashes: vec![None; num_blocks as usize], len: 0 }
    }

    /// Number of blocks that can be hit.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it was made for no blocks.
    #[must_use]
    pub(crate) fn is_disabled(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whether no block can be hit.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block with this content.
    #[must_use]
    pub fn get(&self, hash: &BlockHash) -> Option<BlockId> {
        let place = self.find(hash);
        Some(self.places[place]).filter(|&id| id != VACANT).map(BlockId)
    }

    /// The hash under which a block can be hit.
    #[must_use]
    pub fn hash_of(&self, block: BlockId) -> Option<&BlockHash> {
        self.hashes[block.0 as usize].as_ref()
    }

    /// Registers a block; false when another block has the same content already and stays.
    pub fn insert(&mut self, hash: BlockHash, block: BlockId) -> bool {
        let place = self.find(&hash);
        if self.places[place] != VACANT {
            return false;
        }
        let previous = self.hashes[block.0 as usize].replace(hash);
        assert!(previous.is_none(), "{block:?} is registered under another hash");
        self.places[place] = block.0;
        self.len += 1;
        true
    }

    /// Forgets a block; nothing happens when it is not registered.
    pub fn remove(&mut self, block: BlockId) {
        let Some(hash) = self.hashes[block.0 as usize].take() else { return };
        let mask = self.places.len() - 1;
        let mut hole = self.home(&hash);
        while self.places[hole] != block.0 {
            hole = (hole + 1) & mask;
        }
        // Close the gap: whatever was pushed past the hole by the removed entry moves back, so that no probe that
        // stops at a vacant place misses an entry behind it.
        let mut place = hole;
        loop {
            place = (place + 1) & mask;
            let id = self.places[place];
            if id == VACANT {
                break;
            }
            let home = self.hashes[id as usize].map_or(place, |hash| self.home(&hash));
            let distance_from_home = place.wrapping_sub(home) & mask;
            let distance_from_hole = place.wrapping_sub(hole) & mask;
            if distance_from_home >= distance_from_hole {
                self.places[hole] = id;
                hole = place;
            }
        }
        self.places[hole] = VACANT;
        self.len -= 1;
    }

    /// Panics unless every registered block is found under its hash, and nothing else is.
    pub fn check_invariants(&self) {
        let mut num_registered = 0;
        for (id, hash) in self.hashes.iter().enumerate() {
            if let Some(hash) = hash {
                assert_eq!(self.get(hash), Some(BlockId(id as u32)), "a registered block is not found");
                num_registered += 1;
            }
        }
        assert_eq!(num_registered, self.len);
        assert_eq!(self.places.iter().filter(|&&id| id != VACANT).count() as u32, self.len);
    }

    fn home(&self, hash: &BlockHash) -> usize {
        hash.0[0] as usize & (self.places.len() - 1)
    }

    /// Where the hash is, or the vacant place where it would go.
    fn find(&self, hash: &BlockHash) -> usize {
        let mask = self.places.len() - 1;
        let mut place = self.home(hash);
        loop {
            let id = self.places[place];
            if id == VACANT || self.hashes[id as usize].as_ref() == Some(hash) {
                return place;
            }
            place = (place + 1) & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_separates_salts_adapters_parents_and_tokens_but_not_the_split_into_parts() {
        let root = BlockHash::root(&CacheSalt([7; 32]), None);
        let tokens: Vec<u32> = (0..40).collect();
        let hash = root.child([&tokens, &[]]);
        for split in [0, 1, 16, 39, 40] {
            assert_eq!(root.child([&tokens[..split], &tokens[split..]]), hash);
        }
        let others = [
            BlockHash::root(&CacheSalt([8; 32]), None).child([&tokens, &[]]),
            BlockHash::root(&CacheSalt([7; 32]), Some(AdapterId(0))).child([&tokens, &[]]),
            hash.child([&tokens, &[]]),
            root.child([&tokens[1..], &tokens[..1]]),
        ];
        assert!(others.iter().all(|other| *other != hash));
    }

    #[test]
    fn the_hash_is_sha_256_of_parent_and_little_endian_tokens() {
        let mut message = vec![3; 32];
        message.extend_from_slice(&[1, 0, 0, 0, 0, 2, 0, 0]);
        let expected = BlockHash::from_bytes(&Sha256::digest(&message).into());
        assert_eq!(BlockHash::root(&CacheSalt([3; 32]), None).child([&[1], &[512]]), expected);
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut cache = PrefixCache::new(4);
        let hash = BlockHash([1; 4]);
        assert!(cache.insert(hash, BlockId(2)));
        assert!(!cache.insert(hash, BlockId(3)));
        assert_eq!(cache.get(&hash), Some(BlockId(2)));
        cache.remove(BlockId(3));
        cache.remove(BlockId(2));
        assert_eq!((cache.get(&hash), cache.len()), (None, 0));
    }

    #[test]
    fn removal_closes_gaps_also_around_the_end() {
        // Four blocks, eight places; all hashes start at the last place or near it.
        for start in 5..8_u64 {
            for victim in 0..4 {
                let mut cache = PrefixCache::new(4);
                let hashes: Vec<_> = (0..4).map(|i| BlockHash([start + u64::from(i == 2), i, 0, 0])).collect();
                for (id, hash) in hashes.iter().enumerate() {
                    assert!(cache.insert(*hash, BlockId(id as u32)));
                }
                cache.remove(BlockId(victim));
                cache.check_invariants();
                assert_eq!(cache.len(), 3);
            }
        }
    }
}
