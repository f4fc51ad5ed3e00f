//! All KV groups together: each has its allocator, its prefix cache and a block table per row.
//!
//! The tables of one row have the same length in every group; where a group needs no block for a position (it fell
//! out of the window) its entry is [`BlockId::NONE`]. So one number, the row's length in blocks, serves all groups.

use crate::allocator::BlockAllocator;
use crate::block::{BlockTable, num_blocks_for};
use crate::kv_events::{BlockRecords, KvEventLog};
use crate::prefix_cache::{BlockHash, PrefixCache};
use crate::stats::BlockStats;
use crate::{BlockId, FlushReport, KvGroupKind, SchedulerConfig, ShortHash};

/// See the module's text.
#[derive(Debug)]
pub(crate) struct KvGroups {
    block_size: u32,
    pub(crate) groups: Vec<Group>,
    /// Of group g in row r at `r * groups.len() + g`.
    tables: Vec<BlockTable>,
    /// Counts moments at which blocks were given back: while it stands still, what did not fit still does not.
    release_epoch: u64,
    pub(crate) log: KvEventLog,
}

/// The content of a block that is full and computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FullBlock<'a> {
    pub(crate) hash: BlockHash,
    pub(crate) parent: Option<BlockHash>,
    /// Looked at where blocks are described.
    pub(crate) root: ShortHash,
    pub(crate) token_ids: [&'a [u32]; 2],
}

#[derive(Debug)]
pub(crate) struct Group {
    kind: KvGroupKind,
    pub(crate) allocator: BlockAllocator,
    pub(crate) cache: PrefixCache,
    /// Most blocks that one sequence holds at a time.
    max_live: u32,
    /// Blocks that running sequences need before their known tokens are computed; made anew by every plan.
    promised: u32,
}

impl Group {
    /// First block that a sequence reads whose computation goes on behind `num_tokens`.
    fn first_needed(&self, num_tokens: u32, block_size: u32) -> u32 {
        match self.kind {
            KvGroupKind::Full => 0,
            KvGroupKind::SlidingWindow { window } => num_tokens.saturating_sub(window - 1) / block_size,
        }
    }

    /// `index` is the group's own.
    fn allocate(&mut self, index: usize, log: &mut KvEventLog) -> BlockId {
        let allocation = self.allocator.allocate().expect("callers check that enough blocks are available");
        if allocation.evicted {
            log.remove(index, || self.cache.hash_of(allocation.block).expect("it could be hit").short());
            self.cache.remove(allocation.block);
        }
        allocation.block
    }

    /// Blocks to allocate until all of `num_tokens` are computed, for a table that stands at `len` entries of which
    /// those from `first_live` are held.
    fn num_missing(&self, num_tokens: u32, len: u32, first_live: u32, block_size: u32) -> u32 {
        let total = num_blocks_for(num_tokens, block_size).saturating_sub(first_live).min(self.max_live);
        total.saturating_sub(len - first_live)
    }
}

impl KvGroups {
    /// Reserves everything that the tables of all rows can ever need.
    pub(crate) fn new(config: &SchedulerConfig) -> Self {
        let groups: Vec<Group> = config
            .kv_groups
            .iter()
            .map(|group| Group {
                kind: group.kind,
                allocator: BlockAllocator::new(group.num_blocks),
                cache: PrefixCache::new(if config.enable_prefix_cache { group.num_blocks } else { 0 }),
                max_live: config.max_live_blocks(group.kind),
                promised: 0,
            })
            .collect();
        let table_len = num_blocks_for(config.max_model_len, config.block_size);
        let num_tables = config.max_num_seqs as usize * groups.len();
        let tables = (0..num_tables).map(|_| BlockTable::with_capacity(table_len)).collect();
        let is_told = config.kv_events && config.enable_prefix_cache;
        let records = config.kv_groups.iter().filter(|_| is_told);
        let records = records.map(|group| BlockRecords::new(group.num_blocks, config.block_size)).collect();
        Self { block_size: config.block_size, groups, tables, release_epoch: 0, log: KvEventLog::new(records) }
    }

