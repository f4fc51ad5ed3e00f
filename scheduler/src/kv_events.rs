//! What a prefix cache holds, told as it changes: for whoever sends requests where their prefixes are.
//!
//! While nobody listens nothing is written down but each cached block's tokens and place in its chain, so that all of
//! them can be told to whoever comes later; without [`SchedulerConfig::kv_events`](crate::SchedulerConfig::kv_events) not even that.
//! The log is bounded: what does not fit between two drains is missing, and [`KvEvents::has_lost`] says so.

use crate::block::BlockId;
use crate::kv_groups::{FullBlock, KvGroups};
use crate::prefix_cache::BlockHash;
use crate::scheduler::Scheduler;

/// The first 64 bits of a block's hash, or of the salt and adapter that a chain begins with: enough to tell those of one
/// cache apart, and not enough to ask for a block by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShortHash(pub u64);

/// A block that can be hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBlock {
    /// Index of the KV group.
    pub group: u32,
    /// Of its tokens and all before them, from the first on.
    pub hash: ShortHash,
    /// Of the block before it; `None` for a sequence's first. In a group with a window that block can have left before it could
    /// be hit, and then was never stored.
    pub parent: Option<ShortHash>,
    /// What separates it from equal tokens of others: see [`BlockHash::root`].
    pub root: ShortHash,
}

/// A change of what can be hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// The block can be hit from now on.
    Stored(KvBlock),
    /// The block of this group and hash cannot be hit any more.
    Removed { group: u32, hash: ShortHash },
    /// No block can be hit.
    Cleared,
}

/// Changes in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvEvents {
    /// What happened.
    pub events: Vec<KvEvent>,
    /// Tokens of the stored blocks, one after the other, `block_size` each.
    pub token_ids: Vec<u32>,
    /// Something happened that is not in `events`.
    pub has_lost: bool,
}

impl KvEvents {
    /// Whether nothing happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && !self.has_lost
    }
}

/// What [`Scheduler::flush_cache`] did, in blocks of all KV groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushReport {
    /// Could be hit, and cannot any more.
    pub num_dropped: u32,
    /// Can still be hit, because sequences hold them.
    pub num_held: u32,
}

/// Of one KV group: what its registered blocks hold.
#[derive(Debug, Default)]
pub(crate) struct BlockRecords {
    places: Vec<Place>,
    /// `block_size` for each block.
    token_ids: Vec<u32>,
}

/// Where a block is in its chain.
#[derive(Clone, Copy, Debug)]
struct Place {
    position: u32,
    parent: Option<ShortHash>,
    root: ShortHash,
}

const NOWHERE: Place = Place { position: 0, parent: None, root: ShortHash(0) };

impl BlockRecords {
    pub(crate) fn new(num_blocks: u32, block_size: u32) -> Self {
        let num_blocks = num_blocks as usize;
        Self { places: vec![NOWHERE; num_blocks], token_ids: vec![0; num_blocks * block_size as usize] }
    }

    fn tokens(&self, block: BlockId) -> &[u32] {
        let block_size = self.token_ids.len() / self.places.len();
        let start = block.0 as usize * block_size;
        &self.token_ids[start..start + block_size]
    }

    fn set(&mut self, block: BlockId, position: u32, content: &FullBlock<'_>) {
        let block_size = self.token_ids.len() / self.places.len();
        let start = block.0 as usize * block_size;
        let parent = content.parent.as_ref().map(BlockHash::short);
        self.places[block.0 as usize] = Place { position, parent, root: content.root };
        let [first, second] = content.token_ids;
        self.token_ids[start..start + first.len()].copy_from_slice(first);
        self.token_ids[start + first.len()..start + block_size].copy_from_slice(second);
    }

    fn describe(&self, group: u32, block: BlockId, hash: &BlockHash) -> KvBlock {
        let Place { parent, root, .. } = self.places[block.0 as usize];
        KvBlock { group, hash: hash.short(), parent, root }
    }
}

