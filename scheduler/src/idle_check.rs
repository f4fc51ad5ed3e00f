//! `Scheduler::check_idle`: whether an idle scheduler is sound, a piece at a time.
//!
//! [`Scheduler::check_invariants`] looks at every block at once, which takes tens of milliseconds for half a million of
//! them: a request that arrived meanwhile would wait. While nothing lives nothing changes, so the same can be asked in
//! pieces, with a look for requests between two of them. And more can be asked: no block is held by anybody.

use std::ops::Range;

use crate::kv_groups::Group;
use crate::scheduler::Scheduler;
use crate::sequence::{NO_SLOT, State};
use crate::{BlockId, SchedulerConfig};

/// How far a check of an idle scheduler has come.
#[derive(Debug)]
pub struct IdleCheck {
    section: usize,
    /// Within the section.
    at: usize,
    num_kept: u32,
    num_registered: u32,
    /// The block of the eviction order that was looked at last.
    cached: Option<BlockId>,
    num_cached: u32,
    /// A bit per block: seen in the free list.
    seen: Vec<u64>,
}

/// What is looked at, one after the other; those of blocks once for each KV group.
const SECTIONS: [Section; 2] = [Section::Slots, Section::Rows];
const GROUP_SECTIONS: [GroupSection; 4] =
    [GroupSection::Blocks, GroupSection::FreeList, GroupSection::EvictionOrder, GroupSection::HashPlaces];

#[derive(Clone, Copy)]
enum Section {
    Slots,
    Rows,
}

#[derive(Clone, Copy)]
enum GroupSection {
    Blocks,
    FreeList,
    EvictionOrder,
    HashPlaces,
}

impl IdleCheck {
    /// Reserves what a check of a scheduler with this configuration needs.
    #[must_use]
    pub fn new(config: &SchedulerConfig) -> Self {
        let most_blocks = config.kv_groups.iter().map(|group| group.num_blocks).max().unwrap_or(0);
        Self {
            section: 0,
            at: 0,
            num_kept: 0,
            num_registered: 0,
            cached: None,
            num_cached: 0,
            seen: vec![0; most_blocks.div_ceil(64) as usize],
        }
    }

    /// Starts anew: needed after anything was submitted.
    pub fn restart(&mut self) {
        self.section = 0;
        self.at = 0;
    }

    /// The next piece of a list of `len`, at most `max_items` long.
    fn take(&mut self, len: usize, max_items: usize) -> Range<usize> {
        let start = self.at.min(len);
        self.at = len.min(start + max_items);
        start..self.at
    }
}

impl Scheduler {
    /// Looks at the next `max_items` slots, rows, blocks or places; true when all were looked at, and the check is at its
    /// start again. Panics unless the state is sound, or when there is work.
    pub fn check_idle(&self, check: &mut IdleCheck, max_items: usize) -> bool {
        assert!(!self.has_work(), "there is work");
        let max_items = max_items.max(1);
        let groups = &self.kv.groups;
        let is_done = match SECTIONS.get(check.section) {
            Some(section) => self.check_section(*section, check, max_items),
            None => {
                let index = check.section - SECTIONS.len();
                let group = &groups[index / GROUP_SECTIONS.len()];
                check_group(group, GROUP_SECTIONS[index % GROUP_SECTIONS.len()], check, max_items)
            }
        };
        if is_done {
            check.section += 1;
            check.at = 0;
        }
        let is_complete = check.section == SECTIONS.len() + GROUP_SECTIONS.len() * groups.len();
        if is_complete {
            check.restart();
        }
        is_complete
    }

    fn check_section(&self, section: Section, check: &mut IdleCheck, max_items: usize) -> bool {
        match section {
            Section::Slots => {
                if check.at == 0 {
                    self.check_nothing_is_listed();
                }
                for slot in check.take(self.sequences.len(), max_items) {
                    assert!(self.sequences[slot].state == State::Vacant, "slot {slot} is not vacant");
                    assert!(self.details[slot].request.is_none(), "slot {slot} keeps its request");
                    self.queue.check_absent(slot);
                }
                check.at == self.sequences.len()
            }
            Section::Rows => {
                for row in check.take(self.row_slots.len(), max_items) {
                    assert!(self.row_slots[row] == NO_SLOT, "row {row} is taken");
                    assert_eq!(self.kv.num_live_blocks(row as u32), 0, "row {row}, out of use, holds blocks");
                }
                check.at == self.row_slots.len()
            }
        }
    }
}

