//! Changes of the prefix cache, from the engine's thread to whoever subscribed.
//!
//! Batches are numbered without gaps and kept for a while, bounded in batches and in events. A subscriber reads at its own
//! pace; one that is too slow finds the oldest gone and goes on behind them, so that the numbers show what it missed. The
//! first number follows from the clock at the start: a number of another process is never taken for one of this.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quire_scheduler::{KvEvent, KvEvents, KvGroupKind, Time};
use tokio::sync::{oneshot, watch};

use crate::handle::{Shared, lock};

/// Most subscribers at a time.
pub const MAX_KV_SUBSCRIBERS: u32 = 16;
/// Most events that the scheduler writes down in one step; a step that has more loses them, visibly.
pub(crate) const MAX_STEP_EVENTS: usize = 1 << 16;
/// Batches, and events in them, that are kept for subscribers that are behind.
const MAX_BATCHES: usize = 4096;
const MAX_EVENTS: usize = 1 << 17;
/// All blocks are copied at most once in so long, for all who wait for them: whoever subscribes in a loop slows nobody down.
pub(crate) const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// Blocks in a batch of a [snapshot](Snapshot).
const SNAPSHOT_BLOCKS: usize = 1024;

/// What changed in one step.
#[derive(Clone, Debug)]
pub struct KvEventBatch {
    /// One more than the batch before; more than that where something was lost.
    pub sequence_number: u64,
    /// Seconds since 1970.
    pub timestamp: f64,
    /// Where this is a piece of a snapshot: which, of how many, of how many blocks in all.
    pub snapshot: Option<Snapshot>,
    /// What happened, in order.
    pub events: Arc<KvEvents>,
}

/// A subscriber that cannot go on where it was is told of all blocks first, in pieces: the first begins with
/// [`KvEvent::Cleared`]. Their numbers end with that of the last batch before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub index: u32,
    pub count: u32,
    pub num_blocks: u64,
}

/// Why there is no subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// `scheduler.kv_events` is off, or the prefix cache is.
    #[error("events of the KV cache are not published")]
    NotPublished,
    #[error("{MAX_KV_SUBSCRIBERS} others subscribed already")]
    TooMany,
    #[error("the engine is stopped")]
    Stopped,
}

/// What the engine's thread and subscribers share.
pub(crate) struct KvEventHub {
    kept: Mutex<Kept>,
    num_subscribers: AtomicU32,
    /// The last batch's number; closed when the engine stops.
    latest: Mutex<Option<watch::Sender<u64>>>,
}

struct Kept {
    /// Whether the scheduler writes events down.
    is_on: bool,
    batches: VecDeque<KvEventBatch>,
    num_events: usize,
    next_number: u64,
}

/// All blocks at a step boundary, and the number of the last batch before it.
pub(crate) type AllBlocks = (Arc<KvEvents>, u64);

