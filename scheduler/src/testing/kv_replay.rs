//! What a listener makes of the prefix cache's events, and whether it is true.

use std::collections::BTreeMap;

use crate::{BlockHash, KvBlock, KvEvent, KvEvents, KvGroupKind, Request, Scheduler, SchedulerConfig, ShortHash};

/// A listener who believes nothing: each block's hash is computed again from its tokens and its parent's whole hash.
#[derive(Debug)]
pub(super) struct KvReplay {
    block_size: usize,
    /// Of each group, whether it keeps a window only: a block can leave that before it could be hit, so that no listener
    /// hears of it, and its children come without it.
    is_windowed: Vec<bool>,
    /// What can be hit, by group and hash.
    held: BTreeMap<(u32, ShortHash), (KvBlock, Vec<u32>)>,
    /// Of all chains' beginnings and all blocks that were ever stored behind others that were.
    whole: BTreeMap<ShortHash, BlockHash>,
}

impl KvReplay {
    pub(super) fn new(config: &SchedulerConfig) -> Self {
        let is_windowed = config.kv_groups.iter().map(|group| matches!(group.kind, KvGroupKind::SlidingWindow { .. }));
        let (held, whole) = (BTreeMap::new(), BTreeMap::new());
        Self { block_size: config.block_size as usize, is_windowed: is_windowed.collect(), held, whole }
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
        let (is_windowed, whole) = (self.is_windowed.clone(), self.whole.clone());
        let mut fresh = Self { block_size: self.block_size, is_windowed, held: BTreeMap::new(), whole };
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
                    match self.whole.get(&block.parent.unwrap_or(block.root)) {
                        Some(before) => {
                            let hash = before.child([token_ids, &[]]);
                            assert_eq!(hash.short(), block.hash, "the tokens are not the block's");
                            self.whole.insert(block.hash, hash);
                        }
                        None => assert!(self.is_windowed[block.group as usize], "parents come first"),
                    }
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
