//! The served engine, whole: loading, prefill and decode of models of real shapes with dummy weights.
//!
//! A case prints its pace as elements, which are tokens; loading prints weights.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quire_engine::testing::{Recorder, read_all, submission};
use quire_engine::{EmbeddedModel, EngineConfig, EngineHandle, LoadFormat, ModelSource, SchedulerSettings, start};

const PROMPT_LEN: usize = 512;
const NUM_TOKENS: u32 = 64;

/// (name, hidden, intermediate, layers, heads, KV heads, vocabulary)
const SHAPES: [(&str, [usize; 6]); 2] =
    [("llama-60m", [512, 1408, 8, 8, 2, 32000]), ("qwen2.5-0.5b", [896, 4864, 24, 14, 2, 151936])];

fn source(sizes: [usize; 6]) -> ModelSource {
    let [hidden, intermediate, layers, heads, kv_heads, vocab] = sizes;
    let config = format!(
        r#"{{"architectures": ["Qwen2ForCausalLM"], "hidden_size": {hidden}, "intermediate_size": {intermediate},
        "num_hidden_layers": {layers}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
        "vocab_size": {vocab}, "max_position_embeddings": 4096, "tie_word_embeddings": true, "dtype": "bfloat16"}}"#
    );
    let files = vec![("config.json", &*config.into_bytes().leak())];
    ModelSource::Embedded(Box::leak(Box::new(EmbeddedModel { name: "bench", files: files.leak() })))
}

fn load(source: &ModelSource) -> EngineHandle {
    let engine = EngineConfig { load_format: LoadFormat::Dummy, kv_cache_memory: 1 << 30, ..EngineConfig::default() };
    let settings = SchedulerSettings { prefix_cache: false, ..SchedulerSettings::default() };
    start(source, &engine, &settings, Box::new(Recorder::default())).expect("dummy weights always load")
}

async fn generate(handle: &EngineHandle, num_requests: u32, prompt_len: usize, num_tokens: u32) {
    let mut streams = Vec::new();
    for i in 0..num_requests {
        let prompt: Vec<u32> = (0..prompt_len as u32).map(|p| (p * 31 + i * 7 + 1) % 30000).collect();
        streams.push(handle.submit(submission(&prompt, num_tokens)).await.expect("there is room"));
    }
    for stream in &mut streams {
        black_box(read_all(stream).await);
    }
}

fn step(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for (name, sizes) in SHAPES {
        let source = source(sizes);
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(4));
        let handle = load(&source);
        group.throughput(Throughput::Elements(handle.model().num_parameters));
        group.bench_function("load", |bencher| bencher.iter(|| load(&source)));
        group.throughput(Throughput::Elements(PROMPT_LEN as u64));
        group.bench_function("prefill", |bencher| {
            bencher.iter(|| runtime.block_on(generate(&handle, 1, PROMPT_LEN, 1)));
        });
        for num_requests in [1, 8, 32] {
            group.throughput(Throughput::Elements(u64::from(num_requests * NUM_TOKENS)));
            group.bench_function(BenchmarkId::new("decode", num_requests), |bencher| {
                bencher.iter(|| runtime.block_on(generate(&handle, num_requests, 1, NUM_TOKENS)));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, step);
criterion_main!(benches);