impl KvEventHub {
    pub(crate) fn new() -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // Room for a million batches a second, below 2^53 for many years, and above all numbers of earlier processes.
        let next_number = (seconds << 20) + 1;
        Self {
            kept: Mutex::new(Kept { is_on: false, batches: VecDeque::new(), num_events: 0, next_number }),
            num_subscribers: AtomicU32::new(0),
            latest: Mutex::new(Some(watch::Sender::new(next_number - 1))),
        }
    }

    /// The scheduler begins to write events down.
    pub(crate) fn start(&self) {
        lock(&self.kept).is_on = true;
    }

    /// Where nobody listens any more, true: the scheduler is to stop writing events down. What was kept is worth nothing
    /// then, because there is a gap behind it.
    pub(crate) fn stop_unless_wanted(&self) -> bool {
        if self.num_subscribers.load(Ordering::Acquire) > 0 {
            return false;
        }
        let mut kept = lock(&self.kept);
        // Asked again: whoever subscribes counts itself first, and then looks under this lock whether it can go on.
        if self.num_subscribers.load(Ordering::Acquire) > 0 {
            return false;
        }
        kept.is_on = false;
        kept.batches.clear();
        kept.num_events = 0;
        true
    }

    /// The number of the last batch.
    pub(crate) fn last_number(&self) -> u64 {
        lock(&self.kept).next_number - 1
    }

    /// Keeps what happened, and wakes subscribers.
    pub(crate) fn push(&self, events: KvEvents) {
        let number = {
            let mut kept = lock(&self.kept);
            // Something is missing before the end of this batch: its number shows it.
            kept.next_number += u64::from(events.has_lost);
            let sequence_number = kept.next_number;
            kept.next_number += 1;
            kept.num_events += events.events.len();
            let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
            kept.batches.push_back(KvEventBatch {
                sequence_number,
                timestamp,
                snapshot: None,
                events: Arc::new(events),
            });
            while kept.batches.len() > MAX_BATCHES || (kept.num_events > MAX_EVENTS && kept.batches.len() > 1) {
                let oldest = kept.batches.pop_front().expect("there are some");
                kept.num_events -= oldest.events.events.len();
            }
            sequence_number
        };
        if let Some(latest) = &*lock(&self.latest) {
            latest.send_replace(number);
        }
    }

    /// The engine stops: streams end.
    pub(crate) fn close(&self) {
        drop(lock(&self.latest).take());
    }

    /// The oldest kept batch of this number or a later one.
    fn next_from(&self, number: u64) -> Option<KvEventBatch> {
        let kept = lock(&self.kept);
        let at = kept.batches.partition_point(|batch| batch.sequence_number < number);
        kept.batches.get(at).cloned()
    }

    /// Whether nothing from this number on is missing.
    fn reaches_back_to(&self, number: u64) -> bool {
        let kept = lock(&self.kept);
        let oldest = kept.batches.front().map_or(kept.next_number, |batch| batch.sequence_number);
        kept.is_on && (oldest..=kept.next_number).contains(&number)
    }
}

/// Subscribers that wait for all blocks, on the engine's thread. At most as many as there are places, and one for each that left
/// since the last one came.
pub(crate) struct SnapshotQueue {
    waiting: Vec<oneshot::Sender<AllBlocks>>,
    interval_micros: u64,
    /// When blocks were copied last.
    last: Option<Time>,
}

impl SnapshotQueue {
    /// For a snapshot in each `interval`.
    pub(crate) fn new(interval: Duration) -> Self {
        let interval_micros = u64::try_from(interval.as_micros()).unwrap_or(u64::MAX);
        Self { waiting: Vec::new(), interval_micros, last: None }
    }

    /// Takes in who came.
    pub(crate) fn add(&mut self, new: &mut Vec<oneshot::Sender<AllBlocks>>) {
        self.waiting.retain(|reply| !reply.is_closed());
        self.waiting.append(new);
    }

    /// How long it is until [`take_due`](Self::take_due) is worth a call; `None` where nobody waits.
    pub(crate) fn wait(&self, now: Time) -> Option<Duration> {
        let next = self.last.map_or(now.0, |last| last.0.saturating_add(self.interval_micros));
        (!self.waiting.is_empty()).then(|| Duration::from_micros(next.saturating_sub(now.0)))
    }

    /// Who gets the snapshot that is made now; nobody where it is too early for one.
    pub(crate) fn take_due(&mut self, now: Time) -> Vec<oneshot::Sender<AllBlocks>> {
        self.waiting.retain(|reply| !reply.is_closed());
        if self.wait(now) != Some(Duration::ZERO) {
            return Vec::new();
        }
        self.last = Some(now);
        std::mem::take(&mut self.waiting)
    }
}

/// A place among the subscribers.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Result<Self, SubscribeError> {
        let add_one = |count| (count < MAX_KV_SUBSCRIBERS).then_some(count + 1);
        let taken = shared.kv_events.num_subscribers.fetch_update(Ordering::AcqRel, Ordering::Acquire, add_one);
        taken.map(|_| Self(Arc::clone(shared))).map_err(|_| SubscribeError::TooMany)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.kv_events.num_subscribers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What happens to the blocks that can be hit, from when it was asked for. Ends with the engine.