    pub(crate) fn release_epoch(&self) -> u64 {
        self.release_epoch
    }

    pub(crate) fn has_windows(&self) -> bool {
        self.groups.iter().any(|group| group.kind != KvGroupKind::Full)
    }

    /// Positions in blocks that the row's tables cover.
    pub(crate) fn len(&self, row: u32) -> u32 {
        self.tables(row)[0].entries().len() as u32
    }

    /// Blocks that the row holds, in all groups.
    pub(crate) fn num_live_blocks(&self, row: u32) -> usize {
        self.tables(row).iter().map(|table| table.live().len()).sum()
    }

    fn tables(&self, row: u32) -> &[BlockTable] {
        let first = row as usize * self.groups.len();
        &self.tables[first..first + self.groups.len()]
    }

    /// Appends `count` positions to the row's tables and their blocks to `out`, one position of all groups after the
    /// other. False and unchanged when a group has too few blocks.
    pub(crate) fn append(&mut self, row: u32, count: u32, out: &mut Vec<BlockId>) -> bool {
        if self.groups.iter().any(|group| group.allocator.num_available() < count) {
            return false;
        }
        let first = row as usize * self.groups.len();
        for _ in 0..count {
            for (index, (group, table)) in self.groups.iter_mut().zip(&mut self.tables[first..]).enumerate() {
                let block = group.allocate(index, &mut self.log);
                table.push(block);
                out.push(block);
            }
        }
        true
    }

    /// Writes the row's whole tables to `out`, in the order of [`KvGroups::append`].
    pub(crate) fn copy_tables(&self, row: u32, out: &mut Vec<BlockId>) {
        let tables = self.tables(row);
        for position in 0..tables[0].entries().len() {
            out.extend(tables.iter().map(|table| table.entries()[position]));
        }
    }

    /// Gives all of the row's blocks back, last block first, so that what was kept is evicted leaf first.
    pub(crate) fn release_row(&mut self, row: u32) {
        let first = row as usize * self.groups.len();
        for (group, table) in self.groups.iter_mut().zip(&mut self.tables[first..]) {
            while let Some(block) = table.pop_live() {
                group.allocator.release(block);
            }
        }
        self.release_epoch += 1;
    }

    /// Gives back the row's blocks that no token from position `num_computed` on sees.
    ///
    /// `slack` tokens before the window are kept too: one block where other choices may want to fork from the row's
    /// prompt, which ends up to a block before what the row itself has computed.
    pub(crate) fn slide(&mut self, row: u32, num_computed: u32, slack: u32) {
        let first = row as usize * self.groups.len();
        for (group, table) in self.groups.iter_mut().zip(&mut self.tables[first..]) {
            let end = group.first_needed(num_computed.saturating_sub(slack), self.block_size);
            while let Some(block) = table.drop_first_live(end) {
                group.allocator.release(block);
                self.release_epoch += 1;
            }
        }
    }

    /// Lets other sequences hit the row's block at `position`.
    pub(crate) fn publish(&mut self, row: u32, position: u32, content: &FullBlock<'_>) {
        let first = row as usize * self.groups.len();
        for (index, (group, table)) in self.groups.iter_mut().zip(&self.tables[first..]).enumerate() {
            let block = table.entries()[position as usize];
            // Where another block has this content already, that one stays and ours is freed like any other.
            if !block.is_none() && group.cache.insert(content.hash, block) {
                group.allocator.set_keep(block);
                self.log.store(index, block, position, content);
            }
        }
    }

    /// See [`Scheduler::flush_cache`](crate::Scheduler::flush_cache).
    pub(crate) fn flush(&mut self) -> FlushReport {
        let num_dropped = self.groups.iter().map(|group| group.allocator.num_cached()).sum();
        let num_registered: u32 = self.groups.iter().map(|group| group.cache.len()).sum();
        let num_held = num_registered - num_dropped;
        for (index, group) in self.groups.iter_mut().enumerate() {
            while let Some(block) = group.allocator.newer_than(None) {
                if num_held > 0 {
                    self.log.remove(index, || group.cache.hash_of(block).expect("it could be hit").short());
                }
                group.cache.remove(block);
                group.allocator.clear_keep(block);
            }
        }
        if num_dropped > 0 && num_held == 0 {
            self.log.clear();
        }
        FlushReport { num_dropped, num_held }
    }

