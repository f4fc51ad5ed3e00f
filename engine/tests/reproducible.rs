//! A request gives the same bits, whatever runs beside it and however it is cut: tokens and log probabilities of random
//! requests, alone and in random mixtures, over every setting that must not matter.

use std::sync::Arc;

use quire_engine::scheduler::{FinishReason, SamplingParams};
use quire_engine::testing::gguf::gguf_twins;
use quire_engine::testing::{
    ChoiceOutcome, HashGrammar, Recorder, TinyModel, read_all, start_on_cpu, submission, tiny_model,
};
use quire_engine::{
    DTypeChoice, EngineConfig, EngineHandle, KvDTypeChoice, ModelSource, QuantizeChoice, SchedulerSettings, Submission,
    TokenStream,
};
use quire_kernels::TensorFormat;
use quire_kernels::cpu::Isa;
use quire_scheduler::testing::Rng;

const NUM_REQUESTS: usize = 64;
const VOCAB: u32 = 250;
/// Of a block of the tiny models: K and V of 2 layers, 2 heads, 16 tokens; each is 16 dimensions.
const VECTORS_OF_BLOCK: u64 = 2 * 2 * 2 * 16;

/// Requests that differ in everything that a caller can choose. Some share prefixes.
fn requests(seed: u64) -> Vec<Submission> {
    let mut rng = Rng::new(seed);
    let mut below = |limit: u32| rng.below(limit);
    let prefixes: Vec<Vec<u32>> = (0..3).map(|_| (0..90).map(|_| below(VOCAB)).collect()).collect();
    let mut all = Vec::new();
    for i in 0..NUM_REQUESTS {
        let mut prompt = Vec::new();
        if below(2) == 0 {
            prompt.extend_from_slice(&prefixes[below(3) as usize][..1 + below(90) as usize]);
        }
        prompt.extend((0..1 + below(70)).map(|_| below(VOCAB)));
        // Long outputs of short prompts: sequences that outgrow what there was room for when they were admitted.
        let max_tokens = if below(3) == 0 && prompt.len() < 120 { 60 + below(60) } else { 1 + below(36) };
        let mut request = submission(&prompt, max_tokens);
        let sampling = &mut request.sampling;
        sampling.seed = u64::from(below(1000)) + ((i as u64) << 40);
        if below(3) > 0 {
            *sampling = SamplingParams {
                temperature: 0.3 + below(15) as f32 / 10.0,
                top_k: (below(2) == 0).then(|| 1 + below(60)),
                top_p: 1.0 - below(4) as f32 / 10.0,
                min_p: below(2) as f32 / 20.0,
                typical_p: 1.0 - below(2) as f32 / 10.0,
                num_choices: if below(4) == 0 { 3 } else { 1 },
                ..sampling.clone()
            };
        }
        if below(3) == 0 {
            sampling.repetition_penalty = 1.2;
            sampling.presence_penalty = 0.3;
            sampling.frequency_penalty = -0.2;
        }
        sampling.logprobs = (below(2) == 0).then(|| below(6));
        sampling.prompt_logprobs = (below(5) == 0).then(|| below(4));
        if below(4) == 0 {
            sampling.logit_bias = vec![(below(VOCAB), 2.5), (below(VOCAB), f32::NEG_INFINITY)];
        }
        if below(6) == 0 {
            sampling.allowed_token_ids = Some((0..40).map(|_| below(VOCAB)).collect());
        }
        if below(6) == 0 {
            sampling.bad_words = vec![vec![below(VOCAB)], vec![below(VOCAB), below(VOCAB)]];
        }
        if below(4) == 0 {
            request.grammar = Some(Arc::new(HashGrammar { vocab_size: VOCAB, end: 2 }));
        }
        if below(3) == 0 {
            request.stop_token_ids = (0..12).map(|_| below(VOCAB)).collect();
            request.min_tokens = below(6);
        }
        all.push(request);
    }
    all
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    num_threads: usize,
    pipeline_depth: u32,
    max_num_batched_tokens: u32,
    prefix_cache: bool,
    /// So few that sequences are preempted.
    few_blocks: bool,
}

