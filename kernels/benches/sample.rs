//! `sample` and `logprobs` over a vocabulary of 151,936 tokens, beside the machine's peak of reading memory.
//!
//! A table first (best of several runs, since other work disturbs single ones), then criterion's statistics.
//! `cargo bench --bench sample -- --quick` for a short look.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use quire_kernels::cpu::{CpuBackend, CpuBuffer, CpuConfig, peaks};
use quire_kernels::ops::logprobs::{Logprobs, LogprobsAt};
use quire_kernels::ops::sample::{Sample, SampleAt, SamplerRow, SamplerShape};
use quire_kernels::testing::Rng;
use quire_kernels::{Backend, DType};

const SHAPE: SamplerShape = SamplerShape { max_num_seqs: 64, max_model_len: 4096, vocab_size: 151_936 };

const PLAIN: SamplerRow<'static> = SamplerRow {
    prompt_len: 1024,
    seed: 1,
    choice_index: 0,
    temperature: 0.8,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    typical_p: 1.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    bias: &[],
    mask: None,
    stop_token_ids: &[],
    min_tokens: 0,
    bad_words: &[],
};

const WAYS: [(&str, SamplerRow<'static>); 7] = [
    ("greedy", SamplerRow { temperature: 0.0, ..PLAIN }),
    ("temperature", PLAIN),
    ("top_p", SamplerRow { top_p: 0.95, ..PLAIN }),
    ("top_k_top_p", SamplerRow { top_k: 50, top_p: 0.95, ..PLAIN }),
    ("min_p", SamplerRow { min_p: 0.05, ..PLAIN }),
    ("typical_p", SamplerRow { typical_p: 0.95, ..PLAIN }),
    ("penalties", SamplerRow { repetition_penalty: 1.1, presence_penalty: 0.5, ..PLAIN }),
];

struct Case {
    sampler: <CpuBackend as Backend>::Sampler,
    logits: CpuBuffer,
    token_table: CpuBuffer,
    out: CpuBuffer,
    num_rows: usize,
    rows: CpuBuffer,
    logprob_rows: CpuBuffer,
    tokens: CpuBuffer,
}

impl Case {
    fn new(backend: &mut CpuBackend, num_rows: usize, params: &SamplerRow<'_>) -> Self {
        let mut rng = Rng::new(1);
        let mut sampler = backend.alloc_sampler(&SHAPE).expect("memory");
        let mut logits = backend.alloc(DType::F32, num_rows * SHAPE.vocab_size).expect("memory");
        let mut token_table = backend.alloc(DType::U32, SHAPE.max_num_seqs * SHAPE.max_model_len).expect("memory");
        // Some likely tokens over many unlikely ones, as models give.
        for row in 0..num_rows {
            let logits_of_row: Vec<f32> =
                (0..SHAPE.vocab_size).map(|_| rng.normal() * if rng.below(100) == 0 { 7.0 } else { 2.5 }).collect();
            backend.write_f32(&mut logits, row * SHAPE.vocab_size, &logits_of_row).expect("fits");
            let tokens: Vec<u32> = (0..2048).map(|_| rng.below(SHAPE.vocab_size) as u32).collect();
            backend.write_u32(&mut token_table, row * SHAPE.max_model_len, &tokens).expect("fits");
            backend
                .set_sampler_row(&mut sampler, row as u32, &SamplerRow { seed: row as u64, ..*params })
                .expect("good parameters");
        }
        let out = backend.alloc(DType::U32, num_rows).expect("memory");
        let mut words = |words: Vec<u32>| {
            let mut buffer = backend.alloc(DType::U32, words.len()).expect("memory");
            backend.write_u32(&mut buffer, 0, &words).expect("fits");
            buffer
        };
        let rows = 0..num_rows as u32;
        let sample_rows = rows.clone().flat_map(|row| SampleAt { row, num_tokens: 2048 }.words()).collect();
        let logprob_rows = rows.flat_map(|logits_row| LogprobsAt { logits_row, token_index: 0 }.words()).collect();
        let (rows, logprob_rows, tokens) = (words(sample_rows), words(logprob_rows), words(vec![7]));
        Self { sampler, logits, token_table, out, num_rows, rows, logprob_rows, tokens }
    }

    fn run(&mut self, backend: &mut CpuBackend) {
        let Self { sampler, logits, token_table, out, num_rows, rows, .. } = self;
        let num_rows = *num_rows;
        let args = Sample { sampler, logits, rows, rows_offset: 0, num_rows, token_table, out, out_offset: 0 };
        backend.sample(args).expect("arguments fit");
    }

    fn run_logprobs(&self, backend: &mut CpuBackend, num_top: usize, out: &mut (CpuBuffer, CpuBuffer)) {
        let (out_values, out_ids) = out;
        let args = Logprobs {
            logits: &self.logits,
            vocab_size: SHAPE.vocab_size,
            rows: &self.logprob_rows,
            rows_offset: 0,
            num_rows: self.num_rows,
            tokens: &self.tokens,
            num_top,
            out_values,
            out_ids,
            out_offset: 0,
        };
        backend.logprobs(args).expect("arguments fit");
    }
}

fn best_seconds(mut work: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut backend = CpuBackend::new(CpuConfig { num_threads, isa: None }).expect("threads");
    let mut criterion = Criterion::default()
        .configure_from_args()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));

    let limits = peaks::measure(&backend).expect("memory");
    println!("{:?}", backend.info());
    println!("peak: read {:.1} GB/s", limits.read_bytes_per_second / 1e9);
    println!("{:>5} {:>14} {:>12} {:>12} {:>8} {:>6}", "rows", "way", "best", "per row", "GB/s", "%");
    let line = |num_rows: usize, way: &str, seconds: f64| {
        let bytes = (num_rows * SHAPE.vocab_size * 4) as f64 / seconds;
        println!(
            "{num_rows:>5} {way:>14} {:>9.1} us {:>9.1} us {:>8.1} {:>6.1}",
            seconds * 1e6,
            seconds * 1e6 / num_rows as f64,
            bytes / 1e9,
            100.0 * bytes / limits.read_bytes_per_second,
        );
    };
    for num_rows in [1, 64] {
        for (way, params) in WAYS {
            let mut case = Case::new(&mut backend, num_rows, &params);
            line(num_rows, way, best_seconds(|| case.run(&mut backend)));
        }
        for num_top in [0, 20] {
            let case = Case::new(&mut backend, num_rows, &PLAIN);
            let len = num_rows * (1 + num_top);
            let mut out =
                (backend.alloc(DType::F32, len).expect("memory"), backend.alloc(DType::U32, len).expect("memory"));
            let seconds = best_seconds(|| case.run_logprobs(&mut backend, num_top, &mut out));
            line(num_rows, &format!("logprobs {num_top}"), seconds);
        }
    }

    let mut group = criterion.benchmark_group("sample");
    for (way, params) in WAYS {
        let mut case = Case::new(&mut backend, 16, &params);
        group.throughput(Throughput::Bytes((16 * SHAPE.vocab_size * 4) as u64));
        group.bench_function(BenchmarkId::new(way, 16), |bencher| bencher.iter(|| case.run(&mut backend)));
    }
    group.finish();
    criterion.final_summary();
}