    /// No block under these hashes can be hit any more.
    pub(crate) fn forget(&mut self, hashes: &[BlockHash]) {
        for (index, group) in self.groups.iter_mut().enumerate() {
            for hash in hashes {
                if let Some(block) = group.cache.get(hash) {
                    self.log.remove(index, || hash.short());
                    group.cache.remove(block);
                    group.allocator.clear_keep(block);
                }
            }
        }
    }

    /// Most blocks at the front of the chain `hashes` that a sequence need not compute: in every group, each of them
    /// that the sequence will still read is cached.
    pub(crate) fn longest_prefix(&self, hashes: &[BlockHash]) -> u32 {
        let mut len = hashes.len() as u32;
        for group in &self.groups {
            if group.kind == KvGroupKind::Full {
                let misses = |hash| group.cache.get(hash).is_none();
                len = hashes[..len as usize].iter().position(misses).map_or(len, |position| position as u32);
            }
        }
        // A shorter prefix may suit one window and not another: shorten until nobody objects.
        loop {
            let agreed = self.groups.iter().fold(len, |len, group| self.longest_window_prefix(group, hashes, len));
            if agreed == len {
                return len;
            }
            len = agreed;
        }
    }

    /// Most blocks, at most `len`, whose last window is cached in the group.
    fn longest_window_prefix(&self, group: &Group, hashes: &[BlockHash], mut len: u32) -> u32 {
        if group.kind == KvGroupKind::Full {
            return len;
        }
        let mut position = len;
        // Blocks from `position` to `len` are cached. A miss at a block rules out every prefix that still sees it.
        while len > 0 && position > group.first_needed(len * self.block_size, self.block_size) {
            position -= 1;
            if group.cache.get(&hashes[position as usize]).is_none() {
                len = position;
            }
        }
        len
    }

    /// Whether the first `len` blocks of `donor` can be shared: every group still holds what a sequence reads that
    /// goes on behind them.
    pub(crate) fn can_fork(&self, donor: u32, len: u32) -> bool {
        self.groups.iter().zip(self.tables(donor)).all(|(group, table)| {
            table.entries().len() as u32 >= len
                && table.first_live() <= group.first_needed(len * self.block_size, self.block_size)
        })
    }

    /// Whether a sequence can start that has `num_tokens` to compute and finds the first blocks at `source`: then all
    /// its tokens find a block, and those that running sequences still need, and `spare` more.
    pub(crate) fn has_room(&self, source: Source<'_>, num_tokens: u32, spare: u32) -> bool {
        let len = source.len();
        self.groups.iter().enumerate().all(|(index, group)| {
            let first = group.first_needed(len * self.block_size, self.block_size).min(len);
            // A hit block that nobody holds is available now and not any more once it is taken.
            let num_idle = match source {
                Source::Cache(hashes) => {
                    let is_idle = |hash| {
                        let block = group.cache.get(hash).expect("longest_prefix found it");
                        group.allocator.refcount(block) == 0
                    };
                    hashes[first as usize..].iter().filter(|hash| is_idle(hash)).count() as u32
                }
                Source::Row { row, .. } => {
                    debug_assert!(self.tables(row)[index].first_live() <= first);
                    0
                }
            };
            let missing = group.num_missing(num_tokens, len, first, self.block_size);
            let needed = u64::from(missing) + u64::from(num_idle) + u64::from(group.promised) + u64::from(spare);
            u64::from(group.allocator.num_available()) >= needed
        })
    }

    /// Fills the empty tables of `row` with the blocks found at `source`.
    pub(crate) fn share(&mut self, row: u32, source: Source<'_>) {
        let len = source.len();
        let num_groups = self.groups.len();
        for (index, group) in self.groups.iter_mut().enumerate() {
            let first = group.first_needed(len * self.block_size, self.block_size).min(len);
            let target = row as usize * num_groups + index;
            self.tables[target].skip(first);
            for position in first as usize..len as usize {
                let block = match source {
                    Source::Cache(hashes) => group.cache.get(&hashes[position]).expect("longest_prefix found it"),
                    Source::Row { row, .. } => self.tables[row as usize * num_groups + index].entries()[position],
                };
                group.allocator.acquire(block);
                self.tables[target].push(block);
            }
        }
    }