const ALONE: Variant =
    Variant { num_threads: 1, pipeline_depth: 0, max_num_batched_tokens: 512, prefix_cache: false, few_blocks: false };

const VARIANTS: [Variant; 8] = [
    Variant { num_threads: 2, ..ALONE },
    Variant { max_num_batched_tokens: 8, prefix_cache: true, ..ALONE },
    Variant { max_num_batched_tokens: 33, pipeline_depth: 1, ..ALONE },
    Variant { num_threads: 2, max_num_batched_tokens: 100, pipeline_depth: 1, prefix_cache: true, ..ALONE },
    Variant { few_blocks: true, max_num_batched_tokens: 64, ..ALONE },
    Variant { few_blocks: true, max_num_batched_tokens: 64, prefix_cache: true, ..ALONE },
    Variant { few_blocks: true, max_num_batched_tokens: 21, pipeline_depth: 1, ..ALONE },
    Variant { few_blocks: true, num_threads: 2, pipeline_depth: 1, prefix_cache: true, max_num_batched_tokens: 50 },
];

/// A model, how it is computed, and how many blocks are few for it.
#[derive(Clone)]
struct Setup {
    source: ModelSource,
    isa: Isa,
    dtype: DTypeChoice,
    quantize: QuantizeChoice,
    kv_dtype: KvDTypeChoice,
    few_blocks: u64,
}

impl Setup {
    fn new(source: ModelSource, isa: Isa, few_blocks: u64) -> Self {
        let (dtype, quantize, kv_dtype) = (DTypeChoice::Auto, QuantizeChoice::None, KvDTypeChoice::Auto);
        Self { source, isa, dtype, quantize, kv_dtype, few_blocks }
    }
}

fn start(setup: &Setup, variant: Variant) -> EngineHandle {
    let vector_bytes = match (setup.kv_dtype, setup.dtype) {
        // And a scale.
        (KvDTypeChoice::Int8 | KvDTypeChoice::Fp8, _) => 16 + 4,
        (KvDTypeChoice::F32, _) | (KvDTypeChoice::Auto, DTypeChoice::F32) => 16 * 4,
        _ => 16 * 2,
    };
    let num_blocks = if variant.few_blocks { setup.few_blocks } else { 512 };
    let engine = EngineConfig {
        dtype: setup.dtype,
        quantize: setup.quantize,
        kv_dtype: setup.kv_dtype,
        num_threads: variant.num_threads,
        pipeline_depth: variant.pipeline_depth,
        kv_cache_memory: num_blocks * VECTORS_OF_BLOCK * vector_bytes,
        ..EngineConfig::default()
    };
    let settings = SchedulerSettings {
        max_num_seqs: 8,
        max_num_batched_tokens: variant.max_num_batched_tokens,
        max_model_len: 256,
        prefix_cache: variant.prefix_cache,
        max_waiting_tokens: 1 << 20,
        max_waiting_seconds: 0,
        ..SchedulerSettings::default()
    };
    let handle = start_on_cpu(&setup.source, setup.isa, &engine, &settings, Box::new(Recorder::default())).unwrap();
    assert_eq!(u64::from(handle.model().num_blocks), num_blocks);
    handle
}

/// All that a caller sees, in bits.
fn bits(outcome: &ChoiceOutcome) -> impl PartialEq + std::fmt::Debug + use<> {
    let values = |logprobs: &quire_engine::scheduler::TokenLogprobs| {
        let top: Vec<_> = logprobs.top.iter().map(|(id, value)| (*id, value.to_bits())).collect();
        (logprobs.logprob.to_bits(), logprobs.rank, top)
    };
    let chosen: Vec<_> = outcome.logprobs.iter().map(|logprobs| logprobs.as_ref().map(values)).collect();
    let prompt: Vec<_> =
        outcome.prompt_logprobs.iter().map(|(position, logprobs)| (*position, values(logprobs))).collect();
    (outcome.tokens.clone(), chosen, prompt, outcome.finish)
}

fn assert_same(found: &[ChoiceOutcome], expected: &[ChoiceOutcome], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (choice, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(bits(found), bits(expected), "{what}, choice {choice}");
    }
}

