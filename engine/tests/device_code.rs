//! The device code that is embedded for cards, under the very executor that serves, against the CPU: run by the emulator, and on
//! a card where there is one.

use quire_engine::testing::{
    ChoiceOutcome, Recorder, TinyModel, prompt_logits, prompt_logits_on, read_all, start_on, start_on_cpu, submission,
    tiny_model,
};
use quire_engine::{
    DTypeChoice, EmbeddedModel, EngineConfig, EngineHandle, KvDTypeChoice, ModelSource, QuantizeChoice,
    SchedulerSettings,
};
use quire_kernels::cpu::Isa;
use quire_kernels::cuda::Device;
use quire_kernels::device_tests;
use quire_kernels::testing::{OpenDevice, card};

device_tests! {
    logits_are_those_of_the_cpu: |open| check_logits(open);
    a_batch_generates_the_tokens_that_the_cpu_does: |open| wait_for(check_batch(open));
    a_request_alone_and_in_a_batch_has_the_same_bits: |open| wait_for(check_same_bits(open));
}

fn wait_for<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn config(dtype: DTypeChoice) -> EngineConfig {
    EngineConfig { dtype, num_threads: 2, kv_cache_memory: 1 << 20, ..EngineConfig::default() }
}

fn settings() -> SchedulerSettings {
    SchedulerSettings {
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        max_model_len: 128,
        ..SchedulerSettings::default()
    }
}

fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|index| 3 + (seed * 97 + index * 31 + index * index) % 240).collect()
}

/// The largest absolute difference over the largest absolute number.
fn deviation(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0_f64, |largest, &x| largest.max(f64::from(x.abs())));
    let differences = found.iter().zip(expected).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
    differences.fold(0.0_f64, |worst, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) }) / largest
}

/// The same model with norms that differ in their last bits, as they do between devices.
fn nudged(source: &ModelSource) -> ModelSource {
    let ModelSource::Embedded(model) = source else { panic!("a tiny model is embedded") };
    let files = model.files.iter().map(|&(name, bytes)| match name {
        "config.json" => {
            let text = std::str::from_utf8(bytes).unwrap().replace("1e-5", "1.01e-5");
            (name, &*text.into_bytes().leak())
        }
        _ => (name, bytes),
    });
    let files: Vec<_> = files.collect();
    ModelSource::Embedded(Box::leak(Box::new(EmbeddedModel { name: model.name, files: files.leak() })))
}

/// Sums in another order; where numbers are rounded to few bits, one that lies near the edge may fall to its other side,
/// and a tiny model spreads that far. How far is seen on the CPU alone: with norms that differ in their last bits its own
/// logits move by 2.5e-2 in int4 and 2.9e-2 in int8.
fn check_logits<D: Device>(open: OpenDevice<D>) {
    let f32_alone = EngineConfig { ..config(DTypeChoice::F32) };
    let bf16 = config(DTypeChoice::Bf16);
    let cases = [
        ("f32", TinyModel::Llama, f32_alone.clone(), 2e-5),
        ("f32, window", TinyModel::MistralWindow, f32_alone.clone(), 2e-5),
        ("f32, biases and two groups", TinyModel::QwenMixed, f32_alone.clone(), 2e-5),
        (
            "f32, cache of int8",
            TinyModel::Llama,
            EngineConfig { kv_dtype: KvDTypeChoice::Int8, ..f32_alone.clone() },
            0.03,
        ),
        ("f32, cache of fp8", TinyModel::Llama, EngineConfig { kv_dtype: KvDTypeChoice::Fp8, ..f32_alone }, 0.03),
        ("bf16", TinyModel::Llama, bf16.clone(), 0.03),
        ("fp8", TinyModel::Llama, EngineConfig { quantize: QuantizeChoice::Fp8, ..bf16.clone() }, 0.03),
        ("int8", TinyModel::Llama, EngineConfig { quantize: QuantizeChoice::Int8, ..bf16.clone() }, 0.03),
        ("int4", TinyModel::Llama, EngineConfig { quantize: QuantizeChoice::Int4, ..bf16 }, 0.03),
    ];
    for (name, family, engine, bound) in cases {
        let source = tiny_model(3, family);
        let prompts = [prompt(1, 37)];
        if let Some(backend) = open(None) {
            let found = prompt_logits_on(backend, &source, &engine, &prompts, 32).unwrap();
            let expected = prompt_logits(&source, Isa::detect(), &engine, &prompts, 32).unwrap();
            let deviation = deviation(&found[0], &expected[0]);
            let own = self::deviation(
                &prompt_logits(&nudged(&source), Isa::detect(), &engine, &prompts, 32).unwrap()[0],
                &expected[0],
            );
            println!("{name}: {deviation:.1e}, and the CPU's own where norms differ by some 5e-7: {own:.1e}");
            assert!(deviation <= bound, "{name}: {deviation:.1e}");
            // No further from the CPU than the CPU from itself, but for bf16 and fp8, which it multiplies in pairs of its own.
            assert!(
                name == "bf16" || name.ends_with("fp8") || deviation <= 2.0 * own,
                "{name}: {deviation:.1e}, {own:.1e}"
            );
        }
    }
}