    /// Forgets what [`KvGroups::promise`] said for the last plan.
    pub(crate) fn clear_promises(&mut self) {
        for group in &mut self.groups {
            group.promised = 0;
        }
    }

    /// Sets blocks aside, as far as admissions are concerned, that the running sequence in `row` needs until all of
    /// `num_tokens` are computed.
    pub(crate) fn promise(&mut self, row: u32, num_tokens: u32) {
        let first = row as usize * self.groups.len();
        for (group, table) in self.groups.iter_mut().zip(&self.tables[first..]) {
            let len = table.entries().len() as u32;
            group.promised += group.num_missing(num_tokens, len, table.first_live(), self.block_size);
        }
    }

    pub(crate) fn stats(&self, group: usize) -> BlockStats {
        let allocator = &self.groups[group].allocator;
        BlockStats {
            num_total: allocator.num_blocks(),
            num_used: allocator.num_used(),
            num_cached: allocator.num_cached(),
            num_free: allocator.num_free(),
        }
    }

    pub(crate) fn num_groups(&self) -> usize {
        self.groups.len()
    }

    /// Panics unless reference counts are the numbers of tables that hold the blocks, `free + used + cached = total`,
    /// and exactly the registered blocks are kept. `rows` are those in use; all others must be empty.
    pub(crate) fn check_invariants(&self, rows: impl Iterator<Item = u32> + Clone) {
        for (index, group) in self.groups.iter().enumerate() {
            group.allocator.check_invariants();
            group.cache.check_invariants();
            let mut holders = vec![0; group.allocator.num_blocks() as usize];
            let mut num_live = 0;
            for row in rows.clone() {
                let table = &self.tables(row)[index];
                assert_eq!(table.entries().len(), self.tables(row)[0].entries().len(), "tables differ in length");
                assert!(table.entries()[..table.first_live() as usize].iter().all(|block| block.is_none()));
                for block in table.live() {
                    holders[block.0 as usize] += 1;
                }
                num_live += table.live().len();
            }
            let all = self.tables.iter().skip(index).step_by(self.groups.len());
            assert_eq!(all.map(|table| table.live().len()).sum::<usize>(), num_live, "a row out of use holds blocks");
            for (id, &count) in holders.iter().enumerate() {
                let block = BlockId(id as u32);
                assert_eq!(group.allocator.refcount(block), count, "references to {block:?}");
                let is_registered = !group.cache.is_disabled() && group.cache.hash_of(block).is_some();
                assert_eq!(group.allocator.is_kept(block), is_registered, "{block:?}");
            }
        }
    }
}

/// Where the computed front of a starting sequence comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// Cached blocks under these hashes, as [`KvGroups::longest_prefix`] found them; none is a start from nothing.
    Cache(&'a [BlockHash]),
    /// The first `len` blocks of another row ([`KvGroups::can_fork`]).
    Row { row: u32, len: u32 },
}