/// One after the other, each on its own.
async fn run_alone(handle: &EngineHandle, requests: &[Submission]) -> Vec<Vec<ChoiceOutcome>> {
    let mut outcomes = Vec::new();
    for request in requests {
        outcomes.push(read_all(&mut handle.submit(request.clone()).await.unwrap()).await);
    }
    outcomes
}

/// In random order and bursts; between bursts, a random stream is read for a while.
async fn run_mixed(handle: &EngineHandle, requests: &[Submission], seed: u64) -> Vec<Vec<ChoiceOutcome>> {
    let mut rng = Rng::new(seed);
    let mut order: Vec<usize> = (0..requests.len()).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i as u32 + 1) as usize);
    }
    let mut readers = Vec::new();
    let mut outcomes = vec![Vec::new(); requests.len()];
    let mut left = &order[..];
    while !left.is_empty() {
        let (burst, rest) = left.split_at((1 + rng.below(20) as usize).min(left.len()));
        left = rest;
        let mut streams: Vec<(usize, TokenStream)> = Vec::new();
        for &index in burst {
            streams.push((index, handle.submit(requests[index].clone()).await.unwrap()));
        }
        if rng.below(3) == 0 {
            let (index, mut stream) = streams.swap_remove(rng.below(streams.len() as u32) as usize);
            outcomes[index] = read_all(&mut stream).await;
        }
        readers.extend(
            streams.into_iter().map(|(index, mut s)| tokio::spawn(async move { (index, read_all(&mut s).await) })),
        );
    }
    for reader in readers {
        let (index, outcome) = reader.await.unwrap();
        outcomes[index] = outcome;
    }
    outcomes
}

async fn check_all(setup: Setup, seed: u64) {
    let Setup { isa, dtype, quantize, kv_dtype, few_blocks, .. } = setup;
    let requests = requests(seed);
    let expected = run_alone(&start(&setup, ALONE), &requests).await;
    let lens: Vec<usize> = expected.iter().flatten().map(|choice| choice.tokens.len()).collect();
    assert!(lens.iter().sum::<usize>() > 500, "{lens:?}");
    let (mut preemptions, mut hits) = (0, 0);
    for (number, variant) in VARIANTS.into_iter().enumerate() {
        let handle = start(&setup, variant);
        let found = run_mixed(&handle, &requests, seed * 100 + number as u64).await;
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_same(
                found,
                expected,
                &format!("request {i}, {variant:?}, {isa}, {dtype:?}, {quantize:?}, {kv_dtype:?}"),
            );
        }
        preemptions += handle.stats().num_preemptions;
        hits += handle.stats().prefix_hit_tokens;
    }
    // Where every layer has a window, a sequence hardly ever outgrows what it was admitted with.
    // How many preemptions there are depends on who arrives when.
    let least = if few_blocks < 17 { 0 } else { 8 };
    assert!(preemptions >= least, "{preemptions} preemptions: what was to be shown was not tried");
    assert!(hits > 1000, "{hits} tokens were hit: what was to be shown was not tried");
    resume_all(&setup, &requests, &expected, seed).await;
}

