//! Chained block hash -> block: finds full blocks that hold the K and V of a token prefix already.
//!
//! A block's hash covers its parent's hash and its own tokens, so equal hashes mean equal prefixes from the first token
//! on. The first parent is made of the request's [`CacheSalt`] and adapter: whoever has another salt can neither hit a
//! block nor learn from timing that it exists.
//!
//! The hash is SHA-256's chaining value: the compression function takes the parent as its state and the tokens as its
//! message, without the padding that a complete SHA-256 would add to each block. All blocks of a cache have one length,
//! so nothing is lost by that, and a block of 16 tokens costs one round of the function instead of two. It keeps all
//! 256 bits: a collision would serve one caller's K and V to another.

use sha2::block_api::compress256;
use sha2::{Digest, Sha256};

use crate::{AdapterId, BlockId, CacheSalt, ShortHash};

/// Tokens in one message of the compression function.
const MESSAGE_TOKENS: usize = 16;

/// Hash of a full block and of everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u32; 8]);

impl BlockHash {
    /// Parent of a sequence's first block.
    ///
    /// The salt should be derived from the adapter already; mixing its id in once more costs nothing and keeps a
    /// forgetful caller from sharing blocks between adapters.
    #[must_use]
    pub fn root(salt: &CacheSalt, adapter: Option<AdapterId>) -> Self {
        let mut hasher = Sha256::new_with_prefix(salt.0);
        if let Some(AdapterId(id)) = adapter {
            hasher.update(id.to_le_bytes());
        }
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(hasher.finalize().chunks_exact(4)) {
            *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self(words)
    }

    /// The first 64 bits, for others to tell blocks apart by.
    #[must_use]
    pub fn short(&self) -> ShortHash {
        ShortHash(u64::from(self.0[0]) << 32 | u64::from(self.0[1]))
    }

    /// Hash of the block that follows this one and holds the tokens of `parts`, one after the other.
    #[must_use]
    pub fn child(&self, parts: [&[u32]; 2]) -> Self {
        let mut state = self.0;
        let mut message = [0; 4 * MESSAGE_TOKENS];
        let mut len = 0;
        for &token in parts.into_iter().flatten() {
            message[len..len + 4].copy_from_slice(&token.to_le_bytes());
            len += 4;
            if len == message.len() {
                compress256(&mut state, &[message]);
                len = 0;
            }
        }
        if len > 0 {
            // A last message that is not full is filled up with zeros; as all blocks are of one length, a token 0 there
            // cannot be mistaken for filling.
            message[len..].fill(0);
            compress256(&mut state, &[message]);
        }
        Self(state)
    }
}

const VACANT: u32 = u32::MAX;

/// A block, and as much of its hash as lets most probes go on without looking at the whole hash elsewhere.
#[derive(Clone, Copy, Debug)]
struct Place {
    id: u32,
    tag: u32,
}

/// Map of one KV group from block hash to the block that holds the content. At most one block per hash and one hash
/// per block; never grows after it was made.
///
/// Open addressing with linear probing. The hash itself is the probe's start: it is uniform, and nobody can aim at one
/// place without knowing the salt.
#[derive(Debug)]
pub struct PrefixCache {
    /// A power of two at least twice the number of blocks, so probes end soon.
    places: Vec<Place>,
    hashes: Vec<Option<BlockHash>>,
    len: u32,
}

impl PrefixCache {
    /// An empty map for blocks 0 to `num_blocks - 1`.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        let num_places = (2 * num_blocks as usize).next_power_of_two().max(2);
        Self { places: vec![Place { id: VACANT, tag: 0 }; num_places], hashes: vec![None; num_blocks as usize], len: 0 }
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
        Some(self.places[place].id).filter(|&id| id != VACANT).map(BlockId)
    }

    /// The hash under which a block can be hit.
    #[must_use]
    pub fn hash_of(&self, block: BlockId) -> Option<&BlockHash> {
        self.hashes[block.0 as usize].as_ref()
    }