impl Source<'_> {
    pub(crate) fn len(self) -> u32 {
        match self {
            Self::Cache(hashes) => hashes.len() as u32,
            Self::Row { len, .. } => len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheSalt, KvGroup};

    fn groups(kinds: &[KvGroupKind]) -> KvGroups {
        let kv_groups = kinds.iter().map(|&kind| KvGroup { kind, num_blocks: 32 }).collect();
        let config = SchedulerConfig {
            max_num_seqs: 3,
            max_num_batched_tokens: 8,
            max_model_len: 64,
            block_size: 4,
            kv_groups,
            ..SchedulerConfig::default()
        };
        config.validate().unwrap();
        KvGroups::new(&config)
    }

    fn chain(len: u32) -> Vec<BlockHash> {
        let root = BlockHash::root(&CacheSalt::default(), None);
        let links = std::iter::successors(Some(root), |parent| Some(parent.child([&[1], &[]])));
        links.skip(1).take(len as usize).collect()
    }

    fn full_block(hash: BlockHash) -> FullBlock<'static> {
        FullBlock { hash, parent: None, root: ShortHash(0), token_ids: [&[], &[]] }
    }

    #[test]
    fn a_hit_needs_the_whole_chain_in_full_groups_and_the_last_window_in_others() {
        // (window, blocks that are missing from the group with the window, longest prefix of 8 blocks of 4 tokens)
        let cases: [(u32, &[u32], u32); 8] = [
            (1, &[0, 1, 2, 3, 4, 5, 6, 7], 8),
            (2, &[7], 7),
            (2, &[0, 1, 2, 3, 4, 5, 6], 8),
            (5, &[6], 8),
            (6, &[6], 6),
            (9, &[5, 6], 5),
            (64, &[0], 0),
            (64, &[], 8),
        ];
        for (window, missing, expected) in cases {
            let mut kv = groups(&[KvGroupKind::Full, KvGroupKind::SlidingWindow { window }]);
            let hashes = chain(8);
            assert!(kv.append(0, 8, &mut Vec::new()));
            for (position, &hash) in hashes.iter().enumerate() {
                kv.publish(0, position as u32, &full_block(hash));
            }
            for &position in missing {
                let block = kv.tables(0)[1].entries()[position as usize];
                kv.groups[1].cache.remove(block);
                kv.groups[1].allocator.clear_keep(block);
            }
            assert_eq!(kv.longest_prefix(&hashes), expected, "window {window}, missing {missing:?}");
            kv.check_invariants([0].into_iter());
            kv.share(1, Source::Cache(&hashes[..expected as usize]));
            kv.check_invariants([0, 1].into_iter());
        }
    }

    #[test]
    fn a_hole_in_a_full_group_ends_the_hit() {
        let mut kv = groups(&[KvGroupKind::Full]);
        let hashes = chain(8);
        kv.append(0, 8, &mut Vec::new());
        for position in [0, 1, 3, 4] {
            kv.publish(0, position, &full_block(hashes[position as usize]));
        }
        assert_eq!(kv.longest_prefix(&hashes), 2);
    }

    #[test]
    fn blocks_that_left_the_window_are_given_back_and_cannot_be_forked_from() {
        let mut kv = groups(&[KvGroupKind::SlidingWindow { window: 5 }]);
        kv.append(0, 6, &mut Vec::new());
        kv.slide(0, 15, 0);
        assert_eq!(kv.tables(0)[0].first_live(), 2);
        assert_eq!(kv.stats(0).num_used, 4);
        assert!(kv.can_fork(0, 3) && !kv.can_fork(0, 2) && !kv.can_fork(0, 7));
        kv.share(1, Source::Row { row: 0, len: 4 });
        assert_eq!(kv.tables(1)[0].first_live(), 3);
        kv.release_row(0);
        assert_eq!(kv.stats(0).num_used, 1);
        kv.check_invariants([1].into_iter());
    }

    #[test]
    fn idle_hits_count_against_the_room() {
        let mut kv = groups(&[KvGroupKind::Full]);
        let hashes = chain(8);
        kv.append(0, 8, &mut Vec::new());
        for (position, &hash) in hashes.iter().enumerate() {
            kv.publish(0, position as u32, &full_block(hash));
        }
        kv.release_row(0);
        // 32 blocks are available, 8 of them idle hits; 24 more tokens' worth of blocks fit, 25 do not.
        assert!(kv.has_room(Source::Cache(&hashes), 32 * 4, 0));
        assert!(!kv.has_room(Source::Cache(&hashes), 32 * 4 + 1, 0));
        assert!(!kv.has_room(Source::Cache(&hashes), 32 * 4, 1));
        let eviction_order: Vec<u32> = kv.groups[0].allocator.eviction_order().map(|block| block.0).collect();
        assert_eq!(eviction_order, [7, 6, 5, 4, 3, 2, 1, 0], "leaf first");
    }
}