/// Requests at the same time, their outcomes in order.
async fn generate(handle: &EngineHandle, requests: &[(Vec<u32>, u32, f32)]) -> Vec<ChoiceOutcome> {
    let mut streams = Vec::new();
    for (index, (prompt, max_tokens, temperature)) in requests.iter().enumerate() {
        let mut submission = submission(prompt, *max_tokens);
        submission.sampling.temperature = *temperature;
        submission.sampling.seed = 7 + index as u64;
        submission.sampling.logprobs = Some(3);
        streams.push(handle.submit(submission).await.unwrap());
    }
    let mut outcomes = Vec::new();
    for stream in &mut streams {
        outcomes.push(read_all(stream).await.remove(0));
    }
    outcomes
}

async fn check_batch<D: Device>(open: OpenDevice<D>) {
    let source = tiny_model(3, TinyModel::Llama);
    let engine = config(DTypeChoice::F32);
    let observer = || Box::new(Recorder::default());
    let requests = [(prompt(1, 5), 9, 0.0), (prompt(2, 18), 7, 0.0), (prompt(3, 30), 5, 0.8)];
    if let Some(backend) = open(None) {
        let card = start_on(backend, &source, &engine, &settings(), observer()).unwrap();
        let cpu = start_on_cpu(&source, Isa::detect(), &engine, &settings(), observer()).unwrap();
        let (found, expected) = (generate(&card, &requests).await, generate(&cpu, &requests).await);
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.tokens, expected.tokens);
            assert_eq!(found.finish, expected.finish);
            for (found, expected) in found.logprobs.iter().zip(&expected.logprobs) {
                let (found, expected) = (found.as_ref().unwrap(), expected.as_ref().unwrap());
                assert!((found.logprob - expected.logprob).abs() < 1e-4, "{found:?} {expected:?}");
                assert_eq!(found.rank, expected.rank);
            }
        }
    }
}

/// The first promise: what a request gets depends on nobody else, whether steps are filled up and replayed or not.
async fn check_same_bits<D: Device>(open: OpenDevice<D>) {
    let source = tiny_model(3, TinyModel::Llama);
    let engine = config(DTypeChoice::Bf16);
    let observer = || Box::new(Recorder::default());
    let requests = [(prompt(1, 5), 6, 0.7), (prompt(2, 18), 6, 0.7), (prompt(3, 33), 6, 0.7)];
    if let Some(backend) = open(None) {
        let together = start_on(backend, &source, &engine, &settings(), observer()).unwrap();
        let together = generate(&together, &requests).await;
        if let Some(backend) = open(None) {
            let narrow =
                SchedulerSettings { max_num_seqs: 2, max_num_batched_tokens: 16, prefix_cache: false, ..settings() };
            let alone = start_on(backend, &source, &engine, &narrow, observer()).unwrap();
            let alone = generate(&alone, &requests[..1]).await;
            assert_eq!(alone[0].tokens, together[0].tokens);
            let bits = |outcome: &ChoiceOutcome| -> Vec<u32> {
                outcome.logprobs.iter().map(|logprobs| logprobs.as_ref().unwrap().logprob.to_bits()).collect()
            };
            assert_eq!(bits(&alone[0]), bits(&together[0]));
        }
    }
}

/// The same at every size of a batch that is served, which a card alone does in time.
#[test]
fn a_request_has_the_same_bits_in_batches_of_1_to_256_on_a_card() {
    let source = tiny_model(3, TinyModel::Llama);
    let engine = EngineConfig { kv_cache_memory: 64 << 20, ..config(DTypeChoice::Bf16) };
    let settings =
        SchedulerSettings { max_num_seqs: 256, max_num_batched_tokens: 2048, prefix_cache: false, ..settings() };
    let Some(backend) = card(None) else { return };
    let handle = start_on(backend, &source, &engine, &settings, Box::new(Recorder::default())).unwrap();
    let bits = |outcome: &ChoiceOutcome| -> Vec<(u32, u32)> {
        let logprobs = outcome.logprobs.iter().map(|logprobs| logprobs.as_ref().unwrap().logprob.to_bits());
        outcome.tokens.iter().copied().zip(logprobs).collect()
    };
    // Seeds go by place, so the first request is the same in every batch.
    let requests: Vec<(Vec<u32>, u32, f32)> = (0..256).map(|index| (prompt(index, 3 + index % 40), 12, 0.7)).collect();
    let alone = bits(&wait_for(generate(&handle, &requests[..1]))[0]);
    assert_eq!(alone.len(), 12);
    let mut last: Vec<Vec<(u32, u32)>> = Vec::new();
    for size in (1..=64).chain([65, 96, 97, 127, 128, 129, 160, 192, 193, 255, 256]) {
        let outcomes = wait_for(generate(&handle, &requests[..size]));
        let outcomes: Vec<_> = outcomes.iter().map(bits).collect();
        assert_eq!(outcomes[0], alone, "in a batch of {size}");
        // All that were there before have the bits that they had.
        assert!(last.iter().zip(&outcomes).all(|(before, now)| before == now), "in a batch of {size}");
        last = outcomes;
    }
}