pub struct KvEventStream {
    place: Place,
    latest: watch::Receiver<u64>,
    /// Pieces of the snapshot that were not taken yet.
    snapshot: VecDeque<KvEventBatch>,
    next_number: u64,
}

impl KvEventStream {
    /// Subscribes from batch `start` on where that is still there, from a snapshot of now on otherwise.
    pub(crate) async fn subscribe(shared: &Arc<Shared>, start: u64) -> Result<Self, SubscribeError> {
        if !shared.model.kv_events {
            return Err(SubscribeError::NotPublished);
        }
        let place = Place::take(shared)?;
        let hub = &place.0.kv_events;
        let latest = lock(&hub.latest).as_ref().map(watch::Sender::subscribe).ok_or(SubscribeError::Stopped)?;
        if start > 0 && hub.reaches_back_to(start) {
            return Ok(Self { place, latest, snapshot: VecDeque::new(), next_number: start });
        }
        let (reply, answer) = oneshot::channel();
        place.0.ask_for_blocks(reply)?;
        let (all, last_number) = answer.await.map_err(|_| SubscribeError::Stopped)?;
        Ok(Self { place, latest, snapshot: pieces(&all, last_number), next_number: last_number + 1 })
    }

    /// What a token of each KV group sees.
    pub fn groups(&self) -> Arc<[KvGroupKind]> {
        Arc::clone(&self.place.0.kv_groups)
    }

    /// The next batch; `None` when the engine stopped. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<KvEventBatch> {
        if let Some(piece) = self.snapshot.pop_front() {
            return Some(piece);
        }
        loop {
            self.latest.mark_unchanged();
            if let Some(batch) = self.place.0.kv_events.next_from(self.next_number) {
                self.next_number = batch.sequence_number + 1;
                return Some(batch);
            }
            self.latest.changed().await.ok()?;
        }
    }
}

