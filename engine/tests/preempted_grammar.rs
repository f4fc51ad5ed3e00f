//! A choice that obeys a grammar is preempted, and comes back to where it was: no token is told twice, and what is said is what
//! is said without preemption.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quire_engine::testing::{Recorder, TinyModel, read_all, start_on_cpu, submission, tiny_model};
use quire_engine::{EngineConfig, Grammar, NotAllowed, SchedulerSettings, Submission, TokenConstraint};
use quire_kernels::cpu::Isa;

const VOCAB: u32 = 250;
const NUM_REQUESTS: u32 = 6;
/// Of a block of the tiny model in bf16: K and V of 2 layers, 2 heads, 16 tokens, 16 dimensions.
const BLOCK_BYTES: u64 = 2 * 2 * 2 * 16 * 16 * 2;

/// Allows every third token, which ones by how many came before; counts the tokens that it is told.
#[derive(Debug)]
struct EveryThird(Arc<AtomicUsize>);

struct Place {
    num_told: Arc<AtomicUsize>,
    num_tokens: u32,
}

impl Grammar for EveryThird {
    fn begin(&self) -> Box<dyn TokenConstraint> {
        Box::new(Place { num_told: Arc::clone(&self.0), num_tokens: 0 })
    }
}

impl TokenConstraint for Place {
    fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed> {
        self.num_told.fetch_add(1, Ordering::Relaxed);
        let is_allowed = (token_id + self.num_tokens).is_multiple_of(3);
        self.num_tokens += 1;
        if is_allowed { Ok(()) } else { Err(NotAllowed) }
    }

    fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed> {
        let allowed = (0..VOCAB).filter(|id| (id + self.num_tokens).is_multiple_of(3));
        allowed.for_each(|id| mask[id as usize / 32] |= 1 << (id % 32));
        Ok(())
    }
}

/// What all requests say, how many tokens their grammars were told, and how often one was preempted.
async fn run(num_blocks: u64, pipeline_depth: u32) -> (Vec<Vec<u32>>, usize, u64) {
    let num_told = Arc::new(AtomicUsize::new(0));
    let engine = EngineConfig {
        num_threads: 1,
        pipeline_depth,
        kv_cache_memory: num_blocks * BLOCK_BYTES,
        ..EngineConfig::default()
    };
    let settings = SchedulerSettings {
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        max_model_len: 192,
        ..SchedulerSettings::default()
    };
    let source = tiny_model(3, TinyModel::Llama);
    let handle = start_on_cpu(&source, Isa::detect(), &engine, &settings, Box::new(Recorder::default())).unwrap();
    let mut streams = Vec::new();
    for index in 0..NUM_REQUESTS {
        let grammar: Arc<dyn Grammar> = Arc::new(EveryThird(Arc::clone(&num_told)));
        let request = Submission { grammar: Some(grammar), ..submission(&[index + 3, 7, 9], 150) };
        streams.push(handle.submit(request).await.unwrap());
    }
    let mut said = Vec::new();
    for stream in &mut streams {
        said.extend(read_all(stream).await.into_iter().map(|choice| choice.tokens));
    }
    (said, num_told.load(Ordering::Relaxed), handle.stats().num_preemptions)
}

#[tokio::test]
async fn a_preempted_choice_is_not_told_its_tokens_again() {
    let (expected, _, none) = run(200, 0).await;
    assert_eq!((expected.len(), none), (NUM_REQUESTS as usize, 0));
    for pipeline_depth in [0, 1] {
        let (said, num_told, num_preemptions) = run(13, pipeline_depth).await;
        assert!(num_preemptions > 0, "{num_preemptions} preemptions: what was to be shown was not tried");
        assert_eq!(said, expected, "depth {pipeline_depth}");
        let num_tokens: usize = said.iter().map(Vec::len).sum();
        assert_eq!(num_tokens, 150 * NUM_REQUESTS as usize);
        assert!(num_told <= num_tokens, "{num_told} tokens were told of {num_tokens}");
    }
}