fn check_group(group: &Group, section: GroupSection, check: &mut IdleCheck, max_items: usize) -> bool {
    let (allocator, cache) = (&group.allocator, &group.cache);
    match section {
        GroupSection::Blocks => {
            if check.at == 0 {
                check.num_kept = 0;
            }
            let num_blocks = allocator.num_blocks() as usize;
            for id in check.take(num_blocks, max_items) {
                let block = BlockId(id as u32);
                assert_eq!(allocator.refcount(block), 0, "{block:?} is held by nobody");
                let hash = if cache.is_disabled() { None } else { cache.hash_of(block) };
                assert_eq!(allocator.is_kept(block), hash.is_some(), "{block:?}");
                assert!(hash.is_none_or(|hash| cache.get(hash) == Some(block)), "{block:?} is not found by its hash");
                check.num_kept += u32::from(hash.is_some());
            }
            check.at == num_blocks
        }
        GroupSection::FreeList => {
            if check.at == 0 {
                check.seen.fill(0);
            }
            let free = allocator.free_list();
            for index in check.take(free.len(), max_items) {
                let id = free[index];
                let (word, bit) = (&mut check.seen[id as usize / 64], 1 << (id % 64));
                assert!(*word & bit == 0, "block {id} is free twice");
                *word |= bit;
                assert!(!allocator.is_kept(BlockId(id)), "free block {id} is kept");
            }
            if check.at == free.len() {
                let num_blocks = allocator.num_blocks();
                assert_eq!(free.len() as u32 + check.num_kept, num_blocks, "a block is neither free nor cached");
            }
            check.at == free.len()
        }
        GroupSection::EvictionOrder => {
            if check.at == 0 {
                (check.cached, check.num_cached) = (None, 0);
            }
            // One more than there are, so that the end is seen.
            let len = allocator.num_cached() as usize + 1;
            for _ in check.take(len, max_items) {
                let next = allocator.newer_than(check.cached);
                let Some(block) = next else { break };
                assert!(allocator.is_kept(block), "cached {block:?} is not kept");
                assert_eq!(allocator.older_than(block), check.cached, "the eviction order is torn at {block:?}");
                check.num_cached += 1;
                check.cached = next;
            }
            if check.at == len {
                assert_eq!((check.num_cached, allocator.num_cached()), (check.num_kept, check.num_kept));
            }
            check.at == len
        }
        GroupSection::HashPlaces => {
            if check.at == 0 {
                check.num_registered = 0;
            }
            let num_places = cache.num_places();
            let range = check.take(num_places, max_items);
            check.num_registered += cache.num_occupied(range);
            if check.at == num_places {
                assert_eq!((check.num_registered, cache.len()), (check.num_kept, check.num_kept));
            }
            check.at == num_places
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::testing::request;
    use crate::{KvGroup, KvGroupKind, StepOutput, Time};

    /// A scheduler that was used: of its 64 blocks in each group some are cached.
    fn used() -> Scheduler {
        let group = |kind| KvGroup { kind, num_blocks: 64 };
        let mut scheduler = Scheduler::new(SchedulerConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            max_model_len: 64,
            block_size: 4,
            kv_groups: vec![group(KvGroupKind::Full), group(KvGroupKind::SlidingWindow { window: 6 })],
            ..SchedulerConfig::default()
        })
        .unwrap();
        for id in 0..5 {
            scheduler.submit(request(id, &[id as u32; 14], 3), Time(0)).unwrap();
        }
        while scheduler.has_work() {
            let plan = scheduler.plan(Time(0));
            let mut output = StepOutput::new(plan.step_id);
            for sequence in &plan.sequences {
                output.push_computed(sequence.num_scheduled_tokens, if sequence.samples { &[1] } else { &[] });
            }
            scheduler.apply(plan, &mut output, Time(0));
        }
        assert!(scheduler.stats().blocks[0].num_cached > 8);
        scheduler
    }

    fn pieces(scheduler: &Scheduler, max_items: usize) -> usize {
        let mut check = IdleCheck::new(scheduler.config());
        (1..).find(|_| scheduler.check_idle(&mut check, max_items)).unwrap()
    }

    #[test]
    fn any_size_of_piece_sees_the_same() {
        let scheduler = used();
        let num_items = pieces(&scheduler, 1);
        assert!(num_items > 2 * (64 + 64 + 128), "{num_items}");
        for max_items in [2, 7, 1000] {
            let num_pieces = pieces(&scheduler, max_items);
            assert!(num_pieces >= num_items.div_ceil(max_items) && num_pieces <= num_items / max_items + 10);
        }
    }

    #[test]
    fn whatever_is_broken_is_noticed() {
        type Break = fn(&mut Scheduler);
        let breaks: [(&str, Break); 7] = [
            ("a block that leaked", |s| {
                s.kv.groups[0].allocator.allocate();
            }),
            ("a cached block without a hash", |s| {
                let block = s.kv.groups[0].allocator.eviction_order().next().unwrap();
                s.kv.groups[0].cache.remove(block);
            }),
            ("a hash without a cached block", |s| {
                let block = s.kv.groups[1].allocator.eviction_order().next().unwrap();
                s.kv.groups[1].allocator.clear_keep(block);
            }),
            ("a hit that was not given back", |s| {
                let block = s.kv.groups[1].allocator.eviction_order().next().unwrap();
                s.kv.groups[1].allocator.acquire(block);
            }),
            ("a row that is lost", |s| {
                s.free_rows.pop();
            }),
            ("a row that is taken", |s| s.row_slots[2] = 1),
            ("a slot that keeps its request", |s| {
                s.details[1].request = Some(std::sync::Arc::new(request(9, &[1], 1)));
            }),
        ];
        for (what, break_it) in breaks {
            for max_items in [1, 1000] {
                let mut scheduler = used();
                break_it(&mut scheduler);
                let checked = catch_unwind(AssertUnwindSafe(|| pieces(&scheduler, max_items)));
                assert!(checked.is_err(), "{what} is not noticed");
            }
        }
    }
}