/// Cuts a snapshot into batches.
fn pieces(all: &KvEvents, last_number: u64) -> VecDeque<KvEventBatch> {
    let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let num_blocks = all.events.len() - 1;
    let count = all.events.len().div_ceil(SNAPSHOT_BLOCKS);
    let block_size = all.token_ids.len().checked_div(num_blocks).unwrap_or(0);
    let piece = |(index, events): (usize, &[KvEvent])| {
        // All but the first event are stored blocks.
        let first = (index * SNAPSHOT_BLOCKS).saturating_sub(1);
        let last = (index * SNAPSHOT_BLOCKS + events.len()).saturating_sub(1);
        let token_ids = all.token_ids[first * block_size..last * block_size].to_vec();
        KvEventBatch {
            sequence_number: last_number + 1 + index as u64 - count as u64,
            timestamp,
            snapshot: Some(Snapshot { index: index as u32, count: count as u32, num_blocks: num_blocks as u64 }),
            events: Arc::new(KvEvents { events: events.to_vec(), token_ids, has_lost: false }),
        }
    };
    all.events.chunks(SNAPSHOT_BLOCKS).enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use quire_scheduler::{KvBlock, ShortHash};

    use super::*;

    fn removed(count: usize) -> KvEvents {
        let event = KvEvent::Removed { group: 0, hash: ShortHash(1) };
        KvEvents { events: vec![event; count], ..KvEvents::default() }
    }

    #[test]
    fn what_is_kept_is_bounded_and_gone_from_the_front() {
        let hub = KvEventHub::new();
        hub.start();
        let first = hub.last_number() + 1;
        for _ in 0..MAX_BATCHES + 10 {
            hub.push(removed(1));
        }
        assert_eq!(lock(&hub.kept).batches.len(), MAX_BATCHES);
        // Who wants the first gets the oldest that is left: the numbers show what is missing.
        assert_eq!(hub.next_from(first).map(|batch| batch.sequence_number), Some(first + 10));
        assert!(!hub.reaches_back_to(first + 9) && hub.reaches_back_to(first + 10));
        hub.push(removed(MAX_EVENTS));
        assert_eq!(lock(&hub.kept).batches.len(), 1);
        hub.push(removed(MAX_EVENTS + 1));
        let kept = lock(&hub.kept);
        assert_eq!((kept.batches.len(), kept.num_events), (1, MAX_EVENTS + 1));
    }

    #[test]
    fn what_was_lost_in_a_step_leaves_a_gap() {
        let hub = KvEventHub::new();
        hub.start();
        hub.push(removed(1));
        let before = hub.last_number();
        hub.push(KvEvents { has_lost: true, ..removed(1) });
        assert_eq!(hub.next_from(before + 1).map(|batch| batch.sequence_number), Some(before + 2));
    }

    #[test]
    fn whoever_comes_in_a_loop_gets_one_snapshot_in_an_interval() {
        let mut queue = SnapshotQueue::new(Duration::from_millis(10));
        let mut num_snapshots = 0;
        // Three come each millisecond; of those that wait one stays, the others leave at once.
        let mut staying = Vec::new();
        for milli in 0..100 {
            let now = Time(5_000 + milli * 1_000);
            let (mut new, answers): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel::<AllBlocks>()).unzip();
            staying.extend(answers.into_iter().take(1));
            queue.add(&mut new);
            assert!(new.is_empty() && queue.waiting.len() <= 10 + 3, "{}", queue.waiting.len());
            let due = queue.take_due(now);
            assert_eq!(due.is_empty(), milli % 10 != 0, "{milli}");
            if !due.is_empty() {
                num_snapshots += 1;
                // All who waited get the same one.
                assert_eq!(due.len(), staying.len());
                staying.clear();
                assert_eq!(queue.wait(now), None);
            } else {
                assert_eq!(queue.wait(now), Some(Duration::from_millis(10 - milli % 10)));
            }
        }
        assert_eq!(num_snapshots, 10);
        // After a pause there is one at once.
        drop(staying);
        let gone = oneshot::channel().0;
        queue.add(&mut vec![gone]);
        assert!(queue.take_due(Time(1_000_000)).is_empty(), "nobody waits for an answer that nobody hears");
        let (reply, _answer) = oneshot::channel();
        queue.add(&mut vec![reply]);
        assert_eq!(queue.take_due(Time(1_000_000)).len(), 1);
    }

    #[test]
    fn a_snapshot_is_cut_without_a_loss_and_ends_with_the_last_number() {
        for num_blocks in [0, 1, SNAPSHOT_BLOCKS - 1, SNAPSHOT_BLOCKS, 3 * SNAPSHOT_BLOCKS + 7] {
            let stored = (0..num_blocks as u64).map(|id| {
                let hash = ShortHash(id);
                KvEvent::Stored(KvBlock { group: 0, hash, parent: None, root: hash })
            });
            let mut all = KvEvents { events: vec![KvEvent::Cleared], ..KvEvents::default() };
            all.events.extend(stored);
            all.token_ids.extend(0..2 * num_blocks as u32);
            let pieces = pieces(&all, 100);
            assert_eq!(pieces.back().map(|piece| piece.sequence_number), Some(100));
            assert!(pieces.iter().zip(pieces.iter().skip(1)).all(|(a, b)| a.sequence_number + 1 == b.sequence_number));
            let events: Vec<KvEvent> = pieces.iter().flat_map(|piece| piece.events.events.clone()).collect();
            let token_ids: Vec<u32> = pieces.iter().flat_map(|piece| piece.events.token_ids.clone()).collect();
            assert_eq!((events, token_ids), (all.events, all.token_ids), "{num_blocks} blocks");
            for piece in &pieces {
                let num_stored = piece.events.events.iter().filter(|event| **event != KvEvent::Cleared).count();
                assert_eq!(piece.events.token_ids.len(), 2 * num_stored);
                assert_eq!(piece.snapshot.map(|snapshot| snapshot.num_blocks), Some(num_blocks as u64));
            }
        }
    }
}