    /// Registers a block; false when another block has the same content already and stays.
    pub fn insert(&mut self, hash: BlockHash, block: BlockId) -> bool {
        let place = self.find(&hash);
        if self.places[place].id != VACANT {
            return false;
        }
        let previous = self.hashes[block.0 as usize].replace(hash);
        assert!(previous.is_none(), "{block:?} is registered under another hash");
        self.places[place] = Place { id: block.0, tag: tag(&hash) };
        self.len += 1;
        true
    }

    /// Forgets a block; nothing happens when it is not registered.
    pub fn remove(&mut self, block: BlockId) {
        let Some(hash) = self.hashes[block.0 as usize].take() else { return };
        let mask = self.places.len() - 1;
        let mut hole = self.home(&hash);
        while self.places[hole].id != block.0 {
            hole = (hole + 1) & mask;
        }
        // Close the gap: whatever was pushed past the hole by the removed entry moves back, so that no probe that
        // stops at a vacant place misses an entry behind it.
        let mut place = hole;
        loop {
            place = (place + 1) & mask;
            let moved = self.places[place];
            if moved.id == VACANT {
                break;
            }
            let home = self.hashes[moved.id as usize].map_or(place, |hash| self.home(&hash));
            let distance_from_home = place.wrapping_sub(home) & mask;
            let distance_from_hole = place.wrapping_sub(hole) & mask;
            if distance_from_home >= distance_from_hole {
                self.places[hole] = moved;
                hole = place;
            }
        }
        self.places[hole].id = VACANT;
        self.len -= 1;
    }

    pub(crate) fn num_places(&self) -> usize {
        self.places.len()
    }

    /// Places of the range that name a block.
    pub(crate) fn num_occupied(&self, range: std::ops::Range<usize>) -> u32 {
        self.places[range].iter().filter(|place| place.id != VACANT).count() as u32
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
        assert_eq!(self.places.iter().filter(|place| place.id != VACANT).count() as u32, self.len);
    }

    fn home(&self, hash: &BlockHash) -> usize {
        hash.0[0] as usize & (self.places.len() - 1)
    }

    /// Where the hash is, or the vacant place where it would go.
    fn find(&self, hash: &BlockHash) -> usize {
        let mask = self.places.len() - 1;
        let mut place = self.home(hash);
        loop {
            let Place { id, tag: other } = self.places[place];
            if id == VACANT || other == tag(hash) && self.hashes[id as usize].as_ref() == Some(hash) {
                return place;
            }
            place = (place + 1) & mask;
        }
    }
}

fn tag(hash: &BlockHash) -> u32 {
    hash.0[1]
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
    fn a_chain_is_sha_256_before_its_padding() {
        // SHA-256 of one message block's worth of bytes is: the chaining value after them, then the padding block.
        const INITIAL: [u32; 8] =
            [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
        let tokens: Vec<u32> = (1000..1016).collect();
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let mut padding = [0; 64];
        padding[0] = 0x80;
        padding[62..].copy_from_slice(&512_u16.to_be_bytes());
        let mut state = BlockHash(INITIAL).child([&tokens, &[]]).0;
        compress256(&mut state, &[padding]);
        let digest: Vec<u8> = state.iter().flat_map(|word| word.to_be_bytes()).collect();
        assert_eq!(digest, Sha256::digest(&bytes).to_vec());
    }

    #[test]
    fn blocks_of_any_length_are_hashed_to_their_last_token() {
        let root = BlockHash::root(&CacheSalt::default(), None);
        for len in [1, 15, 16, 17, 32, 64] {
            let mut tokens: Vec<u32> = (0..len).collect();
            let before = root.child([&tokens, &[]]);
            tokens[len as usize - 1] += 1;
            assert_ne!(root.child([&tokens, &[]]), before);
        }
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut cache = PrefixCache::new(4);
        let hash = BlockHash([1; 8]);
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
        for start in 5..8 {
            for victim in 0..4 {
                let mut cache = PrefixCache::new(4);
                let hashes: Vec<_> =
                    (0..4).map(|i| BlockHash([start + u32::from(i == 2), i, 0, 0, 0, 0, 0, 0])).collect();
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
