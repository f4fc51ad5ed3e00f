//! What a listener makes of the prefix cache's events, and whether it is true.

use std::collections::BTreeMap;

use crate::{BlockHash, KvBlock, KvEvent, KvEvents, Request, Scheduler, ShortHash};

/// A listener who believes nothing: each block's hash is computed again from its tokens and its parent's whole hash.
#[derive(Debug)]
pub(super) struct KvReplay {
    block_size: usize,
    /// What can be hit, by group and hash.
    held: BTreeMap<(u32, ShortHash), (KvBlock, Vec<u32>)>,
    /// Of all chains' beginnings and all blocks that were ever stored.
    whole: BTreeMap<ShortHash, BlockHash>,
}

impl KvReplay {
    pub(super) fn new(block_size: u32) -> Self {
        Self { block_size: block_size as usize, held: BTreeMap::new(), whole: BTreeMap::new() }
    }

    /// Blocks of this request may come.
    pub(super) fn know_root(&mut self, request: &Request) {
        let root = BlockHash::root(&request.cache_salt, request.adapter);
        self.whole.insert(root.short(), root);
    }

    /// Takes in what happened. Panics unless it gives exactly the blocks that the scheduler can hit now.
    pub(super) fn follow(&mut self, scheduler: &mut Scheduler) {
        if let Some(events) = scheduler.drain_kv_events() {
            assert!(!events.has_lost);
            self.take(&events);
        }
        let all = scheduler.kv_blocks();
        assert_eq!(all.events[0], KvEvent::Cleared);
        let mut fresh = Self { block_size: self.block_size, held: BTreeMap::new(), whole: self.whole.clone() };
        fresh.take(&all);
        assert_eq!(self.held, fresh.held);
        let mut seen = std::collections::BTreeSet::new();
        for event in &all.events {
            let KvEvent::Stored(block) = event else { continue };
            let parent = block.parent.map(|parent| (block.group, parent));
            assert!(parent.is_none_or(|key| seen.contains(&key) || !fresh.held.contains_key(&key)), "child first");
            seen.insert((block.group, block.hash));
        }
        let num_kept: u32 = scheduler.kv.groups.iter().map(|group| group.cache.len()).sum();
        assert_eq!(self.held.len() as u32, num_kept);
    }

    fn take(&mut self, events: &KvEvents) {
        let mut token_ids = events.token_ids.chunks_exact(self.block_size);
        for event in &events.events {
            match *event {
                KvEvent::Stored(block) => {
                    let token_ids = token_ids.next().expect("a stored block has tokens");
                    let before = self.whole.get(&block.parent.unwrap_or(block.root)).expect("parents come first");
                    let hash = before.child([token_ids, &[]]);
                    assert_eq!(hash.short(), block.hash, "the tokens are not the block's");
                    self.whole.insert(block.hash, hash);
                    let held = self.held.insert((block.group, block.hash), (block, token_ids.to_vec()));
                    assert_eq!(held, None, "stored twice");
                }
                KvEvent::Removed { group, hash } => {
                    assert!(self.held.remove(&(group, hash)).is_some(), "removed and not stored");
                }
                KvEvent::Cleared => self.held.clear(),
            }
        }
        assert!(token_ids.next().is_none());
    }
}