/// Each choice of each request is continued from a random token on, by an engine that never saw its beginning.
async fn resume_all(setup: &Setup, requests: &[Submission], expected: &[Vec<ChoiceOutcome>], seed: u64) {
    let mut rng = Rng::new(seed + 7);
    let (mut resumed, mut tails) = (Vec::new(), Vec::new());
    for (request, choices) in requests.iter().zip(expected) {
        for (index, choice) in choices.iter().enumerate().filter(|(_, choice)| choice.tokens.len() > 1) {
            let cut = 1 + rng.below(choice.tokens.len() as u32 - 1) as usize;
            let mut request = request.clone();
            request.generated = choice.tokens[..cut].to_vec();
            request.choice_offset = index as u32;
            request.sampling.num_choices = 1;
            request.sampling.prompt_logprobs = None;
            resumed.push(request);
            tails.push(vec![ChoiceOutcome {
                tokens: choice.tokens[cut..].to_vec(),
                logprobs: choice.logprobs[cut..].to_vec(),
                prompt_logprobs: Vec::new(),
                finish: choice.finish,
            }]);
        }
    }
    for variant in [VARIANTS[1], VARIANTS[6]] {
        let found = run_mixed(&start(setup, variant), &resumed, seed).await;
        for (i, (found, tail)) in found.iter().zip(&tails).enumerate() {
            assert_same(found, tail, &format!("resumed {i}, {variant:?}, {}, {:?}", setup.isa, setup.dtype));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_in_bf16() {
    for isa in Isa::available() {
        check_all(Setup::new(tiny_model(1, TinyModel::Llama), isa, 17), 11).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_in_f32() {
    let setup = Setup::new(tiny_model(2, TinyModel::Llama), Isa::detect(), 17);
    check_all(Setup { dtype: DTypeChoice::F32, ..setup }, 12).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_in_8_bits() {
    let setup = Setup::new(tiny_model(5, TinyModel::Llama), Isa::detect(), 17);
    check_all(Setup { quantize: QuantizeChoice::Int8, ..setup }, 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_in_8_bit_floats() {
    let setup = Setup::new(tiny_model(5, TinyModel::Llama), Isa::detect(), 17);
    check_all(Setup { quantize: QuantizeChoice::Fp8, ..setup }, 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_in_4_bits() {
    let setup = Setup::new(tiny_model(6, TinyModel::Llama), Isa::detect(), 17);
    check_all(Setup { quantize: QuantizeChoice::Int4, ..setup }, 16).await;
}

/// Blocks of every kind that fits rows of 64 and 96 weights, mixed within fused matrices too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_in_a_file_of_blocks() {
    let kinds = [TensorFormat::Q8_0, TensorFormat::Q4_0, TensorFormat::Q4_1, TensorFormat::Q5_1, TensorFormat::Iq4Nl];
    let twins = gguf_twins(&tiny_model(7, TinyModel::Llama), |name, _| {
        kinds[name.bytes().map(usize::from).sum::<usize>() % kinds.len()]
    });
    let temp = tempfile::tempdir().unwrap();
    let file = twins.file.write(&temp.path().join("model.gguf"));
    let setup = Setup::new(file, Isa::detect(), 17);
    check_all(Setup { dtype: DTypeChoice::Bf16, ..setup }, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn llama_with_a_quantized_cache() {
    for isa in Isa::available() {
        let setup = Setup::new(tiny_model(1, TinyModel::Llama), isa, 17);
        check_all(Setup { kv_dtype: KvDTypeChoice::Int8, ..setup }, 17).await;
        let setup = Setup::new(tiny_model(1, TinyModel::Llama), isa, 17);
        check_all(Setup { kv_dtype: KvDTypeChoice::Fp8, ..setup }, 17).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn caches_of_other_types_than_the_weights() {
    let setup = || Setup::new(tiny_model(4, TinyModel::QwenMixed), Isa::detect(), 17);
    check_all(Setup { dtype: DTypeChoice::F32, kv_dtype: KvDTypeChoice::Bf16, ..setup() }, 18).await;
    check_all(Setup { kv_dtype: KvDTypeChoice::Int8, ..setup() }, 19).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_in_every_layer() {
    check_all(Setup::new(tiny_model(3, TinyModel::MistralWindow), Isa::detect(), 13), 13).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_kv_groups() {
    check_all(Setup::new(tiny_model(4, TinyModel::QwenMixed), Isa::detect(), 17), 14).await;
}

/// The comparison above would pass if all requests said the same: they do not, and seeds matter.
#[tokio::test]
async fn seeds_and_prompts_matter() {
    let source = tiny_model(1, TinyModel::Llama);
    let setup = Setup::new(source, Isa::detect(), 17);
    let handle = start(&setup, ALONE);
    let mut request = submission(&[5, 6, 7, 8], 24);
    request.sampling.temperature = 1.0;
    let mut seen = std::collections::HashSet::new();
    for seed in 0..16 {
        request.sampling.seed = seed;
        let outcome = run_alone(&handle, std::slice::from_ref(&request)).await.remove(0).remove(0);
        assert_eq!(outcome.finish, Some(FinishReason::Length));
        assert!(seen.insert(outcome.tokens));
    }
}