/// The records of all groups, and the log while somebody listens.
#[derive(Debug, Default)]
pub(crate) struct KvEventLog {
    /// By group; empty where nobody may ever listen.
    records: Vec<BlockRecords>,
    /// Most events between two drains; `None` while nobody listens.
    max_events: Option<usize>,
    events: KvEvents,
}

impl KvEventLog {
    pub(crate) fn new(records: Vec<BlockRecords>) -> Self {
        Self { records, ..Self::default() }
    }

    /// Whether blocks are described at all.
    pub(crate) fn keeps_records(&self) -> bool {
        !self.records.is_empty()
    }

    /// The block was registered.
    pub(crate) fn store(&mut self, group: usize, block: BlockId, position: u32, content: &FullBlock<'_>) {
        let Some(records) = self.records.get_mut(group) else { return };
        records.set(block, position, content);
        if self.max_events.is_some() {
            let event = KvEvent::Stored(records.describe(group as u32, block, &content.hash));
            if self.push(event) {
                self.events.token_ids.extend(content.token_ids.into_iter().flatten());
            }
        }
    }

    /// The block that had this hash is not registered any more.
    pub(crate) fn remove(&mut self, group: usize, hash: impl FnOnce() -> ShortHash) {
        if self.max_events.is_some() {
            self.push(KvEvent::Removed { group: group as u32, hash: hash() });
        }
    }

    /// No block is registered any more.
    pub(crate) fn clear(&mut self) {
        if self.max_events.is_some() {
            self.push(KvEvent::Cleared);
        }
    }

    /// False where there was no room.
    fn push(&mut self, event: KvEvent) -> bool {
        let has_room = self.max_events.is_some_and(|max| self.events.events.len() < max);
        if has_room {
            self.events.events.push(event);
        } else {
            self.events.has_lost = true;
        }
        has_room
    }
}

impl KvGroups {
    /// A start from nothing and all blocks that can be hit, parents before their children.
    fn all_blocks(&self) -> KvEvents {
        let mut all = KvEvents { events: vec![KvEvent::Cleared], ..KvEvents::default() };
        for (index, (group, records)) in self.groups.iter().zip(&self.log.records).enumerate() {
            let blocks = (0..group.allocator.num_blocks()).map(BlockId);
            let mut registered: Vec<BlockId> = blocks.filter(|block| group.cache.hash_of(*block).is_some()).collect();
            registered.sort_unstable_by_key(|block| (records.places[block.0 as usize].position, *block));
            for block in registered {
                let hash = group.cache.hash_of(block).expect("filtered by it");
                all.events.push(KvEvent::Stored(records.describe(index as u32, block, hash)));
                all.token_ids.extend_from_slice(records.tokens(block));
            }
        }
        all
    }
}

impl Scheduler {
    /// From now on changes are written down, at most `max_events` between two calls of [`Scheduler::drain_kv_events`].
    ///
    /// # Panics
    /// Without [`SchedulerConfig::kv_events`](crate::SchedulerConfig::kv_events).
    pub fn start_kv_events(&mut self, max_events: usize) {
        assert!(self.config.kv_events, "nobody was to listen");
        self.kv.log.max_events = Some(max_events);
    }

    /// Nobody listens any more: what was not drained is forgotten.
    pub fn stop_kv_events(&mut self) {
        self.kv.log.max_events = None;
        self.kv.log.events = KvEvents::default();
    }

    /// What happened since the last call, where something did and somebody listens.
    pub fn drain_kv_events(&mut self) -> Option<KvEvents> {
        let events = &mut self.kv.log.events;
        if events.is_empty() { None } else { Some(std::mem::take(events)) }
    }

    /// All blocks that can be hit now: [`KvEvent::Cleared`], then each of them as [`KvEvent::Stored`], parents before their
    /// children. Nothing but `Cleared` without [`SchedulerConfig::kv_events`](crate::SchedulerConfig::kv_events). Looks at every block.
    #[must_use]
    pub fn kv_blocks(&self) -> KvEvents {
        self.kv.all_blocks()
    }

