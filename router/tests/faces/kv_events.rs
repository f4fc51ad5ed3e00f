//! What gateways learn of the prefix cache, and how it is flushed.

use quire_engine::SchedulerSettings;
use quire_engine::testing::FakeExecutor;
use quire_proto::smg::grpc::common;
use quire_proto::smg::grpc::common::kv_cache_event::Data;
use quire_proto::vllm::grpc::engine as vllm;
use quire_router::generation::Limits;
use tonic::Code;

use crate::contracts::{answers, engine, generate};
use crate::harness::{Server, VOCAB, saying};

fn telling(executor: FakeExecutor) -> Server {
    let settings = SchedulerSettings { kv_events: true, ..SchedulerSettings::default() };
    Server::with(executor, Limits::default(), &settings)
}

/// A request whose prompt has these tokens.
fn continuing(token_ids: &[u32], max_tokens: u32) -> vllm::GenerateRequest {
    let input_ids = token_ids.to_vec();
    let sampling = vllm::SamplingParams { max_tokens: Some(max_tokens), ignore_eos: true, ..Default::default() };
    vllm::GenerateRequest {
        input: Some(vllm::generate_request::Input::Tokenized(vllm::TokenizedInput { input_ids, ..Default::default() })),
        ..generate(true, sampling)
    }
}

#[tokio::test]
async fn a_gateway_is_told_of_blocks_as_they_come_and_go() {
    let server = telling(saying("x"));
    let prompt: Vec<u32> = (100..140).collect();
    answers(&server, continuing(&prompt, 1)).await;
    let subscribe = common::SubscribeKvEventsRequest { start_sequence_number: 0 };
    let mut stream = engine(&server).subscribe_kv_events(subscribe).await.expect("starts").into_inner();

    // First all that there is.
    let batch = stream.message().await.expect("no error").expect("a snapshot");
    assert_eq!(batch.snapshot, Some(common::KvSnapshotChunk { index: 0, count: 1, blocks: 2 }));
    assert!(batch.timestamp > 1.7e9);
    let data: Vec<_> = batch.events.iter().map(|event| event.data.as_ref().expect("data")).collect();
    let [Data::Cleared(_), Data::Stored(chain)] = data[..] else { panic!("{data:?}") };
    assert_eq!((chain.parent_block_hash, chain.cache_salt.as_ref(), chain.group_idx), (None, None, Some(0)));
    assert_eq!(chain.kv_cache_spec_kind.as_deref(), Some("full_attention"));
    let token_ids: Vec<u32> = chain.blocks.iter().flat_map(|block| block.token_ids.clone()).collect();
    assert_eq!((token_ids.as_slice(), chain.blocks[0].block_size), (&prompt[..32], 16));
    let known: Vec<i64> = chain.blocks.iter().map(|block| block.block_hash).collect();

    // Then what changes: the next request's third block follows the second of the first.
    let longer: Vec<u32> = (100..150).collect();
    answers(&server, continuing(&longer, 1)).await;
    let next = stream.message().await.expect("no error").expect("a batch");
    assert_eq!((next.sequence_number, next.snapshot), (batch.sequence_number + 1, None));
    let Some(Data::Stored(chain)) = &next.events[0].data else { panic!("{next:?}") };
    assert_eq!((chain.parent_block_hash, chain.blocks.len()), (Some(known[1]), 1));
    assert_eq!(chain.blocks[0].token_ids, &longer[32..48]);

    let flush = engine(&server).flush_cache(common::FlushCacheRequest::default()).await.expect("answers").into_inner();
    assert_eq!((flush.success, flush.message.as_str()), (true, "dropped 3 cached blocks"));
    let gone = stream.message().await.expect("no error").expect("a batch");
    assert!(
        matches!(gone.events[..], [common::KvCacheEvent { event_id: 1, data: Some(Data::Cleared(_)) }]),
        "{gone:?}"
    );
    assert_eq!(gone.sequence_number, next.sequence_number + 1);
    assert_eq!(server.engine.stats().kv_groups()[0].num_cached, 0);

    // Who was away for a moment is told what came meanwhile.
    let again = common::SubscribeKvEventsRequest { start_sequence_number: next.sequence_number };
    let mut back = engine(&server).subscribe_kv_events(again).await.expect("starts").into_inner();
    assert_eq!(back.message().await.expect("no error"), Some(next));
    assert_eq!(back.message().await.expect("no error"), Some(gone));

    // It is no request: a drain does not wait for it.
    assert_eq!(server.service.num_inflight(), 0);
    server.lifecycle.begin_drain();
    assert_eq!(stream.message().await.expect_err("ends").code(), Code::Unavailable);
}

#[tokio::test]
async fn a_salted_block_says_that_others_cannot_hit_it() {
    let server = telling(saying("x"));
    let prompt: String = "a fox and a crow ".repeat(20);
    let body = serde_json::json!({"model": "demo", "prompt": prompt, "max_tokens": 1, "cache_salt": "mine"});
    assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    let subscribe = common::SubscribeKvEventsRequest::default();
    let mut stream = engine(&server).subscribe_kv_events(subscribe).await.expect("starts").into_inner();
    let batch = stream.message().await.expect("no error").expect("a snapshot");
    let Some(Data::Stored(chain)) = &batch.events[1].data else { panic!("{batch:?}") };
    let salt = chain.cache_salt.as_deref().expect("not the plain one");
    assert!(salt.len() == 16 && !salt.contains("mine"), "{salt}");
}

#[tokio::test]
async fn a_flush_says_what_running_requests_hold() {
    let slow = FakeExecutor::new(VOCAB).on_step(|_| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        Ok(())
    });
    let server = telling(slow);
    let prompt: Vec<u32> = (100..140).collect();
    let mut stream = engine(&server).generate(continuing(&prompt, 4000)).await.expect("starts").into_inner();
    // With the first token the prompt is computed, and its two full blocks could be hit.
    assert!(stream.message().await.expect("no error").is_some());
    let now = common::FlushCacheRequest { timeout_s: 0.0 };
    let flush = engine(&server).flush_cache(now).await.expect("answers").into_inner();
    assert!(!flush.success && flush.message.contains("held by running requests"), "{flush:?}");
    drop(stream);
    let wait = common::FlushCacheRequest { timeout_s: 60.0 };
    assert!(engine(&server).flush_cache(wait).await.expect("answers").into_inner().success);
    let endless = common::FlushCacheRequest { timeout_s: 1e9 };
    assert_eq!(engine(&server).flush_cache(endless).await.expect_err("refused").code(), Code::InvalidArgument);
}
