//! Subscribers of the prefix cache know what it holds: from a snapshot and what follows, from where they left, and not at
//! all where it is not published.

use std::collections::BTreeMap;
use std::time::Duration;

use quire_engine::scheduler::{KvEvent, KvEvents, ShortHash};
use quire_engine::testing::{
    FakeExecutor, Recorder, fake_model, read_all, start_with, start_with_snapshots, submission,
};
use quire_engine::{EngineHandle, KvEventStream, MAX_KV_SUBSCRIBERS, ModelInfo, SchedulerSettings, SubscribeError};
use quire_scheduler::testing::Rng;

const BLOCK_SIZE: usize = 16;

fn start(kv_events: bool) -> EngineHandle {
    // Few enough blocks that some are evicted.
    let model = ModelInfo { num_blocks: 24, max_model_len: 200, ..fake_model(1000) };
    let settings =
        SchedulerSettings { max_num_seqs: 4, max_num_batched_tokens: 64, kv_events, ..SchedulerSettings::default() };
    start_with(FakeExecutor::new(1000), model, &settings, 0, Box::new(Recorder::default())).unwrap()
}

/// Blocks that can be hit, by hash, with their tokens.
#[derive(Debug, Default, PartialEq)]
struct Known {
    blocks: BTreeMap<ShortHash, Vec<u32>>,
    last_number: u64,
}

impl Known {
    fn take(&mut self, events: &KvEvents) {
        let mut token_ids = events.token_ids.chunks_exact(BLOCK_SIZE);
        for event in &events.events {
            match event {
                KvEvent::Stored(block) => {
                    drop(self.blocks.insert(block.hash, token_ids.next().expect("tokens").to_vec()));
                }
                KvEvent::Removed { hash, .. } => assert!(self.blocks.remove(hash).is_some()),
                KvEvent::Cleared => self.blocks.clear(),
            }
        }
    }

    /// Reads until `number` was taken in. Nothing is missing on the way.
    async fn follow(&mut self, stream: &mut KvEventStream, number: u64) {
        while self.last_number < number {
            let batch = stream.next().await.expect("the engine runs");
            assert!(self.last_number == 0 || batch.sequence_number == self.last_number + 1);
            self.last_number = batch.sequence_number;
            self.take(&batch.events);
        }
    }
}

/// All that there is now, as a new subscriber learns it.
async fn now(handle: &EngineHandle) -> Known {
    let mut known = Known::default();
    let mut stream = handle.subscribe_kv_events(0).await.unwrap();
    loop {
        let batch = stream.next().await.expect("the engine runs");
        known.take(&batch.events);
        known.last_number = batch.sequence_number;
        let snapshot = batch.snapshot.expect("a snapshot comes first");
        if snapshot.index + 1 == snapshot.count {
            assert_eq!(snapshot.num_blocks, known.blocks.len() as u64);
            return known;
        }
    }
}

async fn run(handle: &EngineHandle, rng: &mut Rng) {
    let prompt: Vec<u32> = (0..16 + rng.below(80)).map(|_| rng.below(3)).collect();
    read_all(&mut handle.submit(submission(&prompt, 1 + rng.below(30))).await.unwrap()).await;
}

#[tokio::test]
async fn subscribers_know_what_the_cache_holds() {
    let handle = start(true);
    let mut rng = Rng::new(3);
    run(&handle, &mut rng).await;
    // Blocks from before the first subscription are in its snapshot.
    let mut known = now(&handle).await;
    assert!(!known.blocks.is_empty());
    assert!(known.blocks.values().all(|token_ids| token_ids.len() == BLOCK_SIZE));

    let mut stream = handle.subscribe_kv_events(0).await.unwrap();
    known = Known::default();
    let mut resumed = None;
    for round in 0..40 {
        run(&handle, &mut rng).await;
        if round % 10 == 9 {
            handle.flush_cache().await.unwrap();
        }
        let truth = now(&handle).await;
        known.follow(&mut stream, truth.last_number).await;
        assert_eq!(known, truth, "round {round}");
        // Another one goes on where the first is, without a snapshot.
        if round == 20 {
            resumed = Some(handle.subscribe_kv_events(known.last_number + 1).await.unwrap());
        }
    }
    let batch = resumed.as_mut().expect("round 20").next().await.expect("kept");
    assert_eq!(batch.snapshot, None);
    drop((stream, resumed));
    // Nobody listened for a while: there is no going on.
    run(&handle, &mut rng).await;
    run(&handle, &mut rng).await;
    let mut stream = handle.subscribe_kv_events(known.last_number + 1).await.unwrap();
    assert!(stream.next().await.expect("a batch").snapshot.is_some());
    handle.shutdown();
    while stream.next().await.is_some() {}
    assert_eq!(handle.subscribe_kv_events(0).await.err(), Some(SubscribeError::Stopped));
}

#[tokio::test]
async fn who_may_subscribe_is_bounded() {
    let closed = start(false);
    assert_eq!(closed.subscribe_kv_events(0).await.err(), Some(SubscribeError::NotPublished));
    assert!(closed.flush_cache().await.is_ok());

    let handle = start(true);
    let mut streams = Vec::new();
    for _ in 0..MAX_KV_SUBSCRIBERS {
        streams.push(handle.subscribe_kv_events(0).await.unwrap());
    }
    assert_eq!(handle.subscribe_kv_events(0).await.err(), Some(SubscribeError::TooMany));
    streams.pop();
    assert!(handle.subscribe_kv_events(0).await.is_ok());
}

/// Whoever comes back in a loop is not told of all blocks each time: it waits for its turn, and holds up nobody meanwhile.
#[tokio::test]
async fn all_blocks_are_copied_once_in_a_while() {
    let settings = SchedulerSettings { kv_events: true, ..SchedulerSettings::default() };
    let hour = Duration::from_secs(3600);
    let executor = FakeExecutor::new(1000);
    let observer = Box::new(Recorder::default());
    let handle = start_with_snapshots(executor, fake_model(1000), &settings, 0, hour, observer).unwrap();
    let mut rng = Rng::new(5);
    run(&handle, &mut rng).await;
    let mut first = handle.subscribe_kv_events(0).await.unwrap();
    let snapshot = first.next().await.expect("the engine runs");
    assert!(snapshot.snapshot.is_some());
    for _ in 0..100 {
        // It leaves before it was answered.
        let mut impatient = Box::pin(handle.subscribe_kv_events(0));
        assert!(futures::poll!(&mut impatient).is_pending());
    }
    let mut late = Box::pin(handle.subscribe_kv_events(0));
    assert!(futures::poll!(&mut late).is_pending());
    // Others go on: requests, the subscriber that is there, and one that knows where it was.
    run(&handle, &mut rng).await;
    let next = first.next().await.expect("the engine runs");
    assert_eq!((next.sequence_number, next.snapshot), (snapshot.sequence_number + 1, None));
    let mut resumed = handle.subscribe_kv_events(next.sequence_number).await.unwrap();
    assert_eq!(resumed.next().await.expect("kept").sequence_number, next.sequence_number);
    assert!(futures::poll!(&mut late).is_pending());
    handle.shutdown();
    assert_eq!(late.await.err(), Some(SubscribeError::Stopped));
}