    /// Lets go of all cached blocks that no sequence holds. Looks at each of them.
    pub fn flush_cache(&mut self) -> FlushReport {
        self.kv.flush()
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::request;
    use crate::{KvEvent, KvGroup, KvGroupKind, Scheduler, SchedulerConfig, StepOutput, Time};

    fn scheduler() -> Scheduler {
        Scheduler::new(SchedulerConfig {
            max_num_seqs: 2,
            max_num_batched_tokens: 64,
            max_model_len: 64,
            block_size: 4,
            kv_groups: vec![KvGroup { kind: KvGroupKind::Full, num_blocks: 16 }],
            kv_events: true,
            ..SchedulerConfig::default()
        })
        .expect("works")
    }

    /// A request of 10 tokens that generates one.
    fn run(scheduler: &mut Scheduler, first_token: u32) {
        let prompt: Vec<u32> = (first_token..first_token + 10).collect();
        scheduler.submit(request(u64::from(first_token), &prompt, 1), Time(0)).expect("taken");
        let plan = scheduler.plan(Time(0));
        let mut output = StepOutput::new(plan.step_id);
        for sequence in &plan.sequences {
            output.push_computed(sequence.num_scheduled_tokens, &[1]);
        }
        scheduler.apply(plan, &mut output, Time(0));
    }

    #[test]
    fn nothing_is_written_down_before_somebody_listens() {
        let mut scheduler = scheduler();
        run(&mut scheduler, 100);
        assert_eq!(scheduler.drain_kv_events(), None);
        scheduler.start_kv_events(8);
        run(&mut scheduler, 200);
        let events = scheduler.drain_kv_events().expect("two blocks");
        assert_eq!((events.events.len(), events.has_lost), (2, false));
        assert_eq!(events.token_ids, (200..208).collect::<Vec<u32>>());
        // Who listens late is told of the blocks before.
        let all = scheduler.kv_blocks();
        assert_eq!((all.events[0], all.events.len()), (KvEvent::Cleared, 5));
        scheduler.stop_kv_events();
        run(&mut scheduler, 300);
        assert_eq!(scheduler.drain_kv_events(), None);
    }

    #[test]
    fn what_has_no_room_is_said_to_be_missing() {
        let mut scheduler = scheduler();
        scheduler.start_kv_events(1);
        run(&mut scheduler, 100);
        let events = scheduler.drain_kv_events().expect("one of two blocks");
        assert_eq!((events.events.len(), events.token_ids.len(), events.has_lost), (1, 4, true));
        assert_eq!(scheduler.drain_kv_events(), None);
    }

    #[test]
    fn a_flush_drops_what_nobody_holds() {
        let mut scheduler = scheduler();
        scheduler.start_kv_events(64);
        run(&mut scheduler, 100);
        // One that is still running holds its prompt's two blocks.
        let prompt: Vec<u32> = (200..210).collect();
        scheduler.submit(request(7, &prompt, 20), Time(0)).expect("taken");
        let plan = scheduler.plan(Time(0));
        let mut output = StepOutput::new(plan.step_id);
        output.push_computed(10, &[1]);
        scheduler.apply(plan, &mut output, Time(0));
        drop(scheduler.drain_kv_events());
        let report = scheduler.flush_cache();
        assert_eq!((report.num_dropped, report.num_held), (2, 2));
        scheduler.check_invariants();
        let events = scheduler.drain_kv_events().expect("two were dropped");
        assert!(events.events.iter().all(|event| matches!(event, KvEvent::Removed { .. })));
        assert_eq!(events.events.len(), 2);

        scheduler.abort(crate::RequestId(7));
        let report = scheduler.flush_cache();
        assert_eq!((report.num_dropped, report.num_held), (2, 0));
        assert_eq!(scheduler.drain_kv_events().expect("all").events, [KvEvent::Cleared]);
        assert_eq!(scheduler.flush_cache().num_dropped, 0);
        assert_eq!(scheduler.drain_kv_events(), None);
        assert_eq!(scheduler.stats().blocks[0].num_free, 16);
        scheduler.check_invariants();
    }
}
